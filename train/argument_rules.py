"""Which values of arguments are allowed, what they imply, and which contradict each other."""

import math
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from .distributed import dead_variables

if TYPE_CHECKING:
    from .arguments import RunArguments, TrainingArguments

FSDP_ONLY = ("num_replicate", "num_shard", "sharding_strategy", "cpu_offload")
DEEPSPEED_ONLY = ("zero_stage", "ds_config_file")
FROZEN_WITH = {"und": "llm", "vit": "und", "llm": "", "mot_und": "llm und", "mot_gen": "llm"}
"""Part with a freeze flag -> the other parts whose flag freezes all of it."""
SWITCHES = {
    "lora_(alpha|dropout|targets)": "lora_rank",
    "val_(dataset_config_file|steps|images|num_timesteps)": "val_every",
}
"""Pattern of names of arguments -> the argument without which they have no effect."""
OLD_LAYER_MODULE = "Qwen2MoTDecoderLayer_with_hidden_outputs"
"""Default of former trainers; a class of that name has never existed."""


def _one_of(*values: Any) -> tuple[Callable[[Any], bool], str]:
    *most, last = map(str, values)
    said = f"neither {most[0]} nor" if len(most) == 1 else f"none of {', '.join(most)},"
    return lambda value: value in values, f"is {said} {last}"


RANGES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "max_checkpoints|(log|save)_every|(total|gradient_accumulation|pixel_space_unseen)_steps"
        "|max_(nonfinite_steps|save_failures)|val_(steps|images)|num_(replicate|shard)"
        "|prefetch_factor|pixel_loss_chunk_size|vae_checkpoint_pixels|expected_num_tokens",
        lambda n: n is None or n >= 1,
        "must be at least 1",
    ),
    ("val_num_timesteps", lambda n: n >= 2, "must be at least 2"),
    (
        "pixel_space_balance|pixel_space_max_ratio|ssim_grad_clamp|ssim_grad_scale|timestep_shift"
        "|lr|(vit|llm|mot_und|mot_gen)_lr|eps|spike_sigma|peak_tflops|lora_alpha",
        lambda x: x is None or 0 < x < math.inf,
        "must be positive and finite",
    ),
    ("max_grad_norm", lambda x: x > 0, "must be positive"),
    (
        r"(spike_)?warmup_steps|val_every|num_workers|max_buffer_size|prefer_buffer_before"
        r"|lora_rank|hang_timeout|min_lr|\w+_seed|(ce|mse|\w+_loss)_weight",
        lambda x: 0 <= x < math.inf,
        "must not be negative or infinite",
    ),
    (r"\w+_(path|dir|file)|data_root|resume_from", lambda path: path != "", "is empty"),
    (r"\w+_cond_dropout_prob|lora_dropout", lambda p: 0 <= p <= 1, "is no probability"),
    (r"\w+_fraction|max_bad_share", lambda share: 0 <= share <= 1, "is no share in [0, 1]"),
    (r"\w+_loss_max_t", lambda t: 0 < t <= 1, "is not in (0, 1]"),
    ("beta1|beta2", lambda x: 0 <= x < 1, "is not in [0, 1)"),
    ("ema", lambda x: 0 <= x < 1, "is no decay in [0, 1)"),
    ("ssim_window_size", lambda n: n > 0 and n % 2 == 1, "must be odd"),
    ("device", *_one_of("auto", "cpu", "cuda")),
    ("backend", *_one_of("auto", "single", "fsdp", "deepspeed")),
    ("sharding_strategy", *_one_of("HYBRID_SHARD", "FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD")),
    ("backward_prefetch", *_one_of("BACKWARD_PRE", "BACKWARD_POST", None)),
    ("zero_stage", *_one_of(1, 2, 3)),
    ("attention_backend", *_one_of("sdpa", "flex")),
    ("lr_scheduler", *_one_of("constant", "cosine")),
    ("pixel_loss_type", *_one_of("l1", "l2", "mse")),
    ("freeze_vae", lambda frozen: frozen, "cannot be: the autoencoder is not trained here"),
)
"""Pattern of names of arguments, what holds for their values, what to say when it does not."""


def settle(args: "RunArguments", docs: dict[str, str]) -> list[str]:
    """Sets what follows from other arguments. Returns warnings of what has no effect."""
    model, t, sources = args.model, args.training, args.sources
    warnings = [
        f"{name}: {docs[name]}" for name in sources if docs.get(name, "").startswith("No effect")
    ]
    warnings += [f"{name} of the environment: No effect" for name in dead_variables()]
    if model.layer_module == OLD_LAYER_MODULE:
        model.layer_module = OLD_LAYER_MODULE.removesuffix("_with_hidden_outputs")
        warnings.append(f"layer_module={OLD_LAYER_MODULE} means {model.layer_module}")
    for name in ("llm_path", "vit_path"):
        if t.finetune_from_hf and (path := getattr(model, name)) is not None:
            warnings.append(f"{name}={path} is not read with finetune_from_hf=True")
    if model.lora_rank > 0 and t.freeze_und:
        warnings.append(f"lora_rank={model.lora_rank}: freeze_und freezes one expert's adapters")
    if t.warmup_steps > t.total_steps:
        told = f"warmup_steps={t.warmup_steps} exceeds total_steps={t.total_steps}"
        warnings.append(f"{told}: lr={t.lr} is never reached")
    if sources.keys() >= {"val_every", "enable_validation"} and not t.enable_validation:
        t.val_every, sources["val_every"] = 0, "enable_validation"
    implied: tuple[tuple[bool, Any, str, Any, str], ...] = (
        (model.use_flex, model, "attention_backend", "flex", "use_flex"),
        (t.wandb_offline, t, "enable_wandb", True, "wandb_offline"),
        (t.val_every > 0, t, "enable_validation", True, "val_every"),
        (t.resume_model_only, t, "resume_model_optimizer", False, "resume_model_only"),
    )
    for holds, group, name, value, reason in implied:
        if holds and name not in sources:
            setattr(group, name, value)
            sources[name] = reason
    for part in FROZEN_WITH:
        if getattr(t, own := f"freeze_{part}"):
            flags = _freezing(t, part)[1:]
            warnings += [f"{flag} already freezes what {own} would" for flag in flags]
    for pattern, switch in SWITCHES.items():
        if not args.flat()[switch]:
            idle = [name for name in sources if re.fullmatch(pattern, name)]
            warnings += [f"{name} has no effect without {switch}" for name in idle]
    return [_located(warning, sources) for warning in warnings]


def out_of_range(args: "RunArguments") -> Iterator[str]:
    """One line per value that is outside of its range."""
    for pattern, holds, complaint in RANGES:
        for name, value in args.flat().items():
            if re.fullmatch(pattern, name) and not holds(value):
                yield _located(f"{name}={value!r} {complaint}", args.sources)


def contradictions(args: "RunArguments") -> Iterator[str]:
    """One line per group of arguments that cannot be meant together, with their sources."""
    for rule in (_of_losses, _of_the_start, _of_trained_parts, _of_scale, _of_observation):
        for message in rule(args):
            yield _located(message, args.sources)


def _located(message: str, sources: dict[str, str]) -> str:
    """The message behind the places of the arguments that it names."""
    names = [name for name in re.findall(r"\w+", message) if name in sources]
    places = dict.fromkeys(sources[name] for name in names)
    return f"{', '.join(places)}: {message}" if places else message


def _of_losses(args: "RunArguments") -> Iterator[str]:
    t = args.training
    pixel_space = t.pixel_loss_weight > 0 or t.ssim_loss_weight > 0
    if pixel_space and not t.visual_gen:
        yield "pixel_loss_weight and ssim_loss_weight need the VAE decoder, so visual_gen=True"
    if t.pixel_space_t_fraction > 0 and not pixel_space:
        yield "pixel_space_t_fraction needs pixel_loss_weight or ssim_loss_weight above 0"
    if t.pixel_space_balance is not None and not (pixel_space and t.mse_weight > 0):
        yield "pixel_space_balance needs mse_weight and a pixel_ or ssim_loss_weight above 0"


def _of_the_start(args: "RunArguments") -> Iterator[str]:
    t, model = args.training, args.model
    if t.init_from_scratch and t.finetune_from_ema:
        yield "init_from_scratch and finetune_from_ema contradict each other"
    if t.init_from_scratch and t.resume_from is not None:
        yield f"init_from_scratch and resume_from={t.resume_from} contradict each other"
    if t.resume_model_only and t.resume_model_optimizer:
        yield "resume_model_only=True and resume_model_optimizer=True contradict each other"
    if t.resume_from is not None and t.finetune_from_ema and not t.resume_model_only:
        yield (
            f"resume_from={t.resume_from}: finetune_from_ema=True would replace its weights by the "
            "average: drop one, or start anew from the average with resume_model_only=True"
        )
    if not t.finetune_from_hf:
        folders = ("llm_path", "vit_path", "model_path")
        if absent := [name for name in folders if getattr(model, name) is None]:
            yield f"finetune_from_hf=False needs {', '.join(absent)}"
        if t.init_from_scratch:
            yield "init_from_scratch and finetune_from_hf=False contradict each other: drop one"
        if t.finetune_from_ema and t.resume_from is None:
            yield "finetune_from_ema has no use with finetune_from_hf=False: no folder has averages"
    if model.use_flex and model.attention_backend != "flex":
        yield f"use_flex=True and attention_backend={model.attention_backend} contradict each other"


def _of_trained_parts(args: "RunArguments") -> Iterator[str]:
    t, model = args.training, args.model
    if t.lr_scheduler == "cosine" and t.min_lr > t.lr:
        yield f"min_lr={t.min_lr} exceeds lr={t.lr}"
    for part in FROZEN_WITH:
        rate = getattr(t, f"{part}_lr", None)
        if rate is not None and (flags := _freezing(t, part)):
            yield f"{part}_lr={rate} has nothing to train with {flags[0]}=True"
    if t.llm_lr is not None and (t.mot_und_lr is not None or t.mot_gen_lr is not None):
        yield "llm_lr and mot_und_lr or mot_gen_lr set the rate of the same weights: drop one"
    flags = [f for f in ("freeze_llm", "freeze_mot_und", "freeze_mot_gen") if getattr(t, f)]
    if model.lora_rank > 0 and flags:
        yield f"lora_rank={model.lora_rank} freezes the language model: drop {' and '.join(flags)}"
    if model.lora_rank > 0 and not model.lora_targets.strip(", "):
        yield f"lora_rank={model.lora_rank} needs lora_targets"


def _freezing(t: "TrainingArguments", part: str) -> list[str]:
    """The flags that are set and freeze a part, its own first."""
    flags = (f"freeze_{name}" for name in (part, *FROZEN_WITH[part].split()))
    return [flag for flag in flags if getattr(t, flag)]


def _of_scale(args: "RunArguments") -> Iterator[str]:
    t, data, sources = args.training, args.data, args.sources
    own = {"single": (), "deepspeed": DEEPSPEED_ONLY}.get(t.backend, FSDP_ONLY)
    for name in (*FSDP_ONLY, *DEEPSPEED_ONLY):
        value = getattr(t, name)
        if name in sources and name not in own and value not in (None, getattr(type(t), name)):
            needed = "fsdp" if name in FSDP_ONLY else "deepspeed"
            yield f"{name}={value} needs backend={needed}, not {t.backend}"
    if t.ds_config_file is not None and "zero_stage" in sources:
        yield f"zero_stage={t.zero_stage} would be overruled by ds_config_file={t.ds_config_file}"
    if data.expected_num_tokens > (most := data.max_num_tokens):
        yield f"expected_num_tokens={data.expected_num_tokens} exceeds max_num_tokens={most}"


def _of_observation(args: "RunArguments") -> Iterator[str]:
    t = args.training
    if t.wandb_offline and not t.enable_wandb:
        yield "wandb_offline=True and enable_wandb=False contradict each other"
    if t.enable_validation and t.val_every == 0:
        yield "enable_validation needs val_every above 0"
    if t.enable_validation and t.val_dataset_config_file is None:
        yield "val_every and enable_validation need val_dataset_config_file"
    if t.best_metrics and not t.enable_validation:
        yield f"best_metrics={t.best_metrics} needs val_every above 0"
