"""Loss terms of `Bagel.forward`, each a float32 sum and a count, and the functions by name.

A term knows its name, whether it needs decoded images, its count from the batch alone, and its
sum. Sums of many ranks and micro-batches add up; the division by the global count comes last.

Shape legend: N answer tokens, M target tokens, D numbers in a latent token, B images,
C channels, H and W pixels.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..batch import PackedBatch
from ..flow import clean_from_velocity, gate
from ..geometry import unpatchify
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


@dataclass(frozen=True)
class TargetImage:
    """One target image of a batch, its predicted clean latent and its truth."""

    name: str
    t: float
    latent_pred: Tensor
    """(Z, h, w) float32, with the graph of the predicted velocity."""
    image_pm1: Tensor
    """(3, H, W) ground truth in [-1, 1]."""


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
        for i, (h, w) in enumerate(vae.grids):
            if not vae.is_target[i]:
                continue
            span = slice(first, first + h * w)
            # z_t - t v_pred, written so that an exact prediction gives exactly z0.
            error = self.velocity_true[span] - self.velocity_pred[span]
            clean = clean_from_velocity(self.clean[span], -error, times[i])
            images.append(
                TargetImage(vae.names[i], times[i], unpatchify(clean, h, w, patch), vae.images[i])
            )
            first += h * w
        return images

    def decoded_01(self, max_t: float) -> list[tuple[TargetImage, Tensor]]:
        """Images with t < max_t and their decoded predictions (3, H, W) float32 in [0, 1] scale.

        Decodes every image at most once a step, same-size images together, nothing padded.
        """
        gated = [i for i, target in enumerate(self.target_images) if target.t < max_t]
        missing: dict[torch.Size, list[int]] = defaultdict(list)
        for i in gated:
            if i not in self._decoded:
                missing[self.target_images[i].latent_pred.shape].append(i)
        for members in missing.values():
            latents = torch.stack([self.target_images[i].latent_pred for i in members])
            decoded = 0.5 * self.model.vae.decode(latents) + 0.5
            self._decoded.update(zip(members, decoded, strict=True))
        return [(self.target_images[i], self._decoded[i]) for i in gated]

    @cached_property
    def _decoded(self) -> dict[int, Tensor]:
        return {}

    def zero(self) -> Tensor:
        """Exactly 0 and part of the graph, so that a step without images still has one."""
        return (self.velocity_pred * 0).sum()


class Term(Protocol):
    """One loss. `count` is None when the batch has nothing for it: the term is then absent."""

    name: str
    needs_image: bool

    def count(self, batch: PackedBatch, timestep_shift: float) -> float | None: ...
    def total(self, out: StepOutputs) -> Tensor: ...


class CrossEntropy:
    """-log p(label) of answer tokens, weighted; count: the sum of the weights."""

    name = "ce"
    needs_image = False

    def count(self, batch: PackedBatch, timestep_shift: float) -> float | None:
        return batch.labels.total_weight if batch.labels is not None else None

    def per_token(self, out: StepOutputs) -> Tensor:
        """(N,) float32. Logits exist for `CE_CHUNK_TOKENS` tokens at a time."""
        labels = out.batch.labels
        assert labels is not None  # `count` has said so
        head = out.model.language_model.lm_head

        def chunk_ce(hidden: Tensor, ids: Tensor) -> Tensor:
            return F.cross_entropy(head(hidden).float(), ids, reduction="none")

        answers = out.hidden[labels.indexes]
        return torch.cat(
            [
                checkpoint(chunk_ce, hidden, ids, use_reentrant=False)
                for hidden, ids in zip(
                    answers.split(CE_CHUNK_TOKENS), labels.ids.split(CE_CHUNK_TOKENS), strict=True
                )
            ]
        )

    def total(self, out: StepOutputs) -> Tensor:
        assert out.batch.labels is not None
        return (self.per_token(out) * out.batch.labels.weights).sum()


class VelocityMSE:
    """Squared error of the velocity, mean over a token's D numbers; count: target tokens."""

    name = "mse"
    needs_image = False

    def count(self, batch: PackedBatch, timestep_shift: float) -> float | None:
        return (batch.vae.num_target_tokens or None) if batch.vae is not None else None

    def total(self, out: StepOutputs) -> Tensor:
        return (out.velocity_pred - out.velocity_true).square().mean(dim=1).sum()


def _gated_areas(batch: PackedBatch, timestep_shift: float, max_t: float) -> float | None:
    """Pixels of the target images with t < max_t; None without any target image."""
    if batch.vae is None or not any(batch.vae.is_target):
        return None
    times = batch.vae.times(timestep_shift)
    targets = zip(batch.vae.images, batch.vae.is_target, times, strict=True)
    return float(sum(x.shape[-2] * x.shape[-1] for x, target, t in targets if target and t < max_t))


@dataclass(frozen=True)
class PixelTerm:
    """|x_pred - x|^power of decoded images in [0, 1]; count: elements of the gated images."""

    power: int = 1
    max_t: float = 0.3
    name = "pixel"
    needs_image = True

    def __post_init__(self) -> None:
        if self.power not in (1, 2):
            raise ValueError(f"the pixel loss is L1 or L2, not L{self.power}")

    def count(self, batch: PackedBatch, timestep_shift: float) -> float | None:
        area = _gated_areas(batch, timestep_shift, self.max_t)
        return None if area is None else 3 * area

    def total(self, out: StepOutputs) -> Tensor:
        total = out.zero()
        for target, pred_01 in out.decoded_01(self.max_t):
            error = (pred_01 - (0.5 * target.image_pm1 + 0.5)).abs() ** self.power
            total = total + gate(target.t, self.max_t) * error.sum()
        return total


@dataclass(frozen=True)
class SSIMTerm:
    """Area times (1 - SSIM) of decoded images; count: pixels of the gated images.

    `grad_scale` multiplies the gradient between SSIM and decoder; for the gradient it is the same
    as the weight, only the logged value differs.
    """

    max_t: float = 0.1
    window_size: int = 11
    grad_scale: float = 0.1
    name = "ssim"
    needs_image = True

    def __post_init__(self) -> None:
        if self.window_size < 1 or self.window_size % 2 == 0:
            raise ValueError(f"ssim_window_size={self.window_size} must be odd and positive")

    def count(self, batch: PackedBatch, timestep_shift: float) -> float | None:
        return _gated_areas(batch, timestep_shift, self.max_t)

    def total(self, out: StepOutputs) -> Tensor:
        total = out.zero()
        for target, pred_01 in out.decoded_01(self.max_t):
            scaled = _scale_gradient(pred_01, self.grad_scale)
            truth = 0.5 * target.image_pm1 + 0.5
            ssim = ssim_per_image(scaled[None], truth[None], window_size=self.window_size)[0]
            area = pred_01.shape[-2] * pred_01.shape[-1]
            total = total + gate(target.t, self.max_t) * area * (1 - ssim)
        return total


class LossSet:
    """The configured terms, in order. Adding a loss: one class, one argument."""

    def __init__(self, terms: tuple[Term, ...] = (CrossEntropy(), VelocityMSE())) -> None:
        self.terms = terms

    @property
    def needs_image(self) -> bool:
        """The one rule that says whether a run needs the VAE decoder."""
        return any(term.needs_image for term in self.terms)

    def counts(self, batch: PackedBatch, timestep_shift: float) -> dict[str, float]:
        """Count of every term that the batch has something for, without touching a device."""
        counts = {term.name: term.count(batch, timestep_shift) for term in self.terms}
        return {name: count for name, count in counts.items() if count is not None}

    def __call__(self, out: StepOutputs) -> dict[str, LossTerm]:
        counts = self.counts(out.batch, out.model.config.timestep_shift)
        with torch.autocast(out.hidden.device.type, enabled=False):
            return {
                term.name: LossTerm(term.total(out), counts[term.name])
                for term in self.terms
                if term.name in counts
            }


class _GradientScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.scale, None


def _scale_gradient(x: Tensor, scale: float) -> Tensor:
    """Identity whose gradient is multiplied by `scale`."""
    return x if scale == 1 else _GradientScale.apply(x, scale)


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
        return loss.mean()
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
    error = (x_pred.float() - x_gt.float()).abs() ** (1 if loss_type == "l1" else 2)
    if mask is None:
        return error.mean()
    weight = mask.sum() * error.shape[1]
    return (error * mask).sum() / weight.where(weight > 0, 1.0)


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
