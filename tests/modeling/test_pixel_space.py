"""The gradient that pixel-space terms take in the forward pass, against plain autograd."""

import dataclasses
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modeling.bagel.bagel import Bagel
from modeling.bagel.losses import (
    CrossEntropy,
    LossSet,
    LossTerm,
    PixelTerm,
    SSIMTerm,
    StepOutputs,
    VelocityMSE,
)
from modeling.batch import PackedBatch
from modeling.flow import gate
from modeling.geometry import unpatchify
from tests.helpers import MIXED_SAMPLES, MIXED_TIMES, pack, restoration, tiny_model

TERMS = (CrossEntropy(), VelocityMSE(), PixelTerm(2, 0.3), SSIMTerm(0.2, 11, 0.5))
SCALES = {"ce": 0.1, "mse": 0.02, "pixel": 3e-4, "ssim": 2e-3}


@pytest.fixture(scope="module")
def model() -> Bagel:
    return tiny_model()


@pytest.fixture(scope="module")
def batch(model: Bagel) -> PackedBatch:
    return pack(model.config, *MIXED_SAMPLES, times=MIXED_TIMES)


@pytest.fixture
def out(model: Bagel, batch: PackedBatch) -> StepOutputs:
    """The predicted velocity is a leaf."""
    out = model.step_outputs(batch)
    leaf = out.velocity_pred.detach().requires_grad_()
    return dataclasses.replace(out, velocity_pred=leaf)


def windowed(x: Tensor) -> Tensor:
    taps = torch.exp(-0.5 * (torch.arange(-5.0, 6.0, dtype=x.dtype) / 1.5) ** 2)
    kernel = torch.outer(taps, taps) / taps.sum() ** 2
    return F.conv2d(x[:, None], kernel[None, None])[:, 0]


def plain_ssim(x: Tensor, y: Tensor) -> Tensor:
    """The textbook formula in float64, differentiated by autograd; (C, H, W) images."""
    x, y = x.double(), y.double()
    mx, my = windowed(x), windowed(y)
    vx, vy = windowed(x * x) - mx * mx, windowed(y * y) - my * my
    covariance = windowed(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    top = (2 * mx * my + c1) * (2 * covariance + c2)
    return (top / ((mx * mx + my * my + c1) * (vx + vy + c2))).mean()


def plain_sums(model: Bagel, out: StepOutputs) -> dict[str, Tensor]:
    """Pixel (L2, gate 0.3) and SSIM (gate 0.2) sums, every image decoded alone with its graph."""
    sums = {"pixel": torch.zeros((), dtype=torch.float64), "ssim": torch.zeros(()).double()}
    first = 0
    targets = zip(out.batch.vae.grids, out.batch.vae.is_target, out.batch.vae.images, strict=True)
    times = out.batch.vae.times(model.config.timestep_shift)
    for ((h, w), target, image), t in zip(targets, times, strict=True):
        if not target:
            continue
        own = slice(first, first + h * w)
        first += h * w
        clean = out.clean[own] + t * (out.velocity_true[own] - out.velocity_pred[own])
        pred = 0.5 * model.vae.decode(unpatchify(clean, h, w, 2)[None])[0] + 0.5
        true = 0.5 * image + 0.5
        sums["pixel"] += max(0.0, (0.3 - t) / 0.3) * (pred - true).double().square().sum()
        area = image.shape[1] * image.shape[2]
        sums["ssim"] += max(0.0, (0.2 - t) / 0.2) * area * (1 - plain_ssim(pred, true))
    return sums


def gradient(total: Tensor, out: StepOutputs, **settings: Any) -> Tensor:
    return torch.autograd.grad(total, out.velocity_pred, **settings)[0]


def assert_close(found: Tensor, expected: Tensor, relative: float = 1e-5) -> None:
    assert (found - expected).norm() <= relative * expected.norm() and expected.norm() > 0


@pytest.mark.parametrize("chunks", [{}, {"chunk_size": 1, "adaptive_chunk": False}])
def test_gradients_are_those_of_plain_autograd(model, out, chunks):
    expected = plain_sums(model, out)
    terms = LossSet(TERMS, **chunks)(out, observe=True)
    for name, grad_scale in (("pixel", 1.0), ("ssim", 0.5)):
        torch.testing.assert_close(terms[name].sum.double(), expected[name], rtol=1e-5, atol=0)
        right = grad_scale * gradient(expected[name], out, retain_graph=True)
        assert_close(gradient(terms[name].sum, out, retain_graph=True), right)
        assert_close(terms[name].gradient, right)
    assert_close(terms["mse"].gradient, gradient(terms["mse"].sum, out))
    assert terms["ce"].gradient is None


def total(terms: dict[str, LossTerm], scales: dict[str, float]) -> Tensor:
    return sum(scales[name] * term.sum for name, term in terms.items())


def test_a_shared_backward_is_the_sum_of_single_ones(model, out):
    single = gradient(total(LossSet(TERMS)(out), SCALES), out)
    with mock.patch.object(torch.autograd, "grad", wraps=torch.autograd.grad) as taken:
        terms = LossSet(TERMS)(out, SCALES)
    through_decoder = [c for c in taken.call_args_list if c.args[1].shape[1] == 4]
    assert len(through_decoder) == 3  # one for each of the three sizes of gated images
    assert_close(gradient(total(terms, SCALES), out, retain_graph=True), single, 1e-6)
    # By a factor for all, such as a world size, too; by another weight of one never.
    assert_close(gradient(4 * total(terms, SCALES), out, retain_graph=True), 4 * single, 1e-6)
    with pytest.raises(RuntimeError, match="weighted by the scales given"):
        gradient(total(terms, SCALES | {"ssim": 1.0}), out)


def test_images_are_decoded_as_if_alone_whatever_the_chunks(model, batch):
    """Equal sizes share a decode, nothing is padded: to 1e-6 what each image gives by itself."""
    alone = {}
    for name in MIXED_TIMES:
        sample = next(s for s in MIXED_SAMPLES if s.name == name)
        one = pack(model.config, sample, times=MIXED_TIMES)
        alone[name] = {n: t.images for n, t in LossSet(TERMS)(model.step_outputs(one)).items()}
    for settings in ({}, {"chunk_size": 1, "adaptive_chunk": False}):
        terms = LossSet(TERMS, **settings)(model.step_outputs(batch))
        for name, max_t in (("pixel", 0.3), ("ssim", 0.2)):
            found = {seen.image.name: seen for seen in terms[name].images}
            assert set(found) == {n for n, t in MIXED_TIMES.items() if t < max_t}
            for image, seen in found.items():
                assert seen.gate == pytest.approx(gate(MIXED_TIMES[image], max_t))
                expected = alone[image][name][0].loss.item()
                assert seen.loss.item() == pytest.approx(expected, abs=1e-6, rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [4, 3]),
        ({"chunk_size": 1}, [4, 3]),
        ({"adaptive_chunk": False}, [2, 2, 2, 1]),
        ({"chunk_size": 5, "adaptive_chunk": False}, [5, 2]),
    ],
)
def test_images_decoded_at_once(model, settings, expected):
    samples = [restoration(f"i{n}") for n in range(7)]
    batch = pack(model.config, *samples, times={s.name: 0.1 for s in samples})
    with mock.patch.object(model.vae, "decode", wraps=model.vae.decode) as decode:
        LossSet((PixelTerm(1, 0.3),), **settings)(model.step_outputs(batch))
    assert [len(call.args[0]) for call in decode.call_args_list] == expected


@pytest.mark.parametrize(
    ("size", "expected"), [((1024, 1024), 1), ((512, 512), 2), ((1020, 1024), 2), ((508, 512), 4)]
)
def test_large_images_are_decoded_fewer_at_a_time(size, expected):
    from modeling.bagel.pixel_space import TargetImage, _chunks

    image = torch.empty(3, *size, device="meta")
    targets = [TargetImage(str(i), 0.1, slice(0, 1), image, image) for i in range(4)]
    assert [len(c) for c in _chunks(targets, 2, True)] == [expected] * (4 // expected)


def test_the_gate_is_not_cancelled_by_a_single_image(model):
    found = {}
    for t in (0.05, 0.15):
        one = pack(model.config, MIXED_SAMPLES[0], times={"a": t})
        term = LossSet(TERMS)(model.step_outputs(one))["ssim"]
        (seen,) = term.images
        found[t] = (term.sum / term.count).item()
        assert found[t] == pytest.approx((0.2 - t) / 0.2 * seen.loss.item(), rel=1e-5)
    assert term.count == 16 * 24


def test_the_clamp_acts_between_decoder_and_ssim_and_nowhere_else(model, out):
    free = LossSet((PixelTerm(2, 0.3), SSIMTerm(0.2, 11, 0.5)))(out, observe=True)
    clamp = 0.4
    term = SSIMTerm(0.2, 11, 0.5, clamp)
    clamped = LossSet((PixelTerm(2, 0.3), term))(out, observe=True)
    assert torch.equal(free["pixel"].gradient, clamped["pixel"].gradient)
    for name in ("pixel", "ssim"):
        assert torch.equal(free[name].sum, clamped[name].sum)
    expected, first = torch.zeros_like(out.clean), 0
    for image in out.target_images:
        if image.t >= 0.2:
            continue
        latent = image.latent.clone().requires_grad_()
        pred = 0.5 * model.vae.decode(latent[None])[0] + 0.5
        true = 0.5 * image.image_pm1 + 0.5
        leaf = pred.detach().double().requires_grad_()
        at_image = torch.autograd.grad(true[0].numel() * (1 - plain_ssim(leaf, true)), leaf)[0]
        cut = at_image.clamp(-clamp, clamp)
        weight = 0.5 * (0.2 - image.t) / 0.2
        (at_latent,) = torch.autograd.grad(pred, latent, (weight * cut).float())
        h, w = at_latent.shape[1] // 2, at_latent.shape[2] // 2
        tokens = at_latent.reshape(4, h, 2, w, 2).permute(1, 3, 2, 4, 0).reshape(h * w, 16)
        expected[image.tokens] = -image.t * tokens
        seen = clamped["ssim"].images[first]
        share = (at_image.abs() >= clamp).float().mean().item()
        assert seen.image.name == image.name and 0 < share < 1
        assert seen.clamped_share.item() == pytest.approx(share, abs=2e-3)
        first += 1
    assert_close(clamped["ssim"].gradient, expected)
    assert first == 3 and clamped["pixel"].images[0].clamped_share is None


@pytest.mark.parametrize("scale", [1e-2, 1e-8])
def test_the_clamped_share_does_not_depend_on_the_scale(out, scale):
    found = [
        LossSet((SSIMTerm(0.2, 11, s, 0.03),))(out)["ssim"].images[0].clamped_share.item()
        for s in (1.0, scale)
    ]
    assert found[0] == found[1] > 0.3


@pytest.mark.parametrize("observe", [False, True])
def test_balance_sets_the_ratio_of_norms_and_no_value(model, out, observe):
    plain = LossSet(TERMS)(out, SCALES, observe)
    balanced = LossSet(TERMS, balance=0.25)(out, SCALES, observe)
    for name in plain:
        assert torch.equal(plain[name].sum, balanced[name].sum)
    pixel_space = {n: t for n, t in balanced.items() if n in ("pixel", "ssim")}
    own = gradient(total(pixel_space, SCALES), out, retain_graph=True)
    mse = gradient(SCALES["mse"] * balanced["mse"].sum, out)
    assert own.norm().item() == pytest.approx(0.25 * mse.norm().item(), rel=1e-5)
    unbalanced = total({n: plain[n] for n in pixel_space}, SCALES)
    assert F.cosine_similarity(own.flatten(), gradient(unbalanced, out).flatten(), 0) > 1 - 1e-6


def test_balance_asks_for_scales_and_leaves_zero_alone(model, out):
    with pytest.raises(ValueError, match="pass the scales"):
        LossSet(TERMS, balance=0.25)(out)
    late = pack(model.config, *MIXED_SAMPLES, times=dict.fromkeys(MIXED_TIMES, 0.3))
    terms = LossSet(TERMS, balance=0.25)(model.step_outputs(late), SCALES)
    pixel_space = total({n: terms[n] for n in ("pixel", "ssim")}, SCALES)
    (by_bias,) = torch.autograd.grad(pixel_space, model.llm2vae.bias)
    assert pixel_space.item() == 0.0 and torch.count_nonzero(by_bias) == 0


def test_validation_takes_no_gradient(model, batch):
    with torch.no_grad():
        out = model.step_outputs(batch)
        with mock.patch.object(torch.autograd, "grad", side_effect=AssertionError):
            terms = LossSet(TERMS, balance=0.25)(out)
    assert terms["ssim"].sum.item() == pytest.approx(
        LossSet(TERMS)(model.step_outputs(batch))["ssim"].sum.item(), rel=1e-6
    )
