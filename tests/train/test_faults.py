"""Faults that are put into whole runs, and what each of them may cost."""

import contextlib
import hashlib
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from modeling.pretrained import CheckpointError, DamagedError, write_manifest
from tests import faulty
from tests.faulty import Fault, ended, start
from tests.helpers import run_arguments
from train.backends import Backend
from train.build import build_trainer, resume_folder
from train.checkpoint import step_folders, verify
from train.distributed import STOP_EXIT_CODE, STOP_SIGNALS, HangWatch
from train.guard import Guard
from train.trainer import Trainer

KILLED = -signal.SIGKILL
STEPS = 4
EVERY_STEP: dict[str, Any] = {"total_steps": STEPS, "save_every": 1, "max_checkpoints": STEPS}
TENSORS = ("model.safetensors", "ema.safetensors", "optimizer.safetensors")
SAVED = (*TENSORS, "trainer_state.json")
SECRETS = {"WANDB_API_KEY": "k3y-of-wandb", "HF_TOKEN": "t0ken-of-hub", "MY_SECRET": "s3cret"}

Common = tuple[Path, Path]


@pytest.fixture(scope="module")
def common(checkpoint, mixture) -> Common:
    return checkpoint, mixture


@pytest.fixture(scope="module")
def finished(common, tmp_path_factory) -> Path:
    """An uninterrupted run, saved at every step, with secrets in its environment."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    note = partial(faulty.told_samples, folder.parent)
    more = {"environment": SECRETS, "enable_tensorboard": True, **EVERY_STEP}
    codes, texts = ended(common, folder, note, **more)
    assert codes == [0], texts
    return folder


def hashes(folder: Path, names: tuple[str, ...] = SAVED) -> dict[str, str]:
    return {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in names}


def names(run: Path) -> list[int]:
    return [int(folder.name) for folder in step_folders(run)]


def hidden(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir() if path.name.startswith("."))


def lines(run: Path) -> list[dict[str, float]]:
    """One per step, whichever ranks have written it."""
    found = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return list({line["step"]: line for line in found}.values())


def assert_good(run: Path, finished: Path) -> None:
    """Every step folder of `run` is whole and has the bits of the uninterrupted run."""
    for folder in step_folders(run):
        verify(folder)
        assert hashes(folder) == hashes(finished / folder.name), folder


def copied(finished: Path, run: Path, last: int, first: int = 1) -> Path:
    """A run folder as it was after step `last`, with the step folders from `first` on."""
    for step in range(first, last + 1):
        shutil.copytree(finished / f"{step:07d}", run / f"{step:07d}")
    return run


def test_a_kill_at_any_stage_of_a_save_costs_one_step(finished, common, tmp_path):
    """Each run is also the resumption of the one before."""
    told, keep = tmp_path / "stages", {**EVERY_STEP, "max_checkpoints": 1}
    run = copied(finished, tmp_path / "all", 2, 2)
    assert ended(common, run, partial(faulty.killed_in_save, 3, 0, told), **keep)[0] == [0]
    assert names(run) == [4] and hidden(run) == []
    assert_good(run, finished)
    *stages, _ = told.read_text().splitlines()
    final = stages.index("os.rename .saving-0000003")
    assert {"half written .safetensors", "os.rename .tmp", "os.rename 0000002"} <= set(stages)

    chains = [copied(finished, tmp_path / f"from{i}", 2, 2) for i in range(2)]
    for first in range(0, len(stages), 2):
        two = [(chains[i % 2], i) for i in range(first, min(first + 2, len(stages)))]
        started = [
            start(common, run, partial(faulty.killed_in_save, 3, stage + 1), **keep)
            for run, stage in two
        ]
        for (run, stage), process in zip(two, started, strict=True):
            assert process.codes() == [KILLED], stages[stage]
            assert names(run)[-1] == (2 if stage <= final else 3), stages[stage]
            assert len(hidden(run)) <= 2
            assert_good(run, finished)
            if stage > final:
                copied(finished, shutil.rmtree(run) or run, 2, 2)
    for run in chains:
        assert ended(common, run, **keep)[0] == [0]
        assert names(run) == [4] and hidden(run) == []
        assert_good(run, finished)


def test_twenty_kills_at_random_moments_change_no_bit(finished, common, tmp_path):
    """With and without processes that load the data."""
    rng, kills, runs = random.Random(0), 0, 0
    note = partial(faulty.told_samples, tmp_path)
    while kills < 20:
        run = tmp_path / f"run{runs}"
        fault = partial(faulty.killed_after, rng.uniform(0.0, 0.6))
        (code,), texts = ended(common, run, fault, note, num_workers=kills % 2, **EVERY_STEP)
        assert code in (0, KILLED), texts
        kills += code == KILLED
        assert_good(run, finished)
        runs += code == 0
    assert ended(common, run, note, **EVERY_STEP)[0] == [0]
    assert names(run) == list(range(1, STEPS + 1))
    assert_good(run, finished)
    until(lambda: not any(writers(log) for log in tmp_path.glob("*.txt")))
    expected = faulty.samples(finished.parent)
    assert faulty.samples(tmp_path) == expected and len(expected) == STEPS


def flip(path: Path) -> None:
    """One bit in the middle of a tensor file."""
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


DAMAGES: dict[str, tuple] = {
    "bits": tuple((flip, name) for name in reversed(TENSORS)),
    "ends": ((cut, "model.safetensors"), (cut, "manifest.json"), (cut, "trainer_state.json")),
}


@pytest.mark.parametrize("damages", DAMAGES.values(), ids=DAMAGES)
def test_damaged_steps_are_named_and_passed_over(finished, common, tmp_path, damages):
    """One bit or the end of a file is missing in each of the three newest steps."""
    run = copied(finished, tmp_path / "run", STEPS)
    for step, (damage, name) in enumerate(damages, 2):
        damage(run / f"{step:07d}" / name)
        with pytest.raises(DamagedError, match=rf"0*{step}/{name}"):
            resume_folder(
                run_arguments(*common, tmp_path / "other", resume_from=run / f"{step:07d}").training
            )
    codes, (text,) = ended(common, run, **EVERY_STEP)
    assert codes == [0], text
    warnings = [line for line in text.splitlines() if "trying the step before" in line]
    assert len(warnings) == 3
    for warning, (damage, name), step in zip(warnings, reversed(damages), (4, 3, 2), strict=True):
        path = run / f"{step:07d}" / name
        said = f"WARNING: {path} is damaged: sha256 "
        if name == "manifest.json":
            said = f"WARNING: {path}: no JSON"
        elif damage is flip:
            right = hashes(finished / path.parent.name, (name,))[name]
            assert f"manifest.json says {right}" in warning
        assert warning.startswith(said)
    assert f"resumed from {run}/0000001 at step 1" in text
    assert_good(run, finished)
    shutil.copyfile(run / "0000002" / "ema.safetensors", run / "0000003" / "ema.safetensors")
    words = {"resume_from": run / "0000003", "total_steps": STEPS}
    codes, (text,) = ended(common, tmp_path / "other", **words)
    assert codes == [1]
    assert f"error: {run}/0000003/ema.safetensors is damaged: sha256 " in text


def without(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t for n, t in tensors.items() if n != name}


def deeper(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """With a further layer of the ViT."""
    last = [(n, t) for n, t in tensors.items() if ".encoder.layers.1." in n]
    return tensors | {n.replace(".layers.1.", ".layers.24."): t.clone() for n, t in last}


MISFITS: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], dict, str]] = {
    "one missing": (
        partial(without, "llm2vae.weight"),
        {},
        r"\((\d+) of \d+ tensors fit\):\n  missing llm2vae.weight \(.*--latent_patch_size",
    ),
    "deeper ViT": (deeper, {}, r"unexpected vit_model.*layers\.24\..*--vit_select_layer"),
    "other grid": (
        dict,
        {"max_latent_size": 4},
        r"misshapen latent_pos_embed.*checkpoint \(64, 32\), model \(16, 32\).*max_latent_size",
    ),
}


@pytest.mark.parametrize(("change", "arguments", "said"), MISFITS.values(), ids=MISFITS)
def test_weights_that_do_not_fit_begin_no_run(common, tmp_path, change, arguments, said):
    folder = shutil.copytree(common[0], tmp_path / "weights")
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")
    write_manifest(folder)
    with pytest.raises(CheckpointError, match=said):
        build_trainer(run_arguments(folder, common[1], tmp_path / "run", **arguments))
    assert not (tmp_path / "run").exists()


class Payload:
    """Unpickling it writes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return Path.touch, (self.trace,)


def test_no_pickle_is_ever_executed(finished, checkpoint, mixture, tmp_path):
    trace = tmp_path / "trace"
    bomb = pickle.dumps(Payload(trace))
    pickle.loads(bomb)
    assert trace.exists(), "the pickle is harmless"
    trace.unlink()
    run = copied(finished, tmp_path / "run", 1)
    for name in ("optimizer.pt", "model.bin", "pytorch_model.bin", "trainer_state.pkl"):
        (run / "0000001" / name).write_bytes(bomb)
    trainer = build_trainer(run_arguments(checkpoint, mixture, run, **EVERY_STEP))
    assert trainer.step == 1
    for name in (*TENSORS, "ae.safetensors"):
        (folder := tmp_path / name).mkdir()
        copied(finished, folder, 1)
        (folder / "0000001" / name).write_bytes(bomb)
        write_manifest(folder / "0000001")
        with pytest.raises(CheckpointError, match=rf"{name}: unreadable"):
            build_trainer(run_arguments(checkpoint, mixture, folder, **EVERY_STEP))
    weights = shutil.copytree(checkpoint, tmp_path / "weights")
    (weights / "model.safetensors").rename(weights / "model.bin")
    (weights / "model.bin").write_bytes(bomb)
    (weights / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"model.safetensors not found; there is .*model.bin"):
        build_trainer(run_arguments(weights, mixture, tmp_path / "new"))
    assert not trace.exists()


def test_a_full_disk_stops_saving_and_not_training(finished, common, tmp_path):
    run = copied(finished, tmp_path / "run", 1)
    fault = partial(faulty.full_disk, 1, 3)
    codes, (text,) = ended(common, run, fault, max_save_failures=9, **EVERY_STEP)
    assert codes == [0], text
    warnings = [line for line in text.splitlines() if line.startswith("WARNING: saving has failed")]
    assert len(warnings) >= 1 and "training goes on and tries again" in warnings[0]
    assert "File too large" in warnings[0]
    assert {1, STEPS} <= set(names(run)) <= {1, 3, STEPS} and hidden(run) == []
    assert [line["step"] for line in lines(run)] == [2, 3, 4]
    assert_good(run, finished)


FAILURES: dict[str, tuple[Fault, int, str]] = {
    "full disk": (
        partial(faulty.full_disk, 0, 99),
        2,
        r"failed 2 time\(s\) in a row: .*File too large.*\(max_save_failures=2\)",
    ),
    "an error": (
        partial(faulty.failing_writes, ValueError("no such layout"), 1),
        1,
        r"failed 1 time\(s\) in a row: .*no such layout",
    ),
    "a mistake": (
        partial(faulty.failing_writes, KeyError("lost"), 1),
        1,
        r"failed 1 time\(s\) in a row: .*the writing thread has died",
    ),
}


@pytest.mark.parametrize(("fault", "most", "said"), FAILURES.values(), ids=FAILURES)
def test_a_save_that_fails_ends_the_run_on_all_ranks(finished, common, tmp_path, fault, most, said):
    """The mistake of one rank at once, a full disk when it has failed too often."""
    run = copied(finished, tmp_path / "run", 1)
    more = {"ranks": 2, "max_save_failures": 2, "save_every": 1, "max_checkpoints": 1}
    codes, texts = ended(common, run, fault, total_steps=20, **more)
    assert codes == [1, 1], texts
    for text in texts:
        assert re.search(f"error: saving has {said}", text), text
    assert sum("tries again" in text for text in texts) == most - 1
    assert names(run) == [1]
    assert 1 <= len(lines(run)) <= 5
    assert_good(run, finished)


def test_a_folder_belongs_to_one_run(common, tmp_path):
    """Until it is killed, even if a process that it had started lives on."""
    run = tmp_path / "run"
    waits = partial(faulty.at, 1, partial(faulty.leaves_a_child_and_sleeps, tmp_path / "child"))
    first = start(common, run, waits, **EVERY_STEP)
    until((tmp_path / "child").exists)
    codes, (text,) = ended(common, tmp_path / "run", log="second", **EVERY_STEP)
    assert codes == [1]
    owner = f"{socket.gethostname()} pid {first.processes[0].pid}"
    assert f"error: {run} is in use by another run: {owner}" in text
    first.processes[0].kill()
    assert first.codes() == [KILLED]
    try:
        assert ended(common, run, total_steps=2)[0] == [0]
    finally:
        os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)


def test_no_secret_of_the_environment_is_written(finished):
    files = [path for path in finished.parent.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"run.0.txt", "metrics.jsonl", "training_args.json"}
    for path in files:
        content = path.read_bytes()
        assert not [name for name, value in SECRETS.items() if value.encode() in content], path


def writers(log: Path) -> list[str]:
    """Processes, also workers of a killed run, that still write there."""
    found = []
    for output in Path("/proc").glob("[0-9]*/fd/1"):
        with contextlib.suppress(OSError):
            found += [output.parts[2]] if output.readlink() == log else []
    return found


def until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + faulty.PATIENCE
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("backend", ["fsdp", "deepspeed"])
def test_nan_on_one_rank_skips_the_step_on_all_and_three_end_the_run(common, tmp_path, backend):
    """Found at a log step. Steps are told as in the log, from 1; the fault counts from 0."""
    fault = partial(faulty.spoiled_steps, {1, 3, 4, 5}, 1)
    more = {"log_every": 2, "max_nonfinite_steps": 3, "save_every": 1, "max_checkpoints": 9}
    more |= {"backend": backend, "environment": {"DS_BUILD_OPS": "0"}}
    run = tmp_path / "run"
    codes, texts = ended(common, run, fault, ranks=2, total_steps=9, **more)
    assert codes == [1, 1], texts
    assert names(run)[:4] == [1, 2, 3, 4]
    bits = {step: hashes(run / f"{step:07d}", TENSORS) for step in (1, 2, 3, 4)}
    assert bits[2] == bits[1] and bits[4] == bits[3]
    assert all(bits[3][name] != bits[2][name] for name in TENSORS)
    assert lines(run)[0]["nonfinite_steps"] == 1 and lines(run)[0]["spikes"] == 0
    assert len(lines(run)) == 2
    warned = next(line for line in texts[0].splitlines() if "not finite, skipped" in line)
    guilty = r"step {0}, rank 1: gradient norm, .*mse.* \(images .*train.jsonl:\d+\)"
    assert warned.startswith("WARNING: ") and re.search(guilty.format(2), warned)
    assert not re.search(r"rank 0: .*mse[^)]*\(", warned.split("step 2, rank 1")[0])
    for text in texts:
        (last,) = [line for line in text.splitlines() if line.startswith("error: ")]
        assert re.search(guilty.format(5), last) and re.search(guilty.format(6), last)
        assert "max_nonfinite_steps=3 in a row" in last


def test_a_spike_of_the_gradient_is_skipped_and_counted(common, tmp_path, monkeypatch):
    spikes = {12, 15}
    same: dict[int, bool] = {}
    args = run_arguments(
        *common, tmp_path, total_steps=18, spike_sigma=6, spike_warmup_steps=10, num_workers=0
    )
    trainer = build_trainer(args)
    clip, step = Backend.clip, Trainer.train_step

    def larger(self: Backend, max_norm: float) -> Tensor:
        if trainer.step in spikes:
            torch._foreach_mul_([w.grad for w in self.weights.values() if w.grad is not None], 100)
        return clip(self, max_norm)

    def state() -> list[Tensor]:
        moments = [trainer.backend.optimizer.state[m] for m in trainer.backend.masters]
        tensors = [*trainer.backend.masters, *trainer.ema.averages]
        return [t.clone() for t in [*tensors, *(v for m in moments for v in m.values())]]

    def compared(self: Trainer, *more: Any) -> None:
        old = state()
        step(self, *more)
        same[self.step] = all(map(torch.equal, old, state()))

    monkeypatch.setattr(Backend, "clip", larger)
    monkeypatch.setattr(Trainer, "train_step", compared)
    trainer.fit()
    assert {step for step, unchanged in same.items() if unchanged} == spikes
    assert [line["spikes"] for line in lines(tmp_path)] == [0] * 12 + [1] * 3 + [2] * 3
    usual = [line["total_norm"] for i, line in enumerate(lines(tmp_path)) if i not in spikes]
    assert min(lines(tmp_path)[i]["total_norm"] for i in spikes) > 10 * max(usual)


@pytest.mark.parametrize("warmup", [0, 20])
def test_norms_that_stay_high_are_no_spikes_for_ever(warmup):
    guard = Guard(1, 6.0, warmup, torch.device("cpu"))
    norms = [1 + 0.1 * math.sin(step) for step in range(60)] + [50.0] + [100.0] * 60
    skipped = [
        guard.judge(step, torch.tensor(norm), [], []).item() for step, norm in enumerate(norms)
    ]
    assert sum(skipped[20:60]) == 0 and skipped[60] == skipped[61] == 1
    assert sum(skipped[90:]) == 0
    assert guard.end_window()["spikes"] == sum(skipped) < 40


def test_a_rank_that_sleeps_ends_the_run_with_all_stacks(common, tmp_path):
    fault = partial(faulty.at, 1, partial(time.sleep, 60), 1)
    codes, texts = ended(common, tmp_path / "run", fault, ranks=2, hang_timeout=8)
    assert codes == [1, 1], texts
    for text in texts:
        assert "Timeout (0:00:08)!" in text and "most recent call first" in text
        assert "in fit" in text
    assert "sum_over_ranks" in texts[0] and "sum_over_ranks" not in texts[1]


def test_the_watchs_variable_is_named_when_it_is_no_number(monkeypatch):
    for stated, seconds in (("2e1", 20), ("", 5), ("inf", math.inf)):
        monkeypatch.setenv("TRAIN_HANG_WATCHDOG_SECS", stated)
        with HangWatch(5) as watch:
            assert watch.timeout == seconds and watch.watching == (seconds < math.inf)
    monkeypatch.setenv("TRAIN_HANG_WATCHDOG_SECS", "30min")
    with pytest.raises(ValueError, match="TRAIN_HANG_WATCHDOG_SECS='30min' is no number"):
        HangWatch(5)


def drawn(folder: Path) -> list[str]:
    """Samples of all steps and ranks."""
    return sorted(n for step in faulty.samples(folder).values() for names in step for n in names)


STREAM = ("ab", "t", "Cd", "aE")
RESHARDED: dict[str, Any] = {"total_steps": STEPS, "save_every": STEPS, "eps": 1e-6}


def test_other_numbers_of_ranks_continue_the_same_run(common, tmp_path):
    """2 ranks until SIGTERM on one of them, 4 until SIGUSR1, then a single process."""
    stream = partial(faulty.packs_by_number, STREAM)
    alone = {**RESHARDED, "gradient_accumulation_steps": len(STREAM)}
    for name in ("whole", "run"):
        (tmp_path / name).mkdir()
    note = partial(faulty.told_samples, tmp_path / "whole")
    assert ended(common, tmp_path / "whole" / "run", stream, note, **alone)[0] == [0]
    run, note = tmp_path / "run" / "run", partial(faulty.told_samples, tmp_path / "run")
    for ranks, last, number in ((2, 1, signal.SIGTERM), (4, 2, signal.SIGUSR1)):
        stop = partial(faulty.at, last, partial(faulty.signalled, number), ranks - 1)
        more = {**RESHARDED, "gradient_accumulation_steps": len(STREAM) // ranks}
        codes, texts = ended(common, run, stream, stop, note, ranks=ranks, **more)
        assert codes == [STOP_EXIT_CODE] * ranks, texts
        assert all(f"a signal came; saved at step {last + 1}" in text for text in texts)
        assert names(run)[-1] == last + 1
    codes, texts = ended(common, run, stream, note, **alone)
    assert codes == [0], texts
    for name in TENSORS:
        found, right = (
            load_file(f / "run" / "0000004" / name) for f in (run.parent, tmp_path / "whole")
        )
        assert found.keys() == right.keys()
        for key, value in right.items():
            torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-5, msg=key)
    assert drawn(run.parent) == drawn(tmp_path / "whole")
    assert len(drawn(run.parent)) == len(set(drawn(run.parent))) == STEPS * len("abCdaE")
    assert [line["step"] for line in lines(run)] == [1, 2, 3, 4]


def test_a_rank_that_is_killed_in_its_part_of_a_save(common, tmp_path):
    """The other one ends too; resumed on as many ranks, the run has the bits of one on its own."""
    stream = partial(faulty.packs_by_number, STREAM)
    more: dict[str, Any] = {**EVERY_STEP, "ranks": 2}
    assert ended(common, tmp_path / "whole", stream, **more)[0] == [0, 0]
    run = tmp_path / "run"
    fault = partial(faulty.killed_in_write, 3, 1)
    assert ended(common, run, stream, fault, **more)[0] == [1, KILLED]
    assert names(run) == [1, 2] and hidden(run) == [".saving-0000003"]
    codes, texts = ended(common, run, stream, **more)
    assert codes == [0, 0] and f"resumed from {run}/0000002 at step 2" in texts[0]
    assert names(run) == [1, 2, 3, 4] and hidden(run) == []
    assert_good(run, tmp_path / "whole")


def test_ranks_without_images_or_answers(common, tmp_path):
    """Steps of mixed packs, of a rank of text alone, of text alone, of images alone."""
    stream = partial(faulty.packs_by_number, ("ab", "aB", "a", "t", "t", "t", "A", "BC"))
    more = {**RESHARDED, "ssim_loss_weight": 0.5, "ssim_loss_max_t": 0.6}
    found = []
    for ranks in (1, 2):
        run = tmp_path / str(ranks)
        codes, texts = ended(
            common, run, stream, ranks=ranks, gradient_accumulation_steps=2 // ranks, **more
        )
        assert codes == [0] * ranks, texts
        found.append((lines(run), load_file(run / "0000004" / "model.safetensors")))
    (right, weights), (seen, sharded) = found
    for line, other, absent in zip(right, seen, ((), (), ("mse", "ssim"), ("ce",)), strict=True):
        assert {n for n in ("ce", "mse", "ssim") if n not in line} == set(absent)
        assert line.keys() == other.keys()
        for name in ("ce", "mse", "ssim", "total_norm"):
            assert name in absent or other[name] == pytest.approx(line[name], rel=1e-4)
    for key, value in weights.items():
        torch.testing.assert_close(sharded[key], value, rtol=1e-5, atol=1e-5, msg=key)


DTYPES: dict[str, tuple[int, str, bool, str, torch.dtype]] = {
    "autocast": (1, "single", True, "checkpoint", torch.bfloat16),
    "bfloat16 files": (1, "single", False, "bfloat16", torch.bfloat16),
    "both": (1, "single", True, "bfloat16", torch.float32),
    "fsdp": (2, "fsdp", False, "bfloat16", torch.bfloat16),
    "fsdp in bfloat16": (2, "fsdp", True, "checkpoint", torch.float32),
    "deepspeed": (2, "deepspeed", False, "bfloat16", torch.bfloat16),
    "deepspeed in bfloat16": (2, "deepspeed", True, "checkpoint", torch.float32),
}
"""Ranks, back end, bf16, weights, dtype of images."""
PRECISE: dict[str, Any] = {
    **{"total_steps": 2, "save_every": 9, "lr": 1e-4, "warmup_steps": 0},
    **{"ssim_loss_weight": 0.5, "ssim_loss_max_t": 1.0},
    **{"pixel_loss_weight": 0.5, "pixel_loss_max_t": 1.0},
}
PAIR = ("ab", "cE")


@pytest.fixture(scope="module")
def weights(common, tmp_path_factory) -> dict[str, Path]:
    """The checkpoint, and the same with weights in bfloat16."""
    folder = shutil.copytree(common[0], tmp_path_factory.mktemp("weights") / "bfloat16")
    rounded = {n: t.bfloat16() for n, t in load_file(folder / "model.safetensors").items()}
    save_file(rounded, folder / "model.safetensors")
    write_manifest(folder)
    return {"checkpoint": common[0], "bfloat16": folder}


@pytest.fixture(scope="module")
def exact(common, tmp_path_factory) -> list[dict[str, float]]:
    """Log lines in float32, in one process."""
    run = tmp_path_factory.mktemp("exact") / "run"
    stream = partial(faulty.packs_by_number, PAIR)
    codes, texts = ended(common, run, stream, gradient_accumulation_steps=2, **PRECISE)
    assert codes == [0], texts
    return lines(run)


@pytest.mark.parametrize("case", DTYPES.values(), ids=DTYPES)
def test_every_dtype_gives_the_same_losses(common, weights, exact, tmp_path, case):
    ranks, backend, bf16, kind, dtype = case
    stream = partial(faulty.packs_by_number, PAIR, dtype)
    more = {"ranks": ranks, "backend": backend, "bf16": bf16, **PRECISE}
    more |= {"gradient_accumulation_steps": 2 // ranks, "environment": {"DS_BUILD_OPS": "0"}}
    codes, texts = ended((weights[kind], common[1]), tmp_path / "run", stream, **more)
    assert codes == [0] * ranks, texts
    for line, right in zip(lines(tmp_path / "run"), exact, strict=True):
        assert line["nonfinite_steps"] == 0
        for name in ("ce", "mse", "pixel", "ssim"):
            assert line[name] == pytest.approx(right[name], rel=0.02), name
        assert line["total_norm"] == pytest.approx(right["total_norm"], rel=0.05)


@pytest.mark.parametrize("seconds", [0.0, 1.5, 4.0])
def test_a_signal_to_the_whole_group_leaves_the_workers_at_work(common, tmp_path, seconds):
    """As timeout, systemd and Slurm send it, also while the workers start or the run saves."""
    # Most of a step is waiting for batches, so the trainer needs more of them after the signal.
    endless = {"total_steps": 10_000, "save_every": 10_000, "gradient_accumulation_steps": 16}
    started = []
    for workers in (1, 2):
        begun = tmp_path / f"begun{workers}"
        faults = os.setsid, partial(faulty.at, 0, begun.touch), partial(faulty.slow_batches, 0.1)
        process = start(common, tmp_path / f"{workers}", *faults, num_workers=workers, **endless)
        started.append((process, begun, tmp_path / f"{workers}"))
    for (process, begun, _), number in zip(started, STOP_SIGNALS, strict=True):
        until(begun.exists)
        time.sleep(seconds)
        for _ in range(3):
            os.killpg(process.processes[0].pid, number)
            time.sleep(0.02)
    for process, _, run in started:
        assert process.codes() == [STOP_EXIT_CODE], process.texts()
        (step,) = names(run)
        assert f"a signal came; saved at step {step}" in process.texts()[0]
        verify(run / f"{step:07d}")
        until(lambda log=process.logs[0]: not writers(log))  # no worker outlives its trainer


def test_a_log_that_breaks_ends_no_run(common, tmp_path):
    """W&B's process is killed, and there is no place for the lines of a validation."""
    run = tmp_path / "run"
    (run / "validation.jsonl").mkdir(parents=True)
    fault = partial(faulty.at, 1, partial(faulty.kills_children, "wandb-core"))
    more = {"total_steps": 40, "save_every": 40, "enable_wandb": True, "wandb_offline": True}
    more |= {"val_every": 20, "val_dataset_config_file": common[1], "val_steps": 1}
    codes, (text,) = ended(common, run, fault, val_images=1, **more)
    assert codes == [0], text
    warnings = [line for line in text.splitlines() if line.startswith("WARNING: ")]
    broken, *lost = [x for x in warnings if "WandB" in x or "validation.jsonl" in x]
    assert re.fullmatch("WARNING: WandB gets nothing more: .+", broken)
    place = re.escape(str(run / "validation.jsonl"))
    for step, line in zip((20, 40), lost, strict=True):
        assert re.fullmatch(rf"WARNING: step {step} is not in {place}: .*directory.*", line)
    assert [line["step"] for line in lines(run)] == list(range(1, 41)) and names(run) == [40]
    assert len([*(run / "validation").glob("00000[24]0_*.png")]) == 2


def test_a_signal_to_torchrun_saves_and_ends_with_its_code(common, tmp_path):
    """The program as users start it."""
    run, root = tmp_path / "run", Path(__file__).parents[2]
    words = faulty.words(common, run, total_steps=10_000, save_every=10_000)
    program = [sys.executable, "scripts/training/lib/torchrun.py", "--nproc_per_node=2"]
    program += [f"--master_port={faulty.free_port()}", "train/main_sr_pixel_loss.py", *words]
    with subprocess.Popen(program, cwd=root, stdout=subprocess.DEVNULL) as process:
        until(lambda: (run / "metrics.jsonl").exists() and lines(run))
        process.send_signal(signal.SIGUSR1)
        assert process.wait(faulty.PATIENCE) == STOP_EXIT_CODE
    (step,) = names(run)
    verify(run / f"{step:07d}")
    assert hidden(run) == [] and lines(run)[-1]["step"] == step
