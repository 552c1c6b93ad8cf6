"""JSONL test set in, results out: one line and three images per sample, statistics at the end.

Every number stands beside its floor and its ceiling: the degraded input and the autoencoder's
reconstruction of the truth are measured like the restoration. A sample that fails is recorded with
its error and counted, never dropped.
"""

import hashlib
import json
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track

from data.images import read_image, to_uint8
from data.records import Record, RecordError, parse_record
from modeling.bagel.generation import SamplingConfig
from modeling.pretrained import MANIFEST

from .metrics import PROTOCOL, scores
from .restorer import Restorer, TextConfig

KINDS = ("", "_input", "_bicubic", "_ceiling")
"""Suffixes of psnr and ssim: the restoration, and what it is held against."""


class ResumeError(ValueError):
    """The output folder holds results of another configuration."""


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

    def fingerprint(self, checkpoint: str) -> str:
        """Of everything that changes a result; where it is written does not."""
        settings = asdict(self) | {"checkpoint": checkpoint, "protocol": PROTOCOL}
        del settings["output_dir"], settings["num_samples"]
        return hashlib.sha256(json.dumps(settings, default=str).encode()).hexdigest()


def run(restorer: Restorer, config: RunConfig) -> dict[str, Any]:
    """Restores what is not done yet and returns the statistics that it writes.

    Raises ResumeError when `output_dir` holds results of another configuration.
    """
    content = config.annotation_file.read_bytes()
    numbered = enumerate(content.split(b"\n"), start=1)
    lines = [(number, line) for number, line in numbered if line.strip()]
    if config.num_samples >= 0:
        lines = lines[: config.num_samples]
    if not lines:
        raise ValueError(f"{config.annotation_file}: no sample")
    results_path = config.output_dir / "results.jsonl"
    done = _done(config, _identity(restorer, content), results_path)
    todo = [i for i in range(len(lines)) if i not in done]
    console = Console(stderr=True)
    with results_path.open("a") as results:
        for i in track(
            todo, description="restoring", console=console, disable=not console.is_terminal
        ):
            taken = {r["pred_img"] for r in done.values() if "pred_img" in r}
            result = process(restorer, config, i, *lines[i], taken)
            results.write(json.dumps(result) + "\n")
            results.flush()
            done[i] = result
    statistics = summarise([done[i] for i in range(len(lines))])
    _write(config.output_dir / "statistics.json", statistics)
    return statistics


def _identity(restorer: Restorer, annotations: bytes) -> str:
    """Checkpoint and test set by content, so that a changed file at an old path is noticed."""
    report = restorer.report
    manifest = Path(report.folder) / MANIFEST if report else None
    weights = manifest.read_bytes() if manifest and manifest.exists() else b""
    digests = [hashlib.sha256(part).hexdigest()[:16] for part in (weights, annotations)]
    return f"{report} (manifest {digests[0]}, test set {digests[1]})"


def _done(config: RunConfig, checkpoint: str, results: Path) -> dict[int, dict[str, Any]]:
    """Results so far by sample id; a line that a kill cut off is dropped."""
    fingerprint = config.fingerprint(checkpoint)
    settings = config.output_dir / "settings.json"
    config.output_dir.mkdir(parents=True, exist_ok=True)
    if settings.exists():
        found = json.loads(settings.read_text())["fingerprint"]
        if found != fingerprint:
            raise ResumeError(
                f"{config.output_dir} holds results of another configuration "
                "(see settings.json there): choose another --output_dir"
            )
    _write(
        settings,
        {"fingerprint": fingerprint, "checkpoint": checkpoint, "protocol": PROTOCOL}
        | asdict(config),
    )
    done: dict[int, dict[str, Any]] = {}
    if results.exists():
        text = results.read_text()
        complete = text[: text.rfind("\n") + 1]
        results.write_text(complete)
        for line in complete.splitlines():
            result = json.loads(line)
            done[result["sample_id"]] = result
    return done


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, default=str) + "\n")


def process(
    restorer: Restorer, config: RunConfig, sample_id: int, number: int, line: bytes, taken: set[str]
) -> dict[str, Any]:
    """One sample (line `number` of the file) -> one result line, with `error` if it failed.

    `taken` are image paths of other samples, which are not overwritten.
    """
    now = datetime.now(UTC).isoformat(timespec="seconds")
    result: dict[str, Any] = {"sample_id": sample_id, "timestamp": now}
    try:
        record = parse_record(line, f"{config.annotation_file}:{number}")
        result |= {
            key: record.raw.get(key)
            for key in ("main_task_type", "degrade_type", "input_img", "output_img", "message")
        }
        if not record.output_images:
            raise RecordError(f"{record.source}: output_img is missing: nothing to compare with")
        return result | _restore_and_score(restorer, config, record, sample_id, taken)
    except (ValueError, RuntimeError, OSError) as error:
        return result | {"error": f"{type(error).__name__}: {error}"}


def _restore_and_score(
    restorer: Restorer, config: RunConfig, record: Record, sample_id: int, taken: set[str]
) -> dict[str, Any]:
    degraded = read_image(config.image_root / record.input_images[0])
    truth_file = read_image(config.image_root / record.output_images[0])
    start = time.perf_counter()
    restored = restorer.restore(
        degraded, record.instruction, config.sampling, config.text, config.seed
    )
    seconds = time.perf_counter() - start
    truth = Image.fromarray(to_uint8(restorer.task.vae_rule(truth_file)))
    if truth.size != restored.image.size:
        truth = truth.resize(restored.image.size, Image.Resampling.BICUBIC)
    compared = {"": restored.image, "_ceiling": restorer.autoencode(truth)}
    compared["_input"] = degraded.resize(truth.size, Image.Resampling.NEAREST)
    if degraded.size != truth.size:
        compared["_bicubic"] = degraded.resize(truth.size, Image.Resampling.BICUBIC)
    measured = {
        f"{metric}{kind}": value
        for kind, image in compared.items()
        for metric, value in scores(image, truth).items()
    }
    saved = _save_images(
        config.output_dir,
        Path(record.input_images[0]),
        sample_id,
        taken,
        {"input": degraded, "GT": truth, "pred": restored.image},
    )
    return measured | {
        "saved_input_img": saved["input"],
        "saved_output_img": saved["GT"],
        "pred_img": saved["pred"],
        "understanding_text": restored.assessment,
        "inference_time": seconds,
    }


def _save_images(
    output: Path, source: Path, sample_id: int, taken: set[str], images: dict[str, Image.Image]
) -> dict[str, str]:
    folder = output / "images" / Path(*[p for p in source.parent.parts if p not in ("/", "..")])
    folder.mkdir(parents=True, exist_ok=True)
    stem = source.stem
    if str((folder / f"{stem}_pred.png").relative_to(output)) in taken:
        stem = f"{stem}_{sample_id}"
    paths = {kind: folder / f"{stem}_{kind}.png" for kind in images}
    for kind, image in images.items():
        image.save(paths[kind])
    return {kind: str(path.relative_to(output)) for kind, path in paths.items()}


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Means and deviations over all samples and by task; failed samples are counted apart."""
    by_task: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        by_task[str(result.get("main_task_type"))].append(result)
    return {
        "protocol": PROTOCOL,
        "overall": _summary(results),
        "by_task_type": {task: _summary(part) for task, part in sorted(by_task.items())},
        "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    good = [r for r in results if "error" not in r]
    summary: dict[str, Any] = {"total_samples": len(results), "n_failed": len(results) - len(good)}
    for metric in ("psnr", "ssim"):
        for kind in KINDS:
            values = [r[metric + kind] for r in good if metric + kind in r]
            if values:
                summary[f"{metric}{kind}_mean"] = float(np.mean(values))
                summary[f"{metric}{kind}_std"] = float(np.std(values))
    if good:
        summary["avg_inference_time"] = float(np.mean([r["inference_time"] for r in good]))
    return summary
