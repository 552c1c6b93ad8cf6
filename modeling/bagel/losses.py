"""Loss terms of `Bagel.forward`, each a float32 sum and a count, and the functions by name.

A term knows its name, whether it needs decoded images, its count from the batch alone, and its
sum. Sums of many ranks and micro-batches add up; the division by the global count comes last.

Shape legend: N answer tokens, M target tokens, D numbers in a latent token, B images,
C channels, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..batch import PackedBatch
from ..flow import clean_from_velocity
from ..geometry import unpatchify
from .pixel_space import ImageLoss, PixelSpace, PixelSpaceTerm, TargetImage
from .pixel_space import PixelTerm as PixelTerm
from .pixel_space import SSIMTerm as SSIMTerm
from .ssim import gaussian_window, ssim_per_image

if TYPE_CHECKING:
    from .bagel import Bagel

CE_CHUNK_TOKENS = 1024
"""Answer tokens whose logits (tokens x vocabulary, float32) exist at one time."""


@dataclass(frozen=True)
class LossTerm:
    sum: Tensor
    """Float32 scalar with its graph."""
    count: float
    """What the sum is divided by once it is global."""
    images: tuple[ImageLoss, ...] = ()
    """The target images it saw."""
    gradient: Tensor | None = None
    """(M, D) float32 gradient of the sum at the predicted velocity; None unless asked for."""


@dataclass
class StepOutputs:
    """What the model computed for one batch; decoded images are shared by all terms."""

    model: Bagel
    batch: PackedBatch
    hidden: Tensor
    """(S, d)"""
    velocity_pred: Tensor
    """(M, D) float32; M is 0 in a batch without target images."""
    velocity_true: Tensor
    """(M, D) float32."""
    clean: Tensor
    """(M, D) float32 clean latents."""

    @cached_property
    def target_images(self) -> list[TargetImage]:
        vae, patch = self.batch.vae, self.model.config.latent_patch_size
        if vae is None:
            return []
        images, first = [], 0
        times = vae.times(self.model.config.timestep_shift)
        # z_t - t v_pred, written so that an exact prediction gives exactly z0.
        error = self.velocity_pred.detach() - self.velocity_true
        for i, (h, w) in enumerate(vae.grids):
            if not vae.is_target[i]:
                continue
            tokens = slice(first, first + h * w)
            clean = clean_from_velocity(self.clean[tokens], error[tokens], times[i])
            latent = unpatchify(clean, h, w, patch)
            images.append(TargetImage(vae.names[i], times[i], tokens, latent, vae.images[i]))
            first += h * w
        return images


class TokenTerm:
    """A loss of tokens."""

    name: str

    def count(self, batch: PackedBatch, timestep_shift: float) -> float | None:
        """None when the batch has nothing for it: the term is then absent."""
        raise NotImplementedError

    def total(self, out: StepOutputs) -> Tensor:
        raise NotImplementedError

    def images(self, out: StepOutputs) -> tuple[ImageLoss, ...]:
        return ()

    def gradient(self, out: StepOutputs) -> Tensor | None:
        """(M, D) gradient of the total at the predicted velocity, if it has any."""
        return None


Term = TokenTerm | PixelSpaceTerm


class CrossEntropy(TokenTerm):
    """-log p(label) of answer tokens, weighted; count: the sum of the weights."""

    name = "ce"

    def count(self, batch: PackedBatch, timestep_shift: float) -> float | None:
        return batch.labels.total_weight if batch.labels is not None else None

    def per_token(self, out: StepOutputs) -> Tensor:
        """(N,) float32. Logits exist for `CE_CHUNK_TOKENS` tokens at a time."""
        labels = out.batch.labels
        assert labels is not None  # `count` has said so
        head = out.model.language_model.lm_head

        def chunk_ce(hidden: Tensor, ids: Tensor) -> Tensor:
            return F.cross_entropy(head(hidden).float(), ids, reduction="none")

        # Of the recomputed, shapes are not compared: a frozen head that ZeRO 3 shards is away by
        # then, and back when its backward runs.
        again = partial(checkpoint, chunk_ce, use_reentrant=False, determinism_check="none")
        chunks = out.hidden[labels.indexes].split(CE_CHUNK_TOKENS)
        return torch.cat([*map(again, chunks, labels.ids.split(CE_CHUNK_TOKENS))])

    def total(self, out: StepOutputs) -> Tensor:
        assert out.batch.labels is not None
        return (self.per_token(out) * out.batch.labels.weights).sum()


class VelocityMSE(TokenTerm):
    """Squared error of the velocity, mean over a token's D numbers; count: target tokens."""

    name = "mse"

    def count(self, batch: PackedBatch, timestep_shift: float) -> float | None:
        return (batch.vae.num_target_tokens or None) if batch.vae is not None else None

    def per_token(self, velocity_pred: Tensor, velocity_true: Tensor) -> Tensor:
        """(M,)"""
        return (velocity_pred - velocity_true).square().mean(dim=1)

    def total(self, out: StepOutputs) -> Tensor:
        return self.per_token(out.velocity_pred, out.velocity_true).sum()

    def images(self, out: StepOutputs) -> tuple[ImageLoss, ...]:
        per_token = self.per_token(out.velocity_pred.detach(), out.velocity_true)
        return tuple(
            ImageLoss(image, 1.0, per_token[image.tokens].mean()) for image in out.target_images
        )

    def gradient(self, out: StepOutputs) -> Tensor:
        error = out.velocity_pred.detach() - out.velocity_true
        return 2 / error.shape[1] * error


class LossSet:
    """The configured terms. Adding a loss: one class, one argument.

    `pixel_space` are the settings of `PixelSpace`, which computes all terms of decoded images.
    """

    def __init__(
        self, terms: tuple[Term, ...] = (CrossEntropy(), VelocityMSE()), **pixel_space: Any
    ) -> None:
        self.terms = terms
        self.token_terms = [term for term in terms if isinstance(term, TokenTerm)]
        self.pixel_terms = [term for term in terms if isinstance(term, PixelSpaceTerm)]
        self.pixel_space = PixelSpace(self.pixel_terms, **pixel_space)

    @property
    def needs_image(self) -> bool:
        """The one rule that says whether a run needs the VAE decoder."""
        return bool(self.pixel_terms)

    def counts(self, batch: PackedBatch, timestep_shift: float) -> dict[str, float]:
        """Count of every term that the batch has something for, without touching a device."""
        counts = {term.name: term.count(batch, timestep_shift) for term in self.terms}
        return {name: count for name, count in counts.items() if count is not None}

    def __call__(
        self,
        out: StepOutputs,
        scales: Mapping[str, float] | None = None,
        observe: bool = False,
        complete: bool = False,
    ) -> dict[str, LossTerm]:
        """Terms of a batch by name; with `complete` 0 where it has nothing for them, else absent.

        `scales` are the factors (weight / global count) by which the caller will multiply the
        sums before adding them up; with them several pixel-space terms share one backward through
        the decoder. `observe` keeps each term's gradient at the predicted velocity, which takes a
        backward of its own.
        """
        counts = dict.fromkeys([term.name for term in self.terms], 0.0) if complete else {}
        counts |= self.counts(out.batch, out.model.config.timestep_shift)
        with torch.autocast(out.hidden.device.type, enabled=False):
            terms = {
                term.name: LossTerm(
                    term.total(out),
                    counts[term.name],
                    term.images(out),
                    term.gradient(out) if observe else None,
                )
                for term in self.token_terms
                if term.name in counts
            }
            if not self.pixel_terms:
                return terms
            reference = None
            if self.pixel_space.balance is not None and scales is not None:
                reference = scales.get("mse", 0.0) * VelocityMSE().gradient(out)
            # Also without images: other ranks may have some, and balance is a collective.
            losses = self.pixel_space(
                out.model.vae,
                out.target_images,
                out.velocity_pred,
                out.model.config.latent_patch_size,
                scales,
                observe,
                reference,
            )
        return terms | {
            name: LossTerm(
                total,
                counts[name],
                tuple(losses.images[name]),
                losses.gradients.get(name) if observe else None,
            )
            for name, total in losses.sums.items()
            if name in counts
        }


def _scale_gradient(x: Tensor, scale: float) -> Tensor:
    """Identity whose gradient is multiplied by `scale`."""
    return x.detach() + scale * (x - x.detach())


def _gaussian_window(window_size: int, sigma: float = 1.5) -> Tensor:
    """(window_size,) float32 Gaussian that sums to 1."""
    return gaussian_window(window_size, sigma, dtype=torch.float32, device=torch.device("cpu"))


def _ssim_core(
    x_pred: Tensor,
    x_gt: Tensor,
    window_size: int = 11,
    data_range: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """(B,) SSIM of each image, see `ssim.ssim_per_image`."""
    return ssim_per_image(x_pred, x_gt, window_size=window_size, data_range=data_range, weight=mask)


def compute_ssim_loss(
    x_pred: Tensor,
    x_gt: Tensor,
    mask: Tensor | None = None,
    window_size: int = 11,
    data_range: float = 1.0,
) -> Tensor:
    """1 - SSIM, mean over all windows, of (B, C, H, W) in [0, data_range]: a scalar.

    `mask` (B, 1, H, W) holds per-pixel weights of the mean; it is cropped to the windows' centres,
    so that a mask of ones equals no mask, and without any weight the loss is 0.
    Formula: Wang et al. 2004, Gaussian window with sigma 1.5.
    """
    loss = 1 - _ssim_core(x_pred, x_gt, window_size, data_range, mask)
    if mask is None:
        return loss.sum() / max(len(loss), 1)
    height, width = mask.shape[-2:]
    half = min(window_size, (min(height, width) - 1) // 2 * 2 + 1) // 2
    weight = mask[..., half : height - half, half : width - half].sum((1, 2, 3), dtype=loss.dtype)
    total = weight.sum()
    return (loss * weight).sum() / total.where(total > 0, 1.0)


def compute_pixel_loss(
    x_pred: Tensor, x_gt: Tensor, mask: Tensor | None = None, loss_type: str = "l1"
) -> Tensor:
    """Mean |x_pred - x_gt|^p of (B, C, H, W), p = 1 (`l1`) or 2 (`l2`, `mse`): a scalar.

    `mask` (B, 1, H, W) holds per-pixel weights; the mean is then over the weights, and 0 where
    nothing has any.
    """
    if loss_type not in ("l1", "l2", "mse"):
        raise ValueError(f"pixel loss type {loss_type!r} is none of l1, l2, mse")
    if x_pred.shape != x_gt.shape:
        raise ValueError(f"images of {tuple(x_pred.shape)} and {tuple(x_gt.shape)} differ in shape")
    dtype = torch.promote_types(torch.promote_types(x_pred.dtype, x_gt.dtype), torch.float32)
    error = (x_pred.to(dtype) - x_gt.to(dtype)).abs() ** (1 if loss_type == "l1" else 2)
    batch, channels, *size = error.shape
    if mask is None:
        return error.sum() / max(error.numel(), 1)
    if mask.shape != (batch, 1, *size):
        raise ValueError(f"a mask must be {(batch, 1, *size)}, not {tuple(mask.shape)}")
    weight = channels * mask.sum(dtype=dtype)
    return (error * mask.to(dtype)).sum() / weight.where(weight > 0, 1.0)


def compute_perceptual_loss(
    x_pred: Tensor,
    x_gt: Tensor,
    mask: Tensor | None = None,
    pixel_weight: float = 1.0,
    ssim_weight: float = 1.0,
    loss_type: str = "l1",
    window_size: int = 11,
) -> Tensor:
    """Weighted sum of `compute_pixel_loss` and `compute_ssim_loss` for images in [0, 1]."""
    pixel = compute_pixel_loss(x_pred, x_gt, mask, loss_type)
    return pixel_weight * pixel + ssim_weight * compute_ssim_loss(x_pred, x_gt, mask, window_size)
