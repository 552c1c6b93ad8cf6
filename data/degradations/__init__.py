"""Degradations of clean images, by name, each with physical parameters and one severity.

    degraded = degrade("mri_motion", image_01, severity=0.5, rng=np.random.default_rng(7))

docs/degradations.md shows them all.
"""

from dataclasses import asdict, dataclass
from difflib import get_close_matches
from inspect import signature

import numpy as np

from data.degradations.mri import rician_noise as rician_noise
from data.degradations.optical import low_resolution as low_resolution
from data.degradations.radiation import Calibration
from data.degradations.registry import DEGRADATIONS, Array, Degradation, Rng

HU_RANGE = (-1000.0, 1000.0)
"""What 0 and 1 stand for in a CT image that does not say."""
FIELD_OF_VIEW_MM = 250.0
"""Longer side of a CT image that does not say."""


@dataclass(frozen=True)
class Degraded:
    """A degraded image and all that is to be known of it."""

    image_01: Array
    """As the clean image in shape (down-sampling: smaller), dtype and range."""
    target_01: Array
    """What a restoration is to give: the clean image, with the metal where metal was inserted."""
    parameters: dict[str, float]
    task: str
    sentence: str
    """The assessment of the image."""


def degrade(
    name: str,
    image_01: Array,
    severity: float,
    rng: Rng,
    *,
    hu_range: tuple[float, float] = HU_RANGE,
    pixel_mm: float | None = None,
) -> Degraded:
    """One degradation of a float image (H, W) or (H, W, 3) in [0, 1]; equal seeds, equal results.

    `severity` is in (0, 1]. For CT in the sinogram, `hu_range` is what 0 and 1 stand for (0 should
    be air), and without `pixel_mm` the longer side of the image is FIELD_OF_VIEW_MM.

    Raises ValueError for an unknown name, a severity or an image out of range, a coloured image
    where the physics knows no colour, and a grey one where it needs some.
    """
    if name not in DEGRADATIONS:
        near = get_close_matches(name, DEGRADATIONS, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown degradation {name!r}; the nearest is {near!r}")
    entry = DEGRADATIONS[name]
    parameters = entry.parameters(severity)
    image = _accepted(entry, image_01)
    arguments: dict[str, object] = dict(parameters)
    accepts = signature(entry.apply).parameters
    if entry.in_hounsfield:
        pixel_mm = FIELD_OF_VIEW_MM / max(image.shape) if pixel_mm is None else pixel_mm
        calibration = Calibration(*hu_range, pixel_mm)
        arguments["calibration"] = calibration
        parameters |= asdict(calibration)
    if "rng" in accepts:
        arguments["rng"] = rng
    result = entry.apply(image, **arguments)
    pair = result if isinstance(result, tuple) else (result, image)
    degraded, target = (_as_given(found, image_01) for found in pair)
    return Degraded(degraded, target, parameters, entry.task, entry.sentence(severity))


def _accepted(entry: Degradation, image_01: Array) -> Array:
    """float64; (H, W) where the physics knows no colour."""
    if image_01.ndim not in (2, 3) or image_01.shape[2:] not in ((), (3,)) or not image_01.size:
        raise ValueError(f"{entry.name}: image {image_01.shape} must be (H, W) or (H, W, 3)")
    low, high = image_01.min(), image_01.max()
    if image_01.dtype.kind != "f" or not (low >= 0.0 and high <= 1.0):
        found = f"{image_01.dtype} in [{low}, {high}]"
        raise ValueError(f"{entry.name}: image is {found}, must be float in [0, 1]")
    image = image_01.astype(np.float64)
    if image.ndim == 2 and entry.channels == "colour":
        raise ValueError(f"{entry.name}: needs a colour image (H, W, 3)")
    if image.ndim == 2 or entry.channels != "grey":
        return image
    if np.any(image != image[..., :1]):
        raise ValueError(f"{entry.name}: needs a grey image, its channels must be equal")
    return image[..., 0]


def _as_given(image: Array, given: Array) -> Array:
    """Clipped, in the dtype and with the channels of the image that was given."""
    if image.ndim < given.ndim:
        image = np.repeat(image[..., None], given.shape[2], axis=2)
    return image.clip(0.0, 1.0).astype(given.dtype)
