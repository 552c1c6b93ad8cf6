"""The demo's table, contact sheet and loss plot.

python -m scripts.tiny.report --demo build/demo
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

ERROR_RANGE = 0.2
"""Absolute error shown as white in the error column."""


def table(before: dict[str, Any], after: dict[str, Any]) -> str:
    """PSNR in dB / SSIM per task, Markdown."""
    head = (
        "| task | degraded input | bicubic | restored before | restored after | VAE ceiling | "
        "gain of the distance to the ceiling |\n|---|---|---|---|---|---|---|"
    )
    rows = []
    for task, a in after["by_task_type"].items():
        b = before["by_task_type"][task]
        floor = a.get("psnr_bicubic_mean", a["psnr_input_mean"])
        share = (a["psnr_mean"] - floor) / (a["psnr_ceiling_mean"] - floor)
        cells = [
            _cell(a, "_input"),
            _cell(a, "_bicubic"),
            _cell(b, ""),
            _cell(a, ""),
            _cell(a, "_ceiling"),
        ]
        rows.append(f"| {task} ({a['total_samples']}) | {' | '.join(cells)} | {share:.0%} |")
    return "\n".join([head, *rows])


def _cell(summary: dict[str, Any], kind: str) -> str:
    if f"psnr{kind}_mean" not in summary:
        return "–"
    return f"{summary[f'psnr{kind}_mean']:.2f} dB / {summary[f'ssim{kind}_mean']:.3f}"


def contact_sheet(folder: Path, path: Path, per_task: int = 3) -> None:
    """Input, restored, truth and error of the worst, median and best sample of every task."""
    results = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    chosen: list[dict[str, Any]] = []
    for task in sorted({r["main_task_type"] for r in results}):
        ranked = sorted(
            (r for r in results if r["main_task_type"] == task), key=lambda r: r["psnr"]
        )
        places = np.linspace(0, len(ranked) - 1, min(per_task, len(ranked))).round().astype(int)
        chosen += [ranked[i] for i in places]
    figure, axes = plt.subplots(len(chosen), 4, figsize=(8.5, 2.5 * len(chosen)), squeeze=False)
    for row, result in zip(axes, chosen, strict=True):
        truth = _grey(folder / result["saved_output_img"])
        size = truth.shape[::-1]
        degraded = _grey(folder / result["saved_input_img"], size)
        restored = _grey(folder / result["pred_img"])
        error = np.abs(restored - truth) / ERROR_RANGE
        titles = (
            f"{result['main_task_type']} input\n{result['psnr_input']:.1f} dB",
            f"restored\n{result['psnr']:.1f} dB, SSIM {result['ssim']:.3f}",
            "truth",
            f"error (white: {ERROR_RANGE})",
        )
        for axis, image, title in zip(row, (degraded, restored, truth, error), titles, strict=True):
            axis.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set_title(title, fontsize=9)
            axis.axis("off")
        row[1].text(
            0.5,
            -0.02,
            f"“{result['understanding_text']}”",
            fontsize=8,
            ha="center",
            va="top",
            transform=row[1].transAxes,
        )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _grey(path: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    image = Image.open(path).convert("L")
    if size is not None:
        image = image.resize(size, Image.Resampling.NEAREST)
    return np.asarray(image, dtype=np.float32) / 255.0


def loss_plot(metrics: Path, path: Path) -> None:
    """Every loss term and the gradient norm over the steps."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    names = [n for n in ("ce", "mse", "pixel", "ssim", "total_norm") if any(n in m for m in lines)]
    figure, axes = plt.subplots(1, len(names), figsize=(3.2 * len(names), 2.6), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        points = [(m["step"], m[name]) for m in lines if name in m]
        axis.plot(*zip(*points, strict=True), marker=".")
        axis.set_title("gradient norm" if name == "total_norm" else f"{name} loss", fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, required=True)
    demo = parser.parse_args().demo
    statistics = [
        json.loads((demo / n / "statistics.json").read_text()) for n in ("before", "after")
    ]
    text = table(*statistics)
    (demo / "table.md").write_text(text + "\n")
    contact_sheet(demo / "after", demo / "contact_sheet.png")
    loss_plot(demo / "run" / "metrics.jsonl", demo / "losses.png")
    print(
        f"PSNR in dB / SSIM on held-out slices (protocol {statistics[1]['protocol']})\n\n{text}\n"
    )
    print(f"pictures: {demo / 'contact_sheet.png'}, {demo / 'losses.png'}")


if __name__ == "__main__":
    main()
