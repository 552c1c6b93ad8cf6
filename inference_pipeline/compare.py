"""Is B better than A? `python -m inference_pipeline.compare results/A results/B --number psnr`"""

import argparse
from pathlib import Path

from .metrics import describe
from .results import command, read_results, read_settings
from .summary import CONFIDENCE, paired
from .text_metrics import TEXT_PROTOCOLS


def protocol_of(number: str, *protocols: str) -> str:
    """What a number means, given the first protocol of each run; ValueError when they differ."""
    if number in TEXT_PROTOCOLS:
        return TEXT_PROTOCOLS[number]
    if ":" in number:
        protocols = (number.split(":")[0],)
    if len({*protocols}) > 1:
        raise ValueError(f"{number} is by {protocols[0]!r} in A and by {protocols[1]!r} in B")
    return describe(protocols[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("a", type=Path, help="folder of results")
    parser.add_argument("b", type=Path, help="folder of results of the same test set")
    parser.add_argument("--number", default="psnr", help="a number of results.jsonl")
    args = parser.parse_args()
    a, b = read_settings(args.a), read_settings(args.b)
    print(f"{args.number} of A {a['model_id']} and B {b['model_id']} on {a['split']}")
    print(protocol_of(args.number, a["protocols"][0], b["protocols"][0]))
    results = read_results(args.a), read_results(args.b)
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
        print(f"({CONFIDENCE:.0%}), p {found.p:.2g}, {found.n} samples", end=", without ")
        print(f"{found.n_failed} failed, {found.n_missing} missing, {found.n_equal} equal images")


if __name__ == "__main__":
    command(main)
