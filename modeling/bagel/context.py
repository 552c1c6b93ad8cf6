"""What a model has read so far: cached keys and values, grown segment by segment.

The decoder, the embeddings and the attention are those of training; only keys and values of the
past come from a cache.

Shape legend: n new tokens, L latent tokens, D numbers in a latent token, Hq query heads, Hk key
heads, E head size, B contexts that are decoded together.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import Attention, grouped_sdpa, head_rows, row_heads
from ..batch import AttentionMode, SpecialTokens, VitImages
from ..geometry import patchify, position_ids, token_grid
from .bagel import Bagel


def grown(store: Tensor, dim: int, length: int) -> Tensor:
    """`store` with room for `length` along `dim`: at least doubled, never by a token."""
    known = store.shape[dim]
    if length <= known:
        return store
    shape = list(store.shape)
    shape[dim] = max(length, 2 * known)
    larger = store.new_zeros(shape)
    larger.narrow(dim, 0, known).copy_(store)
    return larger


GRAIN = 128
"""Tokens that slots of decoding are a multiple of."""


class KVCache:
    """Keys and values of all layers of one context, preallocated."""

    def __init__(self, model: Bagel, capacity: int = 512) -> None:
        llm = model.config.llm
        shape = (llm.num_hidden_layers, 2, capacity, llm.num_key_value_heads, model.config.head_dim)
        self.store = torch.empty(shape, dtype=model.dtype, device=model.device)
        """(layers, 2, capacity, Hk, E)."""
        self.length = 0

    def reserve(self, new_tokens: int) -> None:
        self.store = grown(self.store, 2, self.length + new_tokens)

    def attend(self, mode: AttentionMode, layer: int, q: Tensor, new: Tensor) -> Tensor:
        """Attention of n new tokens to the past and to themselves, causally or both ways.

        Their keys and values, `new` (2, n, Hk, E), are written behind the past; `length` is not
        moved.
        """
        past, n = self.length, len(q)
        seen = self.store[layer, :, : past + n]
        seen[:, past:] = new
        keys, values = seen.unbind()
        mask, causal = None, mode == "causal" and n > 1
        if causal and past > 0:
            mask = torch.ones(n, past + n, dtype=torch.bool, device=keys.device).tril(past)
        out = grouped_sdpa(q.to(values), keys, values, mask, causal and past == 0)
        return out.to(q.device)


class Context:
    """One sample's growing context: cached keys and values and the next rope position."""

    def __init__(self, model: Bagel, tokens: SpecialTokens) -> None:
        self.model, self.tokens = model, tokens
        self.cache = KVCache(model)
        self.position = 0

    def fork(self) -> "Context":
        """A copy that grows on its own: what both share was computed once."""
        other = Context(self.model, self.tokens)
        other.cache.store = self.cache.store.clone()
        other.cache.length, other.position = self.cache.length, self.position
        return other

    @torch.no_grad()
    def _run(
        self, embeddings: Tensor, positions: Tensor, mode: AttentionMode, gen: Tensor | None = None
    ) -> Tensor:
        """(n, d) hidden states of the next segment, which stays in the context."""
        self.cache.reserve(len(embeddings))

        def attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self.cache.attend(mode, layer, q, torch.stack((k, v)))

        hidden = self.model.decode_tokens(
            embeddings.to(self.model.dtype), positions, gen, attention
        )
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

    def _add_image(self, embeddings: Tensor, generated: bool) -> None:
        """Adds start, image tokens, end at one shared position, attending both ways."""
        n, device = len(embeddings), self.model.device
        start, end = self._embed(self.tokens.image_start, self.tokens.image_end).split(1)
        segment = torch.cat([start, embeddings.to(start.dtype), end])
        gen = torch.arange(1, n + 1, device=device) if generated else None
        positions = torch.full((n + 2,), self.position, device=device)
        self._run(segment, positions, "full", gen)

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
        self._add_image(self.model.embed_vit(vit), generated=False)

    @torch.no_grad()
    def add_vae_image(self, image_pm1: Tensor) -> None:
        """Adds an image (3, H, W) in [-1, 1] as clean latents (t = 0, posterior mean)."""
        config = self.model.config
        latent = self.model.encode_images([image_pm1.to(self.model.device)])[0]
        z = patchify(latent, config.latent_patch_size)
        ids = self.latent_position_ids(token_grid(image_pm1.shape, config.latent_stride))
        self._add_image(self.model.embed_latents(z, z.new_zeros(len(z)), ids), generated=True)

    def latent_position_ids(self, grid: tuple[int, int]) -> Tensor:
        config = self.model.config
        ids = position_ids(*grid, config.max_latent_size, config.interpolate_pos)
        return ids.to(self.model.device)


class NextImages:
    """A noisy image as the next segment of each of B contexts, all in one forward.

    Rows of linears are shared, attention is per context: nothing depends on what is computed
    together but for the rounding of matrix products. The contexts stay as they are.
    """

    def __init__(self, images: Sequence[tuple[Context, int]]) -> None:
        """`images` are contexts, each with the number of latent tokens L that follow it."""
        contexts, self.lens = [context for context, _ in images], [n + 2 for _, n in images]
        self.model, tokens = contexts[0].model, contexts[0].tokens
        device, caches = self.model.device, [context.cache for context in contexts]
        for cache, n in zip(caches, self.lens, strict=True):
            cache.reserve(n)
        self.views = []
        """By context and layer: the place of its new keys and values, (2, n, Hk, E); all of its
        keys and all of its values, (1, Hk, past + n, E)."""
        for cache, n in zip(caches, self.lens, strict=True):
            layers = cache.store[:, :, : cache.length + n]
            self.views.append([(x[:, -n:], *x.transpose(1, 2)[:, None]) for x in layers])
        positions, lens = torch.tensor([[c.position for c in contexts], self.lens], device=device)
        self.positions, ends = positions.repeat_interleave(lens), lens.cumsum(0)
        is_latent = torch.ones(sum(self.lens), dtype=torch.bool, device=device)
        is_latent[ends - 1] = is_latent[ends - lens] = False
        self.gen = is_latent.nonzero()[:, 0]
        markers = torch.tensor([tokens.image_start, tokens.image_end], device=device)
        start_end = self.model.embed_text(markers)
        self.segments = start_end.new_empty(sum(self.lens), start_end.shape[1])
        self.segments[~is_latent] = start_end.repeat(len(contexts), 1)

    @torch.no_grad()
    def velocities(self, latents: Tensor) -> tuple[Tensor, ...]:
        """(L, D) float32 velocities of the images whose embedded (sum of L, d) latents these are,
        context after context."""

        def attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            groups, new = q.shape[1] // k.shape[1], torch.stack((k, v)).split(self.lens, 1)
            rows = head_rows(q, groups).split([n * groups for n in self.lens], 1)
            parts = []
            for views, own, pair in zip(self.views, rows, new, strict=True):
                place, keys, values = views[layer]
                place.copy_(pair)
                parts.append(F.scaled_dot_product_attention(own[None].to(keys), keys, values)[0])
            return row_heads(torch.cat(parts, 1), groups).to(q.device)

        self.segments[self.gen] = latents.to(self.segments.dtype)
        embeddings = self.segments.to(self.model.dtype)
        hidden = self.model.decode_tokens(embeddings, self.positions, self.gen, attention)
        velocities = self.model.llm2vae(hidden[self.gen]).float()
        return velocities.split([n - 2 for n in self.lens])


class NextTokens:
    """One further token for each of up to `slots` contexts in one forward.

    Contexts are copied into slots when they join and get their new keys and values back when they
    leave, so that a step copies nothing of the past.
    """

    def __init__(self, model: Bagel, slots: int) -> None:
        self.model, llm = model, model.config.llm
        heads, layers = llm.num_key_value_heads, llm.num_hidden_layers
        shape = (layers, 2, slots, heads, 0, model.config.head_dim)
        # Never uninitialised memory: a masked NaN still is a NaN.
        self.store = torch.zeros(shape, dtype=model.dtype, device=model.device)
        """(layers, 2, slots, Hk, capacity, E)."""
        self.contexts: list[Context] = []
        self.lengths: list[int] = []

    def join(self, context: Context, room: int) -> None:
        """Takes the next slot; `room` new tokens are likely."""
        n, slot = context.cache.length, len(self.contexts)
        # Contexts of about one length then share the room of the first.
        self.store = grown(self.store, 4, -(-(n + room) // GRAIN) * GRAIN)
        self.store[:, :, slot, :, :n] = context.cache.store[:, :, :n].transpose(2, 3)
        self.contexts.append(context)
        self.lengths.append(n)

    def leave(self, slot: int) -> None:
        """The context takes along what it was given; the last slot moves into the free one."""
        context, length = self.contexts[slot], self.lengths[slot]
        cache, known = context.cache, context.cache.length
        cache.reserve(length - known)
        cache.store[:, :, known:length] = self.store[:, :, slot, :, known:length].transpose(2, 3)
        context.position += length - known
        cache.length = length
        last_context, last_length = self.contexts.pop(), self.lengths.pop()
        if slot < len(self.contexts):
            self.contexts[slot], self.lengths[slot] = last_context, last_length
            last = len(self.contexts)
            self.store[:, :, slot, :, :last_length] = self.store[:, :, last, :, :last_length]

    @torch.no_grad()
    def step(self, ids: list[int]) -> Tensor:
        """(B, d) hidden states of the next token of every context, in the order of the slots."""
        count, longest, device = len(ids), max(self.lengths) + 1, self.model.device
        self.store = grown(self.store, 4, longest)
        pairs = zip(self.contexts, self.lengths, strict=True)
        host = [[c.position - c.cache.length + n for c, n in pairs], self.lengths, ids]
        positions, lengths, tokens = torch.tensor(host).to(device, non_blocking=True)
        hidden = self.model.decode_tokens(
            self.model.embed_text(tokens).to(self.model.dtype),
            positions,
            None,
            self._attention(lengths, count, longest),
        )
        self.lengths = [n + 1 for n in self.lengths]
        return hidden

    def _attention(self, lengths: Tensor, count: int, longest: int) -> Attention:
        slots, mask = torch.arange(count, device=lengths.device), None
        one_length = len(set(self.lengths)) == 1
        if not one_length:
            seen = torch.arange(longest, device=lengths.device) <= lengths[:, None]
            mask = torch.zeros(seen.shape, dtype=self.store.dtype, device=seen.device)
            mask = mask.masked_fill(~seen, -torch.inf)[:, None, None]

        def attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            both = self.store[layer]
            new = torch.stack((k, v), 1).to(both)
            if one_length:
                both[:, :count, :, longest - 1] = new.transpose(0, 1)
            else:
                both[:, slots, :, lengths] = new
            keys, values = both.unbind()
            # The queries of a key head are the rows of one product with its keys.
            grouped = q.unflatten(1, (keys.shape[1], -1)).to(keys)
            past = keys[:count, :, :longest], values[:count, :, :longest]
            out = F.scaled_dot_product_attention(grouped, *past, attn_mask=mask)
            return out.flatten(1, 2).to(q.device)

        return attention
