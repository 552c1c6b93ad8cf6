"""The launchers of scripts/training: what they start, and the table of docs/launchers.md.

python -m tests.launchers   # writes the table anew
"""

import contextlib
import os
import re
import shlex
import socket
import subprocess
from pathlib import Path

from train.arguments import RunArguments, parse_arguments

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "scripts" / "training"
LAUNCHERS = sorted(FOLDER.glob("*.sh"))
PAGE = ROOT / "docs" / "launchers.md"
TABLE = re.compile(r"(?<=<!-- table -->\n).*?(?=<!-- end of table -->)", re.DOTALL)
TRAINER = "train/main_sr_pixel_loss.py"


def launch(name: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a launcher with nothing but `environment` and the search path of programs."""
    kept = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "")}
    command = ["bash", str(FOLDER / f"{name}.sh"), *words]
    return subprocess.run(command, env=kept | environment, capture_output=True, text=True)


def dry_run(name: str, *words: str, **environment: str) -> list[str]:
    """The words of the command that a launcher would run."""
    done = launch(name, *words, DRY_RUN="1", **environment)
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout)


def resolved(command: list[str]) -> RunArguments:
    with contextlib.chdir(ROOT):
        return parse_arguments(command[command.index(TRAINER) + 1 :])


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return str(listener.getsockname()[1])


def row(name: str) -> list[str]:
    """What the table says of a launcher that has an experiment of its own."""
    command = dry_run(name, "EXP")
    args = resolved(command)
    model, data, t = args.model, args.data, args.training
    decoded = "adaptive" if t.pixel_loss_adaptive_chunk else t.pixel_loss_chunk_size
    pixel = (t.pixel_loss_weight, t.pixel_loss_type, t.pixel_loss_max_t, decoded)
    ssim = (t.ssim_loss_weight, t.ssim_loss_max_t, t.ssim_window_size, t.ssim_grad_scale)
    tokens = (data.expected_num_tokens, data.max_num_tokens, data.max_num_tokens_per_sample)
    cells = (
        f"`{name}`",
        option(command, "--nproc_per_node"),
        t.total_steps,
        t.save_every,
        t.lr,
        " / ".join(map(str, tokens)),
        f"{t.ce_weight:g} / {t.mse_weight:g}",
        ", ".join(map(str, pixel)) if t.pixel_loss_weight else "–",
        ", ".join(map(str, ssim)) if t.ssim_loss_weight else "–",
        f"`{t.resume_from or model.model_path}`",
        f"`{Path(str(data.dataset_config_file)).name}`",
        f"DeepSpeed, ZeRO {t.zero_stage}" if t.backend == "deepspeed" else "FSDP",
    )
    return list(map(str, cells))


def own_experiment(launcher: Path) -> bool:
    return "${CONFIG:" not in launcher.read_text()


def table() -> str:
    head = [
        *("launcher", "GPUs a node", "steps", "save every", "lr", "tokens: pack / most / sample"),
        *("CE / MSE", "pixel: weight, type, max_t, images at once"),
        *("SSIM: weight, max_t, window, gradient", "weights from", "data", "back end"),
    ]
    rows = [head, ["---"] * len(head), *(row(p.stem) for p in LAUNCHERS if own_experiment(p))]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


if __name__ == "__main__":
    PAGE.write_text(TABLE.sub(lambda _: table(), PAGE.read_text()))
