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

Shapes: B images, C channels, H x W pixels, w window, h = w - 1 halo. Inside a strip the order is
(rows, B, C, columns): with rows outermost a vertical blur is one matrix product.
"""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

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
STRIP_ROWS = 64


def gaussian_window(
    window_size: int, sigma: float = SIGMA, *, dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    """Normalised 1-D Gaussian of an odd number of taps, (window_size,), computed in float64.

    Raises ValueError when `window_size` is even or below 1.
    """
    return torch.tensor(_gaussian_taps(window_size, sigma), dtype=dtype, device=device)


def _gaussian_taps(window_size: int, sigma: float = SIGMA) -> tuple[float, ...]:
    if window_size < 1 or window_size % 2 == 0:
        raise ValueError(f"SSIM window_size must be odd and at least 1, got {window_size}")
    offsets = range(-(window_size // 2), window_size // 2 + 1)
    taps = [math.exp(-0.5 * (offset / sigma) ** 2) for offset in offsets]
    return tuple(tap / math.fsum(taps) for tap in taps)


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
            on a CPU, and as long again when B or C goes from 1 to more.

    Returns:
        (B,) float32 (float64 if an input is), in [-1, 1] but for rounding.

    Raises:
        ValueError: an even window, shapes that differ, no floating point, no pixels,
            `data_range` <= 0, or a gradient asked for `x_true` or `weight`, which are data.
    """
    _check(x_pred, x_true, weight, data_range)
    taps = _gaussian_taps(window_size)
    fitting = (min(x_pred.shape[-2:]) - 1) // 2 * 2 + 1
    if fitting < window_size:
        taps = _gaussian_taps(fitting)
    need_grad = x_pred.requires_grad and torch.is_grad_enabled()
    return _SSIM.apply(x_pred, x_true, weight, taps, data_range, compiled, need_grad)


def _check(x: Tensor, y: Tensor, weight: Tensor | None, data_range: float) -> None:
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


class _SSIM(torch.autograd.Function):
    """Forward computes SSIM and, when asked, its unscaled gradient; backward scales it."""

    @staticmethod
    def forward(ctx, x, y, weight, taps, data_range, compiled, need_grad):
        with torch.autocast(x.device.type, enabled=False):
            loss, gradient = _sums(x, y, weight, taps, data_range, compiled, need_grad)
            count = _window_weights(x, weight, len(taps) - 1, loss.dtype)
        # An image without any weight has a sum of 0: loss 0 and gradient 0, not 0 / 0.
        scale = torch.where(count > 0, 1 / count, 0.0)
        if need_grad:
            ctx.save_for_backward(gradient, -4 * scale)
        return 1 - 2 * scale * loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_ssim):
        gradient, scale = ctx.saved_tensors
        factor = (grad_ssim * scale)[:, None, None, None]
        # Rounded once at the end: a factor of 1e-6 would not survive float16.
        return (gradient * factor).to(gradient.dtype), None, None, None, None, None, None


def _window_weights(x: Tensor, weight: Tensor | None, halo: int, dtype: torch.dtype) -> Tensor:
    """(B,) sum of the weights of all windows and channels."""
    B, C, H, W = x.shape
    if weight is None:
        return torch.full((B,), C * (H - halo) * (W - halo), dtype=dtype, device=x.device)
    return C * _at_centres(weight, halo).sum((1, 2, 3), dtype=dtype)


def _at_centres(weight: Tensor, halo: int) -> Tensor:
    H, W = weight.shape[2:]
    return weight[:, :, halo // 2 : H - halo // 2, halo // 2 : W - halo // 2]


def _sums(
    x: Tensor,
    y: Tensor,
    weight: Tensor | None,
    taps: tuple[float, ...],
    data_range: float,
    compiled: bool,
    need_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """(B,) weighted sum of (1 - SSIM) / 2 over windows and channels, and its gradient / 2 in the
    shape and dtype of `x`."""
    double = torch.float64 in (x.dtype, y.dtype)
    dtype = torch.float64 if double else torch.float32
    halo = len(taps) - 1
    # torch.compile fuses the taps into one loop; without it, on a CPU, matrix products are faster.
    banded = x.device.type == "cpu" and not compiled
    images, rows = _strip_size(x, halo, STRIP_ROWS if banded else x.shape[2])
    strip = functools.partial(
        _compiled_strip() if compiled else _strip,
        blur=_Bands(taps, dtype, x.shape[3]) if banded else _Taps(taps, dtype),
        c1=(K1 * data_range) ** 2,
        c2=(K2 * data_range) ** 2,
        need_grad=need_grad,
    )
    loss = torch.zeros(x.shape[0], dtype=dtype, device=x.device)
    gradient = torch.empty_like(x) if need_grad else None
    weight = None if weight is None else _at_centres(weight, halo)
    with _ieee_matmul() if banded else nullcontext():
        for first in range(0, x.shape[0], images):
            part = slice(first, first + images)
            loss[part] = _sweep(
                x[part],
                y[part],
                None if weight is None else weight[part],
                None if gradient is None else gradient[part],
                halo,
                rows,
                strip,
            )
    return loss, gradient


def _strip_size(x: Tensor, halo: int, most_rows: int) -> tuple[int, int]:
    """Images, and rows of windows, that make a strip."""
    B, C, H, W = x.shape
    if x.device.type == "cpu":
        # Never two images: a banded product multiplies neighbours by zero, NaN * 0 is NaN, and an
        # image that is not finite would spoil the value of the next.
        pixels, images = STRIP_PIXELS, 1
    else:
        pixels, images = STRIP_PIXELS_ACCELERATOR, STRIP_PIXELS_ACCELERATOR // (C * H * W)
        images = max(1, min(B, images))
    windows = H - halo
    # At least as many rows of windows as the halo adds: with fewer, halos are most of the work.
    most = min(max(pixels // (images * C * W) - halo, halo, 1), max(most_rows, halo))
    # All strips of about one height: a short last one costs nearly as much as a full one.
    return images, math.ceil(windows / math.ceil(windows / most))


def _sweep(
    x: Tensor,
    y: Tensor,
    weight: Tensor | None,
    gradient: Tensor | None,
    halo: int,
    rows: int,
    strip: Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor | None]],
) -> Tensor:
    """(B,) loss sums of some images, strip by strip; writes their gradient into `gradient`.

    A strip of windows reaches `halo` rows into the next one: those rows of its gradient are
    carried over and added, so no window is computed twice.
    """
    windows = x.shape[2] - halo
    losses, carry = [], torch.zeros((), device=x.device)
    for first in range(0, windows, rows):
        last = min(first + rows, windows)
        strip_loss, strip_gradient = strip(
            _rows_first(x[:, :, first : last + halo]),
            _rows_first(y[:, :, first : last + halo]),
            None if weight is None else _rows_first(weight[:, :, first:last]),
        )
        losses.append(strip_loss)
        if gradient is not None and strip_gradient is not None:
            strip_gradient[:halo] += carry
            carry = strip_gradient[last - first :].clone()
            _rows_first(gradient)[first:last] = strip_gradient[: last - first]
    if gradient is not None:
        _rows_first(gradient)[windows:] = carry
    return torch.stack(losses).sum(0)


def _rows_first(image: Tensor) -> Tensor:
    """(B, C, rows, W) -> (rows, B, C, W), a view."""
    return image.permute(2, 0, 1, 3)


def _strip(
    x: Tensor,
    y: Tensor,
    weight: Tensor | None,
    blur: "_Bands | _Taps",
    c1: float,
    c2: float,
    need_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """Loss sum (B,) and gradient (rows + h, B, C, W) of the windows of one strip.

    x, y: (rows + h, B, C, W); weight: (rows, B, 1, W - h). Unscaled, see `_sums`.
    """
    W = x.shape[-1]
    x, y = blur.lay_out(x), blur.lay_out(y)
    (d, d_centre), (s, s_centre) = _centred(x - y, W), _centred(x + y, W)
    del x, y
    d_mean, s_mean = blur(d), blur(s)
    d_variance = blur(d * d).addcmul_(d_mean, d_mean, value=-1)
    s_variance = blur(s * s).addcmul_(s_mean, s_mean, value=-1)
    # Every blurred map may be overwritten from here on: a strip should stay in the cache.
    d_true = d_mean + d_centre
    d_square = d_true * d_true
    luminance = (s_mean + s_centre).square_().add_(d_square).add_(2 * c1)
    contrast = s_variance.add_(d_variance).add_(2 * c2)
    q, p = d_square.div_(luminance), d_variance.div_(contrast)
    loss = torch.add(p, q).addcmul_(p, q, value=-2)
    if weight is not None:
        weight = blur.lay_out(weight)
        loss = loss * weight
    loss = loss[..., : W - blur.halo].sum((0, 2, 3))
    if not need_grad:
        return loss, None

    # Half the derivative by x of q + p - 2 q p: through the means, E[d^2] and E[s^2].
    by_q = torch.rsub(p, 1, alpha=2).div_(luminance)
    by_p = torch.rsub(q, 1, alpha=2).div_(contrast)
    if weight is not None:
        by_q, by_p = by_q * weight, by_p * weight
    by_s_square = p.mul_(by_p)
    both_mean = s_mean.add_(d_mean)
    by_mean = d_true.addcmul_(both_mean + (s_centre + d_centre), q, value=-1).mul_(by_q)
    by_mean.addcmul_(d_mean, by_p, value=-1).addcmul_(both_mean, by_s_square)
    gradient = blur.adjoint(by_mean)
    gradient.addcmul_(blur.adjoint(by_p), d)
    gradient.addcmul_(blur.adjoint(by_s_square), s.add_(d), value=-1)
    return loss, gradient[..., :W]


def _centred(image: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """`image` less each plane's mean, and those means: E[s^2] - E[s]^2 cancels otherwise, and a
    variance does not depend on it."""
    centre = image[..., :width].mean((0, 3), keepdim=True)
    return image.sub_(centre), centre


@functools.cache
def _compiled_strip() -> Callable:
    return torch.compile(_strip, dynamic=True)


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
    """Separable "valid" blur along the first and the last dimension, tap by tap."""

    def __init__(self, taps: tuple[float, ...], dtype: torch.dtype):
        self.taps = taps
        self.halo = len(taps) - 1
        self.dtype = dtype

    def lay_out(self, image: Tensor) -> Tensor:
        return image.to(self.dtype)

    def __call__(self, maps: Tensor) -> Tensor:
        rows, columns = maps.shape[0] - self.halo, maps.shape[-1] - self.halo
        across = maps[:rows] * self.taps[0]
        for k, tap in enumerate(self.taps[1:], 1):
            across = across.add_(maps[k : k + rows], alpha=tap)
        blurred = across[..., :columns] * self.taps[0]
        for k, tap in enumerate(self.taps[1:], 1):
            blurred = blurred.add_(across[..., k : k + columns], alpha=tap)
        return blurred

    def adjoint(self, maps: Tensor) -> Tensor:
        ends = (self.halo, self.halo)
        return self(F.pad(maps, ends + (0, 0) * (maps.dim() - 2) + ends))


class _Bands:
    """The same blur as matrix products with a banded Toeplitz matrix, block by block, for a CPU.

    A row is padded to whole blocks of columns, so that a tensor is a matrix of blocks without a
    copy. What a blurred row holds beyond the `valid` columns is nonsense: those windows ran on
    into the next row.
    """

    def __init__(self, taps: tuple[float, ...], dtype: torch.dtype, width: int):
        self.halo = len(taps) - 1
        self.dtype = dtype
        self.valid = width - self.halo
        self.block = max(BLOCK, self.halo)
        self.padded = math.ceil(width / self.block) * self.block
        self.band = _band(taps, self.block, dtype)
        # What a block of outputs takes from its own block of inputs, and from the next one.
        self.own, self.next = self.band[:, : self.block], self.band[:, self.block :]

    def lay_out(self, image: Tensor) -> Tensor:
        width = image.shape[-1]
        laid_out = image.new_empty(*image.shape[:-1], self.padded, dtype=self.dtype)
        laid_out[..., :width] = image
        laid_out[..., width:] = 0
        return laid_out

    def __call__(self, maps: Tensor) -> Tensor:
        blocks = self.down(maps.view(len(maps), -1)).view(-1, self.block)
        blurred = blocks @ self.own.T
        blurred[:-1].addmm_(blocks[1:, : self.halo], self.next.T)
        return blurred.view(-1, *maps.shape[1:])

    def adjoint(self, maps: Tensor) -> Tensor:
        """Overwrites the nonsense in `maps` with zeros."""
        maps[..., self.valid :] = 0
        rows, blocks = len(maps), maps.view(-1, self.block)
        # The window is symmetric: down the rows the adjoint is the blur of a map between zeros.
        framed = maps.new_empty(rows + 2 * self.halo, maps[0].numel())
        framed[: self.halo] = 0
        framed[rows + self.halo :] = 0
        spread = framed[self.halo : rows + self.halo].view(-1, self.block)
        torch.mm(blocks, self.own, out=spread)
        spread[1:, : self.halo].addmm_(blocks[:-1], self.next)
        return self.down(framed).view(-1, *maps.shape[1:])

    def down(self, maps: Tensor) -> Tensor:
        """Blur (rows + h, columns) along the rows: (rows, columns)."""
        rows, columns = len(maps) - self.halo, maps.shape[1]
        blurred = maps.new_empty(rows, columns)
        whole, rest = divmod(rows, self.block)
        if whole:
            spans = maps.unfold(0, self.block + self.halo, self.block).transpose(1, 2)
            out = blurred[: rows - rest].view(whole, self.block, columns)
            torch.bmm(self.band.expand(whole, -1, -1), spans, out=out)
        if rest:
            band = self.band[:rest, : rest + self.halo]
            torch.mm(band, maps[rows - rest :], out=blurred[rows - rest :])
        return blurred


def _band(taps: tuple[float, ...], outputs: int, dtype: torch.dtype) -> Tensor:
    """(outputs, outputs + h): row j holds the taps in columns j to j + h, zeros elsewhere."""
    inputs = outputs + len(taps) - 1
    band = torch.zeros(outputs, inputs + 1, dtype=dtype)
    band[:, : len(taps)] = torch.tensor(taps, dtype=dtype)
    # Rows one element shorter, read from the same memory: each starts one column further right.
    return band.view(-1)[: outputs * inputs].view(outputs, inputs)
