"""DICOM and NIfTI files -> arrays in their units, with the values that black and white stand for.

H, W are rows and columns of an image as a radiologist sees it; slices or frames come first.
"""

import importlib
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from errno import EINVAL, EISDIR, ELOOP, ENAMETOOLONG, ENOENT, ENOTDIR
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from PIL import Image

MAX_PIXELS = 20_000_000
"""Larger images are refused before they are decoded."""
MAX_VOXELS = 2**29
"""So are larger volumes; a voxel takes four bytes in memory."""
MAX_DEFLATION = 1032
"""Bytes that one byte of a gzip file can stand for (RFC 1951: 258 by two bits)."""
PERCENTILES = (0.5, 99.5)
"""Of the values: black and white where the file states no window."""
GAP = 1.5
"""Slices that are this many times as far apart as most have others missing between them."""
COLOURS = ("RGB", "PALETTE COLOR", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT")
DISPLAY = {"axial": (2, 1, 0), "coronal": (1, 2, 0), "sagittal": (0, 2, 1)}
"""Which of the axes right, anterior, superior are slices, rows and columns."""
# What readers raise over damaged files.
DAMAGE = (
    *(OSError, EOFError, SyntaxError, ValueError, TypeError, AttributeError, LookupError),
    *(RuntimeError, ArithmeticError, MemoryError, struct.error, zlib.error),
    Image.DecompressionBombError,
)
FAULTS_OF_FILES = {None, ENOENT, ENOTDIR, EISDIR, EINVAL, ELOOP, ENAMETOOLONG}
"""Numbers of OSErrors that every process gets for the same file."""
MAX_REASON = 300
"""Characters of a reader's message: some quote the file."""

Axis = Literal["axial", "coronal", "sagittal"]
Range = tuple[float, float]


class ImageError(ValueError):
    """An image that cannot be read; the message names the file."""


class UnreachableError(ImageError):
    """The file system or the network failed: the file may be good, and read well elsewhere."""


@dataclass(frozen=True, kw_only=True)
class Scan:
    """An image or a volume in the units of its file."""

    values: np.ndarray
    """float32 (H, W), (H, W, 3), (slices, H, W) or (slices, H, W, 3)."""
    value_range: Range
    """What 0 and 1 of `image_01` stand for; the first is larger where low values are bright."""
    unit: str = ""
    """`HU`, `BQML`, ...; empty if the file states none."""
    spacing: tuple[float, ...] = ()
    """mm between slices (of a volume; nan if unknown), rows and columns; empty if all unknown."""
    colour: bool = False
    curve: str = ""
    """Names the table or sigmoid that replaced the values, if any."""
    guessed: bool = False
    """Whether `value_range` is that of the values, since the file states none."""

    @property
    def is_volume(self) -> bool:
        return self.values.ndim - self.colour == 3

    def image_01(self) -> np.ndarray:
        """float32 of the shape of `values`, clipped to [0, 1]; 0 where the range is empty."""
        low, high = self.value_range
        scaled = (self.values - np.float32(low)) / np.float32(high - low or np.inf)
        return np.clip(scaled, 0.0, 1.0)


@contextmanager
def named_errors(path: str | Path | BinaryIO, *others: type[Exception]) -> Iterator[None]:
    """What a reader raises (DAMAGE and `others`) becomes an ImageError that names the file, an
    UnreachableError where another try may succeed."""
    faults: tuple[type[Exception], ...] = (*DAMAGE, *others)
    try:
        yield
    except ImageError:
        raise
    except faults as error:
        reason = str(error)[:MAX_REASON] or type(error).__name__
        lost = isinstance(error, OSError) and error.errno not in FAULTS_OF_FILES
        lost |= isinstance(error, TimeoutError | ConnectionError)
        raise (UnreachableError if lost else ImageError)(f"{path}: {reason}") from error


def require_size(*shape: int) -> None:
    """Of an image (H, W) or a volume (slices, H, W). Raises ValueError where it is empty,
    Image.DecompressionBombError where it is too large."""
    limits = (shape[-2:], MAX_PIXELS, "pixels"), (shape, MAX_VOXELS, "voxels")
    for sides, limit, what in limits:
        size = "x".join(map(str, sides[::-1]))
        if min(sides) < 1:
            raise ValueError(f"{size} is empty")
        if prod(sides) > limit:
            raise Image.DecompressionBombError(f"{size} is more than {limit} {what}")


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        hint = f"{name} is needed to read this: pip install 'bagel-restore[dicom]'"
        raise ModuleNotFoundError(hint) from error


def _brightness(values: np.ndarray) -> Range:
    low, high = np.percentile(values, PERCENTILES)
    return float(low), float(high)


def dicom_header(path: str | Path | BinaryIO) -> Any:
    """The pydicom data set of an image without its pixels; raises ImageError."""
    with named_errors(path, _package("pydicom.errors").BytesLengthException):
        header = _package("pydicom").dcmread(path, force=True, stop_before_pixels=True)
        _count_frames(header)
        return header


def _count_frames(dataset: Any, files: int = 1) -> int:
    """Of one of so many files. Raises ValueError without an image, and as `require_size` does."""
    if "Rows" not in dataset:
        raise ValueError("a DICOM file without an image, or none at all")
    count = int(dataset.get("NumberOfFrames") or 1)
    require_size(files * count, dataset.Rows, dataset.Columns)
    return count


def read_dicom(
    *paths: str | Path | BinaryIO, frame: int | None = None, value_range: Range | None = None
) -> Scan:
    """The frames of a file, or of the files of a series, by position; or one as it is stored.

    Values are those after the modality table or rescaling. Their range is `value_range`; else the
    table or the first window of the file (a table or a sigmoid replaces the values); else all that
    8 bits or colours can hold; else PERCENTILES, as for slices whose windows differ. Frames of one
    file that state no positions stay in their order. Warns of missing slices. Raises ImageError,
    also where slices differ in size or direction or share a position.
    """
    headers, scans = [], []
    for path in paths:
        with named_errors(path, _package("pydicom.errors").BytesLengthException):
            dataset = _package("pydicom").dcmread(path, force=True)
            count = _count_frames(dataset, len(paths))
            if frame is not None and not 0 <= frame < count:
                raise ValueError(f"frame={frame} is none of its {count} frames")
            pixels = _pixels(dataset, frame)
            found = [_described(dataset, i) for i in (range(count) if frame is None else [frame])]
            frames = pixels if len(found) > 1 else [pixels]
            scans += [_shown(d, p, value_range) for d, p in zip(found, frames, strict=True)]
            headers += found
    if len(scans) == 1:
        return scans[0]
    name = paths[0] if len(paths) == 1 else Path(str(paths[0])).parent
    with named_errors(name):
        placed = len(paths) > 1 or len({str(h.get("ImagePositionPatient")) for h in headers}) > 1
        order = _order(headers) if placed else range(len(headers))
        ordered = [headers[i] for i in order]
        if len(steps := _steps(ordered)) and (gaps := _gaps(steps)):
            warnings.warn(f"{name}: slices are missing: {gaps}", stacklevel=2)
        return _stacked([scans[i] for i in order], ordered)


def _pixels(dataset: Any, frame: int | None) -> np.ndarray:
    """One frame or all of them; colours as RGB where they are stored as luminance."""
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    # The other decoder of run lengths ends the process over damaged ones.
    plugin = "pydicom" if syntax == _package("pydicom.uid").RLELossless else ""
    read = _package("pydicom.pixels").pixel_array
    return read(dataset, index=frame, decoding_plugin=plugin)


def _described(dataset: Any, frame: int) -> Any:
    """The data set with what an enhanced file states of one frame at its top level."""
    described = _package("pydicom").Dataset()
    described.update({e.tag: e for e in dataset if e.keyword != "PixelData"})
    groups = list(dataset.get("SharedFunctionalGroupsSequence") or [])
    groups += (dataset.get("PerFrameFunctionalGroupsSequence") or [])[frame : frame + 1]
    for element in (e for group in groups for e in group if e.VR == "SQ" and e.value):
        described.update(element.value[0])
    return described


def _shown(dataset: Any, pixels: np.ndarray, value_range: Range | None) -> Scan:
    """One frame with its range."""
    pydicom, kind = _package("pydicom.pixels"), dataset.PhotometricInterpretation
    spacing = dataset.get("PixelSpacing") or dataset.get("ImagerPixelSpacing") or ()
    known: dict[str, Any] = {"spacing": tuple(map(float, spacing))}
    if kind in COLOURS:
        table = kind == "PALETTE COLOR"
        pixels = pydicom.apply_color_lut(pixels, dataset) if table else pixels
        bits = 8 * pixels.dtype.itemsize if table else dataset.BitsStored
        value_range = value_range or (0.0, 2.0**bits - 1)
        values = pixels[..., :3].astype(np.float32)
        return Scan(values=values, value_range=value_range, colour=True, **known)
    if not kind.startswith("MONOCHROME"):
        raise ValueError(f"photometric interpretation {kind} is not supported")
    values = pydicom.apply_modality_lut(pixels, dataset)
    hounsfield = "RescaleSlope" in dataset and dataset.get("Modality") == "CT"
    unit = str(dataset.get("RescaleType") or dataset.get("Units") or "US").replace("US", "")
    known["unit"] = unit or ("HU" if hounsfield else "")
    if value_range is None and dataset.get("VOILUTSequence"):
        values = pydicom.apply_voi(np.round(values).astype(np.int64), dataset)
        value_range, known["unit"] = (0, 2 ** dataset.VOILUTSequence[0].LUTDescriptor[2] - 1), ""
        known["curve"] = f" by table {zlib.crc32(dataset.VOILUTSequence[0].to_json().encode()):08x}"
    elif value_range is None and dataset.get("VOILUTFunction") == "SIGMOID" and _window(dataset):
        low, high = pydicom.apply_windowing(np.array([-np.inf, np.inf]), dataset)
        values, value_range = pydicom.apply_windowing(values, dataset), (low, high)
        known |= {"unit": "", "curve": f" by sigmoid {_window(dataset)}"}
    stated = value_range or _window(dataset) or _stored_range(dataset)
    ends, known["guessed"] = stated or _brightness(values), not stated
    low, high = map(float, ends[::-1] if kind == "MONOCHROME1" else ends)
    return Scan(values=values.astype(np.float32), value_range=(low, high), **known)


def _window(dataset: Any) -> Range | None:
    """Ends of the first window (DICOM PS3.3 C.11.2.1.2); None without one of positive width."""
    found = [dataset.get(name) for name in ("WindowCenter", "WindowWidth")]
    if None in found:
        return None
    centre, width = (float(value[0] if hasattr(value, "__len__") else value) for value in found)
    if dataset.get("VOILUTFunction", "LINEAR") == "LINEAR":
        centre, width = centre - 0.5, width - 1
    return (centre - width / 2, centre + width / 2) if width > 0 else None


def _stored_range(dataset: Any) -> Range | None:
    """All that up to 8 bits can hold, rescaled."""
    if dataset.BitsStored > 8 or dataset.get("ModalityLUTSequence"):
        return None
    ends = np.array([0, 2**dataset.BitsStored - 1])
    ends -= dataset.PixelRepresentation * 2 ** (dataset.BitsStored - 1)
    low, high = _package("pydicom.pixels").apply_modality_lut(ends, dataset)
    return float(low), float(high)


def _order(headers: Sequence[Any]) -> list[int]:
    """Indices of slices by position along their common normal, else by location or number."""
    for name in ("ImagePositionPatient", "SliceLocation", "InstanceNumber"):
        if all(header.get(name) is not None for header in headers):
            break
    else:
        raise ValueError("slices without ImagePositionPatient, SliceLocation or InstanceNumber")
    places = np.array([header.get(name) for header in headers], dtype=float)
    if places.ndim > 1:
        directions = np.array([header.ImageOrientationPatient for header in headers], dtype=float)
        if np.abs(directions - directions[0]).max() > 1e-2:
            raise ValueError("the slices are not parallel: a localizer?")
        places = places @ np.cross(directions[0, :3], directions[0, 3:])
    if shared := len(places) - len(np.unique(places.round(3))):
        raise ValueError(f"{shared} slices share {name} with another: several volumes in one?")
    return places.argsort().tolist()


def _steps(headers: Sequence[Any]) -> np.ndarray:
    """mm from slice to slice; empty where positions are not stated."""
    places = [header.get("ImagePositionPatient") for header in headers]
    if None in places:
        return np.empty(0)
    return np.linalg.norm(np.diff(np.array(places, dtype=float), axis=0), axis=1)


def _gaps(steps: np.ndarray) -> str:
    """Where steps are much longer than most, in words; empty if nowhere."""
    if not (steps > 0).all() or not len(wide := np.flatnonzero(steps > GAP * np.median(steps))):
        return ""
    first = wide[0]
    return (
        f"{len(wide)} gaps, the first of {steps[first]:g} mm between slices {first} and "
        f"{first + 1}, where others are {np.median(steps):g} mm apart"
    )


def _stacked(scans: list[Scan], headers: Sequence[Any]) -> Scan:
    first = scans[0]
    if len({(scan.values.shape, scan.unit) for scan in scans}) > 1:
        raise ValueError("the slices differ in size or unit")
    values, value_range = np.stack([scan.values for scan in scans]), first.value_range
    if len({scan.value_range for scan in scans}) > 1:
        low, high = _brightness(values)
        value_range = (high, low) if value_range[0] > value_range[1] else (low, high)
    apart = headers[0].get("SpacingBetweenSlices") or headers[0].get("SliceThickness") or np.nan
    if len(steps := _steps(headers)):
        apart = np.median(steps) or apart
    spacing = (float(apart), *first.spacing) if first.spacing else ()
    return replace(first, values=values, value_range=value_range, spacing=spacing)


def read_nifti(
    path: str | Path,
    axis: Axis = "axial",
    volume: int | None = None,
    value_range: Range | None = None,
) -> Scan:
    """The slices of a NIfTI file along an axis, in radiological orientation.

    Axial: anterior is up, slices from the feet upwards; coronal: the head is up, slices from the
    back forwards; both with the patient's right on the left. Sagittal: the head is up, anterior on
    the left, slices from the left to the right. `volume` picks one of a 4-D file. NaN becomes the
    lowest value. The range is `value_range`; else `cal_min` to `cal_max` of the header; else what
    8 bits can hold; else PERCENTILES. Raises ImageError.
    """
    nibabel = _package("nibabel")
    faults = nibabel.filebasedimages.ImageFileError, nibabel.spatialimages.HeaderDataError
    with named_errors(path, *faults, nibabel.orientations.OrientationError):
        image = nibabel.load(path)
        shape, kind, start = image.shape, image.get_data_dtype(), image.dataobj.offset
        if len(shape) < 2 or kind.kind not in "iuf":
            raise ValueError(f"shape {shape} of {kind} is no volume of real numbers")
        require_size(*shape[2:3], *shape[:2])
        held = Path(path).stat().st_size
        held *= MAX_DEFLATION if Path(path).suffix.lower() == ".gz" else 1
        if start + prod(shape) * kind.itemsize > held:
            raise ValueError(f"too short for shape {shape} of {kind} from byte {start}")
        count = prod(shape[3:])
        if not 0 <= (volume or 0) < count or (count > 1 and volume is None):
            raise ValueError(
                f"volume={volume} of {count} volumes {shape}: choose one, the first is 0"
            )
        return _sliced(image, axis, volume or 0, value_range)


def _sliced(image: Any, axis: Axis, volume: int, value_range: Range | None) -> Scan:
    nibabel, header, proxy = _package("nibabel"), image.header, image.dataobj
    index = np.unravel_index(volume, image.shape[3:])
    raw = np.asarray(proxy[(..., *index)], dtype=np.float32)
    if not np.isfinite(raw).any() or np.isinf(raw).any():
        raise ValueError("infinite voxels, or none but NaN")
    raw = np.nan_to_num(raw, nan=float(np.nanmin(raw)))
    if header["cal_max"] > header["cal_min"]:
        value_range = value_range or (float(header["cal_min"]), float(header["cal_max"]))
    elif image.get_data_dtype().itemsize == 1:
        ends = np.iinfo(image.get_data_dtype())
        low, high = (float(proxy.slope * end + proxy.inter) for end in (ends.min, ends.max))
        value_range = value_range or (low, high)
    orientation = nibabel.io_orientation(image.affine)
    zooms = dict(zip(orientation[:, 0], header.get_zooms(), strict=False))
    mm = {1: 1000.0, 3: 0.001}.get(int(header["xyzt_units"]) % 8, 1.0)  # metres, microns, else mm
    raw = nibabel.apply_orientation(raw.reshape(*raw.shape, *(1,) * (3 - raw.ndim)), orientation)
    order = DISPLAY[axis]
    return Scan(
        values=raw.transpose(order)[:, ::-1, ::-1],
        value_range=value_range or _brightness(raw),
        spacing=tuple(float(zooms.get(i, 1.0)) * mm for i in order),
    )
