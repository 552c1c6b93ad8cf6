"""Step folders: save completely or not at all, find the newest, keep the last few.

A step folder is a checkpoint folder in BAGEL's layout (so inference reads it as it is) plus
`optimizer.safetensors`, `trainer_state.json` and `training_args.json`. No file is a pickle.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from modeling.bagel.bagel import Bagel
from modeling.pretrained import (
    MANIFEST,
    PREPROCESSOR_FILE,
    VAE_PREFIX,
    CheckpointError,
    Weights,
    save_pretrained,
    save_safetensors,
    verify_manifest,
    weight_files,
    write_manifest,
)

from .arguments import RunArguments
from .ema import EMA

STEP_FOLDER = re.compile(r"\d{7}|[1-9]\d{7,}")


def step_folders(run: Path) -> list[Path]:
    """Complete step folders, the oldest first."""
    if not run.is_dir():
        return []
    complete = [
        p for p in run.iterdir() if STEP_FOLDER.fullmatch(p.name) and (p / MANIFEST).exists()
    ]
    return sorted(complete, key=lambda p: int(p.name))


def save_checkpoint(
    run: Path,
    step: int,
    model: Bagel,
    ema: EMA,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    rules: dict[str, Any],
    args: RunArguments,
) -> Path:
    """Writes the step folder beside its place, then moves it there; drops the oldest ones.

    `rules` are the resize rules of the data, so that inference prepares images as training did.
    """
    run.mkdir(parents=True, exist_ok=True)
    final, staging = run / f"{step:07d}", run / f".saving-{step:07d}"
    for debris in run.glob(".saving-*"):
        shutil.rmtree(debris)
    states: dict[Weights, dict[str, Tensor]] = {
        "model": model.state_dict(),
        "ema": ema.state_dict(model),
    }
    save_pretrained(model, staging, states, tokenizer_from=args.model.model_path)
    save_safetensors(_optimizer_tensors(model, optimizer), staging / "optimizer.safetensors")
    (staging / "trainer_state.json").write_text(json.dumps({"step": step} | state) + "\n")
    (staging / PREPROCESSOR_FILE).write_text(json.dumps(rules, indent=2) + "\n")
    args.save(staging / "training_args.json")
    write_manifest(staging)
    if final.exists():
        shutil.rmtree(final)
    staging.rename(final)
    for old in step_folders(run)[: -args.training.max_checkpoints]:
        shutil.rmtree(old)
    return final


def load_checkpoint(
    folder: Path, model: Bagel, ema: EMA, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Restores weights, EMA and optimizer in place; returns the trainer's state.

    Raises CheckpointError when a file is missing or damaged.
    """
    verify_manifest(folder)
    state = _state(folder, "model")
    if model.config.llm.tie_word_embeddings:
        state["language_model.lm_head.weight"] = state["language_model.model.embed_tokens.weight"]
    model.load_state_dict(state | _vae_state(model), strict=True)
    ema.load_state_dict(_state(folder, "ema"))
    _load_optimizer(model, optimizer, load_file(folder / "optimizer.safetensors"))
    return json.loads((folder / "trainer_state.json").read_text())


def _state(folder: Path, weights: Any) -> dict[str, Tensor]:
    return {k: v for f in weight_files(folder, weights) for k, v in load_file(f).items()}


def _vae_state(model: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in model.state_dict().items() if k.startswith(VAE_PREFIX)}


def _trained_names(model: nn.Module) -> list[str]:
    return [n for n, p in model.named_parameters() if p.requires_grad]


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's tensors as `<parameter>/<exp_avg | exp_avg_sq | step>`."""
    names, states = _trained_names(model), optimizer.state_dict()["state"]
    return {f"{names[i]}/{key}": value for i, s in states.items() for key, value in s.items()}


def _load_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    names = _trained_names(model)
    # Not the other way round: weights that have had no gradient yet have no state.
    if frozen := sorted({key.rsplit("/", 1)[0] for key in tensors} - set(names)):
        raise CheckpointError(
            f"the optimizer state is not that of the trained weights: {', '.join(frozen[:5])} "
            f"({len(frozen)} in all) were trained and are frozen now; were freeze flags changed?"
        )
    state: dict[int, dict[str, Tensor]] = {}
    for i, name in enumerate(names):
        for key in ("exp_avg", "exp_avg_sq", "step"):
            if f"{name}/{key}" in tensors:
                state.setdefault(i, {})[key] = tensors[f"{name}/{key}"]
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
