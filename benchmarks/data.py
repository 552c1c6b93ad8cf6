"""The data layer: start-up on ten million lines, time of a batch, how full packs are.

    python benchmarks/data.py [--lines 10000000] [--line_bytes 240] [--rounds 20]

Lines are written to a temporary file that is removed afterwards; they are shorter than those of
most data sets, whose file would take several times the disk and the time of reading it. A process
of its own then starts the stream: index of the lines, order of the epoch, first pack. Its peak
resident memory is all that it held, torch included. Where more processes want to run than there are
cores, CPU time counts, as `benchmarks/measure.py` does it.
A batch is read, decoded and packed in the process that waits for it; the tiny model's step is a
forward and a backward pass over the same batch, on one thread as well.
Exit code 1: a target was missed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from data.config import load_mixture  # noqa: E402
from data.loader import PackedLoader  # noqa: E402
from data.packer import PackerConfig  # noqa: E402
from data.stream import LoaderConfig, Planner  # noqa: E402
from data.tokenizer import Tokenizer  # noqa: E402
from modeling.bagel.bagel import Bagel  # noqa: E402
from modeling.bagel.losses import CrossEntropy, LossSet, VelocityMSE  # noqa: E402
from modeling.pretrained import load_pretrained  # noqa: E402

BUSY = os.getloadavg()[0] > (os.cpu_count() or 1)
clock = time.process_time if BUSY else time.perf_counter
CHECKPOINT = ROOT / "configs" / "tiny" / "checkpoint"
MAX_SECONDS, MAX_BYTES = 60.0, 10**9
PAIRS, SIDE, PACKS = 64, 64, 300
SIDES = (64, 96, 128, 192, 256)
"""Of the images whose packs are planned, in pixels."""
LOADER = {"expected_num_tokens": 3200, "max_num_tokens": 4096, "max_num_tokens_per_sample": 1024}
RULES = {
    "image_transform_args": {"image_stride": 16, "max_image_size": 256, "min_image_size": 64},
    "vit_image_transform_args": {"image_stride": 14, "max_image_size": 112, "min_image_size": 56},
}


def record(name: str, width: int, height: int) -> str:
    image = [{"path": name, "width": width, "height": height}]
    said = [{"from": "human", "value": "Denoise."}, {"from": "gpt", "value": "Noise."}]
    return json.dumps({"input_img": image, "output_img": image, "message": said})


def write_lines(path: Path, lines: int, line_bytes: int) -> None:
    """Numbered records, with spaces up to one length."""
    line = record("%08d", SIDE, SIDE).ljust(line_bytes - 1) + "\n"
    block = 100_000
    with path.open("w") as file:
        for first in range(0, lines, block):
            numbers = range(first, min(first + block, lines))
            file.write("".join(line % (n, n) for n in numbers))


def write_mixture(folder: Path) -> Path:
    dataset = {"name": "lines", "jsonl_path": "${data_root}/train.jsonl"}
    content = {"restoration": RULES | {"datasets": [dataset]}}
    (folder / "mixture.yaml").write_text(yaml.safe_dump(content))
    return folder / "mixture.yaml"


def packing(model: Bagel | None = None, **changes: int) -> PackerConfig:
    sizes = {"latent_stride": 16, "max_latent_size": 16, "vit_patch_size": 14}
    return PackerConfig(**(sizes | {"vit_max_num_patch_per_side": 16} | changes))


def peak_resident_bytes() -> int:
    """Of this process alone; `getrusage` begins with what its parent held."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def start(mixture: Path) -> None:
    """In a process of its own: prints seconds, records, the last line's number, and memory before
    and after."""
    tokenizer, before, begin = Tokenizer(CHECKPOINT), peak_resident_bytes(), clock()
    planner = Planner(load_mixture(mixture), LoaderConfig(**LOADER), packing(), tokenizer)
    planner.next_pack()
    seconds, records = clock() - begin, planner.datasets[0].records
    last = records[len(records) - 1].source.rpartition(":")[2]
    print(json.dumps([seconds, len(records), int(last), before, peak_resident_bytes()]))


def measure_start(lines: int, line_bytes: int) -> bool:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_lines(folder / "train.jsonl", lines, line_bytes)
        size = (folder / "train.jsonl").stat().st_size
        command = [sys.executable, __file__, "--start", str(write_mixture(folder))]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    seconds, records, last, before, after = json.loads(told)
    print(
        f"start: {records:,} lines ({size / 1e9:.2f} GB) in {seconds:.1f} s "
        f"(target {MAX_SECONDS:g}), peak {after / 1e9:.2f} GB (target {MAX_BYTES / 1e9:g}), "
        f"{before / 1e9:.2f} GB of it imports"
    )
    return records == last == lines and seconds < MAX_SECONDS and after < MAX_BYTES


def median(run: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds + 1):
        begin = clock()
        run()
        times.append(clock() - begin)
    return statistics.median(times[1:])


def measure_batches(rounds: int) -> bool:
    torch.set_num_threads(1)
    model, _ = load_pretrained(CHECKPOINT, "ema")
    model.losses = LossSet((CrossEntropy(), VelocityMSE()))
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for i in range(PAIRS):
            coarse = Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8))
            coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
        lines = [record(f"{i}.png", SIDE, SIDE) for i in range(PAIRS)]
        (folder / "train.jsonl").write_text("\n".join(lines))
        sizes = {
            "latent_stride": model.config.latent_stride,
            "max_latent_size": model.config.max_latent_size,
            "vit_patch_size": model.config.vit_patch,
            "vit_max_num_patch_per_side": model.config.vit_max_num_patch_per_side,
        }
        config = LoaderConfig(**LOADER, num_workers=0)
        mixture = load_mixture(write_mixture(folder))
        packs = PackedLoader(mixture, config, packing(**sizes), Tokenizer(CHECKPOINT))
        ready = median(packs.next_batch, rounds)
        batch = packs.next_batch()

    def step() -> None:
        sum(term.sum for term in model(batch).values()).backward()

    consumed = median(step, max(1, rounds // 4))
    print(
        f"a batch of {len(batch.sample_lens)} samples, {batch.num_tokens} tokens: ready in "
        f"{1e3 * ready:.0f} ms, consumed in {1e3 * consumed:.0f} ms (target: ready sooner)"
    )
    return ready < consumed


def print_packing() -> None:
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = rng.choice(SIDES, (1000, 2)).tolist()
        (folder / "train.jsonl").write_text("\n".join(record("x", *size) for size in sizes))
        mixture, tokenizer = load_mixture(write_mixture(folder)), Tokenizer(CHECKPOINT)
        for waiting in (0, 50):
            limits = {"expected_num_tokens": LOADER["max_num_tokens"], "max_buffer_size": waiting}
            config = LoaderConfig(**(LOADER | limits))
            planner = Planner(mixture, config, packing(), tokenizer)
            packs = [sum(draw.tokens for draw in planner.next_pack()) for _ in range(PACKS)]
            full = statistics.mean(packs) / config.max_num_tokens
            print(f"packing: {full:.1%} of max_num_tokens with max_buffer_size={waiting}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lines", type=int, default=10_000_000)
    parser.add_argument("--line_bytes", type=int, default=240)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.start:
        start(args.start)
        return 0
    print("seconds of CPU time: the machine is busy" if BUSY else "seconds by the clock")
    print_packing()
    good = [measure_start(args.lines, args.line_bytes), measure_batches(args.rounds)]
    print("targets met" if all(good) else "A TARGET WAS MISSED")
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
