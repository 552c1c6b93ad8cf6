"""Fused SSIM against scikit-image, against plain float64 autograd, and against its identities."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from skimage.metrics import structural_similarity
from torch import Tensor

from modeling.bagel import ssim
from modeling.bagel.ssim import gaussian_window, ssim_per_image

SHAPES = [(1, 1, 11, 11), (2, 3, 40, 57), (1, 4, 33, 32), (1, 1, 12, 200), (1, 3, 150, 96)]


def ssim_map_reference(x: Tensor, y: Tensor, window_size: int = 11, data_range: float = 1.0):
    """(B, C, H - w + 1, W - w + 1) textbook SSIM map (Wang et al. 2004, eq. 13), by autograd."""
    offset = torch.arange(window_size, dtype=x.dtype) - (window_size - 1) / 2
    window = torch.exp(-(offset**2) / (2 * 1.5**2))
    window = torch.outer(window, window) / window.sum() ** 2
    channels = x.shape[1]

    def blur(z: Tensor) -> Tensor:
        return F.conv2d(z, window.expand(channels, 1, -1, -1), groups=channels)

    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
    luminance = (2 * mx * my + c1) / (mx**2 + my**2 + c1)
    return luminance * (2 * cov + c2) / (vx + vy + c2)


def reference(x: Tensor, y: Tensor, **options) -> tuple[Tensor, Tensor]:
    """Value (B,) and gradient of the sum, in float64."""
    x = x.detach().double().requires_grad_()
    value = ssim_map_reference(x, y.double(), **options).mean((1, 2, 3))
    value.sum().backward()
    return value.detach(), x.grad


def fused(x: Tensor, y: Tensor, **options) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    value = ssim_per_image(x, y, **options)
    value.sum().backward()
    return value.detach(), x.grad


def relative(gradient: Tensor, truth: Tensor) -> float:
    return ((gradient.double() - truth).norm() / truth.norm()).item()


def pair(shape, dtype=torch.float32, noise=0.2) -> tuple[Tensor, Tensor]:
    y = torch.rand(shape, dtype=torch.float64)
    x = (y + noise * torch.randn_like(y)).clamp(0, 1)
    return x.to(dtype), y.to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-7)])
def test_agrees_with_scikit_image(shape, dtype, tolerance):
    x, y = pair(shape, dtype)
    value = ssim_per_image(x, y)
    assert value.shape == (shape[0],)
    assert value.dtype == dtype
    for mine, a, b in zip(value, x, y, strict=True):
        _, full = structural_similarity(
            a.numpy().astype(np.float64),
            b.numpy().astype(np.float64),
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1,
            channel_axis=0,
            full=True,
        )
        assert mine.item() == pytest.approx(full[:, 5:-5, 5:-5].mean(), abs=tolerance)


@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradient_agree_with_float64_autograd(shape):
    for dtype, value_error, gradient_error in (
        (torch.float32, 1e-6, 1e-5),
        (torch.float64, 1e-12, 1e-9),
    ):
        x, y = pair(shape, dtype)
        value, gradient = fused(x, y)
        true_value, true_gradient = reference(x, y)
        assert (value - true_value).abs().max() < value_error
        assert gradient.dtype == dtype
        assert relative(gradient, true_gradient) < gradient_error


@pytest.mark.parametrize("window_size", [1, 3, 5, 7, 9, 11, 41])
def test_every_window_size(window_size):
    x, y = pair((2, 2, 47, 50), torch.float64)
    value, gradient = fused(x, y, window_size=window_size)
    true_value, true_gradient = reference(x, y, window_size=window_size)
    assert (value - true_value).abs().max() < 1e-12
    assert relative(gradient, true_gradient) < 1e-9


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (2, 2), (3, 5), (10, 10), (12, 200)])
def test_a_window_larger_than_the_image_shrinks_to_the_largest_odd_size(size):
    x, y = pair((2, 3, *size), torch.float64)
    value, gradient = fused(x, y)
    fitting = min(11, min(size) - (min(size) + 1) % 2)
    true_value, true_gradient = reference(x, y, window_size=fitting)
    assert (value - true_value).abs().max() < 1e-12
    assert relative(gradient, true_gradient) < 1e-9


def test_data_range_scales_with_the_image():
    x, y = pair((1, 3, 30, 30), torch.float64)
    value, gradient = fused(x, y)
    wide_value, wide_gradient = fused(255 * x, 255 * y, data_range=255)
    torch.testing.assert_close(wide_value, value, rtol=0, atol=1e-12)
    torch.testing.assert_close(255 * wide_gradient, gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
def test_gradcheck(weighted):
    x, y = pair((2, 2, 5, 6), torch.float64)
    weight = torch.rand(2, 1, 5, 6, dtype=torch.float64) if weighted else None
    x.requires_grad_()
    torch.autograd.gradcheck(lambda z: ssim_per_image(z, y, window_size=3, weight=weight), x)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (12, 200), (30, 40)])
@pytest.mark.parametrize("image", ["random", "black", "white", "dim"])
def test_equal_images_have_no_loss_and_no_gradient(channels, size, image):
    shape = (2, channels, *size)
    x = {
        "random": torch.rand(shape),
        "black": torch.zeros(shape),
        "white": torch.ones(shape),
        "dim": 0.2 + 0.005 * torch.randn(shape),
    }[image]
    mask = (torch.rand(2, 1, *size) > 0.5).float()
    cases = [(window_size, mask) for window_size in range(1, 12, 2)]
    for window_size, weight in [*cases, (11, None), (11, torch.zeros_like(mask))]:
        value, gradient = fused(x, x.clone(), weight=weight, window_size=window_size)
        assert value.tolist() == [1, 1]
        assert gradient.abs().max() == 0


@pytest.mark.parametrize("contrast", [0.005, 0.02])
def test_low_contrast_does_not_cancel(contrast):
    y = 0.2 + contrast * torch.randn(1, 3, 96, 96)
    x = y + contrast * torch.randn_like(y)
    true_value, true_gradient = reference(x, y)
    value, gradient = fused(x, y)
    assert (value - true_value).abs().max() < 1e-6
    assert relative(gradient, true_gradient) < 1e-6


def test_a_constant_shift_does_not_cancel():
    y = 0.2 + 0.005 * torch.randn(1, 3, 96, 96)
    x = y + 0.6 + 0.005 * torch.randn_like(y)
    true_value, true_gradient = reference(x, y)
    value, gradient = fused(x, y)
    assert (value - true_value).abs().max() < 1e-6
    assert relative(gradient, true_gradient) < 1e-5


def test_autocast_changes_nothing():
    y = 0.2 + 0.005 * torch.randn(1, 3, 64, 64)
    x = y + 0.005 * torch.randn_like(y)
    value, gradient = fused(x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed_value, mixed_gradient = fused(x, y)
    assert mixed_value.dtype == torch.float32
    assert torch.equal(mixed_value, value)
    assert torch.equal(mixed_gradient, gradient)


def test_float32_matmul_precision_changes_nothing_and_is_left_as_it_was(monkeypatch):
    x, y = pair((1, 3, 40, 40))
    value, gradient = fused(x, y)
    seen = []
    strip = ssim._strip

    def spy(*args, **options):
        seen.append(torch.backends.mkldnn.matmul.fp32_precision)
        return strip(*args, **options)

    monkeypatch.setattr(ssim, "_strip", spy)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        reduced = torch.backends.mkldnn.matmul.fp32_precision
        lower_value, lower_gradient = fused(x, y)
        assert torch.backends.mkldnn.matmul.fp32_precision == reduced == "bf16"
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(seen) == {"ieee"}
    assert torch.equal(lower_value, value)
    assert torch.equal(lower_gradient, gradient)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_images_are_computed_in_float32(dtype):
    x, y = (image.to(dtype) for image in pair((2, 3, 60, 70)))
    value, gradient = fused(x, y)
    true_value, true_gradient = reference(x, y)
    assert value.dtype == torch.float32
    assert gradient.dtype == dtype
    assert (value - true_value).abs().max() < 1e-6
    assert relative(gradient, true_gradient) < 2 * torch.finfo(dtype).eps


def test_a_weight_of_ones_is_no_weight():
    x, y = pair((2, 3, 90, 50), torch.float64)
    value, gradient = fused(x, y)
    one_value, one_gradient = fused(x, y, weight=torch.ones(2, 1, 90, 50))
    torch.testing.assert_close(one_value, value, rtol=0, atol=1e-14)
    torch.testing.assert_close(one_gradient, gradient, rtol=1e-12, atol=1e-17)


def test_weight_against_a_loop_over_windows():
    x, y = pair((2, 3, 18, 15), torch.float64)
    weight = torch.rand(2, 1, 18, 15, dtype=torch.float64) * (torch.rand(2, 1, 18, 15) > 0.3)
    x.requires_grad_()
    full = ssim_map_reference(x, y, window_size=5)
    expected = []
    for image in range(2):
        total, weights = torch.zeros((), dtype=torch.float64), 0.0
        for row in range(14):
            for column in range(11):
                w = weight[image, 0, row + 2, column + 2].item()
                total = total + w * full[image, :, row, column].mean()
                weights += w
        expected.append(total / weights)
    torch.stack(expected).sum().backward()
    value, gradient = fused(x, y, weight=weight, window_size=5)
    torch.testing.assert_close(value, torch.stack(expected).detach(), rtol=0, atol=1e-12)
    assert relative(gradient, x.grad) < 1e-9


def test_an_image_without_weight_has_no_loss_and_leaves_the_others_alone():
    x, y = pair((3, 3, 40, 40))
    weight = torch.ones(3, 1, 40, 40)
    weight[1] = 0
    weight[1, :, :5] = 1  # no window is centred in the border
    value, gradient = fused(x, y, weight=weight)
    plain_value, plain_gradient = fused(x, y)
    assert value[1] == 1
    assert gradient[1].abs().max() == 0
    others = [0, 2]
    torch.testing.assert_close(value[others], plain_value[others], rtol=0, atol=1e-7)
    torch.testing.assert_close(gradient[others], plain_gradient[others], rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("pixels", [1, 1000, 3000])
def test_strips_do_not_show(monkeypatch, weighted, pixels):
    x, y = pair((2, 3, 83, 37), torch.float64)
    weight = torch.rand(2, 1, 83, 37, dtype=torch.float64) if weighted else None
    monkeypatch.setattr(ssim, "STRIP_ROWS", 1000)
    value, gradient = fused(x, y, weight=weight)
    monkeypatch.setattr(ssim, "STRIP_PIXELS", pixels)
    assert ssim._strip_size(x, 10, 1000)[1] < 73
    strip_value, strip_gradient = fused(x, y, weight=weight)
    torch.testing.assert_close(strip_value, value, rtol=0, atol=1e-13)
    torch.testing.assert_close(strip_gradient, gradient, rtol=1e-9, atol=1e-16)


def test_strips_of_several_images_as_on_an_accelerator(monkeypatch):
    x, y = pair((5, 3, 41, 37), torch.float64)
    value, gradient = fused(x, y)
    monkeypatch.setattr(ssim, "_strip_size", lambda *_: (2, 9))
    monkeypatch.setattr(ssim, "_Bands", lambda taps, dtype, *_: ssim._Taps(taps, dtype))
    tap_value, tap_gradient = fused(x, y)
    torch.testing.assert_close(tap_value, value, rtol=0, atol=1e-13)
    torch.testing.assert_close(tap_gradient, gradient, rtol=1e-9, atol=1e-16)


def test_non_contiguous_images():
    x, y = pair((2, 3, 50, 40))
    value, gradient = fused(x, y)
    views = [
        lambda z: z.to(memory_format=torch.channels_last),
        lambda z: z.transpose(2, 3).contiguous().transpose(2, 3),
        lambda z: F.pad(z, (3, 4, 5, 6))[:, :, 5:-6, 3:-4],
    ]
    for view in views:
        assert not view(x).is_contiguous()
        for pred, true in ((view(x), y), (x, view(y)), (view(x), view(y))):
            other_value, other_gradient = fused(pred, true)
            torch.testing.assert_close(other_value, value, rtol=0, atol=1e-7)
            torch.testing.assert_close(other_gradient, gradient, rtol=1e-4, atol=1e-9)


def test_no_image_is_an_empty_result():
    x = torch.rand(0, 3, 20, 20, requires_grad=True)
    value = ssim_per_image(x, x.detach(), weight=torch.ones(0, 1, 20, 20))
    assert value.shape == (0,)
    value.sum().backward()
    assert x.grad.shape == x.shape


def test_an_image_that_is_not_finite_shows_in_its_own_value_only():
    x, y = pair((3, 3, 40, 43))
    plain_value, plain_gradient = fused(x, y)
    for poison in (float("nan"), float("inf")):
        bad = x.clone()
        bad[1, 2, 20, 42] = poison
        value, gradient = fused(bad, y)
        assert value.isfinite().tolist() == [True, False, True]
        assert torch.equal(value[[0, 2]], plain_value[[0, 2]])
        assert torch.equal(gradient[[0, 2]], plain_gradient[[0, 2]])


def test_the_gradient_flows_once_and_only_to_the_prediction():
    x, y = pair((1, 1, 20, 20))
    x.requires_grad_()
    (square,) = torch.autograd.grad(ssim_per_image(x, y) ** 2, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        square.sum().backward()
    (first,) = torch.autograd.grad(ssim_per_image(x, y), x)
    value = ssim_per_image(x, y)
    value.backward(torch.tensor([2.0]), retain_graph=True)
    torch.testing.assert_close(x.grad, 2 * first)
    value.backward(torch.tensor([1.0]))
    torch.testing.assert_close(x.grad, 3 * first)


def test_no_gradient_is_computed_when_none_is_asked(monkeypatch):
    x, y = pair((2, 3, 30, 30))
    value, _ = fused(x, y)

    def fail(*_):
        raise AssertionError("adjoint blur without a gradient")

    monkeypatch.setattr(ssim._Bands, "adjoint", fail)
    assert torch.equal(ssim_per_image(x, y), value)
    with torch.no_grad():
        assert torch.equal(ssim_per_image(x.requires_grad_(), y), value)


def test_the_inputs_are_left_as_they_were():
    x, y = pair((1, 1, 64, 64))  # one contiguous plane: a strip is a view of it
    before = x.clone(), y.clone()
    fused(x, y, weight=torch.rand(1, 1, 64, 64))
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])


def test_wrong_arguments_raise():
    x, y = pair((1, 3, 20, 20))
    for window_size in (0, 10, -1):
        with pytest.raises(ValueError, match="must be odd"):
            ssim_per_image(x, y, window_size=window_size)
    with pytest.raises(ValueError, match="detach x_true"):
        ssim_per_image(x, y.requires_grad_())
    y = y.detach()
    with pytest.raises(ValueError, match="two \\(B, C, H, W\\)"):
        ssim_per_image(x, y[:, :1])
    with pytest.raises(ValueError, match="floating point"):
        ssim_per_image(x, (255 * y).byte())
    with pytest.raises(ValueError, match="weight must have shape"):
        ssim_per_image(x, y, weight=torch.ones(1, 3, 20, 20))
    with pytest.raises(ValueError, match="data_range"):
        ssim_per_image(x, y, data_range=0)
    with pytest.raises(ValueError, match="needs pixels"):
        ssim_per_image(x[..., :0], y[..., :0])


def test_gaussian_window_is_normalised_symmetric_and_of_sigma():
    window = gaussian_window(11, dtype=torch.float64, device="cpu")
    assert window.sum().item() == pytest.approx(1, abs=1e-15)
    assert torch.equal(window, window.flip(0))
    assert (window[6] / window[5]).item() == pytest.approx(np.exp(-1 / (2 * 1.5**2)))
    assert gaussian_window(1, dtype=torch.float32, device="cpu").tolist() == [1]


def test_inside_a_compiled_function():
    x, y = pair((1, 2, 24, 24))
    value, gradient = fused(x, y)
    x.requires_grad_()
    compiled = torch.compile(lambda a, b: 3 * ssim_per_image(2 * a / 2, b), backend="eager")
    compiled(x, y).sum().backward()
    torch.testing.assert_close(compiled(x, y).detach(), 3 * value)
    torch.testing.assert_close(x.grad, 3 * gradient)


def test_compiled_strips_trace_as_one_graph_for_all_sizes(monkeypatch):
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    traced = torch.compile(ssim._strip, dynamic=True, fullgraph=True, backend=count)
    monkeypatch.setattr(ssim, "_compiled_strip", lambda: traced)
    for size in ((40, 30), (140, 36)):
        x, y = pair((1, 3, *size))
        value, gradient = fused(x, y, window_size=5)
        traced_value, traced_gradient = fused(x, y, window_size=5, compiled=True)
        torch.testing.assert_close(traced_value, value, rtol=0, atol=1e-6)
        assert relative(traced_gradient, gradient.double()) < 1e-5
    assert len(graphs) == 1
