"""Text and images from contexts: batched decoding and batched guided sampling.

A result depends on its own context, settings and random numbers, never on what it was batched with
(but for the rounding of matrix products). Shape legend: L latent tokens, D numbers in one.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Literal

import torch
from torch import Tensor

from ..flow import euler_times
from ..geometry import token_grid, unpatchify
from .bagel import Bagel
from .context import Context, NextImages, NextTokens

RENORM_EPS = 1e-8
"""Of the norm that guided velocities are divided by."""
ROOM = 256
"""New tokens that a text gets room for when it starts; more room is made by doubling."""
Grid = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """How a text is decoded."""

    max_new_tokens: int = 800
    temperature: float = 0.0
    """0 decodes greedily."""
    top_p: float = 1.0
    """Draws from the likeliest tokens whose probabilities reach this sum."""
    stop_at_eos: bool = True
    """False draws exactly `max_new_tokens` and appends nothing after them."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 0:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must not be negative")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} must be finite and not negative")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Euler steps and guidance of image sampling."""

    num_timesteps: int = 50
    """Times from 1 to 0, both included: one more than Euler steps."""
    timestep_shift: float = 1.0
    cfg_text_scale: float = 1.0
    """Guidance away from the context without instruction; <= 1 turns all guidance off."""
    cfg_img_scale: float = 1.0
    """Guidance away from the context without images; <= 1 turns the image branch off."""
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    """Guidance acts where low < t <= high."""
    cfg_renorm_type: Literal["global", "channel", "text_channel"] = "global"
    cfg_renorm_min: float = 0.0

    def __post_init__(self) -> None:
        if self.cfg_renorm_type not in ("global", "channel", "text_channel"):
            raise ValueError(
                f"cfg_renorm_type {self.cfg_renorm_type!r} is none of global, channel, text_channel"
            )
        if self.num_timesteps < 2:
            raise ValueError(f"num_timesteps={self.num_timesteps}: one step takes two times")
        if not 0 < self.timestep_shift < math.inf:
            raise ValueError(f"timestep_shift={self.timestep_shift} must be positive and finite")
        low, high = self.cfg_interval
        if not low < high:
            raise ValueError(f"cfg_interval={self.cfg_interval} is empty: low must be below high")
        if not 0 <= self.cfg_renorm_min <= 1:
            raise ValueError(f"cfg_renorm_min={self.cfg_renorm_min} must lie in [0, 1]")
        if not (math.isfinite(self.cfg_text_scale) and math.isfinite(self.cfg_img_scale)):
            raise ValueError("cfg_text_scale and cfg_img_scale must be finite")


@dataclass(frozen=True)
class TextJob:
    """A text to decode from bos; its context then holds bos, ids, eos as well."""

    context: Context
    config: TextConfig = field(default_factory=TextConfig)
    generator: torch.Generator | None = None
    """On the CPU; used where the temperature is above 0."""


@dataclass
class _Decoding:
    """A text on its way: what is drawn, and which tokens have yet to be fed."""

    index: int
    job: TextJob
    pending: list[int]
    ids: list[int] = field(default_factory=list)
    drawing: bool = True

    def take(self, next_id: int) -> None:
        """What the model said after the last token that was fed."""
        config, eos = self.job.config, self.job.context.tokens.eos
        stops = config.stop_at_eos and next_id == eos
        if not stops:
            self.ids.append(next_id)
        if stops or len(self.ids) == config.max_new_tokens:
            self.drawing = False
            end = [eos] if config.stop_at_eos else []
            self.pending = end if stops else [next_id, *end] if end else []
        else:
            self.pending = [next_id]


@torch.no_grad()
def generate_texts(
    jobs: Iterable[TextJob], num_valid_ids: int, batch_size: int
) -> Iterator[tuple[int, list[int]]]:
    """(index of the job, ids without bos and eos), as they finish.

    Up to `batch_size` texts are decoded together; when one finishes the next job takes its place,
    and `jobs` is asked for one only then. Ids from `num_valid_ids` (the tokenizer's size) on lie in
    the padded part of the vocabulary and cannot be drawn.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} is less than 1")
    waiting = enumerate(jobs)
    running: list[_Decoding] = []
    slots: NextTokens | None = None
    while True:
        while len(running) < batch_size and (entry := next(waiting, None)):
            index, job = entry
            if job.config.max_new_tokens == 0:
                if job.config.stop_at_eos:
                    job.context.add_text([])
                yield index, []
                continue
            slots = slots or NextTokens(job.context.model, batch_size)
            slots.join(job.context, min(job.config.max_new_tokens, ROOM))
            running.append(_Decoding(index, job, [job.context.tokens.bos]))
        if slots is None or not running:
            return
        hidden = slots.step([text.pending.pop(0) for text in running])
        drawing = [i for i, text in enumerate(running) if text.drawing]
        if len(drawing) < len(running):
            hidden = hidden[drawing]
        logits = slots.model.language_model.lm_head(hidden).float()[:, :num_valid_ids]
        for i, next_id in zip(
            drawing, _draw(logits, [running[i].job for i in drawing]), strict=True
        ):
            running[i].take(next_id)
        for i in reversed(range(len(running))):
            if not running[i].pending:
                slots.leave(i)
                text, running[i] = running[i], running[-1]
                running.pop()
                yield text.index, text.ids


def _draw(logits: Tensor, jobs: list[TextJob]) -> list[int]:
    """One id a row of (B, ids) logits."""
    ids: list[int] = logits.argmax(1).tolist()
    for row, job in enumerate(jobs):
        config = job.config
        if config.temperature > 0:
            probabilities = (logits[row] / config.temperature).softmax(0).cpu()
            if config.top_p < 1:
                sorted_p, order = probabilities.sort(descending=True)
                before = sorted_p.cumsum(0) - sorted_p
                probabilities[order[before >= config.top_p]] = 0
            ids[row] = int(torch.multinomial(probabilities, 1, generator=job.generator))
    return ids


def generate_text(
    context: Context,
    num_valid_ids: int,
    config: TextConfig | None = None,
    generator: torch.Generator | None = None,
) -> list[int]:
    """One text; see `generate_texts`."""
    job = TextJob(context, config or TextConfig(), generator)
    return next(generate_texts([job], num_valid_ids, 1))[1]


def guided_velocity(
    v: Tensor, v_text: Tensor, v_image: Tensor | None = None, *, config: SamplingConfig
) -> Tensor:
    """Combines (L, D) velocities of the full context, without instruction and without images.

    `v_image` None leaves the image branch out. Norms are rescaled to that of `v` at most:
    `global` over the sample, `channel` per token, `text_channel` per token before the image branch.
    """

    def renorm(guided: Tensor) -> Tensor:
        dims = (-2, -1) if config.cfg_renorm_type == "global" else -1
        norm, guided_norm = (x.norm(dim=dims, keepdim=True) for x in (v, guided))
        return guided * (norm / (guided_norm + RENORM_EPS)).clamp(config.cfg_renorm_min, 1.0)

    text_only = config.cfg_renorm_type == "text_channel"
    guided = v_text + config.cfg_text_scale * (v - v_text)
    guided = renorm(guided) if text_only else guided
    if v_image is not None:
        guided = v_image + config.cfg_img_scale * (guided - v_image)
    return guided if text_only else renorm(guided)


@dataclass(frozen=True)
class ImageJob:
    """An image to sample, from its noise, in the context that it follows."""

    context: Context
    noise: Tensor
    """(L, D)."""
    grid: Grid
    """Latent tokens (rows, columns); their product is L."""
    config: SamplingConfig = field(default_factory=SamplingConfig)
    without_text: Context | None = None
    """Needed when cfg_text_scale > 1."""
    without_images: Context | None = None
    """Needed when cfg_img_scale > 1 too."""

    def __post_init__(self) -> None:
        if None in self.branches():
            raise ValueError("guidance needs its own contexts, see cfg_text_scale, cfg_img_scale")

    @classmethod
    def of_size(
        cls,
        context: Context,
        size: tuple[int, int],
        config: SamplingConfig,
        generator: torch.Generator,
        *branches: Context,
    ) -> "ImageJob":
        """For an image of `size` (width, height), with noise from the CPU `generator`."""
        model, (width, height) = context.model, size
        grid = token_grid((height, width), model.config.latent_stride)
        noise = torch.randn(prod(grid), model.config.patch_latent_dim, generator=generator)
        return cls(context, noise.to(model.device), grid, config, *branches)

    def branches(self) -> list[Context | None]:
        """The contexts that guidance needs; None where one is missing."""
        text_on = self.config.cfg_text_scale > 1
        image_on = text_on and self.config.cfg_img_scale > 1
        return [self.without_text] * text_on + [self.without_images] * image_on

    def at(self, t: float) -> list[Context]:
        """Contexts whose velocities count at time t: its own, and guidance's in its interval."""
        low, high = self.config.cfg_interval
        guidance = self.branches() if low < t <= high else []
        return [self.context, *(branch for branch in guidance if branch is not None)]


@torch.no_grad()
def sample_latents(jobs: Sequence[ImageJob]) -> list[Tensor]:
    """Latent tokens (L, D) float32 of every job's image, by Euler steps with guidance.

    All contexts of a step, guidance's too, go through the model in one forward.
    """
    x = [job.noise.float() for job in jobs]
    times = [euler_times(job.config.num_timesteps, job.config.timestep_shift) for job in jobs]
    ids = [job.context.latent_position_ids(job.grid) for job in jobs]
    forwards: dict[tuple[tuple[int, int], ...], NextImages] = {}
    for step in range(max((len(t) - 1 for t in times), default=0)):
        active = [i for i, t in enumerate(times) if step < len(t) - 1]
        contexts = {i: jobs[i].at(times[i][step]) for i in active}
        key = tuple((i, len(contexts[i])) for i in active)
        if key not in forwards:  # in the first step, and where guidance sets in or a job ends
            forwards[key] = NextImages([(c, len(x[i])) for i in active for c in contexts[i]])
        now = [(x[i], ids[i], times[i][step]) for i in active]
        embedded = _embedded(jobs[0].context.model, now)
        latents = [z for i, z in zip(active, embedded, strict=True) for _ in contexts[i]]
        velocities = iter(forwards[key].velocities(torch.cat(latents)))
        for i in active:
            v, *guidance = (next(velocities) for _ in contexts[i])
            if guidance:
                v = guided_velocity(v, guidance[0], *guidance[1:], config=jobs[i].config)
            x[i] = x[i] - v * (times[i][step] - times[i][step + 1])
    return x


def _embedded(model: Bagel, images: list[tuple[Tensor, Tensor, float]]) -> tuple[Tensor, ...]:
    """(L, d) inputs of each image's (L, D) tokens, their position ids and its time."""
    x, ids, times = zip(*images, strict=True)
    lens = [len(tokens) for tokens in x]
    t, counts = (torch.tensor(values, device=model.device) for values in (times, lens))
    return model.embed_latents(torch.cat(x), t, torch.cat(ids), counts).split(lens)


@torch.no_grad()
def decode_images(model: Bagel, latents: Sequence[Tensor], grids: Sequence[Grid]) -> list[Tensor]:
    """Images (3, H, W) float32, nominally in [-1, 1], unclamped, of (L, D) latent tokens.

    Each is decoded alone at its own size: the decoder's norms would see padding.
    """
    size = model.config.latent_patch_size
    unpatched = [unpatchify(z, *grid, size) for z, grid in zip(latents, grids, strict=True)]
    return [model.vae.decode(z[None])[0] for z in unpatched]


def generate_images(jobs: Sequence[ImageJob]) -> list[Tensor]:
    """Images (3, H, W) float32, nominally in [-1, 1], unclamped, sampled together."""
    if not jobs:
        return []
    return decode_images(jobs[0].context.model, sample_latents(jobs), [job.grid for job in jobs])
