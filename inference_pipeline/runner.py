"""JSONL test set in, results out: one line and three images per sample, statistics at the end.

Every number stands beside its floor and its ceiling: the degraded input and the autoencoder's
reconstruction of the truth are measured like the restoration. A sample that fails is recorded with
its error and counted, never dropped.
"""

import hashlib
import json
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.progress import track

from data.images import read_image
from data.records import Record, RecordError, parse_record
from data.scores import references
from modeling.bagel.generation import SamplingConfig
from modeling.pretrained import MANIFEST

from .metrics import PROTOCOL, scores
from .restorer import Restorer, TextConfig
from .statistics import summarise

COPIED = ("main_task_type", "degrade_type", "input_img", "output_img", "message")
"""Keys of the test set that stand in the results too."""


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


def run(restorer: Restorer, config: RunConfig) -> dict[str, Any]:
    """Restores what is not done yet and returns the statistics that it writes.

    Raises ResumeError when `output_dir` holds results of another configuration.
    """
    annotations = config.annotation_file.read_bytes()
    numbered = enumerate(annotations.split(b"\n"), start=1)
    lines = [(f"{config.annotation_file}:{n}", line) for n, line in numbered if line.strip()]
    if config.num_samples >= 0:
        lines = lines[: config.num_samples]
    if not lines:
        raise ValueError(f"{config.annotation_file}: no sample")
    _claim_folder(restorer, config, annotations)
    path = config.output_dir / "results.jsonl"
    batch = _Batch(restorer, config, _results(path))
    todo = [i for i in range(len(lines)) if i not in batch.done]
    console = Console(stderr=True)
    with path.open("a") as file:
        for i in track(todo, "restoring", console=console, disable=not console.is_terminal):
            batch.done[i] = batch.process(i, *lines[i])
            file.write(json.dumps(batch.done[i]) + "\n")
            file.flush()
    statistics = summarise([batch.done[i] for i in range(len(lines))])
    (config.output_dir / "statistics.json").write_text(json.dumps(statistics, indent=2) + "\n")
    return statistics


def _claim_folder(restorer: Restorer, config: RunConfig, annotations: bytes) -> None:
    """Writes everything that changes a result to settings.json, or requires that it stands there.

    Checkpoint and test set count by content, so that a changed file at an old path is noticed.
    """
    manifest = Path(restorer.report.folder) / MANIFEST
    contents = manifest.read_bytes() if manifest.exists() else b"", annotations
    digests = [hashlib.sha256(content).hexdigest()[:16] for content in contents]
    settings = asdict(config) | {
        "checkpoint": f"{restorer.report} (manifest {digests[0]}, test set {digests[1]})",
        "protocol": PROTOCOL,
    }
    del settings["output_dir"], settings["num_samples"]
    text = json.dumps(settings, indent=2, default=str) + "\n"
    path = config.output_dir / "settings.json"
    if path.exists() and path.read_text() != text:
        raise ResumeError(
            f"{config.output_dir} holds results of another configuration "
            "(see settings.json there): choose another --output_dir"
        )
    config.output_dir.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _results(path: Path) -> dict[int, dict[str, Any]]:
    """Results so far by sample id; failed samples and a line that a kill cut off are dropped."""
    text = path.read_text() if path.exists() else ""
    results = map(json.loads, text[: text.rfind("\n") + 1].splitlines())
    good = {result["sample_id"]: result for result in results if "error" not in result}
    path.write_text("".join(json.dumps(result) + "\n" for result in good.values()))
    return good


@dataclass(frozen=True)
class _Batch:
    """What samples are restored with, and the results so far."""

    restorer: Restorer
    config: RunConfig
    done: dict[int, dict[str, Any]]
    """Results by sample id."""

    def process(self, sample_id: int, source: str, line: bytes) -> dict[str, Any]:
        """One line -> its result, with `error` if it failed."""
        result: dict[str, Any] = {"sample_id": sample_id, "timestamp": _now()}
        try:
            record = parse_record(line, source)
            result |= {key: record.raw.get(key) for key in COPIED}
            return result | self._restore(sample_id, record)
        except (ValueError, RuntimeError, OSError) as error:
            return result | {"error": f"{type(error).__name__}: {error}"}

    def _restore(self, sample_id: int, record: Record) -> dict[str, Any]:
        """Restores, measures and saves; the numbers and the paths of the images."""
        if record.output_image is None:
            raise RecordError(f"{record.source}: output_img is missing: nothing to compare with")
        config, name = self.config, Path(record.input_image)
        degraded = read_image(config.image_root / name)
        truth_file = read_image(config.image_root / record.output_image)
        start = time.perf_counter()
        restored = self.restorer.restore(
            degraded, record.instruction, config.sampling, config.text, config.seed
        )
        seconds = time.perf_counter() - start
        rule, size = self.restorer.task.vae_rule, restored.image.size
        enlarged, truth = references(degraded, truth_file, rule, size)
        compared = {
            "": restored.image,
            "_ceiling": self.restorer.autoencode(truth),
            "_input": enlarged,
        }
        if degraded.size != truth.size:
            compared["_bicubic"] = degraded.resize(truth.size, Image.Resampling.BICUBIC)
        measured: dict[str, Any] = {}
        for kind, image in compared.items():
            measured |= scores(image, truth, kind)
        folder = Path("images", *(p for p in name.parent.parts if p not in ("/", "..")))
        stem = f"{folder}/{name.stem}"
        if any(other.get("pred_img") == f"{stem}_pred.png" for other in self.done.values()):
            stem += f"_{sample_id}"  # another sample restores the same image
        (config.output_dir / folder).mkdir(parents=True, exist_ok=True)
        for kind, image in (("input", degraded), ("GT", truth), ("pred", restored.image)):
            image.save(config.output_dir / f"{stem}_{kind}.png")
        return measured | {
            "saved_input_img": f"{stem}_input.png",
            "saved_output_img": f"{stem}_GT.png",
            "pred_img": f"{stem}_pred.png",
            "understanding_text": restored.assessment,
            "inference_time": seconds,
        }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
