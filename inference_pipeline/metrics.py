"""Numbers of an image against its truth, each by a named protocol.

`medq` is the definition users publish with. `amir` measures on the range of values that the truth
really spans, so that dark scans are not flattered; scaling images and range together changes
nothing, so 8-bit values give what float images in [0, 1] give. `standard` is SSIM as Wang et al.
2004 define it. MS-SSIM (Wang et al. 2003) takes nothing of a protocol but the data range.
"""

import warnings
from collections.abc import Collection, Iterable
from functools import partial

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

from data.config import nearest
from data.scores import PEAK, psnr_db, rgb_arrays, ssim

from .text_metrics import TEXT_PROTOCOLS

UNIFORM_SIDE, GAUSSIAN_SIDE, SIGMA = 7, 11, 1.5
"""Sides of the windows, scikit-image's default and Wang's, in pixels; deviation of Wang's."""
K1, K2 = 0.01, 0.03
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
MS_SSIM_SIDE = (GAUSSIAN_SIDE - 1) * 2 ** (len(SCALE_WEIGHTS) - 1)
"""The shorter side has to be longer, for more than one window at the coarsest scale."""

_GAUSSIAN = f"SSIM {GAUSSIAN_SIDE} x {GAUSSIAN_SIDE} Gaussian window, sigma {SIGMA}"
_DESCRIPTIONS = {
    "medq": f"8-bit RGB, range {PEAK:.0f}, SSIM {UNIFORM_SIDE} x {UNIFORM_SIDE} uniform window",
    "amir": f"RGB, range max - min of the truth, {_GAUSSIAN}",
    "standard": f"8-bit RGB, range {PEAK:.0f}, {_GAUSSIAN}",
}
PROTOCOLS = tuple(_DESCRIPTIONS)
PROTOCOL = PROTOCOLS[0]
ALWAYS = ("psnr", "ssim")
"""What every run measures."""
METRICS = (*ALWAYS, "ms_ssim")
KINDS = ("", "_input", "_bicubic", "_ceiling")
"""Suffixes of a metric: the restoration, and what it is held against."""


def describe(protocol: str) -> str:
    """One line that says what the numbers of a protocol mean."""
    return f"{known(protocol, PROTOCOLS, 'protocol')}: PSNR in dB; {_DESCRIPTIONS[protocol]}"


def known(name: str, names: Collection[str], what: str) -> str:
    """`name`, when it is one of `names`; else a ValueError that says the nearest."""
    if name not in names:
        raise ValueError(f"{what} {name!r} is unknown: {nearest(name, names)}")
    return name


def prefixes(protocols: Iterable[str]) -> dict[str, str]:
    """Protocol -> what its numbers' names begin with; the first one's names are plain."""
    return {protocol: f"{protocol}:" if i else "" for i, protocol in enumerate(protocols)}


def number_names(protocols: Iterable[str] = (PROTOCOL,)) -> list[str]:
    """Every name that a number of a result can have."""
    images = [metric + kind for metric in (*METRICS, "lpips") for kind in KINDS]
    return [p + name for p in prefixes(protocols).values() for name in images] + [*TEXT_PROTOCOLS]


def measure(
    image: Image.Image,
    truth: Image.Image,
    protocol: str = PROTOCOL,
    metrics: Iterable[str] = ALWAYS,
    kind: str = "",
) -> dict[str, float]:
    """`<metric><kind>` -> number, for two RGB images of one size.

    Equal images have the PSNR PSNR_OF_EQUAL_IMAGES. `ms_ssim` is left out, with one warning,
    where a side is too short for its scales. Raises ValueError for unknown names, a side shorter
    than the window, sizes that differ, and a truth of one value, which has no range for `amir`.
    """
    known(protocol, PROTOCOLS, "protocol")
    a, b = (x.astype(np.float64) for x in rgb_arrays(image, truth))
    data_range = float(np.ptp(b)) if protocol == "amir" else PEAK
    if not data_range:
        raise ValueError("the truth has one value everywhere: no data range for protocol 'amir'")
    numbers: dict[str, float] = {}
    for metric in metrics:
        if known(metric, METRICS, "metric") == "psnr":
            numbers[metric + kind] = psnr_db(image, truth, data_range)
        elif metric == "ssim":
            side = UNIFORM_SIDE if protocol == "medq" else GAUSSIAN_SIDE
            if min(image.size) < side:
                size = f"{image.width} x {image.height}"
                raise ValueError(f"ssim of {protocol!r} needs sides of at least {side}, not {size}")
            gaussian = protocol != "medq"
            mean = _ssim_parts(a, b, data_range)[0].mean() if gaussian else ssim(image, truth)
            numbers[metric + kind] = float(mean)
        elif min(image.size) > MS_SSIM_SIDE:
            numbers[metric + kind] = _ms_ssim(a, b, data_range)
        else:
            text = f"ms_ssim is left out where the shorter side is at most {MS_SSIM_SIDE}"
            warnings.warn(text, stacklevel=2)
    return numbers


def measure_all(
    image: Image.Image,
    truth: Image.Image,
    protocols: Iterable[str],
    metrics: Collection[str] = ALWAYS,
    kind: str = "",
) -> dict[str, float]:
    """`measure` by several protocols, named as in `number_names`."""
    by_protocol = {p: measure(image, truth, p, metrics, kind) for p in protocols}
    starts = prefixes(by_protocol)
    return {starts[p] + name: x for p, found in by_protocol.items() for name, x in found.items()}


def _ms_ssim(a: np.ndarray, b: np.ndarray, data_range: float) -> float:
    *finer, coarsest = SCALE_WEIGHTS
    product = np.ones(3)
    for weight in finer:
        # A negative mean has no real power.
        product *= _ssim_parts(a, b, data_range)[1].clip(0) ** weight
        a, b = _halved(a), _halved(b)
    return float((product * _ssim_parts(a, b, data_range)[0].clip(0) ** coarsest).mean())


def _ssim_parts(a: np.ndarray, b: np.ndarray, data_range: float) -> tuple[np.ndarray, np.ndarray]:
    """(3,) each: means over windows inside (H, W, 3) of SSIM, and of SSIM without luminance."""
    radius = GAUSSIAN_SIDE // 2
    mean = partial(gaussian_filter, sigma=SIGMA, radius=radius, axes=(0, 1))
    c1, c2 = (K1 * data_range) ** 2, (K2 * data_range) ** 2
    mean_a, mean_b = mean(a), mean(b)
    product, squares = mean_a * mean_b, mean_a**2 + mean_b**2
    structure = (2 * (mean(a * b) - product) + c2) / (mean(a * a + b * b) - squares + c2)
    whole = structure * (2 * product + c1) / (squares + c1)
    inside = slice(radius, -radius)
    return whole[inside, inside].mean((0, 1)), structure[inside, inside].mean((0, 1))


def _halved(x: np.ndarray) -> np.ndarray:
    """Means of 2 x 2 values of (H, W, 3); the last row or column of an odd side counts twice."""
    h, w, _ = x.shape
    x = np.pad(x, ((0, h % 2), (0, w % 2), (0, 0)), mode="edge")
    return (x[::2, ::2] + x[1::2, ::2] + x[::2, 1::2] + x[1::2, 1::2]) / 4
