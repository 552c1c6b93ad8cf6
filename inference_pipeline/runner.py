"""JSONL test set in, results out: one line and three images per sample, statistics at the end.

Every number stands beside its floor and its ceiling: the degraded input and the autoencoder's
reconstruction of the truth are measured like the restoration. A sample that fails is recorded with
its error and counted, never dropped.

The test set is cut into units of samples that are restored together. A unit that was cut off is
done again as a whole, and processes take whole units: so the numbers do not depend on kills, on
the number of processes, or on what was done before.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.progress import track

from data.files import UNREADABLE, read_bytes, within
from data.records import IMAGE_TAG, Record, RecordError, parse_record
from data.scores import references
from data.tasks import open_pair, require_sizes
from modeling.bagel.generation import SamplingConfig, TextConfig

from .metrics import ALWAYS, PROTOCOL, measure_all
from .perceptual import Lpips
from .restorer import PromptStyle, Restoration, Restorer
from .results import (
    PATHS,
    RESULTS,
    SETTINGS,
    STATISTICS,
    ResumeError,
    claim,
    digest,
    locked,
    mark_of,
    read_json,
    replace_text,
)
from .shards import ALONE, Processes
from .summary import summarise
from .text_metrics import text_numbers

COPIED = ("main_task_type", "degrade_type", "dataset", "message")
"""Keys of the test set that stand in the results too."""
BATCHES_PER_UNIT = 4
"""Texts refill a batch within a unit; a kill loses at most one unit per process."""
Result = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    annotation_file: Path
    image_root: Path
    output_dir: Path
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    text: TextConfig = field(default_factory=TextConfig)
    seed: int = 42
    num_samples: int = -1
    """First N lines; -1 takes all."""
    batch_size: int = 1
    """Texts decoded and images sampled at a time, in each process."""
    prompt_style: PromptStyle = "trained"
    protocols: tuple[str, ...] = (PROTOCOL,)
    """The first one's numbers have plain names."""
    metrics: tuple[str, ...] = ALWAYS
    lpips_weights: Path | None = None
    """With a file, LPIPS is measured too."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} is less than 1")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed} is not in [0, 2^63)")
        if missing := {*ALWAYS} - {*self.metrics}:
            raise ValueError(f"metrics: {sorted(missing)} are always measured: name them too")


def run(restorer: Restorer, config: RunConfig, processes: Processes = ALONE) -> dict[str, Any]:
    """Restores what is not done yet and returns the statistics that it writes.

    Every process calls it with its own `restorer`. Raises ResumeError when `output_dir` holds
    results of another configuration.
    """
    numbered = enumerate(config.annotation_file.read_bytes().split(b"\n"), start=1)
    lines = [(f"{config.annotation_file}:{n}", line) for n, line in numbered if line.strip()]
    samples = _samples(lines if config.num_samples < 0 else lines[: config.num_samples])
    if not samples:
        raise ValueError(f"{config.annotation_file}: no sample")

    contents = [line.strip() for _, line in lines]
    with ExitStack() as held:
        # By the first process alone, for all.
        processes.first_says(lambda: held.enter_context(locked(config.output_dir)))
        done = processes.first_says(lambda: _finished(restorer, config, samples, contents))
        return _run(restorer, config, processes, samples, done)


def _finished(
    restorer: Restorer, config: RunConfig, samples: "list[_Sample]", lines: list[bytes]
) -> dict[int, Result]:
    """Claims the folder; the results in it that are still of the samples' images, by sample id."""
    folder = config.output_dir
    if (folder / RESULTS).exists() and not (folder / SETTINGS).exists():
        raise ResumeError(f"{folder}: results without {SETTINGS}: choose another --output_dir")
    _claim_folder(restorer, config, lines)
    found = _merged(folder)
    (folder / STATISTICS).unlink(missing_ok=True)  # until they are of all that is asked
    # A failed sample is tried again in any case.
    digests = {
        i: sample.digest(config.image_root)
        for i, sample in enumerate(samples)
        if i in found and "error" not in found[i]
    }
    if away := [found[i]["input_img"] for i, images in digests.items() if not images]:
        print(f"WARNING: the results of {len(away)} samples stay, whose images cannot be read:")
        print(f"  the first is {away[0]} in {config.image_root}")
    changed = {i for i, images in digests.items() if images not in ("", found[i]["images"])}
    return {i: found[i] for i in range(len(samples)) if i in found and i not in changed}


def _run(
    restorer: Restorer,
    config: RunConfig,
    processes: Processes,
    samples: "list[_Sample]",
    done: dict[int, Result],
) -> dict[str, Any]:
    lpips = Lpips(config.lpips_weights) if config.lpips_weights else None
    batch = _Batch(restorer, config, samples, lpips)
    units = _units(len(samples), config.batch_size * BATCHES_PER_UNIT, done)
    console = Console(stderr=True)
    hidden = processes.rank > 0 or not console.is_terminal
    own = units[processes.rank :: processes.count]
    with (config.output_dir / _part(processes.rank)).open("a") as file:
        for unit in track(own, "restoring", console=console, disable=hidden):
            file.write("".join(json.dumps(result) + "\n" for result in batch.restored(unit)))
            file.flush()
    processes.wait()

    def end() -> dict[str, Any]:
        results = _merged(config.output_dir)
        asked = [results[i] for i in range(len(samples))]
        statistics = summarise(asked, config.protocols)
        replace_text(config.output_dir / STATISTICS, json.dumps(statistics, indent=2) + "\n")
        return statistics

    return processes.first_says(end)


def _units(count: int, size: int, done: dict[int, Result]) -> list[list[int]]:
    """Ids that are still to be restored: whole units, and failed samples of finished ones."""
    units = []
    for first in range(0, count, size):
        unit = list(range(first, min(first + size, count)))
        if all(i in done for i in unit):
            unit = [i for i in unit if "error" in done[i]]
        units.append(unit)
    return [unit for unit in units if unit]


def _claim_folder(restorer: Restorer, config: RunConfig, lines: list[bytes]) -> None:
    """`claim` with everything that changes a result; files count by content, not by place."""
    folder, task = Path(restorer.report.folder), restorer.task
    model_id, step = identity(folder)
    settings = asdict(config) | mark_of(restorer.report, restorer.model.dtype)
    settings |= {
        "model_id": model_id,
        "step": step,
        "test_set": digest(*lines),
        "split": config.annotation_file.stem,
        "resize_rules": [asdict(rule) for rule in (task.vae_rule, task.vit_rule)],
    }
    names = ("annotation_file", "image_root", "lpips_weights")
    settings[PATHS] = {"checkpoint": folder} | {name: settings.pop(name) for name in names}
    settings["lpips"] = config.lpips_weights and digest(config.lpips_weights.read_bytes())
    # These change no result, but for the rounding of matrix products.
    for name in ("output_dir", "num_samples", "batch_size"):
        del settings[name]
    claim(config.output_dir, settings)


def identity(checkpoint: Path) -> tuple[str, int | None]:
    """A checkpoint's name in tables and its training step, for a step folder `run/0002000`."""
    folder = checkpoint.resolve()
    if folder.name.isdigit():
        return f"{folder.parent.name}/{folder.name}", int(folder.name)
    return folder.name, None


def _part(rank: int) -> str:
    return f"results.part{rank:04d}.jsonl"


def _merged(folder: Path) -> dict[int, Result]:
    """All results so far by sample id, now in results.jsonl: of every process, the latest counts.

    A line that a kill cut off is dropped. Killed in between, the parts are merged once more.
    """
    parts = sorted(folder.glob("results.part*.jsonl"))
    results: dict[int, Result] = {}
    for path in (folder / RESULTS, *parts):
        text = path.read_bytes() if path.exists() else b""
        for number, line in enumerate(text[: text.rfind(b"\n") + 1].splitlines(), start=1):
            result = read_json(path, line, number, ("sample_id", "images"))
            results[result["sample_id"]] = result
    kept = "".join(json.dumps(results[i]) + "\n" for i in sorted(results))
    replace_text(folder / RESULTS, kept)
    for path in parts:
        path.unlink()
    return results


@dataclass(frozen=True)
class _Sample:
    """One line of the test set."""

    record: Record | RecordError
    """Or why it is none."""
    said: Mapping[str, Any]
    """Of the line, as far as it can be read."""
    stem: str = ""
    """Of its images, relative to the output folder; no other sample has the same."""

    def digest(self, root: Path) -> str:
        """Of its images; empty where one cannot be read."""
        refs = (*r.inputs, *r.outputs) if isinstance(r := self.record, Record) else ()
        try:
            return digest(*(read_bytes(within(root, ref.path)) for ref in refs))
        except UNREADABLE:
            return ""


def _samples(lines: Sequence[tuple[str, bytes]]) -> list[_Sample]:
    samples, taken = [], set()
    for i, (source, line) in enumerate(lines):
        said: Any = None
        try:
            record = parse_record(line, source)
        except RecordError as error:
            with suppress(ValueError, RecursionError):  # so that its error counts for its task
                said = json.loads(json.dumps(json.loads(line), ensure_ascii=False).encode())
            samples.append(_Sample(error, said if isinstance(said, dict) else {}))
            continue
        name = Path(record.inputs[0].path)
        folder = Path("images", *(p for p in name.parent.parts if p not in ("/", "..")))
        stem = f"{folder}/{name.stem}"
        while stem in taken:  # another sample restores the same image
            stem += f"_{i}"
        taken.add(stem)
        samples.append(_Sample(record, record.raw, stem=stem))
    return samples


@dataclass(frozen=True)
class _Pair:
    record: Record
    degraded: Image.Image
    truth: Image.Image


@dataclass(frozen=True)
class _Batch:
    """What samples are restored with."""

    restorer: Restorer
    config: RunConfig
    samples: list[_Sample]
    lpips: Lpips | None

    def restored(self, unit: list[int]) -> list[Result]:
        """The results of a unit's samples, with `error` for those that failed."""
        pairs: dict[int, _Pair] = {}
        errors: dict[int, str] = {}
        for i in unit:
            try:
                pairs[i] = self._read(self.samples[i])
            except (ValueError, OSError) as error:
                errors[i] = _told(error)
        numbers: dict[int, Result] = {}
        for i, restoration, seconds in self._restorations(pairs, errors):
            try:
                numbers[i] = self._measured(i, pairs[i], restoration, seconds)
            except (ValueError, RuntimeError, OSError) as error:
                errors[i] = _told(error)
        return [self._result(i, numbers.get(i), errors.get(i)) for i in unit]

    def _read(self, sample: _Sample) -> _Pair:
        record, root = sample.record, self.config.image_root
        if isinstance(record, RecordError):
            raise record
        if not record.outputs:
            raise RecordError(f"{record.source}: output_img is missing: nothing to compare with")
        tags = sum(text.count(IMAGE_TAG) for who, text in record.messages if who == "human")
        if tags not in (0, images := len(record.inputs)):
            raise RecordError(f"{record.source}: {tags} {IMAGE_TAG} for {images} images")
        if not record.instruction:
            raise RecordError(f"{record.source}: the instruction is empty")
        degraded, truth = open_pair(record, root)
        rule = self.restorer.task.vae_rule
        require_sizes(record.source, rule, degraded.size, truth.size)
        return _Pair(record, degraded, truth)

    def _restorations(
        self, pairs: dict[int, _Pair], errors: dict[int, str]
    ) -> Iterator[tuple[int, Restoration, float]]:
        """(id, restoration, seconds per sample); where a batch fails its samples go on alone."""
        if not pairs:
            return
        ids, config, start = list(pairs), self.config, time.perf_counter()
        asked = [(pairs[i].degraded, pairs[i].record.instruction) for i in ids]
        sizes = [pairs[i].truth.size for i in ids]  # as targets are trained
        batch = min(config.batch_size, len(ids))
        settings = config.sampling, config.text, config.seed, batch, config.prompt_style
        try:
            results = dict(self.restorer.restorations(asked, *settings, sizes))
        except (ValueError, RuntimeError, OSError) as error:
            if len(ids) == 1:
                errors[ids[0]] = _told(error)
                return
            for i in ids:
                yield from self._restorations({i: pairs[i]}, errors)
            return
        seconds = (time.perf_counter() - start) / len(ids)
        for place, i in enumerate(ids):
            yield i, results[place], seconds

    def _measured(self, i: int, pair: _Pair, restored: Restoration, seconds: float) -> Result:
        """Numbers, paths of the saved images and text of one restoration."""
        config, stem = self.config, self.samples[i].stem
        rule, size = self.restorer.task.vae_rule, restored.image.size
        enlarged, truth = references(pair.degraded, pair.truth, rule, size)
        compared = {
            "": restored.image,
            "_ceiling": self.restorer.autoencode(truth),
            "_input": enlarged,
        }
        if pair.degraded.size != truth.size:
            compared["_bicubic"] = pair.degraded.resize(truth.size, Image.Resampling.BICUBIC)
        numbers: Result = {}
        for kind, image in compared.items():
            numbers |= measure_all(image, truth, config.protocols, config.metrics, kind)
            if self.lpips:
                numbers[f"lpips{kind}"] = self.lpips(image, truth)
        if pair.record.assessment:
            numbers |= text_numbers(restored.assessment, pair.record.assessment)
            numbers["reference_text"] = pair.record.assessment
        (config.output_dir / stem).parent.mkdir(parents=True, exist_ok=True)
        for key, kind, image in (
            ("saved_input_img", "input", pair.degraded),
            ("saved_output_img", "GT", truth),
            ("pred_img", "pred", restored.image),
        ):
            numbers[key] = f"{stem}_{kind}.png"
            image.save(config.output_dir / numbers[key])
        return numbers | {
            "prompt": pair.record.instruction,
            "understanding_text": restored.assessment,
            "inference_time": seconds,
        }

    def _result(self, i: int, numbers: Result | None, error: str | None) -> Result:
        sample, record = self.samples[i], self.samples[i].record
        copied: Result = {key: sample.said.get(key) for key in COPIED}
        if isinstance(record, Record):
            # In one form, however the test set names them: samples are compared by these.
            for key, refs in (("input_img", record.inputs), ("output_img", record.outputs)):
                copied[key] = [{"path": ref.path} for ref in refs]
        now = datetime.now(UTC).isoformat(timespec="seconds")
        images = sample.digest(self.config.image_root)
        result = {"sample_id": i, "timestamp": now, "images": images, **copied}
        return result | (numbers if numbers is not None else {"error": error})


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
