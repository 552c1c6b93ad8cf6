"""LoRA (Hu et al. 2021) on the language model's projections, by peft; merged when saved."""

import math

import torch
from torch import Tensor, nn

from .arguments import ModelArguments

A, B, BASE = ".lora_A.default.weight", ".lora_B.default.weight", ".base_layer"


def add_adapters(model: nn.Module, args: ModelArguments) -> None:
    """Puts adapters on every `lora_targets` projection of both experts, on the meta device.

    Raises ValueError when there is no such projection, or without peft.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError("lora_rank needs: pip install 'bagel-restore[lora]'") from error
    targets = "|".join(name.strip() for name in args.lora_targets.split(","))
    config = LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=args.lora_dropout,
        target_modules=rf"language_model\.model\.layers\..*\.({targets})(_moe_gen)?",
    )
    try:
        inject_adapter_in_model(config, model, low_cpu_mem_usage=True)
    except ValueError as error:
        raise ValueError(f"lora_targets={args.lora_targets}: no such projection") from error


def is_adapter(name: str) -> bool:
    return name.endswith((A, B))


def initial_adapters(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Kaiming-uniform A, zero B, so that the model starts as it was; the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            bound = 1 / math.sqrt(parameter.shape[1]) if name.endswith(A) else 0.0
            tensors[name] = torch.empty(parameter.shape).uniform_(-1, 1, generator=generator)
            tensors[name] *= bound
    return tensors


def merged(base: Tensor, a: Tensor, b: Tensor, args: ModelArguments) -> Tensor:
    """base + alpha / rank * B A, in float32."""
    return (base.float() + args.lora_alpha / args.lora_rank * (b.float() @ a.float())).to(base)
