"""Step folders: complete or not there at all, and only the newest are kept."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modeling import pretrained
from tests.helpers import run_arguments
from train import checkpoint as checkpoints
from train.build import build_trainer
from train.checkpoint import SaveError, step_folders
from train.trainer import Trainer


@pytest.fixture
def trainer(checkpoint, mixture, tmp_path) -> Trainer:
    return build_trainer(run_arguments(checkpoint, mixture, tmp_path / "run", max_checkpoints=2))


def names(run: Path) -> list[str]:
    return [folder.name for folder in step_folders(run)]


def test_only_complete_step_folders_count(tmp_path):
    for name in ("0000003", "0000012", ".saving-0000020", "best", "12", "00000012"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text("{}")
    (tmp_path / "0000099").mkdir()  # killed before its manifest was written
    assert names(tmp_path) == ["0000003", "0000012"]
    assert step_folders(tmp_path / "nowhere") == []


def test_a_long_run_keeps_its_order(trainer):
    """Ten million steps have eight digits."""
    for trainer.step in (9_999_999, 10_000_000):
        trainer.save()
    assert step_folders(trainer.run)[-1].name == "10000000"


def test_the_newest_are_kept(trainer):
    for trainer.step in (1, 2, 3):
        trainer.save()
    assert names(trainer.run) == ["0000002", "0000003"]
    assert sorted(p.name for p in trainer.run.iterdir()) == ["0000002", "0000003"]
    trainer.save()  # the same step again
    assert names(trainer.run) == ["0000002", "0000003"]


def test_what_is_saved_after_a_step_back_is_kept(trainer):
    """Damaged folders that a run has passed over do not count, until they are good again."""
    args = trainer.args.training
    for trainer.step in (4, 6):
        trainer.save()
    trainer.step, args.total_steps = 1, 3
    args.save_every, args.auto_resume = 1, True
    trainer.fit()
    assert names(trainer.run) == ["0000002", "0000003", "0000004", "0000006"]
    for trainer.step in (5, 6, 7):
        trainer.save()
    assert names(trainer.run) == ["0000004", "0000006", "0000007"]


@pytest.mark.parametrize("stage", ["save_settings", "save_file", "write_manifest"])
def test_a_save_that_is_cut_off_leaves_the_step_before(trainer, monkeypatch, stage):
    trainer.step = 1
    trainer.save()

    def cut_off(*args: object, **kwargs: object) -> None:
        raise RuntimeError("cut off")

    trainer.step = 2
    with monkeypatch.context() as patch, pytest.raises(SaveError, match="cut off"):
        patch.setattr(checkpoints, stage, cut_off)
        trainer.save()
    assert names(trainer.run) == ["0000001"]
    trainer.step = 3
    trainer.save()
    assert sorted(p.name for p in trainer.run.iterdir()) == ["0000001", "0000003"]


def test_what_a_step_folder_holds(trainer, checkpoint):
    trainer.fit()
    folder = step_folders(trainer.run)[-1]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest.keys() == {p.name for p in folder.iterdir()} - {"manifest.json"}
    expected = {f"{stem}.safetensors" for stem in ("model", "ema", "ae", "optimizer")}
    expected |= {f"{stem}_config.json" for stem in ("llm", "vit", "vae", "bagel")}
    expected |= {"tokenizer.json", "trainer_state.json", "training_args.json"}
    assert expected <= manifest.keys()
    assert all(pretrained.sha256(folder / name) == digest for name, digest in manifest.items())
    state = load_file(folder / "optimizer.safetensors")
    trained = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert state.keys() == {f"{n}/{k}" for n in trained for k in ("exp_avg", "exp_avg_sq")}
    assert all(state[f"{n}/exp_avg"].shape == p.shape for n, p in trained.items())
    for kind in ("model", "ema"):
        saved = load_file(folder / f"{kind}.safetensors")
        with trainer.ema.swapped() if kind == "ema" else nullcontext():
            assert all(torch.equal(saved[n], v) for n, v in trained.items())
    vae = (load_file(f / "ae.safetensors") for f in (folder, checkpoint))
    assert all(torch.equal(a, b) for a, b in zip(*(v.values() for v in vae), strict=True))
    assert json.loads((folder / "trainer_state.json").read_text())["step"] == 4


def test_a_tokenizer_outlives_the_folder_that_a_run_was_resumed_from(checkpoint, mixture, tmp_path):
    for steps in (1, 4):
        settings = {"total_steps": steps, "save_every": 1, "max_checkpoints": 1}
        build_trainer(run_arguments(checkpoint, mixture, tmp_path, **settings)).fit()
    assert names(tmp_path) == ["0000004"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        found, expected = (folder / name for folder in (tmp_path / "0000004", checkpoint))
        assert found.read_bytes() == expected.read_bytes()
