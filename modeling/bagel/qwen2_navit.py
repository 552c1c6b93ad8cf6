"""Packed Qwen2 decoder with one expert, two MLP experts (MoE) or two full experts (MoT).

Inside the decoder tokens stand in *expert order*: all understanding tokens first, then all
generation tokens, so that each expert works on one contiguous block and nothing is scattered.
Only attention returns to sequence order.

Shape legend: S tokens, d hidden size, Hq query heads, Hk key heads, E head size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RMSNorm

from ..attention import Attention
from .config import BagelConfig
from .modeling_utils import Rope, apply_rope

GEN = "_moe_gen"


@dataclass(frozen=True)
class ExpertOrder:
    """The permutation between sequence order and expert order."""

    order: Tensor
    """(S,) int64: sequence place of each token in expert order."""
    inverse: Tensor
    """(S,) int64: expert-order place of each token of the sequence."""
    sizes: tuple[int, int]
    """Number of understanding and of generation tokens."""

    @classmethod
    def of(cls, num_tokens: int, gen_indexes: Tensor | None, device: torch.device) -> "ExpertOrder":
        is_gen = torch.zeros(num_tokens, dtype=torch.int8, device=device)
        num_gen = 0
        if gen_indexes is not None:
            is_gen[gen_indexes] = 1
            num_gen = len(gen_indexes)
        order = is_gen.argsort(stable=True)
        return cls(order, order.argsort(), (num_tokens - num_gen, num_gen))

    def to_experts(self, x: Tensor) -> Tensor:
        """(S, ...) in sequence order -> expert order."""
        return _Permute.apply(x, self.order, self.inverse)

    def to_sequence(self, x: Tensor) -> Tensor:
        """(S, ...) in expert order -> sequence order."""
        return _Permute.apply(x, self.inverse, self.order)


class _Permute(torch.autograd.Function):
    """Rows in another order. The backward of a permutation is a gather, not a scatter-add."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        order, inverse = ctx.saved_tensors
        return _Permute.apply(grad, inverse, order), None, None


def rope_tables(position_ids: Tensor, theta: float, head_dim: int) -> Rope:
    """Angles of Qwen2's half-rotated rope at (S,) positions."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device)
    angle = position_ids.float()[:, None] * (1.0 / theta ** (exponent / head_dim))
    angle = torch.cat([angle, angle], dim=-1)[:, None]
    return angle.cos(), angle.sin()


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

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        self.suffixes, self.mlp_suffixes = SUFFIXES[config.layer_module]
        self.freeze_und = config.freeze_und

    def add_norms(self, name: str, size: int, eps: float, suffixes: tuple[str, ...]) -> None:
        for s in suffixes:
            self.add_module(name + s, Qwen2RMSNorm(size, eps))

    def per_expert(
        self,
        run: Callable[[str, Tensor], Tensor],
        tokens: ExpertOrder,
        x: Tensor,
        suffixes: tuple[str, ...],
    ) -> Tensor:
        """Concatenates `run(suffix, block)` over the experts' blocks of x (S, ...)."""
        if len(suffixes) == 1:
            return run(suffixes[0], x)
        und, gen = x.split(list(tokens.sizes))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_und):
            und = run(suffixes[0], und)
        return torch.cat([und, run(suffixes[1], gen)])

    def each(
        self, name: str, tokens: ExpertOrder, x: Tensor, suffixes: tuple[str, ...] | None = None
    ) -> Tensor:
        """Every expert's own submodule `name` + suffix on its block of x (S, ...)."""
        return self.per_expert(
            lambda s, part: self.get_submodule(name + s)(part), tokens, x, suffixes or self.suffixes
        )


class ExpertAttention(Experts):
    def __init__(self, config: BagelConfig) -> None:
        super().__init__(config)
        llm, self.head_dim, self.qk_norm = config.llm, config.head_dim, config.qk_norm
        self.heads = (llm.num_attention_heads, *[llm.num_key_value_heads] * 2)
        for s in self.suffixes:
            for name, heads in zip("qkv", self.heads, strict=True):
                projection = nn.Linear(llm.hidden_size, heads * self.head_dim)
                self.add_module(f"{name}_proj{s}", projection)
            output = nn.Linear(self.heads[0] * self.head_dim, llm.hidden_size, bias=False)
            self.add_module(f"o_proj{s}", output)
        if self.qk_norm:
            for name in ("q_norm", "k_norm"):
                self.add_norms(name, self.head_dim, llm.rms_norm_eps, self.suffixes)

    def _qkv(self, suffix: str, x: Tensor) -> Tensor:
        q, k, v = (
            self.get_submodule(f"{name}_proj{suffix}")(x).unflatten(1, (-1, self.head_dim))
            for name in "qkv"
        )
        if self.qk_norm:
            q = self.get_submodule(f"q_norm{suffix}")(q)
            k = self.get_submodule(f"k_norm{suffix}")(k)
        return torch.cat([q, k.to(q.dtype), v.to(q.dtype)], dim=1)

    def forward(
        self, x_Sd: Tensor, rope: Rope, tokens: ExpertOrder, attention: Attention, layer: int
    ) -> Tensor:
        qkv = tokens.to_sequence(self.per_expert(self._qkv, tokens, x_Sd, self.suffixes))
        q, k, v = qkv.split(self.heads, dim=1)
        out = attention(layer, apply_rope(q, rope), apply_rope(k, rope), v).flatten(1)
        return self.each("o_proj", tokens, tokens.to_experts(out))


class DecoderLayer(Experts):
    """Pre-norm attention and SwiGLU MLP."""

    def __init__(self, config: BagelConfig) -> None:
        super().__init__(config)
        llm = config.llm
        self.self_attn = ExpertAttention(config)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            self.add_norms(norm, llm.hidden_size, llm.rms_norm_eps, self.suffixes)
        for s in self.mlp_suffixes:
            self.add_module(f"mlp{s}", Qwen2MLP(llm))

    def forward(
        self, x_Sd: Tensor, rope: Rope, tokens: ExpertOrder, attention: Attention, layer: int
    ) -> Tensor:
        normed = self.each("input_layernorm", tokens, x_Sd)
        x = x_Sd + self.self_attn(normed, rope, tokens, attention, layer)
        normed = self.each("post_attention_layernorm", tokens, x)
        return x + self.each("mlp", tokens, normed, self.mlp_suffixes)


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
        rope = rope_tables(position_ids, self.rope_theta, self.head_dim)
        x = tokens.to_experts(x_Sd)
        for i, layer in enumerate(self.layers):
            x = layer(x, rope, tokens, attention, i)
        return tokens.to_sequence(self.each("norm", tokens, x, self.mlp_suffixes))


class Qwen2ForCausalLM(nn.Module):
    """Decoder and head; the head is the embedding's own matrix with `tie_word_embeddings`."""

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        self.model = Qwen2Model(config)
        self.lm_head = nn.Linear(config.llm.hidden_size, config.llm.vocab_size, bias=False)
        if config.llm.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
