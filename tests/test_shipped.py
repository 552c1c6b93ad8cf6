"""Every YAML, script and README command that ships is a test case."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from modeling.pretrained import load_pretrained, verify_manifest
from train.arguments import parse_arguments
from train.build import build_terms

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(ROOT.glob("configs/**/*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_config_resolves(path):
    args = parse_arguments(["--config", str(path)])
    assert build_terms(args.training)
    for name in yaml.safe_load(path.read_text()):
        assert name == "extends" or name in args.flat()


def test_v3_is_the_preset_that_users_settled_on():
    training = parse_arguments(
        ["--config", str(ROOT / "configs/experiments/ssim_v3.yaml")]
    ).training
    found = training.ssim_loss_weight, training.ssim_loss_max_t, training.ssim_grad_scale
    assert found == (0.1, 0.1, 0.01)
    assert (training.ssim_window_size, training.ema, training.max_grad_norm) == (11, 0.995, 1.0)
    assert training.finetune_from_ema and training.freeze_vit and training.freeze_vae


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


def test_readme_example_record_is_valid():
    from data.records import parse_record

    readme = (ROOT / "README.md").read_text()
    line = re.search(r"```json\n(.*?)```", readme, re.DOTALL)
    assert line is not None
    record = parse_record(json.dumps(json.loads(line.group(1))), "README.md:1")
    assert (record.instruction, record.assessment) == ("Remove the noise.", "Moderate noise.")
