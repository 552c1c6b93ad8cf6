"""Step folders: save completely or not at all, find the newest, keep the last few.

A step folder is a checkpoint folder in BAGEL's layout (so inference reads it as it is) plus
`optimizer.safetensors`, `trainer_state.json` and `training_args.json`. No file is a pickle.
"""

import re
import shutil
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor

from modeling.pretrained import (
    MANIFEST,
    PREPROCESSOR_FILE,
    CheckpointError,
    load_pretrained,
    read_json,
    read_tensors,
    save_pretrained,
    verify_manifest,
    weight_files,
    write_json,
    write_manifest,
)

if TYPE_CHECKING:
    from .trainer import Trainer

STEP_FOLDER = re.compile(r"\d{7}|[1-9]\d{7,}")


def step_folders(run: Path) -> list[Path]:
    """Complete step folders, the oldest first."""
    complete = [manifest.parent for manifest in run.glob(f"*/{MANIFEST}")]
    return sorted((p for p in complete if STEP_FOLDER.fullmatch(p.name)), key=lambda p: int(p.name))


def save_checkpoint(trainer: "Trainer") -> Path:
    """Writes the step folder beside its place, then moves it there; drops the oldest ones."""
    run, args, model = trainer.run, trainer.args, trainer.model
    final, staging = run / f"{trainer.step:07d}", run / f".saving-{trainer.step:07d}"
    for debris in run.glob(".saving-*"):
        shutil.rmtree(debris)
    save_pretrained(
        model,
        staging,
        {"model": model.state_dict(), "ema": trainer.ema.state_dict(model)},
        tokenizer_from=args.model.model_path,
    )
    save_file(_optimizer_tensors(trainer), staging / "optimizer.safetensors", {"format": "pt"})
    state = {
        "step": trainer.step,
        "loader": trainer.loader.state_dict(),
        "steps_without": trainer.telemetry.steps_without,
    }
    write_json(staging / "trainer_state.json", state)
    # So that inference prepares images as training did.
    write_json(staging / PREPROCESSOR_FILE, trainer.loader.resize_rules)
    args.save(staging / "training_args.json")
    write_manifest(staging)
    if final.exists():
        shutil.rmtree(final)
    staging.rename(final)
    for old in step_folders(run)[: -args.training.max_checkpoints]:
        shutil.rmtree(old)
    return final


def load_checkpoint(folder: Path, trainer: "Trainer") -> dict[str, Any]:
    """Restores weights, EMA and optimizer in place; returns the rest of the state.

    Prints every argument that has changed since. Raises CheckpointError when a file is missing or
    damaged, or other weights were trained.
    """
    verify_manifest(folder)
    before = read_json(folder / "training_args.json")["arguments"]
    for name, value in trainer.args.flat().items():
        if before.get(name, value) != value:
            print(f"WARNING: resumed with {name}={value}, saved with {before[name]}", flush=True)
    saved, _ = load_pretrained(folder, "model", verify=False)
    trainer.model.load_state_dict(saved.state_dict(), strict=True)
    trainer.ema.load_state_dict(read_tensors(weight_files(folder, "ema")))
    _load_optimizer(trainer, read_tensors([folder / "optimizer.safetensors"]))
    return read_json(folder / "trainer_state.json")


def _optimizer_tensors(trainer: "Trainer") -> dict[str, Tensor]:
    """AdamW's tensors as `<parameter>/<exp_avg | exp_avg_sq | step>`."""
    return {
        f"{name}/{key}": value
        for name, weight in trainer.ema.weights.items()
        for key, value in trainer.optimizer.state.get(weight, {}).items()
    }


def _load_optimizer(trainer: "Trainer", tensors: dict[str, Tensor]) -> None:
    places = {name: place for place, name in enumerate(trainer.ema.weights)}
    # Not the other way round: weights that have had no gradient yet have no state.
    if frozen := sorted({key.rsplit("/", 1)[0] for key in tensors} - places.keys()):
        raise CheckpointError(
            f"the optimizer state is not that of the trained weights: {', '.join(frozen[:5])} "
            f"({len(frozen)} in all) were trained and are frozen now; were freeze flags changed?"
        )
    state: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        name, kind = key.rsplit("/", 1)
        state[places[name]][kind] = tensor
    groups = trainer.optimizer.state_dict()["param_groups"]
    trainer.optimizer.load_state_dict({"state": state, "param_groups": groups})
