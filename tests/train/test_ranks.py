"""Losses do not depend on how samples fall on ranks and micro-batches; faults stop all ranks."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data.packer import Sample, TextSegment
from modeling.bagel.bagel import Bagel
from modeling.batch import PackedBatch
from tests.helpers import pack, restoration, run_arguments
from tests.ranks import run_on_ranks
from train.build import build_trainer
from train.metrics import Metrics
from train.trainer import Trainer

TIMES = {"a": 0.1, "b": 0.29, "c": 0.02, "d": 0.15, "e": 0.8, "f": 0.9}
SIZES = {"a": (16, 24), "b": (24, 16), "c": (16, 24), "d": (12, 20), "e": (20, 20), "f": (16, 16)}
SETTINGS: dict[str, Any] = {
    "pixel_loss_weight": 0.5,
    "pixel_loss_type": "l2",
    "pixel_loss_max_t": 0.3,
    "ssim_loss_weight": 0.7,
    "ssim_loss_max_t": 0.2,
    "max_grad_norm": 1e9,
}
CASES: dict[str, dict[str, Any]] = {"weights": {}, "balanced": {"pixel_space_balance": 0.3}}
NAMES = ("ce", "mse", "pixel", "ssim")


def batch_of(model: Bagel, names: str) -> PackedBatch:
    """One pack of the named samples; `t` is a sample of text alone."""
    text = Sample("t", [TextSegment(ids=[1, 2]), TextSegment(ids=[5, 6, 7], answer=True)])
    samples = [text if name == "t" else restoration(name, SIZES[name]) for name in names]
    return pack(model.config, *samples, times=TIMES if set(names) - {"t"} else None)


def one_step(trainer: Trainer, folder: Path, *packs: PackedBatch) -> dict[str, Any]:
    """Gradients of this rank, and (sum, count) of every term that it saw."""
    trainer.args.training.gradient_accumulation_steps = len(packs)
    with Metrics(folder / "metrics.jsonl", 0, 1) as metrics:
        trainer.train_step(iter(packs), metrics)
        seen = {
            n: (float(metrics.sums[n]), metrics.counts[n]) for n in NAMES if metrics.counts.get(n)
        }
        line = metrics.log(1)
    # After one step AdamW's first moment is (1 - beta1) times the gradient.
    share = 1 - trainer.args.training.beta1
    moments = {n: trainer.backend.moment(n, "exp_avg") for n in trainer.backend.weights}
    return {
        "terms": seen,
        "line": line,
        "gradients": {n: moment / share for n, moment in moments.items()},
    }


def on_rank(
    rank: int, checkpoint: Path, mixture: Path, folder: Path, packs: list[list[str]], more: dict
) -> dict[str, Any]:
    args = run_arguments(checkpoint, mixture, folder / str(rank), **SETTINGS | more)
    trainer = build_trainer(args)
    mine = [batch_of(trainer.model, names) for names in packs[rank]]
    return one_step(trainer, folder / str(rank), *mine)


def summed(results: list[dict[str, Any]]) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Global losses and gradients of what the ranks found; only counted terms."""
    losses = {}
    for name in NAMES:
        pairs = [r["terms"][name] for r in results if name in r["terms"]]
        losses[name] = sum(s for s, _ in pairs) / sum(c for _, c in pairs)
    for result in results[1:]:  # summed over ranks already
        for name, gradient in result["gradients"].items():
            assert torch.equal(gradient, results[0]["gradients"][name]), name
    return losses, results[0]["gradients"]


def assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    losses, gradients = summed(found)
    right_losses, right_gradients = summed(expected)
    assert losses == pytest.approx(right_losses, rel=1e-6)
    assert gradients.keys() == right_gradients.keys()
    for name, gradient in gradients.items():
        error = (gradient - right_gradients[name]).norm()
        assert error <= 2e-5 * right_gradients[name].norm() + 1e-7, name


@pytest.fixture(scope="module")
def whole(checkpoint, mixture, tmp_path_factory) -> dict[str, list[dict[str, Any]]]:
    """The step in one process and one pack, by the weights and balanced."""
    folder = tmp_path_factory.mktemp("whole")
    found = {}
    for case, more in CASES.items():
        found[case] = [on_rank(0, checkpoint, mixture, folder / case, [["abcdeftt"]], more)]
    return found


@pytest.mark.parametrize("packs", [["abcdef", "tt"], ["abc", "deftt"], ["a", "tb", "cdt", "ef"]])
def test_micro_batches_change_neither_loss_nor_gradient(
    checkpoint, mixture, tmp_path, whole, packs
):
    assert_same([on_rank(0, checkpoint, mixture, tmp_path, [packs], {})], whole["weights"])


def test_two_ranks_with_two_micro_batches(checkpoint, mixture, tmp_path, whole):
    packs = [["abc", "tt"], ["d", "ef"]]
    common = (checkpoint, mixture, tmp_path, packs, {})
    assert_same(run_on_ranks(2, on_rank, tmp_path / "ranks", *common), whole["weights"])


@pytest.mark.parametrize("more", [{}, CASES["balanced"], {"pixel_loss_weight": 0.0}])
def test_a_step_without_any_target_image(checkpoint, mixture, tmp_path, more):
    """Text alone, then only conditioning images: the absent terms are absent."""
    args = run_arguments(checkpoint, mixture, tmp_path, **(SETTINGS | more))
    trainer = build_trainer(args)
    conditions = Sample("v", restoration("a").segments[:3] + [TextSegment(ids=[5], answer=True)])
    for batch in (batch_of(trainer.model, "tt"), pack(trainer.model.config, conditions)):
        found = one_step(trainer, tmp_path, batch)
        assert set(found["terms"]) == {"ce"} and found["line"]["total_norm"] > 0


def test_nothing_to_train_in_one_micro_batch(checkpoint, mixture, tmp_path):
    """Text has no gradient where the language model is frozen."""
    found = [
        on_rank(0, checkpoint, mixture, tmp_path / packs[0], [packs], {"freeze_llm": True})
        for packs in (["ab", "tt"], ["abtt"])
    ]
    assert_same(found[:1], found[1:])


def both_cases(rank: int, *common: Any) -> dict[str, dict[str, Any]]:
    if rank == 1:
        os.environ["SSIM_LOSS_DEBUG"] = "1"  # on one rank alone: the others must not be lost
    checkpoint, mixture, folder, packs = common
    return {
        case: on_rank(rank, checkpoint, mixture, folder / case, packs, more)
        for case, more in CASES.items()
    }


def test_a_rank_without_gated_images_and_one_without_images(checkpoint, mixture, tmp_path, whole):
    common = (checkpoint, mixture, tmp_path, [["abcd"], ["ef"], ["tt"]])
    by_rank = run_on_ranks(3, both_cases, tmp_path / "ranks", *common)
    for case in CASES:
        results, (expected,) = [found[case] for found in by_rank], whole[case]
        assert_same(results, [expected])
        for result in results:
            for name in ("ce", "mse", "pixel", "ssim"):
                for kind in ("", "_weighted", "_count"):
                    right = pytest.approx(expected["line"][name + kind], rel=1e-5)
                    assert result["line"][name + kind] == right
            for name in ("mse_images", "pixel_share", "ssim_images", "ssim_share", "tokens"):
                assert result["line"][name] == pytest.approx(expected["line"][name])
            for name in ("mse", "pixel", "ssim"):
                for kind in ("grad_norm", "grad_max"):
                    right = pytest.approx(expected["line"][f"{name}_{kind}"], rel=1e-4)
                    assert result["line"][f"{name}_{kind}"] == right
