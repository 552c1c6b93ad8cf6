"""The volumes of files and folders, found without reading their pixels."""

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from data.images import ImageError, Scan, file_kind, read_scan
from data.volumes import dicom_header, read_dicom

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
BIDS = r"(?:^|/)(sub-[A-Za-z0-9]+)(?=[_./]|$)"
"""Finds the subject in a path."""
CONTRAST = (
    r"(?:^|[-_. ])(?:t[12](?:star|[a-z]{0,2})|pdw?|flair|dwi|adc|swi|bold|dti(?:-\d\d)?|"
    r"mra?|mri|cta?|pet|seg|mask|(?<=\d_)000\d)"
)
"""Ends of names that tell scans of one patient apart; `12_0001` holds a channel of nnU-Net."""

FEW = 12
"""Patients of a folder that may be one; a folder of a whole data set holds more."""
Kind = Literal["nifti", "dicom", "image"]
Ground = Literal["path", "name", "contrast", "PatientID", "StudyInstanceUID", "folder"]


@dataclass(frozen=True)
class Source:
    """A volume that is not read yet."""

    name: str
    """Its images are called so, and records name it. For DICOM it is made of hashes."""
    patient: str
    ground: Ground
    """What the patient goes by; `contrast` is a name without its end."""
    kind: Kind
    files: list[Path]
    read: Callable[[], list[Callable[[], Scan]]]
    """Gives what gives its slices (H, W) or (H, W, 3), in order; both raise ImageError."""
    patient_id: str = ""
    """Hash of the PatientID of a DICOM file."""
    subjects: frozenset[str] = frozenset()
    """Of BIDS, in the files' paths; none where a pattern names patients."""
    folder: Path | None = None
    """The first one below the root; None for files in the root itself."""

    def where(self, index: int) -> str:
        """A slice, for messages."""
        if self.kind == "image":
            return str(self.files[index])
        return f"{self.files[0] if len(self.files) == 1 else self.files[0].parent}: slice {index}"


@dataclass(frozen=True)
class _Owner:
    patient: str
    ground: Ground
    patient_id: str = field(default="", compare=False)


def natural(path: Path) -> tuple[list[list[str | int]], Path]:
    """Sorts paths by name, runs of digits as numbers: slice_10 comes after slice_9."""
    parts = [re.split(r"(\d+)", part) for part in path.parts]
    return [[int(w) if i % 2 else w for i, w in enumerate(words)] for words in parts], path


def find_sources(
    root: Path, patient: str | None = None, series: str | None = None, **options: Any
) -> Iterator[Source]:
    """NIfTI files, DICOM series, and folders of images below a folder, or one file.

    A patient goes by what the pattern `patient` (its first group) finds in the path from `root` on;
    else by the PatientID (DICOM); without a pattern by BIDS below `root`; else by the study
    (DICOM), the file (NIfTI) or the first folder below `root`, of which an end that is CONTRAST is
    taken off. `series` is a UID or a part of a description; `options` are those of `read_scan`.
    Images are in `natural` order. Raises ImageError without `root`.
    """
    base = root if root.is_dir() else root.parent
    files = [p for p in root.rglob("*") if p.is_file()] if root.is_dir() else [root]
    groups: dict[tuple[Kind, _Owner, str], list[Path]] = defaultdict(list)
    bad: list[ImageError] = []
    lost: list[Path] = []
    for path in sorted(files, key=natural):
        kind = file_kind(path)
        if kind == "image" and path.suffix.lower() not in IMAGE_SUFFIXES:
            continue
        try:
            identity = _identity(path, kind, root, patient, series)
        except ImageError as error:
            bad.append(error)
            continue
        if identity is None:
            continue
        groups[kind, *identity].append(path)
        if patient and identity[0].ground != "path":
            lost.append(path)
    if bad:
        print(f"left out: {len(bad)} DICOM files, the first is {bad[0]}")
    if lost:
        print(f"WARNING: --patient finds nothing in {len(lost)} files, the first is {lost[0]}")
    for (kind, owner, name), members in groups.items():
        labels = () if patient else (_in_path(BIDS, p.relative_to(base)) for p in members)
        first = members[0].relative_to(base).parts
        yield Source(
            name=re.sub(r"[^\w.-]+", "_", name),
            patient=owner.patient,
            ground=owner.ground,
            kind=kind,
            files=members,
            read=partial(_images if kind == "image" else _slices, members, options),
            patient_id=owner.patient_id,
            subjects=frozenset(label.patient for label in labels if label),
            folder=base / first[0] if len(first) > 1 else None,
        )


def _identity(
    path: Path, kind: Kind, root: Path, patient: str | None, series: str | None
) -> tuple[_Owner, str] | None:
    """Patient and name of the volume that a file is of; None for DICOM of another series."""
    place = Path(path.name) if path == root else path.relative_to(root)
    seen = (patient, path.relative_to(root.parent)) if patient else (BIDS, place)
    known = _in_path(*seen)
    if kind == "dicom":
        return _dicom_identity(path, series, known, bool(patient))
    if kind == "nifti":
        stem = re.sub(r"\.nii(\.gz)?$", "", place.as_posix(), flags=re.IGNORECASE)
        return known or _plain(stem.split("/"), root, len(place.parts)), stem
    folders = [*place.parts[:-1]] or [root.name]
    own = [known.patient] if known and known.patient not in "/".join(folders) else []
    return known or _plain(folders, root, 1), "_".join([*folders, *own])


def _in_path(pattern: str, path: Path) -> _Owner | None:
    found = re.search(pattern, path.as_posix())
    named = found.group(1 if found.re.groups else 0) if found else None
    return _Owner(named, "path") if named else None


def _plain(parts: list[str], root: Path, count: int) -> _Owner:
    """By the first `count` parts that are more than CONTRAST, without ends that are."""
    ends = [re.sub(f"(?:{CONTRAST})+$", "", part, flags=re.IGNORECASE) for part in parts]
    told = [end for end in ends if end][:count]
    return _Owner("/".join(told) or root.name, "name" if ends == parts else "contrast")


def joined(found: Sequence[Source]) -> list[Source]:
    """The sources, with one patient for those that share a patient, PatientID or subject of BIDS.

    Sources without a subject take one from above their root, if that is a subject of others:
    `sub-01/dicom` beside `sub-01/sub-01_T1w.nii.gz`.
    """
    known = {label for source in found for label in source.subjects}
    groups: dict[str, set[str]] = {}
    for source in found:
        above = known.intersection(re.findall(BIDS, source.files[0].absolute().as_posix()))
        names = {source.patient, *(source.subjects or above), source.patient_id} - {""}
        names = names.union(*(groups.get(name, ()) for name in names))
        groups |= dict.fromkeys(names, names)
    return [replace(source, patient=min(groups[source.patient])) for source in found]


def warn_of_patients(found: Iterable[Source]) -> None:
    """Prints where patients are taken from less than a file's word or a pattern."""
    scans: dict[str, list[Source]] = defaultdict(list)
    unnamed: dict[str, list[Path]] = defaultdict(list)
    owners: dict[str, set[str]] = defaultdict(set)
    for source in found:
        scans[source.patient].append(source)
        if source.patient_id:
            owners[source.patient_id].add(source.patient)
        if source.kind == "dicom" and source.ground not in ("PatientID", "path"):
            unnamed[source.ground] += source.files
    merged = [s for s in scans.values() if len(s) > 1 and any(x.ground == "contrast" for x in s)]
    if merged:
        names = ", ".join(source.name for source in merged[0])
        print(f"WARNING: names that differ in a contrast alone are one patient: {names}")
        print(f"  and {len(merged) - 1} more patients. Name patients by --patient if they are not.")
    if parted := [len(patients) for patients in owners.values() if len(patients) > 1]:
        print(f"WARNING: --patient divides {len(parted)} of the PatientIDs, the first among")
        print(f"  {parted[0]} patients. That is right only where a PatientID stands for several.")
    folders, named = defaultdict[Path, list[Source]](list), set[Path]()
    for source in found:
        if source.folder:
            folders[source.folder].append(source)
        if source.folder and source.kind == "nifti" and source.ground in ("name", "contrast"):
            named.add(source.folder)
    held = {folder: len({source.patient for source in folders[folder]}) for folder in named}
    if shared := sorted(f"{f}, {n} patients" for f, n in held.items() if 1 < n <= FEW):
        print(f"WARNING: {len(shared)} folders hold several patients by the names of their files,")
        print(f"  the first is {shared[0]}. If a folder is a patient, name it by --patient.")
    for ground, files in unnamed.items():
        print(f"WARNING: {len(files)} DICOM files without PatientID, the first is {min(files)}:")
        print(f"  each {ground} counts as a patient, whoever it shows. Name patients by --patient.")


def _dicom_identity(
    path: Path, chosen: str | None, known: _Owner | None, asked: bool
) -> tuple[_Owner, str] | None:
    """Patient and name, of hashes but for what is known by the path; None for another series.

    Where that is what the user `asked` for, it stands above PatientID.
    """
    header = dicom_header(path)
    uid = str(header.get("SeriesInstanceUID", path.parent))
    title = str(header.get("SeriesDescription", ""))
    if chosen and chosen != uid and chosen.lower() not in title.lower():
        return None
    if int(header.get("NumberOfFrames") or 1) > 1:
        uid = str(header.get("SOPInstanceUID", path))
    stated = str(header.get("PatientID") or "").strip()
    if known and (asked or not stated):
        owner = known
    elif stated:
        owner = _Owner(stated, "PatientID")
    elif study := header.get("StudyInstanceUID"):
        owner = _Owner(str(study), "StudyInstanceUID")
    else:
        owner = _Owner(str(path.parent), "folder")
    hashes = [_hash(text) for text in (owner.patient, uid)]
    # NIfTI files beside it that the pattern finds too are of the same patient.
    patient = owner.patient if owner is known else hashes[0]
    return _Owner(patient, owner.ground, _hash(stated) if stated else ""), "_".join(hashes)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:10]


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
