"""Scans -> a training set of degraded and clean images, split by patient.

    python scripts/tools/make_pairs.py brain.nii.gz --degrade mri_noise:0.2-0.8 --out pairs/brain

A source is a NIfTI file, a DICOM file, or a folder with NIfTI files, DICOM series or images; the
images of one folder are one volume, in the order of their names, 2 before 10. Written are PNG
images, `train.jsonl`, `val.jsonl`, `test.jsonl` and `mixture.yaml` for --dataset_config_file.
Equal arguments write equal files.

All slices of a patient go into one part. A single volume is cut along its slices into slabs with
gaps between them that belong to none. Slices that are nearly black are left out.
"""

import argparse
import json
import re
import sys
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.config import nearest  # noqa: E402
from data.degradations import DEGRADATIONS, HU_RANGE, degrade  # noqa: E402
from data.images import ImageError, Scan  # noqa: E402
from data.tasks import require_sizes  # noqa: E402
from data.transforms import RULES, ResizeRule  # noqa: E402
from data.volumes import DISPLAY  # noqa: E402
from scripts.tools.scan_sources import Source, find_sources, joined, warn_of_patients  # noqa: E402
from scripts.tools.splits import PARTS, split_patients, split_slices  # noqa: E402

INSTRUCTIONS = {
    "artefact removal": "Remove the artefacts.",
    "bias correction": "Correct the uneven brightness.",
    "deblurring": "Sharpen the image.",
    "denoising": "Remove the noise.",
    "illumination correction": "Correct the illumination.",
    "metal artefact reduction": "Remove the metal artefacts.",
    "motion correction": "Remove the motion artefacts.",
    "reconstruction": "Remove the reconstruction artefacts.",
    "stain normalisation": "Normalise the stain.",
    "super-resolution": "Increase the resolution.",
}
"""By the task of a degradation."""
DARK = 0.05
"""Pixels of [0, 1] up to here are background."""
AIR_HU = -900.0
"""Where rays are simulated, black must be this or less: all that is darker would weigh as black."""
JOBS_AHEAD = 64
"""Slices that wait in memory for a process."""

Plan = tuple[str, float, float]
"""A degradation and the lowest and highest severity to draw."""


@dataclass(frozen=True)
class Job:
    part: str
    volume: str
    index: int
    scan: Scan
    """A slice whose values are in [0, 1], whatever its range says."""


def in_hounsfield(scan: Scan, args: argparse.Namespace) -> Scan:
    """The slice with a range of HU that rises, where a degradation simulates rays.

    Raises ValueError where the range is not known or a display window, ImageError for a slice
    that holds other values.
    """
    rays = [name for name, *_ in args.degrade if DEGRADATIONS[name].in_hounsfield]
    if not rays:
        return scan
    (low, high), name = sorted(scan.value_range), rays[0]
    hint = "give --value_range {:g} {:g}, in HU".format(*HU_RANGE)
    if scan.unit not in ("", "HU"):
        raise ValueError(f"{name} takes Hounsfield units, and the file has {scan.unit}")
    if not scan.unit and not args.value_range:
        raise ValueError(f"{name} takes Hounsfield units, which the file does not state: {hint}")
    if low > AIR_HU:
        raise ValueError(f"{name}: black is {low:g} HU (a display window?), not air: {hint}")
    if not scan.unit and scan.values.min() >= 0:
        raise ImageError("has no value below 0, so it is not in Hounsfield units")
    return replace(scan, value_range=(low, high), unit="HU")


def prepared(scan: Scan, args: argparse.Namespace) -> Scan:
    """The slice in [0, 1] with square pixels of --spacing mm, cut or padded about its middle."""
    image, spacing = scan.image_01(), scan.spacing
    if args.spacing and not spacing:
        raise ValueError("--spacing: a file states no spacing of its pixels")
    if spacing:
        mm = args.spacing or min(spacing)
        image, spacing = _resampled(image, spacing, mm), (mm, mm)
    stride = args.image_rule[0]
    size = args.size or [side // stride * stride for side in image.shape[:2]]
    if min(size) < 1:
        found = "x".join(map(str, image.shape[1::-1]))
        raise ImageError(f"{found} pixels are fewer than the stride {stride} of --image_rule")
    missing = [max(0, side - n) for side, n in zip(size, image.shape[:2], strict=True)]
    padding = [(n // 2, n - n // 2) for n in missing] + [(0, 0)] * (image.ndim - 2)
    image = np.pad(image, padding)
    top, left = ((n - side) // 2 for n, side in zip(image.shape[:2], size, strict=True))
    return replace(scan, values=image[top:, left:][: size[0], : size[1]], spacing=spacing)


def _resampled(image: np.ndarray, spacing: tuple[float, ...], mm: float) -> np.ndarray:
    """(H, W) or (H, W, 3): means over areas where pixels become larger, else bicubic."""
    if np.allclose(spacing, mm, rtol=1e-3):
        return image
    method = Image.Resampling.BOX if mm >= max(spacing) else Image.Resampling.BICUBIC
    height, width = (int(n * s / mm) for n, s in zip(image.shape[:2], spacing, strict=True))
    box = (0, 0, width * mm / spacing[1], height * mm / spacing[0])
    planes = image.reshape(*image.shape[:2], -1).transpose(2, 0, 1)
    resized = [Image.fromarray(plane).resize((width, height), method, box) for plane in planes]
    return np.stack(resized, axis=-1).reshape(height, width, *image.shape[2:]).clip(0.0, 1.0)


def require_trainable(shape: tuple[int, ...], args: argparse.Namespace) -> None:
    """Raises ValueError where training refuses what --degrade makes of a slice (H, W, ...)."""
    rule = ResizeRule(**_sizes(args.image_rule))
    for name, *ends in args.degrade:
        if DEGRADATIONS[name].task != "super-resolution":
            continue
        for severity in ends:
            degraded = degrade(name, np.zeros(shape), severity, np.random.default_rng()).image_01
            source = f"--degrade {name}:{severity:g} (a lower one, or another --image_rule)"
            require_sizes(source, rule, degraded.shape[1::-1], shape[1::-1])


def find_jobs(found: list[Source], args: argparse.Namespace, left_out: Counter) -> Iterator[Job]:
    """Slices that are not black, with their parts; counts the others by reason."""
    patients = {source.patient for source in found}
    cut = len(patients) == 1 and bool(args.val or args.test or args.test_slices)
    if cut and len(found) > 1:
        names = ", ".join(source.name for source in found)
        raise ValueError(
            f"one patient with several volumes: choose one (a file, --series), or tell patients "
            f"apart by --patient: {names}"
        )
    if len(patients) > 1 and args.test_slices:
        raise ValueError("--test_slices is for a single volume: patients are split as wholes")
    fitting: set[tuple[int, ...]] = set()
    whole = {} if cut else split_patients(patients, args.val, args.test, args.seed)
    for source in found:
        try:
            slices = source.read()
        except ImageError as error:
            left_out["volumes with errors"] += 1
            print(f"left out: {error}")
            continue
        parts: list[str | None] = [whole.get(source.patient)] * len(slices)
        if cut:
            parts = split_slices(len(slices), args.val, args.test, args.gap, args.test_slices)
            _warn_of_slabs(source, parts)
        for i, (part, read) in enumerate(zip(parts, slices, strict=True)):
            scan, reason = None, "by --every" if part else "in gaps"
            if part and i % args.every == 0:
                scan, reason = _usable(read, source.where(i), args)
            if part is None or scan is None:
                left_out[reason] += 1
            else:
                if (shape := scan.values.shape) not in fitting:
                    require_trainable(shape, args)
                    fitting.add(shape)
                yield Job(part, source.name, i, scan)


def _usable(
    read: Callable[[], Scan], where: str, args: argparse.Namespace
) -> tuple[Scan | None, str]:
    """A slice as its pair needs it, or why it is left out; ValueError names `where`."""
    try:
        scan = prepared(in_hounsfield(read(), args), args)
    except ImageError as error:
        print(f"left out: {where}: {str(error).removeprefix(f'{where}: ')}")
        return None, "with errors"
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    lit = (scan.values > DARK).reshape(*scan.values.shape[:2], -1).any(axis=2)
    return (None if lit.mean() < args.min_foreground else scan), "nearly black"


def _warn_of_slabs(source: Source, parts: list[str | None]) -> None:
    print(f"WARNING: {source.name} is the only volume: val and test are slabs of the same patient,")
    print("  and scores on them say little of other patients. Give volumes of several patients.")
    for part in PARTS[1:]:
        if inside := [i for i, found in enumerate(parts) if found == part]:
            print(f"  {part}: slices {inside[0]} to {inside[-1]}, with a gap on both sides")


def write_pairs(job: Job, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The records of one slice, whose images are written."""
    scan, folder = job.scan, Path("images", job.part)
    low, high = scan.value_range
    wide = abs(high - low) > 255 if args.bits is None else args.bits == 16
    save = partial(_save, args.out, 16 if wide and not scan.colour else 8)
    known: dict[str, Any] = {"hu_range": (low, high)} if scan.unit == "HU" else {}
    known |= {"pixel_mm": scan.spacing[0]} if scan.spacing else {}
    clean, records = save(folder / f"{job.volume}_{job.index:04d}_clean.png", scan.values), []
    own = {words[0]: words[1:] for words in args.texts}
    for (name, *ends), draw in ((p, d) for p in args.degrade for d in range(args.draws)):
        key = [zlib.crc32(word.encode()) for word in (job.volume, name)]
        rng = np.random.default_rng([args.seed, *key, job.index, draw])
        severity = float(rng.uniform(*ends))
        found = degrade(name, scan.values, severity, rng, **known)
        stem = folder / f"{job.volume}_{job.index:04d}_{name}_{draw}"
        target = clean
        if not np.array_equal(found.target_01, scan.values):
            target = save(stem.with_name(f"{stem.name}_clean.png"), found.target_01)
        instruction, assessment = own.get(name, (INSTRUCTIONS[found.task], found.sentence))
        record = {
            "main_task_type": found.task,
            "sub_task_type": "restoration",
            "degrade_type": name,
            "dataset": args.name or args.out.name,
            "volume": job.volume,
            "slice": job.index,
            "value_range": [low, high],
            "unit": scan.unit,
            "degradation": {"name": name, "severity": severity, "parameters": found.parameters},
            "input_img": [save(stem.with_name(f"{stem.name}.png"), found.image_01)],
            "output_img": [target],
            "message": [
                {"from": "human", "value": f"<image>\n{instruction}"},
                {"from": "gpt", "value": assessment},
            ],
        }
        records.append(record)
    return records


def _save(out: Path, bits: int, path: Path, image_01: np.ndarray) -> dict[str, Any]:
    (out / path).parent.mkdir(parents=True, exist_ok=True)
    kind = np.uint16 if bits == 16 else np.uint8
    Image.fromarray(np.round(image_01 * (2**bits - 1)).astype(kind)).save(out / path)
    height, width = image_01.shape[:2]
    return {"path": path.as_posix(), "height": height, "width": width}


def write_set(args: argparse.Namespace) -> None:
    """Raises ValueError for arguments or sources that give no set."""
    if args.out.exists() and any(args.out.iterdir()):
        raise ValueError(f"--out {args.out} is not empty: name a new folder or remove it")
    planned = Counter(name for name, *_ in args.degrade)
    if (most := planned.most_common(1)[0])[1] > 1:
        raise ValueError(f"--degrade {most[0]} stands twice: give one range, and --draws")
    if unknown := {name for name, *_ in args.texts} - planned.keys():
        raise ValueError(f"--texts {min(unknown)} is for none of --degrade {', '.join(planned)}")
    options = {"axis": args.axis, "volume": args.volume, "value_range": args.value_range}
    find = partial(find_sources, patient=args.patient, series=args.series, **options)
    found = sorted((s for root in args.source for s in find(root)), key=lambda s: s.name)
    if not found:
        raise ValueError(f"no volume in {', '.join(map(str, args.source))}")
    names = Counter(source.name for source in found)
    if max(names.values()) > 1:
        raise ValueError(f"several volumes are called {names.most_common(1)[0][0]}: rename one")
    found = found if args.patient else joined(found)
    warn_of_patients(found)
    records: dict[str, list[dict[str, Any]]] = {part: [] for part in PARTS}
    left_out: Counter = Counter()
    jobs = find_jobs(found, args, left_out)
    with ProcessPoolExecutor(args.workers) as pool:
        while batch := list(islice(jobs, JOBS_AHEAD)):
            made = pool.map(partial(write_pairs, args=args), batch)
            for job, lines in zip(batch, made, strict=True):
                records[job.part] += lines
    if not records["train"]:
        raise ValueError(f"no slice is left to train with; left out: {dict(left_out)}")
    for part, lines in records.items():
        volumes, slices = (
            {tuple(r[k] for k in keys) for r in lines}
            for keys in (("volume",), ("volume", "slice"))
        )
        print(f"{part}: {len(lines)} pairs of {len(slices)} slices of {len(volumes)} volumes")
        if lines:
            text = "".join(json.dumps(record) + "\n" for record in lines)
            (args.out / f"{part}.jsonl").write_text(text)
    print(f"left out: {', '.join(f'{n} {why}' for why, n in left_out.items()) or 'nothing'}")
    _write_mixture(args)
    asked = {"val": args.val, "test": args.test or args.test_slices}
    for part in (part for part, share in asked.items() if share and not records[part]):
        raise ValueError(
            f"{part} is empty: all that was to go into it was left out. Mend that, divide anew by "
            f"--seed, or ask for none by --{part} 0"
        )


def _sizes(rule: list[int]) -> dict[str, int]:
    """Arguments of a ResizeRule."""
    return dict(zip(("image_stride", "max_image_size", "min_image_size"), rule, strict=True))


def _write_mixture(args: argparse.Namespace) -> None:
    sizes = args.image_rule, args.vit_rule
    rules = {name: _sizes(rule) for name, rule in zip(RULES, sizes, strict=True)}
    files = {"jsonl_path": "${data_root}/train.jsonl", "data_dir": "${data_root}"}
    dataset = {"name": args.name or args.out.name, **files}
    mixture = {"restoration": {"weight": 1, **rules, "datasets": [dataset]}}
    path = args.out / "mixture.yaml"
    path.write_text(yaml.safe_dump(mixture, sort_keys=False))
    print(f"train with --dataset_config_file {path}")


def plan(text: str) -> Plan:
    found = re.fullmatch(r"(\w+):([\d.]+)(?:-([\d.]+))?", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no NAME:SEVERITY or NAME:LOW-HIGH")
    name, low, high = found.group(1), float(found[2]), float(found[3] or found[2])
    if name not in DEGRADATIONS:
        hint = nearest(name, DEGRADATIONS)
        raise argparse.ArgumentTypeError(f"unknown degradation {name!r}; {hint}")
    if not 0 < low <= high <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: severities are above 0 and at most 1")
    return name, low, high


def pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no pattern: {error}") from error
    return text


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    rule = {"type": int, "nargs": 3, "metavar": ("STRIDE", "LONGEST", "SHORTEST")}
    pair = {"nargs": 2, "default": None}
    add("source", type=Path, nargs="+")
    add("--out", type=Path, required=True, help="a new folder")
    add(
        "--degrade",
        type=plan,
        action="append",
        required=True,
        metavar="NAME:LOW-HIGH",
        help=f"severities in (0, 1], drawn evenly; again for more of {', '.join(DEGRADATIONS)}",
    )
    add(
        "--texts",
        nargs=3,
        action="append",
        default=[],
        metavar=("NAME", "INSTRUCTION", "ASSESSMENT"),
        help="instead of those that come with a degradation",
    )
    add("--draws", type=int, default=1, help="pairs of every slice and degradation")
    add("--axis", choices=DISPLAY, default="axial", help="of slices from NIfTI files")
    add("--volume", type=int, help="which of a 4-D NIfTI file, from 0")
    add("--series", help="UID, or a part of the description, of the DICOM series to take")
    add(
        "--value_range", type=float, **pair, metavar=("BLACK", "WHITE"), help="in units of the file"
    )
    add(
        "--patient",
        type=pattern,
        metavar="REGEX",
        help=r"its first group is the patient in a file's path, as (IXI\d+), whatever PatientID a "
        "DICOM file states; default: PatientID, else the subject of BIDS",
    )
    add(
        "--val", type=float, default=0.1, help="share of patients, of slices if there is one volume"
    )
    add("--test", type=float, default=0.1, help="as --val")
    add("--test_slices", type=int, **pair, metavar=("FIRST", "END"), help="of a single volume")
    add("--gap", type=int, default=8, help="slices between the slabs of a single volume")
    add("--every", type=int, default=1, help="use every n-th slice")
    add("--min_foreground", type=float, default=0.1, help="lit share of a slice that is not black")
    add("--spacing", type=float, help="mm of a pixel; default: the finer of rows and columns")
    add("--size", type=int, **pair, metavar=("HEIGHT", "WIDTH"), help="cut or padded to this")
    add("--bits", type=int, choices=(8, 16), help="of grey images; default: by the value range")
    add("--image_rule", **rule, default=(16, 1024, 128), help="sizes of the autoencoder's images")
    add("--vit_rule", **rule, default=(14, 518, 224), help="sizes of the ViT's images")
    add("--name", help="of the data set; default: the folder's")
    add("--workers", type=int, default=1, help="processes")
    add("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main() -> None:
    warnings.formatwarning = lambda message, *_: f"WARNING: {message}\n"
    try:
        write_set(parse())
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
