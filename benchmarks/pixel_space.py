"""Pixel and SSIM losses through the frozen VAE decoder: what they cost, and against the fork.

    python benchmarks/pixel_space.py [--ch 32] [--threads 2] [--rounds 3]

Three tables: the losses alone against the fork's way (pad to the largest image, decode once for
each loss, keep the graph); a training step with none, pixel, SSIM and both; peak memory at 512 x
512 with and without checkpointing of the decoder. `--ch 128` is the size of the released VAE.
Times and memory are taken as `benchmarks/measure.py` says. Exit code 1: a target was missed.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen2Config

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.measure import median_seconds, peak_bytes  # noqa: E402
from benchmarks.ssim import fork as fork_ssim  # noqa: E402
from data.packer import Packer, PackerConfig, Sample, TextSegment, VaeSegment  # noqa: E402
from modeling.autoencoder import Autoencoder, AutoencoderConfig  # noqa: E402
from modeling.bagel.bagel import Bagel  # noqa: E402
from modeling.bagel.config import BagelConfig  # noqa: E402
from modeling.bagel.losses import CrossEntropy, LossSet, PixelTerm, SSIMTerm, VelocityMSE  # noqa: E402
from modeling.bagel.pixel_space import PixelSpace, TargetImage  # noqa: E402
from modeling.batch import PackedBatch, SpecialTokens  # noqa: E402

T, MAX_T, PATCH = 0.05, 0.3, 2
BATCHES = {
    "1 x 256²": [(256, 256)],
    "4 x 256²": [(256, 256)] * 4,
    "8 x 256²": [(256, 256)] * 8,
    "256², 256x128, 2 x 128²": [(256, 256), (256, 128), (128, 128), (128, 128)],
}
SPEED_AT_FOUR, BOTH_OVER_SSIM = 4.0, 1.15
TERMS = (PixelTerm(2, MAX_T), SSIMTerm(MAX_T, 11, 1.0))
SCALES = {"mse": 1e-3, "ce": 1e-2, "pixel": 1e-5, "ssim": 1e-5}


def vae_config(ch: int) -> AutoencoderConfig:
    return AutoencoderConfig(ch=ch)


def fork_way(vae: Autoencoder, targets: list[TargetImage], velocity: Tensor) -> Tensor:
    """Latents and images zero-padded to the largest; a decode for each loss, graphs kept."""
    channels = targets[0].latent.shape[0]
    sides = [max(t.latent.shape[d] for t in targets) for d in (1, 2)]
    latents = velocity.new_zeros(len(targets), channels, *sides)
    truth = velocity.new_zeros(len(targets), 3, *(8 * side for side in sides))
    for i, target in enumerate(targets):
        h, w = target.latent.shape[1:]
        change = target.t * velocity[target.tokens].reshape(h, w, channels).permute(2, 0, 1)
        latents[i, :, :h, :w] = target.latent - change
        truth[i, :, : 8 * h, : 8 * w] = 0.5 * target.image_pm1 + 0.5
    pixel = F.mse_loss(0.5 * vae.decode(latents) + 0.5, truth)
    return pixel + 1 - fork_ssim(0.5 * vae.decode(latents) + 0.5, truth)


def losses_alone(vae: Autoencoder, sizes: list[tuple[int, int]]) -> dict[str, Callable]:
    """One micro-batch's losses and gradient at the velocity, both ways."""
    generator = torch.Generator().manual_seed(0)
    targets, first = [], 0
    for height, width in sizes:
        h, w = height // 8, width // 8
        image = torch.rand(3, height, width, generator=generator) * 2 - 1
        latent = torch.randn(vae.config.z_channels, h, w, generator=generator)
        tokens = slice(first, first + h * w // PATCH**2)
        targets.append(TargetImage("image", T, tokens, latent, image))
        first = tokens.stop
    velocity = torch.zeros(first, PATCH**2 * vae.config.z_channels, requires_grad=True)

    def fork() -> None:
        # The same latents as rows of one latent each: the fork's cost does not depend on the order.
        rows = velocity.reshape(-1, vae.config.z_channels)
        wide = [
            TargetImage(
                t.name,
                t.t,
                slice(*(PATCH**2 * s for s in (t.tokens.start, t.tokens.stop))),
                t.latent,
                t.image_pm1,
            )
            for t in targets
        ]
        torch.autograd.grad(fork_way(vae, wide, rows), velocity)

    def ours() -> None:
        PixelSpace(TERMS, 1, False)(vae, targets, velocity, PATCH, SCALES)

    return {"fork": fork, "ours": ours}


def small_bagel(ch: int) -> Bagel:
    llm = Qwen2Config(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    llm.qk_norm, llm.layer_module = True, "Qwen2MoTDecoderLayer"
    torch.manual_seed(0)
    model = Bagel(BagelConfig(llm=llm, vit=None, vae=vae_config(ch), max_latent_size=64))
    model.init_weights()
    torch.nn.init.normal_(model.llm2vae.weight, std=0.02)
    return model


def low_t_batch(model: Bagel, count: int, side: int) -> PackedBatch:
    """`count` restoration samples whose targets are all gated."""
    config = PackerConfig(
        latent_stride=model.config.latent_stride,
        max_latent_size=64,
        vit_patch_size=14,
        vit_max_num_patch_per_side=1,
        text_cond_dropout_prob=0.0,
        vae_cond_dropout_prob=0.0,
        vit_cond_dropout_prob=0.0,
        low_t_fraction=1.0,
        low_t_max=T,
    )
    packer = Packer(config, SpecialTokens(bos=1, eos=2, image_start=3, image_end=4))
    for i in range(count):
        generator = torch.Generator().manual_seed(i)
        noisy, clean = (torch.rand(3, side, side, generator=generator) * 2 - 1 for _ in range(2))
        segments = [
            VaeSegment(image_pm1=noisy),
            TextSegment(ids=[7] * 32, answer=True),
            VaeSegment(image_pm1=clean, target=True),
        ]
        packer.add(Sample(str(i), segments), generator)
    return packer.build()


def training_step(model: Bagel, batch: PackedBatch, terms: tuple) -> Callable[[], None]:
    losses = LossSet((CrossEntropy(), VelocityMSE(), *terms))

    def run() -> None:
        model.losses = losses
        model.zero_grad()
        found = model(batch, scales=SCALES)
        sum(SCALES[name] * term.sum for name, term in found.items()).backward()

    return run


def table(title: str, seconds: dict[str, float], peaks: dict[str, int], base: str) -> None:
    print(f"\n{title}\n{'':28}{'ms':>9}{'speed':>8}{'MB':>8}")
    for name, second in seconds.items():
        speed = seconds[base] / second
        print(f"{name:28}{1e3 * second:9.0f}{speed:7.2f}x{peaks[name] / 1e6:8.0f}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--ch", type=int, default=32, help="width of the VAE, a multiple of 32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, load {os.getloadavg()[0]:.1f}, VAE ch {arguments.ch}")
    missed, flat = [], {}
    vae = Autoencoder(vae_config(arguments.ch)).requires_grad_(False)
    for title, sizes in BATCHES.items():
        runs = losses_alone(vae, sizes)
        seconds, how = median_seconds(runs, arguments.rounds, arguments.threads)
        peaks = {name: peak_bytes(run) for name, run in runs.items()}
        table(f"pixel + SSIM of {title}, {how}", seconds, peaks, "fork")
        flat[title] = peaks["ours"]
        speed = seconds["fork"] / seconds["ours"]
        if len(sizes) == 4 and speed < SPEED_AT_FOUR:
            missed.append(f"{title}: {speed:.1f}x < {SPEED_AT_FOUR}x")
    growth = flat["8 x 256²"] / flat["1 x 256²"]
    if growth > 1.1:
        missed.append(f"memory of 8 images is {growth:.2f} times that of one")

    model = small_bagel(arguments.ch)
    batch = low_t_batch(model, 2, 256)
    modes = {"none": (), "pixel": TERMS[:1], "SSIM": TERMS[1:], "both": TERMS}
    runs = {name: training_step(model, batch, terms) for name, terms in modes.items()}
    seconds, how = median_seconds(runs, arguments.rounds, arguments.threads)
    peaks = {name: peak_bytes(run) for name, run in runs.items()}
    table(f"training step, two gated images of 256², {how}", seconds, peaks, "none")
    ratio = seconds["both"] / seconds["SSIM"]
    print(f"both / SSIM: {ratio:.2f}")
    if ratio > BOTH_OVER_SSIM:
        missed.append(f"both / SSIM: {ratio:.2f} > {BOTH_OVER_SSIM}")

    batch = low_t_batch(model, 1, 512)
    step = training_step(model, batch, TERMS)

    def with_checkpointing(pixels: int) -> Callable[[], None]:
        def run() -> None:
            model.vae.decoder.checkpoint_pixels = pixels
            step()

        return run

    runs = {"kept": with_checkpointing(2**30), "checkpointed": with_checkpointing(1)}
    seconds, how = median_seconds(runs, arguments.rounds, arguments.threads)
    peaks = {name: peak_bytes(run) for name, run in runs.items()}
    table(f"training step, one gated image of 512², {how}", seconds, peaks, "kept")
    if peaks["checkpointed"] > 0.7 * peaks["kept"]:
        missed.append("checkpointing saves less than 30 % of the peak memory")
    print("\n" + ("\n".join(["Targets missed:", *missed]) if missed else "All targets met."))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
