"""What most tests start from: a tiny model, packs, a checkpoint folder, a data set, a run."""

import dataclasses
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor
from transformers import Qwen2Config, SiglipVisionConfig

from data.loader import PackedLoader
from data.packer import Packer, PackerConfig, Sample, TextSegment, VaeSegment, VitSegment
from modeling.autoencoder import AutoencoderConfig
from modeling.bagel.bagel import Bagel
from modeling.bagel.config import BagelConfig
from modeling.bagel.context import Context, NextImages
from modeling.batch import PackedBatch, SpecialTokens
from modeling.flow import CONDITIONING, logit_from_time
from modeling.pretrained import save_pretrained
from scripts.tiny.tokenizer import write_tokenizer
from train.arguments import RunArguments, parse_arguments

FIXTURES = Path(__file__).parent / "fixtures"
TOKENS = SpecialTokens(bos=60, eos=61, image_start=62, image_end=63)
LLM = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_theta": 1000.0,
    "qk_norm": True,
    "layer_module": "Qwen2MoTDecoderLayer",
}
VIT = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 112,
    "patch_size": 14,
}
VAE = {"ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "z_channels": 4}


def tiny_config(llm: dict[str, Any] | None = None, **changes: Any) -> BagelConfig:
    """A latent token is 4 x 4 pixels, a ViT patch 14 x 14; `llm` changes fields of LLM."""
    fields = {
        "llm": Qwen2Config(**(LLM | (llm or {}))),
        "vit": SiglipVisionConfig(**VIT),
        "vae": AutoencoderConfig(**VAE),
        "max_latent_size": 8,
        "vit_max_num_patch_per_side": 8,
        "timestep_shift": 1.5,
    }
    return BagelConfig(**(fields | changes))


def tiny_model(config: BagelConfig | None = None, seed: int = 0) -> Bagel:
    """Random weights everywhere: no zero projection, no norm of ones, experts that differ."""
    torch.manual_seed(seed)
    model = Bagel(config or tiny_config())
    model.init_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn(parameter.shape)
    return model


def image_pm1(height: int, width: int, seed: int) -> Tensor:
    """A smooth random image (3, H, W) in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 4, 4, generator=generator) * 2 - 1
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0]


def restoration(
    name: str,
    size: tuple[int, int] = (16, 24),
    vit_size: tuple[int, int] = (28, 42),
    prompt: tuple[int, ...] = (1, 2, 3),
    answer: tuple[int, ...] | None = (4, 5),
) -> Sample:
    """VAE and ViT image and prompt as conditions, an answer, the clean image as target."""
    seed = zlib.crc32(name.encode())
    segments = [
        VaeSegment(image_pm1=image_pm1(*size, seed), droppable=True),
        VitSegment(image_pm1=image_pm1(*vit_size, seed), droppable=True),
        TextSegment(ids=list(prompt), droppable=True),
    ]
    if answer is not None:
        segments.append(TextSegment(ids=list(answer), answer=True))
    segments.append(VaeSegment(image_pm1=image_pm1(*size, seed + 1), target=True))
    return Sample(name, segments)


MIXED_SAMPLES = (
    restoration("a", size=(16, 24)),
    restoration("b", size=(24, 16), answer=None),
    restoration("c", size=(16, 24), prompt=(7,)),
    restoration("d", size=(12, 20)),
    restoration("e", size=(20, 20)),
)
"""Several sizes, with and without an answer."""
MIXED_TIMES = {"a": 0.1, "b": 0.29, "c": 0.02, "d": 0.15, "e": 0.8}
"""Times of their targets, within and beyond the gates of the tests."""


def packer_config(config: BagelConfig, **changes: Any) -> PackerConfig:
    """The model's sizes, without dropout unless asked for."""
    dropout = {f"{kind}_cond_dropout_prob": 0.0 for kind in ("text", "vae", "vit")}
    sizes = {
        "latent_stride": config.latent_stride,
        "max_latent_size": config.max_latent_size,
        "vit_patch_size": config.vit.patch_size,
        "vit_max_num_patch_per_side": config.vit_max_num_patch_per_side,
        "interpolate_pos": config.interpolate_pos,
        "timestep_shift": config.timestep_shift,
    }
    return PackerConfig(**(dropout | sizes | changes))


def pack(
    config: BagelConfig, *samples: Sample, times: dict[str, float] | None = None, **changes: Any
) -> PackedBatch:
    """Samples with randomness of their own; `times` (by sample name) replaces the drawn ones."""
    packer = Packer(packer_config(config, **changes), TOKENS)
    for sample in samples:
        packer.add(sample, torch.Generator().manual_seed(zlib.crc32(sample.name.encode())))
    batch = packer.build()
    return batch if times is None else with_times(batch, times, config.timestep_shift)


def with_times(batch: PackedBatch, times: dict[str, float], shift: float) -> PackedBatch:
    logits = tuple(
        logit_from_time(times[name], shift) if target else CONDITIONING
        for name, target in zip(batch.vae.names, batch.vae.is_target, strict=True)
    )
    return dataclasses.replace(batch, vae=dataclasses.replace(batch.vae, time_logits=logits))


def write_checkpoint(folder: Path, **changes: Any) -> Bagel:
    """A folder with tokenizer, `model.safetensors` and a different `ema.safetensors`."""
    write_tokenizer(["Remove the noise.", "Mild noise.", "Strong noise."], folder)
    model = tiny_model(tiny_config({"vocab_size": 512}, **changes))
    ema = {k: 0.5 * v for k, v in model.state_dict().items() if not k.startswith("vae.")}
    states = {"model": model.state_dict(), "ema": ema}
    save_pretrained(model, folder, states, tokenizer_from=folder)
    return model


RULES = {
    "image_transform_args": {"image_stride": 4, "max_image_size": 24, "min_image_size": 16},
    "vit_image_transform_args": {"image_stride": 14, "max_image_size": 42, "min_image_size": 28},
}


def write_pairs(folder: Path, count: int, answers: bool = True) -> Path:
    """`count` pairs of noisy and clean PNG images of several sizes; returns the JSONL file."""
    rng = np.random.default_rng(len(folder.name))
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(count):
        height, width = ((16, 16), (16, 24), (20, 16))[i % 3]
        clean = np.round(127 + 90 * np.sin(np.add.outer(np.arange(height), np.arange(width)) / 5))
        images = {"clean": clean, "input": clean + rng.normal(0, 8, clean.shape)}
        record: dict[str, Any] = {"message": [{"from": "human", "value": "<image>\nRemove it."}]}
        for kind, field in (("input", "input_img"), ("clean", "output_img")):
            path = f"images/{i}_{kind}.png"
            Image.fromarray(images[kind].clip(0, 255).astype(np.uint8)).save(folder / path)
            record[field] = [{"path": path, "height": height, "width": width}]
        if answers:
            record["message"].append({"from": "gpt", "value": ("Mild.", "Strong noise.")[i % 2]})
        lines.append(json.dumps(record) + "\n")
    (folder / "train.jsonl").write_text("".join(lines))
    return folder / "train.jsonl"


def write_mixture(path: Path, *folders: Path, **changes: Any) -> Path:
    """A mixture of the data sets in `folders`; `changes` are keys of its one group."""
    datasets = [
        {"name": f.name, "jsonl_path": str(f / "train.jsonl"), "data_dir": str(f)} for f in folders
    ]
    path.write_text(yaml.safe_dump({"restoration": RULES | {"datasets": datasets} | changes}))
    return path


def run_arguments(checkpoint: Path, mixture: Path, run: Path, **changes: Any) -> RunArguments:
    """Arguments of a short run on the CPU; `changes` are arguments by name."""
    values = {
        "model_path": checkpoint,
        "dataset_config_file": mixture,
        "checkpoint_dir": run,
        "device": "cpu",
        "expected_num_tokens": 100,
        "max_num_tokens": 300,
        "max_num_tokens_per_sample": 200,
        "num_workers": 0,
        "warmup_steps": 2,
        "total_steps": 4,
        "lr": 1e-3,
        "ema": 0.9,
        "log_every": 1,
    }
    return parse_arguments([f"--{name}={value}" for name, value in (values | changes).items()])


@torch.no_grad()
def next_velocity(context: Context, x: Tensor, t: float, ids: Tensor) -> Tensor:
    """(L, D) velocity of the image x (L, D) at time t as the next segment of a context."""
    latents = context.model.embed_latents(x, x.new_full((len(x),), t), ids)
    return NextImages([(context, len(ids))]).velocities(latents)[0]


def position(packs: PackedLoader) -> int:
    """Samples of the stream that were packed or dropped, on all ranks."""
    return sum(packs.planner.draws) - len(packs.planner.buffer)
