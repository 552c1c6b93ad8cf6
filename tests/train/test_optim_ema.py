"""EMA, learning-rate schedule and freeze plan against their definitions."""

import json
import math

import pytest
import torch
from torch import nn

from modeling.pretrained import load_pretrained
from tests.helpers import run_arguments
from train.arguments import TrainingArguments
from train.build import build_trainer
from train.ema import EMA
from train.metrics import Metrics
from train.optim import apply_freeze_plan, build_optimizer, build_schedule, lr_factor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ema_is_its_formula_in_float32(dtype):
    model = nn.Linear(3, 2).to(dtype)
    ema = EMA(model, 0.9)
    expected = model.weight.detach().double()
    for _ in range(10):
        with torch.no_grad():
            model.weight += torch.randn_like(model.weight)
        ema.update()
        expected = 0.9 * expected + 0.1 * model.weight.detach().double()
    average = ema.state_dict(model)["weight"]
    assert average.dtype == torch.float32
    torch.testing.assert_close(average.double(), expected, rtol=1e-5, atol=1e-6)


def test_ema_does_not_stall_in_bfloat16():
    model = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.zeros_(model.weight)
    ema = EMA(model, 0.9999)
    nn.init.ones_(model.weight)
    for _ in range(2000):
        ema.update()
    assert ema.averages["weight"].item() == pytest.approx(1 - 0.9999**2000, rel=1e-3)


def test_ema_follows_trained_weights_only():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    ema = EMA(model, 0.5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        for p in model.parameters():
            p += 1
    ema.update()
    state = ema.state_dict(model)
    assert torch.equal(state["0.weight"], before["0.weight"] + 1)
    torch.testing.assert_close(state["1.weight"], before["1.weight"] + 0.5)
    other = EMA(model, 0.5)
    other.load_state_dict(state)
    assert torch.equal(other.averages["1.weight"], state["1.weight"])
    with pytest.raises(KeyError, match=r"1.weight"):
        other.load_state_dict({})


def test_lr_factor():
    constant = TrainingArguments(warmup_steps=4, total_steps=10)
    assert [lr_factor(s, constant) for s in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert lr_factor(0, TrainingArguments(warmup_steps=0)) == 1.0
    cosine = TrainingArguments(
        warmup_steps=2, total_steps=12, lr_scheduler="cosine", lr=1e-2, min_lr=1e-3
    )
    assert lr_factor(1, cosine) == lr_factor(2, cosine) == 1.0
    assert lr_factor(7, cosine) == pytest.approx(0.1 + 0.9 * 0.5)
    quarter = 0.1 + 0.9 * 0.5 * (1 + math.cos(0.1 * math.pi))
    assert lr_factor(3, cosine) == pytest.approx(quarter)
    assert lr_factor(12, cosine) == lr_factor(99, cosine) == pytest.approx(0.1)


def test_schedule_sets_the_learning_rate():
    args = TrainingArguments(warmup_steps=2, lr=0.5)
    optimizer = build_optimizer(nn.Linear(1, 1), args)
    schedule = build_schedule(optimizer, args)
    found = []
    for _ in range(3):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert found == [0.25, 0.5, 0.5]
    group = optimizer.param_groups[0]
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.95), 1e-15, 0.0)


def gen_side(name: str) -> bool:
    parts = ("vae2llm.", "llm2vae.", "time_embedder.")
    return "_moe_gen" in name or name.startswith(parts)


PLANS = {
    "freeze_llm": lambda name: not name.startswith("language_model."),
    "freeze_vit": lambda name: not name.startswith("vit_model."),
    "freeze_und": lambda name: gen_side(name) or name == "language_model.lm_head.weight",
    "bf16": lambda name: True,
}


@pytest.mark.parametrize("flag", PLANS)
def test_what_moves_in_one_step(flag, checkpoint, mixture, tmp_path):
    """Dropout 0, so that every kind of token is in the pack; the autoencoder never moves."""
    dropout = {f"{kind}_cond_dropout_prob": 0 for kind in ("text", "vae", "vit")}
    args = run_arguments(checkpoint, mixture, tmp_path, total_steps=1, **{flag: True}, **dropout)
    trainer = build_trainer(args)
    before = load_pretrained(checkpoint, "model")[0].state_dict()
    with Metrics(tmp_path / "m.jsonl", 0, 1) as metrics:
        trainer.train_step(iter(trainer.loader), metrics)
    after = dict(trainer.model.named_parameters())
    moved = {name for name, p in after.items() if not torch.equal(p, before[name])}
    expected = {name for name in after if not name.startswith("vae.") and PLANS[flag](name)}
    # softmax does not see a shift of all keys: their bias has no gradient but rounding errors
    no_gradient = {n for n in expected if n.startswith("vit_model.") and "k_proj.bias" in n}
    assert moved - no_gradient == expected - no_gradient
    assert (
        {n for n, p in after.items() if p.requires_grad} == expected == trainer.ema.averages.keys()
    )


def test_nothing_left_to_train():
    with pytest.raises(ValueError, match="leave nothing to train"):
        model = nn.Module()
        model.language_model = nn.Linear(1, 1)
        apply_freeze_plan(model, TrainingArguments(freeze_llm=True))


def test_metrics_average_over_counts(tmp_path, capsys):
    with Metrics(tmp_path / "m.jsonl", 0, 9) as metrics:
        metrics.add("ce", torch.tensor(6.0, requires_grad=True), 2)
        metrics.add("ce", torch.tensor(1.0), 5)
        metrics.add("pixel", torch.tensor(0.0), 0)
        metrics.add("tokens", 10)
        metrics.add("tokens", 20)
        line = metrics.log(3)
        assert line["ce"] == 1.0 and line["tokens"] == 15 and "pixel" not in line
        metrics.add("ce", 4.0, 2)
        metrics.log(4)
    lines = [json.loads(x) for x in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert [(x["step"], x["ce"]) for x in lines] == [(3, 1.0), (4, 2.0)]
    assert "step 3/9  ce 1" in capsys.readouterr().out
