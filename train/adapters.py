"""LoRA (Hu et al. 2021) on the language model's projections, by peft; merged when saved."""

import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from modeling.bagel.qwen2_navit import GEN
from modeling.pretrained import CheckpointError, read_tensors, shapes_of, weight_files

from .arguments import ModelArguments
from .distributed import first_error, rank, world_size

A, B, BASE = ".lora_A.default.weight", ".lora_B.default.weight", ".base_layer"
LAYERS = "language_model.model.layers"


def add_adapters(model: nn.Module, args: ModelArguments) -> None:
    """Puts adapters on every `lora_targets` projection of both experts, on the meta device.

    Raises ValueError when there is no such projection, or without peft.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError("lora_rank needs: pip install 'bagel-restore[lora]'") from error
    names = [name.strip() for name in args.lora_targets.split(",")]
    there = {name.rpartition(".")[2] for name, _ in model.get_submodule(LAYERS).named_modules()}
    if absent := [name for name in names if name and name not in there]:
        raise ValueError(f"lora_targets={args.lora_targets}: no such projection: {absent}")
    targets = "|".join(names)
    config = LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=args.lora_dropout,
        target_modules=rf"{re.escape(LAYERS)}\..*\.({targets})({GEN})?",
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


def require_base(
    folder: Path, base: Mapping[str, Tensor], model: nn.Module, args: ModelArguments
) -> None:
    """Raises CheckpointError on all ranks unless the adapters of a step folder are those of the
    model, and on this base make the model that they were saved with."""
    adapters = read_tensors(weight_files(folder, "adapters", "lora_rank goes on with adapters"))
    own = {name: parameter.shape for name, parameter in model.named_parameters()}
    own = {name: shape for name, shape in own.items() if is_adapter(name)}
    if shapes_of(adapters) != own:
        raise CheckpointError(f"{folder}: has other adapters: check lora_rank and lora_targets")
    saved = read_tensors(weight_files(folder, "model"))
    stems = [name.removesuffix(A) for name in adapters if name.endswith(A)]
    error = None
    for stem in stems[rank() :: world_size()]:
        weight, pair = base[name := f"{stem}.weight"], (adapters[stem + A], adapters[stem + B])
        if weight.is_meta:  # of a dry run
            continue
        # DeepSpeed keeps frozen weights in bfloat16.
        made = (merged(kept, *pair, args) for kept in (weight, weight.bfloat16()))
        if not any(torch.allclose(whole, saved[name], rtol=1e-4, atol=1e-6) for whole in made):
            error = CheckpointError(
                f"{folder}: its adapters began on another base ({name} differs): check "
                "model_path, finetune_from_ema and lora_alpha"
            )
    first_error(error)


def merged(base: Tensor, a: Tensor, b: Tensor, args: ModelArguments) -> Tensor:
    """base + alpha / rank * B A, in float32."""
    return base.float() + args.lora_alpha / args.lora_rank * (b.float() @ a.float())
