"""BagelConfig: every size of the model, with the field names of the checkpoint's JSON files."""

from dataclasses import dataclass, field

from transformers import Qwen2Config, SiglipVisionConfig
from transformers.activations import ACT2FN

from ..attention import BACKENDS
from ..autoencoder import AutoencoderConfig

LAYER_MODULES = ("Qwen2DecoderLayer", "Qwen2MoEDecoderLayer", "Qwen2MoTDecoderLayer")


@dataclass(frozen=True, kw_only=True)
class BagelConfig:
    llm: Qwen2Config
    """`llm_config.json`; carries `qk_norm` and `layer_module` beside Qwen2's own fields."""
    vit: SiglipVisionConfig | None
    """`vit_config.json` with its full depth; None builds no understanding side for images."""
    vae: AutoencoderConfig | None
    """None builds no generation side."""
    latent_patch_size: int = 2
    max_latent_size: int = 64
    """Side of the latent position table, in latent patches."""
    vit_max_num_patch_per_side: int = 70
    connector_act: str = "gelu_pytorch_tanh"
    interpolate_pos: bool = False
    timestep_shift: float = 1.0
    """Warp of training times towards noise, `flow.shift_time`."""
    vit_select_layer: int = -2
    """The ViT keeps depth + 1 + this layers."""
    vit_rope: bool = False
    freeze_und: bool = False
    """Detach the understanding expert's activations (MoT layers only)."""
    attention_backend: str = field(default="sdpa", metadata={"saved": False})

    def __post_init__(self) -> None:
        if self.layer_module not in LAYER_MODULES:
            raise ValueError(f"layer_module {self.layer_module!r} is none of {LAYER_MODULES}")
        if self.attention_backend not in BACKENDS:
            known = sorted(BACKENDS)
            raise ValueError(f"attention_backend {self.attention_backend!r} is none of {known}")
        if self.connector_act not in ACT2FN:
            raise ValueError(f"connector_act {self.connector_act!r} is no activation")
        if self.freeze_und and self.layer_module != "Qwen2MoTDecoderLayer":
            raise ValueError(
                f"freeze_und needs layer_module Qwen2MoTDecoderLayer, not {self.layer_module}: "
                "the other layers share weights between understanding and generation"
            )
        if self.vit is not None and not 1 <= self.vit_layers <= self.vit.num_hidden_layers:
            raise ValueError(
                f"vit_select_layer={self.vit_select_layer} keeps {self.vit_layers} of "
                f"{self.vit.num_hidden_layers} ViT layers"
            )

    @property
    def layer_module(self) -> str:
        return self.llm.layer_module

    @property
    def qk_norm(self) -> bool:
        return self.llm.qk_norm

    @property
    def vit_layers(self) -> int:
        """Layers of the ViT that are built."""
        return self.vit.num_hidden_layers + 1 + self.vit_select_layer if self.vit else 0

    @property
    def vit_patch(self) -> int:
        """Pixels per ViT patch along each side; raises ValueError without a ViT."""
        if self.vit is None:
            raise ValueError("this model has no ViT: the folder lacks vit_config.json")
        return self.vit.patch_size

    @property
    def vit_patch_dim(self) -> int:
        """Numbers in a ViT patch."""
        return self.vit.num_channels * self.vit_patch**2 if self.vit else 0

    @property
    def head_dim(self) -> int:
        return (
            getattr(self.llm, "head_dim", None)
            or self.llm.hidden_size // self.llm.num_attention_heads
        )

    @property
    def patch_latent_dim(self) -> int:
        """Numbers in one latent token."""
        return self.latent_patch_size**2 * self.vae.z_channels if self.vae else 0

    @property
    def latent_stride(self) -> int:
        """Pixels per latent token along each side."""
        return self.latent_patch_size * self.vae.downsample if self.vae else 0
