"""One row for every statistics.json below some directories."""

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from inference_pipeline import results  # noqa: E402

NUMBERS = ("psnr_mean", "psnr_std", "ssim_mean", "ssim_std")


def rows(_: Path, folder: Path) -> Iterator[dict[str, Any]]:
    """Overall numbers, then those of each task, under the column names that users read."""
    statistics = results.read_statistics(folder)
    overall, settings = statistics["overall"], results.read_settings(folder)
    row = {k: settings[k] for k in ("model_id", "split")}
    row |= {k: overall.get(k) for k in ("total_samples", *NUMBERS, "avg_inference_time")}
    for i, (task, summary) in enumerate(statistics["by_task_type"].items(), start=1):
        row |= {f"task{i}_type": task, f"task{i}_count": summary["total_samples"]}
        row |= {f"task{i}_{name}": summary.get(name) for name in NUMBERS}
        row["timestamp"] = statistics.get("timestamp")  # their tables have it behind the first task
    protocol = statistics.get("protocol", settings["protocols"][0])
    yield row | {"n_failed": overall.get("n_failed"), "protocol": protocol}


if __name__ == "__main__":
    flags = ("-d", "--directories")
    table = partial(results.write_table, __doc__, flags, "summary.csv", results.STATISTICS, rows)
    results.command(table)
