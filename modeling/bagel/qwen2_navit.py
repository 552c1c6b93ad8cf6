"""Packed Qwen2 decoder with one expert, two MLP experts (MoE) or two full experts (MoT).

Inside the decoder tokens stand in *expert order*: all understanding tokens first, then all
generation tokens, so that each expert works on one contiguous block and nothing is scattered.
Only attention returns to sequence order.

Shape legend: S tokens, d hidden size, Hq query heads, Hk key heads, E head size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RMSNorm

from ..attention import Attention
from .siglip_navit import rotate_half

GEN = "_moe_gen"
Rope = tuple[Tensor, Tensor]


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
    """Cosines and sines (S, 1, E) float32 of Qwen2's half-rotated rope."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device)
    angle = position_ids.float()[:, None] * (1.0 / theta ** (exponent / head_dim))
    angle = torch.cat([angle, angle], dim=-1)[:, None]
    return angle.cos(), angle.sin()


def apply_rope(x_SHE: Tensor, rope: Rope) -> Tensor:
    cos, sin = rope
    return (x_SHE.float() * cos + rotate_half(x_SHE.float()) * sin).to(x_SHE.dtype)


class Experts(nn.Module):
    """A module with weights per expert: runs each expert on its block of tokens.

    `suffixes` are those of the weights' names: ("",) for one expert, ("", "_moe_gen") for two.
    With `freeze_und` the first expert runs without a graph, so its outputs are constants.
    """

    def __init__(self, suffixes: Sequence[str], freeze_und: bool = False) -> None:
        super().__init__()
        self.suffixes = tuple(suffixes)
        self.freeze_und = freeze_und

    def per_expert(
        self, run: Callable[..., Tensor], sizes: Sequence[int], *inputs: Tensor
    ) -> Tensor:
        """Concatenates `run(suffix, *block)` over the experts' blocks of `inputs` (S, ...)."""
        if len(self.suffixes) == 1:
            return run(self.suffixes[0], *inputs)
        blocks = list(zip(*(x.split(list(sizes)) for x in inputs), strict=True))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_und):
            und = run(self.suffixes[0], *blocks[0])
        return torch.cat([und, run(self.suffixes[1], *blocks[1])])


class ExpertAttention(Experts):
    def __init__(
        self, config: Qwen2Config, head_dim: int, qk_norm: bool, *experts: Sequence[str] | bool
    ) -> None:
        super().__init__(*experts)  # type: ignore[arg-type]
        self.heads = (config.num_attention_heads, *[config.num_key_value_heads] * 2)
        self.head_dim = head_dim
        self.qk_norm = qk_norm
        width, (q, k, v) = config.hidden_size, (h * head_dim for h in self.heads)
        for s in self.suffixes:
            self.add_module(f"q_proj{s}", nn.Linear(width, q))
            self.add_module(f"k_proj{s}", nn.Linear(width, k))
            self.add_module(f"v_proj{s}", nn.Linear(width, v))
            self.add_module(f"o_proj{s}", nn.Linear(q, width, bias=False))
            if qk_norm:
                self.add_module(f"q_norm{s}", Qwen2RMSNorm(head_dim, config.rms_norm_eps))
                self.add_module(f"k_norm{s}", Qwen2RMSNorm(head_dim, config.rms_norm_eps))

    def _qkv(self, suffix: str, x: Tensor) -> Tensor:
        q, k, v = (
            self.get_submodule(f"{name}_proj{suffix}")(x).unflatten(1, (-1, self.head_dim))
            for name in "qkv"
        )
        if self.qk_norm:
            q, k = (
                self.get_submodule(f"{name}_norm{suffix}")(t) for name, t in (("q", q), ("k", k))
            )
        return torch.cat([q, k.to(q.dtype), v.to(q.dtype)], dim=1)

    def forward(
        self, x_Sd: Tensor, rope: Rope, tokens: ExpertOrder, attention: Attention, layer: int
    ) -> Tensor:
        qkv = tokens.to_sequence(self.per_expert(self._qkv, tokens.sizes, x_Sd))
        q, k, v = qkv.split(self.heads, dim=1)
        out = attention(layer, apply_rope(q, rope), apply_rope(k, rope), v).flatten(1)
        return self.per_expert(
            lambda s, part: self.get_submodule(f"o_proj{s}")(part),
            tokens.sizes,
            tokens.to_experts(out),
        )


class DecoderLayer(Experts):
    """Pre-norm attention and SwiGLU MLP.

    `joint` experts share everything but the MLP (MoE); otherwise each has its own weights (MoT).
    """

    def __init__(
        self,
        config: Qwen2Config,
        head_dim: int,
        qk_norm: bool,
        suffixes: Sequence[str],
        mlp_suffixes: Sequence[str],
        freeze_und: bool,
    ) -> None:
        super().__init__(suffixes, freeze_und)
        self.self_attn = ExpertAttention(config, head_dim, qk_norm, suffixes, freeze_und)
        for s in suffixes:
            for norm in ("input_layernorm", "post_attention_layernorm"):
                self.add_module(norm + s, Qwen2RMSNorm(config.hidden_size, config.rms_norm_eps))
        self.mlp_experts = tuple(mlp_suffixes)
        for s in mlp_suffixes:
            self.add_module(f"mlp{s}", Qwen2MLP(config))

    def _norm(self, name: str, x: Tensor, tokens: ExpertOrder) -> Tensor:
        return self.per_expert(lambda s, part: self.get_submodule(name + s)(part), tokens.sizes, x)

    def _mlp(self, x: Tensor, tokens: ExpertOrder) -> Tensor:
        if self.mlp_experts == self.suffixes:
            return self.per_expert(
                lambda s, part: self.get_submodule(f"mlp{s}")(part), tokens.sizes, x
            )
        und, gen = x.split(list(tokens.sizes))
        return torch.cat([self.get_submodule("mlp")(und), self.get_submodule("mlp" + GEN)(gen)])

    def forward(
        self, x_Sd: Tensor, rope: Rope, tokens: ExpertOrder, attention: Attention, layer: int
    ) -> Tensor:
        normed = self._norm("input_layernorm", x_Sd, tokens)
        x = x_Sd + self.self_attn(normed, rope, tokens, attention, layer)
        return x + self._mlp(self._norm("post_attention_layernorm", x, tokens), tokens)


EXPERTS: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "Qwen2DecoderLayer": (("",), ("",)),
    "Qwen2MoEDecoderLayer": (("",), ("", GEN)),
    "Qwen2MoTDecoderLayer": (("", GEN), ("", GEN)),
}
"""Suffixes of the weights in attention and norms, and in the MLP, by `layer_module`."""


class Qwen2Model(Experts):
    def __init__(
        self, config: Qwen2Config, head_dim: int, qk_norm: bool, layer_module: str, freeze_und: bool
    ) -> None:
        suffixes, mlp_suffixes = EXPERTS[layer_module]
        super().__init__(mlp_suffixes, freeze_und)  # the final norm is doubled wherever the MLP is
        self.head_dim = head_dim
        self.rope_theta = config.rope_parameters["rope_theta"]
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, head_dim, qk_norm, suffixes, mlp_suffixes, freeze_und)
            for _ in range(config.num_hidden_layers)
        )
        for s in self.suffixes:
            self.add_module(f"norm{s}", Qwen2RMSNorm(config.hidden_size, config.rms_norm_eps))

    def forward(
        self, x_Sd: Tensor, position_ids: Tensor, tokens: ExpertOrder, attention: Attention
    ) -> Tensor:
        """(S, d) input embeddings -> (S, d) after the final norms, both in sequence order."""
        rope = rope_tables(position_ids, self.rope_theta, self.head_dim)
        x = tokens.to_experts(x_Sd)
        for i, layer in enumerate(self.layers):
            x = layer(x, rope, tokens, attention, i)
        x = self.per_expert(lambda s, part: self.get_submodule(f"norm{s}")(part), tokens.sizes, x)
        return tokens.to_sequence(x)


class Qwen2ForCausalLM(nn.Module):
    """Decoder and (untied) head."""

    def __init__(
        self, config: Qwen2Config, head_dim: int, qk_norm: bool, *args: str | bool
    ) -> None:
        super().__init__()
        self.model = Qwen2Model(config, head_dim, qk_norm, *args)  # type: ignore[arg-type]
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
