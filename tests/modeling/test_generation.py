"""Batched decoding and sampling against one at a time and against the uncached model."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from data.packer import Sample, TextSegment
from modeling.bagel.bagel import Bagel
from modeling.bagel.context import Context, NextTokens
from modeling.bagel.generation import (
    ImageJob,
    SamplingConfig,
    TextConfig,
    TextJob,
    generate_images,
    generate_text,
    generate_texts,
    sample_latents,
)
from tests.helpers import TOKENS, image_pm1, next_velocity, pack, tiny_model

LIMITS = [3, 17, 1, 0, 9, 40, 2, 5]
"""New tokens of each text: they finish at different times, so slots are refilled and moved."""
VALID = 60


@pytest.fixture(scope="module")
def model() -> Bagel:
    return tiny_model()


def context(model: Bagel, i: int) -> Context:
    """Contexts of different lengths; every third holds an image."""
    made = Context(model, TOKENS)
    if i % 3 == 0:
        made.add_vae_image(image_pm1(16, 8 * (1 + i % 4), i))
    made.add_text([(7 * i + j) % VALID for j in range(1 + 5 * i)])
    return made


def jobs(model: Bagel, **options: object) -> list[TextJob]:
    """Without options every second text is greedy."""
    return [
        TextJob(
            context(model, i),
            TextConfig(max_new_tokens=n, **(options or {"temperature": 0.9 * (i % 2)})),
            torch.Generator().manual_seed(i),
        )
        for i, n in enumerate(LIMITS)
    ]


def uncached(model: Bagel, given: list[int], n: int) -> list[int]:
    """Greedy decoding by whole forwards of the training model."""
    ids: list[int] = []
    for _ in range(n):
        segments = [TextSegment(ids=given), TextSegment(ids=ids, answer=True)]
        batch = pack(model.config, Sample("s", segments))
        hidden = model.hidden_states(batch, None)
        # The last token of the pack is the answer's eos, which has not been drawn yet.
        ids.append(int(model.language_model.lm_head(hidden[-2])[:VALID].argmax()))
    return ids


@torch.no_grad()
def test_cached_greedy_decoding_is_that_of_whole_forwards(model):
    given = [5, 9, 31, 2]
    made = Context(model, TOKENS)
    made.add_text(given)
    found = generate_text(made, VALID, TextConfig(max_new_tokens=12))
    assert found == uncached(model, given, 12) and len(set(found)) > 2


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8, 20])
def test_texts_do_not_depend_on_their_batch(model, batch_size):
    alone = {
        i: generate_text(j.context, VALID, j.config, j.generator) for i, j in enumerate(jobs(model))
    }
    together = jobs(model)
    found = dict(generate_texts(iter(together), VALID, batch_size))
    assert found == alone
    assert [len(found[i]) for i in range(len(LIMITS))] == LIMITS
    for i, job in enumerate(together):
        by_hand = context(model, i)
        by_hand.add_text(found[i])
        assert job.context.cache.length == by_hand.cache.length
        assert job.context.position == by_hand.position
        both = [c.append_ids([9]) for c in (job.context, by_hand)]
        torch.testing.assert_close(*both, rtol=1e-4, atol=1e-5)


def test_a_job_is_asked_for_when_a_slot_is_free(model):
    asked: list[int] = []

    def source():
        for i, job in enumerate(jobs(model)):
            asked.append(i)
            yield job

    texts = generate_texts(source(), VALID, 2)
    first, _ = next(texts)
    # 0 (three tokens) and 1 start; 0 finishes first.
    assert first == 0 and asked == [0, 1]
    second, _ = next(texts)
    assert asked[:3] == [0, 1, 2] and second == 2
    assert sorted([first, second, *(i for i, _ in texts)]) == list(range(len(LIMITS)))


def test_each_text_ends_at_its_own_end_token(model):
    """The end token is forced on one of two texts only."""
    config = TextConfig(max_new_tokens=20)
    head, calls = model.language_model.lm_head, []

    def end_second_text(module, inputs, logits: Tensor) -> Tensor:
        calls.append(len(logits))
        if len(calls) == 3:
            logits = logits.clone()
            logits[1, TOKENS.eos] = 1e4
        return logits

    handle = head.register_forward_hook(end_second_text)
    pair = [TextJob(context(model, i), config) for i in (1, 2)]
    found = dict(generate_texts(pair, 62, 2))
    handle.remove()
    assert len(found[1]) == 2 and len(found[0]) == 20
    assert found[0] == generate_text(context(model, 1), 62, config)


def test_top_p_draws_from_the_nucleus_alone(model):
    logits = torch.full((64,), -1e4)
    logits[[3, 8, 20]] = torch.tensor([0.5, 0.3, 0.2]).log()
    handle = model.language_model.lm_head.register_forward_hook(lambda m, i, o: logits.expand_as(o))

    def drawn(top_p: float) -> list[int]:
        config = TextConfig(max_new_tokens=400, temperature=1.0, top_p=top_p, stop_at_eos=False)
        generator = torch.Generator().manual_seed(0)
        return generate_text(context(model, 1), VALID, config, generator)

    found = {p: drawn(p) for p in (0.4, 0.7, 1.0)}
    handle.remove()
    assert set(found[0.4]) == {3}
    assert set(found[0.7]) == {3, 8}
    assert set(found[1.0]) == {3, 8, 20}
    # 0.5 / 0.8 of the nucleus, within four deviations of 400 draws.
    assert found[0.7].count(3) / 400 == pytest.approx(0.625, abs=0.1)


def test_contexts_of_one_length_need_no_mask_and_others_do(model):
    slots = NextTokens(model, 2)
    for _ in range(2):
        slots.join(context(model, 1), 4)
    equal = slots.step([5, 6])
    alone = context(model, 1).append_ids([5])
    torch.testing.assert_close(equal[:1], alone, rtol=1e-4, atol=1e-5)


SIZES = [(16, 16), (24, 8), (8, 32), (16, 16)]
SETTINGS = [
    {"num_timesteps": 5},
    {"num_timesteps": 9, "cfg_text_scale": 4.0, "cfg_img_scale": 2.0, "cfg_interval": (0.3, 0.8)},
    {"num_timesteps": 5, "cfg_text_scale": 3.0, "cfg_renorm_type": "channel"},
    {
        "num_timesteps": 7,
        "timestep_shift": 3.0,
        "cfg_text_scale": 2.0,
        "cfg_img_scale": 1.5,
        "cfg_renorm_type": "text_channel",
    },
]


def image_jobs(model: Bagel) -> list[ImageJob]:
    """Mixed sizes, context lengths, steps and guidance."""
    return [
        ImageJob.of_size(
            context(model, i),
            size,
            SamplingConfig(**settings),
            torch.Generator().manual_seed(i),
            context(model, i + 4),
            context(model, i + 2),
        )
        for i, (size, settings) in enumerate(zip(SIZES, SETTINGS, strict=True))
    ]


def test_images_do_not_depend_on_their_batch(model):
    alone = [sample_latents([job])[0] for job in image_jobs(model)]
    together = sample_latents(image_jobs(model))
    reverse = sample_latents(image_jobs(model)[::-1])[::-1]
    for a, b, c in zip(alone, together, reverse, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(c, a, rtol=1e-4, atol=1e-4)
    assert [tuple(image.shape[1:]) for image in generate_images(image_jobs(model))] == [
        (height, width) for width, height in SIZES
    ]


def test_sampling_is_the_euler_method_with_guidance_written_out(model):
    """Case 1, by its formulas (global renorm), with one velocity at a time."""
    job = image_jobs(model)[1]
    settings = SETTINGS[1]
    ids, x = job.context.latent_position_ids(job.grid), job.noise
    times = torch.linspace(1, 0, settings["num_timesteps"]).tolist()
    guided_steps = 0
    for t, t_next in pairwise(times):
        v = next_velocity(job.context, x, t, ids)
        if 0.3 < t <= 0.8:
            guided_steps += 1
            v_t = next_velocity(job.without_text, x, t, ids)
            v_i = next_velocity(job.without_images, x, t, ids)
            both = v_i + 2.0 * (v_t + 4.0 * (v - v_t) - v_i)
            v = both * min(max((v.norm() / (both.norm() + 1e-8)).item(), 0.0), 1.0)
        x = x - v * (t - t_next)
    assert guided_steps == 4
    torch.testing.assert_close(sample_latents([image_jobs(model)[1]])[0], x, rtol=1e-4, atol=1e-5)


def test_guidance_is_left_out_of_the_forward_outside_its_interval(model, monkeypatch):
    rows: list[int] = []
    decode = Bagel.decode_tokens

    def counted(self, embeddings, *others):
        rows.append(len(embeddings))
        return decode(self, embeddings, *others)

    monkeypatch.setattr(Bagel, "decode_tokens", counted)
    (job,) = image_jobs(model)[1:2]
    rows.clear()
    sample_latents([job])
    n = math.prod(job.grid) + 2
    # Times 1, 0.875 | 0.75, 0.625, 0.5, 0.375 | 0.25, 0.125.
    assert rows == [n, n, 3 * n, 3 * n, 3 * n, 3 * n, n, n]


def test_a_fork_grows_on_its_own(model):
    whole, shared = context(model, 1), context(model, 1)
    fork = shared.fork()
    shared.add_text([1, 2, 3])
    torch.testing.assert_close(fork.append_ids([4]), whole.append_ids([4]), rtol=0, atol=0)
    assert fork.cache.length == whole.cache.length < shared.cache.length


def test_settings_without_sense_are_refused():
    for options, name in (
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
    ):
        with pytest.raises(ValueError, match=name):
            TextConfig(**options)
    made = Context(tiny_model(), TOKENS)
    with pytest.raises(ValueError, match="cfg_text_scale"):
        ImageJob(made, torch.zeros(4, 16), (2, 2), SamplingConfig(cfg_text_scale=2.0))
