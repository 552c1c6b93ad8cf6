"""Which part of a training set patients, and slices of a single volume, go into."""

import numpy as np

PARTS = ("train", "val", "test")


def split_patients(patients: set[str], val: float, test: float, seed: int) -> dict[str, str]:
    """The part of every patient; ValueError where none is left to train with."""
    order = np.random.default_rng(seed).permutation(sorted(patients)).tolist()
    counts = [max(1, round(share * len(order))) if share else 0 for share in (test, val)]
    if sum(counts) >= len(order):
        raise ValueError(f"{len(order)} patients are too few for --val {val} and --test {test}")
    parts = ["test"] * counts[0] + ["val"] * counts[1]
    return dict(zip(order, parts + ["train"] * (len(order) - len(parts)), strict=True))


def split_slices(
    count: int, val: float, test: float, gap: int, test_slices: tuple[int, int] | None = None
) -> list[str | None]:
    """The part of every slice of a single volume; None is in a gap.

    The test slab is `test_slices`, from the first to before the second, or the middle; the slab of
    val is below it. Raises ValueError where the slices do not suffice.
    """
    sizes = {p: max(1, round(s * count)) if s else 0 for p, s in (("val", val), ("test", test))}
    middle = (count - sizes["test"]) // 2
    start, stop = test_slices or (middle, middle + sizes["test"])
    slabs = {"test": range(start, stop)}
    if val:
        slabs["val"] = range(start - gap - sizes["val"], start - gap)
    near = {i + d for slab in slabs.values() for i in slab for d in range(-gap, gap + 1)}
    parts = [
        next((p for p, slab in slabs.items() if i in slab), None if i in near else "train")
        for i in range(count)
    ]
    if not near <= {*range(-gap, count + gap)} or "train" not in parts:
        raise ValueError(f"{count} slices: too few for --val, --test, --gap and --test_slices")
    return parts
