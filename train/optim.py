"""What is trained, by whom and how fast: freeze plan, parameter groups, learning rates."""

import math

from torch import nn

from modeling.autoencoder import VAE_PREFIX
from modeling.bagel.qwen2_navit import GEN

from .adapters import is_adapter
from .arguments import RunArguments, TrainingArguments

GROUPS = ("vit_model", "language_model", "mot_und", "mot_gen", "other")


def frozen_by(name: str, args: TrainingArguments, lora: bool) -> str | None:
    """The argument that freezes a parameter, None if it is trained.

    With `lora` the language model itself is frozen too. The autoencoder is frozen by the model.
    """
    llm, vit = name.startswith("language_model."), name.startswith("vit_model.")
    decoder = name.startswith("language_model.model.")
    # Activations of these are constants, so that no gradient reaches them; lm_head alone still
    # learns from the answers.
    gen = GEN in name
    und = (decoder or vit or name.startswith("connector.")) and not gen
    expert = decoder and "embed_tokens" not in name
    freezing = {
        "freeze_vae": name.startswith(VAE_PREFIX),
        "freeze_llm": args.freeze_llm and llm,
        "lora_rank": lora and llm and not is_adapter(name),
        "freeze_vit": args.freeze_vit and vit,
        "freeze_und": args.freeze_und and und,
        "freeze_mot_und": args.freeze_mot_und and expert and not gen,
        "freeze_mot_gen": args.freeze_mot_gen and expert and gen,
    }
    return next((flag for flag, holds in freezing.items() if holds), None)


def apply_freeze_plan(model: nn.Module, args: TrainingArguments, lora: bool = False) -> None:
    """Sets requires_grad of every parameter. Raises ValueError when nothing is left to train."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen_by(name, args, lora) is None)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("the freeze flags leave nothing to train")


def group_of(name: str, args: TrainingArguments) -> str:
    """One of GROUPS: whose learning rate a parameter has."""
    if name.startswith("vit_model."):
        return "vit_model"
    if not name.startswith("language_model."):
        return "other"
    gen = GEN in name
    if (args.mot_gen_lr if gen else args.mot_und_lr) is not None and ".layers." in name:
        return "mot_gen" if gen else "mot_und"
    return "language_model"


def base_lr(group: str, args: TrainingArguments) -> float:
    """Learning rate of one of GROUPS after the warm-up."""
    own = {
        "vit_model": args.vit_lr,
        "language_model": args.llm_lr,
        "mot_und": args.mot_und_lr,
        "mot_gen": args.mot_gen_lr,
    }.get(group)
    return args.lr if own is None else own


def fate_of(name: str, args: RunArguments) -> str:
    """What freezes a parameter, or its group and learning rate, in words."""
    training = args.training
    if flag := frozen_by(name, training, args.model.lora_rank > 0):
        return f"frozen by {flag}"
    group = group_of(name, training)
    return f"trained, {group}, lr {base_lr(group, training):g}"


def lr_at(step: int, base: float, args: TrainingArguments) -> float:
    """Learning rate at an optimizer step (from 0): linear warm-up, then constant, or a cosine that
    ends at `min_lr`."""
    if step < args.warmup_steps:
        return base * (step + 1) / args.warmup_steps
    if args.lr_scheduler == "constant":
        return base
    done = (step - args.warmup_steps) / max(1, args.total_steps - args.warmup_steps)
    floor = min(1.0, args.min_lr / base)
    return base * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))
