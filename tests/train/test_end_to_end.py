"""Two nodes from the shell to restored images: what is trained here is exported and restores."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file

from inference_pipeline.batch import main as restore
from scripts.tiny.make_pairs import BLUR, NOISE, RULES, TEST_FACTOR, TEST_SIGMA
from scripts.tiny.make_pairs import test_records as make_test_records
from tests.launchers import FOLDER, ROOT, dry_run, free_port, resolved
from train.build import build_trainer
from train.checkpoint import step_folders
from train.distributed import STOP_EXIT_CODE

LAUNCHER = "train_sft_stage1_medq_unif_multinode_eyeQ1_sr_ssim_loss"
NODES, PACKS = 2, 4
"""Launcher processes, and packs in a global batch however many processes share them."""
SETTINGS = {
    "max_latent_size": None,
    "bf16": False,
    "pixel_space_t_fraction": 0.5,
    "expected_num_tokens": 400,
    "max_num_tokens": 900,
    "max_num_tokens_per_sample": 900,
    "num_workers": 0,
    "enable_tensorboard": False,
    "lr": 1e-4,
    "warmup_steps": 2,
    "eps": 1e-8,
}
"""Where the run differs from the experiment of the launcher: its size, and rounding."""
MINUTES = 60
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """Three slices of a brain, each with noise and with a low resolution."""
    folder = tmp_path_factory.mktemp("end") / "pairs"
    records = make_test_records(folder, every=12)
    (folder / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    dataset = {"name": "brain", "jsonl_path": str(folder / "train.jsonl"), "data_dir": str(folder)}
    group = {"restoration": {**RULES, "datasets": [dataset]}}
    (folder / "mixture.yaml").write_text(yaml.safe_dump(group))
    return folder


def words(processes: int, total_steps: int) -> list[str]:
    """What follows the launcher's name; `processes` in all share a global batch."""
    changes = {"total_steps": total_steps, "gradient_accumulation_steps": PACKS // processes}
    options = [f"--{name}={value}" for name, value in (SETTINGS | changes).items()]
    return ["two_nodes", "--", *options]


def variables(pairs: Path, run: Path) -> dict[str, str]:
    return {
        "MODEL_PATH": "configs/tiny/checkpoint",
        "DATASET_CONFIG": str(pairs / "mixture.yaml"),
        "CHECKPOINT_DIR": str(run),
        "PYTHON": sys.executable,
        "DEVICE": "cpu",
        "OMP_NUM_THREADS": "1",
    }


class Nodes:
    """The launcher, once for every node, all on this machine."""

    def __init__(self, pairs: Path, run: Path, processes_per_node: int, total_steps: int) -> None:
        kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        together = variables(pairs, run) | {
            "NODE_COUNT": str(NODES),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": free_port(),
            "PROC_PER_NODE": str(processes_per_node),
        }
        command = ["bash", str(FOLDER / f"{LAUNCHER}.sh")]
        command += words(NODES * processes_per_node, total_steps)
        self.logs = [run.with_suffix(f".{total_steps}.{rank}.log") for rank in range(NODES)]
        self.agents = []
        for rank, log in enumerate(self.logs):
            environment = kept | together | {"NODE_RANK": str(rank)}
            with log.open("w") as file:
                self.agents.append(
                    subprocess.Popen(command, env=environment, stdout=file, stderr=file)
                )

    def codes(self) -> list[int]:
        """Exit codes in the order of the nodes."""
        try:
            return [agent.wait(timeout=5 * MINUTES) for agent in self.agents]
        finally:
            for agent in self.agents:
                agent.kill()

    def told(self) -> str:
        return "\n".join(log.read_text() for log in self.logs)


def lines(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


@pytest.fixture(scope="module")
def stopped_at(pairs) -> int:
    """A run on two nodes of one process each, of which one is told to stop; its last step."""
    run = pairs.parent / "run"
    nodes = Nodes(pairs, run, 1, total_steps=1000)
    deadline = time.monotonic() + 5 * MINUTES
    while len(lines(run)) < 2 and time.monotonic() < deadline:
        assert all(agent.poll() is None for agent in nodes.agents), nodes.told()
        time.sleep(0.05)
    nodes.agents[1].send_signal(signal.SIGTERM)
    assert nodes.codes() == [STOP_EXIT_CODE] * NODES, nodes.told()
    (folder,) = step_folders(run)
    assert f"a signal came; saved at step {int(folder.name)}" in nodes.told()
    return int(folder.name)


@pytest.fixture(scope="module")
def finished(pairs, stopped_at) -> Path:
    """The same run continued on two processes a node for two steps: the last step's folder."""
    nodes = Nodes(pairs, run := pairs.parent / "run", 2, total_steps=stopped_at + 2)
    assert nodes.codes() == [0] * NODES, nodes.told()
    assert f"resumed from {run}/{stopped_at:07d} at step {stopped_at}" in nodes.told()
    assert f"fsdp: {NODES} (replicate) x 2 (shard) = {2 * NODES}\n" in nodes.told()
    return step_folders(run)[-1]


def test_two_nodes_with_a_stop_take_the_steps_of_one_process(pairs, stopped_at, finished):
    single = pairs.parent / "single"
    given = words(1, stopped_at + 2)
    with contextlib.chdir(ROOT):
        build_trainer(resolved(dry_run(LAUNCHER, *given, **variables(pairs, single)))).fit()
    found, expected = lines(finished.parent), lines(single)
    assert [line["step"] for line in found] == list(range(1, stopped_at + 3))
    assert any("ssim" in line for line in expected)
    for ours, right in zip(found, expected, strict=True):
        assert ours.keys() == right.keys()
        for name in ("ce", "mse", "ssim", "total_norm", "loss_total"):
            if name in right:
                # Of a sure answer the cross-entropy is its own rounding.
                close = pytest.approx(right[name], rel=1e-5, abs=1e-7)
                assert ours[name] == close, (name, right["step"])
        assert ours["tokens"] == right["tokens"]
    last = finished, single / finished.name
    averages, right = (load_file(folder / "ema.safetensors") for folder in last)
    for name, average in averages.items():
        assert (average - right[name]).norm() <= 1e-4 * right[name].norm(), name


def test_what_two_nodes_have_trained_is_exported(finished, tmp_path):
    command = [sys.executable, "-m", "scripts.tools.export"]
    done = subprocess.run(
        [*command, "--checkpoint", str(finished), "--out", str(tmp_path / "out")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "velocity: relative error 0.0e+00" in done.stdout
    exported, saved = (load_file(f / "ema.safetensors") for f in (tmp_path / "out", finished))
    start = load_file(ROOT / "configs" / "tiny" / "checkpoint" / "ema.safetensors")
    assert exported.keys() == saved.keys() == start.keys()
    assert all(exported[name].equal(saved[name]) for name in saved)
    # It is what was trained: the generation expert has left the start.
    moved = [name for name in saved if not saved[name].equal(start[name])]
    assert any("_moe_gen" in name for name in moved)
    assert not any(name.startswith("vit_model.") for name in moved)


@pytest.mark.parametrize("weights", ["ema", "model"])
def test_a_step_folder_restores_and_tells_what_it_sees(pairs, finished, tmp_path, weights):
    options = {
        "model_path": finished,
        "annotation_file": pairs / "train.jsonl",
        "image_root": pairs,
        "output_dir": tmp_path,
        "num_timesteps": 2,
        "max_text_tokens": 32,
        "num_samples": 2,
        "target_gpu_device": "cpu",
    }
    words = [f"--{name}={value}" for name, value in options.items()]
    assert restore([*words, f"--use_{weights}_checkpoint"]) == 0
    assert json.loads((tmp_path / "settings.json").read_text())["checkpoint"].startswith(weights)
    noise, blur = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert noise["understanding_text"] == NOISE[TEST_SIGMA]
    assert blur["understanding_text"] == BLUR[TEST_FACTOR]
    for result in (noise, blur):
        restored = Image.open(tmp_path / result["pred_img"])
        assert restored.size == Image.open(tmp_path / result["saved_output_img"]).size
        assert result["psnr"] > result["psnr_input"] + 3
