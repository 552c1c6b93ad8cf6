"""The volumes of files and folders, found without reading their pixels."""

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from data.images import ImageError, Scan, file_kind, read_scan
from data.volumes import dicom_header, read_dicom

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")


@dataclass(frozen=True)
class Source:
    """A volume that is not read yet."""

    name: str
    """Its images are called so, and records name it. For DICOM it is made of hashes."""
    patient: str
    read: Callable[[], list[Callable[[], Scan]]]
    """Gives what gives its slices (H, W) or (H, W, 3), in order; both raise ImageError."""


def find_sources(
    root: Path, patient: str, series: str | None = None, **options: Any
) -> Iterator[Source]:
    """NIfTI files, DICOM series, and folders of images below a folder, or one file.

    A patient goes by the DICOM file, else by what the pattern `patient` (its first group) finds in
    the path, else by the file's name (NIfTI) or the first folder below `root`. `series` is a UID or
    a part of a description; `options` are those of `read_scan`. Raises ImageError without `root`.
    """
    files = sorted(p for p in root.rglob("*") if p.is_file()) if root.is_dir() else [root]
    groups: dict[tuple[str, str, str], list[Path]] = defaultdict(list)
    bad: list[ImageError] = []
    for path in files:
        kind = file_kind(path)
        place = path.relative_to(root if root.is_dir() else root.parent)
        match = re.search(patient, path.relative_to(root.parent).as_posix())
        named = match.group(1 if match.re.groups else 0) if match else None
        if kind == "nifti":
            stem = re.sub(r"\.nii(\.gz)?$", "", place.as_posix(), flags=re.IGNORECASE)
            groups[kind, named or stem, stem].append(path)
        elif kind == "dicom":
            try:
                identity = _dicom_identity(path, series)
            except ImageError as error:
                bad.append(error)
                continue
            if identity is not None:
                groups[kind, *identity].append(path)
        elif path.suffix.lower() in IMAGE_SUFFIXES:
            folders = [*place.parts[:-1]] or [root.name]
            own = [named] if named and named not in "/".join(folders) else []
            groups[kind, named or folders[0], "_".join([*folders, *own])].append(path)
    if bad:
        print(f"left out: {len(bad)} DICOM files, the first is {bad[0]}")
    for (kind, owner, name), members in groups.items():
        slices = partial(_images if kind == "image" else _slices, members, options)
        yield Source(re.sub(r"[^\w.-]+", "_", name), owner, slices)


def _dicom_identity(path: Path, chosen: str | None) -> tuple[str, str] | None:
    """Hashes of patient and series; None for another series than the chosen one."""
    header = dicom_header(path)
    owner = str(header.get("PatientID") or header.get("StudyInstanceUID", path.parent))
    uid = str(header.get("SeriesInstanceUID", path.parent))
    title = str(header.get("SeriesDescription", ""))
    if chosen and chosen != uid and chosen.lower() not in title.lower():
        return None
    if int(header.get("NumberOfFrames") or 1) > 1:
        uid = str(header.get("SOPInstanceUID", path))
    hashes = [hashlib.sha256(text.encode()).hexdigest()[:10] for text in (owner, uid)]
    return hashes[0], "_".join(hashes)


def _slices(paths: list[Path], options: dict[str, Any]) -> list[Callable[[], Scan]]:
    if len(paths) > 1:
        scan = read_dicom(*paths, value_range=options.get("value_range"))
    else:
        scan = read_scan(paths[0], **options)
    if not scan.is_volume:
        return [lambda: scan]
    return [partial(replace, scan, values=v, spacing=scan.spacing[1:]) for v in scan.values]


def _images(paths: list[Path], options: dict[str, Any]) -> list[Callable[[], Scan]]:
    return [partial(read_scan, path, **options) for path in paths]
