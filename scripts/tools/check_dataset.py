"""Checks every record of a mixture, or of a folder of JSONL files, as training would see it.

python scripts/tools/check_dataset.py --dataset_config_file MIXTURE.yaml --model_path CHECKPOINT \\
  --against TEST.jsonl --output_dir REPORT

Every image is decoded. Writes a report, a table of the findings and a sheet of random records.
Ends with 0 without findings, 1 with findings, 2 for an argument or file that prevents the check.
"""

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
from torch.utils.data import DataLoader

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from data.config import DatasetConfig, GroupConfig, load_mixture, read_yaml  # noqa: E402
from data.files import folder_of, place  # noqa: E402
from data.loader import end_with_the_parent  # noqa: E402
from data.packer import PackerConfig  # noqa: E402
from data.records import Form  # noqa: E402
from data.sources import JsonlRecords, share  # noqa: E402
from data.stream import HOW_IT_RUNS, LoaderConfig, Planner  # noqa: E402
from data.tasks import TASKS  # noqa: E402
from data.tokenizer import Tokenizer  # noqa: E402
from data.transforms import RULES, ResizeRule  # noqa: E402
from data.volumes import UnreachableError  # noqa: E402
from scripts.tools import dataset_report  # noqa: E402
from scripts.tools.dataset_checks import VOLUME, Checker, Finding, HeldOut, Outcome  # noqa: E402

RULES_OF = "configs/data/finetuned_example.yaml"
"""Has the resize rules for a folder of JSONL files."""
LIMITS = {f.name: f.default for f in fields(LoaderConfig) if f.name not in HOW_IT_RUNS}


@dataclass
class Checked:
    """What the first `done` jobs have found. Equal at the end whenever a check was interrupted."""

    fingerprint: str
    lengths: list[Counter[int]]
    """How many samples have that many tokens, by data set."""
    done: int = 0
    findings: list[Finding] = field(default_factory=list)
    held_out: dict[str, str] = field(default_factory=dict)
    """Images and volumes of the test sets by key, with their names and sources."""
    told: dict[str, str] = field(default_factory=dict)
    """Sources of the findings about volumes, by data set and name."""

    def take(self, outcome: Outcome, checker: Checker) -> list[Finding]:
        """Returns the findings that are new."""
        new, dataset = [*outcome.findings], checker.sets[outcome.dataset]
        for key, name, source in outcome.seen:
            if isinstance(dataset, HeldOut):
                self.held_out.setdefault(key, f"{source} as {name}")
            elif twin := self.held_out.get(key):
                text = f"{name} is in the test set too: {twin}"
                new.append(Finding(outcome.dataset, source, "in_test_set", text))
        for name, source in outcome.volumes.items():
            if isinstance(dataset, HeldOut):
                self.held_out.setdefault(name, source)
            elif name in self.held_out and f"{outcome.dataset}:{name}" not in self.told:
                self.told[f"{outcome.dataset}:{name}"] = source
                text = f"{name} is in the test set too: {self.held_out[name]}"
                new.append(Finding(outcome.dataset, source, VOLUME, text))
        self.findings += new
        self.lengths[outcome.dataset].update(outcome.tokens)
        self.done += 1
        return new

    def save(self, folder: Path, keep: int) -> None:
        path = folder / f"progress_{self.done:012d}.json"
        path.with_suffix(".tmp").write_text(json.dumps(vars(self)))
        path.with_suffix(".tmp").replace(path)
        for stale in saved(folder)[keep:]:
            stale.unlink()

    def resume(self, folder: Path) -> None:
        """From the newest file that can be read. Raises ValueError when it is of another check."""
        for path in saved(folder):
            with suppress(json.JSONDecodeError):
                content = json.loads(path.read_text())
                if content["fingerprint"] != self.fingerprint:
                    raise ValueError(f"--resume: {path} is of other data sets or arguments")
                lengths = [{int(n): times for n, times in c.items()} for c in content["lengths"]]
                self.lengths = [Counter(found) for found in lengths]
                self.findings = [Finding(*found) for found in content["findings"]]
                self.done, self.held_out = content["done"], content["held_out"]
                self.told = content["told"]
                return


def saved(folder: Path) -> list[Path]:
    """Files of progress, newest first."""
    return sorted(folder.glob("progress_*.json"), reverse=True)


class NoTokenizer:
    """Stands where there is no --model_path: texts have no tokens."""

    special = None

    def encode(self, text: str) -> list[int]:
        return []


def mixture_of(args: argparse.Namespace) -> tuple[GroupConfig, ...]:
    """Raises ValueError for a mixture or a folder that cannot be used."""
    if args.dataset_config_file:
        return load_mixture(args.dataset_config_file, args.data_root)
    files = sorted(args.jsonl_dir.glob("**/*.jsonl"))
    if not files:
        raise ValueError(f"--jsonl_dir={args.jsonl_dir}: no .jsonl file is there")
    (example,) = read_yaml(ROOT / RULES_OF).values()
    rules = {key: ResizeRule(**example[key]) for key in RULES}
    folder = place(args.image_base_path or str(args.jsonl_dir))
    names = [file.relative_to(args.jsonl_dir).with_suffix("").as_posix() for file in files]
    sets = (
        DatasetConfig(name=name, jsonl_path=file, data_dir=folder)
        for name, file in zip(names, files, strict=True)
    )
    return (GroupConfig(task=args.task, datasets=tuple(sets), **rules),)


def checker_of(args: argparse.Namespace, mixture: tuple[GroupConfig, ...]) -> Checker:
    """An image token is a stride of the resize rule wide and high. Raises ValueError or OSError
    for what cannot be opened."""
    latent, patch = (
        math.gcd(*(getattr(g, rule).image_stride for g in mixture if rule in TASKS[g.task].rules))
        for rule in RULES
    )
    # Lengths do not depend on the sides of the position tables.
    sides = {"max_latent_size": 1, "vit_max_num_patch_per_side": 1}
    sizes = PackerConfig(latent_stride=latent or 1, vit_patch_size=patch or 1, **sides)
    config = LoaderConfig(**{name: getattr(args, name) for name in LIMITS})
    tokenizer: Any = Tokenizer(args.model_path) if args.model_path else NoTokenizer()
    held_out = []
    for path in dict.fromkeys(args.against):
        folder = place(args.against_root or args.image_base_path or str(folder_of(place(path))))
        records = JsonlRecords(place(path), Form(needs=()))
        held_out.append(HeldOut(f"test:{path}", records, folder))
    share([tensor for test in held_out for tensor in test.records.index])
    return Checker(Planner(mixture, config, sizes, tokenizer), held_out)


def fingerprint(mixture: tuple[GroupConfig, ...], checker: Checker, model_path: str) -> str:
    """Of all that a check depends on, the images apart."""
    paths = [dataset.records.path for dataset in checker.sets]  # type: ignore[attr-defined]
    local = [path.stat() for path in paths if isinstance(path, Path)]
    stamps = [(found.st_size, found.st_mtime_ns) for found in local]
    planner, folders = checker.planner, [str(test.folder) for test in checker.held_out]
    parts = (mixture, planner.config, planner.packing, model_path, paths, stamps, folders)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def check(checker: Checker, checked: Checked, args: argparse.Namespace) -> bool:
    """Goes on from what was checked; False when --max_errors ended it.

    Raises RuntimeError when a worker process dies.
    """
    workers = min(args.max_workers, os.cpu_count() or 1) if args.max_workers > 1 else 0
    # The server that forks the workers imports once what they need.
    multiprocessing.set_forkserver_preload(["__main__", __name__])
    jobs = DataLoader(
        checker,
        batch_size=None,
        sampler=range(checked.done, len(checker.jobs)),
        num_workers=workers,
        worker_init_fn=end_with_the_parent,
        multiprocessing_context="forkserver" if workers else None,
    )
    done, total = (sum(len(r) for _, r in checker.jobs[:n]) for n in (checked.done, None))
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    last, since = time.monotonic(), 0
    with Progress(*columns, console=Console(stderr=True), disable=args.no_progress) as bar:
        line = bar.add_task("records", total=total, completed=done)
        try:
            for outcome in jobs:
                new = checked.take(outcome, checker)
                bar.advance(line, outcome.records)
                if args.verbose:
                    print(*new, sep="\n", end="\n" if new else "", flush=True)
                if args.max_errors is not None and len(checked.findings) >= args.max_errors:
                    return checked.done == len(checker.jobs)
                since += outcome.records
                due = since >= args.save_every_n or time.monotonic() - last >= args.save_interval
                if args.autosave and due:
                    checked.save(args.output_dir, args.keep_progress_files)
                    last, since = time.monotonic(), 0
        finally:
            if args.autosave:
                checked.save(args.output_dir, args.keep_progress_files)
    return True


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--dataset_config_file", type=Path, help="a mixture, as for training")
    source.add_argument("--jsonl_dir", type=Path, help="a folder of JSONL files")
    add("--data_root", help="of the mixture's paths")
    add("--image_base_path", help="folder of the images (default: --jsonl_dir)")
    add("--task", choices=TASKS, default="restoration", help="of the records in --jsonl_dir")
    add("--model_path", default="", help="folder with the tokenizer, without which no text counts")
    add("--against", nargs="+", default=[], metavar="TEST.jsonl", help="what must not be in it")
    add("--against_root", help="folder of their images (default: as above, else the file's)")
    add("--output_dir", type=Path, required=True)
    add("--max_errors", type=int, help="end with the job that finds so many")
    add("--max_workers", type=int, default=16, help="processes, at most one a CPU core")
    add("--num_packs", type=int, default=100, help="planned to measure how full packs are")
    add("--num_pairs", type=int, default=12, help="records on the contact sheet")
    add("--verbose", action="store_true", help="print findings as they are found")
    add("--no-progress", "--no_progress", action="store_true")
    add("--resume", action="store_true", help="go on from the newest progress in --output_dir")
    add("--enable_autosave", dest="autosave", action="store_true", default=True)
    add("--no_autosave", dest="autosave", action="store_false")
    add("--save_interval", type=float, default=300, help="seconds")
    add("--save_every_n", type=int, default=10000, help="records")
    add("--keep_progress_files", type=int, default=3)
    for name, default in LIMITS.items():
        add(f"--{name}", type=int, default=default, help="as for training")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        mixture = mixture_of(args)
        checker = checker_of(args, mixture)
        args.output_dir.mkdir(parents=True, exist_ok=True)
        mark = fingerprint(mixture, checker, args.model_path)
        checked = Checked(mark, [Counter() for _ in checker.sets])
        if args.resume:
            checked.resume(args.output_dir)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for stale in () if args.resume else saved(args.output_dir):
        stale.unlink()
    try:
        ended = check(checker, checked, args)
    except (RuntimeError, UnreachableError, KeyboardInterrupt) as error:
        print(f"ended by {error!r}; --resume goes on where it was", file=sys.stderr)
        return 2
    notes = [] if args.model_path else ["without --model_path: tokens of images alone"]
    if not ended:
        notes.append(f"ended by --max_errors={args.max_errors}: not all records were checked")
    print(dataset_report.write(args, checker, checked.findings, checked.lengths, notes))
    for stale in saved(args.output_dir) if ended else ():
        stale.unlink()
    return 1 if checked.findings else 0


if __name__ == "__main__":
    sys.exit(main())
