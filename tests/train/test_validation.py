"""Validation against the same numbers computed by hand, on one rank and on two."""

import copy
import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from data.config import load_mixture
from data.images import ImageError, to_image
from data.tokenizer import Tokenizer
from modeling.bagel.bagel import Bagel
from modeling.bagel.context import Context
from modeling.bagel.generation import ImageJob, SamplingConfig, decode_images, sample_latents
from tests.data.test_scans import dataset, written
from tests.helpers import run_arguments, write_mixture, write_pairs
from tests.ranks import run_on_ranks
from train.backends import MOMENTS
from train.build import build_loader, build_trainer
from train.checkpoint import step_folders
from train.ema import EMA
from train.metrics import Metrics
from train.sinks import Sink
from train.trainer import Trainer
from train.validation import ERROR_GAIN, Validation, best, first_pairs, metric_names

LOSSES = {"ssim_loss_weight": 0.5, "ssim_loss_max_t": 1.0, "ce_weight": 0.25}
SEED, TIMES = 11, 3


class Averages:
    """Weights of another size in place of the model's."""

    def __init__(self, model: Bagel) -> None:
        self.model = model

    @contextmanager
    def swapped(self) -> Iterator[None]:
        kept = [p.detach().clone() for p in self.model.language_model.parameters()]
        for parameter in self.model.language_model.parameters():
            parameter.data.mul_(0.7)
        yield
        for parameter, value in zip(self.model.language_model.parameters(), kept, strict=True):
            parameter.data.copy_(value)


class Recorder(Sink):
    def __init__(self) -> None:
        self.values: dict[int, dict[str, float]] = {}
        self.images: dict[tuple[int, str], Image.Image] = {}

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.values[step] = dict(values)

    def image(self, step: int, tag: str, image: Image.Image) -> None:
        self.images[step, tag] = image


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """A mixture of five pairs, the last of another task, and of a set without tasks' names."""
    folder = tmp_path_factory.mktemp("validation")
    path = write_pairs(folder / "named", 5)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for i, record in enumerate(records):
        record["main_task_type"] = "SR x2/4" if i == 4 else "denoise"
    del records[1]["output_img"]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    write_pairs(folder / "unnamed", 3, answers=False)
    return write_mixture(folder / "mixture.yaml", folder / "named", folder / "unnamed")


def trainer_of(checkpoint: Path, mixture: Path, run: Path, **changes: Any) -> Trainer:
    return build_trainer(run_arguments(checkpoint, mixture, run, **(LOSSES | changes)))


def validation_of(trainer: Trainer, mixture: Path, count: int = 4, **changes: Any) -> Validation:
    args = dataclasses.replace(
        trainer.args,
        data=dataclasses.replace(trainer.args.data, data_seed=5, dataset_config_file=str(mixture)),
    )
    tokenizer = Tokenizer(trainer.source)
    packs = build_loader(args, trainer.model, trainer.source)
    packs.rank, packs.world_size = 0, 1
    values: dict[str, Any] = {
        "model": trainer.model,
        "packs": packs,
        "pairs": first_pairs(load_mixture(mixture), tokenizer, count),
        "weights": trainer.weights,
        "run_folder": trainer.run,
        "device": trainer.backend.device,
        "steps": 3,
        "num_timesteps": TIMES,
        "seed": SEED,
    }
    return Validation(**(values | changes))


def test_pairs_are_taken_from_the_tasks_in_turn(checkpoint, tasks):
    pairs = first_pairs(load_mixture(tasks), Tokenizer(checkpoint), 6)
    found = [(pair.task, pair.record.source.rsplit(":", 1)[1]) for pair in pairs]
    expected = [("denoise", "1"), ("SR x2/4", "5"), ("unnamed", "1")]
    assert found == [*expected, ("denoise", "3"), ("unnamed", "2"), ("denoise", "4")]
    assert len(first_pairs(load_mixture(tasks), Tokenizer(checkpoint), 2)) == 2
    assert [len(pair.segments()) for pair in pairs[:3]] == [4, 4, 3]  # without an assessment


def test_pairs_have_one_window(checkpoint, tmp_path):
    lines = write_pairs(tmp_path / "pairs", 1)
    for name, width in (("0_input", 2000), ("0_clean", 1000)):
        ds = dataset(np.arange(256).reshape(16, 16), WindowCenter=width // 2, WindowWidth=width)
        written(ds, tmp_path / "pairs" / "images" / f"{name}.png")
    mixture = load_mixture(write_mixture(tmp_path / "mixture.yaml", tmp_path / "pairs"))
    with pytest.raises(ImageError, match=f"^{lines}:1: window .* scale a pair unequally: state "):
        first_pairs(mixture, Tokenizer(checkpoint), 1)


def test_losses_are_those_of_training_on_the_same_packs(checkpoint, mixture, tmp_path):
    trainer = trainer_of(checkpoint, mixture, tmp_path)
    validation = validation_of(trainer, mixture, count=0)
    packs = list(islice(validation_of(trainer, mixture).packs, 3))
    trainer.model.train()
    terms = [trainer.model(batch) for batch in packs]
    expected = {
        f"val/{name}": sum(t[name].sum.item() for t in terms) / sum(t[name].count for t in terms)
        for name in ("ce", "mse", "ssim")
    }
    expected["val/loss_total"] = (
        0.25 * expected["val/ce"] + expected["val/mse"] + 0.5 * expected["val/ssim"]
    )
    found = validation.run(1, Averages(trainer.model))
    assert found == pytest.approx(expected, rel=1e-6)
    assert validation.run(2, Averages(trainer.model)) == found


def restored_by_hand(model: Bagel, task: Any, degraded: Image.Image, record: Any) -> np.ndarray:
    """Context and sampling spelled out, with guidance and text decoding left out."""
    context = Context(model, task.tokenizer.special)
    context.add_vae_image(task.vae_rule(degraded))
    context.add_vit_image(task.vit_rule(degraded))
    context.add_text(task.tokenizer.encode(record.instruction))
    if record.assessment:
        context.add_text(task.tokenizer.encode(record.assessment))
    width, height = task.vae_rule.size(*degraded.size)
    grid = height // 4, width // 4
    noise = torch.randn(grid[0] * grid[1], 16, generator=torch.Generator().manual_seed(SEED))
    job = ImageJob(context, noise, grid, SamplingConfig(num_timesteps=TIMES))
    return np.asarray(to_image(decode_images(model, sample_latents([job]), [grid])[0]))


@pytest.mark.parametrize("bf16", [False, True])
def test_restorations_are_those_of_the_averages(checkpoint, tasks, tmp_path, bf16):
    trainer, recorder = trainer_of(checkpoint, tasks, tmp_path), Recorder()
    validation = validation_of(trainer, tasks, bf16=bf16)
    averaged = copy.deepcopy(trainer.model)
    for parameter in averaged.language_model.parameters():
        parameter.data.mul_(0.7)
    values = validation.run(7, Averages(trainer.model), [recorder])
    found: dict[str, list[tuple[float, ...]]] = {}
    rows: dict[str, list[list[np.ndarray]]] = {}
    for pair in validation.pairs:
        rule = pair.prompts.vae_rule
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            image = restored_by_hand(averaged, pair.prompts, pair.degraded, pair.record)
        size, truth = rule.size(*pair.degraded.size), np.asarray(to_image(rule(pair.truth)))
        degraded = np.asarray(pair.degraded.resize(size, Image.Resampling.NEAREST))
        numbers = [
            f(truth, x, data_range=255, **more)
            for x in (image, degraded)
            for f, more in (
                (peak_signal_noise_ratio, {}),
                (structural_similarity, {"channel_axis": 2}),
            )
        ]
        found.setdefault(pair.task, []).append(tuple(numbers))
        error = np.minimum(ERROR_GAIN * abs(image.astype(float) - truth), 255).astype(np.uint8)
        rows.setdefault(pair.task, []).append([degraded, image, truth, error])
    assert set(found) == {"denoise", "SR x2/4", "unnamed"}
    everything = [numbers for task in found.values() for numbers in task]
    for task, numbers in {**found, "mean": everything}.items():
        means = np.mean(numbers, axis=0)
        names = (f"val/{name}/{task}" for name in ("psnr", "ssim", "psnr_input", "ssim_input"))
        assert [values[name] for name in names] == pytest.approx(means.tolist(), rel=1e-9)
    for task, name in (("denoise", "denoise"), ("SR x2/4", "SR_x2_4")):
        saved = np.asarray(Image.open(tmp_path / "validation" / f"0000007_{name}.png"))
        height, width = (max(x.shape[i] for row in rows[task] for x in row) for i in (0, 1))
        assert saved.shape == (height * len(rows[task]), width * 4, 3)
        for y, row in enumerate(rows[task]):
            for x, cell in enumerate(row):
                placed = saved[y * height :, x * width :][: cell.shape[0], : cell.shape[1]]
                assert np.array_equal(placed, cell)
        assert np.array_equal(np.asarray(recorder.images[7, f"val/{task}"]), saved)
    assert recorder.values == {7: values}


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """Weights, averages and moments."""
    backend = trainer.backend
    moments = {f"{n}/{k}": backend.moment(n, k) for n in backend.weights for k in MOMENTS}
    averages = {f"average {i}": average for i, average in enumerate(trainer.ema.averages)}
    return trainer.model.state_dict() | averages | moments


def test_training_after_a_validation_is_the_same_to_the_bit(checkpoint, mixture, tmp_path):
    states = []
    for validates in (False, True):
        trainer = trainer_of(checkpoint, mixture, tmp_path / str(validates))
        validation = validation_of(trainer, mixture)
        trainer.model.train()
        trainer.model.vae.eval()
        modes = [module.training for module in trainer.model.modules()]
        batches = iter(trainer.loader)
        with Metrics(tmp_path / f"{validates}.jsonl", 0, 3) as metrics:
            for step in range(3):
                trainer.train_step(batches, metrics)
                if validates:
                    validation.run(step + 1, trainer.ema)
        assert [module.training for module in trainer.model.modules()] == modes
        states.append(state_of(trainer) | {"random": torch.get_rng_state()})
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_line_for_each_validation(checkpoint, mixture, tmp_path):
    """A resumed run replaces what came after its step."""
    trainer = trainer_of(checkpoint, mixture, tmp_path)
    validation = validation_of(trainer, mixture, count=1, steps=1)
    for step in (2, 4, 6, 4):
        values = validation.run(step, Averages(trainer.model))
    lines = [json.loads(x) for x in (tmp_path / "validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4] and lines[1] == {"step": 4} | values


def scaled(trainer: Trainer) -> EMA:
    """Averages of another size than the weights, so that one cannot pass for the other."""
    for average in trainer.ema.averages:
        average.mul_(0.7)
    return trainer.ema


def on_rank(rank: int, checkpoint: Path, tasks: Path, folder: Path) -> dict[str, Any]:
    trainer = trainer_of(checkpoint, tasks, folder)
    calls = []
    trainer.model.register_forward_hook(lambda *_: calls.append("forward"))
    with Metrics(folder / "metrics.jsonl", 0, 9, peak_flops=1e9) as metrics:
        if rank == 0:
            metrics.add("ce", torch.tensor(6.0), 3.0)
        metrics.add("mse", torch.tensor(float(rank)), 1.0)
        metrics.add_totals({"tokens": 10 + rank, "model_flops": 5.0, f"samples/{rank}": 4})
        line = metrics.log(2)
    recorder = Recorder()
    values = validation_of(trainer, tasks).run(3, scaled(trainer), [recorder])
    found = {"line": line, "values": values, "images": len(recorder.images), "calls": len(calls)}
    (folder / "ds.json").write_text('{"zero_optimization": {"stage": 3}}')
    for case, changes in SHARDED.items():
        if "ds_config_file" in changes:
            changes = changes | {"ds_config_file": folder / "ds.json"}
        trainer = trainer_of(checkpoint, tasks, folder / case, **changes)
        validation = validation_of(trainer, tasks, bf16=trainer.backend.autocasts)
        found[case] = validation.run(3, scaled(trainer))
    return found


SHARDED: dict[str, dict[str, Any]] = {
    "grad_op": {"sharding_strategy": "SHARD_GRAD_OP"},
    "zero2": {"backend": "deepspeed"},
    "zero3": {"backend": "deepspeed", "ds_config_file": "stage 3"},
    "bf16": {"bf16": True},
    "bf16_zero2": {"bf16": True, "backend": "deepspeed"},
}


def test_ranks_change_no_number(checkpoint, tasks, tmp_path):
    """Three packs and four images on two ranks; rank 1 writes nothing."""
    trainer, threads = trainer_of(checkpoint, tasks, tmp_path / "one"), torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks have; others round otherwise
    expected = validation_of(trainer, tasks).run(3, scaled(trainer))
    torch.set_num_threads(threads)
    first, second = run_on_ranks(2, on_rank, tmp_path / "two", checkpoint, tasks, tmp_path / "two")
    for found in (first, second):
        assert found["values"] == pytest.approx(expected, rel=1e-5)
        assert found["calls"] == 2  # also on the rank that has one pack
        for case in SHARDED:
            tolerance = {"rel": 0.1, "abs": 0.05} if "bf16" in case else {"rel": 1e-4}
            assert found[case] == pytest.approx(expected, **tolerance), case
    assert [first["images"], second["images"]] == [3, 0]
    (line,) = (tmp_path / "two" / "validation.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 3} | first["values"]
    (line,) = (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()
    line = json.loads(line)
    assert line == {"step": 2} | first["line"]
    assert (line["ce"], line["mse"]) == (2.0, 0.5)
    assert (line["tokens"], line["samples/0"], line["samples/1"]) == (10.5, 2.0, 2.0)
    seconds = 2 * line["step_s"]
    assert line["tokens_per_s"] == pytest.approx(21 / seconds)
    assert line["mfu"] == pytest.approx(10.0 / (seconds * 2e9))
    assert second["line"]["mse"] == 0.5


def test_the_best_step_of_each_metric():
    history = [
        {"step": 1, "val/ssim": 0.5, "val/ssim/a": 0.5, "val/psnr/mean": 20.0},
        {"step": 2, "val/ssim": 0.3, "val/ssim/a": 0.7, "val/psnr/mean": 31.0, "val/ce": 1.0},
        {"step": 3, "val/ssim": 0.3, "val/ssim/a": 0.7, "val/psnr/mean": float("nan")},
        {"step": 4, "val/ssim": 0.9, "val/ssim/a": 0.1, "val/psnr/mean": 30.0, "val/ce": 0.5},
    ]
    names = ["val/ssim", "val/ssim/a", "val/psnr/mean", "val/ce"]
    found = {"val/ssim": 2, "val/ssim/a": 2, "val/psnr/mean": 2, "val/ce": 4}
    assert best(history, names) == found
    among = best(history, names, among=(1, 3))
    assert among == {"val/ssim": 3, "val/ssim/a": 3, "val/psnr/mean": 1}
    assert best([], names) == {}


def test_a_run_validates_and_keeps_its_best_steps(checkpoint, mixture, tmp_path):
    settings = {
        "val_dataset_config_file": mixture,
        "val_every": 1,
        "val_steps": 1,
        "val_images": 2,
        "save_every": 1,
        "max_checkpoints": 1,
        "best_metrics": "val/mse, val/psnr/mean,",
    }
    trainer = trainer_of(checkpoint, mixture, tmp_path / "run", **settings)
    trainer.fit()
    history = [json.loads(x) for x in (trainer.run / "validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in history] == [1, 2, 3, 4]
    kept = {min(history, key=lambda line: line["val/mse"])["step"], 4}
    kept.add(max(history, key=lambda line: line["val/psnr/mean"])["step"])
    assert {int(folder.name) for folder in step_folders(trainer.run)} == kept
    assert len(list((trainer.run / "validation").glob("0000001_*.png"))) == 1


def test_a_best_metric_that_no_validation_has_begins_no_run(checkpoint, tasks, tmp_path):
    """Names may hold blanks: tasks are free text."""
    settings = {"val_dataset_config_file": tasks, "val_every": 1, "val_steps": 1, "val_images": 9}
    trainer = trainer_of(checkpoint, tasks, tmp_path, **settings)
    weights, (pair, *_) = trainer.weights, trainer.validation.pairs
    own = [dataclasses.replace(pair, task="remove noise")]
    names = metric_names("val/ssim_input/remove noise, val/ce,val/loss_total", weights, own)
    assert names == ["val/ssim_input/remove noise", "val/ce", "val/loss_total"]
    for name, near in (
        ("val/psnr/maen", "val/psnr/mean"),
        ("val/pixel", "val/"),  # a loss whose weight is 0
        (f"val/psnr/{pair.task}s", f"val/psnr/{pair.task}"),
        ("mse", "val/mse"),
    ):
        with pytest.raises(ValueError, match=f"best_metrics: validation has no '{name}'; .*{near}"):
            trainer_of(checkpoint, tasks, tmp_path, best_metrics=f"val/mse, {name}", **settings)
