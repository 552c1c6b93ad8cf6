"""How degradations are declared: a name, what a severity means, who described it."""

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Literal, NamedTuple, TypeVar

import numpy as np

Array = np.ndarray
Rng = np.random.Generator
Channels = Literal["grey", "colour", "any"]
Physics = TypeVar("Physics", bound=Callable[..., Array | tuple[Array, Array]])

SEVERITY_WORDS = ("mild", "moderate", "strong", "very strong")
"""Of equal parts of (0, 1]."""


class Parameter(NamedTuple):
    """A physical quantity as a function of severity."""

    unit: str
    at: Callable[[float], float]


def linear(none: float, worst: float, unit: str) -> Parameter:
    """From `none` at severity 0 to `worst` at 1."""
    return Parameter(unit, lambda severity: none + (worst - none) * severity)


def geometric(none: float, worst: float, unit: str) -> Parameter:
    """As `linear`, in equal ratios."""
    return Parameter(unit, lambda severity: none * (worst / none) ** severity)


def stepped(steps: tuple[int, ...], unit: str) -> Parameter:
    """One of the steps, each for an equal part of (0, 1]."""
    return Parameter(unit, lambda severity: steps[_part(severity, len(steps))])


def _part(severity: float, parts: int) -> int:
    return int(np.ceil(severity * parts)) - 1


@dataclass(frozen=True)
class Degradation:
    """One entry of DEGRADATIONS; its name is the key."""

    name: str
    task: str
    """What undoes it: the `main_task_type` of a record."""
    apply: Callable[..., Array | tuple[Array, Array]]
    """Clean image -> degraded, or (degraded, target); not clipped. Its docstring begins with
    "what: look". Its default arguments hold at every severity."""
    modalities: tuple[str, ...]
    """DICOM names; OP is fundus photography, SM slide microscopy."""
    reference: str
    channels: Channels
    varying: dict[str, Parameter]

    @property
    def in_hounsfield(self) -> bool:
        """Whether it simulates rays, and must know what 0 and 1 stand for."""
        return "calibration" in signature(self.apply).parameters

    def parameters(self, severity: float) -> dict[str, float]:
        """The physical parameters of a severity; ValueError when it is not in (0, 1]."""
        if not 0.0 < severity <= 1.0:
            raise ValueError(f"{self.name}: severity {severity} must be above 0 and at most 1")
        arguments = signature(self.apply).parameters.values()
        fixed = {a.name: a.default for a in arguments if a.default is not a.empty}
        return {name: p.at(severity) for name, p in self.varying.items()} | fixed

    def sentence(self, severity: float) -> str:
        """Such as "Gibbs ringing, mild: parallel lines beside sharp edges."."""
        what, _, look = (self.apply.__doc__ or "").partition("\n")[0].partition(":")
        return f"{what}, {SEVERITY_WORDS[_part(severity, len(SEVERITY_WORDS))]}:{look}"


DEGRADATIONS: dict[str, Degradation] = {}
"""Every degradation by name."""
_VARYING: dict[Callable, dict[str, Parameter]] = {}


def severity(**varying: Parameter) -> Callable[[Physics], Physics]:
    """Says which arguments of a function follow the severity. Stands below `degradation`."""

    def note(physics: Physics) -> Physics:
        _VARYING[physics] = varying
        return physics

    return note


def degradation(
    name: str, task: str, modalities: tuple[str, ...], reference: str, channels: Channels = "grey"
) -> Callable[[Physics], Physics]:
    """Enters a function into DEGRADATIONS."""

    def register(physics: Physics) -> Physics:
        entry = Degradation(
            name, task, physics, modalities, reference, channels, _VARYING.pop(physics)
        )
        DEGRADATIONS[name] = entry
        return physics

    return register
