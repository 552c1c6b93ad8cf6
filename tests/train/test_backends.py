"""Single process, FSDP2, DeepSpeed: the same ten steps, and checkpoints each can go on with.

The global batch is that of four packs throughout: ranks times accumulated micro-batches.
"""

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from modeling.bagel.bagel import Bagel
from modeling.pretrained import load_pretrained, open_pretrained, save_pretrained
from tests.helpers import run_arguments, tiny_config
from tests.ranks import run_on_ranks
from train.arguments import TrainingArguments
from train.backends import deepspeed_config, make_backend, mesh_shape
from train.build import build_trainer
from train.distributed import process_group, world_size
from train.optim import apply_freeze_plan

PACKS = 4
SETTINGS: dict[str, Any] = {
    "pixel_loss_weight": 0.5,
    "pixel_loss_max_t": 0.9,
    "ssim_loss_weight": 0.5,
    "ssim_loss_max_t": 0.9,
    "spike_sigma": 6.0,
    "vit_lr": 5e-4,
    "num_workers": 0,
    "total_steps": 10,
    "save_every": 4,
    "eps": 1e-8,
    "max_checkpoints": 9,
}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "fsdp": (2, {"backend": "fsdp", "activation_checkpointing": True}),
    "full": (2, {"backend": "fsdp", "sharding_strategy": "FULL_SHARD", "cpu_offload": True}),
    "grad_op": (2, {"backend": "fsdp", "sharding_strategy": "SHARD_GRAD_OP"}),
    "zero1": (2, {"backend": "deepspeed", "zero_stage": 1}),
    "zero2": (2, {"backend": "deepspeed", "zero_stage": 2, "activation_checkpointing": True}),
    "zero3": (2, {"backend": "deepspeed", "zero_stage": 3}),
    "hsdp": (4, {"backend": "fsdp", "num_replicate": 2}),
    "replicated": (4, {"backend": "fsdp", "sharding_strategy": "NO_SHARD"}),
}
"""Ranks and arguments. Cases of as many ranks share their processes."""


def train(rank: int, checkpoint: Path, mixture: Path, run: Path, **more: Any) -> None:
    """A run of this rank, from the checkpoint or from where `run` stopped."""
    settings = SETTINGS | {"gradient_accumulation_steps": PACKS // world_size()} | more
    build_trainer(run_arguments(checkpoint, mixture, run, **settings)).fit()


def all_cases(rank: int, names: list[str], checkpoint: Path, mixture: Path, runs: Path) -> None:
    for name in names:
        train(rank, checkpoint, mixture, runs / name, **CASES[name][1])


@pytest.fixture(scope="module")
def runs(checkpoint, mixture, tmp_path_factory) -> Path:
    """A run of every case and, as `single`, of one process."""
    folder = tmp_path_factory.mktemp("backends")
    for ranks in (2, 4):
        names = [name for name, (wanted, _) in CASES.items() if wanted == ranks]
        run_on_ranks(ranks, all_cases, folder / f"ranks{ranks}", names, checkpoint, mixture, folder)
    train(0, checkpoint, mixture, folder / "single")
    return folder


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_state(found: Path, expected: Path, tolerance: float = 2e-5) -> None:
    """Weights, averages and moments, each tensor relative to its norm; counters and position."""
    for stem in ("model", "ema", "optimizer"):
        right = load_file(expected / f"{stem}.safetensors")
        ours = load_file(found / f"{stem}.safetensors")
        assert ours.keys() == right.keys()
        for name, tensor in ours.items():
            # Softmax does not see a shift of all keys: the gradient of their bias is rounding.
            if "k_proj.bias" in name or "k_proj_moe_gen.bias" in name:
                continue
            error = (tensor - right[name]).norm() / right[name].norm().clamp(min=1e-6)
            assert error < tolerance, (stem, name, float(error))
    ours, right = (json.loads((f / "trainer_state.json").read_text()) for f in (found, expected))
    for key in ("step", "updates", "loader", "steps_without"):
        assert ours[key] == right[key], key
    assert ours["guard"] == pytest.approx(right["guard"], rel=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_ten_steps_give_the_losses_of_a_single_process(runs, case):
    found, expected = lines(runs / case), lines(runs / "single")
    assert len(found) == 10
    for ours, right in zip(found, expected, strict=True):
        for name in ("ce", "mse", "pixel", "ssim", "total_norm"):
            assert ours[name] == pytest.approx(right[name], rel=1e-5), (name, right["step"])
        for name in ("tokens", "mse_images", "pixel_share", "ce_count", "lr_vit_model"):
            assert ours[name] == pytest.approx(right[name], rel=1e-6), name


@pytest.mark.parametrize("case", CASES)
def test_a_step_folder_does_not_tell_what_has_written_it(runs, case):
    assert_same_state(runs / case / "0000010", runs / "single" / "0000010", 2e-4)
    assert_same_state(runs / case / "0000004", runs / "single" / "0000004", 2e-4)
    files = [{p.name for p in (runs / c / "0000010").iterdir()} for c in (case, "single")]
    assert files[0] == files[1]
    assert load_pretrained(runs / case / "0000010", "ema")[1].share == 1.0


def resumed(rank: int, checkpoint: Path, mixture: Path, run: Path, more: dict[str, Any]) -> None:
    train(rank, checkpoint, mixture, run, **more)


def test_saved_on_two_resumed_on_four_then_on_one_and_by_deepspeed(
    runs, checkpoint, mixture, tmp_path
):
    run = tmp_path / "run"
    shutil.copytree(runs / "fsdp" / "0000004", run / "0000004")
    common = (checkpoint, mixture, run)
    on_four = {"backend": "fsdp", "num_replicate": 2, "total_steps": 6}
    run_on_ranks(4, resumed, tmp_path / "four", *common, on_four)
    assert_same_steps(run, runs / "single", (5, 6))
    train(0, *common, total_steps=8)
    assert_same_state(run / "0000008", runs / "single" / "0000008", 2e-4)
    run_on_ranks(2, resumed, tmp_path / "two", *common, {"backend": "deepspeed", "zero_stage": 3})
    assert_same_state(run / "0000010", runs / "single" / "0000010", 2e-4)
    assert_same_steps(run, runs / "single", range(5, 11))


def assert_same_steps(run: Path, expected: Path, steps: Any) -> None:
    found = {line["step"]: line for line in lines(run)}
    right = {line["step"]: line for line in lines(expected)}
    for step in steps:
        for name in ("ce", "mse", "total_norm"):
            assert found[step][name] == pytest.approx(right[step][name], rel=2e-5), (step, name)
        assert found[step]["tokens"] == right[step]["tokens"]


def plans(rank: int, checkpoint: Path, mixture: Path, run: Path) -> dict[str, set[str]]:
    """Which weights move in a step, for every freeze flag and back end."""
    moved = {}
    backends = ("fsdp", "deepspeed") if world_size() > 1 else ("single",)
    for flag in FLAGS:
        for backend in backends:
            settings = {"backend": backend, "total_steps": 1, "num_workers": 0, flag: True}
            dropout = {f"{kind}_cond_dropout_prob": 0 for kind in ("text", "vae", "vit")}
            folder = run / backend / flag
            args = run_arguments(checkpoint, mixture, folder, **settings, **dropout)
            build_trainer(args).fit()
            before = load_file(checkpoint / "model.safetensors")
            after = load_file(folder / "0000001" / "model.safetensors")
            moved[f"{backend} {flag}"] = {n for n in before if not torch.equal(before[n], after[n])}
    return moved


FLAGS = ("freeze_llm", "freeze_vit", "freeze_und", "freeze_mot_und", "freeze_mot_gen")


def test_every_freeze_flag_moves_the_same_weights_in_each_back_end(checkpoint, mixture, tmp_path):
    """What each flag leaves is asserted in test_optim_ema.py for a single process."""
    single = plans(0, checkpoint, mixture, tmp_path)
    (found, _) = run_on_ranks(2, plans, tmp_path / "ranks", checkpoint, mixture, tmp_path)
    assert len(found) == 2 * len(FLAGS)
    for case, moved in found.items():
        expected = single[f"single {case.split()[1]}"]
        differing = {name for name in moved ^ expected if "k_proj" not in name}
        assert differing == set() and moved, case
    assert len({frozenset(moved) for moved in single.values()}) == len(FLAGS)


FROZEN: dict[str, dict[str, Any]] = {
    "llm": {"freeze_llm": True},
    "lora": {"lora_rank": 3, "activation_checkpointing": True},
}


def two_steps(rank: int, checkpoint: Path, mixture: Path, run: Path) -> None:
    for name, frozen in FROZEN.items():
        for backend in ({"backend": "fsdp"}, {"backend": "deepspeed", "zero_stage": 3}):
            more = {"total_steps": 2} | frozen | backend
            train(rank, checkpoint, mixture, run / f"{name} {backend['backend']}", **more)


def test_zero_3_with_a_frozen_language_model(checkpoint, mixture, tmp_path):
    """Its head is recomputed in backward."""
    run_on_ranks(2, two_steps, tmp_path / "ranks", checkpoint, mixture, tmp_path)
    for name in FROZEN:
        assert_same_steps(tmp_path / f"{name} deepspeed", tmp_path / f"{name} fsdp", (1, 2))


def test_backends_refuse_what_does_not_fit(checkpoint, mixture, tmp_path):
    with (
        process_group(torch.device("cpu"), 60, wanted=True),
        pytest.raises(ValueError, match="num_replicate=2 x num_shard=1 is not the number of"),
    ):
        settings = {"backend": "fsdp", "num_replicate": 2, "num_shard": 1}
        build_trainer(run_arguments(checkpoint, mixture, tmp_path, **settings))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"fp16": {"enabled": True}}, "fp16 is not supported: drop it and set the run's bf16"),
        ({"amp": {"enabled": True}}, "amp is not supported"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1}}}, "optimizer is the run's own (lr,"),
        ({"scheduler": {"params": {"warmup_max_lr": 1}}}, "scheduler is the run's own (lr,"),
        ({"train_batch_size": 8}, "train_batch_size=8 has to be None or left out"),
        ({"gradient_predivide_factor": 4.0}, "gradient_predivide_factor=4.0 has to be 1.0 or left"),
        ({"prescale_gradients": True}, "prescale_gradients=True has to be False or left out"),
        ({"gradient_clipping": 2.0}, "gradient_clipping=2.0 has to be 1.0 or left out"),
        ({"bf16": {"enabled": True}}, "bf16={'enabled': True} has to be {'enabled': False} or"),
        ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage must be 1, 2 or 3"),
    ],
)
def test_a_ds_config_file_is_refused_in_one_line(content, message, tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps(content))
    args = TrainingArguments(backend="deepspeed", ds_config_file=str(tmp_path / "ds.json"))
    with pytest.raises(ValueError) as caught:
        deepspeed_config(args, torch.device("cpu"))
    assert str(caught.value).startswith(f"{tmp_path}/ds.json: {message}")
    assert "\n" not in str(caught.value)


AUTO = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto", "loss_scale": 0},
    "amp": None,
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}},
    "steps_per_print": 2000,
    "zero_optimization": {
        "stage": 2,
        "reduce_bucket_size": "auto",
        "offload_optimizer": {"device": "cpu"},
    },
}
"""As files for other trainers are."""


def test_what_a_ds_config_file_leaves_to_auto_is_the_runs(checkpoint, mixture, tmp_path):
    """With an offloaded optimizer it trains to the loss of a single process."""
    (tmp_path / "ds.json").write_text(json.dumps(AUTO))
    given = {"backend": "deepspeed", "ds_config_file": tmp_path / "ds.json", "total_steps": 2}
    args = run_arguments(checkpoint, mixture, tmp_path / "zero", **given)
    config = deepspeed_config(args.training, torch.device("cpu"))
    assert config["train_batch_size"] is None and config["train_micro_batch_size_per_gpu"] == 1
    assert config["bf16"] == {"enabled": False} and config["gradient_clipping"] == 1.0
    assert "reduce_bucket_size" not in config["zero_optimization"]
    with process_group(torch.device("cpu"), 60, wanted=True):
        build_trainer(args).fit()
    build_trainer(run_arguments(checkpoint, mixture, tmp_path / "single", total_steps=2)).fit()
    found, expected = (lines(tmp_path / name)[-1] for name in ("zero", "single"))
    for name in ("mse", "ce", "total_norm"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_shard": 8}, "num_replicate=1 x num_shard=8 is not the number of processes, 1"),
        ({"num_replicate": 2}, "num_replicate=2 x num_shard=1 is not the number of processes, 1"),
        (
            {"num_shard": 3, "sharding_strategy": "FULL_SHARD"},
            "num_shard=3 is not the number of processes, 1, or not as sharding_strategy=FULL_SHARD",
        ),
        ({"cpu_offload": True}, "cpu_offload=True needs backend=fsdp in a single process"),
    ],
)
def test_one_process_is_not_several(values, message, checkpoint, mixture, tmp_path):
    with pytest.raises(ValueError, match=message):
        build_trainer(run_arguments(checkpoint, mixture, tmp_path, **values))


def test_a_strategy_makes_the_mesh_that_was_asked_for():
    def shape(strategy: str, replicate: int | None, shard: int | None) -> tuple[int, int]:
        sizes = {"num_replicate": replicate, "num_shard": shard}
        return mesh_shape(TrainingArguments(sharding_strategy=strategy, **sizes), 8)

    assert shape("FULL_SHARD", 1, 8) == shape("SHARD_GRAD_OP", None, 8) == (1, 8)
    assert shape("NO_SHARD", 8, 1) == shape("NO_SHARD", None, None) == (8, 1)
    for strategy, replicate, shard, asked in (
        ("FULL_SHARD", None, 3, "1 x num_shard=3"),
        ("FULL_SHARD", 2, 4, "2 x num_shard=4"),
        ("NO_SHARD", 1, 8, "1 x num_shard=8"),
    ):
        message = f"num_replicate={asked} is not the number of processes, 8, or not as "
        with pytest.raises(ValueError, match=f"{message}sharding_strategy={strategy} divides them"):
            shape(strategy, replicate, shard)


@pytest.mark.parametrize(
    ("replicate", "shard", "expected"),
    [(None, None, (2, 4)), (4, None, (4, 2)), (None, 2, (4, 2)), (1, None, (1, 8)), (2, 4, (2, 4))],
)
def test_a_group_is_a_node_unless_its_size_is_given(replicate, shard, expected, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    args = TrainingArguments(num_replicate=replicate, num_shard=shard)
    assert mesh_shape(args, 8) == expected
    assert mesh_shape(TrainingArguments(sharding_strategy="FULL_SHARD"), 8) == (1, 8)
    assert mesh_shape(TrainingArguments(backend="deepspeed"), 8) == (1, 8)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert mesh_shape(TrainingArguments(), 8) == (1, 8)


def anonymous_bytes() -> int:
    """Memory of this process that is not a mapped file."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in x)
    return 1024 * int(line.split()[1])


def loading(rank: int, folder: Path) -> tuple[int, int]:
    """Bytes of the model, and the most that loading it has added to this process."""
    model, tensors, _ = open_pretrained(folder, "model")
    before, most, ended = anonymous_bytes(), 0, threading.Event()

    def sample() -> None:
        nonlocal most
        while not ended.wait(0.002):
            most = max(most, anonymous_bytes() - before)

    watch = threading.Thread(target=sample)
    watch.start()
    args = TrainingArguments(backend="fsdp", freeze_llm=True)
    apply_freeze_plan(model, args)
    backend = make_backend(model, tensors, args, torch.device("cpu"))
    ended.set()
    watch.join()
    return sum(backend.sizes.values()), most


def test_loading_takes_the_memory_of_a_shard(tmp_path):
    """Files are mapped and each rank copies its part: no rank ever holds the model."""
    config = tiny_config({"vocab_size": 20_000, "hidden_size": 768, "intermediate_size": 3072})
    model = Bagel(config)
    save_pretrained(model, tmp_path / "c", {"model": model.state_dict()})
    del model
    for size, most in run_on_ranks(2, loading, tmp_path / "ranks", tmp_path / "c"):
        assert size > 2.5e8
        assert most < 0.6 * size
