"""How large is the gradient of SSIM, where, and what is left of it at the velocity?

python -m scripts.experiments.ssim_gradient --out docs

On held-out slices and the shipped checkpoint: the gradient of 1 - SSIM over that of the squared
error, by how flat the image is around a pixel; and its norm at every stage of its way back to the
predicted velocity, for the presets, beside the norm of the velocity's own squared error.
"""

import argparse
import dataclasses
from itertools import pairwise
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor  # noqa: E402

from data.degradations import rician_noise  # noqa: E402
from data.packer import Packer, PackerConfig, Sample, TextSegment, VaeSegment  # noqa: E402
from inference_pipeline.restorer import Restorer  # noqa: E402
from modeling.bagel.ssim import ssim_per_image  # noqa: E402
from modeling.batch import PackedBatch  # noqa: E402
from modeling.flow import gate, logit_from_time  # noqa: E402
from modeling.geometry import patchify  # noqa: E402
from scripts.tiny.images import held_out_slices  # noqa: E402

PRESETS = {"v1": (1.0, 0.3, 1.0), "v2 as run": (1.0, 0.3, 0.01), "v3": (0.1, 0.1, 0.01)}
"""Weight, max_t, grad_scale."""
TIMES = (0.02, 0.05, 0.08)
STAGES = ("at the image", "× grad_scale", "× gate", "at the latent", "× t: at v", "× weight", "MSE")


def gradient_of(pred: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    """(C, H, W) gradients of an image's 1 - SSIM and of its mean squared error."""
    leaf = pred.detach().double().requires_grad_()
    truth = true.double()
    (ssim,) = torch.autograd.grad(1 - ssim_per_image(leaf[None], truth[None])[0], leaf)
    (square,) = torch.autograd.grad((leaf - truth).square().mean(), leaf)
    return ssim, square


def local_deviation(image: Tensor, window: int = 11) -> Tensor:
    """(H, W) standard deviation in a window around each pixel of (C, H, W)."""
    grey = image.double().mean(0)[None, None]
    kernel = torch.full((1, 1, window, window), 1 / window**2, dtype=torch.float64)
    padded = torch.nn.functional.pad(grey, [window // 2] * 4, mode="reflect")
    mean = torch.nn.functional.conv2d(padded, kernel)
    square = torch.nn.functional.conv2d(padded * padded, kernel)
    return (square - mean * mean).clamp(min=0).sqrt()[0, 0]


def by_texture(restorer: Restorer, slices: list[np.ndarray], path: Path) -> str:
    """Plots and tabulates the two gradients by local deviation; prediction: the autoencoder's."""
    deviations, ssims, squares = [], [], []
    for clean in slices:
        image = Image.fromarray(np.round(clean * 255).astype(np.uint8)).convert("RGB")
        true = 0.5 * restorer.task.vae_rule(image) + 0.5
        (latent,) = restorer.model.encode_images([2 * true - 1])
        pred = 0.5 * restorer.model.vae.decode(latent[None])[0] + 0.5
        ssim, square = gradient_of(pred, true)
        deviations.append(local_deviation(true).flatten())
        ssims.append(ssim.norm(dim=0).flatten())
        squares.append(square.norm(dim=0).flatten())
    deviation, ssim, square = (torch.cat(x).numpy() for x in (deviations, ssims, squares))
    edges = np.array([0, 0.002, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.5])
    rows = [
        "| local deviation | pixels | gradient of 1 − SSIM | of the squared error | ratio |",
        "|---|---|---|---|---|",
    ]
    ratios = []
    for low, high in pairwise(edges):
        inside = (deviation >= low) & (deviation < high)
        if not inside.any():
            continue
        a, b = (np.sqrt((x[inside] ** 2).mean()) for x in (ssim, square))
        ratios.append((np.sqrt(max(low, 1e-3) * high), a / b))
        share = inside.mean()
        rows.append(f"| {low:g} to {high:g} | {share:.1%} | {a:.1e} | {b:.1e} | {a / b:.0f} |")
    figure, axis = plt.subplots(figsize=(5.5, 3.4))
    axis.loglog(*zip(*ratios, strict=True), "o-")
    axis.set_xlabel("standard deviation of the truth in 11 x 11 pixels")
    axis.set_ylabel("gradient of 1 − SSIM\nover that of the squared error")
    axis.grid(alpha=0.3, which="both")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return "\n".join(rows)


def denoising_batch(
    restorer: Restorer, clean: np.ndarray, sigma: float, assessment: str, t: float, seed: int = 0
) -> PackedBatch:
    """A slice as in training: degraded by Rician noise, and the clean one as target at time t."""
    config, task = restorer.model.config, restorer.task
    noisy, truth = (
        Image.fromarray(np.round(x * 255).astype(np.uint8)).convert("RGB")
        for x in (rician_noise(clean, sigma, np.random.default_rng(0)), clean)
    )
    segments = [
        *task.context(noisy, "Remove the noise."),
        TextSegment(ids=task.tokenizer.encode(assessment), answer=True),
        VaeSegment(image_pm1=task.vae_rule(truth), target=True),
    ]
    packer = Packer(
        PackerConfig(
            latent_stride=config.latent_stride,
            max_latent_size=config.max_latent_size,
            vit_patch_size=config.vit_patch,
            vit_max_num_patch_per_side=config.vit_max_num_patch_per_side,
            interpolate_pos=config.interpolate_pos,
            timestep_shift=config.timestep_shift,
        ),
        task.tokenizer.special,
    )
    packer.add(Sample("slice", segments), torch.Generator().manual_seed(seed))
    batch = packer.build()
    logits = (*batch.vae.time_logits[:-1], logit_from_time(t, config.timestep_shift))
    return dataclasses.replace(batch, vae=dataclasses.replace(batch.vae, time_logits=logits))


def stages(restorer: Restorer, clean: np.ndarray, t: float) -> dict[str, list[float]]:
    """Norms of the gradient of one image at every stage, by preset."""
    model, config = restorer.model, restorer.model.config
    batch = denoising_batch(restorer, clean, 0.08, "Moderate noise.", t)
    with torch.no_grad():
        out = model.step_outputs(batch)
    (image,) = out.target_images
    latent = image.latent.clone().requires_grad_()
    pred = 0.5 * model.vae.decode(latent[None])[0] + 0.5
    at_image, _ = gradient_of(pred, 0.5 * image.image_pm1 + 0.5)
    (at_latent,) = torch.autograd.grad(pred, latent, at_image.float())
    at_velocity = t * patchify(at_latent, config.latent_patch_size)
    error = out.velocity_pred - out.velocity_true
    mse = (2 / error.numel() * error).norm().item()
    image_norm, latent_norm, velocity_norm = (
        x.norm().item() for x in (at_image, at_latent, at_velocity)
    )
    found = {}
    for name, (weight, max_t, scale) in PRESETS.items():
        factor = scale * gate(t, max_t)
        found[name] = [
            image_norm,
            scale * image_norm,
            factor * image_norm,
            factor * latent_norm,
            factor * velocity_norm,
            weight * factor * velocity_norm,
            mse,
        ]
    return found


def path_plot(restorer: Restorer, slices: list[np.ndarray], path: Path) -> str:
    """Plots and tabulates the root mean squares over slices of the norms at every stage."""
    rows = [
        f"| preset | t | {' | '.join(STAGES)} | SSIM / MSE |",
        "|---|---|" + "---|" * (len(STAGES) + 1),
    ]
    figure, axes = plt.subplots(1, len(TIMES), figsize=(12, 3.6), sharey=True)
    for axis, t in zip(axes, TIMES, strict=True):
        found = [stages(restorer, clean, t) for clean in slices]
        for name in PRESETS:
            norms = np.sqrt(np.mean(np.square([f[name] for f in found]), axis=0))
            axis.semilogy(STAGES[:-1], norms[:-1], "o-", label=name)
            cells = " | ".join(f"{x:.1e}" for x in norms)
            rows.append(f"| {name} | {t} | {cells} | {norms[-2] / norms[-1]:.1e} |")
        axis.axhline(norms[-1], color="black", linestyle="--", label="MSE at v")
        axis.set_title(f"t = {t}", fontsize=10)
        axis.tick_params(axis="x", rotation=35, labelsize=8)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("norm of the gradient of one image")
    axes[-1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, default=Path("configs/tiny/checkpoint"))
    args = parser.parse_args()
    restorer, slices = Restorer.load(args.checkpoint), held_out_slices()[::4]
    print(by_texture(restorer, slices, args.out / "ssim_gradient_by_texture.png"), end="\n\n")
    print(path_plot(restorer, slices, args.out / "ssim_gradient_path.png"))


if __name__ == "__main__":
    main()
