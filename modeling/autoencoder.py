"""FLUX autoencoder: images in [-1, 1] to latents of `z_channels` and back.

Shape legend: B images, C image channels, H and W pixels, Z latent channels, h = H / downsample.
Submodule names are the tensor names of `ae.safetensors`.
"""

from collections import OrderedDict
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .geometry import token_grid

VAE_PREFIX = "vae."
"""Of the names of its tensors in the model."""
NORM_GROUPS = 32
NORM_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """Sizes of the autoencoder; field names are those of `vae_config.json`."""

    in_channels: int = 3
    out_ch: int = 3
    ch: int = 128
    """Channels of the highest-resolution level; a multiple of 32 (GroupNorm)."""
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 16
    scale_factor: float = 0.3611
    shift_factor: float = 0.1159

    def __post_init__(self) -> None:
        object.__setattr__(self, "ch_mult", tuple(self.ch_mult))
        if self.ch % NORM_GROUPS:
            raise ValueError(f"vae ch={self.ch} is no multiple of {NORM_GROUPS} (GroupNorm)")

    @property
    def downsample(self) -> int:
        """Pixels per latent along each side."""
        return 2 ** (len(self.ch_mult) - 1)

    @property
    def widths(self) -> list[int]:
        """Channels of every level, the highest resolution first."""
        return [self.ch * m for m in self.ch_mult]


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(NORM_GROUPS, channels, eps=NORM_EPS)


def _conv3(c_in: int, c_out: int) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, padding=1)


class ResnetBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.norm1 = _norm(c_in)
        self.conv1 = _conv3(c_in, c_out)
        self.norm2 = _norm(c_out)
        self.conv2 = _conv3(c_out, c_out)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Single-head self-attention over all pixels of one image."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (conv(normed).flatten(2).mT[:, None] for conv in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v)[:, 0].mT.reshape(x.shape)
        return x + self.proj_out(out)


def _named(**modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))


def _middle(channels: int) -> nn.Sequential:
    return _named(
        block_1=ResnetBlock(channels, channels),
        attn_1=AttnBlock(channels),
        block_2=ResnetBlock(channels, channels),
    )


def _level(c_in: int, c_out: int, blocks: int, **resample: nn.Module) -> nn.Sequential:
    """Residual blocks of one resolution, then the change to the next (none at the last)."""
    pairs = pairwise([c_in, *[c_out] * blocks])
    return _named(block=nn.Sequential(*(ResnetBlock(a, b) for a, b in pairs)), **resample)


def _downsample(channels: int) -> nn.Sequential:
    return _named(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(channels, channels, 3, stride=2))


def _upsample(channels: int) -> nn.Sequential:
    return _named(nearest=nn.Upsample(scale_factor=2.0), conv=_conv3(channels, channels))


class Encoder(nn.Module):
    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, levels = config.widths, []
        for i, (c_in, c_out) in enumerate(pairwise([config.ch, *widths])):
            change = {"downsample": _downsample(c_out)} if i < len(widths) - 1 else {}
            levels.append(_level(c_in, c_out, config.num_res_blocks, **change))
        self.conv_in = _conv3(config.in_channels, config.ch)
        self.down = nn.Sequential(*levels)
        self.mid = _middle(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = _conv3(widths[-1], 2 * config.z_channels)

    def forward(self, image_pm1: Tensor) -> Tensor:
        h = self.mid(self.down(self.conv_in(image_pm1)))
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """Levels run from the coarsest `up.{last}` to `up.0`.

    The two finest levels of an image of `checkpoint_pixels` or more are recomputed in backward
    instead of stored: their activations are what runs out of memory at 512 x 512 and above.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, levels = config.widths, []
        for i, (c_in, c_out) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True)):
            change = {"upsample": _upsample(c_out)} if i > 0 else {}
            levels.append(_level(c_in, c_out, config.num_res_blocks + 1, **change))
        self.conv_in = _conv3(config.z_channels, widths[-1])
        self.mid = _middle(widths[-1])
        self.up = nn.ModuleList(levels)
        self.norm_out = _norm(widths[0])
        self.conv_out = _conv3(widths[0], config.out_ch)
        self.checkpoint_pixels = 512 * 512
        self.downsample = config.downsample

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        pixels = z.shape[-2] * z.shape[-1] * self.downsample**2
        recomputed = 2 if pixels >= self.checkpoint_pixels and torch.is_grad_enabled() else 0
        for i, level in reversed(list(enumerate(self.up))):
            # Layer by layer: recomputing a whole level at once would need its memory again.
            blocks, *resample = level.children()
            for layer in (*blocks.children(), *resample):
                h = checkpoint(layer, h, use_reentrant=False) if i < recomputed else layer(h)
        # Rounding the image to bf16 alone moves 1 - SSIM by half on low-contrast images, so the
        # output layers leave autocast and run in fp32.
        with torch.autocast(h.device.type, enabled=False):
            dtype = torch.promote_types(h.dtype, torch.float32)
            norm_weight, norm_bias = (p.to(dtype) for p in self.norm_out.parameters())
            weight, bias = (p.to(dtype) for p in self.conv_out.parameters())
            h = F.group_norm(h.to(dtype), NORM_GROUPS, norm_weight, norm_bias, NORM_EPS)
            return F.conv2d(F.silu(h), weight, bias, padding=1)


class Autoencoder(nn.Module):
    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.conv_in.weight.dtype

    def encode(self, image_pm1_BCHW: Tensor, noise_BZhw: Tensor | None = None) -> Tensor:
        """Scaled latents (B, Z, H/downsample, W/downsample) of images in [-1, 1].

        The posterior mean, or, with `noise` ~ N(0, 1) of the latents' shape, a posterior sample.
        Nothing is padded: raises ValueError where H or W is no multiple of `config.downsample`.
        """
        token_grid(image_pm1_BCHW.shape, self.config.downsample)  # raises
        moments = self.encoder(image_pm1_BCHW.to(self.dtype))
        mean, log_variance = moments.float().chunk(2, dim=1)
        if noise_BZhw is not None:
            mean = mean + torch.exp(0.5 * log_variance) * noise_BZhw
        return self.config.scale_factor * (mean - self.config.shift_factor)

    def decode(self, latent_BZhw: Tensor) -> Tensor:
        """Images (B, C, h*downsample, w*downsample), float32, nominally in [-1, 1], unclamped."""
        z = latent_BZhw / self.config.scale_factor + self.config.shift_factor
        return self.decoder(z.to(self.dtype))
