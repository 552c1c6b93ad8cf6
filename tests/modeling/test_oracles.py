"""Independent oracles: transformers, plain softmax, literal loops, and the model against itself
in other arrangements (alone or packed, cached or not, another back end)."""

import math
import random

import pytest
import torch
from transformers import Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from data.packer import Sample, TextSegment, VaeSegment, VitSegment
from modeling.attention import PackedAttention, grouped_sdpa, split_mask
from modeling.bagel.bagel import FlowInputs
from modeling.bagel.context import Context
from modeling.bagel.generation import TextConfig, generate_text
from modeling.flow import interpolate
from modeling.geometry import patchify, position_ids, token_grid
from tests.helpers import (
    TOKENS,
    VIT,
    image_pm1,
    next_velocity,
    pack,
    restoration,
    tiny_config,
    tiny_model,
    with_times,
)

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
DENSE = {"qk_norm": False, "layer_module": "Qwen2DecoderLayer"}
MOE = {"qk_norm": True, "layer_module": "Qwen2MoEDecoderLayer"}


@torch.no_grad()
def test_dense_decoder_is_qwen2_of_transformers():
    model = tiny_model(tiny_config(DENSE, vit=None, vae=None))
    oracle = Qwen2ForCausalLM(model.config.llm).eval()
    oracle.load_state_dict(model.language_model.state_dict(), strict=True)
    texts = [[7, 3, 9, 9, 1, 0, 33], [5, 5]]
    samples = [Sample(str(i), [TextSegment(ids=ids)]) for i, ids in enumerate(texts)]
    batch = pack(tiny_config(), *samples)
    logits = model.language_model.lm_head(model.hidden_states(batch, None))
    for ids, part in zip(texts, logits.split(batch.sample_lens), strict=True):
        alone = torch.tensor([[TOKENS.bos, *ids, TOKENS.eos]])
        torch.testing.assert_close(part, oracle(alone).logits[0], **CLOSE)


@torch.no_grad()
def test_packed_siglip_is_siglip_of_transformers():
    model = tiny_model(tiny_config(vit_select_layer=-1)).vit_model
    oracle = SiglipVisionModel(SiglipVisionConfig(**VIT, vision_use_head=False)).eval()
    state = model.state_dict()
    patch_weight = "vision_model.embeddings.patch_embedding.weight"
    as_conv = state[patch_weight].reshape(24, 14, 14, 3).permute(0, 3, 1, 2)
    state[patch_weight] = as_conv
    wanted = set(oracle.state_dict())
    oracle.load_state_dict({k if k in wanted else k[13:]: v for k, v in state.items()}, strict=True)
    images = [image_pm1(112, 112, seed) for seed in (1, 2)]
    patches = torch.cat([patchify(image, 14) for image in images])
    features = model(patches, position_ids(8, 8, 8).repeat(2), (64, 64))
    expected = oracle(torch.stack(images)).last_hidden_state.flatten(0, 1)
    torch.testing.assert_close(features, expected, **CLOSE)


@pytest.mark.parametrize("causal", [True, False])
def test_grouped_attention_is_softmax_attention(causal):
    q, k, v = torch.randn(5, 6, 8), torch.randn(5, 2, 8), torch.randn(5, 2, 8)
    mask = torch.ones(5, 5, dtype=torch.bool).tril() if causal else torch.rand(5, 5) < 0.7
    mask |= torch.eye(5, dtype=torch.bool)
    expected = torch.empty(5, 6, 8)
    for head in range(6):
        scores = q[:, head] @ k[:, head // 3].T / math.sqrt(8)
        expected[:, head] = scores.masked_fill(~mask, -math.inf).softmax(1) @ v[:, head // 3]
    torch.testing.assert_close(grouped_sdpa(q, k, v, mask), expected, rtol=1e-5, atol=1e-6)
    if causal:
        torch.testing.assert_close(grouped_sdpa(q, k, v, causal=True), expected)


def visible(query: int, key: int, split_of: list[int], modes: list[str]) -> bool:
    """The rule of one sample, word for word."""
    same = split_of[query] == split_of[key]
    both_ways = same and modes[split_of[key]] in ("full", "noise")
    foreign_noise = modes[split_of[key]] == "noise" and not same
    return (key <= query or both_ways) and not foreign_noise


@pytest.mark.parametrize("seed", range(6))
def test_masks_are_the_rule_in_a_double_loop(seed):
    rng = random.Random(seed)
    samples = [
        [(rng.randint(1, 4), rng.choice(["causal", "full", "noise"])) for _ in range(splits)]
        for splits in (1, 4, 5)
    ]
    lens = [[n for n, _ in sample] for sample in samples]
    modes = [[mode for _, mode in sample] for sample in samples]
    q, k, v = (torch.randn(sum(map(sum, lens)), 2, 4) for _ in range(3))
    packed = PackedAttention([sum(n) for n in lens], sum(lens, []), sum(modes, []), "cpu")
    parts = packed(0, q, k, v).split(packed.sample_lens)
    first = 0
    for n, mode, part in zip(lens, modes, parts, strict=True):
        split_of = [i for i, length in enumerate(n) for _ in range(length)]
        size = len(split_of)
        loop = [[visible(i, j, split_of, mode) for j in range(size)] for i in range(size)]
        assert split_mask(n, mode, "cpu").tolist() == loop
        own = slice(first, first + size)
        alone = grouped_sdpa(q[own], k[own], v[own], torch.tensor(loop))
        torch.testing.assert_close(part, alone, rtol=1e-5, atol=1e-6)
        first += size


def edited_twice() -> Sample:
    """Segments after a target, and two targets: no later split may see a target."""
    first = restoration("twice")
    again = VaeSegment(image_pm1=image_pm1(16, 16, 9), target=True)
    return Sample("twice", [*first.segments, TextSegment(ids=[8], answer=True), again])


MIXED = (
    restoration("a"),
    restoration("b", size=(24, 16), vit_size=(42, 14), answer=None),
    edited_twice(),
    Sample("text", [TextSegment(ids=[3, 4], answer=True)]),
)


@pytest.mark.parametrize("llm", [{}, DENSE, MOE])
@pytest.mark.parametrize("changes", [{}, {"vit_rope": True, "interpolate_pos": True}])
def test_packed_equals_one_sample_at_a_time(llm, changes):
    model = tiny_model(tiny_config(llm, **changes))
    together = model.step_outputs(pack(model.config, *MIXED))
    sums, parts = {}, []
    for sample in MIXED:
        out = model.step_outputs(pack(model.config, sample))
        parts.append(out.hidden)
        for name, term in model.losses(out).items():
            total, count = sums.get(name, (0, 0))
            sums[name] = (total + term.sum, count + term.count)
    torch.testing.assert_close(together.hidden, torch.cat(parts), **CLOSE)
    packed = model.losses(together)
    assert packed.keys() == sums.keys() == {"ce", "mse"}
    for name, (total, count) in sums.items():
        assert packed[name].count == count
        torch.testing.assert_close(packed[name].sum, total, rtol=1e-5, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("copies", [1, 3])
def test_flex_back_end_is_the_sdpa_back_end(copies):
    """Forward only: flex attention has no backward on a CPU. Three copies exceed one block."""
    hidden = {}
    for backend in ("sdpa", "flex"):
        model = tiny_model(tiny_config(attention_backend=backend))
        hidden[backend] = model.step_outputs(pack(model.config, *MIXED * copies)).hidden
    torch.testing.assert_close(hidden["flex"], hidden["sdpa"], **CLOSE)


def test_back_end_unknown():
    with pytest.raises(ValueError, match="'flash' is none of"):
        tiny_config(attention_backend="flash")


@torch.no_grad()
@pytest.mark.parametrize("llm", [{}, DENSE, MOE])
@pytest.mark.parametrize("changes", [{}, {"vit_rope": True, "interpolate_pos": True}])
def test_cached_equals_uncached(llm, changes):
    model = tiny_model(tiny_config(llm, **changes))
    size, prompt, answer, t = (16, 24), [1, 2, 3], [4, 5], 0.6
    source, vit_image, clean = image_pm1(*size, 1), image_pm1(28, 42, 2), image_pm1(*size, 3)
    segments = [
        VaeSegment(image_pm1=source),
        VitSegment(image_pm1=vit_image),
        TextSegment(ids=prompt),
        TextSegment(ids=answer, answer=True),
        VaeSegment(image_pm1=clean, target=True),
    ]
    batch = pack(model.config, Sample("s", segments), times={"s": t})
    z0 = torch.cat([patchify(z, 2) for z in model.encode_images(batch.vae.images)])
    noise = torch.randn(z0.shape)
    out = model.step_outputs(batch, FlowInputs(z0=z0, noise=noise))

    context = Context(model, TOKENS)
    context.add_vae_image(source)
    context.add_vit_image(vit_image)
    prompt_hidden = context.append_ids([TOKENS.bos, *prompt, TOKENS.eos])
    answer_hidden = torch.cat([context.append_ids([i]) for i in (TOKENS.bos, *answer, TOKENS.eos)])
    end = batch.split_lens[-1]
    hidden = torch.cat([prompt_hidden, answer_hidden])
    torch.testing.assert_close(hidden, out.hidden[-end - len(hidden) : -end], **CLOSE)

    grid = token_grid(size, model.config.latent_stride)
    z_t = interpolate(z0[-24:], noise[-24:], torch.tensor(t))
    ids = context.latent_position_ids(grid)
    for _ in range(2):  # the cache stays as it is
        torch.testing.assert_close(next_velocity(context, z_t, t, ids), out.velocity_pred, **CLOSE)
    assert context.cache.length == batch.num_tokens - end
    assert context.position == batch.position_ids[-1].item()


@torch.no_grad()
def test_a_context_that_outgrows_its_cache():
    model = tiny_model()
    ids = [int(i) for i in torch.randint(0, 60, (1200,))]
    batch = pack(model.config, Sample("long", [TextSegment(ids=ids)]))
    context = Context(model, TOKENS)
    context.append_ids([TOKENS.bos, *ids[:400]])
    hidden = context.append_ids([*ids[400:], TOKENS.eos])
    torch.testing.assert_close(hidden, model.hidden_states(batch, None)[401:], **CLOSE)


def test_a_context_needs_no_grad_mode_and_keeps_no_graph():
    model = tiny_model()
    context = Context(model, TOKENS)
    context.add_vae_image(image_pm1(16, 16, 1))
    context.add_vit_image(image_pm1(28, 28, 1))
    context.add_text([1, 2])
    fixed = TextConfig(max_new_tokens=3, stop_at_eos=False)
    assert len(generate_text(context, 60, fixed)) == 3
    v = next_velocity(context, torch.randn(16, 16), 0.5, context.latent_position_ids((4, 4)))
    assert not v.requires_grad and not context.cache.store.requires_grad


def test_a_sample_whose_conditions_were_all_dropped_leaves_no_trace():
    model = tiny_model()
    gone = Sample("gone", [TextSegment(ids=[1, 2], droppable=True)])
    kept = Sample("kept", [TextSegment(ids=[3, 4], answer=True)])
    alone = model(pack(model.config, kept, text_cond_dropout_prob=1.0))
    beside = model(pack(model.config, gone, kept, gone, text_cond_dropout_prob=1.0))
    assert alone["ce"].count == beside["ce"].count == 3
    torch.testing.assert_close(alone["ce"].sum, beside["ce"].sum)


def test_conditioning_images_alone_have_no_velocity_loss():
    model = tiny_model()
    segments = [VaeSegment(image_pm1=image_pm1(16, 16, 1)), TextSegment(ids=[1], answer=True)]
    batch = pack(model.config, Sample("s", segments))
    assert with_times(batch, {}, 1.0).vae.num_target_tokens == 0
    assert model(batch).keys() == {"ce"}
