"""Trains the tiny autoencoder (4x down-sampling, 8 channels) on the shipped images.

    python -m scripts.tiny.train_vae --out build/tiny

Writes `ae.safetensors` and `vae_config.json`. The latents' scale and shift are measured on the
training slices at the end, so that scaled latents have mean 0 and deviation 1.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from modeling.autoencoder import Autoencoder, AutoencoderConfig
from scripts.tiny.images import (
    SLICE_HEIGHT,
    SLICE_WIDTH,
    augment,
    held_out_slices,
    other_images,
    random_crop,
    training_slices,
)

KL_WEIGHT = 1e-4
OTHER_SHARE = 0.2
EMA_DECAY = 0.998
CROP = 48
CROP_SHARE = 0.7
"""Share of the steps on small crops: many cheap steps first, whole slices (whose group norms
inference sees) at the end."""


def _to_pm1(images_01: list[np.ndarray]) -> Tensor:
    """(B, 3, H, W) in [-1, 1] of grey (H, W) or RGB (H, W, 3) images in [0, 1]."""
    rgb = [np.broadcast_to(i[..., None], (*i.shape, 3)) if i.ndim == 2 else i for i in images_01]
    return torch.from_numpy(np.stack(rgb).astype(np.float32)).permute(0, 3, 1, 2) * 2 - 1


def batches(steps: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Augmented batches in [-1, 1]: `batch_size` crops (3, 48, 48), then half as many slices."""
    rng = np.random.default_rng(seed)
    slices, others = training_slices(), list(other_images().values())
    for step in range(steps):
        on_crops = step < CROP_SHARE * steps
        size = (CROP, CROP) if on_crops else (SLICE_HEIGHT, SLICE_WIDTH)
        yield _to_pm1(
            [
                random_crop(others[rng.integers(len(others))], *size, rng)
                if rng.random() < OTHER_SHARE
                else random_crop(augment(slices[rng.integers(len(slices))], rng), *size, rng)
                for _ in range(batch_size if on_crops else batch_size // 2)
            ]
        )


def loss_fn(vae: Autoencoder, image_pm1: Tensor) -> Tensor:
    """Absolute and squared error of the reconstruction plus a light KL term."""
    mean, log_variance = vae.encoder(image_pm1).chunk(2, dim=1)
    log_variance = log_variance.clamp(-12, 4)
    z = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
    error = vae.decoder(z) - image_pm1
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return error.abs().mean() + error.square().mean() + KL_WEIGHT * kl


@torch.no_grad()
def psnr_db(vae: Autoencoder, image_pm1: Tensor) -> float:
    """Mean PSNR in dB (range 1) of the clamped reconstructions of the posterior means."""
    mean = vae.encoder(image_pm1).chunk(2, dim=1)[0]
    error = (vae.decoder(mean).clamp(-1, 1) - image_pm1) / 2
    return (-10 * error.square().mean(dim=(1, 2, 3)).log10()).mean().item()


@torch.no_grad()
def measure_scale(vae: Autoencoder, image_pm1: Tensor) -> AutoencoderConfig:
    mean = vae.encoder(image_pm1).chunk(2, dim=1)[0]
    shift, scale = mean.mean().item(), 1 / mean.std().item()
    return dataclasses.replace(vae.config, scale_factor=scale, shift_factor=shift)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    vae = Autoencoder(AutoencoderConfig(ch=32, ch_mult=(1, 2, 2), num_res_blocks=1, z_channels=8))
    # Starting with little posterior noise, or the decoder sees nothing else for 500 steps.
    torch.nn.init.constant_(vae.encoder.conv_out.bias[vae.config.z_channels :], -6.0)
    vae.to(memory_format=torch.channels_last)
    ema = torch.optim.swa_utils.AveragedModel(
        vae, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(EMA_DECAY)
    )
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, args.steps, pct_start=0.05, cycle_momentum=False
    )
    held_out = _to_pm1(held_out_slices()[::4])
    start = time.perf_counter()
    for step, image_pm1 in enumerate(batches(args.steps, args.batch_size, args.seed), start=1):
        loss = loss_fn(vae, image_pm1.contiguous(memory_format=torch.channels_last))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        ema.update_parameters(vae)
        if step % 100 == 0 or step == args.steps:
            print(
                f"step {step} loss {loss.item():.4f} held-out PSNR "
                f"{psnr_db(ema.module, held_out):.2f} dB  {time.perf_counter() - start:.0f} s",
                flush=True,
            )
    vae = ema.module
    config = measure_scale(vae, _to_pm1(training_slices()[::2]))
    args.out.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.contiguous() for k, v in vae.state_dict().items()}
    save_file(tensors, args.out / "ae.safetensors", {"format": "pt"})
    (args.out / "vae_config.json").write_text(
        json.dumps(dataclasses.asdict(config) | {"downsample": config.downsample}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
