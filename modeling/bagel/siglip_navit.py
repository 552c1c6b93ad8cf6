"""Packed SigLIP: images of any size as one sequence of patches, each attending to itself.

Shape legend: P patches of all images, V hidden size, A heads, E head size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipMLP

from ..attention import grouped_sdpa
from .modeling_utils import Rope, apply_rope, signed

ROPE_BASE = 10_000.0


class VisionRope(nn.Module):
    """Cosines and sines of the 2-D rope for every place of a side x side grid; in the state dict.

    Tables are (side * side, head_dim / 2), the half-rotated angles of rows and of columns.
    """

    def __init__(self, side: int, head_dim: int) -> None:
        super().__init__()
        half = head_dim // 2
        frequency = ROPE_BASE ** -(torch.arange(0, half, 2, dtype=torch.float32) / half)
        index = torch.arange(side * side)
        for name, coordinate in (("h", index // side), ("w", index % side)):
            angle = (coordinate[:, None] * frequency).repeat(1, 2)
            self.register_buffer(f"cos_{name}", angle.cos())
            self.register_buffer(f"sin_{name}", angle.sin())

    def forward(self, position_ids: Tensor) -> list[Rope]:
        """(P,) int64 -> the angles of the rows and of the columns."""
        return [
            (
                self.get_buffer(f"cos_{axis}")[position_ids, None],
                signed(self.get_buffer(f"sin_{axis}")[position_ids, None]),
            )
            for axis in "hw"
        ]


class SiglipEmbeddings(nn.Module):
    def __init__(self, config: SiglipVisionConfig, rope: bool, table_side: int) -> None:
        super().__init__()
        patch_dim = config.num_channels * config.patch_size**2
        self.patch_embedding = nn.Linear(patch_dim, config.hidden_size)
        self.position_embedding = None if rope else nn.Embedding(table_side**2, config.hidden_size)

    def forward(self, patches: Tensor, position_ids: Tensor) -> Tensor:
        x = self.patch_embedding(patches.to(self.patch_embedding.weight.dtype))
        return x if self.position_embedding is None else x + self.position_embedding(position_ids)


class SiglipAttention(nn.Module):
    def __init__(self, config: SiglipVisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(width, width) for _ in range(4)
        )

    def forward(self, x_PV: Tensor, lens: Sequence[int], ropes: list[Rope]) -> Tensor:
        q, k, v = (
            proj(x_PV).unflatten(1, (self.heads, -1))
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if ropes:
            q, k = (
                torch.cat(
                    [apply_rope(*pair) for pair in zip(x.chunk(2, -1), ropes, strict=True)], -1
                )
                for x in (q, k)
            )
        images = zip(*(x.split(list(lens)) for x in (q, k, v)), strict=True)
        # No rows, but without any image all weights still get a gradient.
        none = q[:0] + k[:0] + v[:0]
        attended = [grouped_sdpa(*image) for image in images] if lens else []
        return self.out_proj(torch.cat([none, *attended]).flatten(1))


class SiglipEncoderLayer(nn.Module):
    def __init__(self, config: SiglipVisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = SiglipAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = SiglipMLP(config)

    def forward(self, x: Tensor, lens: Sequence[int], ropes: list[Rope]) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), lens, ropes)
        return x + self.mlp(self.layer_norm2(x))


class SiglipVisionTransformer(nn.Module):
    def __init__(self, config: SiglipVisionConfig, num_layers: int, rope: bool) -> None:
        super().__init__()
        side = config.image_size // config.patch_size
        layers = nn.ModuleList(SiglipEncoderLayer(config) for _ in range(num_layers))
        self.embeddings = SiglipEmbeddings(config, rope, side)
        self.encoder = nn.ModuleDict({"layers": layers})
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        head_dim = config.hidden_size // config.num_attention_heads
        self.rope = VisionRope(side, head_dim) if rope else None

    def forward(self, patches: Tensor, position_ids: Tensor, lens: Sequence[int]) -> Tensor:
        ropes = [] if self.rope is None else self.rope(position_ids)
        x = self.embeddings(patches, position_ids)
        for layer in self.encoder.get_submodule("layers").children():
            x = layer(x, lens, ropes)
        return self.post_layernorm(x)


class SiglipNavitModel(nn.Module):
    """The released SigLIP's first `num_layers` layers, packed.

    Position ids count on a table of side `image_size / patch_size`, also for rope.
    """

    def __init__(self, config: SiglipVisionConfig, num_layers: int, rope: bool) -> None:
        super().__init__()
        self.vision_model = SiglipVisionTransformer(config, num_layers, rope)

    def layers(self) -> list[nn.Module]:
        return list(self.vision_model.encoder.get_submodule("layers").children())

    def forward(self, patches: Tensor, position_ids: Tensor, lens: Sequence[int]) -> Tensor:
        """(P, patch_dim) in [-1, 1] and (P,) int64 -> (P, V); `lens` are patches per image."""
        return self.vision_model(patches, position_ids, lens)
