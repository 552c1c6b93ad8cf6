"""The contracts of the loss terms, each against a literal re-computation."""

import dataclasses
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from skimage.metrics import structural_similarity
from torch import Tensor

from data.packer import Packer, Sample, TextSegment, VaeSegment
from modeling.bagel import bagel, losses
from modeling.bagel.bagel import Bagel
from modeling.bagel.losses import (
    CrossEntropy,
    LossSet,
    LossTerm,
    PixelSpaceTerm,
    PixelTerm,
    SSIMTerm,
    StepOutputs,
    TokenTerm,
    VelocityMSE,
    _gaussian_window,
    _scale_gradient,
    _ssim_core,
    compute_perceptual_loss,
    compute_pixel_loss,
    compute_ssim_loss,
)
from modeling.batch import PackedBatch
from modeling.flow import gate
from modeling.geometry import patchify, unpatchify
from tests.helpers import (
    MIXED_SAMPLES,
    MIXED_TIMES,
    TOKENS,
    image_pm1,
    pack,
    packer_config,
    tiny_model,
)

ALL = LossSet((CrossEntropy(), VelocityMSE(), PixelTerm(1, 0.3), SSIMTerm(0.2, 11, 1.0)))


@pytest.fixture(scope="module")
def model() -> Bagel:
    model = tiny_model()
    model.losses = ALL
    return model


@pytest.fixture(scope="module")
def batch(model: Bagel) -> PackedBatch:
    return pack(model.config, *MIXED_SAMPLES, times=MIXED_TIMES)


def skimage_ssim(pred: Tensor, true: Tensor) -> float:
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    images = (x.detach().double().numpy() for x in (pred, true))
    return structural_similarity(*images, data_range=1, channel_axis=0, **settings)


def decoded_predictions(model: Bagel, batch: PackedBatch) -> list[tuple[float, Tensor, Tensor]]:
    """(t, prediction, truth) in [0, 1] of every target image: z_t - t v, decoded one by one."""
    flow = model.flow_inputs(batch.vae)
    out = model.step_outputs(batch, flow)
    times, targets = batch.vae.times(model.config.timestep_shift), batch.vae.is_target
    found, first, first_target = [], 0, 0
    for i, (h, w) in enumerate(batch.vae.grids):
        own = slice(first, first + h * w)
        first += h * w
        if not targets[i]:
            continue
        v = out.velocity_pred[first_target : first_target + h * w]
        first_target += h * w
        t = times[i]
        z_t = (1 - t) * flow.z0[own] + t * flow.noise[own]
        clean = unpatchify(z_t - t * v, h, w, 2)
        found.append(
            (t, 0.5 * model.vae.decode(clean[None])[0] + 0.5, 0.5 * batch.vae.images[i] + 0.5)
        )
    return found


@pytest.mark.parametrize("power", [1, 2])
def test_pixel_term_is_the_formula(model, batch, power):
    model.losses = LossSet((PixelTerm(power, 0.3),))
    term = model(batch)["pixel"]
    model.losses = ALL
    expected = count = 0.0
    for t, pred, true in decoded_predictions(model, batch):
        if t < 0.3:
            expected += (0.3 - t) / 0.3 * (pred - true).abs().pow(power).sum().item()
            count += true.numel()
    assert count == 3 * (2 * 16 * 24 + 24 * 16 + 12 * 20) == term.count
    assert term.sum.item() == pytest.approx(expected, rel=1e-5)
    assert term.sum.dtype == torch.float32


def test_ssim_term_is_the_formula(model, batch):
    term = model(batch)["ssim"]
    expected = count = 0.0
    for t, pred, true in decoded_predictions(model, batch):
        if t < 0.2:
            area = true.shape[1] * true.shape[2]
            expected += (0.2 - t) / 0.2 * area * (1 - skimage_ssim(pred, true))
            count += area
    assert count == 2 * 16 * 24 + 12 * 20 == term.count
    assert term.sum.item() == pytest.approx(expected, rel=1e-5)


def test_token_terms_are_the_formulas(model, batch):
    out = model.step_outputs(batch)
    terms = ALL(out)
    logits = model.language_model.lm_head(out.hidden[batch.labels.indexes])
    log_p = logits.log_softmax(1).gather(1, batch.labels.ids[:, None])
    assert terms["ce"].count == len(batch.labels.ids) == 12
    assert terms["ce"].sum.item() == pytest.approx(-log_p.sum().item(), rel=1e-5)
    flow = model.flow_inputs(batch.vae)
    error = (out.velocity_pred - (flow.noise - flow.z0)[batch.vae.target_tokens()]).square()
    assert terms["mse"].count == len(error) == 2 * 24 + 24 + 15 + 25
    assert terms["mse"].sum.item() == pytest.approx(error.sum().item() / 16, rel=1e-5)


def test_answer_weights(model):
    packer = Packer(packer_config(model.config), TOKENS)
    for sample in MIXED_SAMPLES[::2]:
        packer.add(sample, torch.Generator().manual_seed(0))
    weights = torch.tensor([0.125] * 3 + [0.25] * 3 + [0.0] * 3)
    batch = packer.build()
    labels = dataclasses.replace(batch.labels, weights=weights, total_weight=weights.sum().item())
    weighted = dataclasses.replace(batch, labels=labels)
    out = model.step_outputs(weighted)
    per_token = CrossEntropy().per_token(out)
    expected = 0.125 * per_token[:3].sum() + 0.25 * per_token[3:6].sum()
    torch.testing.assert_close(CrossEntropy().total(out), expected)
    assert ALL.counts(weighted, 1.0)["ce"] == pytest.approx(3 * 0.125 + 3 * 0.25)


def test_cross_entropy_in_chunks_is_cross_entropy(model, batch):
    out = model.step_outputs(batch)
    head = model.language_model.lm_head.weight
    results = []
    for chunk in (1024, 5, 1):
        with mock.patch.object(losses, "CE_CHUNK_TOKENS", chunk):
            total = CrossEntropy().total(out)
        results.append((total, *torch.autograd.grad(total, [head, out.hidden], retain_graph=True)))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-6)


def with_velocity(out: StepOutputs, velocity_pred: Tensor) -> StepOutputs:
    """A new record, so that nothing of the old prediction is remembered."""
    return dataclasses.replace(out, velocity_pred=velocity_pred)


def term_of(term: TokenTerm | PixelSpaceTerm, out: StepOutputs, **settings: Any) -> LossTerm:
    return LossSet((term,))(out, **settings)[term.name]


def test_exact_prediction_leaves_the_autoencoders_reconstruction(model, batch):
    out = model.step_outputs(batch)
    out = with_velocity(out, out.velocity_true.clone().requires_grad_())
    z0 = out.clean.split([h * w for h, w in batch.vae.grids[1::2]])
    grids = [
        grid for grid, target in zip(batch.vae.grids, batch.vae.is_target, strict=True) if target
    ]
    reconstruction = {}
    for target, tokens, (h, w) in zip(out.target_images, z0, grids, strict=True):
        assert torch.equal(target.latent, unpatchify(tokens, h, w, 2))
        reconstruction[target.name] = model.vae.decode(target.latent[None])[0]
    expected = sum(
        gate(t.t, 0.3) * (0.5 * (reconstruction[t.name] - t.image_pm1)).abs().sum()
        for t in out.target_images
    )
    torch.testing.assert_close(term_of(PixelTerm(1, 0.3), out).sum, expected, rtol=1e-5, atol=0)


def test_gradient_scale_changes_the_gradient_alone(model, batch):
    found = {}
    for scale in (1.0, 0.1):
        out = model.step_outputs(batch)
        total = term_of(SSIMTerm(0.2, 11, scale), out).sum
        found[scale] = total.item(), torch.autograd.grad(total, out.velocity_pred)[0]
    assert found[1.0][0] == found[0.1][0]
    assert found[1.0][1].norm() > 1e-3
    torch.testing.assert_close(found[0.1][1], 0.1 * found[1.0][1], rtol=1e-4, atol=1e-8)


def test_gradient_scale_changes_no_other_term(model, batch):
    gradients = []
    for scale in (1.0, 0.1):
        model.losses = LossSet((PixelTerm(1, 0.3), SSIMTerm(0.2, 11, scale)))
        terms = model(batch)
        bias = model.llm2vae.bias
        gradients.append(torch.autograd.grad(terms["pixel"].sum, bias)[0])
    model.losses = ALL
    assert torch.equal(*gradients) and gradients[0].norm() > 1e-3


def test_an_image_is_decoded_once_and_with_its_size(model, batch):
    with mock.patch.object(model.vae, "decode", wraps=model.vae.decode) as decode:
        model(batch)
    shapes = [tuple(call.args[0].shape) for call in decode.call_args_list]
    assert sorted(shapes) == [(1, 4, 6, 10), (1, 4, 12, 8), (2, 4, 8, 12)]


def test_only_pixel_space_terms_need_the_decoder(model, batch):
    token_terms, pixel_space = LossSet(ALL.terms[:2]), [LossSet((t,)) for t in ALL.terms[2:]]
    assert not token_terms.needs_image and all(terms.needs_image for terms in pixel_space)
    out = model.step_outputs(batch)
    with mock.patch.object(model.vae, "decode", side_effect=AssertionError):
        token_terms(out)


def test_no_gated_image_is_exactly_zero_with_a_graph(model):
    late = pack(model.config, *MIXED_SAMPLES, times=dict.fromkeys(MIXED_TIMES, 0.3))
    with mock.patch.object(model.vae, "decode", side_effect=AssertionError):
        terms = model(late)
    for name in ("pixel", "ssim"):
        assert (terms[name].sum.item(), terms[name].count) == (0.0, 0.0)
        terms[name].sum.backward(retain_graph=True)
    assert all(torch.count_nonzero(p.grad) == 0 for p in model.parameters() if p.grad is not None)
    assert model.llm2vae.weight.grad is not None
    model.zero_grad()


def test_absent_terms_are_absent(model):
    text = pack(model.config, Sample("t", [TextSegment(ids=[1], answer=True)]))
    assert model(text).keys() == ALL.counts(text, 1.0).keys() == {"ce"}
    images = [VaeSegment(image_pm1=image_pm1(16, 16, i), target=i == 1) for i in range(2)]
    only_images = pack(model.config, Sample("i", images), times={"i": 0.1})
    assert model(only_images).keys() == {"mse", "pixel", "ssim"}
    unlabelled = pack(model.config, Sample("u", [TextSegment(ids=[1])]))
    assert model(unlabelled) == {}


def weighed_gradients(model: Bagel, batches: list[PackedBatch]) -> tuple[dict, dict]:
    """Losses and gradients with counts taken over all micro-batches before the division."""
    counts = [model.losses.counts(b, model.config.timestep_shift) for b in batches]
    totals = {n: sum(c.get(n, 0.0) for c in counts) for n in counts[0]}
    values = dict.fromkeys(totals, 0.0)
    model.zero_grad()
    for micro in batches:
        terms = model(micro)
        shares = {name: term.sum / totals[name] for name, term in terms.items()}
        sum(shares.values()).backward()
        values = {n: v + shares[n].item() if n in shares else v for n, v in values.items()}
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return values, gradients


def test_micro_batches_change_neither_loss_nor_gradient(model, batch):
    values, gradients = weighed_gradients(model, [batch])
    for splits in ((1, 4), (3, 2), (2, 2, 1)):
        parts, first = [], 0
        for n in splits:
            parts.append(pack(model.config, *MIXED_SAMPLES[first : first + n], times=MIXED_TIMES))
            first += n
        split_values, split_gradients = weighed_gradients(model, parts)
        assert split_values == pytest.approx(values, rel=1e-6)
        torch.testing.assert_close(split_gradients, gradients, rtol=0, atol=1e-6)


def test_flow_inputs_do_not_depend_on_the_packing(model):
    alone = pack(model.config, MIXED_SAMPLES[0])
    second = pack(model.config, MIXED_SAMPLES[1], MIXED_SAMPLES[2], MIXED_SAMPLES[0])
    assert alone.vae.time_logits == second.vae.time_logits[-2:]
    flows = model.flow_inputs(alone.vae), model.flow_inputs(second.vae)
    last = len(flows[0].noise)
    assert torch.equal(flows[0].noise, flows[1].noise[-last:])
    torch.testing.assert_close(flows[0].z0, flows[1].z0[-last:], rtol=1e-5, atol=1e-6)
    assert flows[0].noise.std() == pytest.approx(1.0, abs=0.1)
    assert not torch.equal(flows[0].noise[:24], flows[0].noise[24:])


def test_latents_are_posterior_samples_of_each_images_own_noise(model):
    batch = pack(model.config, MIXED_SAMPLES[0])
    z0 = model.flow_inputs(batch.vae).z0[:24]
    generator = torch.Generator().manual_seed(batch.vae.noise_seeds[0])
    noise = torch.randn(4, 8, 12, generator=generator)
    with torch.no_grad():
        mean, log_variance = model.vae.encoder(batch.vae.images[0][None])[0].chunk(2)
    latent = 0.3611 * (mean + (0.5 * log_variance).exp() * noise - 0.1159)
    torch.testing.assert_close(z0, patchify(latent, 2), rtol=1e-4, atol=1e-5)


def test_encoding_in_passes_changes_nothing(model):
    images = [image_pm1(*size, seed) for seed, size in enumerate([(16, 24)] * 5 + [(20, 20)])]
    expected = [model.vae.encode(image[None])[0] for image in images]
    budget = mock.patch.object(bagel, "ENCODED_PIXELS", 2 * 16 * 24)
    with budget, mock.patch.object(model.vae, "encode", wraps=model.vae.encode) as encode:
        found = model.encode_images(images)
    assert sorted(len(call.args[0]) for call in encode.call_args_list) == [1, 1, 2, 2]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_decoded_images_are_float32_in_a_bfloat16_model(batch):
    model = tiny_model().to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        out = model.step_outputs(batch)
        image = model.vae.decode(out.target_images[0].latent[None])
    assert image.dtype == torch.float32
    assert (image != image.bfloat16().float()).float().mean() > 0.9
    assert {t.sum.dtype for t in ALL(out).values()} == {torch.float32}


def test_checkpointed_decoder_levels_give_the_same_gradient(model, batch):
    found = []
    for pixels in (2**18, 1):
        model.vae.decoder.checkpoint_pixels = pixels
        out = model.step_outputs(batch)
        total = term_of(PixelTerm(2, 0.3), out).sum
        found.append((total.detach(), torch.autograd.grad(total, out.velocity_pred)[0]))
    model.vae.decoder.checkpoint_pixels = 2**18
    torch.testing.assert_close(*found, rtol=1e-6, atol=0)


def test_settings_that_no_term_takes():
    with pytest.raises(ValueError, match="L1 or L2, not L3"):
        PixelTerm(power=3)
    with pytest.raises(ValueError, match="ssim_window_size=10 must be odd"):
        SSIMTerm(window_size=10)


def images_01() -> tuple[Tensor, Tensor]:
    true = torch.stack([0.5 * image_pm1(20, 24, seed) + 0.5 for seed in range(3)])
    return (true + 0.1 * torch.randn(true.shape)).clamp(0, 1), true


def test_named_functions():
    pred, true = images_01()
    expected = [skimage_ssim(p, t) for p, t in zip(pred, true, strict=True)]
    assert _ssim_core(pred, true).tolist() == pytest.approx(expected, abs=1e-5)
    ssim_loss = compute_ssim_loss(pred, true)
    assert ssim_loss.item() == pytest.approx(1 - sum(expected) / 3, abs=1e-5)
    l1, l2 = (pred - true).abs().mean(), (pred - true).square().mean()
    torch.testing.assert_close(compute_pixel_loss(pred, true), l1)
    torch.testing.assert_close(compute_pixel_loss(pred, true, loss_type="mse"), l2)
    torch.testing.assert_close(compute_pixel_loss(pred, true, loss_type="l2"), l2)
    torch.testing.assert_close(
        compute_perceptual_loss(pred, true, None, 2, 3), 2 * l1 + 3 * ssim_loss
    )
    torch.testing.assert_close(compute_perceptual_loss(pred, true, None, 1, 0, "l2"), l2)
    with pytest.raises(ValueError, match="'l3' is none of l1, l2, mse"):
        compute_pixel_loss(pred, true, loss_type="l3")
    assert compute_ssim_loss(true, true).item() == compute_pixel_loss(true, true).item() == 0


def test_masks_of_named_functions():
    pred, true = images_01()
    ones = torch.ones(3, 1, 20, 24)
    for function in (compute_ssim_loss, compute_pixel_loss, compute_perceptual_loss):
        torch.testing.assert_close(function(pred, true, ones), function(pred, true))
        torch.testing.assert_close(function(pred, true, 0.25 * ones), function(pred, true))
        assert function(pred, true, 0 * ones).item() == 0  # nothing to compare is no difference
    left = ones.clone()
    left[..., 12:] = 0
    expected = (pred - true).abs()[..., :12].mean()
    torch.testing.assert_close(compute_pixel_loss(pred, true, left), expected)


def test_a_mask_of_another_shape_or_dtype():
    pred, true = images_01()
    for shape in ((3, 3, 20, 24), (1, 1, 20, 24), (3, 20, 24)):
        for function in (compute_ssim_loss, compute_pixel_loss):
            with pytest.raises(ValueError, match=r"\(3, 1, 20, 24\)"):
                function(pred, true, torch.ones(shape))
    with pytest.raises(ValueError, match="differ in shape"):
        compute_pixel_loss(pred, true[..., :1])
    assert compute_pixel_loss(pred.double(), true).dtype == torch.float64
    # More ones than float16 can count.
    large = torch.rand(1, 1, 300, 300)
    half = torch.ones(1, 1, 300, 300, dtype=torch.float16)
    for function in (compute_ssim_loss, compute_pixel_loss):
        expected = function(large, 1 - large)
        torch.testing.assert_close(function(large, 1 - large, half), expected)
        assert function(pred[:0], true[:0]).item() == 0


def test_the_masked_ssim_is_the_mean_over_all_windows():
    pred, true = images_01()
    mask = torch.rand(3, 1, 20, 24)
    mask[0] = 0
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    maps = [
        structural_similarity(
            p.numpy(), t.numpy(), channel_axis=0, data_range=1, full=True, **settings
        )[1].mean(0)
        for p, t in zip(pred.double(), true.double(), strict=True)
    ]
    inner = slice(5, -5)
    losses_01 = 1 - torch.from_numpy(np.stack(maps))[:, None, inner, inner]
    centres = mask[..., inner, inner].double()
    expected = (losses_01 * centres).sum() / centres.sum()
    assert compute_ssim_loss(pred, true, mask).item() == pytest.approx(expected.item(), abs=1e-6)


def test_gaussian_window_and_gradient_scale_by_name():
    taps = torch.exp(-0.5 * (torch.arange(-5.0, 6.0) / 1.5) ** 2)
    torch.testing.assert_close(_gaussian_window(11), taps / taps.sum())
    x = torch.randn(4, requires_grad=True)
    y = _scale_gradient(x, 0.25)
    assert torch.equal(y, x)
    F.mse_loss(y, torch.zeros(4), reduction="sum").backward()
    torch.testing.assert_close(x.grad, 0.25 * 2 * x.detach())


def test_predictions_that_are_not_finite_show(model, batch):
    out = model.step_outputs(batch)
    broken = out.velocity_pred.detach().clone()
    broken[0] = torch.nan
    terms = ALL(StepOutputs(model, batch, out.hidden, broken, out.velocity_true, out.clean))
    assert [n for n, t in terms.items() if not t.sum.isfinite()] == ["mse", "pixel", "ssim"]
