"""SSIM (Wang et al. 2004, "Image quality assessment: from error visibility to structural
similarity", IEEE TIP 13(4), eqs. 13 to 16) with its gradient, both computed in one pass.

The loss is a scalar per image, so its gradient with respect to the image can be taken in the
forward pass, strip of rows by strip of rows; backward only multiplies it. No graph and no
full-size intermediate but the gradient is kept.

The formula is evaluated in the difference d = x - y and the sum s = x + y:

    luminance = 1 - 2 q,  q = mean(d)^2 / (mean(d)^2 + mean(s)^2 + 2 C1)
    contrast  = 1 - 2 p,  p = var(d)    / (var(d)    + var(s)    + 2 C2)
    SSIM = luminance * contrast,  1 - SSIM = 2 (q + p - 2 q p)

which is the textbook SSIM, needs the same four blurs, and has no cancellation where it matters:
equal images have d = 0, hence a loss and a gradient of exactly 0 at any brightness.

Shapes: B images, C channels, H x W pixels, N planes (a channel of an image), w window,
h = w - 1 halo.
"""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

K1, K2, SIGMA = 0.01, 0.03, 1.5
# Pixels that one strip may hold: what stays in a CPU's cache, and what fills an accelerator.
STRIP_PIXELS = 2**17
STRIP_PIXELS_ACCELERATOR = 2**22
# A banded matrix product does (block + h) / w times the needed arithmetic, but small products run
# slowly: 8, 16, 32 and 64 tried.
BLOCK = 16
# More rows than this in a CPU's strip save no time.
STRIP_ROWS = 256


def gaussian_window(
    window_size: int, sigma: float = SIGMA, *, dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    """Normalised 1-D Gaussian of an odd number of taps, (window_size,), computed in float64.

    Raises ValueError when `window_size` is even or below 1.
    """
    if window_size < 1 or window_size % 2 == 0:
        raise ValueError(f"SSIM window_size must be odd and at least 1, got {window_size}")
    offsets = torch.arange(window_size, dtype=torch.float64) - window_size // 2
    window = torch.exp(-0.5 * (offsets / sigma) ** 2)
    return (window / window.sum()).to(device, dtype)


@torch.compiler.disable
def ssim_per_image(
    x_pred: Tensor,
    x_true: Tensor,
    *,
    window_size: int = 11,
    data_range: float = 1.0,
    weight: Tensor | None = None,
    compiled: bool = False,
) -> Tensor:
    """SSIM of each image (Wang et al. 2004), differentiable once with respect to `x_pred`.

    Gaussian window of sigma 1.5, windows wholly inside the image, population covariance, mean
    over channels and positions. A window larger than the image shrinks to the largest odd size
    that fits. Computed in float32 (float64 if an input is) whatever autocast says.

    Args:
        x_pred, x_true: (B, C, H, W) floating point, values in a range as wide as `data_range`;
            B may be 0. The gradient has `x_pred`'s dtype.
        window_size: odd number of pixels.
        data_range: width of the value range, > 0; enters through C1 and C2 only.
        weight: (B, 1, H, W), not negative: weight of the window centred at each pixel. An image
            whose weights at the window centres are all 0 has SSIM 1 and gradient 0.
        compiled: run each strip through torch.compile. The first call takes about half a minute
            on a CPU, the first image of another size as long again: from then on one kernel, a
            little slower, serves all sizes.

    Returns:
        (B,) float32 (float64 if an input is), in [-1, 1] but for rounding.

    Raises:
        ValueError: an even window, shapes that differ, no floating point, no pixels,
            `data_range` <= 0, or a gradient asked for `x_true` or `weight`, which are data.
    """
    x, y = x_pred, x_true
    if x.dim() != 4 or x.shape != y.shape:
        raise ValueError(
            f"SSIM needs two (B, C, H, W) batches, got {tuple(x.shape)}, {tuple(y.shape)}"
        )
    if not (x.is_floating_point() and y.is_floating_point()):
        raise ValueError(f"SSIM needs floating point images, got {x.dtype} and {y.dtype}")
    if 0 in x.shape[1:] or not data_range > 0:
        raise ValueError(f"SSIM needs pixels and data_range > 0: {tuple(x.shape)}, {data_range}")
    if y.requires_grad or (weight is not None and weight.requires_grad):
        raise ValueError("SSIM is differentiated by x_pred only: detach x_true and weight")
    expected = (x.shape[0], 1, *x.shape[2:])
    if weight is not None and weight.shape != expected:
        raise ValueError(f"SSIM weight must have shape {expected}, got {tuple(weight.shape)}")
    window = gaussian_window(window_size, dtype=torch.float64, device="cpu")
    fitting = (min(x.shape[-2:]) - 1) // 2 * 2 + 1
    if fitting < window_size:
        window = gaussian_window(fitting, dtype=torch.float64, device="cpu")
    need_grad = x.requires_grad and torch.is_grad_enabled()
    return _SSIM.apply(x, y, weight, window.tolist(), data_range, compiled, need_grad)


class _SSIM(torch.autograd.Function):
    """Forward computes SSIM and, when asked, its unscaled gradient; backward scales it."""

    @staticmethod
    def forward(ctx, x, y, weight, taps, data_range, compiled, need_grad):
        B, C, H, W = x.shape
        halo = len(taps) - 1
        dtype = torch.float64 if torch.float64 in (x.dtype, y.dtype) else torch.float32
        # torch.compile fuses the taps into one loop; without it, on a CPU, matrix products are
        # faster.
        banded = x.device.type == "cpu" and not compiled
        strip = functools.partial(
            _compiled_strip() if compiled else _strip,
            blur=(_Bands if banded else _Taps)(taps, dtype),
            c1=(K1 * data_range) ** 2,
            c2=(K2 * data_range) ** 2,
            need_grad=need_grad,
        )
        loss = torch.zeros(B * C, dtype=dtype, device=x.device)
        gradient = loss.new_zeros(B * C if need_grad else 0, H, W)
        count = loss.new_full((B,), C * (H - halo) * (W - halo))
        if weight is not None:
            half = halo // 2
            weight = weight[:, :, half : H - half, half : W - half].expand(-1, C, -1, -1)
            count = weight.sum((1, 2, 3), dtype=dtype)
            weight = weight.flatten(0, 1)

        planes, rows = _strip_size(x, halo, STRIP_ROWS if banded else H)
        x, y = x.flatten(0, 1), y.flatten(0, 1)
        with torch.autocast(x.device.type, enabled=False), _ieee_matmul():
            for plane in range(0, B * C, planes):
                part = slice(plane, plane + planes)
                for first in range(0, H - halo, rows):
                    windows = part, slice(first, min(first + rows, H - halo))
                    pixels = part, slice(first, first + rows + halo)
                    strip_loss, strip_gradient = strip(
                        x[pixels], y[pixels], None if weight is None else weight[windows]
                    )
                    loss[part].add_(strip_loss)
                    if strip_gradient is not None:
                        gradient[pixels].add_(strip_gradient)
        # An image without any weight has a sum of 0: loss 0 and gradient 0, not 0 / 0.
        scale = torch.where(count > 0, 1 / count, 0.0)
        if need_grad:
            ctx.save_for_backward(gradient.view(B, C, H, W), -4 * scale)
        return 1 - 2 * scale * loss.view(B, C).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_ssim):
        gradient, scale = ctx.saved_tensors
        # Autograd rounds it to the image's dtype, once: a factor of 1e-6 would not survive float16.
        gradient = gradient * (grad_ssim * scale)[:, None, None, None]
        return gradient, None, None, None, None, None, None


def _strip_size(x: Tensor, halo: int, most_rows: int) -> tuple[int, int]:
    """Planes, and rows of windows, that make a strip."""
    H, W = x.shape[-2:]
    if x.device.type == "cpu":
        pixels, planes = STRIP_PIXELS, 1
    else:
        pixels, planes = STRIP_PIXELS_ACCELERATOR, max(1, STRIP_PIXELS_ACCELERATOR // (H * W))
    # At least as many rows of windows as the halo adds: with fewer, halos are most of the work.
    most = max(min(pixels // (planes * W) - halo, most_rows), halo, 1)
    # All strips of about one height: a short last one costs nearly as much as a full one.
    return planes, math.ceil((H - halo) / math.ceil((H - halo) / most))


def _strip(
    x: Tensor,
    y: Tensor,
    weight: Tensor | None,
    blur: "_Taps",
    c1: float,
    c2: float,
    need_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """(N,) sum of (1 - SSIM) / 2 over the windows of a strip, and its gradient / 2.

    x, y and the gradient: (N, rows + h, W); weight: (N, rows, W - h).
    """
    x, y = x.to(blur.dtype), y.to(blur.dtype)
    d, s = x - y, x + y
    # Less each plane's mean: E[s^2] - E[s]^2 cancels otherwise, and a variance does not depend
    # on it.
    d_centre, s_centre = d.mean((1, 2), keepdim=True), s.mean((1, 2), keepdim=True)
    d_mean, s_mean = blur(d.sub_(d_centre)), blur(s.sub_(s_centre))
    d_variance = blur(d * d).addcmul_(d_mean, d_mean, value=-1)
    s_variance = blur(s * s).addcmul_(s_mean, s_mean, value=-1)
    # Every blurred map may be overwritten from here on: a strip should stay in the cache.
    d_true, s_true = d_mean + d_centre, s_mean + s_centre
    d_square = d_true * d_true
    luminance = torch.addcmul(d_square, s_true, s_true).add_(2 * c1)
    contrast = s_variance.add_(d_variance).add_(2 * c2)
    q, p = d_square.div_(luminance), d_variance.div_(contrast)
    by_q = torch.rsub(p, 1, alpha=2)
    loss = torch.addcmul(p, by_q, q)
    if weight is not None:
        weight = weight.to(blur.dtype)
        loss = loss * weight
    loss = loss.sum((1, 2))
    if not need_grad:
        return loss, None

    # Half the derivative by x of q + p - 2 q p: through the means, E[d^2] and E[s^2].
    by_q = by_q.div_(luminance)
    by_p = torch.rsub(q, 1, alpha=2).div_(contrast)
    if weight is not None:
        by_q, by_p = by_q * weight, by_p * weight
    by_s_square = p.mul_(by_p)
    by_mean = d_true.addcmul_(s_true.add_(d_true), q, value=-1).mul_(by_q)
    by_mean.addcmul_(d_mean, by_p, value=-1).addcmul_(s_mean.add_(d_mean), by_s_square)
    gradient = blur.adjoint(by_mean)
    gradient.addcmul_(blur.adjoint(by_p), d)
    gradient.addcmul_(blur.adjoint(by_s_square), s.add_(d), value=-1)
    return loss, gradient


@functools.cache
def _compiled_strip() -> Callable:
    return torch.compile(_strip)


@contextmanager
def _ieee_matmul() -> Iterator[None]:
    """Full float32 products, whatever `torch.set_float32_matmul_precision` was told: SSIM of a
    low-contrast image does not survive bf16."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    if before in ("none", "ieee"):
        yield
        return
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


class _Taps:
    """Separable "valid" blur of (N, rows + h, columns + h), tap by tap."""

    def __init__(self, taps: list[float], dtype: torch.dtype):
        self.taps = taps
        self.halo = len(taps) - 1
        self.dtype = dtype

    def __call__(self, maps: Tensor) -> Tensor:
        for dim in (1, 2):
            size = maps.shape[dim] - self.halo
            blurred = maps.narrow(dim, 0, size) * self.taps[0]
            for k, tap in enumerate(self.taps[1:], 1):
                blurred = blurred.add_(maps.narrow(dim, k, size), alpha=tap)
            maps = blurred
        return maps

    def adjoint(self, maps: Tensor) -> Tensor:
        """The window is symmetric: the adjoint is the blur of a map in a frame of zeros."""
        return self(F.pad(maps, [self.halo] * 4))


class _Bands(_Taps):
    """The same blur of one plane as matrix products with a banded Toeplitz matrix, for a CPU.

    A product multiplies neighbours by zero, and NaN * 0 is NaN: planes are kept apart, or an image
    that is not finite would spoil the value of the next.
    """

    def __init__(self, taps: list[float], dtype: torch.dtype):
        super().__init__(taps, dtype)
        # (BLOCK, BLOCK + h): row j holds the taps in columns j to j + h.
        self.band = torch.zeros(BLOCK, BLOCK + self.halo, dtype=dtype)
        for k, tap in enumerate(taps):
            self.band.diagonal(k).fill_(tap)

    def __call__(self, maps: Tensor) -> Tensor:
        (plane,) = maps
        down = self.down(plane)
        return self.down(down.T).T[None]

    def adjoint(self, maps: Tensor) -> Tensor:
        return super().adjoint(maps.mT).mT

    def down(self, maps: Tensor) -> Tensor:
        """Blur (rows + h, columns) along the rows: (rows, columns)."""
        rows, columns = len(maps) - self.halo, maps.shape[1]
        blurred = maps.new_empty(rows, columns)
        whole, rest = divmod(rows, BLOCK)
        if whole:
            spans = maps.unfold(0, BLOCK + self.halo, BLOCK).transpose(1, 2)
            out = blurred[: rows - rest].view(whole, BLOCK, columns)
            torch.bmm(self.band.expand(whole, -1, -1), spans, out=out)
        if rest:
            band = self.band[:rest, : rest + self.halo]
            torch.mm(band, maps[rows - rest :], out=blurred[rows - rest :])
        return blurred
