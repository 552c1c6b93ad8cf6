"""Arguments of a run: dataclasses, filled from YAML files (`extends`) and the command line.

Later sources win: defaults < YAML < command line. Unknown names raise and name the nearest one.
The table of resolved values with the source of each is printed and saved with the run.
"""

import difflib
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args

from data.config import read_yaml

RANGES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        r"max_checkpoints|\w+_every|(total|gradient_accumulation|pixel_space_unseen)_steps"
        "|pixel_loss_chunk_size|vae_checkpoint_pixels",
        lambda n: n >= 1,
        "must be at least 1",
    ),
    (
        "pixel_space_balance|pixel_space_max_ratio|ssim_grad_clamp|ssim_grad_scale|timestep_shift",
        lambda x: x is None or 0 < x < math.inf,
        "must be positive and finite",
    ),
    ("warmup_steps", lambda x: x >= 0, "must not be negative"),
    ("lr|eps|max_grad_norm", lambda x: 0 < x < math.inf, "must be positive and finite"),
    (r"(ce|mse|\w+_loss)_weight", lambda x: 0 <= x < math.inf, "must be a number from 0 on"),
    (r"\w+_cond_dropout_prob", lambda p: 0 <= p <= 1, "is no probability"),
    (r"\w+_fraction", lambda share: 0 <= share <= 1, "is no share in [0, 1]"),
    (r"\w+_loss_max_t", lambda t: 0 < t <= 1, "is not in (0, 1]"),
    ("beta1|beta2", lambda x: 0 <= x < 1, "is not in [0, 1)"),
    ("ema", lambda x: 0 <= x < 1, "is no decay in [0, 1)"),
    ("ssim_window_size", lambda n: n > 0 and n % 2 == 1, "must be odd"),
    ("device", lambda name: name in ("auto", "cpu", "cuda"), "is none of auto, cpu, cuda"),
    ("attention_backend", lambda name: name in ("sdpa", "flex"), "is neither sdpa nor flex"),
    (r"\w+_seed", lambda n: n >= 0, "must not be negative"),
    ("lr_scheduler", lambda x: x in ("constant", "cosine"), "is neither constant nor cosine"),
    ("pixel_loss_type", lambda x: x in ("l1", "l2", "mse"), "is none of l1, l2, mse"),
    ("freeze_vae", lambda frozen: frozen, "cannot be: the autoencoder is not trained here"),
)
"""Pattern of names of arguments, what holds for their values, what to say when it does not."""


@dataclass(kw_only=True)
class ModelArguments:
    model_path: str | None = None
    """Checkpoint folder in BAGEL's layout: configs, tokenizer, weights and autoencoder."""
    llm_qk_norm: bool | None = None
    """None takes this and the following sizes from the checkpoint; a value must agree with it."""
    layer_module: str | None = None
    max_latent_size: int | None = None
    latent_patch_size: int | None = None
    vit_max_num_patch_per_side: int | None = None
    connector_act: str | None = None
    interpolate_pos: bool | None = None
    vit_select_layer: int | None = None
    vit_rope: bool | None = None
    attention_backend: str = "sdpa"
    """`sdpa` (everywhere) or `flex` (GPU)."""
    text_cond_dropout_prob: float = 0.1
    """Probability that a condition is left out of a sample, so that guidance can be used."""
    vae_cond_dropout_prob: float = 0.3
    vit_cond_dropout_prob: float = 0.3


@dataclass(kw_only=True)
class DataArguments:
    dataset_config_file: str | None = None
    """YAML data mixture."""
    data_root: str | None = None
    """Stands for ${data_root} in the mixture; default: the mixture's own folder."""
    data_seed: int = 42
    expected_num_tokens: int = 32768
    """Tokens at which a pack is full."""
    max_num_tokens: int = 36864
    """Tokens that no pack exceeds."""
    max_num_tokens_per_sample: int = 16384
    """Longer samples are dropped and counted."""
    prefer_buffer_before: int = 16384
    """While a pack holds fewer tokens, samples that wait in the buffer come first."""
    max_buffer_size: int = 50
    """Samples that may wait for a pack with room; 0 keeps the order of the stream."""
    num_workers: int = 1
    """Processes per rank that decode images; 0 decodes in the training process."""
    prefetch_factor: int = 2
    """Packs that each worker prepares ahead."""
    full_noise_fraction: float = 0.0
    """Share of the target images at t = 1, where few-step sampling starts."""


@dataclass(kw_only=True)
class TrainingArguments:
    visual_gen: bool = True
    """Train the velocity of VAE latents."""
    visual_und: bool = True
    """Train the cross-entropy of answers."""
    checkpoint_dir: str = "results/checkpoints"
    """Run folder: step folders, metrics.jsonl, training_args.json."""
    max_checkpoints: int = 5
    """Newest step folders that are kept."""
    global_seed: int = 4396
    auto_resume: bool = True
    """Continue from the newest complete step folder of `checkpoint_dir`, if there is one."""
    resume_from: str | None = None
    """Continue from this step folder."""
    finetune_from_ema: bool = False
    """Start from `ema.safetensors` of `model_path`; False starts from `model.safetensors`."""
    init_from_scratch: bool = False
    """Random initial weights (configs, tokenizer and autoencoder still from `model_path`)."""
    copy_init_moe: bool = True
    """From scratch: the generation expert starts as a copy of the understanding expert."""
    log_every: int = 10
    """Steps between log lines."""
    save_every: int = 2000
    """Steps between checkpoints; the last step is always saved."""
    total_steps: int = 500_000
    gradient_accumulation_steps: int = 1
    """Packs per step and process."""
    warmup_steps: int = 2000
    lr_scheduler: str = "constant"
    """`constant` or `cosine` (to min_lr), both after a linear warm-up."""
    lr: float = 1e-4
    min_lr: float = 1e-7
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-15
    ema: float = 0.9999
    """Decay of the exponential moving average of the weights, per step."""
    max_grad_norm: float = 1.0
    """Global L2 norm at which gradients are clipped."""
    timestep_shift: float | None = None
    """Warp of training times; None keeps the checkpoint's."""
    ce_weight: float = 1.0
    mse_weight: float = 1.0
    pixel_loss_weight: float = 0.0
    pixel_loss_type: str = "l1"
    """`l1`, `l2` or `mse` (the same as l2)."""
    pixel_loss_max_t: float = 0.3
    """Only images with t below it contribute, weighted by (max_t - t) / max_t."""
    pixel_loss_chunk_size: int = 2
    """Images that are decoded at once for the pixel and SSIM losses."""
    pixel_loss_adaptive_chunk: bool = True
    """Decode 1, 2 or 4 images at once instead: from 1024 x 1024, from 512 x 512, and below."""
    vae_checkpoint_pixels: int = 512 * 512
    """From this size on the decoder's two finest levels are recomputed in backward."""
    pixel_space_t_fraction: float = 0.0
    """Share of the target images drawn with t uniform in (0, the largest active max_t]."""
    pixel_space_balance: float | None = None
    """Norm of the pixel-space gradient at the velocity over that of MSE; None: by the weights."""
    pixel_space_max_ratio: float = 1.0
    """The same ratio of a single term from which a warning is printed."""
    pixel_space_unseen_steps: int = 500
    """Steps after which a term that has seen no image is warned of."""
    ssim_loss_weight: float = 0.0
    ssim_loss_max_t: float = 0.1
    ssim_window_size: int = 11
    """Odd side of the Gaussian window, in pixels."""
    ssim_grad_scale: float = 0.1
    """Factor on the gradient between SSIM and decoder: for the gradient the same as the weight."""
    ssim_grad_clamp: float | None = None
    """Largest element of the gradient of area * (1 - SSIM) at the decoded image, before the scale;
    None clamps nothing."""
    ssim_compile: bool = False
    """SSIM through torch.compile: faster after half a minute at the first image."""
    freeze_llm: bool = False
    freeze_vit: bool = False
    freeze_vae: bool = True
    freeze_und: bool = False
    """Understanding activations are constants; MoT layers only."""
    bf16: bool = False
    """Autocast to bfloat16; weights, gradients and EMA stay float32."""
    device: str = "auto"
    """`auto` (a GPU if there is one), `cpu` or `cuda`."""


@dataclass
class RunArguments:
    model: ModelArguments
    data: DataArguments
    training: TrainingArguments
    sources: dict[str, str] = field(default_factory=dict)
    """Where each value that is not a default came from."""

    def __post_init__(self) -> None:
        """Raises ValueError for a value outside of its range or arguments that contradict."""
        for pattern, holds, complaint in RANGES:
            for name, value in self.flat().items():
                if re.fullmatch(pattern, name) and not holds(value):
                    raise ValueError(f"{name}={value!r} {complaint}")
        args = self.training
        pixel_space = args.pixel_loss_weight > 0 or args.ssim_loss_weight > 0
        if args.lr_scheduler == "cosine" and args.min_lr > args.lr:
            raise ValueError(f"min_lr={args.min_lr} exceeds lr={args.lr}")
        if pixel_space and not args.visual_gen:
            raise ValueError(
                "pixel_loss_weight and ssim_loss_weight need the VAE decoder, "
                "which visual_gen=False does not build"
            )
        if args.pixel_space_t_fraction > 0 and not pixel_space:
            raise ValueError(
                "pixel_space_t_fraction needs pixel_loss_weight or ssim_loss_weight above 0"
            )
        if args.pixel_space_balance is not None and not (pixel_space and args.mse_weight > 0):
            raise ValueError(
                "pixel_space_balance needs mse_weight and pixel_loss_weight or ssim_loss_weight "
                "above 0"
            )
        if args.init_from_scratch and args.finetune_from_ema:
            raise ValueError("init_from_scratch and finetune_from_ema contradict each other")
        if args.freeze_llm and args.freeze_und:
            raise ValueError("freeze_llm already freezes what freeze_und would")

    def table(self) -> str:
        """One line per argument: name, value, source."""
        return "\n".join(
            f"{name:28s}  {value!s:24s}  {self.sources.get(name, 'default')}"
            for name, value in self.flat().items()
        )

    def flat(self) -> dict[str, Any]:
        return asdict(self.model) | asdict(self.data) | asdict(self.training)

    def save(self, path: Path) -> None:
        content = {"arguments": self.flat(), "sources": self.sources}
        path.write_text(json.dumps(content, indent=2) + "\n")


GROUPS: tuple[Any, ...] = (ModelArguments, DataArguments, TrainingArguments)
TYPES: dict[str, Any] = {f.name: f.type for group in GROUPS for f in fields(group)}


def parse_arguments(argv: list[str]) -> RunArguments:
    """Resolves `--config FILE` and `--name value` pairs (`--flag` alone means True).

    Raises ValueError for an unknown name (with file and nearest name), a value of the wrong type
    or a contradiction between two arguments.
    """
    command_line = _command_line(argv)
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    config = command_line.pop("config", None)
    layers = _yaml_layers(Path(config)) if config else []
    for source, layer in [*layers, ("command line", command_line)]:
        values |= {name: _convert(name, raw, source) for name, raw in layer.items()}
        sources |= dict.fromkeys(layer, source)
    model, data, training = (
        group(**{f.name: values[f.name] for f in fields(group) if f.name in values})
        for group in GROUPS
    )
    return RunArguments(model, data, training, sources)


def _command_line(argv: list[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    pending = None
    for word in argv:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            values[name] = value if equals else "True"
            pending = None if equals else name
        elif pending is None:
            raise ValueError(f"command line: {word!r} belongs to no --argument")
        else:
            values[pending] = word
            pending = None
    return values


def _yaml_layers(path: Path, above: tuple[Path, ...] = ()) -> list[tuple[str, dict[str, Any]]]:
    """The YAML file and those it extends, the deepest first."""
    path = Path(os.path.normpath(path))
    if path in above:
        raise ValueError(f"{path}: extends itself through {', '.join(map(str, above))}")
    content = read_yaml(path) or {}
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a mapping of arguments is expected")
    base = content.pop("extends", None)
    deeper = _yaml_layers(path.parent / base, (*above, path)) if base else []
    return [*deeper, (str(path), content)]


def _convert(name: str, raw: Any, source: str) -> Any:
    if name not in TYPES:
        near = difflib.get_close_matches(name, TYPES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{source}: unknown argument {name!r}{hint}")
    kind = TYPES[name]
    if isinstance(kind, UnionType):
        if raw in (None, "None"):
            return None
        kind = get_args(kind)[0]
    try:
        if kind is bool:
            return {"true": True, "false": False}[str(raw).lower()]
        if kind is str and not isinstance(raw, str | int | float):
            raise TypeError
        return kind(str(raw))  # through text, so that YAML and command line agree
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{source}: {name}={raw!r} is no {kind.__name__}") from error
