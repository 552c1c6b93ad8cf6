"""The demo's table and loss plot.

python -m scripts.tiny.report --demo build/demo
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


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
    loss_plot(demo / "run" / "metrics.jsonl", demo / "losses.png")
    print(
        f"PSNR in dB / SSIM on held-out slices (protocol {statistics[1]['protocol']})\n\n{text}\n"
    )
    print(f"loss curves: {demo / 'losses.png'}")


if __name__ == "__main__":
    main()
