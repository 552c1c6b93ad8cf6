"""LoRA: starts as the model was, trains little, is saved merged, resumes to the bit."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling.pretrained import CheckpointError, load_pretrained
from tests.helpers import run_arguments
from tests.ranks import run_on_ranks
from train.adapters import is_adapter
from train.build import build_trainer
from train.checkpoint import plans

LORA = {"lora_rank": 3, "lora_alpha": 6.0, "num_workers": 0, "total_steps": 3, "save_every": 1}


def on_rank(rank, checkpoint, mixture, run) -> None:
    build_trainer(run_arguments(checkpoint, mixture, run, backend="fsdp", **LORA)).fit()


def test_a_model_with_new_adapters_is_the_model(checkpoint, mixture, tmp_path):
    trainer = build_trainer(run_arguments(checkpoint, mixture, tmp_path, **LORA))
    batch = trainer.loader.next_batch()
    plain = load_pretrained(checkpoint, "model")[0]
    adapted, expected = trainer.model(batch), plain(batch)
    for name, term in expected.items():
        assert torch.equal(adapted[name].sum, term.sum)
    trained = {n for n in trainer.backend.weights if n.startswith("language_model.")}
    # q, k, v and o of both experts in both layers, an A and a B each
    assert len(trained) == 4 * 2 * 2 * 2 and all(map(is_adapter, trained))
    assert {"llm2vae.weight", "connector.fc1.weight"} <= trainer.backend.weights.keys()


def test_a_step_folder_holds_the_merged_model(checkpoint, mixture, tmp_path):
    trainer = build_trainer(run_arguments(checkpoint, mixture, tmp_path, **LORA))
    trainer.fit()
    folder = tmp_path / "0000003"
    merged, report = load_pretrained(folder, "model")
    assert report.share == 1.0
    batch = trainer.loader.next_batch()
    with torch.no_grad():
        found, expected = merged(batch), trainer.model(batch)
    for name, term in expected.items():
        torch.testing.assert_close(found[name].sum, term.sum, rtol=1e-5, atol=1e-5)
    # W + alpha / rank * B A, by hand
    adapters = load_file(folder / "adapters.safetensors")
    start = load_file(checkpoint / "model.safetensors")
    stem = "language_model.model.layers.1.self_attn.v_proj_moe_gen"
    a, b = (adapters[f"{stem}.lora_{x}.default.weight"] for x in "AB")
    expected = start[f"{stem}.weight"] + 2.0 * b @ a
    torch.testing.assert_close(load_file(folder / "model.safetensors")[f"{stem}.weight"], expected)
    assert (b @ a).abs().max() > 1e-4
    for stem_of_file, (files, planned) in plans(trainer).items():
        saved = [load_file(folder / file) for file in files]
        assert planned == sum(t.nbytes for tensors in saved for t in tensors.values()), stem_of_file
    averaged = load_file(folder / "adapters_ema.safetensors")
    assert averaged.keys() == adapters.keys()
    assert not torch.equal(averaged[f"{stem}.lora_B.default.weight"], b)


def test_adapters_resume_to_the_bit_and_on_two_ranks_within_rounding(checkpoint, mixture, tmp_path):
    build_trainer(run_arguments(checkpoint, mixture, tmp_path / "whole", **LORA)).fit()
    shutil.copytree(tmp_path / "whole" / "0000001", tmp_path / "again" / "0000001")
    resumed = build_trainer(run_arguments(checkpoint, mixture, tmp_path / "again", **LORA))
    assert resumed.step == 1
    resumed.fit()
    for name in ("model", "ema", "adapters", "adapters_ema", "optimizer"):
        found, expected = (
            (tmp_path / run / "0000003" / f"{name}.safetensors").read_bytes()
            for run in ("again", "whole")
        )
        assert found == expected, name
    run_on_ranks(2, on_rank, tmp_path / "r", checkpoint, mixture, tmp_path / "two")
    first, other = (load_file(tmp_path / "two" / s / "adapters.safetensors") for s in STEPS)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert load_pretrained(tmp_path / "two" / "0000003", "ema")[1].share == 1.0


STEPS = ("0000001", "0000003")


def test_adapters_go_on_with_the_base_that_they_began_on(checkpoint, mixture, tmp_path):
    """Whatever the arguments say then; where it has gone, only a base that fits is taken."""
    base = shutil.copytree(checkpoint, tmp_path / "base")

    def run(name: str, **more: Any) -> Path:
        build_trainer(run_arguments(base, mixture, tmp_path / name, **LORA | more)).fit()
        return tmp_path / name / "0000003"

    first = run("first", finetune_from_ema=True)
    step = {"resume_from": first.with_name("0000001")}
    (tmp_path / "first" / "0000002").rename(tmp_path / "kept")
    last = first.rename(tmp_path / "last")
    for again in (run("elsewhere", **step), run("first")):
        for name in ("model", "adapters", "optimizer"):
            found, expected = (f / f"{name}.safetensors" for f in (again, last))
            assert found.read_bytes() == expected.read_bytes(), name
    other = {"lora_rank": 4, **step}
    with pytest.raises(CheckpointError, match="0000001: has other adapters: check lora_rank and"):
        run("rank", **other)
    base.rename(base := tmp_path / "moved")
    with pytest.raises(CheckpointError, match="began on another base .*: check model_path, fine"):
        run("moved_model", **step)
    # A base whose generation expert alone has been trained meanwhile.
    tensors = load_file(base / "ema.safetensors")
    stem = "language_model.model.layers.1.self_attn.v_proj_moe_gen"
    tensors[f"{stem}.weight"] *= 1.01
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    (base / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=rf"began on another base \({stem}.weight differs"):
        run("expert", **step)


def test_adapters_on_a_base_in_bfloat16(checkpoint, mixture, tmp_path):
    """As DeepSpeed has it. Merged it is float32: rounded again it would lose small adapters."""
    more = LORA | {"backend": "deepspeed", "bf16": True, "lr": 1e-4}
    for steps in (2, 3):
        resumed = (checkpoint, mixture, tmp_path / "run", more | {"total_steps": steps})
        run_on_ranks(2, with_settings, tmp_path / f"r{steps}", *resumed)
    folder = tmp_path / "run" / "0000003"
    saved, adapters = (load_file(folder / f"{s}.safetensors") for s in ("model", "adapters"))
    start = load_file(checkpoint / "model.safetensors")
    stem = "language_model.model.layers.1.self_attn.v_proj_moe_gen"
    a, b = (adapters[f"{stem}.lora_{x}.default.weight"] for x in "AB")
    added = saved[f"{stem}.weight"] - start[f"{stem}.weight"].bfloat16()
    torch.testing.assert_close(added, 2.0 * b @ a, rtol=1e-2, atol=1e-7)
    assert (b @ a).abs().max() > 1e-5


def with_settings(rank, checkpoint, mixture, run, settings) -> None:
    build_trainer(run_arguments(checkpoint, mixture, run, **settings)).fit()


def test_frozen_weights_come_from_the_step_that_goes_on(checkpoint, mixture, tmp_path):
    """Also from one that has trained them."""
    before = run_arguments(checkpoint, mixture, tmp_path / "a", **LORA | {"vit_lr": 0.01})
    build_trainer(before).fit()
    for ranks, backend in ((1, "single"), (2, "deepspeed")):
        folder = tmp_path / backend
        resumed = (backend, checkpoint, mixture, folder, tmp_path / "a" / "0000003")
        run_on_ranks(ranks, frozen_vit, tmp_path / f"r{ranks}", *resumed)
        found, expected = (
            load_file(f / "model.safetensors") for f in (folder / "0000004", resumed[-1])
        )
        for name in (name for name in expected if name.startswith("vit_model.")):
            assert torch.equal(found[name], expected[name]), (backend, name)


def frozen_vit(rank, backend, checkpoint, mixture, run, step) -> None:
    more = {"resume_from": step, "resume_model_optimizer": False, "total_steps": 4}
    more |= {"freeze_vit": True, "backend": backend}
    build_trainer(run_arguments(checkpoint, mixture, run, **LORA | more)).fit()


def test_without_any_such_projection(checkpoint, mixture, tmp_path):
    args = run_arguments(checkpoint, mixture, tmp_path, lora_targets="query", **LORA)
    with pytest.raises(ValueError, match="lora_targets=query: no such projection"):
        build_trainer(args)
