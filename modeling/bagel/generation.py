"""Cached decoding: contexts that grow segment by segment, text decoding, guided image sampling.

The decoder, the embeddings and the attention are those of training; only keys and values of the
past come from a cache.

Shape legend: n new tokens, L latent tokens, D numbers in a latent token, Hk key heads, E head size.
"""

import math
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor

from ..attention import grouped_sdpa
from ..batch import AttentionMode, SpecialTokens, VitImages
from ..flow import euler, euler_times
from ..geometry import patchify, position_ids, token_grid, unpatchify
from .bagel import Bagel

RENORM_EPS = 1e-8


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
        if not (math.isfinite(self.cfg_text_scale) and math.isfinite(self.cfg_img_scale)):
            raise ValueError("cfg_text_scale and cfg_img_scale must be finite")


class KVCache:
    """Keys and values of all layers, preallocated; grows by doubling, never by a token."""

    def __init__(self, model: Bagel, capacity: int = 512) -> None:
        llm = model.config.llm
        shape = (llm.num_hidden_layers, 2, capacity, llm.num_key_value_heads, model.config.head_dim)
        self.store = torch.empty(shape, dtype=model.dtype, device=model.device)
        self.length = 0

    def reserve(self, new_tokens: int) -> None:
        missing = self.length + new_tokens - self.store.shape[2]
        if missing > 0:
            more = max(missing, self.store.shape[2])
            room = self.store.new_empty(*self.store.shape[:2], more, *self.store.shape[3:])
            self.store = torch.cat([self.store, room], dim=2)

    def attend(self, mode: AttentionMode, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of n new tokens to the past and to themselves, causally or both ways.

        Their keys and values are written behind the past; `length` is not moved.
        """
        past, n = self.length, len(q)
        keys, values = self.store[layer, :, : past + n]
        keys[past:], values[past:] = k, v
        mask, causal = None, mode == "causal" and n > 1
        if causal and past > 0:
            mask = torch.ones(n, past + n, dtype=torch.bool, device=q.device).tril(past)
        return grouped_sdpa(q.to(values.dtype), keys, values, mask, causal and past == 0)


class Context:
    """One sample's growing context: cached keys and values and the next rope position."""

    def __init__(self, model: Bagel, tokens: SpecialTokens) -> None:
        self.model, self.tokens = model, tokens
        self.cache = KVCache(model)
        self.position = 0

    @torch.no_grad()
    def _run(
        self,
        embeddings: Tensor,
        positions: Tensor,
        mode: AttentionMode,
        gen: Tensor | None = None,
        keep: bool = True,
    ) -> Tensor:
        """(n, d) hidden states of the next segment, which stays in the context if `keep`."""
        self.cache.reserve(len(embeddings))

        def attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self.cache.attend(mode, layer, q, k, v)

        hidden = self.model.decode_tokens(
            embeddings.to(self.model.dtype), positions, gen, attention
        )
        if keep:
            self.cache.length += len(embeddings)
            self.position = int(positions[-1]) + 1
        return hidden

    def _embed(self, *ids: int) -> Tensor:
        return self.model.embed_text(torch.tensor(ids, device=self.model.device))

    def append_ids(self, ids: list[int]) -> Tensor:
        """Adds bare token ids causally; (n, d) hidden states."""
        positions = torch.arange(self.position, self.position + len(ids), device=self.model.device)
        return self._run(self._embed(*ids), positions, "causal")

    def add_text(self, ids: list[int]) -> None:
        """Adds bos, ids, eos."""
        self.append_ids([self.tokens.bos, *ids, self.tokens.eos])

    def _image(self, embeddings: Tensor, generated: bool, keep: bool = True) -> Tensor:
        """Runs start, image tokens, end at one shared position, attending both ways."""
        n, device = len(embeddings), self.model.device
        start, end = self._embed(self.tokens.image_start), self._embed(self.tokens.image_end)
        segment = torch.cat([start, embeddings.to(start.dtype), end])
        gen = torch.arange(1, n + 1, device=device) if generated else None
        positions = torch.full((n + 2,), self.position, device=device)
        return self._run(segment, positions, "full", gen, keep)

    @torch.no_grad()
    def add_vit_image(self, image_pm1: Tensor) -> None:
        """Adds an image (3, H, W) in [-1, 1] through the ViT; sides are multiples of its patch."""
        config, device = self.model.config, self.model.device
        h, w = token_grid(image_pm1.shape, config.vit_patch)
        ids = position_ids(h, w, config.vit_max_num_patch_per_side, config.interpolate_pos)
        vit = VitImages(
            patches=patchify(image_pm1.to(device), config.vit_patch),
            position_ids=ids.to(device),
            indexes=torch.arange(h * w),
            lens=(h * w,),
        )
        self._image(self.model.embed_vit(vit), generated=False)

    @torch.no_grad()
    def add_vae_image(self, image_pm1: Tensor) -> None:
        """Adds an image (3, H, W) in [-1, 1] as clean latents (t = 0, posterior mean)."""
        config = self.model.config
        latent = self.model.encode_images([image_pm1.to(self.model.device)])[0]
        z = patchify(latent, config.latent_patch_size)
        ids = self.latent_position_ids(token_grid(image_pm1.shape, config.latent_stride))
        self._image(self.model.embed_latents(z, z.new_zeros(len(z)), ids), generated=True)

    def latent_position_ids(self, grid: tuple[int, int]) -> Tensor:
        config = self.model.config
        ids = position_ids(*grid, config.max_latent_size, config.interpolate_pos)
        return ids.to(self.model.device)

    @torch.no_grad()
    def velocity(self, x_LD: Tensor, t: float, ids: Tensor) -> Tensor:
        """(L, D) float32 velocity of the image x_t as the next segment; the cache stays."""
        embeddings = self.model.embed_latents(x_LD, x_LD.new_full((len(x_LD),), t), ids)
        hidden = self._image(embeddings, generated=True, keep=False)
        return self.model.llm2vae(hidden[1:-1]).float()

    @torch.no_grad()
    def generate_text(
        self,
        max_new_tokens: int,
        num_valid_ids: int,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
        stop_at_eos: bool = True,
    ) -> list[int]:
        """Decodes from bos; ids without bos and eos. The context then holds bos, ids, eos.

        Greedy at temperature 0, else sampled. Ids from `num_valid_ids` (the tokenizer's size) on
        lie in the padded part of the vocabulary and cannot be drawn. Without `stop_at_eos` exactly
        `max_new_tokens` ids are drawn and nothing is appended after them.
        """
        ids: list[int] = []
        pending = [self.tokens.bos]
        while len(ids) < max_new_tokens:
            hidden = self.append_ids(pending)
            logits = self.model.language_model.lm_head(hidden[-1]).float()[:num_valid_ids]
            if temperature > 0:
                probabilities = (logits / temperature).softmax(0)
                next_id = int(torch.multinomial(probabilities.cpu(), 1, generator=generator))
            else:
                next_id = int(logits.argmax())
            pending = [next_id]
            if stop_at_eos and next_id == self.tokens.eos:
                pending = []
                break
            ids.append(next_id)
        if stop_at_eos:
            self.append_ids([*pending, self.tokens.eos])
        return ids


def guided_velocity(
    v: Tensor, v_text: Tensor, v_image: Tensor | None, config: SamplingConfig
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


@torch.no_grad()
def sample_latents(
    context: Context,
    noise_LD: Tensor,
    grid: tuple[int, int],
    config: SamplingConfig,
    without_text: Context | None = None,
    without_images: Context | None = None,
) -> Tensor:
    """Latent tokens (L, D) float32 of one image, from noise by Euler steps with guidance.

    `without_text` is needed when cfg_text_scale > 1, `without_images` when also cfg_img_scale > 1.
    """
    text_on = config.cfg_text_scale > 1
    image_on = text_on and config.cfg_img_scale > 1
    wanted = [without_text] * text_on + [without_images] * image_on
    branches = [branch for branch in wanted if branch is not None]
    if len(branches) < len(wanted):
        raise ValueError("guidance needs its own contexts, see cfg_text_scale and cfg_img_scale")
    ids = context.latent_position_ids(grid)
    low, high = config.cfg_interval

    def velocity_at(x: Tensor, t: float) -> Tensor:
        v = context.velocity(x, t, ids)
        if not text_on or not low < t <= high:
            return v
        v_text, *v_image = (branch.velocity(x, t, ids) for branch in branches)
        return guided_velocity(v, v_text, v_image[0] if v_image else None, config)

    times = euler_times(config.num_timesteps, config.timestep_shift)
    return euler(noise_LD.float(), velocity_at, times)


@torch.no_grad()
def decode_image(model: Bagel, tokens_LD: Tensor, grid: tuple[int, int]) -> Tensor:
    """Image (3, H, W) float32, nominally in [-1, 1], unclamped, of latent tokens."""
    latent = unpatchify(tokens_LD, *grid, model.config.latent_patch_size)
    return model.vae.decode(latent[None])[0]


@torch.no_grad()
def generate_image(
    context: Context,
    size: tuple[int, int],
    config: SamplingConfig,
    generator: torch.Generator,
    *branches: Context,
) -> Tensor:
    """Image (3, height, width) float32, nominally in [-1, 1], of `size` (width, height).

    Noise is drawn from the CPU `generator`; `branches` are guidance contexts of `sample_latents`.
    """
    model, (width, height) = context.model, size
    grid = token_grid((height, width), model.config.latent_stride)
    noise = torch.randn(prod(grid), model.config.patch_latent_dim, generator=generator)
    tokens = sample_latents(context, noise.to(model.device), grid, config, *branches)
    return decode_image(model, tokens, grid)
