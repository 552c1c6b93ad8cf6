"""What is trained and what is frozen: told before the first step, checked after it."""

import re
from collections import Counter

import torch
from torch import Tensor

from modeling.autoencoder import VAE_PREFIX
from modeling.bagel.bagel import Bagel
from modeling.pretrained import saved_names

from .arguments import RunArguments
from .backends import MOMENTS, Backend
from .optim import fate_of, group_of


def parameter_lines(model: Bagel, args: RunArguments) -> list[str]:
    """A line for all parameters that differ in their layer only: how many, name, shape, and
    their group and learning rate or the argument that freezes them. The autoencoder is one line."""
    found: Counter[tuple[str, str, str]] = Counter()
    for name, parameter in model.named_parameters():
        fate = fate_of(name, args)
        if name.startswith(VAE_PREFIX):
            found[f"{VAE_PREFIX}*", "", fate] += 1
        else:
            found[re.sub(r"\.\d+\.", ".*.", name), str(tuple(parameter.shape)), fate] += 1
    return [
        f"{count:4d} x {name:70s} {shape:16s} {fate}"
        for (name, shape, fate), count in found.items()
    ]


Checksum = tuple[int, float]


def checksum(tensor: Tensor) -> Checksum:
    """Sum of the bits and norm of a float32 tensor: one changed bit shows."""
    bits = tensor.detach().float().contiguous().view(torch.int32).sum(dtype=torch.int64)
    return int(bits), float(torch.linalg.vector_norm(tensor.detach(), dtype=torch.float64))


class FreezingCheck:
    """Whether the first optimizer step moves what is trained and nothing else.

    All ranks have to call each method; whole tensors are gathered one after the other.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend, self.updates = backend, backend.steps()
        self.before = self._checksums()
        self.done = False

    def _checksums(self) -> dict[str, Checksum]:
        backend, vae = self.backend, self.backend.model.vae.named_parameters(VAE_PREFIX[:-1])
        own = saved_names(backend.model.config, backend.sizes)
        return {name: checksum(backend.full(name)) for name in own} | {
            name: checksum(parameter) for name, parameter in vae
        }

    def after_step(self) -> None:
        """Looks once, after the first step that was not skipped.

        Raises ValueError on all ranks that names what should have moved and has not, or the
        reverse.
        """
        if self.done or self.backend.steps() == self.updates:
            return
        self.done = True
        after = self._checksums()
        moved = {name for name in after if after[name] != self.before[name]}
        wrong = {
            "frozen, and moved": sorted(moved - self.backend.weights.keys()),
            "trained, and not moved": [
                name
                for name in self.backend.weights
                if self._has_to_move(name) and name in after and name not in moved
            ],
        }
        if any(wrong.values()):
            told = [f"{what}: {', '.join(names)}" for what, names in wrong.items() if names]
            raise ValueError(f"validate_freezing: after the first step {'; '.join(told)}")

    @torch.no_grad()
    def _has_to_move(self, name: str) -> bool:
        """Whether AdamW's step of any element is more than its rounding."""
        backend, args = self.backend, self.backend.args
        rates = {group["name"]: group["lr"] for group in backend.optimizer.param_groups}
        mean, square = (backend.moment(name, kind) for kind in MOMENTS)
        steps = backend.steps()
        mean = mean / (1 - args.beta1**steps)
        deviation = (square / (1 - args.beta2**steps)).sqrt()
        step = rates[group_of(name, args)] * mean / (deviation + args.eps)
        rounding = torch.finfo(torch.float32).eps * backend.full(name).abs()
        return bool((step.abs() > rounding).any())
