"""Samples that cannot be used: why, and how many are too many."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from PIL import Image

from .records import RecordError

MIN_BAD = 10
TOO_LONG = "too_long"


class Bad(NamedTuple):
    """A sample that cannot be used."""

    dataset: int
    reason: str
    message: str


class Tally:
    """How many samples of each data set are bad, by reason, each with its first message."""

    def __init__(self, found: list[dict[str, list[Any]]]) -> None:
        """Begins with a copy of what another one has found."""
        self.found = [{reason: [*entry] for reason, entry in known.items()} for known in found]

    @classmethod
    def of(cls, datasets: int) -> "Tally":
        return cls([{} for _ in range(datasets)])

    def add(self, bad: Bad, times: int = 1) -> None:
        self.found[bad.dataset].setdefault(bad.reason, [0, bad.message])[0] += times

    def by_name(self, names: Sequence[str]) -> Counter[str]:
        """Counts by `data set/reason`."""
        total: Counter[str] = Counter()
        for name, found in zip(names, self.found, strict=True):
            total.update({f"{name}/{reason}": times for reason, (times, _) in found.items()})
        return total

    def require_few(self, names: Sequence[str], seen: Sequence[int], share: float) -> None:
        """Raises ValueError when a data set has more bad samples than that share of those seen,
        and at least MIN_BAD. Samples that are too long do not count."""
        for name, number, found in zip(names, seen, self.found, strict=True):
            reasons = sorted((n, r, text) for r, (n, text) in found.items() if r != TOO_LONG)
            bad = sum(times for times, _, _ in reasons)
            if bad >= MIN_BAD and bad > share * number:
                worst = "; ".join(f"{n} {r}, first {text}" for n, r, text in reversed(reasons))
                raise ValueError(
                    f"{name}: {bad} of {number} samples cannot be used, more than "
                    f"max_bad_share={share}: {worst}"
                )


def reason_of(error: ValueError) -> str:
    """In a word, why a record (RecordError) or an image (ImageError) cannot be used."""
    if isinstance(error, RecordError):
        return "bad_record"
    if isinstance(error.__cause__, FileNotFoundError):
        return "missing_image"
    oversized = isinstance(error.__cause__, Image.DecompressionBombError)
    return "oversized_image" if oversized else "unreadable_image"
