"""Bagel: understanding and generation in one packed decoder.

Shape legend: S sequence tokens, d hidden size, L latent tokens, D numbers in a latent token,
M latent tokens of target images.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..attention import BACKENDS, Attention
from ..autoencoder import VAE_PREFIX, Autoencoder
from ..batch import PER_IMAGE, AnswerLabels, PackedBatch, TensorRecord, VaeImages, VitImages
from ..flow import interpolate, velocity
from ..geometry import patchify
from .config import BagelConfig
from .losses import LossSet, LossTerm, StepOutputs
from .modeling_utils import MLPConnector, PositionEmbedding, TimestepEmbedder
from .qwen2_navit import GEN, ExpertOrder, Qwen2ForCausalLM
from .siglip_navit import SiglipNavitModel

T = TypeVar("T")
ENCODED_PIXELS = 1024 * 1024
"""Pixels that the encoder sees at one time, or one image if that is larger."""


@dataclass(frozen=True, kw_only=True)
class FlowInputs(TensorRecord):
    """Clean latents and noise of all VAE images of a batch, as tokens."""

    z0: Tensor
    """(L, D) float32 scaled latents."""
    noise: Tensor
    """(L, D) float32."""


class Bagel(nn.Module):
    """The whole model; tensor names are those of the released checkpoints.

    `vae` is a submodule so that one object does everything, but it lives in its own file
    (`ae.safetensors`) and is frozen: gradients pass through its decoder, never into it.
    """

    def __init__(
        self, config: BagelConfig, losses: LossSet | None = None, autoencoder: bool = True
    ) -> None:
        """Without `autoencoder` latents have to be given and pixels cannot be computed."""
        super().__init__()
        self.config = config
        self.losses = losses or LossSet()
        hidden = config.llm.hidden_size
        self.language_model = Qwen2ForCausalLM(config)
        if config.vae is not None:
            self.time_embedder = TimestepEmbedder(hidden)
            self.vae2llm = nn.Linear(config.patch_latent_dim, hidden)
            self.llm2vae = nn.Linear(hidden, config.patch_latent_dim)
            self.latent_pos_embed = PositionEmbedding(config.max_latent_size, hidden)
            if autoencoder:
                self.vae = Autoencoder(config.vae).requires_grad_(False)
        if config.vit is not None:
            self.vit_model = SiglipNavitModel(config.vit, config.vit_layers, config.vit_rope)
            self.connector = MLPConnector(config.vit.hidden_size, hidden, config.connector_act)
            self.vit_pos_embed = PositionEmbedding(config.vit_max_num_patch_per_side, hidden)

    compute_dtype: torch.dtype | None = None
    """Of the weights in a forward pass, where it is not that of the weights at rest (FSDP2)."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and activations; inputs of another dtype are cast to it."""
        return self.compute_dtype or self.language_model.model.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.language_model.model.embed_tokens.weight.device

    def init_weights(self, copy_init_moe: bool = True) -> None:
        """Random initialisation: normal(0, initializer_range), `llm2vae` zero.

        `copy_init_moe` copies the understanding expert into the generation expert.
        """
        for name, parameter in self.named_parameters():
            if (std := self.initial_std(name)) is not None:
                nn.init.normal_(parameter, std=std)
        if copy_init_moe:
            state = self.language_model.state_dict()
            for name in state:
                state[name] = state[name.replace(GEN, "")]
            self.language_model.load_state_dict(state)

    def initial_std(self, name: str) -> float | None:
        """Deviation of a parameter's random initial values, None where they are not random."""
        module, _, kind = name.rpartition(".")
        linear = isinstance(self.get_submodule(module), nn.Linear | nn.Embedding)
        if not linear or name.startswith(VAE_PREFIX):
            return None
        return 0.0 if module == "llm2vae" or kind == "bias" else self.config.llm.initializer_range

    def embed_text(self, ids: Tensor) -> Tensor:
        """(T,) int64 token ids -> (T, d)."""
        return self.language_model.model.embed_tokens(ids)

    def embed_vit(self, vit: VitImages) -> Tensor:
        """(P, d) features of ViT patches, projected and placed."""
        features = self.vit_model(vit.patches, vit.position_ids, vit.lens)
        return self.connector(features) + self.vit_pos_embed(vit.position_ids)

    def embed_latents(
        self, z_LD: Tensor, t: Tensor, position_ids: Tensor, lens: Tensor | None = None
    ) -> Tensor:
        """(L, d) inputs of latent tokens at times t in [0, 1].

        `t` is (L,), or with `lens`, the int64 numbers of tokens of the images, one time an image.
        """
        latents = self.vae2llm(z_LD.to(self.vae2llm.weight.dtype))
        times = self.time_embedder(t)
        if lens is not None:
            times = times.repeat_interleave(lens, 0, output_size=len(z_LD))
        return latents + times + self.latent_pos_embed(position_ids)

    @torch.no_grad()
    def encode_images(
        self, images_pm1: list[Tensor] | tuple[Tensor, ...], noise: list[Tensor] | None = None
    ) -> list[Tensor]:
        """Latents (Z, h, w) float32 of images (3, H, W) in [-1, 1], each at its own size.

        Posterior means, or samples with `noise` of the latents' shapes. Same-size images share
        passes of up to `ENCODED_PIXELS`; nothing is padded, because the encoder's norms would see
        the padding.
        """
        latents: dict[int, Tensor] = {}
        for shape in {image.shape for image in images_pm1}:
            same = [i for i, image in enumerate(images_pm1) if image.shape == shape]
            at_once = max(1, ENCODED_PIXELS // (shape[-2] * shape[-1]))
            for first in range(0, len(same), at_once):
                members = same[first : first + at_once]
                stacked = torch.stack([images_pm1[i] for i in members])
                drawn = None if noise is None else torch.stack([noise[i] for i in members])
                latents.update(zip(members, self.vae.encode(stacked, drawn), strict=True))
        return [latents[i] for i in range(len(images_pm1))]

    def flow_inputs(self, vae: VaeImages) -> FlowInputs:
        """Posterior samples and noise of a batch's images, drawn from each image's own seed."""
        config, device = self.config, vae.indexes.device
        none = torch.zeros(0, config.patch_latent_dim, device=device)
        posterior: list[Tensor] = []
        noise: list[Tensor] = []
        for seed, (h, w) in zip(vae.noise_seeds, vae.grids, strict=True):
            generator = torch.Generator().manual_seed(seed)
            p, z = config.latent_patch_size, self.vae.config.z_channels
            drawn = torch.randn(z, h * p, w * p, generator=generator)
            posterior.append(drawn.to(device, non_blocking=True))
            noise.append(torch.randn(h * w, config.patch_latent_dim, generator=generator))
        latents = self.encode_images(vae.images, posterior)
        z0 = [patchify(latent, config.latent_patch_size) for latent in latents]
        noise_LD = torch.cat([none, *(n.to(device, non_blocking=True) for n in noise)])
        return FlowInputs(z0=torch.cat([none, *z0]), noise=noise_LD)

    def token_times(self, vae: VaeImages) -> Tensor:
        """(L,) float32 shifted time of every latent token."""
        times = torch.tensor(vae.times(self.config.timestep_shift), dtype=torch.float32)
        per_token = times.repeat_interleave(torch.tensor(vae.lens, dtype=torch.int64))
        return per_token.to(vae.indexes.device, non_blocking=True)

    def embed(self, batch: PackedBatch, flow: FlowInputs | None) -> Tensor:
        """(S, d) input embeddings of a packed batch in sequence order."""
        und_grad = torch.is_grad_enabled() and not self.config.freeze_und
        with torch.set_grad_enabled(und_grad):
            parts, indexes = [self.embed_text(batch.text.ids)], [batch.text.indexes]
            if batch.vit is not None:
                parts.append(self.embed_vit(batch.vit))
                indexes.append(batch.vit.indexes)
        if batch.vae is not None and flow is not None:
            t_L = self.token_times(batch.vae)
            z_t = interpolate(flow.z0, flow.noise, t_L[:, None])
            parts.append(self.embed_latents(z_t, t_L, batch.vae.position_ids))
            indexes.append(batch.vae.indexes)
        place = torch.cat(indexes).argsort()
        return torch.cat([p.to(parts[0].dtype) for p in parts])[place]

    def decode_tokens(
        self, embeddings: Tensor, position_ids: Tensor, gen: Tensor | None, attention: Attention
    ) -> Tensor:
        """(S, d) embeddings -> (S, d) hidden states after the final norms, in sequence order.

        `gen` are the places of tokens of the generation expert, None if there are none.
        """
        tokens = ExpertOrder.of(len(embeddings), gen, embeddings.device)
        return self.language_model.model(embeddings, position_ids, tokens, attention)

    def hidden_states(self, batch: PackedBatch, flow: FlowInputs | None) -> Tensor:
        """(S, d) hidden states of a packed batch after the final norms."""
        layout = batch.sample_lens, batch.split_lens, batch.attn_modes
        gen = None if batch.vae is None else batch.vae.indexes
        learned = None
        if self.config.freeze_und:
            learned = () if batch.vae is None else batch.vae.splits
        kind = BACKENDS[self.config.attention_backend]
        attention = kind(*layout, batch.position_ids.device, learned)
        return self.decode_tokens(self.embed(batch, flow), batch.position_ids, gen, attention)

    def completed(self, batch: PackedBatch) -> PackedBatch:
        """The batch with empty parts in place of absent ones, so that every module runs on it.

        On several ranks all have to enter the collectives of every module, also without images.
        """
        none = torch.zeros(0, dtype=torch.int64, device=batch.position_ids.device)
        places = {"position_ids": none, "indexes": none}
        labels, vit, vae = batch.labels, batch.vit, batch.vae
        if labels is None:
            labels = AnswerLabels(ids=none, indexes=none, weights=none.float(), total_weight=0.0)
        if vit is None and self.config.vit is not None:
            patches = none.new_zeros(0, self.config.vit_patch_dim, dtype=torch.float32)
            vit = VitImages(patches=patches, lens=(), **places)
        if vae is None and self.config.vae is not None:
            host = dict.fromkeys(PER_IMAGE, ())
            vae = VaeImages(**host, **places)  # type: ignore[arg-type]
        return replace(batch, labels=labels, vit=vit, vae=vae)

    def step_outputs(self, batch: PackedBatch, flow: FlowInputs | None = None) -> StepOutputs:
        """Everything that loss terms read. `flow` replaces the drawn latents and noise."""
        if batch.vae is not None and flow is None:
            flow = self.flow_inputs(batch.vae)
        hidden = self.hidden_states(batch, flow)
        if batch.vae is None or flow is None:
            none = hidden.new_zeros(0, self.config.patch_latent_dim, dtype=torch.float32)
            return StepOutputs(self, batch, hidden, none, none, none)
        target = batch.vae.target_tokens()
        return StepOutputs(
            model=self,
            batch=batch,
            hidden=hidden,
            velocity_pred=self.llm2vae(hidden[batch.vae.indexes[target]]).float(),
            velocity_true=velocity(flow.z0, flow.noise)[target],
            clean=flow.z0[target],
        )

    def call(self, function: Callable[..., T], *args: Any) -> T:
        """`function(self, *args)`: hooks of a sharded model run as for `forward`."""
        return function(self, *args)

    def forward(
        self,
        batch: PackedBatch,
        flow: FlowInputs | None = None,
        scales: Mapping[str, float] | None = None,
        observe: bool = False,
        complete: bool = False,
    ) -> dict[str, LossTerm]:
        """The (sum, count) of every configured loss term that this batch has something for.

        `scales` and `observe`: see `LossSet.__call__`. With `complete` every module runs and every
        term is there, so that all trained weights get a gradient, if need be of zeros.
        """
        batch = self.completed(batch) if complete else batch
        return self.losses(self.step_outputs(batch, flow), scales, observe, complete)
