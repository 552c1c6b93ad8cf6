"""Image files -> RGB images for the model, and scans that keep their values.

PNG, JPEG and TIFF (its first page), 8, 16 and 32 bits, grey, RGB and RGBA; DICOM and NIfTI.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .volumes import (
    Axis,
    ImageError,
    Range,
    Scan,
    dicom_header,
    named_errors,
    read_dicom,
    read_nifti,
    require_size,
)

GREY_RANGES = {"F": (0.0, 1.0), "I": (0.0, 65535.0)}
"""Values of black and white by the first letter of a mode of more than 8 bits."""
ALIKE = "state one window in both, or write PNG images of one value_range, as make_pairs.py does"

ImageFile = str | Path | BinaryIO
"""A file, or one that is open or in memory."""


def file_kind(path: ImageFile) -> Literal["nifti", "dicom", "image"]:
    """By the suffix; a DICOM file also by its first bytes. Raises ImageError."""
    name = str(path).lower()
    if name.endswith((".nii", ".nii.gz")):
        return "nifti"
    with named_errors(path), _bytes_of(path) as file:
        is_dicom = name.endswith((".dcm", ".dicom")) or file.read(132)[128:] == b"DICM"
        file.seek(0)
        return "dicom" if is_dicom else "image"


def _image_kind(path: ImageFile) -> Literal["dicom", "image"]:
    """Raises ImageError also for NIfTI, whose images are slices of a volume."""
    if (kind := file_kind(path)) == "nifti":
        raise ImageError(f"{path}: NIfTI holds volumes: see make_pairs.py")
    return kind


def _bytes_of(path: ImageFile) -> AbstractContextManager[BinaryIO]:
    """Closed at the end if it is opened here."""
    return Path(path).open("rb") if isinstance(path, str | Path) else nullcontext(path)


def read_scan(
    path: ImageFile,
    *,
    axis: Axis = "axial",
    frame: int | None = None,
    volume: int | None = None,
    value_range: Range | None = None,
) -> Scan:
    """What a file holds, in its units; `read_dicom` and `read_nifti` say what black and white are.

    `frame` picks one slice, frame or page (from 0), `axis` and `volume` hold for NIfTI alone, and
    `value_range` stands above what the file says. Raises ImageError.
    """
    kind = file_kind(path)
    if kind == "dicom":
        return read_dicom(path, frame=frame, value_range=value_range)
    if kind == "image":
        with _opened(path, frame or 0) as image:
            return _scan(image, value_range)
    if not isinstance(path, str | Path):
        raise ImageError(f"{path}: NIfTI is read from local files alone: copy it to a folder")
    scan = read_nifti(path, axis, volume, value_range)
    if frame is None:
        return scan
    if not 0 <= frame < len(scan.values):
        raise ImageError(f"{path}: frame={frame} is none of its {len(scan.values)} slices")
    return replace(scan, values=scan.values[frame], spacing=scan.spacing[1:])


def read_image(path: ImageFile, paired: bool = False) -> Image.Image:
    """The RGB image of a file; `paired` if another one must be scaled alike.

    Raises ImageError for a missing, damaged or oversized file, and for a volume; where it is
    paired also for a DICOM file that does not state what black and white are.
    """
    if _image_kind(path) == "dicom":
        scan = read_scan(path)
        if scan.is_volume:
            raise ImageError(f"{path}: a volume of {len(scan.values)} slices: see make_pairs.py")
        if paired and scan.guessed:
            raise ImageError(f"{path}: no window, and a guess scales a pair unequally: {ALIKE}")
        image = _eight_bits(scan)
        low, high = scan.value_range
        window = f"window {low:.6g} to {high:.6g}{scan.curve}"
        image.info |= {"dicom_window": window} if paired else {}
        return image
    with _opened(path) as image:
        image.load()
        return to_rgb(image)


def require_one_window(source: str, images: Iterable[Image.Image]) -> None:
    """Raises ImageError where DICOM files that were read as `paired` are not scaled alike."""
    windows = sorted({i.info["dicom_window"] for i in images if "dicom_window" in i.info})
    if len(windows) > 1:
        raise ImageError(f"{source}: {' and '.join(windows)} scale a pair unequally: {ALIKE}")


def image_size(path: ImageFile) -> tuple[int, int]:
    """(width, height) from the header of a file; raises ImageError as `read_image` does."""
    if _image_kind(path) == "dicom":
        header = dicom_header(path)
        return header.Columns, header.Rows
    with _opened(path) as image:
        return image.size


@contextmanager
def _opened(path: ImageFile, page: int = 0) -> Iterator[Image.Image]:
    """The image of a file before its pixels are decoded."""
    with named_errors(path), Image.open(path) as image:
        image.seek(page)
        require_size(image.height, image.width)
        yield image


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode -> RGB; grey of more bits is scaled to 8, transparency is laid on white.

    Raises ValueError for grey values outside GREY_RANGES.
    """
    if image.mode[0] in GREY_RANGES:
        return _eight_bits(_scan(image))
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _scan(image: Image.Image, value_range: Range | None = None) -> Scan:
    deep = image.mode[0] in GREY_RANGES
    grey = deep or image.mode in ("1", "L")
    stored = image if deep else image.convert("L") if grey else to_rgb(image)
    values = np.asarray(stored).astype(np.float32)
    low, high = GREY_RANGES[image.mode[0]] if deep else (0.0, 255.0)
    if value_range is None and not low <= values.min() <= values.max() <= high:
        found = f"{values.min():g} to {values.max():g}"
        raise ValueError(
            f"its values from {found} leave {low:g} to {high:g}: rescale it, or state what black "
            "and white are (value_range of read_scan, --value_range of make_pairs.py)"
        )
    return Scan(values=values, value_range=value_range or (low, high), colour=not grey)


def _eight_bits(scan: Scan) -> Image.Image:
    return Image.fromarray(np.round(scan.image_01() * 255).astype(np.uint8)).convert("RGB")


def to_pm1(image: Image.Image) -> Tensor:
    """RGB image -> (3, H, W) float32 in [-1, 1]: mean 0.5, deviation 0.5."""
    array = np.asarray(image, dtype=np.float32) / 127.5 - 1.0
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


def to_image(image_pm1: Tensor) -> Image.Image:
    """(3, H, W) nominally in [-1, 1] -> RGB image, clamped and rounded."""
    scaled = (image_pm1.float().clamp(-1, 1) + 1) * 127.5
    return Image.fromarray(scaled.round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())
