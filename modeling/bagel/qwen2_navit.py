"""Packed Qwen2 decoder with one expert, two MLP experts (MoE) or two full experts (MoT).

Inside the decoder tokens stand in two blocks, understanding and generation tokens, so that each
expert works on contiguous memory and nothing is scattered. Only attention returns to sequence
order.

Shape legend: S tokens, d hidden size, Hq query heads, Hk key heads, E head size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

from ..attention import Attention
from ..batch import TensorRecord
from .config import BagelConfig
from .modeling_utils import Rope, apply_rope, signed

GEN = "_moe_gen"
Blocks = tuple[Tensor, Tensor]
"""The rows of the understanding tokens and of the generation tokens, each in sequence order."""
RopeBlocks = tuple[Blocks, Blocks]
"""Cosines and sines of both blocks."""


def _alone(gen_rows: Tensor) -> bool:
    """Und tokens only and no graph, as in decoding: the few rows of a step cost less than what
    sorts them."""
    return gen_rows.shape[0] == 0 and not torch.is_grad_enabled()


def _sum(a: Blocks, b: Blocks) -> Blocks:
    return a[0] + b[0], a[1] if _alone(a[1]) else a[1] + b[1]


@dataclass(frozen=True)
class ExpertOrder(TensorRecord):
    """Which tokens of the sequence belong to which expert. (Where a model lies on several devices,
    accelerate moves the arguments of a layer that have `to`.)"""

    und: Tensor
    """int64 places of the understanding tokens, ascending."""
    gen: Tensor
    """int64 places of the generation tokens, ascending."""

    @classmethod
    def of(cls, num_tokens: int, gen_indexes: Tensor | None, device: torch.device) -> "ExpertOrder":
        if gen_indexes is None:
            places = torch.arange(num_tokens, device=device)
            return cls(places, places[:0])
        is_gen = torch.zeros(num_tokens, dtype=torch.int8, device=device)
        is_gen[gen_indexes] = 1
        num_gen = len(gen_indexes)
        order = is_gen.argsort(stable=True)
        return cls(order[: num_tokens - num_gen], order[num_tokens - num_gen :])

    def split(self, x: Tensor) -> Blocks:
        """(S, ...) in sequence order -> blocks."""
        if _alone(self.gen):
            return x, x[:0]
        return _Split.apply(x, self.und, self.gen)

    def join(self, blocks: Blocks) -> Tensor:
        """Blocks -> (S, ...) in sequence order."""
        if _alone(self.gen):
            return blocks[0]
        return _Join.apply(*blocks, self.und, self.gen)


class _Split(torch.autograd.Function):
    """The backward of taking every row once is a copy, not a sum into zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, und: Tensor, gen: Tensor) -> Blocks:
        ctx.save_for_backward(und, gen)
        return x.index_select(0, und), x.index_select(0, gen)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _Join.apply(*grads, *ctx.saved_tensors), None, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_und: Tensor, x_gen: Tensor, und: Tensor, gen: Tensor) -> Tensor:
        ctx.save_for_backward(und, gen)
        out = x_und.new_empty(len(und) + len(gen), *x_und.shape[1:])
        return out.index_copy_(0, und, x_und).index_copy_(0, gen, x_gen)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        both = zip(ctx.needs_input_grad, ctx.saved_tensors, strict=False)
        return *(grad.index_select(0, place) if need else None for need, place in both), None, None


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up, which keeps its two inputs only and computes silu again in backward."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


class MLP(Qwen2MLP):
    def __init__(self, config: Qwen2Config) -> None:
        super().__init__(config)
        if config.hidden_act != "silu":
            raise ValueError(f"hidden_act {config.hidden_act!r} in llm_config.json is not silu")

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if not torch.is_grad_enabled():
            return self.down_proj(F.silu(gate, inplace=True).mul_(up))
        return self.down_proj(_SwiGLU.apply(gate, up))


@cache
def _scalar(value: float) -> Tensor:
    return torch.tensor(value)


class RMSNorm(nn.RMSNorm):
    """Fused, with float32 sums, also where autocast mixes the dtypes of input and weight."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if x.is_cpu and x.dtype == weight.dtype == torch.float32 and not torch.is_grad_enabled():
            # A CPU has no fused kernel: five operations instead of nine.
            norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
            scale = torch.addcmul(_scalar(self.eps), norm, norm, value=1 / x.shape[-1]).rsqrt_()
            return torch.mul(x, scale).mul_(weight)
        wide = torch.promote_types(x.dtype, weight.dtype)
        out = F.rms_norm(x.to(wide), self.normalized_shape, weight.to(wide), self.eps)
        return out.to(x.dtype)


def rope_tables(position_ids: Tensor, theta: float, head_dim: int) -> Rope:
    """Angles of Qwen2's half-rotated rope at (S,) positions."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device)
    angle = position_ids.float()[:, None] * (1.0 / theta ** (exponent / head_dim))
    angle = torch.cat([angle, angle], dim=-1)[:, None]
    return angle.cos(), signed(angle.sin())


SUFFIXES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "Qwen2DecoderLayer": (("",), ("",)),
    "Qwen2MoEDecoderLayer": (("",), ("", GEN)),
    "Qwen2MoTDecoderLayer": (("", GEN), ("", GEN)),
}
"""Suffixes of the experts' weights in attention and norms, and in the MLP, by `layer_module`."""


class Experts(nn.Module):
    """A module with weights per expert, which runs each expert on its block of tokens.

    With `freeze_und` the first expert runs without a graph, so its outputs are constants.
    """

    skip_empty = True
    """Without a graph an expert without tokens is left out; not where ranks share its weights."""

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        self.suffixes, self.mlp_suffixes = SUFFIXES[config.layer_module]
        self.freeze_und = config.freeze_und

    def add_norms(self, name: str, size: int, eps: float, suffixes: tuple[str, ...]) -> None:
        for s in suffixes:
            self.add_module(name + s, RMSNorm(size, eps))

    def part(self, name: str) -> nn.Module:
        """Own submodule; `get_submodule` would walk a path for every operation of every token."""
        return self._modules[name]  # type: ignore[return-value]

    def per_expert(
        self, run: Callable[..., Tensor], suffixes: tuple[str, ...], *blocks: Blocks
    ) -> Blocks:
        """`run(suffix, *rows)` of either expert; a single expert runs on both blocks."""
        if self.skip_empty and _alone(blocks[0][1]):
            und = run(suffixes[0], *[rows for rows, _ in blocks])
            return und, und[:0]
        und_rows, gen_rows = zip(*blocks, strict=True)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_und):
            und = run(suffixes[0], *und_rows)
        # In training an empty block runs too: its weights then get zero gradients, not None.
        return und, run(suffixes[-1], *gen_rows)

    def each(self, name: str, x: Blocks, suffixes: tuple[str, ...] | None = None) -> Blocks:
        """Every expert's own submodule `name` + suffix on its block."""
        if self.skip_empty and _alone(x[1]):
            und = self.part(name + (suffixes or self.suffixes)[0])(x[0])
            return und, und[:0]
        return self.per_expert(
            lambda s, part: self.part(name + s)(part), suffixes or self.suffixes, x
        )


class ExpertAttention(Experts):
    def __init__(self, config: BagelConfig) -> None:
        super().__init__(config)
        llm, self.head_dim, self.qk_norm = config.llm, config.head_dim, config.qk_norm
        heads = (llm.num_attention_heads, *[llm.num_key_value_heads] * 2)
        for s in self.suffixes:
            for name, count in zip("qkv", heads, strict=True):
                projection = nn.Linear(llm.hidden_size, count * self.head_dim)
                self.add_module(f"{name}_proj{s}", projection)
            output = nn.Linear(heads[0] * self.head_dim, llm.hidden_size, bias=False)
            self.add_module(f"o_proj{s}", output)
        if self.qk_norm:
            for name in ("q_norm", "k_norm"):
                self.add_norms(name, self.head_dim, llm.rms_norm_eps, self.suffixes)

    def _heads_of_one(self, x: Tensor, rope: Rope) -> tuple[Tensor, ...]:
        """`_heads` of und tokens alone; queries and keys are rotated together."""
        s, size = self.suffixes[0], (-1, self.head_dim)
        q, k, v = (self.part(f"{name}_proj{s}")(x).unflatten(1, size) for name in "qkv")
        if self.qk_norm:
            q, k = self.part(f"q_norm{s}")(q), self.part(f"k_norm{s}")(k)
        rotated = apply_rope(torch.cat([q, k], 1), rope)
        return *rotated.split([q.shape[1], k.shape[1]], 1), v

    def _heads(self, name: str, x: Blocks, rope: RopeBlocks) -> Blocks:
        """(n, heads, E) queries, keys or values of either expert, normed and rotated."""

        def run(suffix: str, part: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            out = self.part(f"{name}_proj{suffix}")(part).unflatten(1, (-1, self.head_dim))
            if name == "v":
                return out
            if self.qk_norm:
                out = self.part(f"{name}_norm{suffix}")(out)
            return apply_rope(out, (cos, sin))

        return self.per_expert(run, self.suffixes, x, *rope)

    def forward(
        self, x: Blocks, rope: RopeBlocks, tokens: ExpertOrder, attention: Attention, layer: int
    ) -> Blocks:
        if self.skip_empty and _alone(x[1]):
            q, k, v = self._heads_of_one(x[0], (rope[0][0], rope[1][0]))
        else:
            q, k, v = (tokens.join(self._heads(name, x, rope)) for name in "qkv")
        out = attention(layer, q, k, v).flatten(1)
        return self.each("o_proj", tokens.split(out))


class DecoderLayer(Experts):
    """Pre-norm attention and SwiGLU MLP."""

    def __init__(self, config: BagelConfig) -> None:
        super().__init__(config)
        llm = config.llm
        self.self_attn = ExpertAttention(config)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            self.add_norms(norm, llm.hidden_size, llm.rms_norm_eps, self.suffixes)
        for s in self.mlp_suffixes:
            self.add_module(f"mlp{s}", MLP(llm))

    def forward(
        self, x: Blocks, rope: RopeBlocks, tokens: ExpertOrder, attention: Attention, layer: int
    ) -> Blocks:
        """Blocks (n, d) -> blocks (n, d)."""
        normed = self.each("input_layernorm", x)
        attended = self.self_attn(normed, rope, tokens, attention, layer)
        x = _sum(x, attended)
        out = self.each("mlp", self.each("post_attention_layernorm", x), self.mlp_suffixes)
        return _sum(x, out)


class Qwen2Model(Experts):
    """Embedding, layers and final norms, which are doubled wherever the MLP is."""

    def __init__(self, config: BagelConfig) -> None:
        super().__init__(config)
        llm = config.llm
        self.head_dim, self.rope_theta = config.head_dim, llm.rope_parameters["rope_theta"]
        self.embed_tokens = nn.Embedding(llm.vocab_size, llm.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(llm.num_hidden_layers))
        self.add_norms("norm", llm.hidden_size, llm.rms_norm_eps, self.mlp_suffixes)

    def forward(
        self, x_Sd: Tensor, position_ids: Tensor, tokens: ExpertOrder, attention: Attention
    ) -> Tensor:
        """(S, d) input embeddings -> (S, d) after the final norms, both in sequence order."""
        cos, sin = rope_tables(position_ids, self.rope_theta, self.head_dim)
        rope = tokens.split(cos), tokens.split(sin)
        und, gen = tokens.split(x_Sd)
        x = und.detach() if self.freeze_und else und, gen
        for i, layer in enumerate(self.layers):
            x = layer(x, rope, tokens, attention, i)
        return tokens.join(self.each("norm", x, self.mlp_suffixes))


class Qwen2ForCausalLM(nn.Module):
    """Decoder and head; the head is the embedding's own matrix with `tie_word_embeddings`."""

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        self.model = Qwen2Model(config)
        self.lm_head = nn.Linear(config.llm.hidden_size, config.llm.vocab_size, bias=False)
        if config.llm.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
