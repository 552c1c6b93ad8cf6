"""What is told of the parameters, and the check that frozen ones stay and trained ones move."""

import re
from pathlib import Path

import pytest
import torch

from modeling.pretrained import open_pretrained
from tests.helpers import run_arguments
from train.build import build_trainer, configure
from train.freezing import FreezingCheck, parameter_lines
from train.metrics import Metrics
from train.trainer import Trainer

FROZEN = {"freeze_vit": True, "llm_lr": 0.25, "hang_timeout": 0}
NORM = "language_model.model.norm.weight"


def step(trainer: Trainer, folder: Path) -> None:
    with Metrics(folder / "metrics.jsonl", 0, 1) as metrics:
        trainer.train_step(iter(trainer.loader), metrics)


def test_a_line_for_all_layers_of_a_weight(checkpoint, mixture, tmp_path):
    args = run_arguments(checkpoint, mixture, tmp_path, **FROZEN)
    model, *_ = open_pretrained(checkpoint, "model")
    configure(model, args)
    lines = [re.sub(" +", " ", line).strip() for line in parameter_lines(model, args)]
    expected = {
        "2 x language_model.model.layers.*.self_attn.k_proj_moe_gen.weight (16, 32) "
        "trained, language_model, lr 0.25",
        "2 x vit_model.vision_model.encoder.layers.*.mlp.fc1.bias (40,) frozen by freeze_vit",
        "1 x llm2vae.weight (16, 32) trained, other, lr 0.001",
        f"{len(list(model.vae.parameters()))} x vae.* frozen by freeze_vae",
    }
    assert expected <= set(lines)
    assert sum(int(line.split()[0]) for line in lines) == len(list(model.parameters()))
    shared = [n for n, _ in model.named_parameters() if not n.startswith("vae.")]
    assert len(lines) < len(shared) / 1.5


def test_the_check_names_what_is_wrong(checkpoint, mixture, tmp_path, monkeypatch):
    trainer = build_trainer(run_arguments(checkpoint, mixture, tmp_path, **FROZEN))
    check, backend = FreezingCheck(trainer.backend), trainer.backend
    update = backend.update
    check.after_step()
    assert not check.done
    monkeypatch.setattr(backend, "update", lambda skip: update(torch.ones_like(skip)))
    step(trainer, tmp_path)
    check.after_step()
    assert not check.done, "a skipped step moves nothing"
    monkeypatch.setattr(backend, "update", update)
    step(trainer, tmp_path)
    check.after_step()
    assert check.done

    def stuck(skip: torch.Tensor) -> None:
        before = backend.by_name[NORM].clone()
        update(skip)
        backend.by_name[NORM].copy_(before)
        backend.model.vit_model.vision_model.post_layernorm.bias.data[3] += 1e-6

    monkeypatch.setattr(backend, "update", stuck)
    check = FreezingCheck(backend)
    step(trainer, tmp_path)
    told = "frozen, and moved: vit_model.vision_model.post_layernorm.bias; trained, and not moved: "
    with pytest.raises(ValueError, match=re.escape(f"first step {told}{NORM}") + "$"):
        check.after_step()


def test_rounding_is_no_fault(checkpoint, mixture, tmp_path, capfd):
    """In the first step of a long warm-up a norm's weight near 1 stays as it is."""
    slow = FROZEN | {"llm_lr": 1e-9, "lr": 1e-9, "validate_freezing": True, "total_steps": 1}
    trainer = build_trainer(run_arguments(checkpoint, mixture, tmp_path, **slow))
    trainer.backend.by_name[NORM].fill_(1.0)
    trainer.fit()
    assert (trainer.backend.by_name[NORM] == 1).all() and trainer.step == 1
    assert "step 1/1" in capfd.readouterr().out
