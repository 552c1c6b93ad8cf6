"""Table and plots of a comparison of losses, or of a stability run.

python -m scripts.experiments.compare_losses --out build/compare
python -m scripts.experiments.compare_losses --out build/stability --stability

Numbers are means over the held-out slices; with several seeds mean ± standard deviation of the
seeds' means. PSNR and SSIM by the protocol of the batch inference (8 bit); MS-SSIM in [0, 1].
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from scipy.ndimage import correlate1d  # noqa: E402

from inference_pipeline.restorer import Restorer  # noqa: E402
from modeling.bagel.ssim import ssim_per_image  # noqa: E402
from scripts.experiments.ssim_gradient import denoising_batch  # noqa: E402
from scripts.tiny.images import held_out_slices  # noqa: E402

SETTINGS = {
    "none": "none (MSE alone)",
    "pixel_l2": "pixel L2",
    "ssim_v3": "SSIM v3",
    "ssim_v3_low_t": "SSIM v3, low-t share",
    "ssim_v3_balance": "SSIM v3, low-t share, balance",
    "mixed": "mixed",
    "ssim_v1": "SSIM v1",
}
STEPS = {"2": 1, "11": 10}
"""num_timesteps -> Euler steps."""
MS_SSIM_WEIGHTS = np.array([0.0448, 0.2856, 0.3001])
"""Wang, Simoncelli and Bovik 2003: the first three of five scales, rescaled to a sum of 1; a slice
of 112 x 96 has no room for the window at the fourth."""


def ms_ssim(image_01: np.ndarray, truth_01: np.ndarray) -> float:
    """Multi-scale SSIM of two (H, W) images, Gaussian window of 11 and sigma 1.5, valid windows."""
    taps = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    taps /= taps.sum()

    def blur(x: np.ndarray) -> np.ndarray:
        return correlate1d(correlate1d(x, taps, 0), taps, 1)[5:-5, 5:-5]

    weights, result = MS_SSIM_WEIGHTS / MS_SSIM_WEIGHTS.sum(), 1.0
    x, y = image_01.astype(np.float64), truth_01.astype(np.float64)
    for scale, weight in enumerate(weights):
        mx, my = blur(x), blur(y)
        covariance = blur(x * y) - mx * my
        contrast = (2 * covariance + 0.03**2) / (
            blur(x * x) - mx * mx + blur(y * y) - my * my + 0.03**2
        )
        luminance = (2 * mx * my + 0.01**2) / (mx * mx + my * my + 0.01**2)
        last = scale == len(weights) - 1
        result *= max(float((contrast * luminance if last else contrast).mean()), 0.0) ** weight
        x, y = (0.25 * (z[::2, ::2] + z[1::2, ::2] + z[::2, 1::2] + z[1::2, 1::2]) for z in (x, y))
    return result


def _grey(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("L"), dtype=np.float64) / 255.0


def scores(folder: Path) -> dict[str, dict[str, float]]:
    """Means over the samples of each task of one batch inference."""
    results = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    by_task: dict[str, list[dict[str, float]]] = {}
    for r in results:
        sample = {
            "psnr": r["psnr"],
            "ssim": r["ssim"],
            "ms_ssim": ms_ssim(
                _grey(folder / r["pred_img"]), _grey(folder / r["saved_output_img"])
            ),
            "seconds": r["inference_time"],
        }
        by_task.setdefault(r["main_task_type"], []).append(sample)
    return {
        task: {key: statistics.mean(s[key] for s in samples) for key in samples[0]}
        for task, samples in by_task.items()
    }


def log_lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _seeds(out: Path, name: str) -> list[Path]:
    return sorted(p for p in (out / name).iterdir() if p.is_dir())


def _spread(values: list[float], digits: int) -> str:
    mean = statistics.mean(values)
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def comparison_table(out: Path) -> str:
    rows = [
        "| loss | task | Euler steps | PSNR, dB | SSIM | MS-SSIM | restoring, s | training step, s "
        "| gradient ratio |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, title in SETTINGS.items():
        seeds = _seeds(out, name)
        step_seconds, ratios = [], []
        for seed in seeds:
            lines = log_lines(seed / "run")
            step_seconds += [m["tokens"] / m["tokens_per_s"] for m in lines]
            terms = [f"{term}_grad_ratio" for term in ("pixel", "ssim")]
            ratios += [max(m.get(term, 0.0) for term in terms) for m in lines]
        step = f"{statistics.median(step_seconds):.2f}"
        ratio = f"{max(ratios):.2g}" if any(ratios) else "–"
        for timesteps, steps in STEPS.items():
            found = [scores(seed / f"restored_{timesteps}") for seed in seeds]
            for task in found[0]:
                cells = [
                    _spread([f[task][key] for f in found], digits)
                    for key, digits in (("psnr", 2), ("ssim", 4), ("ms_ssim", 4), ("seconds", 2))
                ]
                rows.append(
                    f"| {title} | {task} | {steps} | {' | '.join(cells)} | {step} | {ratio} |"
                )
    return "\n".join(rows)


def one_step_table(out: Path) -> str:
    """SSIM of the clean image that one velocity at time t implies, from the truly noised truth."""
    times, slices = (0.02, 0.05, 0.1, 0.3), held_out_slices()[::4]
    rows = [f"| loss | {' | '.join(f't = {t}' for t in times)} |", "|---" * 5 + "|"]
    for name, title in SETTINGS.items():
        cells = []
        for t in times:
            means = []
            for seed in _seeds(out, name):
                restorer = Restorer.load(next((seed / "run").glob("0*")))
                found = [one_step_ssim(restorer, clean, t, k) for k, clean in enumerate(slices)]
                means.append(statistics.mean(found))
            cells.append(_spread(means, 3))
        rows.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(rows)


@torch.no_grad()
def one_step_ssim(restorer: Restorer, clean: np.ndarray, t: float, seed: int) -> float:
    batch = denoising_batch(restorer, clean, 0.2, "Very strong noise.", t, seed)
    (image,) = restorer.model.step_outputs(batch).target_images
    pred = 0.5 * restorer.model.vae.decode(image.latent[None]) + 0.5
    return ssim_per_image(pred, 0.5 * image.image_pm1[None] + 0.5).item()


def comparison_plot(out: Path, path: Path) -> None:
    """PSNR and SSIM of every setting, seeds as points, by task and Euler steps."""
    tasks = list(scores(_seeds(out, "none")[0] / "restored_2"))
    figure, axes = plt.subplots(2, 4, figsize=(14, 6), sharey=True)
    for column, (task, timesteps) in enumerate((t, n) for t in tasks for n in STEPS):
        for row, key in enumerate(("psnr", "ssim")):
            axis = axes[row, column]
            for y, name in enumerate(SETTINGS):
                values = [
                    scores(seed / f"restored_{timesteps}")[task][key] for seed in _seeds(out, name)
                ]
                axis.plot(values, [y] * len(values), "o", alpha=0.6, color="tab:blue")
                axis.plot(statistics.mean(values), y, "|", color="black", markersize=16)
            axis.set_title(f"{task}, {STEPS[timesteps]} steps: {key.upper()}", fontsize=9)
            axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_yticks(range(len(SETTINGS)), SETTINGS.values(), fontsize=8)
    axes[0, 0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def stability_table(out: Path) -> str:
    rows = [
        "| loss | step | task | PSNR / SSIM, 1 Euler step | PSNR / SSIM, 10 Euler steps |",
        "|---|---|---|---|---|",
    ]
    for name in sorted(p.name for p in out.iterdir() if (p / "run").is_dir()):
        for step in sorted(p.name for p in (out / name / "run").glob("0*")):
            one, ten = (scores(out / name / f"restored_{n}_{step}") for n in STEPS)
            for task in one:
                cells = [f"{s[task]['psnr']:.2f} dB / {s[task]['ssim']:.3f}" for s in (one, ten)]
                rows.append(f"| {SETTINGS[name]} | {int(step)} | {task} | {' | '.join(cells)} |")
    return "\n".join(rows)


def stability_plot(out: Path, path: Path) -> None:
    """What a user watches (loss), and what shows the poison (gradient ratio and clipped norm)."""
    shown = {
        "mse": "MSE",
        "ssim": "1 − SSIM",
        "ssim_grad_ratio": "SSIM / MSE gradient at v",
        "total_norm": "gradient norm",
    }
    figure, axes = plt.subplots(1, len(shown), figsize=(3.6 * len(shown), 2.8))
    for name in sorted(p.name for p in out.iterdir() if (p / "run").is_dir()):
        lines = log_lines(out / name / "run")
        for axis, (key, title) in zip(axes, shown.items(), strict=True):
            points = [(m["step"], m[key]) for m in lines if key in m]
            axis.plot(*zip(*points, strict=True), label=SETTINGS[name], linewidth=0.8)
            axis.set_title(title, fontsize=10)
            axis.set_yscale("log")
            axis.set_xlabel("step")
            axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stability", action="store_true")
    args = parser.parse_args()
    text = stability_table(args.out) if args.stability else comparison_table(args.out)
    if not args.stability:
        text += f"\n\n{one_step_table(args.out)}"
    (args.out / "table.md").write_text(text + "\n")
    (stability_plot if args.stability else comparison_plot)(args.out, args.out / "plot.png")
    print(text)


if __name__ == "__main__":
    main()
