"""Validation during a run: losses on fixed packs, restorations of a few fixed pairs.

Nothing that training draws from or steps on is touched, so a run with validation trains to the
same bits as one without. The numbers do not depend on the number of ranks.
"""

import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from data.config import GroupConfig, nearest
from data.files import Place
from data.images import to_image
from data.packer import Segment, TextSegment
from data.records import Record
from data.scores import PSNR_OF_EQUAL_IMAGES, references, scores
from data.sources import good_records
from data.tasks import RestorationTask, filled, open_pair
from data.tokenizer import Tokenizer
from modeling.bagel.bagel import Bagel
from modeling.bagel.context import Context
from modeling.bagel.generation import ImageJob, SamplingConfig, generate_images
from modeling.batch import PackedBatch, SpecialTokens

from .distributed import all_gather, rank, world_size
from .ema import EMA
from .metrics import append_line, drop_lines_after, optional
from .sinks import Sink, hand_on

ERROR_GAIN = 4
"""Brightness of the error in previews over its size in the image."""
HIGHER_IS_BETTER = ("val/psnr/", "val/ssim/")
"""Beginnings of the names of image scores; of all others (losses) lower is better."""
SEARCHED = 10_000
"""Records of a data set among which the pairs are looked for."""


@dataclass(frozen=True)
class Pair:
    """A degraded and a true image to restore from and to compare with."""

    task: str
    prompts: RestorationTask
    record: Record
    degraded: Image.Image
    truth: Image.Image

    def segments(self) -> list[Segment]:
        """Everything before the clean image, the record's own assessment included.

        A decoded assessment would differ in length between ranks that must run in step.
        """
        segments = self.prompts.context(self.degraded, self.record.instruction)
        if self.record.assessment:
            ids = self.prompts.tokenizer.encode(self.record.assessment)
            segments.append(TextSegment(ids=ids))
        return segments


def first_pairs(mixture: Sequence[GroupConfig], tokenizer: Tokenizer, count: int) -> list[Pair]:
    """The first records with a true image, taken from the tasks in turn: `count` in all.

    A task is a record's `main_task_type`, without one its data set. Groups of other tasks than
    restoration have no pairs.
    """
    found: dict[str, list[tuple[Record, Place, RestorationTask]]] = defaultdict(list)
    for group in mixture:
        prompts = group.make_task(tokenizer)
        if not isinstance(prompts, RestorationTask):
            continue
        for dataset in group.datasets:
            for record in islice(good_records(group.open_records(dataset)), SEARCHED):
                task = str(record.raw.get("main_task_type") or dataset.name)
                if len(found[task]) < count:
                    found[task].append((record, dataset.data_dir, prompts))
    in_turn = chain.from_iterable(zip_longest(*([(t, *x) for x in f] for t, f in found.items())))
    return [
        Pair(task, prompts, record, *open_pair(record, folder))
        for task, record, folder, prompts in islice(filter(None, in_turn), count)
    ]


@dataclass(frozen=True)
class _Restored:
    images: tuple[Image.Image, ...]
    """A row of the preview: input, restored, truth, error."""
    scores: dict[str, float]


@dataclass
class Validation:
    """`run` validates the model as it is; every rank has to call it."""

    model: Bagel
    packs: Iterable[PackedBatch]
    """The same on every rank; the first `steps` are kept by the ranks that use them."""
    pairs: Sequence[Pair]
    """The same on every rank."""
    weights: Mapping[str, float]
    """Of every loss term."""
    run_folder: Path
    device: torch.device
    steps: int
    num_timesteps: int
    """As in SamplingConfig; there is no guidance."""
    seed: int
    """Of every restoration's noise."""
    bf16: bool = False
    """Autocast, as in training."""
    best_metrics: Sequence[str] = ()
    """Whose best steps are kept."""

    def run(self, step: int, ema: EMA, sinks: Sequence[Sink] = ()) -> dict[str, float]:
        """`val/<term>` of the weights; `val/psnr/<task>`, `val/ssim/<task>` of the averages.

        With `psnr_input` and `ssim_input`, those of the degraded image, and task `mean`, over all
        images. Rank 0 writes the line of validation.jsonl and a preview of each task.
        """
        with self._undisturbed():
            values = self._losses()
            with ema.swapped():
                # Every rank restores all: they may share the weights of one model.
                restored = [self._restore(pair) for pair in self.pairs]
        by_task: dict[str, list[_Restored]] = defaultdict(list)
        for pair, result in zip(self.pairs, restored, strict=True):
            by_task[pair.task].append(result)
        for task, results in {"mean": restored, **by_task}.items():
            for name in results[0].scores if results else ():
                of_all = [result.scores[name] for result in results]
                # Equal images have no PSNR that a mean could take.
                of_all = [score for score in of_all if score != PSNR_OF_EQUAL_IMAGES]
                if of_all:
                    values[f"val/{name}/{task}"] = sum(of_all) / len(of_all)
        if rank() == 0:
            self._write(step, values, by_task, sinks)
        return values

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Evaluation mode without gradients; modes and random states are put back."""
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        devices = [self.device] if self.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices), torch.no_grad():
                yield
        finally:
            for module, training in modes:
                module.training = training

    def _autocast(self) -> torch.autocast:
        # One for each use: within one context, copies of weights outlive a change of the weights.
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    @cached_property
    def _own_packs(self) -> list[tuple[int | None, PackedBatch]]:
        """Packs of this rank with their places, as many on every rank.

        A rank that has one less repeats the first pack, in no place: ranks that shard a model
        have to run it equally often.
        """
        own: list[tuple[int | None, PackedBatch]] = []
        spare: list[tuple[int | None, PackedBatch]] = []
        for place, pack in enumerate(islice(self.packs, self.steps)):
            if place == 0:
                spare = [(None, pack)]
            if place % world_size() == rank():
                own.append((place, pack))
        return own + spare * (math.ceil(self.steps / world_size()) - len(own))

    def _losses(self) -> dict[str, float]:
        own: dict[int, dict[str, tuple[float, float]]] = {}
        for place, batch in self._own_packs:
            with self._autocast():
                terms = self.model(batch.to(self.device), complete=True)
            if place is not None:
                own[place] = {name: (float(t.sum), t.count) for name, t in terms.items()}
        sums: dict[str, float] = defaultdict(float)
        counts: dict[str, float] = defaultdict(float)
        # In the order of the packs, whoever had them: sums of floats depend on it.
        for _, found in sorted(chain.from_iterable(o.items() for o in all_gather(own))):
            for name, (total, count) in found.items():
                sums[name] += total
                counts[name] += count
        losses = {name: total / counts[name] for name, total in sums.items() if counts[name] > 0}
        total = sum(self.weights[name] * loss for name, loss in losses.items())
        return {f"val/{name}": loss for name, loss in losses.items()} | {"val/loss_total": total}

    def _restore(self, pair: Pair) -> _Restored:
        rule, special = pair.prompts.vae_rule, pair.prompts.tokenizer.special
        size = rule.size(*pair.truth.size)  # as the target is trained
        sampling = SamplingConfig(num_timesteps=self.num_timesteps)
        with self._autocast():
            image = self.model.call(_generate, special, pair.segments(), size, sampling, self.seed)
        degraded, truth = references(pair.degraded, pair.truth, rule, size)
        found = scores(image, truth) | scores(degraded, truth, "_input")
        return _Restored((degraded, image, truth, _error(image, truth)), found)

    def _write(
        self,
        step: int,
        values: Mapping[str, float],
        by_task: Mapping[str, list[_Restored]],
        sinks: Sequence[Sink],
    ) -> None:
        path, folder = self.run_folder / "validation.jsonl", self.run_folder / "validation"
        with optional(path, step):
            drop_lines_after(path, step - 1)
            append_line(path, step, values)
        hand_on(sinks, "scalars", step, values)
        for task, results in by_task.items():
            preview = _preview([result.images for result in results])
            name = re.sub(r"[^\w-]+", "_", task)
            with optional(folder, step):
                folder.mkdir(parents=True, exist_ok=True)
                preview.save(folder / f"{step:07d}_{name}.png")
            hand_on(sinks, "image", step, f"val/{task}", preview)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        print(f"validation at step {step}  {shown}", flush=True)


def _generate(
    model: Bagel,
    special: SpecialTokens,
    segments: list[Segment],
    size: tuple[int, int],
    sampling: SamplingConfig,
    seed: int,
) -> Image.Image:
    context = filled(Context(model, special), segments)
    generator = torch.Generator().manual_seed(seed)
    (image,) = generate_images([ImageJob.of_size(context, size, sampling, generator)])
    return to_image(image)


def _error(image: Image.Image, truth: Image.Image) -> Image.Image:
    difference = np.asarray(image, dtype=np.int16) - np.asarray(truth, dtype=np.int16)
    return Image.fromarray((ERROR_GAIN * abs(difference)).clip(0, 255).astype(np.uint8))


def _preview(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Rows of images on one canvas, every cell as large as the largest image."""
    width, height = (max(sides) for sides in zip(*(i.size for r in rows for i in r), strict=True))
    canvas = Image.new("RGB", (width * len(rows[0]), height * len(rows)))
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            canvas.paste(image, (x * width, y * height))
    return canvas


def metric_names(text: str, weights: Iterable[str], pairs: Iterable[Pair]) -> list[str]:
    """The metrics that `best_metrics` names. Raises ValueError for one that a validation of these
    terms and pairs does not have."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    kinds = ("psnr", "ssim", "psnr_input", "ssim_input")
    tasks = {task for pair in pairs for task in (pair.task, "mean")}
    known = {f"val/{name}" for name in (*weights, "loss_total")}
    known |= {f"val/{kind}/{task}" for kind in kinds for task in tasks}
    for name in names:
        if name not in known:
            raise ValueError(f"best_metrics: validation has no {name!r}; {nearest(name, known)}")
    return names


def best(
    history: Iterable[Mapping[str, Any]], names: Iterable[str], among: Collection[int] | None = None
) -> dict[str, int]:
    """The step with the best finite value of each metric, the first of equals.

    `history` are the lines of validation.jsonl, `among` the steps that are allowed (None: all).
    Metrics without any such step are absent.
    """
    lines, steps = list(history), dict[str, int]()
    for name in names:
        sign = -1 if name.startswith(HIGHER_IS_BETTER) else 1
        found = [
            (sign * line[name], line["step"])
            for line in lines
            if math.isfinite(line.get(name, math.nan)) and (among is None or line["step"] in among)
        ]
        if found:
            steps[name] = min(found)[1]
    return steps
