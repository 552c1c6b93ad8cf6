"""Degradations of clean images, each with its physical parameter and a seeded generator.

Images are float arrays (H, W) or (H, W, C) in [0, 1]; results have the same range.
"""

import numpy as np

from modeling.geometry import token_grid

Array = np.ndarray


def rician_noise(image_01: Array, sigma: float, rng: np.random.Generator) -> Array:
    """Magnitude of a complex image with Gaussian noise of deviation `sigma` on both channels.

    `sigma` is in units of the intensity range. Without signal the result follows a Rayleigh
    distribution with mean sigma * sqrt(pi / 2): the noise floor of magnitude MRI
    (Gudbjartsson and Patz, 1995).
    """
    real = image_01 + sigma * rng.standard_normal(image_01.shape)
    imaginary = sigma * rng.standard_normal(image_01.shape)
    return np.clip(np.hypot(real, imaginary), 0.0, 1.0)


def low_resolution(image_01: Array, factor: int) -> Array:
    """Mean over `factor` x `factor` pixels: (H, W) becomes (H / factor, W / factor).

    Raises ValueError when a side is no multiple of `factor`.
    """
    rows, columns = token_grid(image_01.shape[:2], factor)
    blocks = image_01.reshape(rows, factor, columns, factor, *image_01.shape[2:])
    return blocks.mean(axis=(1, 3))
