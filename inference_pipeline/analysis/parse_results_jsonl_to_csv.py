"""Means of every results.jsonl below some directories, by task and degradation."""

import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from inference_pipeline import results  # noqa: E402
from inference_pipeline.summary import summary  # noqa: E402


def rows(entry: Path, folder: Path) -> Iterator[dict[str, Any]]:
    """One row for every task and degradation in a folder below `entry`."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for result in results.read_results(folder):
        groups[str(result.get("main_task_type")), str(result.get("degrade_type"))].append(result)
    settings = results.read_settings(folder)
    names = {"entry_dir": entry.resolve().name, "checkpoint": settings["model_id"]}
    names["dataset_type"] = settings["split"]
    for (task, degradation), group in sorted(groups.items()):
        numbers = summary(group, settings["protocols"], intervals=False)
        count = numbers.pop("total_samples") - numbers["n_failed"]
        row = names | {"main_task_type": task, "degrade_type": degradation, "count": count}
        yield row | numbers | {"protocol": ", ".join(settings["protocols"])}


if __name__ == "__main__":
    flags = ("-i", "--input_dirs")
    table = partial(results.write_table, __doc__, flags, "results.csv", results.RESULTS, rows)
    results.command(table)
