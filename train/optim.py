"""What is trained, by whom and how fast: freeze plan, AdamW, learning-rate schedule."""

import math

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from .arguments import TrainingArguments


def apply_freeze_plan(model: nn.Module, args: TrainingArguments) -> None:
    """Sets requires_grad. The autoencoder is frozen by the model itself."""
    for name, parameter in model.named_parameters():
        llm, vit = name.startswith("language_model."), name.startswith("vit_model.")
        # Activations of these are constants, so that no gradient reaches them; lm_head alone still
        # learns from the answers.
        und = name.startswith(("language_model.model.", "vit_model.", "connector."))
        und = und and "_moe_gen" not in name
        if (args.freeze_llm and llm) or (args.freeze_vit and vit) or (args.freeze_und and und):
            parameter.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("the freeze flags leave nothing to train")


def build_optimizer(model: nn.Module, args: TrainingArguments) -> torch.optim.AdamW:
    """AdamW without weight decay over the trained parameters."""
    trained = [p for p in model.parameters() if p.requires_grad]
    betas = (args.beta1, args.beta2)
    return torch.optim.AdamW(trained, lr=args.lr, betas=betas, eps=args.eps, weight_decay=0.0)


def lr_factor(step: int, args: TrainingArguments) -> float:
    """Learning rate at an optimizer step (from 0) as a share of `lr`: warm-up, then schedule."""
    if step < args.warmup_steps:
        return (step + 1) / args.warmup_steps
    if args.lr_scheduler == "constant":
        return 1.0
    done = (step - args.warmup_steps) / max(1, args.total_steps - args.warmup_steps)
    floor = args.min_lr / args.lr
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def build_schedule(optimizer: torch.optim.Optimizer, args: TrainingArguments) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: lr_factor(step, args))
