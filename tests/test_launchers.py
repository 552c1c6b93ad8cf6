"""Every launcher: what it starts, what it refuses, and its row in docs/launchers.md."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from data.config import load_mixture
from tests.helpers import write_mixture, write_pairs
from tests.launchers import (
    FOLDER,
    LAUNCHERS,
    PAGE,
    ROOT,
    TABLE,
    TRAINER,
    dry_run,
    free_port,
    launch,
    option,
    own_experiment,
    resolved,
    table,
)
from train.main_sr_pixel_loss import main

BASE, UNIF, EYE = "models/UniMedVL", "trainonly", "trainonly_eyeQ"
STAGE1 = "stage1_medq_unif_multinode"
EYE_PIXEL = f"results/{STAGE1}_eyeQ1_sr_pixel_loss/0002000"
V3 = (0.1, 0.1, 11, 0.01)
LONG = (2.5e-6, (13_000, 14_000, 12_000))
USERS_RUNS = {
    "ixi_t1_medq_ver1": (4, 51, 25, 1e-6, (18_000, 20_000, 18_000), 0, 0, BASE, "ixi_t1"),
    "stage1_medq_unif": (8, 7000, 2000, 1e-6, (28_000, 30_000, 28_000), 0, 0, BASE, UNIF),
    STAGE1: (8, 26_001, 4000, 1e-6, (25_000, 30_000, 25_000), 0, 0, BASE, UNIF),
    f"{STAGE1}_eyeQ1": (8, 10_000, 2000, 1e-6, (25_000, 30_000, 25_000), 0, 0, BASE, EYE),
    f"{STAGE1}_eyeQ2_ctu_from_stage1": (
        *(8, 2001, 500, 1e-6, (25_000, 30_000, 25_000), 0, 0),
        *(f"results/{STAGE1}/0024000", EYE),
    ),
    f"{STAGE1}_eyeQ1_sr_pixel_loss": (
        *(8, 12_000, 2000, 1e-6, (18_000, 20_000, 18_000), (50, "l2", 1, 2, True), 0),
        *(EYE_PIXEL, EYE),
    ),
    f"{STAGE1}_eyeQ1_sr_pixel_loss_small_max_T": (
        *(8, 36_000, 4500, 2.5e-6, (14_000, 16_000, 10_000), (1e4, "l2", 0.2, 2, True), 0),
        *(BASE, UNIF),
    ),
    f"{STAGE1}_eyeQ1_sr_pixel_loss_small_max_T_large_pixel_weight": (
        *(8, 12_000, 2000, 2.5e-6, (18_000, 20_000, 18_000), (1e4, "l2", 0.2, 2, True), 0),
        *(EYE_PIXEL, EYE),
    ),
    f"{STAGE1}_sr_pixel_loss_small_max_T_large_pixel_weight": (
        *(8, 144_000, 5000, *LONG, (1e4, "l2", 0.2, 1, False), 0, BASE, UNIF),
    ),
    f"{STAGE1}_sr_pixel_loss_small_max_T_small_pixel_weight": (
        *(8, 288_000, 5000, *LONG, (1e3, "l2", 0.2, 2, True), 0, BASE, UNIF),
    ),
    f"{STAGE1}_eyeQ1_sr_ssim_loss": (
        *(4, 20_000, 2000, 2.5e-6, (18_000, 20_000, 18_000), 0, V3, BASE, EYE),
    ),
    f"{STAGE1}_sr_ssim_loss_v3": (8, 288_000, 5000, *LONG, 0, V3, BASE, UNIF),
    f"{STAGE1}_sr_ssim_loss_v3_deepspeed": (8, 288_000, 5000, *LONG, 0, V3, BASE, UNIF),
}
"""GPUs, steps, save_every, lr, tokens, pixel loss (weight, type, max_t, images at once, adaptive),
SSIM loss (weight, max_t, window, gradient), start and data of the runs that users made."""
EVERYWHERE = {
    "data_seed": 3432,
    "max_checkpoints": 5,
    "resume_model_only": True,
    "resume_model_optimizer": False,
    "finetune_from_hf": True,
    "finetune_from_ema": True,
    "auto_resume": True,
    "layer_module": "Qwen2MoTDecoderLayer",
    "max_latent_size": 64,
    "num_workers": 1,
    "text_cond_dropout_prob": 0,
    "vae_cond_dropout_prob": 0,
    "vit_cond_dropout_prob": 0,
    "freeze_llm": False,
    "freeze_vit": True,
    "freeze_vae": True,
    "freeze_und": False,
    "copy_init_moe": True,
    "sharding_strategy": "HYBRID_SHARD",
    "ema": 0.995,
    "log_every": 1,
    "ce_weight": 0.25,
    "mse_weight": 1,
    "max_grad_norm": 1,
    "zero_stage": 2,
    "bf16": True,
    "activation_checkpointing": True,
    "wandb_name": "EXP",
    "checkpoint_dir": "results/EXP",
}
"""What all of these runs had in common."""


@pytest.mark.parametrize("run", USERS_RUNS)
def test_launchers_start_what_users_ran(run):
    gpus, steps, save, lr, tokens, pixel, ssim, start, data = USERS_RUNS[run]
    command = dry_run(f"train_sft_{run}", "EXP")
    a = resolved(command).flat()
    assert option(command, "--nproc_per_node") == str(gpus)
    assert (a["total_steps"], a["save_every"], a["lr"]) == (steps, save, lr)
    sizes = ("expected_num_tokens", "max_num_tokens", "max_num_tokens_per_sample")
    assert tuple(a[size] for size in sizes) == tokens
    names = ("weight", "type", "max_t", "chunk_size", "adaptive_chunk")
    found = tuple(a[f"pixel_loss_{name}"] for name in names)
    assert found == pixel if pixel else found[0] == 0
    names = ("loss_weight", "loss_max_t", "window_size", "grad_scale")
    found = tuple(a[f"ssim_{name}"] for name in names)
    assert found == ssim if ssim else found[0] == 0
    assert (a["resume_from"] or a["model_path"]) == start
    assert Path(a["dataset_config_file"]).stem.removesuffix("_medq_ver1").endswith(data)
    assert {name: a[name] for name in EVERYWHERE} == EVERYWHERE
    assert a["backend"] == ("deepspeed" if run.endswith("deepspeed") else "auto")


def test_every_launcher_is_tested_and_in_the_table():
    own = {f"train_sft_{run}" for run in USERS_RUNS} | {"train_sft"}
    assert {p.stem for p in LAUNCHERS if own_experiment(p)} == own
    others = {p.stem for p in LAUNCHERS} - own
    assert others == {"train_sft_generic", "train_sft_generic_clma"}
    written = TABLE.search(PAGE.read_text())
    assert written is not None and written.group() == table(), "run python -m tests.launchers"
    assert table().count("\n") == len(own) + 2


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda p: p.stem)
def test_one_node_and_a_cluster(launcher):
    own = {} if own_experiment(launcher) else {"CONFIG": "configs/experiments/sft.yaml"}
    cluster = {"NODE_COUNT": "3", "NODE_RANK": "2", "MASTER_ADDR": "node0"}
    one_node = cluster | {"NODE_COUNT": "1", "NODE_RANK": "0"} if "clma" in launcher.stem else {}
    single = dry_run(launcher.stem, "EXP", "2", "1234", **own, **one_node)
    names = ("--nnodes", "--node_rank", "--nproc_per_node", "--master_port")
    assert [option(single, name) for name in names] == ["1", "0", "2", "1234"]
    assert option(single, "--master_addr") == one_node.get("MASTER_ADDR", "localhost")
    assert "NCCL_DEBUG=WARN" in single and "TORCH_NCCL_ASYNC_ERROR_HANDLING=1" in single
    several = dry_run(launcher.stem, "EXP", PROC_PER_NODE="6", **own, **cluster)
    assert [option(several, name) for name in names] == ["3", "2", "6", "23456"]
    assert option(several, "--master_addr") == "node0"
    resolved(several)


def test_variables_and_trailing_arguments():
    variables = {
        "MODEL_PATH": "my models/a",
        "DATA_ROOT": "d",
        "DATASET_CONFIG": "m.yaml",
        "START_FROM": "results/x/0000005",
        "DEVICE": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "CHECKPOINT_DIR": "runs/$a b",
        "BACKEND": "deepspeed",
        "MASTER_PORT": "77",
        "NCCL_DEBUG": "INFO",
    }
    words = ("EXP", "3", "--", "--lr", "0.5", "--wandb_name", "it's")
    command = dry_run("train_sft_ixi_t1_medq_ver1", *words, **variables)
    a = resolved(command).flat()
    expected = {
        "model_path": "my models/a",
        "data_root": "d",
        "dataset_config_file": "m.yaml",
        "resume_from": "results/x/0000005",
        "device": "cpu",
        "checkpoint_dir": "runs/$a b",
        "backend": "deepspeed",
        "lr": 0.5,
        "wandb_name": "it's",
        "save_every": 25,
    }
    assert {name: a[name] for name in expected} == expected
    assert option(command, "--master_port") == "77" and "NCCL_DEBUG=INFO" in command
    unset = dry_run("train_sft_stage1_medq_unif", "EXP", "--", "--resume_from", "None")
    assert resolved(unset).training.resume_from is None


def test_visible_devices_override_the_number_of_gpus():
    done = launch("train_sft", "EXP", "8", DRY_RUN="1", CUDA_VISIBLE_DEVICES="3,5")
    assert "WARNING: CUDA_VISIBLE_DEVICES lists 2 GPUs, which overrides 8" in done.stderr
    assert "--nproc_per_node 2 " in done.stdout
    agreed = launch("train_sft", "EXP", "2", DRY_RUN="1", CUDA_VISIBLE_DEVICES="3,5")
    assert agreed.stderr == "" and "--nproc_per_node 2 " in agreed.stdout


@pytest.mark.parametrize(
    ("words", "environment", "message"),
    [
        ((), {}, "usage: "),
        (("a", "1", "2", "3", "4"), {}, "usage: "),
        (("two words",), {}, "EXP_NAME='two words' names a folder"),
        (("../up",), {}, "EXP_NAME='../up' names a folder"),
        (("a", "--lr", "1"), {}, "--lr: arguments of the trainer come after --"),
        (("a", "many"), {}, "NUM_GPUS or PROC_PER_NODE=many"),
        (("a", "1", "x"), {}, "MASTER_PORT=x is no port"),
        (("a", "1", "1", "0"), {}, "NUM_NODES or NODE_COUNT=0"),
        (("a", "1", "1", "2"), {}, "NODE_RANK is not set: a run on 2 nodes"),
        (("a",), {"NODE_COUNT": "2", "NODE_RANK": "0"}, "MASTER_ADDR is not set"),
        (("a",), {"NODE_COUNT": "2", "MASTER_ADDR": "n"}, "NODE_RANK is not set"),
        (("a",), {"NODE_RANK": "1"}, "NODE_RANK=1 is none of the nodes: NODE_COUNT=1"),
        (("a",), {"CUDA_VISIBLE_DEVICES": ""}, "CUDA_VISIBLE_DEVICES is empty"),
    ],
)
def test_refusals_name_what_to_change(words, environment, message):
    done = launch("train_sft", *words, DRY_RUN="1", **environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {message}")


def test_the_back_end_may_come_from_an_extended_file_or_the_command_line(tmp_path):
    deepspeed = (ROOT / "configs" / "experiments").glob("*_deepspeed.yaml")
    own = tmp_path / "own.yaml"
    own.write_text(f"extends: {next(deepspeed)}\nlr: 0.5\n")
    a = resolved(dry_run("train_sft_generic", "EXP", CONFIG=str(own))).training
    assert (a.backend, a.lr) == ("deepspeed", 0.5)
    assert resolved(dry_run("train_sft", "E", "--", "--backend", "deepspeed")).training.lr


def test_generic_launchers_need_your_file():
    cluster = {"NODE_COUNT": "1", "NODE_RANK": "0", "MASTER_ADDR": "n", "CONFIG": "nowhere.yaml"}
    for name, variables in (("train_sft_generic", ["CONFIG"]), ("train_sft_generic_clma", cluster)):
        for variable in variables:
            given = {key: value for key, value in cluster.items() if key != variable}
            done = launch(name, "EXP", DRY_RUN="1", **given)
            assert done.returncode != 0 and f"{variable} is not set" in done.stderr
    done = launch("train_sft_generic", "EXP", CONFIG="nowhere.yaml")
    assert done.returncode == 2 and "CONFIG=nowhere.yaml: there is no such file" in done.stderr


def test_a_launcher_trains_and_its_folder_is_its_own(tmp_path):
    """From the shell through torchrun to a checkpoint, on the CPU."""
    write_pairs(tmp_path / "pairs", 4)
    sizes = {"image_stride": 8, "max_image_size": 24, "min_image_size": 16}
    folders = (tmp_path / "mixture.yaml", tmp_path / "pairs")
    mixture = write_mixture(*folders, image_transform_args=sizes)
    tiny = {
        "CONFIG": "configs/tiny/demo.yaml",
        "DATASET_CONFIG": str(mixture),
        "CHECKPOINT_DIR": str(tmp_path / "run"),
        "PYTHON": sys.executable,
        "DEVICE": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    short = ("--total_steps", "1", "--expected_num_tokens", "100", "--async_save", "False")
    words = ("EXP", "1", free_port(), "--", *short)
    done = launch("train_sft_generic", *words, **tiny)
    assert done.returncode == 0, done.stderr + done.stdout
    assert (tmp_path / "run" / "0000001" / "manifest.json").exists()
    saved = json.loads((tmp_path / "run" / "training_args.json").read_text())
    assert saved["config"] == "configs/tiny/demo.yaml"
    again = launch("train_sft_generic", *words, DRY_RUN="1", **tiny)
    assert again.returncode == 0
    other = launch("train_sft_stage1_medq_unif", *words, DRY_RUN="1", **tiny)
    assert (other.returncode, other.stdout) == (2, "")
    told = f"{tmp_path}/run is the run folder of configs/tiny/demo.yaml, not of configs/experiments"
    assert told in other.stderr


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda p: p.stem)
def test_what_launchers_start_passes_the_dry_run(launcher, tmp_path, capsys, monkeypatch):
    """Their arguments with the tiny model in place of the large one, as 2 nodes of 4 processes."""
    monkeypatch.chdir(ROOT)
    write_pairs(tmp_path / "pairs", 4)
    sizes = {"image_stride": 8, "max_image_size": 24, "min_image_size": 16}
    mixture = write_mixture(tmp_path / "m.yaml", tmp_path / "pairs", image_transform_args=sizes)
    tiny = {
        "MODEL_PATH": "configs/tiny/checkpoint",
        "START_FROM": "configs/tiny/checkpoint",
        "DATASET_CONFIG": str(mixture),
        "CHECKPOINT_DIR": str(tmp_path / "run"),
        "DEVICE": "cpu",
        "NODE_COUNT": "2",
        "NODE_RANK": "0",
        "MASTER_ADDR": "node0",
    }
    if not own_experiment(launcher):
        tiny["CONFIG"] = "configs/experiments/sft.yaml"
    small = {"max_latent_size": 16, "expected_num_tokens": 100, "max_num_tokens": 300}
    small |= {"max_num_tokens_per_sample": 200, "dry_run": True, "resume_model_only": True}
    extra = [word for name, value in small.items() for word in (f"--{name}", str(value))]
    command = dry_run(launcher.stem, "EXP", "4", **tiny)
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(SystemExit) as ended:
        main(command[command.index(TRAINER) + 1 :] + extra)
    page = capsys.readouterr().out
    assert ended.value.code == 0, page
    t = resolved(command).training
    kind, mesh = ("deepspeed", (1, 8)) if t.backend == "deepspeed" else ("fsdp", (2, 4))
    assert re.search(rf"{kind}.*: {mesh[0]} \(replicate\) x {mesh[1]} \(shard\) = 8", page)
    assert "loaded EMA weights from configs/tiny/checkpoint" in page
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_reach_the_trainer_and_its_exit_code_comes_back(tmp_path, number):
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import os, pathlib, signal, sys, time\n"
        f"signal.signal({int(number)}, lambda *_: sys.exit(85))\n"
        "pathlib.Path(sys.argv[1], os.environ['RANK']).touch()\n"
        "time.sleep(60)\n"
    )
    program = [sys.executable, str(FOLDER / "lib" / "torchrun.py")]
    place = ["--nproc_per_node", "2", "--master_addr", "localhost", "--master_port", free_port()]
    ready = tmp_path / "ready"
    ready.mkdir()
    with subprocess.Popen([*program, *place, str(worker), str(ready)]) as run:
        deadline = time.monotonic() + 50
        while len(list(ready.iterdir())) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        run.send_signal(number)
        assert run.wait(timeout=30) == 85


def test_slurm_starts_every_node_and_queues_again_on_the_trainers_word(tmp_path):
    """With programs in the place of Slurm's: the second node's task, and an exit code."""
    programs = {
        "scontrol": f'echo "$@" >>{tmp_path}/asked; [[ $1 != show ]] || printf "node7\\nnode8\\n"',
        "srun": 'SLURM_NODEID=1 "$@"; exit "$CODE"',
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "41",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_GPUS_ON_NODE": "4",
        "DRY_RUN": "1",
    }
    script = ["bash", "scripts/training/lib/slurm.sbatch", "scripts/training/train_sft.sh", "EXP"]

    def submit(code: str) -> subprocess.CompletedProcess[str]:
        environment = slurm | {"CODE": code}
        return subprocess.run(script, env=environment, cwd=ROOT, capture_output=True, text=True)

    done = submit("85")
    assert done.returncode == 85, done.stderr
    command = done.stdout.split()
    names = ("--nnodes", "--node_rank", "--nproc_per_node", "--master_addr", "--master_port")
    assert [option(command, name) for name in names] == ["2", "1", "4", "node7", "20041"]
    assert (tmp_path / "asked").read_text().splitlines() == [
        "show hostnames node[7-8]",
        "requeue 41",
    ]
    assert [submit(code).returncode for code in ("0", "1")] == [0, 1]
    assert (tmp_path / "asked").read_text().count("requeue") == 1


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/data/*.yaml")), ids=lambda p: p.stem)
def test_mixtures_parse_where_their_files_are(path, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load_mixture(path, tmp_path)
    (task,) = yaml.safe_load(path.read_text()).values()
    for dataset in task["datasets"]:
        file = Path(dataset["jsonl_path"].replace("${data_root}", str(tmp_path)))
        file.parent.mkdir()
        file.touch()
    (group,) = load_mixture(path, tmp_path)
    counts = {"train_stage1_medq_unif_trainonly": 12}
    assert len({d.jsonl_path for d in group.datasets}) == counts.get(path.stem, 1)
    rules = group.image_transform_args, group.vit_image_transform_args
    found = [(r.image_stride, r.max_image_size, r.min_image_size) for r in rules]
    assert found == [(16, 1024, 128), (14, 518, 224)]
