"""Is B better than A? `python -m inference_pipeline.compare results/A results/B --number psnr`"""

import argparse
from pathlib import Path

from .metrics import PROTOCOLS, TEXT_METRICS, describe
from .results import ResultFolder, command, read_results
from .statistics import CONFIDENCE, paired
from .text_metrics import TEXT_PROTOCOL


def protocol_of(number: str, a: ResultFolder, b: ResultFolder) -> str:
    """What a number of two folders means. Raises ValueError when their protocols differ."""
    if number in TEXT_METRICS:
        return TEXT_PROTOCOL
    ours, theirs = (number.split(":")[0] if ":" in number else f.protocols[0] for f in (a, b))
    if ours != theirs:
        raise ValueError(
            f"{number} is {ours!r} in {a.path} and {theirs!r} in {b.path}: use one protocol"
        )
    return describe(ours) if ours in PROTOCOLS else ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("a", type=Path, help="folder of results")
    parser.add_argument("b", type=Path, help="folder of results of the same test set")
    parser.add_argument("--number", default="psnr", help="a number of results.jsonl")
    args = parser.parse_args()
    a, b = ResultFolder.open(args.a), ResultFolder.open(args.b)
    print(f"{args.number} of A {a.model_id} and B {b.model_id} on {a.split}")
    print(protocol_of(args.number, a, b))
    results = read_results(a.path), read_results(b.path)
    for task in (None, *sorted({str(r.get("main_task_type")) for r in results[0]})):
        ours, theirs = (
            [r for r in x if task in (None, str(r.get("main_task_type")))] for x in results
        )
        try:
            found = paired(ours, theirs, args.number)
        except ValueError as error:
            if task is None:
                raise
            print(f"{task}: {error}")
            continue
        print(f"{task or 'overall'}: A {found.mean_a:.4g}, B {found.mean_b:.4g}", end=", ")
        print("B - A {:+.4g} [{:+.4g}, {:+.4g}]".format(found.difference, *found.interval), end=" ")
        print(f"({CONFIDENCE:.0%}), p {found.p:.2g}, {found.n} samples", end=", ")
        print(f"without {found.n_failed} failed and {found.n_equal} equal to the truth")


if __name__ == "__main__":
    command(main)
