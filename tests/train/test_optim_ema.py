"""EMA, learning-rate schedule and freeze plan against their definitions."""

import json
import math

import pytest
import torch
from torch import nn

from modeling.pretrained import load_pretrained
from tests.helpers import run_arguments, tiny_model
from train.argument_rules import FROZEN_WITH
from train.arguments import TrainingArguments
from train.build import build_trainer
from train.ema import EMA
from train.metrics import Metrics
from train.optim import apply_freeze_plan, base_lr, frozen_by, group_of, lr_at


def test_ema_is_its_formula_and_a_skipped_step_changes_no_bit():
    weight = torch.randn(3, 2)
    ema = EMA([weight], 0.9)
    expected = weight.double()
    for step in range(10):
        weight += torch.randn_like(weight)
        before = ema.averages[0].clone()
        ema.update(torch.tensor(float(step == 4)))
        if step == 4:
            assert torch.equal(ema.averages[0], before)
        else:
            expected = 0.9 * expected + 0.1 * weight.double()
    torch.testing.assert_close(ema.averages[0].double(), expected, rtol=1e-5, atol=1e-6)


def test_ema_swaps_in_and_out_to_the_bit():
    weight, refreshed = torch.randn(5), []
    ema = EMA([weight], 0.5, lambda: refreshed.append(weight.clone()))
    weight += 1
    ema.update(torch.tensor(0.0))
    before, average = weight.clone(), ema.averages[0].clone()
    with ema.swapped():
        assert torch.equal(weight, average) and torch.equal(ema.averages[0], before)
    assert torch.equal(weight, before) and torch.equal(ema.averages[0], average)
    assert torch.equal(refreshed[0], average) and torch.equal(refreshed[1], before)
    ema.restart()
    assert torch.equal(ema.averages[0], weight)


def test_learning_rate_of_a_step():
    constant = TrainingArguments(warmup_steps=4, total_steps=10)
    assert [lr_at(s, 2.0, constant) for s in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert lr_at(0, 1.0, TrainingArguments(warmup_steps=0)) == 1.0
    cosine = TrainingArguments(warmup_steps=2, total_steps=12, lr_scheduler="cosine", min_lr=1e-3)
    assert lr_at(1, 1e-2, cosine) == lr_at(2, 1e-2, cosine) == 1e-2
    assert lr_at(7, 1e-2, cosine) == pytest.approx(1e-3 + 9e-3 * 0.5)
    quarter = 1e-3 + 9e-3 * 0.5 * (1 + math.cos(0.1 * math.pi))
    assert lr_at(3, 1e-2, cosine) == pytest.approx(quarter)
    assert lr_at(12, 1e-2, cosine) == lr_at(99, 1e-2, cosine) == pytest.approx(1e-3)
    # A group below min_lr stays where it is.
    assert lr_at(12, 1e-4, cosine) == lr_at(5, 1e-4, cosine) == 1e-4


def test_groups_have_their_learning_rates():
    args = TrainingArguments(lr=1.0, vit_lr=2.0, mot_gen_lr=3.0)
    layer = "language_model.model.layers.0.mlp"
    found = {n: group_of(n + ".weight", args) for n in (layer, layer + "_moe_gen", "vit_model.x")}
    assert list(found.values()) == ["language_model", "mot_gen", "vit_model"]
    assert group_of("llm2vae.weight", args) == "other"
    assert [base_lr(g, args) for g in (*found.values(), "other")] == [1.0, 3.0, 2.0, 1.0]
    args = TrainingArguments(lr=1.0, llm_lr=5.0)
    assert base_lr(group_of(layer + "_moe_gen.weight", args), args) == 5.0


@pytest.mark.parametrize("part", ["vit", "llm", "mot_und", "mot_gen"])
def test_a_rate_is_refused_where_a_flag_leaves_it_nothing(part):
    """FROZEN_WITH against the freeze plan of a model."""
    names = [name for name, _ in tiny_model().named_parameters()]
    group = {"vit": "vit_model", "llm": "language_model"}.get(part, part)
    covering = [f"freeze_{other}" for other in (part, *FROZEN_WITH[part].split())]
    for flag in ("freeze_llm", "freeze_vit", "freeze_und", "freeze_mot_und", "freeze_mot_gen"):
        args = TrainingArguments(**{flag: True, f"{part}_lr": 1.0})
        own = [name for name in names if group_of(name, args) == group]
        nothing = all(frozen_by(name, args, lora=False) for name in own)
        assert own and nothing == (flag in covering), flag


def gen_side(name: str) -> bool:
    parts = ("vae2llm.", "llm2vae.", "time_embedder.")
    return "_moe_gen" in name or name.startswith(parts)


def expert(name: str) -> bool:
    return name.startswith("language_model.model.") and "embed_tokens" not in name


PLANS = {
    "freeze_mot_und": lambda name: not expert(name) or "_moe_gen" in name,
    "freeze_mot_gen": lambda name: not expert(name) or "_moe_gen" not in name,
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
    assert {n for n, p in after.items() if p.requires_grad} == expected
    assert trainer.backend.weights.keys() == expected


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
