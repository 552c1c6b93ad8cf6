"""Clean medical images that pip packages ship, split into training and held-out parts.

The axial slices of the ICBM152 T1 volume at 2 mm are split by position: the held-out block lies
in the middle of the brain and a gap of several slices on both sides belongs to neither part.
"""

from pathlib import Path

import nibabel
import nilearn
import numpy as np
import pydicom
import pydicom.data
import skimage.data
from PIL import Image

from data.degradations import low_resolution

ICBM152 = (
    Path(nilearn.__file__).parent / "datasets/data/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"
)
SLICE_HEIGHT, SLICE_WIDTH = 112, 96
TRAIN_SLICES_MM = (range(34, 84), range(128, 160))
HELD_OUT_SLICES_MM = range(92, 120)


def _icbm152() -> np.ndarray:
    """T1 intensities (x, y, z) in [0, 1] at 1 mm."""
    volume = nibabel.load(ICBM152)
    return np.asarray(volume.dataobj, dtype=np.float32) / 255.0


def mri_slices(positions_mm: range) -> list[np.ndarray]:
    """Axial slices (112, 96) in [0, 1], 2 mm pixels, nose up."""
    volume = _icbm152()
    slices = []
    for z in positions_mm:
        axial = np.rot90(volume[:, :, z])[1:, 1:]
        half = low_resolution(axial[: axial.shape[0] // 2 * 2, : axial.shape[1] // 2 * 2], 2)
        top = (half.shape[0] - SLICE_HEIGHT) // 2
        left = (half.shape[1] - SLICE_WIDTH) // 2
        slices.append(half[top : top + SLICE_HEIGHT, left : left + SLICE_WIDTH])
    return slices


def training_slices() -> list[np.ndarray]:
    return [s for positions in TRAIN_SLICES_MM for s in mri_slices(positions)]


def held_out_slices() -> list[np.ndarray]:
    return mri_slices(HELD_OUT_SLICES_MM)


def _dicom(name: str) -> np.ndarray:
    path = pydicom.data.get_testdata_file(name, download=False)
    pixels = pydicom.dcmread(path).pixel_array.astype(np.float32)
    low, high = np.percentile(pixels, [0.5, 99.5])
    return np.clip((pixels - low) / (high - low), 0.0, 1.0)


def other_images() -> dict[str, np.ndarray]:
    """Images (H, W) or (H, W, 3) in [0, 1] of the other modalities, by name."""
    retina = Image.fromarray(skimage.data.retina()).resize((470, 470), Image.Resampling.LANCZOS)
    return {
        "retina": np.asarray(retina, dtype=np.float32) / 255.0,
        "histology": skimage.data.immunohistochemistry().astype(np.float32) / 255.0,
        "ct": _dicom("CT_small.dcm"),
        "mr": _dicom("examples_overlay.dcm"),
        "ultrasound": _dicom("examples_rgb_color.dcm"),
    }


def random_crop(image: np.ndarray, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """(height, width, ...) from anywhere in an image that is at least as large."""
    top = rng.integers(image.shape[0] - height + 1)
    left = rng.integers(image.shape[1] - width + 1)
    return image[top : top + height, left : left + width]


def augment(image_01: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A slice (H, W) flipped, moved, zoomed by at most 12 % and with another contrast."""
    height, width = image_01.shape
    if rng.random() < 0.5:
        image_01 = image_01[:, ::-1]
    if rng.random() < 0.25:
        image_01 = image_01[::-1]
    zoom_y, zoom_x = rng.uniform(0.9, 1.12, 2)
    angle = rng.uniform(-12, 12)
    shift_y, shift_x = rng.uniform(-5, 5, 2)
    cos, sin = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    matrix = np.array([[cos / zoom_x, sin / zoom_y], [-sin / zoom_x, cos / zoom_y]])
    centre = np.array([width / 2, height / 2])
    offset = centre - matrix @ (centre + np.array([shift_x, shift_y]))
    moved = Image.fromarray(np.ascontiguousarray(image_01, dtype=np.float32)).transform(
        (width, height),
        Image.Transform.AFFINE,
        (*matrix[0], offset[0], *matrix[1], offset[1]),
        Image.Resampling.BICUBIC,
    )
    gamma = np.exp(rng.uniform(-0.3, 0.3))
    return np.clip(np.asarray(moved), 0.0, 1.0) ** gamma
