"""Faults that are put into whole runs, and what each of them may cost."""

import hashlib
import json
import os
import pickle
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling.pretrained import CheckpointError, DamagedError, write_manifest
from tests import faulty
from tests.helpers import run_arguments
from tests.faulty import ended, start
from train.build import build_trainer, resume_folder
from train.checkpoint import step_folders, verify
from train.distributed import STOP_EXIT_CODE
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
    codes, texts = ended(common, folder, note, environment=SECRETS, **EVERY_STEP)
    assert codes == [0], texts
    return folder


def hashes(folder: Path, names: tuple[str, ...] = SAVED) -> dict[str, str]:
    return {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in names}


def names(run: Path) -> list[int]:
    return [int(folder.name) for folder in step_folders(run)]


def hidden(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir() if path.name.startswith("."))


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_good(run: Path, finished: Path) -> None:
    """Every step folder of `run` is whole and has the bits of the uninterrupted run."""
    for folder in step_folders(run):
        verify(folder)
        assert hashes(folder) == hashes(finished / folder.name), folder


def copied(finished: Path, run: Path, last: int) -> Path:
    """A run folder as it was after step `last`."""
    for step in range(1, last + 1):
        shutil.copytree(finished / f"{step:07d}", run / f"{step:07d}")
    return run


def test_a_kill_at_any_stage_of_a_save_costs_one_step(finished, common, tmp_path):
    """Each run is also the resumption of the one before."""
    told, keep = tmp_path / "stages", {**EVERY_STEP, "max_checkpoints": 1}
    run = copied(finished, tmp_path / "all", 2)
    assert ended(common, run, partial(faulty.killed_in_save, 3, 0, told), **keep)[0] == [0]
    assert names(run) == [4] and hidden(run) == []
    assert_good(run, finished)
    *stages, _ = told.read_text().splitlines()
    final = stages.index("os.rename .saving-0000003")
    assert {"half written .safetensors", "os.rename .tmp", "os.rename 0000001"} <= set(stages)

    def chain(which: range) -> None:
        run = copied(finished, tmp_path / f"from{which.start}", 2)
        for stage in which:
            fault = partial(faulty.killed_in_save, 3, stage + 1)
            assert ended(common, run, fault, **keep)[0] == [KILLED], stages[stage]
            assert names(run)[-1] == (2 if stage <= final else 3), stages[stage]
            assert len(hidden(run)) <= 2
            assert_good(run, finished)
            if stage > final:
                copied(finished, shutil.rmtree(run) or run, 2)
        assert ended(common, run, **keep)[0] == [0]
        assert names(run) == [4] and hidden(run) == []
        assert_good(run, finished)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(chain, (range(i, len(stages), 2) for i in range(2))))


def test_twenty_kills_at_random_moments_change_no_bit(finished, common, tmp_path):
    rng, kills, runs = random.Random(0), 0, 0
    note = partial(faulty.told_samples, tmp_path)
    while kills < 20:
        run = tmp_path / f"run{runs}"
        fault = partial(faulty.killed_after, rng.uniform(0.0, 0.6))
        (code,), texts = ended(common, run, fault, note, **EVERY_STEP)
        assert code in (0, KILLED), texts
        kills += code == KILLED
        assert_good(run, finished)
        runs += code == 0
    assert ended(common, run, note, **EVERY_STEP)[0] == [0]
    assert names(run) == list(range(1, STEPS + 1))
    assert_good(run, finished)
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
    with pytest.raises(CheckpointError, match=r"model.safetensors not found; there is .*model.bin"):
        build_trainer(run_arguments(weights, mixture, tmp_path / "new"))
    assert not trace.exists()


def test_a_full_disk_stops_saving_and_not_training(finished, common, tmp_path):
    """Full from the second step to the fourth: that step succeeds."""
    fault = partial(faulty.full_disk, 1, 3)
    codes, (text,) = ended(common, tmp_path / "run", fault, max_save_failures=9, **EVERY_STEP)
    assert codes == [0], text
    warnings = [line for line in text.splitlines() if line.startswith("WARNING: saving has failed")]
    assert 1 <= len(warnings) and "training goes on and tries again" in warnings[0]
    assert "File too large" in warnings[0]
    assert {1, STEPS} <= set(names(tmp_path / "run")) and hidden(tmp_path / "run") == []
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3, 4]
    assert_good(tmp_path / "run", finished)
