"""Folders of results, as the batch inference writes them, and tables of them."""

import argparse
import csv
import fcntl
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from modeling.pretrained import MANIFEST, LoadReport

from .metrics import PROTOCOL

SETTINGS, RESULTS, STATISTICS = "settings.json", "results.jsonl", "statistics.json"
PATHS = "paths"
NAMES = (PATHS, "model_id", "step", "split")
"""Keys of settings that say where things were and what they are called: they change no result."""
LAST_COLUMNS = ("n_failed", "protocol")
"""Stand behind those of the users' own tables."""


class ResultsError(ValueError):
    """A folder of results that cannot be read."""


class ResumeError(ValueError):
    """The output folder holds results of another configuration, or another run is at work in it."""


def replace_text(path: Path, text: str) -> None:
    """Writes a file as a whole or not at all."""
    staged = path.with_name(path.name + ".staged")
    staged.write_text(text)
    staged.replace(path)


def digest(*contents: bytes) -> str:
    """16 hexadecimal digits; how the contents are parted counts."""
    parts = b"".join(hashlib.sha256(content).digest() for content in contents)
    return hashlib.sha256(parts).hexdigest()[:16]


def mark_of(report: LoadReport, dtype: torch.dtype) -> dict[str, Any]:
    """Settings that tell a model from others: its weights and what is in its folder, by the
    manifest's digests, without which sizes and times of the files stand in for their content."""
    folder, manifest = Path(report.folder), Path(report.folder, MANIFEST)
    stats = [(path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file()]
    stamps = "; ".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats)
    mark = digest(manifest.read_bytes() if manifest.exists() else stamps.encode())
    named = {"checkpoint": f"{report.weights} {mark}"}
    return named | {"dtype": str(dtype).removeprefix("torch.")}


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Raises ResumeError while another run, one not killed, holds the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ResumeError(f"{folder}: another run is at work in it") from error
        except OSError as error:
            print(f"WARNING: {folder}: no lock: {error}: start no second run in it")
        yield


def claim(folder: Path, settings: dict[str, Any]) -> None:
    """Writes what changes a result to settings.json; raises ResumeError if other settings stand
    there."""
    path = folder / SETTINGS
    text = json.dumps(settings, indent=2, default=str) + "\n"
    known, ours = read_json(path) if path.exists() else {}, json.loads(text)
    keys = [key for key in {**known, **ours} if known and key not in NAMES]
    if other := [key for key in keys if known.get(key) != ours.get(key)]:
        raise ResumeError(
            f"{folder} holds results of another configuration (see {', '.join(other)} in "
            f"{SETTINGS} there): choose another --output_dir"
        )
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(path, text)


def read_settings(folder: Path) -> dict[str, Any]:
    """Settings of a folder of results; without a file, names of folders stand in for theirs."""
    place, file = folder.resolve(), folder / SETTINGS
    names = {"model_id": place.parent.name, "split": place.name, "protocols": [PROTOCOL]}
    return names | (read_json(file) if file.exists() else {})


def read_json(
    path: Path, text: bytes | None = None, line: int = 1, needed: Sequence[str] = ()
) -> dict[str, Any]:
    """The object in a file, or in a line of it; NaN becomes None.

    Raises ResultsError with file and line when it is none or lacks a `needed` key.
    """
    try:
        content = path.read_bytes() if text is None else text
        found = json.loads(content, parse_constant=lambda _: None)
    except ValueError as error:
        raise ResultsError(f"{path}:{line}: {error}; was the run killed that writes it?") from error
    if not isinstance(found, dict) or (missing := [key for key in needed if key not in found]):
        what = ", ".join(missing) if isinstance(found, dict) else "object"
        raise ResultsError(f"{path}:{line}: no {what}: not written by the batch inference?")
    return found


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Raises ResultsError, also where a run of ours has not come to its end."""
    path = folder / RESULTS
    if (folder / SETTINGS).exists() and not (folder / STATISTICS).exists():
        raise ResultsError(f"{folder}: no {STATISTICS}: let the batch inference finish")
    lines = enumerate(path.read_bytes().splitlines(), start=1)
    return [read_json(path, text, line, ("sample_id",)) for line, text in lines]


def read_statistics(folder: Path) -> dict[str, Any]:
    return read_json(folder / STATISTICS, needed=("overall", "by_task_type"))


def write_table(
    summary: str,
    flags: tuple[str, str],
    output: str,
    name: str,
    rows: Callable[[Path, Path], Iterable[dict[str, Any]]],
) -> None:
    """The command line of a table: `rows(entry, folder)` of every folder that holds a file `name`.

    `flags` take the directories to look in, and `output` is where the CSV goes by default.
    """
    parser = argparse.ArgumentParser(description=summary, allow_abbrev=False)
    parser.add_argument(*flags, dest="entries", type=Path, nargs="+", required=True)
    parser.add_argument("-o", "--output", type=Path, default=Path(output), help="CSV file")
    parser.add_argument("-v", "--verbose", action="store_true", help="name every file")
    args = parser.parse_args()
    table: list[dict[str, Any]] = []
    for entry in args.entries:
        files = sorted(entry.rglob(name))
        if not files:
            raise ValueError(f"{entry}: no {name} in it ({flags[1]})")
        for file in files:
            if args.verbose:
                print(file)
            table += rows(entry, file.parent)
    columns = dict.fromkeys(key for row in table for key in row if key not in LAST_COLUMNS)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with args.output.open("w", newline="") as out:
        writer = csv.DictWriter(out, [*columns, *LAST_COLUMNS])
        writer.writeheader()
        writer.writerows(table)
    print(f"{len(table)} rows in {args.output}")


def command(main: Callable[[], int | None]) -> None:
    """Ends with the exit code of a command line; its user's mistakes become one line and code 1."""
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
