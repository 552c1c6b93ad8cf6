"""Checkpoint folder <-> model: BAGEL's file layout, loaded strictly and reported.

A folder holds `ema.safetensors` and / or `model.safetensors` (or shards with an index),
`ae.safetensors`, `llm_config.json`, `vit_config.json` and tokenizer files; ours adds
`bagel_config.json`, `vae_config.json` and `manifest.json` (sha256 of every file, written last).
What a folder without our files leaves unsaid is read off the shapes of its tensors.
"""

import dataclasses
import hashlib
import json
import math
import re
import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Qwen2Config, SiglipVisionConfig

from .autoencoder import VAE_PREFIX, AutoencoderConfig
from .bagel.bagel import Bagel
from .bagel.config import BagelConfig
from .bagel.modeling_utils import sin_cos_table

Weights = Literal["ema", "model"]
Shape = tuple[int, ...]
Json = dict[str, Any]

VAE_FILE = "ae.safetensors"
MANIFEST = "manifest.json"
PREPROCESSOR_FILE = "preprocessor_config.json"
"""The resize rules that a model was trained with."""
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
POSITION_TABLES = {
    "latent_pos_embed.pos_embed": "max_latent_size",
    "vit_pos_embed.pos_embed": "vit_max_num_patch_per_side",
}
"""Table -> its side; the only tensors a file may lack, because they are fixed and recomputed."""
EMBEDDINGS = "language_model.model.embed_tokens.weight"
HEAD = "language_model.lm_head.weight"
SHARD_BYTES = 5 * 10**9
"""Largest size of a weight file, unless a single tensor is larger."""
EMA_HINT = (
    "training reads model.safetensors, or by --finetune_from_ema True ema.safetensors; inference "
    "the latter, or by --use_model_checkpoint the former; neither stands in for the other"
)
LLM_FIELDS = ("qk_norm", "layer_module")
"""Ours in `llm_config.json`; released folders lack them."""
MUST_AGREE = ("connector_act", "interpolate_pos")
"""Settings that no tensor would betray."""
SETTINGS = {*LLM_FIELDS, "tie_word_embeddings", "vit_patch_size"} | (
    {f.name for f in dataclasses.fields(BagelConfig)} - {"llm", "vit", "vae"}
)
"""What `bagel_config.json` may hold and overrides may set."""

FLAGS = (
    (r"lm_head", "--tie_word_embeddings"),
    (r"patch_embedding", "--vit_patch_size"),
    (r"latent_pos_embed", "--max_latent_size"),
    (r"vit_pos_embed|position_emb|vit_model.*rope", "--vit_max_num_patch_per_side or --vit_rope"),
    (r"vit_model.*encoder\.layers\.", "--vit_select_layer (or num_hidden_layers of vit_config)"),
    (r"[qk]_norm", "--llm_qk_norm"),
    (r"_moe_gen", "--layer_module"),
    (r"vae2llm|llm2vae", "--latent_patch_size"),
    (r"^(vit_model|connector)", "--model_path (or --vit_path): configuration of another ViT?"),
    (r"^vae\.", "--model_path: vae_config.json missing or of another autoencoder?"),
    (r".", "--model_path (or --llm_path): configuration of another model size?"),
)
"""What to change when tensors of a name do not fit; the first match counts."""


class CheckpointError(ValueError):
    """A checkpoint folder that does not fit; the message names tensors, shapes and the flag."""


class DamagedError(CheckpointError):
    """A file that is missing, cut off or changed since it was written."""


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


def read_json(path: Path, known: Iterable[str] = ()) -> dict[str, Any]:
    """The content, empty without the file. With `known` every other key raises."""
    try:
        content = json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise DamagedError(f"{path}: no JSON: {error}") from error
    if not isinstance(content, dict):
        raise DamagedError(f"{path}: a JSON object is expected, not {type(content).__name__}")
    if unknown := sorted(set(content) - set(known or content)):
        raise CheckpointError(f"{path}: unknown keys {unknown}")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def weight_files(folder: Path, weights: str, hint: str = EMA_HINT) -> list[Path]:
    """The file(s) of `weights`. Raises CheckpointError that lists what is there instead."""
    index = read_json(folder / f"{weights}.safetensors.index.json")
    names = set(index["weight_map"].values()) if index else {f"{weights}.safetensors"}
    if missing := sorted(name for name in names if not (folder / name).exists()):
        there = sorted(f.name for f in folder.glob("*")) if folder.is_dir() else "no such folder"
        raise CheckpointError(f"{folder}: {', '.join(missing)} not found; there is {there}. {hint}")
    return sorted(folder / name for name in names)


def read_tensors(
    files: Iterable[Path], prefix: str = "", headers_only: bool = False
) -> dict[str, Tensor]:
    """Tensors of all files in the files' dtypes, `prefix` before every name.

    The files are mapped: nothing is read before it is used. With `headers_only` the tensors are
    float32 on the meta device: mapping a file may be refused where memory is small. Raises
    CheckpointError that names the file which is missing or damaged.
    """
    read = _read_header if headers_only else load_file
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors |= {prefix + name: tensor for name, tensor in read(file).items()}
        except (OSError, SafetensorError) as error:
            raise DamagedError(f"{file}: unreadable (is its folder whole?): {error}") from error
    return tensors


def _read_header(file: Path) -> dict[str, Tensor]:
    with safe_open(file, framework="numpy") as opened:
        shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def read_config(
    folder: Path, shapes: Mapping[str, Shape], overrides: Mapping[str, Any] | None = None
) -> BagelConfig:
    """The configuration of a folder: its JSON files, then what the tensors' shapes say.

    `overrides` (of SETTINGS) win over both; a contradiction shows as a misfitting tensor when
    loading.
    """
    llm, vit = read_json(folder / "llm_config.json"), read_json(folder / "vit_config.json")
    if not llm:
        raise CheckpointError(f"{folder}: llm_config.json not found")
    vae = vae_config(folder, shapes)
    saved = read_json(folder / "bagel_config.json", SETTINGS)
    stated = {key: llm[key] for key in LLM_FIELDS if key in llm}
    for key in MUST_AGREE:
        if overrides and key in overrides and saved.get(key, overrides[key]) != overrides[key]:
            raise CheckpointError(
                f"{folder}/bagel_config.json: {key} is {saved[key]!r}, not {overrides[key]!r} "
                f"[check --{key}]"
            )
    settings = _inferred(shapes, vae) | stated | saved | dict(overrides or {})
    if absent := [key for key in LLM_FIELDS if key not in settings]:
        raise CheckpointError(
            f"{folder}/llm_config.json lacks {', '.join(absent)} and there are no weights that "
            "tell it: set --layer_module and --llm_qk_norm"
        )
    return make_config(llm, vit, vae, settings)


def make_config(llm: Json, vit: Json, vae: AutoencoderConfig | None, settings: Json) -> BagelConfig:
    """Of Qwen2's and SigLIP's JSON (maybe empty) and `settings`, which win over both."""
    own = dict(settings)
    llm = llm | {k: own.pop(k) for k in (*LLM_FIELDS, "tie_word_embeddings") if k in own}
    patch = own.pop("vit_patch_size", None)
    vit_config = SiglipVisionConfig(**vit | ({"patch_size": patch} if patch else {}))
    return BagelConfig(llm=Qwen2Config(**llm), vit=vit_config if vit else None, vae=vae, **own)


def _inferred(shapes: Mapping[str, Shape], vae: AutoencoderConfig | None) -> dict[str, Any]:
    """What names and shapes of tensors tell of the configuration."""
    names = "\n".join(shapes)
    inferred: dict[str, Any] = {}
    if "language_model." in names:
        shared = "Qwen2MoEDecoderLayer" if "moe_gen" in names else "Qwen2DecoderLayer"
        inferred["layer_module"] = "Qwen2MoTDecoderLayer" if "q_proj_moe_gen" in names else shared
        inferred["qk_norm"] = ".q_norm." in names
    if "vit_model." in names:
        inferred["vit_rope"] = "position_embedding" not in names
    for table, side in POSITION_TABLES.items():
        if table in shapes:
            inferred[side] = math.isqrt(shapes[table][0])
    if vae is not None and "vae2llm.weight" in shapes:
        inferred["latent_patch_size"] = math.isqrt(shapes["vae2llm.weight"][1] // vae.z_channels)
    return inferred


def vae_config(folder: Path, shapes: Mapping[str, Shape]) -> AutoencoderConfig | None:
    fields = {f.name for f in dataclasses.fields(AutoencoderConfig)}
    saved = read_json(folder / "vae_config.json", fields | {"downsample", "resolution"})
    if saved:
        return AutoencoderConfig(**{k: v for k, v in saved.items() if k in fields})
    vae = {k.removeprefix(VAE_PREFIX): v for k, v in shapes.items() if k.startswith(VAE_PREFIX)}
    if not vae:
        return None

    def widths(pattern: str) -> list[int]:
        """Output channels of the convolutions of those names."""
        return [shape[0] for name, shape in sorted(vae.items()) if re.fullmatch(pattern, name)]

    ch, in_channels = vae["encoder.conv_in.weight"][:2]
    levels = widths(r"encoder\.down\.\d+\.block\.0\.conv1\.weight")
    return AutoencoderConfig(
        in_channels=in_channels,
        out_ch=vae["decoder.conv_out.weight"][0],
        ch=ch,
        ch_mult=tuple(width // ch for width in levels),
        num_res_blocks=len(widths(r"encoder\.down\.0\.block\.\d+\.conv1\.weight")),
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
    """The model of a checkpoint folder with all its tensors, see `open_pretrained`.

    `dtype` casts the model (None keeps the file's); the autoencoder keeps its own, because pixels
    need float32.
    """
    model, tensors, report = open_pretrained(
        folder, weights, overrides=overrides, verify=verify, autoencoder=autoencoder
    )
    for name, tensor in tensors.items():
        tensors[name] = tensor.to(device, None if name.startswith(VAE_PREFIX) else dtype)
    if model.config.llm.tie_word_embeddings:
        # The same parameter under both names stays one when it is assigned.
        tensors[EMBEDDINGS] = tensors[HEAD] = nn.Parameter(tensors[EMBEDDINGS])
    model.load_state_dict(tensors, strict=True, assign=True)
    return model, report


def open_pretrained(
    folder: str | Path,
    weights: Weights = "ema",
    *,
    overrides: Mapping[str, Any] | None = None,
    verify: bool = True,
    autoencoder: bool = True,
    headers_only: bool = False,
) -> tuple[Bagel, dict[str, Tensor], LoadReport]:
    """The model on the meta device and the tensors that fill it, mapped: not read before use.

    `verify` checks the sha256 of a folder that has a manifest. Without `autoencoder` it is neither
    built nor loaded. `headers_only`: see `read_tensors`. Raises CheckpointError for a missing,
    unexpected or misshapen tensor, a missing file or a wrong hash.
    """
    folder = Path(folder)
    files = weight_files(folder, weights)
    has_vae = (folder / VAE_FILE).exists() or (folder / "vae_config.json").exists()
    vae_files = [folder / VAE_FILE] if autoencoder and has_vae else []
    if verify and (folder / MANIFEST).exists():
        read = [*files, *vae_files, *folder.glob("*_config.json")]
        verify_manifest(folder, [f.name for f in read])
    tensors = read_tensors(files, "", headers_only)
    tensors |= read_tensors(vae_files, VAE_PREFIX, headers_only)
    config = read_config(folder, shapes_of(tensors), overrides)
    with torch.device("meta"):
        model = Bagel(config, autoencoder=autoencoder)
    expected = shapes_of(model.state_dict())
    recomputed = tuple(n for n in POSITION_TABLES if n in expected and n not in tensors)
    if tied := config.llm.tie_word_embeddings:
        del expected[HEAD]  # which would be dropped without a word
    require_fit(folder, expected, {n: expected[n] for n in recomputed} | shapes_of(tensors))
    for name in recomputed:
        rows, channels = expected[name]
        tensors[name] = sin_cos_table(math.isqrt(rows), channels).to(tensors[EMBEDDINGS])
    if tied:
        tensors[HEAD] = tensors[EMBEDDINGS]
    return (
        model,
        tensors,
        LoadReport(
            folder=str(folder),
            files=tuple(f.name for f in [*files, *vae_files]),
            weights=weights,
            tensors=len(expected) - len(recomputed),
            parameters=sum(p.numel() for p in model.parameters()),
            share=1 - len(recomputed) / len(expected),
            recomputed=recomputed,
        ),
    )


def load_architecture(folder: str | Path, overrides: Mapping[str, Any] | None = None) -> Bagel:
    """A model on the CPU with uninitialised weights in a folder's sizes; the autoencoder is loaded.

    The sizes come from the folder's JSON files alone: there need not be any weights of the model.
    """
    vae = read_tensors([Path(folder) / VAE_FILE])
    shapes = {VAE_PREFIX + name: shape for name, shape in shapes_of(vae).items()}
    model = Bagel(read_config(Path(folder), shapes, overrides))
    model.vae.load_state_dict(vae, strict=True, assign=True)
    return model


def require_fit(
    folder: Path | str, expected: Mapping[str, Shape], found: Mapping[str, Shape]
) -> None:
    """Raises CheckpointError that names tensors which differ, each with what to change."""
    problems = {n: f"missing {n} {s}" for n, s in expected.items() if n not in found}
    problems |= {n: f"unexpected {n} {s}" for n, s in found.items() if n not in expected}
    problems |= {
        n: f"misshapen {n}: checkpoint {found[n]}, model {s}"
        for n, s in expected.items()
        if found.get(n, s) != s
    }
    if not problems:
        return
    lines = [
        f"{problem} [check {next(flag for part, flag in FLAGS if re.search(part, name))}]"
        for name, problem in problems.items()
    ]
    if len(lines) > 12:
        lines[12:] = [f"and {len(lines) - 12} more"]
    fitting = len(expected.keys() - problems)
    raise CheckpointError(
        f"{folder}: the checkpoint does not fit the model "
        f"({fitting} of {len(expected)} tensors fit):\n  " + "\n  ".join(lines)
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
        kept = {name: state[name] for name in saved_names(model.config, state)}
        save_tensors(folder, weights, {k: v.to(dtype or v.dtype) for k, v in kept.items()})
    save_settings(model, folder, tokenizer_from)
    write_manifest(folder)


def saved_names(config: BagelConfig, names: Iterable[str]) -> list[str]:
    """Of a state dict's names those in weight files: no autoencoder, a tied head once."""
    left_out = (VAE_PREFIX, HEAD) if config.llm.tie_word_embeddings else VAE_PREFIX
    return [name for name in names if not name.startswith(left_out)]


def save_settings(model: Bagel, folder: Path, tokenizer_from: str | Path | None = None) -> None:
    """Writes all of a checkpoint folder but weights and manifest: the autoencoder, the sizes, and
    the tokenizer files of another folder."""
    config = model.config
    if hasattr(model, "vae"):
        vae = {name: tensor.contiguous() for name, tensor in model.vae.state_dict().items()}
        save_file(vae, folder / VAE_FILE, {"format": "pt"})
    own = {
        f.name: getattr(config, f.name)
        for f in dataclasses.fields(config)
        if f.name in SETTINGS and f.metadata.get("saved", True)
    }
    write_json(folder / "bagel_config.json", own)
    write_json(folder / "llm_config.json", config.llm.to_dict())
    if config.vit is not None:
        write_json(folder / "vit_config.json", config.vit.to_dict())
    if config.vae is not None:
        sizes = dataclasses.asdict(config.vae) | {"downsample": config.vae.downsample}
        write_json(folder / "vae_config.json", sizes)
    if tokenizer_from is not None:
        for name in TOKENIZER_FILES:
            if (source := Path(tokenizer_from) / name).exists() and source.parent != folder:
                shutil.copyfile(source, folder / name)


def file_plan(stem: str, sizes: Mapping[str, int]) -> dict[str, list[str]]:
    """File -> its tensors, by their sizes in bytes: one file, or numbered ones of `SHARD_BYTES`."""
    parts: list[list[str]] = [[]]
    room = SHARD_BYTES
    for name, size in sizes.items():
        if size > room and parts[-1]:
            parts.append([])
            room = SHARD_BYTES
        parts[-1].append(name)
        room -= size
    if len(parts) == 1:
        return {f"{stem}.safetensors": parts[0]}
    return {f"{stem}-{i:05d}-of-{len(parts):05d}.safetensors": p for i, p in enumerate(parts, 1)}


def save_tensors(folder: Path, stem: str, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors as `file_plan` says, with an index if they are in several files."""
    for old in folder.iterdir():
        if re.fullmatch(rf"{stem}(-\d+-of-\d+)?\.safetensors(\.index\.json)?", old.name):
            old.unlink()
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    plan = file_plan(stem, sizes)
    for file, names in plan.items():
        save_file({n: tensors[n].contiguous() for n in names}, folder / file, {"format": "pt"})
    write_index(folder, stem, plan, sum(sizes.values()))


def write_index(folder: Path, stem: str, plan: Mapping[str, list[str]], total_size: int) -> None:
    """Says which file holds which tensor; nothing for a single file. `total_size` in bytes."""
    if len(plan) > 1:
        weight_map = {name: file for file, names in plan.items() for name in names}
        content = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        write_json(folder / f"{stem}.safetensors.index.json", content)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, hashes: Mapping[str, str] | None = None) -> None:
    """Hashes of all files (`hashes` are those known already); its presence says that the folder is
    complete."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.name != MANIFEST)
    known = dict(hashes or {})
    temporary = folder / (MANIFEST + ".tmp")
    write_json(temporary, {p.name: known.get(p.name) or sha256(p) for p in files})
    temporary.rename(folder / MANIFEST)


def verify_manifest(folder: Path, names: Collection[str] = ()) -> None:
    """Raises DamagedError for a file that is missing or whose hash differs.

    `names` limits the check to those files; without it every file of the manifest is checked.
    """
    if not (folder / MANIFEST).exists():
        raise DamagedError(f"{folder}: {MANIFEST} not found: the folder is incomplete")
    for name, expected in read_json(folder / MANIFEST).items():
        path = folder / name
        if names and name not in names:
            continue
        if not path.exists():
            raise DamagedError(f"{path} is named in {MANIFEST} and missing")
        if (found := sha256(path)) != expected:
            raise DamagedError(f"{path} is damaged: sha256 {found}, {MANIFEST} says {expected}")
