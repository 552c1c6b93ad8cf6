"""Losses on decoded images, differentiated where they are computed.

A pixel-space loss is a scalar function of the predicted velocity, and its denominator is known from
the batch. So a few images at a time are decoded, compared and differentiated in the forward pass,
and the decoder's activations are gone before the next ones: memory does not grow with the number of
images, and the gradient at the predicted velocity is there to be looked at.

Shape legend: B images of one size, C channels, H and W pixels, K terms, M target tokens,
D numbers in a latent token, Z latent channels.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..autoencoder import Autoencoder
from ..batch import PackedBatch
from ..flow import gate
from ..geometry import patchify
from .ssim import ssim_per_image

ADAPTIVE_CHUNKS = ((1024 * 1024, 1), (512 * 512, 2), (0, 4))
"""Images decoded at once, by the least number of pixels of each."""
JOINT = "joint"
"""Key of the gradient that all terms share."""


@dataclass(frozen=True)
class TargetImage:
    """One target image of a batch and its predicted clean latent."""

    name: str
    t: float
    tokens: slice
    """Its rows among the M target tokens."""
    latent: Tensor
    """(Z, h, w) float32 predicted clean latent, without a graph."""
    image_pm1: Tensor
    """(3, H, W) ground truth in [-1, 1]."""


@dataclass(frozen=True)
class ImageLoss:
    """What a term saw of one image."""

    image: TargetImage
    gate: float
    loss: Tensor
    """Float32 scalar, mean over the image, before the gate."""
    clamped_share: Tensor | None = None
    """Share of the elements of the gradient at the decoded image that the clamp has cut."""


class PixelSpaceTerm:
    """A loss of decoded images with t < max_t, weighted by the gate.

    Its count is the number of elements (pixels, or pixels times channels) of those images.
    """

    name: str
    max_t: float
    elements_per_pixel: int

    def losses(self, pred_01: Tensor, true_01: Tensor) -> Tensor:
        """(B,) sums over the elements of (B, 3, H, W) images, before the gate."""
        raise NotImplementedError

    def adjust(self, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        """What passes on to the decoder of a gradient (B, 3, H, W) of `losses`, and the (B,) share
        of its elements that was clamped, if there is a clamp."""
        return gradient, None

    def count(self, batch: PackedBatch, timestep_shift: float) -> float | None:
        """None without any target image, 0 when none is gated."""
        if batch.vae is None or not any(batch.vae.is_target):
            return None
        times = batch.vae.times(timestep_shift)
        targets = zip(batch.vae.images, batch.vae.is_target, times, strict=True)
        gated = [x.shape[-2] * x.shape[-1] for x, target, t in targets if target and t < self.max_t]
        return float(self.elements_per_pixel * sum(gated))


@dataclass(frozen=True)
class PixelTerm(PixelSpaceTerm):
    """|x_pred - x|^power of decoded images in [0, 1]; count: elements of the gated images."""

    power: int = 1
    max_t: float = 0.3
    name = "pixel"
    elements_per_pixel = 3

    def __post_init__(self) -> None:
        if self.power not in (1, 2):
            raise ValueError(f"the pixel loss is L1 or L2, not L{self.power}")

    def losses(self, pred_01: Tensor, true_01: Tensor) -> Tensor:
        return ((pred_01 - true_01).abs() ** self.power).sum((1, 2, 3))


@dataclass(frozen=True)
class SSIMTerm(PixelSpaceTerm):
    """Area times (1 - SSIM) of decoded images; count: pixels of the gated images.

    Between decoder and SSIM the gradient of area times (1 - SSIM), a local quantity that does not
    depend on the size of the image, is clamped per element to [-grad_clamp, grad_clamp] and
    multiplied by `grad_scale`; values are untouched. For the gradient `grad_scale` is the same as
    the weight.
    """

    max_t: float = 0.1
    window_size: int = 11
    grad_scale: float = 0.1
    grad_clamp: float | None = None
    compiled: bool = False
    name = "ssim"
    elements_per_pixel = 1

    def __post_init__(self) -> None:
        if self.window_size < 1 or self.window_size % 2 == 0:
            raise ValueError(f"ssim_window_size={self.window_size} must be odd and positive")

    def losses(self, pred_01: Tensor, true_01: Tensor) -> Tensor:
        ssim = ssim_per_image(
            pred_01, true_01, window_size=self.window_size, compiled=self.compiled
        )
        return pred_01.shape[-2] * pred_01.shape[-1] * (1 - ssim)

    def adjust(self, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        share, most = None, self.grad_clamp
        if most is not None:
            share = (gradient.abs() > most).float().mean((1, 2, 3))
            gradient = gradient.clamp(-most, most)
        return self.grad_scale * gradient, share


@dataclass(frozen=True)
class PixelSpaceLosses:
    """The terms of one batch by name."""

    sums: dict[str, Tensor]
    """Float32 scalars."""
    images: dict[str, list[ImageLoss]]
    gradients: dict[str, Tensor]
    """(M, D) gradient of each sum at the predicted velocity, and, under `JOINT`, that of
    sum(scale * sum); those that were asked for."""


@dataclass(frozen=True)
class PixelSpace:
    """Computes pixel-space terms.

    Images of one size are decoded `chunk_size` at a time, or, with `adaptive_chunk`, 1, 2 or 4
    large, medium or small ones; nothing is padded.

    `balance` rescales the gradient of all terms at the predicted velocity so that its norm is
    `balance` times that of the reference (the idea of the adaptive weight of Esser et al. 2021,
    VQGAN). Norms are those of the batch on all ranks: `all_reduce` sums a tensor over them.
    """

    terms: Sequence[PixelSpaceTerm]
    chunk_size: int = 2
    adaptive_chunk: bool = True
    balance: float | None = None
    all_reduce: Callable[[Tensor], Tensor] = lambda norms: norms

    def __call__(
        self,
        vae: Autoencoder,
        targets: Sequence[TargetImage],
        velocity_pred: Tensor,
        patch: int,
        scales: Mapping[str, float] | None = None,
        observe: bool = False,
        reference: Tensor | None = None,
    ) -> PixelSpaceLosses:
        """The sums with their gradients at `velocity_pred`, (M, D) float32.

        `scales` are the factors of the sums in the total. With them all terms share one backward
        through the decoder; each term's own gradient is then known only if `observe` asks for it.
        `reference` (M, D) is the scaled gradient that `balance` compares with.
        """
        names = [term.name for term in self.terms]
        # A term that no rank has anything for is in no scales: it counts for nothing.
        factors = None if scales is None else {name: scales.get(name, 0.0) for name in names}
        joint = factors if len(names) > 1 and factors and any(factors.values()) else None
        differentiate = velocity_pred.requires_grad and torch.is_grad_enabled()
        wanted = [*([JOINT] if joint else []), *(names if observe or not joint else [])]
        losses = self._decode(vae, targets, velocity_pred, patch, joint, wanted, differentiate)
        gradients = losses.gradients
        if self.balance is not None and torch.is_grad_enabled():
            if factors is None or reference is None:
                raise ValueError("pixel_space_balance: pass the scales of the sums to the forward")
            own = gradients[JOINT] if joint else factors[names[0]] * gradients[names[0]]
            squares = torch.stack([own.square().sum(), reference.square().sum()])
            own_norm, reference_norm = self.all_reduce(squares).sqrt()
            factor = torch.where(own_norm > 0, self.balance * reference_norm / own_norm, 0.0)
            gradients = {key: factor * gradient for key, gradient in gradients.items()}
        values = torch.stack([losses.sums[name] for name in names])
        known = torch.stack([gradients[key] for key in ([JOINT] if joint else names)])
        shares = _on([*joint.values()], velocity_pred.device) if joint else None
        sums = _KnownGradient.apply(velocity_pred, values, known, shares)
        # FSDP2 refuses views as outputs of a module.
        by_name = {name: total.clone() for name, total in zip(names, sums, strict=True)}
        return PixelSpaceLosses(by_name, losses.images, gradients)

    def _decode(
        self,
        vae: Autoencoder,
        targets: Sequence[TargetImage],
        velocity_pred: Tensor,
        patch: int,
        factors: Mapping[str, float] | None,
        wanted: Sequence[str],
        differentiate: bool,
    ) -> PixelSpaceLosses:
        """Sums without a graph. Every image that a term gates is decoded once."""
        losses = PixelSpaceLosses(
            sums={term.name: velocity_pred.new_zeros(()) for term in self.terms},
            images={term.name: [] for term in self.terms},
            gradients={key: torch.zeros_like(velocity_pred.detach()) for key in wanted},
        )
        gated = [target for target in targets if any(target.t < x.max_t for x in self.terms)]
        for chunk in _chunks(gated, self.chunk_size, self.adaptive_chunk):
            latents = torch.stack([target.latent for target in chunk])
            true_01 = 0.5 * torch.stack([target.image_pm1 for target in chunk]) + 0.5
            decoded_01 = 0.5 * vae.decode(latents.requires_grad_(differentiate)) + 0.5
            pred_01 = decoded_01.detach().requires_grad_(differentiate)
            at_image: dict[str, Tensor] = {}
            for term in self.terms:
                if all(target.t >= term.max_t for target in chunk):
                    continue
                total, images, gradient = _of_term(term, chunk, pred_01, true_01)
                losses.sums[term.name].add_(total)
                losses.images[term.name] += images
                if gradient is not None:
                    at_image[term.name] = gradient
            if factors is not None and at_image:
                scaled = [factors[name] * gradient for name, gradient in at_image.items()]
                at_image[JOINT] = torch.stack(scaled).sum(0)
            keys = [key for key in wanted if key in at_image]
            for key in keys:
                (at_latents,) = torch.autograd.grad(
                    decoded_01, latents, at_image[key], retain_graph=key != keys[-1]
                )
                for target, at_latent in zip(chunk, at_latents, strict=True):
                    # The clean latent is z_t - t v.
                    losses.gradients[key][target.tokens] = -target.t * patchify(at_latent, patch)
        return losses


def _of_term(
    term: PixelSpaceTerm, chunk: Sequence[TargetImage], pred_01: Tensor, true_01: Tensor
) -> tuple[Tensor, list[ImageLoss], Tensor | None]:
    """Gated sum without a graph, gated images, and, where `pred_01` (B, C, H, W) asks for it, the
    sum's adjusted gradient there."""
    gates = [gate(target.t, term.max_t) for target in chunk]
    weights, gradient, clamped = _on(gates, true_01.device), None, None
    per_image = term.losses(pred_01, true_01)
    # Not gated is not seen: an image beyond all bounds times 0 would be NaN.
    total = torch.where(weights > 0, weights * per_image.detach(), 0.0).sum()
    if pred_01.requires_grad:
        (gradient,) = torch.autograd.grad(per_image.sum(), pred_01)
        gradient, clamped = term.adjust(gradient)
        weights = weights[:, None, None, None]
        gradient = torch.where(weights > 0, weights * gradient, 0.0)
    means = per_image.detach() / (term.elements_per_pixel * true_01[0, 0].numel())
    images = [
        ImageLoss(target, gates[i], means[i], None if clamped is None else clamped[i])
        for i, target in enumerate(chunk)
        if gates[i] > 0
    ]
    return total, images, gradient


def _on(numbers: list[float], device: torch.device) -> Tensor:
    """Float32 numbers of the host; it does not wait for the device to take them."""
    return torch.tensor(numbers).to(device, non_blocking=True)


def _chunks(
    targets: Sequence[TargetImage], chunk_size: int, adaptive: bool
) -> Iterator[list[TargetImage]]:
    """Images of one size at a time, as many as may be decoded at once."""
    by_size: dict[torch.Size, list[TargetImage]] = defaultdict(list)
    for target in targets:
        by_size[target.image_pm1.shape].append(target)
    for (_, height, width), members in by_size.items():
        if adaptive:
            chunk_size = next(n for least, n in ADAPTIVE_CHUNKS if height * width >= least)
        for first in range(0, len(members), chunk_size):
            yield members[first : first + chunk_size]


class _KnownGradient(torch.autograd.Function):
    """(K,) sums whose gradients at the predicted velocity were computed together with them.

    `gradients` (K, M, D); or (1, M, D), the gradient of sum(scales * sums), which is all that a
    caller may then differentiate: anything else fails in backward.
    """

    @staticmethod
    def forward(
        ctx: Any, velocity: Tensor, sums: Tensor, gradients: Tensor, scales: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(gradients, scales)
        return sums.clone()

    @staticmethod
    def backward(ctx: Any, by_sums: Tensor) -> tuple[Tensor, None, None, None]:
        gradients, scales = ctx.saved_tensors
        if scales is not None:
            shares = by_sums / scales
            same = (shares - shares[0]).abs() <= 1e-4 * shares[0].abs()
            torch._assert_async(same.all(), "sums are to be weighted by the scales given")
            by_sums = shares[:1]
        return torch.einsum("k,kmd->md", by_sums, gradients), None, None, None
