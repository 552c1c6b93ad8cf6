"""Means with their uncertainty, and the comparison of two checkpoints on one test set.

The PSNR of equal images is infinite. The users' definition puts PSNR_OF_EQUAL_IMAGES into the
mean, and so does `summarise` for `medq`; for other protocols it leaves these images out. Either
way `n_equal<kind>` says how many there are.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from scipy.stats import bootstrap, wilcoxon

from data.scores import PSNR_OF_EQUAL_IMAGES

from .metrics import PROTOCOL, known, number_names

Result = Mapping[str, Any]
"""One line of results.jsonl."""
CONFIDENCE, RESAMPLES, SEED = 0.95, 2000, 0
BATCH = 2**20
"""Values that are resampled at once."""


def summarise(results: Sequence[Result], protocols: Sequence[str] = (PROTOCOL,)) -> dict[str, Any]:
    """The content of statistics.json: overall, by task and by degradation."""
    groups: dict[str, Any] = {"overall": summary(results, protocols)}
    for group, key in (("by_task_type", "main_task_type"), ("by_degrade_type", "degrade_type")):
        parts: dict[str, list[Result]] = defaultdict(list)
        for result in results:
            parts[str(result.get(key))].append(result)
        groups[group] = {name: summary(part, protocols) for name, part in sorted(parts.items())}
    timestamp = datetime.now(UTC).isoformat(timespec="seconds")
    return {"protocol": ", ".join(protocols), **groups, "timestamp": timestamp}


def summary(
    results: Sequence[Result], protocols: Sequence[str] = (PROTOCOL,), intervals: bool = True
) -> dict[str, Any]:
    """Means, deviations and intervals of a group; failed samples are counted apart.

    The bicubic enlargement has a mean only where all samples of the group have one.
    """
    good = [r for r in results if "error" not in r]
    found: dict[str, Any] = {"total_samples": len(results), "n_failed": len(results) - len(good)}
    for name in number_names(protocols):
        given = np.array([r[name] for r in good if name in r], np.float64)
        values = given[~np.isnan(given)]
        if len(values) < len(given):
            found[f"{name}_missing"] = len(given) - len(values)
        if name.endswith("_bicubic") and len(values) < len(good):
            continue  # beside the mean over all samples it would mislead
        finite = values[_is_finite(name, values)]
        if len(finite) < len(values):
            found[name.replace("psnr", "n_equal")] = len(values) - len(finite)
        if (protocols[0] if ":" not in name else name.split(":")[0]) != "medq":
            values = finite
        if len(values):
            found[f"{name}_mean"] = float(np.mean(values))
            found[f"{name}_std"] = float(np.std(values))
        if len(values) > 1 and intervals:
            found[f"{name}_ci{100 * CONFIDENCE:.0f}"] = [*interval(values)]
    if seconds := [r["inference_time"] for r in good if r.get("inference_time") is not None]:
        found["avg_inference_time"] = float(np.mean(seconds))
    return found


def interval(values: np.ndarray) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of (n,) values, n at least 2; always the same."""
    options: dict[str, Any] = {"method": "percentile", "batch": max(1, BATCH // len(values))}
    options |= {"confidence_level": CONFIDENCE, "n_resamples": RESAMPLES, "rng": SEED}
    found = bootstrap((values,), np.mean, **options).confidence_interval
    return float(found.low), float(found.high)


@dataclass(frozen=True)
class Paired:
    """Two runs over the samples that both restored; failed, equal, missing ones are left out."""

    n: int
    n_failed: int
    n_equal: int
    n_missing: int
    mean_a: float
    mean_b: float
    difference: float
    """Mean of B - A."""
    interval: tuple[float, float]
    p: float
    """Of Wilcoxon's signed-rank test, two-sided."""


def paired(a: Sequence[Result], b: Sequence[Result], number: str = "psnr") -> Paired:
    """Compares a number of two runs, sample by sample.

    Raises ValueError when the test sets differ, when the number stands in one run alone, and when
    fewer than two samples are left.
    """
    rows_a, rows_b = ({r["sample_id"]: r for r in results} for results in (a, b))
    for i in rows_a | rows_b:
        found = [rows[i] for rows in (rows_a, rows_b) if i in rows]
        if len(found) == 2 and same_sample(*found):
            continue
        one, other = (str(input_paths(rows[i])) if i in rows else "-" for rows in (rows_a, rows_b))
        what = f"images of sample {i}, {one}, changed"
        what = what if one == other else f"sample {i!r} is {one} and {other}"
        raise ValueError(f"the test sets differ: {what}")
    pairs = [(rows_a[i], rows_b[i]) for i in rows_a]
    good = [pair for pair in pairs if not any("error" in r for r in pair)]
    numbers = {k for pair in good for r in pair for k, v in r.items() if isinstance(v, int | float)}
    known(number, numbers, "number")
    measured = [pair for pair in good if any(number in r for r in pair)]
    if not all(number in r for pair in measured for r in pair):
        raise ValueError(f"{number} stands in one run alone: measure both by the same protocols")
    values = np.array([[r[number] for r in pair] for pair in measured], np.float64)
    there = values[~np.isnan(values).any(1)]
    finite = there[_is_finite(number, there).all(1)]
    if len(finite) < 2:
        raise ValueError(f"{number}: too few samples to compare: {len(finite)}")
    difference = finite[:, 1] - finite[:, 0]
    return Paired(
        n=len(finite),
        n_failed=len(pairs) - len(good),
        n_equal=len(there) - len(finite),
        n_missing=len(values) - len(there),
        mean_a=float(finite[:, 0].mean()),
        mean_b=float(finite[:, 1].mean()),
        difference=float(difference.mean()),
        interval=interval(difference),
        p=float(wilcoxon(difference).pvalue) if difference.any() else 1.0,
    )


def same_sample(a: Result, b: Result) -> bool:
    """Whether two results are of one sample, by names and content."""
    # Empty for images that could not be read, absent in folders of the users' scripts.
    images = {result["images"] for result in (a, b) if result.get("images")}
    return input_paths(a) == input_paths(b) and len(images) < 2


def input_paths(result: Result) -> list[Any]:
    """Paths of a sample's inputs, which the users' results name with their sizes, or alone."""
    refs = result.get("input_img")
    each = refs if isinstance(refs, list) else [refs]
    return [ref.get("path") if isinstance(ref, dict) else ref for ref in each]


def _is_finite(name: str, values: np.ndarray) -> np.ndarray:
    return (values != PSNR_OF_EQUAL_IMAGES) | (not name.split(":")[-1].startswith("psnr"))
