"""Exports load strictly and compute what was stored; what has changed is found."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling.pretrained import CheckpointError, load_pretrained, write_manifest
from scripts.tools.export import FORWARD_FILE, export, verify
from tests.helpers import run_arguments
from train.build import build_trainer

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_of_a_run_is_exported_and_verified(checkpoint, mixture, tmp_path, dtype):
    build_trainer(run_arguments(checkpoint, mixture, tmp_path / "run", total_steps=1)).fit()
    step, out = tmp_path / "run" / "0000001", tmp_path / "out"
    words = ["--checkpoint", str(step), "--out", str(out), "--save_dtype", dtype]
    done = subprocess.run(
        [sys.executable, "-m", "scripts.tools.export", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "velocity: relative error" in done.stdout
    saved, exported = load_file(step / "ema.safetensors"), load_file(out / "ema.safetensors")
    assert saved.keys() == exported.keys()
    for name, tensor in exported.items():
        assert torch.equal(tensor, saved[name].to(getattr(torch, dtype)))
    manifest = json.loads((out / "manifest.json").read_text())
    assert {FORWARD_FILE, "ema.safetensors", "tokenizer.json"} <= manifest.keys()
    assert load_pretrained(out, "ema")[1].share == 1.0


def test_an_export_never_writes_into_a_folder_that_holds_something(checkpoint):
    with pytest.raises(CheckpointError, match="is not empty"):
        export(checkpoint, checkpoint, "model", torch.bfloat16)


def test_an_export_that_computes_something_else_is_found(checkpoint, tmp_path):
    export(checkpoint, tmp_path, "model", torch.float32)
    verify(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["llm2vae.weight"] *= 1.01
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="model.safetensors is damaged"):
        verify(tmp_path)
    write_manifest(tmp_path)
    with pytest.raises(CheckpointError, match="velocity differs by"):
        verify(tmp_path)
    (tmp_path / FORWARD_FILE).unlink()
    write_manifest(tmp_path)
    with pytest.raises(CheckpointError, match="forward.safetensors not found"):
        verify(tmp_path)
