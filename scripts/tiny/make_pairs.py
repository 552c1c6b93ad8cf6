"""Paired restoration data from the shipped images: noise removal and super-resolution.

    python -m scripts.tiny.make_pairs --out build/demo/data --train 480

Writes PNG images, `train.jsonl`, `test.jsonl` and `mixture.yaml`. Training images come from the
training part of the volume (and, with --others, from other modalities), test images from the
held-out part, with the same degradations whatever the seed.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from data.degradations import low_resolution, rician_noise
from scripts.tiny.images import (
    SLICE_HEIGHT,
    SLICE_WIDTH,
    augment,
    held_out_slices,
    other_images,
    random_crop,
    training_slices,
)

NOISE = {
    0.05: "Mild noise.",
    0.08: "Moderate noise.",
    0.12: "Strong noise.",
    0.2: "Very strong noise.",
}
BLUR = {
    2: "Low resolution, factor two.",
    4: "Low resolution, factor four.",
    8: "Low resolution, factor eight.",
}
TEST_SIGMA, TEST_FACTOR = 0.08, 4
INSTRUCTIONS = {"denoising": "Remove the noise.", "super-resolution": "Increase the resolution."}
RULES = {
    "image_transform_args": {"image_stride": 8, "max_image_size": 112, "min_image_size": 96},
    "vit_image_transform_args": {"image_stride": 14, "max_image_size": 112, "min_image_size": 98},
}


def denoising(clean_01: np.ndarray, sigma: float, rng: np.random.Generator) -> tuple:
    return rician_noise(clean_01, sigma, rng), "denoising", f"rician_{sigma}", NOISE[sigma]


def super_resolution(clean_01: np.ndarray, factor: int) -> tuple:
    return low_resolution(clean_01, factor), "super-resolution", f"x{factor}", BLUR[factor]


def _save(image_01: np.ndarray, folder: Path, name: str) -> dict[str, object]:
    path = folder / "images" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.round(image_01 * 255).astype(np.uint8)).save(path)
    height, width = image_01.shape[:2]
    return {"path": f"images/{name}.png", "height": height, "width": width}


def _record(folder: Path, name: str, clean_01: np.ndarray, degraded: tuple, dataset: str) -> dict:
    image_01, task, degrade_type, assessment = degraded
    return {
        "main_task_type": task,
        "sub_task_type": "restoration",
        "degrade_type": degrade_type,
        "dataset": dataset,
        "input_img": [_save(image_01, folder, f"{name}_input")],
        "output_img": [_save(clean_01, folder, f"{name}_clean")],
        "message": [
            {"from": "human", "value": f"<image>\n{INSTRUCTIONS[task]}"},
            {"from": "gpt", "value": assessment},
        ],
    }


def training_records(
    folder: Path,
    count: int,
    others_share: float,
    seed: int,
    varied: bool,
    sigma: float = TEST_SIGMA,
    factor: int = TEST_FACTOR,
) -> list[dict]:
    """Half noise, half low resolution; `varied` draws other severities for a part of them."""
    rng = np.random.default_rng(seed)
    slices, others = training_slices(), sorted(other_images().items())
    records = []
    for i in range(count):
        if rng.random() < others_share:
            dataset, image = others[rng.integers(len(others))]
            clean = random_crop(image, SLICE_HEIGHT, SLICE_WIDTH, rng)
        else:
            dataset, clean = "icbm152", augment(slices[rng.integers(len(slices))], rng)
        main = not varied or rng.random() < 0.7
        if i % 2:
            degraded = super_resolution(clean, factor if main else 2)
        else:
            drawn = sigma if main else float(rng.choice([0.05, 0.12]))
            degraded = denoising(clean, drawn, rng)
        records.append(_record(folder, f"train/{i:05d}", clean, degraded, dataset))
    return records


def test_records(
    folder: Path, every: int, sigma: float = TEST_SIGMA, factor: int = TEST_FACTOR
) -> list[dict]:
    rng = np.random.default_rng(152)
    degrade: list[Callable[[np.ndarray], tuple]] = [
        lambda clean: denoising(clean, sigma, rng),
        lambda clean: super_resolution(clean, factor),
    ]
    return [
        _record(folder, f"test/{i:03d}_{j}", clean, make(clean), "icbm152")
        for i, clean in enumerate(held_out_slices()[::every])
        for j, make in enumerate(degrade)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train", type=int, default=480, help="training pairs")
    parser.add_argument("--test_every", type=int, default=2, help="use every n-th held-out slice")
    parser.add_argument("--others", type=float, default=0.0, help="share of other modalities")
    parser.add_argument("--varied", action="store_true", help="several severities in training")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sigma", type=float, default=TEST_SIGMA, choices=NOISE)
    parser.add_argument("--factor", type=int, default=TEST_FACTOR, choices=BLUR)
    args = parser.parse_args()
    severity = args.sigma, args.factor
    sets = {
        "train": training_records(
            args.out, args.train, args.others, args.seed, args.varied, *severity
        ),
        "test": test_records(args.out, args.test_every, *severity),
    }
    for name, records in sets.items():
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (args.out / f"{name}.jsonl").write_text(lines)
        print(f"{args.out / name}.jsonl: {len(records)} pairs")
    dataset = {
        "name": "shipped",
        "jsonl_path": "${data_root}/train.jsonl",
        "data_dir": "${data_root}",
    }
    mixture = {"restoration": {"weight": 1, **RULES, "datasets": [dataset]}}
    (args.out / "mixture.yaml").write_text(yaml.safe_dump(mixture, sort_keys=False))


if __name__ == "__main__":
    main()
