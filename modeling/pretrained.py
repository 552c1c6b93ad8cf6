"""Checkpoint folder <-> model: BAGEL's file layout, loaded strictly and reported.

A folder holds `ema.safetensors` and / or `model.safetensors` (or shards with an index),
`ae.safetensors`, `llm_config.json`, `vit_config.json` and tokenizer files; ours adds
`bagel_config.json`, `vae_config.json` and `manifest.json` (sha256 of every file, written last).
What a folder without our files leaves unsaid is read off the shapes of its tensors.
"""

import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen2Config, SiglipVisionConfig

from .autoencoder import AutoencoderConfig
from .bagel.bagel import Bagel
from .bagel.config import BagelConfig
from .bagel.modeling_utils import PositionEmbedding, sin_cos_table

Weights = Literal["ema", "model"]
Shape = tuple[int, ...]

VAE_PREFIX = "vae."
VAE_FILE = "ae.safetensors"
MANIFEST = "manifest.json"
PREPROCESSOR_FILE = "preprocessor_config.json"
"""The resize rules that a model was trained with."""
POSITION_TABLES = ("latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed")
"""The only tensors a file may lack: they are fixed and recomputed."""
SHARD_BYTES = 5 * 10**9

FLAGS = (
    (r"latent_pos_embed", "--max_latent_size"),
    (r"vit_pos_embed|position_emb|vit_model.*rope", "--vit_max_num_patch_per_side or --vit_rope"),
    (r"vit_model.*encoder\.layers\.", "--vit_select_layer (or num_hidden_layers of vit_config)"),
    (r"[qk]_norm", "--llm_qk_norm"),
    (r"_moe_gen", "--layer_module"),
    (r"vae2llm|llm2vae", "--latent_patch_size"),
    (r"^(vit_model|connector)", "--model_path: vit_config.json missing or of another ViT size?"),
    (r"^vae\.", "--model_path: vae_config.json missing or of another autoencoder?"),
    (r".", "--model_path: llm_config.json of another model size?"),
)
"""What to change when tensors of a name do not fit; the first match counts."""


class CheckpointError(ValueError):
    """A checkpoint folder that does not fit; the message names tensors, shapes and the flag."""


@dataclass(frozen=True)
class LoadReport:
    """What was loaded from where."""

    folder: str
    files: tuple[str, ...]
    weights: Weights
    tensors: int
    parameters: int
    share: float
    """Loaded share of the model's tensors; below 1 only by recomputed position tables."""
    recomputed: tuple[str, ...]

    def __str__(self) -> str:
        extra = f", recomputed {', '.join(self.recomputed)}" if self.recomputed else ""
        return (
            f"loaded {self.weights.upper()} weights from {self.folder} ({', '.join(self.files)}): "
            f"{self.tensors} tensors, {self.parameters:,} parameters, {self.share:.1%}{extra}"
        )


def weight_files(folder: Path, weights: Weights) -> list[Path]:
    """The file(s) of `weights`. Raises CheckpointError that lists what is there instead."""
    index = folder / f"{weights}.safetensors.index.json"
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = [folder / name for name in names]
    else:
        files = [folder / f"{weights}.safetensors"]
    missing = [f.name for f in files if not f.exists()]
    if missing:
        there = sorted(f.name for f in folder.glob("*")) if folder.is_dir() else "no such folder"
        raise CheckpointError(
            f"{folder}: {', '.join(missing)} not found; there is {there}. "
            f"--finetune_from_ema True reads ema.safetensors, False reads model.safetensors; "
            "neither stands in for the other"
        )
    return files


def tensor_shapes(files: Iterable[Path]) -> dict[str, Shape]:
    """Shapes from the headers alone."""
    shapes: dict[str, Shape] = {}
    for file in files:
        with _open(file) as archive:
            for name in archive.keys():  # noqa: SIM118 (an archive is no mapping)
                shapes[name] = tuple(archive.get_slice(name).get_shape())
    return shapes


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: unreadable: {error}") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise CheckpointError(f"{path}: no JSON: {error}") from error


def read_config(
    folder: Path, shapes: Mapping[str, Shape], overrides: Mapping[str, Any] | None = None
) -> BagelConfig:
    """The configuration of a folder: its JSON files, then what the tensors' shapes say.

    `overrides` (fields of BagelConfig, `qk_norm`, `layer_module`) win over both; a contradiction
    shows as a misfitting tensor when loading.
    """
    overrides = dict(overrides or {})
    llm = _json(folder / "llm_config.json")
    if not llm:
        raise CheckpointError(f"{folder}: llm_config.json not found")
    vae = _vae_config(folder, shapes)
    fields = {f.name for f in dataclasses.fields(BagelConfig)} - {"llm", "vit", "vae"}
    saved = _json(folder / "bagel_config.json")
    unknown = sorted(set(saved) - fields)
    if unknown:
        raise CheckpointError(f"{folder}/bagel_config.json: unknown keys {unknown}")
    inferred = _inferred(shapes, vae)
    llm_extra = {
        "qk_norm": any(".q_norm." in name for name in shapes),
        "layer_module": _layer_module(shapes),
    }
    has_weights = any(name.startswith("language_model.") for name in shapes)
    for key, value in llm_extra.items():
        if not has_weights and key not in llm and key not in overrides:
            raise CheckpointError(
                f"{folder}/llm_config.json lacks {key} and there are no weights that tell it: "
                "set --layer_module and --llm_qk_norm"
            )
        llm.setdefault(key, value)
        llm[key] = overrides.pop(key, llm[key])
    vit = _json(folder / "vit_config.json")
    return BagelConfig(
        llm=Qwen2Config(**llm),
        vit=SiglipVisionConfig(**vit) if vit else None,
        vae=vae,
        **(inferred | saved | overrides),
    )


def _layer_module(shapes: Mapping[str, Shape]) -> str:
    if any("q_proj_moe_gen" in name for name in shapes):
        return "Qwen2MoTDecoderLayer"
    return (
        "Qwen2MoEDecoderLayer" if any("moe_gen" in name for name in shapes) else "Qwen2DecoderLayer"
    )


def _inferred(shapes: Mapping[str, Shape], vae: AutoencoderConfig | None) -> dict[str, Any]:
    inferred: dict[str, Any] = {}
    tables = dict(
        zip(POSITION_TABLES, ("max_latent_size", "vit_max_num_patch_per_side"), strict=True)
    )
    for name, key in tables.items():
        if name in shapes:
            inferred[key] = round(shapes[name][0] ** 0.5)
    if any(name.startswith("vit_model.") for name in shapes):
        inferred["vit_rope"] = not any("position_embedding" in name for name in shapes)
    if vae is not None and "vae2llm.weight" in shapes:
        inferred["latent_patch_size"] = round((shapes["vae2llm.weight"][1] / vae.z_channels) ** 0.5)
    return inferred


def _vae_config(folder: Path, shapes: Mapping[str, Shape]) -> AutoencoderConfig | None:
    saved = _json(folder / "vae_config.json")
    known = {f.name for f in dataclasses.fields(AutoencoderConfig)}
    if saved:
        unknown = sorted(set(saved) - known - {"downsample", "resolution"})
        if unknown:
            raise CheckpointError(f"{folder}/vae_config.json: unknown keys {unknown}")
        return AutoencoderConfig(**{k: v for k, v in saved.items() if k in known})
    if f"{VAE_PREFIX}encoder.conv_in.weight" not in shapes:
        return None
    vae = {k.removeprefix(VAE_PREFIX): v for k, v in shapes.items() if k.startswith(VAE_PREFIX)}
    ch = vae["encoder.conv_in.weight"][0]
    widths = [
        vae[f"encoder.down.{i}.block.0.conv1.weight"][0]
        for i in range(
            sum(bool(re.fullmatch(r"encoder\.down\.\d+\.block\.0\.conv1\.weight", k)) for k in vae)
        )
    ]
    blocks = sum(bool(re.fullmatch(r"encoder\.down\.0\.block\.\d+\.conv1\.weight", k)) for k in vae)
    return AutoencoderConfig(
        in_channels=vae["encoder.conv_in.weight"][1],
        out_ch=vae["decoder.conv_out.weight"][0],
        ch=ch,
        ch_mult=tuple(width // ch for width in widths),
        num_res_blocks=blocks,
        z_channels=vae["decoder.conv_in.weight"][1],
    )


def load_pretrained(
    folder: str | Path,
    weights: Weights = "ema",
    *,
    overrides: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    verify: bool = True,
    autoencoder: bool = True,
) -> tuple[Bagel, LoadReport]:
    """Builds the model on the meta device and loads every tensor of a checkpoint folder.

    `dtype` casts the model (None keeps the file's); the autoencoder keeps its own, because pixels
    need float32. `verify` checks the sha256 of a folder that has a manifest. Without `autoencoder`
    it is neither built nor loaded. Raises CheckpointError for a missing, unexpected or misshapen
    tensor, a missing file or a wrong hash.
    """
    folder = Path(folder)
    files = weight_files(folder, weights)
    vae_file = folder / VAE_FILE
    shapes = tensor_shapes(files)
    if autoencoder and (folder / "vae_config.json").exists() and not vae_file.exists():
        raise CheckpointError(
            f"{folder}: {VAE_FILE} not found, but vae_config.json is there (check --model_path)"
        )
    vae_files = [vae_file] if autoencoder and vae_file.exists() else []
    if vae_files:
        shapes |= {VAE_PREFIX + k: v for k, v in tensor_shapes([vae_file]).items()}
    if verify and (folder / MANIFEST).exists():
        configs = sorted(folder.glob("*_config.json"))
        verify_manifest(folder, [f.name for f in [*files, *vae_files, *configs]])
    config = read_config(folder, shapes, overrides)
    with torch.device("meta"):
        model = Bagel(config, autoencoder=autoencoder)
    expected = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    recomputed = _check_names(folder, expected, shapes, config)
    sources = [(f, "") for f in files] + [(f, VAE_PREFIX) for f in vae_files]
    tensors = _read_tensors(sources, dtype, device)
    _fill_gaps(model, tensors, recomputed, device)
    model.load_state_dict(tensors, strict=True, assign=True)
    if config.llm.tie_word_embeddings:
        model.language_model.lm_head.weight = model.language_model.model.embed_tokens.weight
    if hasattr(model, "vae"):
        model.vae.requires_grad_(False)
    report = LoadReport(
        folder=str(folder),
        files=tuple(f.name for f, _ in sources),
        weights=weights,
        tensors=len(expected) - len(recomputed),
        parameters=sum(p.numel() for p in model.parameters()),
        share=1 - len(recomputed) / len(expected),
        recomputed=tuple(recomputed),
    )
    return model, report


def load_architecture(folder: str | Path, overrides: Mapping[str, Any] | None = None) -> Bagel:
    """A model on the CPU with uninitialised weights in a folder's sizes; the autoencoder is loaded.

    The sizes come from the folder's JSON files alone: there need not be any weights of the model.
    """
    folder = Path(folder)
    vae_shapes = {VAE_PREFIX + k: v for k, v in tensor_shapes([folder / VAE_FILE]).items()}
    model = Bagel(read_config(folder, vae_shapes, overrides))
    model.vae.load_state_dict(_read_tensors([(folder / VAE_FILE, "")], None, "cpu"))
    return model


def _check_names(
    folder: Path, expected: Mapping[str, Shape], found: Mapping[str, Shape], config: BagelConfig
) -> list[str]:
    """Raises for everything that does not fit; returns the tables to recompute."""
    problems = []
    absent = [name for name in expected if name not in found]
    tied = {"language_model.lm_head.weight"} if config.llm.tie_word_embeddings else set()
    allowed = {*POSITION_TABLES, *tied}
    problems += [f"missing {n} {expected[n]}{_hint(n)}" for n in absent if n not in allowed]
    problems += [f"unexpected {n} {s}{_hint(n)}" for n, s in found.items() if n not in expected]
    problems += [
        f"misshapen {n}: checkpoint {found[n]}, model {shape}{_hint(n)}"
        for n, shape in expected.items()
        if n in found and found[n] != shape
    ]
    if problems:
        shown = "\n  ".join(problems[:12])
        more = f"\n  and {len(problems) - 12} more" if len(problems) > 12 else ""
        fitting = sum(found.get(n) == s for n, s in expected.items())
        raise CheckpointError(
            f"{folder}: the checkpoint does not fit the model "
            f"({fitting} of {len(expected)} tensors fit):\n  {shown}{more}"
        )
    return [name for name in absent if name in POSITION_TABLES]


def _hint(name: str) -> str:
    return next(f" [check {flag}]" for pattern, flag in FLAGS if re.search(pattern, name))


def _read_tensors(
    sources: list[tuple[Path, str]], dtype: torch.dtype | None, device: torch.device | str
) -> dict[str, Tensor]:
    tensors = {}
    for file, prefix in sources:
        with _open(file) as archive:
            for name in archive.keys():  # noqa: SIM118
                tensor = archive.get_tensor(name)
                cast = dtype if not prefix else None
                tensors[prefix + name] = tensor.to(device=device, dtype=cast or tensor.dtype)
    return tensors


def _fill_gaps(
    model: Bagel, tensors: dict[str, Tensor], tables: list[str], device: torch.device | str
) -> None:
    dtype = tensors["language_model.model.embed_tokens.weight"].dtype
    for name in tables:
        module = model.get_submodule(name.rsplit(".", 1)[0])
        assert isinstance(module, PositionEmbedding)
        table = sin_cos_table(module.side, model.config.llm.hidden_size)
        tensors[name] = table.to(device=device, dtype=dtype)
    if model.config.llm.tie_word_embeddings:
        tensors.setdefault(
            "language_model.lm_head.weight", tensors["language_model.model.embed_tokens.weight"]
        )


def save_pretrained(
    model: Bagel,
    folder: str | Path,
    states: Mapping[Weights, Mapping[str, Tensor]],
    *,
    tokenizer_from: str | Path | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes a checkpoint folder that `load_pretrained` reads, the manifest last.

    `states` maps `ema` and / or `model` to a state dict of the model (entries of the autoencoder
    are ignored: it is written from `model`). `tokenizer_from` is a folder whose tokenizer files are
    copied. `dtype` casts floating tensors.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for weights, state in states.items():
        for stale in ("", ".index.json"):
            (folder / f"{weights}.safetensors{stale}").unlink(missing_ok=True)
        for shard in folder.glob(f"{weights}-*-of-*.safetensors"):
            shard.unlink()
        own = {k: v for k, v in state.items() if not k.startswith(VAE_PREFIX)}
        if model.config.llm.tie_word_embeddings:
            own.pop("language_model.lm_head.weight", None)
        _save_sharded(folder, weights, {k: v.to(dtype or v.dtype) for k, v in own.items()})
    if hasattr(model, "vae"):
        save_safetensors(model.vae.state_dict(), folder / VAE_FILE)
    write_config(model.config, folder)
    if tokenizer_from is not None:
        for name in TOKENIZER_FILES:
            if (source := Path(tokenizer_from) / name).exists() and source.parent != folder:
                shutil.copyfile(source, folder / name)
    write_manifest(folder)


TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    PREPROCESSOR_FILE,
)


def save_safetensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """One safetensors file with the metadata that `transformers` insists on."""
    save_file(
        {k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path, {"format": "pt"}
    )


def _save_sharded(folder: Path, stem: str, tensors: dict[str, Tensor]) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        save_safetensors(tensors, folder / f"{stem}.safetensors")
        return
    names = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        save_safetensors(shard, folder / name)
    weight_map = {k: n for n, shard in zip(names, shards, strict=True) for k in shard}
    index = {
        "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
        "weight_map": weight_map,
    }
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_config(config: BagelConfig, folder: Path) -> None:
    """`llm_config.json`, `vit_config.json`, `vae_config.json` and `bagel_config.json`."""
    own = {
        f.name: getattr(config, f.name)
        for f in dataclasses.fields(config)
        if f.name not in ("llm", "vit", "vae") and f.metadata.get("saved", True)
    }
    files: dict[str, dict[str, Any]] = {"bagel": own, "llm": config.llm.to_dict()}
    if config.vit is not None:
        files["vit"] = config.vit.to_dict()
    if config.vae is not None:
        files["vae"] = dataclasses.asdict(config.vae) | {"downsample": config.vae.downsample}
    for name, content in files.items():
        (folder / f"{name}_config.json").write_text(json.dumps(content, indent=2) + "\n")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path) -> None:
    """Hashes of all files; its presence says that the folder is complete."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.name != MANIFEST)
    manifest = {p.name: sha256(p) for p in files}
    temporary = folder / (MANIFEST + ".tmp")
    temporary.write_text(json.dumps(manifest, indent=2) + "\n")
    temporary.rename(folder / MANIFEST)


def verify_manifest(folder: Path, names: Iterable[str] | None = None) -> None:
    """Raises CheckpointError for a file that is missing or whose hash differs.

    `names` limits the check to those files (all files of the manifest by default).
    """
    if not (folder / MANIFEST).exists():
        raise CheckpointError(f"{folder}: {MANIFEST} not found: the folder is incomplete")
    manifest = _json(folder / MANIFEST)
    for name in names if names is not None else manifest:
        path, expected = folder / name, manifest.get(name)
        if expected is None:
            continue
        if not path.exists():
            raise CheckpointError(f"{path} is named in {MANIFEST} and missing")
        found = sha256(path)
        if found != expected:
            raise CheckpointError(f"{path} is damaged: sha256 {found}, {MANIFEST} says {expected}")
