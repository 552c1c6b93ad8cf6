"""Every YAML, script and README command that ships is a test case."""

import json
import re
import subprocess
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import yaml
from skimage.metrics import structural_similarity

from modeling.pretrained import load_pretrained, verify_manifest
from scripts.experiments import compare_losses
from train.arguments import TYPES, parse_arguments
from train.build import build_terms
from train.distributed import STOP_EXIT_CODE

ROOT = Path(__file__).parents[1]
PIXEL = ("weight", "type", "max_t", "chunk_size", "adaptive_chunk")
SSIM = ("loss_weight", "loss_max_t", "grad_scale")
CONFIGS = sorted(p for p in ROOT.glob("configs/**/*.yaml") if p.parent.name != "data")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_config_resolves(path):
    args = parse_arguments(["--config", str(path)])
    assert build_terms(args.training)
    for name in yaml.safe_load(path.read_text()):
        assert name == "extends" or name in args.flat()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_large_models_save_memory_and_tiny_ones_need_not(path):
    training = parse_arguments(["--config", str(path)]).training
    large = path.parent.name == "experiments"
    assert (training.bf16, training.activation_checkpointing) == (large, large)


def test_v3_is_the_preset_that_users_settled_on():
    training = parse_arguments(
        ["--config", str(ROOT / "configs/experiments/ssim_v3.yaml")]
    ).training
    found = training.ssim_loss_weight, training.ssim_loss_max_t, training.ssim_grad_scale
    assert found == (0.1, 0.1, 0.01)
    assert (training.ssim_window_size, training.ema, training.max_grad_norm) == (11, 0.995, 1.0)
    assert training.finetune_from_ema and training.freeze_vit and training.freeze_vae


@pytest.mark.parametrize(
    ("name", "pixel", "ssim"),
    [
        ("ssim_v1", None, (1.0, 0.3, 1.0)),
        ("ssim_v2_documented", None, (0.1, 0.1, 0.1)),
        ("ssim_v2_as_run", None, (1.0, 0.3, 0.01)),
        ("ssim_v3", None, (0.1, 0.1, 0.01)),
        ("ssim_medium", None, (0.2, 0.15, 0.01)),
        ("ssim_aggressive", None, (0.5, 0.2, 0.01)),
        ("pixel_small", (1e3, "l2", 0.2, 2, True), None),
        ("pixel_large", (1e4, "l2", 0.2, 1, False), None),
        ("mixed", (1e3, "l2", 0.2, 2, True), (0.1, 0.1, 0.01)),
    ],
)
def test_presets_are_what_their_names_stand_for(name, pixel, ssim):
    """(weight, type, max_t, chunk size, adaptive) and (weight, max_t, grad_scale)."""
    path = ROOT / f"configs/experiments/{name}.yaml"
    training = parse_arguments(["--config", str(path)]).training
    base = parse_arguments(["--config", str(path.with_name("base.yaml"))]).training
    shared = {"extends"} | {f"pixel_loss_{x}" for x in PIXEL} | {f"ssim_{x}" for x in SSIM}
    assert set(yaml.safe_load(path.read_text())) <= shared
    found = tuple(getattr(training, f"pixel_loss_{x}") for x in PIXEL)
    assert found == pixel or (pixel is None and training.pixel_loss_weight == 0)
    found = tuple(getattr(training, f"ssim_{x}") for x in SSIM)
    assert found == ssim or (ssim is None and training.ssim_loss_weight == 0)
    assert (training.ce_weight, training.lr) == (base.ce_weight, base.lr) == (0.25, 1e-4)


def test_experiments_name_presets_and_arguments_that_exist():
    compared = (ROOT / "scripts/experiments/compare_losses.sh").read_text()
    settings = dict(re.findall(r'^  \[(\w+)\]="(.+)"$', compared, re.MULTILINE))
    assert settings.keys() == compare_losses.SETTINGS.keys()
    stability = (ROOT / "scripts/experiments/stability.sh").read_text()
    settings |= dict(re.findall(r"^run (\w+) (.+)$", stability, re.MULTILINE))
    for preset, *arguments in map(str.split, settings.values()):
        parse_arguments(["--config", f"{ROOT}/configs/experiments/{preset}.yaml", *arguments])


def test_multi_scale_ssim_of_the_report():
    """At one scale it is scikit-image's SSIM over valid windows."""
    rng = np.random.default_rng(0)
    truth = rng.random((112, 96))
    image = np.clip(truth + 0.1 * rng.standard_normal(truth.shape), 0, 1)
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    expected = structural_similarity(image, truth, data_range=1, **settings)
    with mock.patch.object(compare_losses, "MS_SSIM_WEIGHTS", np.ones(1)):
        assert compare_losses.ms_ssim(image, truth) == pytest.approx(expected, abs=1e-9)
    assert compare_losses.ms_ssim(truth, truth) == pytest.approx(1.0)
    assert expected < compare_losses.ms_ssim(image, truth) < 1


def test_the_tiny_checkpoint_is_whole_and_small():
    folder = ROOT / "configs" / "tiny" / "checkpoint"
    verify_manifest(folder)
    _, report = load_pretrained(folder)
    assert (report.share, report.recomputed) == (1.0, ())
    assert sum(p.stat().st_size for p in folder.iterdir()) < 12 * 2**20


def test_no_number_stands_in_two_places_of_the_launch():
    """The demo's arguments are in its YAML, so its script names only files."""
    script = (ROOT / "scripts/tiny/demo.sh").read_text()
    train = script[script.index("train/main") : script.index('restore "$(')]
    assert set(re.findall(r"--(\w+)", train)) == {"config", "dataset_config_file", "checkpoint_dir"}


@pytest.mark.parametrize("script", sorted(ROOT.glob("scripts/**/*.sh")), ids=lambda p: p.name)
def test_shell_scripts_parse(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert "set -euo pipefail" in script.read_text()


def test_readme_names_what_exists():
    readme = (ROOT / "README.md").read_text()
    paths = re.findall(
        r"\b(?:configs|scripts|train|docs|tests|inference_pipeline)/[\w./-]+", readme
    )
    assert len(paths) > 8
    missing = [p for p in paths if not (ROOT / p.rstrip(".")).exists()]
    assert missing == []
    python = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert python
    for block in python:
        compile(block, "README.md", "exec")


def test_the_training_guide_names_what_exists():
    page = (ROOT / "docs" / "training.md").read_text()
    code = "".join(path.read_text() for path in (ROOT / "train").glob("*.py"))
    names = {*re.findall(r"`([a-z0-9]+(?:_[a-z0-9]+)+)`", page)}
    assert len(names) > 50
    assert [name for name in names if not re.search(rf"\b{name}\b", code)] == []
    options = {*re.findall(r" --([a-z_]+)", page)} - {"help", "out", "config", "nodes", "preserve"}
    assert options <= TYPES.keys() | {"gpus"}
    files = re.findall(r"(?:configs|scripts|train|tests)/[\w./-]+\w", page)
    assert [file for file in files if not (ROOT / file).exists() and file != "train/NAME"] == []
    assert f"| {STOP_EXIT_CODE} |" in page


def test_readme_example_record_is_valid():
    from data.records import parse_record

    readme = (ROOT / "README.md").read_text()
    line = re.search(r"```json\n(.*?)```", readme, re.DOTALL)
    assert line is not None
    record = parse_record(json.dumps(json.loads(line.group(1))), "README.md:1")
    assert (record.instruction, record.assessment) == ("Remove the noise.", "Moderate noise.")
