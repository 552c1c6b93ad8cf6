"""Between log lines the host never waits for the device: no number of the device decides on it."""

import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.helpers import run_arguments
from train.build import build_trainer
from train.metrics import Metrics
from train.trainer import Trainer

ROOT = Path(__file__).parents[2]
OURS = tuple(f"{ROOT / package}/" for package in ("modeling", "data", "train", "tests"))
WAITS = {
    *("_local_scalar_dense", "nonzero", "nonzero_numpy", "equal", "is_nonzero"),
    *("masked_select", "unique_dim", "_unique", "_unique2", "unique_consecutive"),
}
"""Operations whose result, or its size, the host must know."""
MODES = ("note", "__torch_dispatch__", "__torch_function__")
EXPECTED = {("train/telemetry.py", "warn_if_untrained"): "a warning that may come in step 0 only"}
"""Where a step may wait, and why."""


class DeviceTensors(TorchDispatchMode):
    """Follows what would lie on a device: weights, batches and all that is computed from them.

    On a CPU nothing waits, so the operations are found that would wait if these were on a GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, torch.UntypedStorage] = {}
        """Kept, so that no address comes twice."""
        self.waits: dict[tuple[str, str], list[str]] = {}
        """Operations by file and function of ours."""

    def add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self.storages[storage._cdata] = storage
        return tensor

    def holds(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.untyped_storage()._cdata in self.storages

    def note(self, operation: str) -> None:
        """Of the innermost function of ours but for this file's modes."""
        caller = next(
            f
            for f in reversed(traceback.extract_stack())
            if f.filename.startswith(OURS) and f.name not in MODES
        )
        place = str(Path(caller.filename).relative_to(ROOT)), caller.name
        self.waits.setdefault(place, []).append(operation)

    def __torch_dispatch__(
        self, op: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = tree_leaves((args, kwargs))
        ours = any(map(self.holds, given))
        if ours and self.waits_for(op, args, kwargs or {}):
            self.note(str(op))
        result = op(*args, **(kwargs or {}))
        if ours:
            written = [a for a, s in zip(args, op._schema.arguments, strict=False) if is_written(s)]
            for value in tree_leaves((result, written)):
                if isinstance(value, Tensor):
                    self.add(value)
        return result

    def waits_for(self, op: Any, args: Any, kwargs: dict[str, Any]) -> bool:
        name = op.overloadpacket.__name__
        if name in ("index", "index_put", "index_put_"):
            return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if name == "repeat_interleave":
            return kwargs.get("output_size") is None
        return name in WAITS


class Transfers(TorchFunctionMode):
    """Methods that copy from or to a device, but are no operation on a CPU."""

    def __init__(self, tensors: DeviceTensors) -> None:
        super().__init__()
        self.tensors = tensors

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, kwargs = getattr(function, "__name__", ""), kwargs or {}
        held = bool(args) and self.tensors.holds(args[0])
        if name in ("tolist", "cpu", "numpy", "__array__", "new_tensor") and held:
            self.tensors.note(name)
        result = function(*args, **kwargs)
        if name == "new_tensor" and held:
            self.tensors.add(result)
        given = (*args[1:], *kwargs.values())
        # The name "cpu" means the host whatever the device of the run is.
        if name == "to" and not held and any(isinstance(d, torch.device) for d in given):
            if not kwargs.get("non_blocking"):
                self.tensors.note(name)
            # A copy: the host keeps its own.
            return self.tensors.add(result.clone())
        return result


def is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def steps(trainer: Trainer, folder: Path, count: int) -> DeviceTensors:
    """What was found in `count` steps without a log line."""
    found = DeviceTensors()
    state = [*trainer.model.state_dict().values(), *trainer.ema.averages]
    state += trainer.guard.counters.values()
    state += [v for s in trainer.backend.optimizer.state.values() for v in s.values()]
    for tensor in state:
        found.add(tensor)

    stream = iter(trainer.loader)
    with Metrics(folder / "metrics.jsonl", 0, count) as metrics, found, Transfers(found):
        for _ in range(count):
            trainer.train_step(stream, metrics)
            trainer.step += 1
    return found


PIXEL_SPACE = {
    "pixel_loss_weight": 0.5,
    "pixel_loss_max_t": 0.9,
    "ssim_loss_weight": 0.5,
    "ssim_loss_max_t": 0.9,
}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "pixel_space": PIXEL_SPACE | {"ssim_grad_clamp": 0.1, "gradient_accumulation_steps": 2},
    "balance": PIXEL_SPACE | {"pixel_space_balance": 0.5},
    "freeze_und": PIXEL_SPACE | {"freeze_und": True},
    "spikes": {"spike_sigma": 6.0, "spike_warmup_steps": 1, "ce_loss_reweighting": True},
    "bf16": PIXEL_SPACE | {"bf16": True, "activation_checkpointing": True, "freeze_vit": True},
    "lora": {"lora_rank": 2, "vit_cond_dropout_prob": 1, "vae_cond_dropout_prob": 1},
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_reads_nothing_from_the_device(case, checkpoint, mixture, tmp_path):
    args = run_arguments(checkpoint, mixture, tmp_path / "run", log_every=100, **CASES[case])
    found = steps(build_trainer(args), tmp_path, 3)
    assert set(found.waits) <= set(EXPECTED)
    for place, operations in found.waits.items():
        assert len(operations) == 1, (place, EXPECTED[place])
    assert len(found.storages) > 1000


def test_waits_are_seen(checkpoint, mixture, tmp_path):
    """As those of a log line."""
    trainer = build_trainer(run_arguments(checkpoint, mixture, tmp_path / "run"))
    found = steps(trainer, tmp_path, 1)
    found.waits.clear()
    (counter, *_), (average, *_) = trainer.guard.counters.values(), trainer.ema.averages
    with found, Transfers(found):
        trainer.guard.end_window()
        assert {*found.waits} == {("train/guard.py", "state_dict")}
        for wait in (
            lambda: bool(counter > 0),
            lambda: float(counter * 2),
            lambda: average[average > 0],
            lambda: average.clone().cpu(),
            lambda: average.sum().numpy(),
        ):
            found.waits.clear()
            wait()
            assert found.waits
