"""The numbers of the reference implementation, and proof that the comparison can fail."""

import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from scripts.tools import check_parity
from tests.helpers import FIXTURES

VARIANTS = ("dense", "moe", "mot_freeze_und", "vit_rope", "interpolate_pos")


def parity(folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["check_parity.py", "--fixture", str(folder)])
    return check_parity.main()


@pytest.mark.parametrize("name", ["bagel_tiny", *(f"bagel_variants/{v}" for v in VARIANTS)])
def test_matches_the_reference(name, monkeypatch, capsys):
    assert parity(FIXTURES / name, monkeypatch) == 0
    lines = capsys.readouterr().out.splitlines()
    assert not [line for line in lines if line.startswith("FAIL")]
    compared = [line for line in lines if line.startswith("ok")]
    assert len(compared) >= (40 if name == "bagel_tiny" else 28)


@pytest.mark.parametrize(
    ("file", "tensor", "noticed"),
    [
        ("ema", "language_model.model.layers.1.mlp_moe_gen.down_proj.weight", "mse per element"),
        ("ema", "vit_model.vision_model.encoder.layers.1.mlp.fc1.bias", "last_hidden_state"),
        ("ae", "encoder.conv_in.bias", "vae encode"),
    ],
)
def test_one_changed_weight_is_noticed(file, tensor, noticed, tmp_path, monkeypatch, capsys):
    without_inference = shutil.ignore_patterns("inference*")
    folder = shutil.copytree(FIXTURES / "bagel_tiny", tmp_path / "f", ignore=without_inference)
    tensors = load_file(folder / f"{file}.safetensors")
    tensors[tensor].view(-1)[0] += 0.05
    save_file(tensors, folder / f"{file}.safetensors", {"format": "pt"})
    assert parity(folder, monkeypatch) == 1
    assert f"FAIL {noticed}" in capsys.readouterr().out


def test_what_a_folder_lacks_is_skipped_and_nothing_at_all_fails(tmp_path, monkeypatch, capsys):
    absent = shutil.ignore_patterns("inference_args.json", "ae.*", "train_grad_norms.json")
    part = shutil.copytree(FIXTURES / "bagel_tiny", tmp_path / "part", ignore=absent)
    assert parity(part, monkeypatch) == 0
    text = capsys.readouterr().out
    assert "skipped inference: no ae.safetensors, inference_args.json" in text
    assert "skipped vae" in text and "skipped gradient norms" in text and "ok   loss" in text
    (part / "train_outputs.safetensors").unlink()
    assert parity(part, monkeypatch) == 1
    assert "nothing to compare" in capsys.readouterr().out
