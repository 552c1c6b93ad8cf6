"""The model from parts: folders of Qwen2 and SigLIP as transformers writes them, an autoencoder.

What they lack is copied or initialised; the report says where every group of tensors comes from.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import SiglipVisionConfig

from . import pretrained as files
from .autoencoder import VAE_PREFIX
from .bagel.bagel import Bagel
from .bagel.config import BagelConfig
from .bagel.modeling_utils import sin_cos_table
from .bagel.qwen2_navit import GEN
from .bagel.siglip_navit import VisionRope

TIED = "tie_word_embeddings"
DEFAULTS = {"layer_module": "Qwen2MoTDecoderLayer", "qk_norm": True, TIED: False}
"""What BagelConfig leaves open."""
LLM, VIT = "language_model.", "vit_model.vision_model."
PATCH = VIT + "embeddings.patch_embedding.weight"
NEW = rf"{GEN}|\.[qk]_norm\.|pos_embed$|\.rope\.|^(connector|time_embedder|vae2llm|llm2vae)\."
"""Tensors that no folder holds."""
SPARE = rf"{VIT}(head|text_model|logit_\w+)|position_embedding|position_ids|rotary_emb"
"""Tensors that a folder may hold in vain, as it may the last layers of its ViT."""


def open_parts(
    llm_path: Path,
    vit_path: Path,
    vae_path: Path,
    overrides: files.Json,
    seed: int,
    copy_init_moe: bool = True,
    headers_only: bool = False,
) -> tuple[Bagel, dict[str, Tensor], str]:
    """The model on the meta device, the tensors that fill it, and the report.

    `vae_path` is the folder of the autoencoder. `overrides` are of `pretrained.SETTINGS`. Equal
    seeds give equal tensors. Those of files are mapped, copies share memory; `headers_only`: see
    `pretrained.read_tensors`. Raises CheckpointError for what is missing or does not fit.
    """
    llm = _json(llm_path, "--llm_path", "qwen2")
    vit = _json(vit_path, "--vit_path", "siglip", "siglip_vision_model")
    vae_file = [vae_path / files.VAE_FILE]
    parts = (
        (llm_path, _read(llm_path, "--llm_path", LLM, headers_only)),
        (vit_path, _read(vit_path, "--vit_path", VIT, headers_only)),
        (vae_path, files.read_tensors(vae_file, VAE_PREFIX, headers_only)),
    )
    tensors = {name: tensor for _, part in parts for name, tensor in part.items()}
    origin = {name: f"from {folder}" for folder, part in parts for name in part}
    vae = files.vae_config(vae_path, files.shapes_of(tensors))
    config = files.make_config(llm, vit, vae, DEFAULTS | _own_side(vit, overrides) | overrides)
    with torch.device("meta"):
        model = Bagel(config)
    expected = files.shapes_of(model.state_dict())
    for name in [n for n in tensors if n not in expected and _is_spare(n, config)]:
        del tensors[name]
        origin[name] = f"NOT USED, {origin[name]}"
    if config.llm.tie_word_embeddings or (llm.get(TIED) and files.HEAD not in tensors):
        del expected[files.HEAD]
    new = [name for name in expected if name not in tensors and re.search(NEW, name)]
    found = {name: expected[name] for name in new} | files.shapes_of(tensors)
    files.require_fit(f"{llm_path} + {vit_path} + {vae_path}", expected, found)
    if files.HEAD not in expected:
        tensors[files.HEAD], origin[files.HEAD] = tensors[files.EMBEDDINGS], "from the embedding"
    generator = torch.Generator().manual_seed(seed)
    for name in new:
        if copy_init_moe and GEN in name:
            und = name.replace(GEN, "")
            tensors[name], origin[name] = tensors[und], "from the understanding expert"
        else:
            with tensors[files.EMBEDDINGS].device:
                tensors[name], origin[name] = _initial(model, name, expected[name], generator)
    return model, tensors, _report(origin, seed)


def _read(folder: Path, flag: str, prefix: str, headers_only: bool) -> dict[str, Tensor]:
    """Some ViTs have `vision_model.` before every name; their convolution becomes our linear."""
    names = files.weight_files(folder, "model", f"Check {flag}")
    found = files.read_tensors(names, "", headers_only)
    tensors = {prefix + name.removeprefix("vision_model."): t for name, t in found.items()}
    if PATCH in tensors and tensors[PATCH].dim() == 4:
        tensors[PATCH] = tensors[PATCH].permute(0, 2, 3, 1).flatten(1)
    return tensors


def _json(folder: Path, flag: str, *types: str) -> files.Json:
    content = files.read_json(folder / "config.json")
    if (kind := content.get("model_type")) not in types:
        raise files.CheckpointError(
            f"{flag}: {folder}/config.json is missing or not of {types[0]} (model_type={kind})"
        )
    return content.get("vision_config", content)


def _own_side(vit: files.Json, overrides: files.Json) -> files.Json:
    """A ViT's places are counted on the side of its own table."""
    name, config = "vit_max_num_patch_per_side", SiglipVisionConfig(**vit)
    side = config.image_size // config.patch_size
    if overrides.get(name, side) != side:
        raise files.CheckpointError(f"--{name} {overrides[name]}: that of --vit_path is {side}")
    return {name: side}


def _is_spare(name: str, config: BagelConfig) -> bool:
    layer = re.match(rf"{VIT}encoder\.layers\.(\d+)", name)
    cut = range(config.vit_layers, config.vit.num_hidden_layers if config.vit else 0)
    return int(layer[1]) in cut if layer else bool(re.search(SPARE, name))


def _initial(
    model: Bagel, name: str, shape: files.Shape, generator: torch.Generator
) -> tuple[Tensor, str]:
    """A tensor that no file has, as `Bagel.init_weights` would make it, and what it is."""
    if name in files.POSITION_TABLES:
        return sin_cos_table(math.isqrt(shape[0]), shape[1]), "computed"
    if ".rope." in name:
        rope = VisionRope(math.isqrt(shape[0]), 2 * shape[1])
        return rope.get_buffer(name.rpartition(".")[2]), "computed"
    if (std := model.initial_std(name)) is None:
        return torch.ones(shape), "NEW, ones"
    values = torch.empty(shape).normal_(std=std, generator=generator)
    return values, f"NEW, normal with deviation {std}" if std else "NEW, zeros"


def _report(origin: Mapping[str, str], seed: int) -> str:
    """Where whole parts come from; what is new or not used in more detail."""
    groups: Counter[tuple[str, str]] = Counter()
    for name, place in origin.items():
        group = name.partition(".")[0]
        if place.startswith("NEW"):
            group = re.sub(r"\.layers\.\d+", ".layers.*", name)
        elif place.startswith("NOT"):
            group = re.sub(rf"({VIT}(encoder\.layers\.\d+|head|text_model)).*", r"\1", name)
        groups[group, place] += 1
    lines = [f"  {group}: {count} tensors {place}" for (group, place), count in groups.items()]
    return "\n".join([f"model assembled from parts, new tensors with seed {seed}:", *lines])
