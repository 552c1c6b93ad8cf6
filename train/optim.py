"""What is trained, by whom and how fast: freeze plan, parameter groups, learning rates."""

import math
from collections.abc import Iterable

from torch import nn

from .adapters import is_adapter
from .arguments import TrainingArguments

GROUPS = ("vit_model", "language_model", "mot_und", "mot_gen", "other")


def trained_names(names: Iterable[str], args: TrainingArguments, lora: bool) -> list[str]:
    """Names of the parameters that the freeze flags leave to be trained.

    With `lora` the language model itself is frozen too. Raises ValueError when nothing is left. The
    autoencoder is frozen by the model itself.
    """

    def frozen(name: str) -> bool:
        llm, vit = name.startswith("language_model."), name.startswith("vit_model.")
        decoder = name.startswith("language_model.model.")
        # Activations of these are constants, so that no gradient reaches them; lm_head alone still
        # learns from the answers.
        und = (decoder or vit or name.startswith("connector.")) and "_moe_gen" not in name
        expert = decoder and "embed_tokens" not in name
        return (
            name.startswith("vae.")
            or ((args.freeze_llm or (lora and not is_adapter(name))) and llm)
            or (args.freeze_vit and vit)
            or (args.freeze_und and und)
            or (args.freeze_mot_und and expert and "_moe_gen" not in name)
            or (args.freeze_mot_gen and expert and "_moe_gen" in name)
        )

    trained = [name for name in names if not frozen(name)]
    if not trained:
        raise ValueError("the freeze flags leave nothing to train")
    return trained


def apply_freeze_plan(model: nn.Module, args: TrainingArguments, lora: bool = False) -> None:
    """Sets requires_grad of every parameter."""
    trained = set(trained_names((name for name, _ in model.named_parameters()), args, lora))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)


def group_of(name: str, args: TrainingArguments) -> str:
    """One of GROUPS: whose learning rate a parameter has."""
    if name.startswith("vit_model."):
        return "vit_model"
    if not name.startswith("language_model."):
        return "other"
    gen = "_moe_gen" in name
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
