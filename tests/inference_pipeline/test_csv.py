"""The two tables that users read, from files as the batch inference writes them."""

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from inference_pipeline.summary import summarise

ROOT = Path(__file__).parents[2] / "inference_pipeline"
STATISTICS = ROOT / "parse_statistics_to_csv.py"
RESULTS = ROOT / "analysis" / "parse_results_jsonl_to_csv.py"


def result(task: str, kind: str, psnr: float, ssim: float) -> dict:
    numbers = {"psnr": psnr, "ssim": ssim, "psnr_input": psnr - 1, "inference_time": 0.5}
    return {"main_task_type": task, "degrade_type": kind} | numbers


ONE = [result("denoising", "low", 20, 0.5), result("denoising", "high", 30, 0.7)]
TWO = [result("sr", "4x", 25, 0.75), *ONE, {"main_task_type": "sr", "error": "x"}]


@pytest.fixture
def run(tmp_path):
    """A run with two steps on one test set; the first folder has no settings."""
    for step, results in (("0002000", ONE), ("0004000", TWO)):
        path = tmp_path / "run" / step / "ixi, t1"
        path.mkdir(parents=True)
        numbered = [{"sample_id": i} | r for i, r in enumerate(results)]
        (path / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in numbered))
        statistics = summarise(results) | {"timestamp": "now"}
        (path / "statistics.json").write_text(json.dumps(statistics))
    settings = {"model_id": "run/0004000", "split": "ixi_t1", "protocols": ["medq"]}
    (path / "settings.json").write_text(json.dumps(settings))
    return tmp_path / "run"


def table(script: Path, *arguments: object) -> tuple[str, list[dict[str, str]]]:
    command = [sys.executable, str(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    with Path(arguments[-1]).open(newline="") as file:
        return done.stdout, list(csv.DictReader(file))


def error(script: Path, *arguments: object) -> str:
    command = [sys.executable, str(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    return done.stderr


def test_one_row_for_every_statistics_file(run, tmp_path):
    output, rows = table(STATISTICS, "-v", "-d", run, "-o", tmp_path / "tables" / "summary.csv")
    first, second = rows
    numbers = ["psnr_mean", "psnr_std", "ssim_mean", "ssim_std"]
    tasks = [[f"task{i}_{name}" for name in ("type", "count", *numbers)] for i in (1, 2)]
    head = ["model_id", "split", "total_samples", *numbers, "avg_inference_time"]
    assert [*first] == [*head, *tasks[0], "timestamp", *tasks[1], "n_failed", "protocol"]
    assert (first["model_id"], first["split"]) == ("0002000", "ixi, t1")
    assert (second["model_id"], second["split"]) == ("run/0004000", "ixi_t1")
    assert [float(first[k]) for k in numbers] == pytest.approx([25, 5, 0.6, 0.1])
    assert (first["total_samples"], first["timestamp"], first["task2_type"]) == ("2", "now", "")
    assert (second["task1_type"], second["task1_count"]) == ("denoising", "2")
    assert (second["task2_type"], second["task2_psnr_mean"]) == ("sr", "25.0")
    assert (second["total_samples"], second["n_failed"], second["protocol"]) == ("4", "1", "medq")
    assert float(second["avg_inference_time"]) == 0.5
    assert output.count("statistics.json") == 2 and "2 rows in" in output


def test_rows_of_results_by_task_and_degradation(run, tmp_path):
    _, rows = table(RESULTS, "--input_dirs", run, run / "0002000", "-o", tmp_path / "results.csv")
    names = ["entry_dir", "checkpoint", "dataset_type", "main_task_type", "degrade_type", "count"]
    numbers = [
        "psnr_mean",
        "psnr_std",
        "psnr_input_mean",
        "psnr_input_std",
        "ssim_mean",
        "ssim_std",
    ]
    assert [*rows[0]] == [*names, *numbers, "avg_inference_time", "n_failed", "protocol"]
    places = [tuple(row[name] for name in names) for row in rows]
    later = ("run", "run/0004000", "ixi_t1")
    assert places == [
        ("run", "0002000", "ixi, t1", "denoising", "high", "1"),
        ("run", "0002000", "ixi, t1", "denoising", "low", "1"),
        (*later, "denoising", "high", "1"),
        (*later, "denoising", "low", "1"),
        (*later, "sr", "4x", "1"),
        (*later, "sr", "None", "0"),
        ("0002000", "0002000", "ixi, t1", "denoising", "high", "1"),
        ("0002000", "0002000", "ixi, t1", "denoising", "low", "1"),
    ]
    assert [row["n_failed"] for row in rows] == ["0"] * 5 + ["1", "0", "0"]
    assert math.isclose(float(rows[0]["psnr_mean"]), 30) and rows[5]["psnr_mean"] == ""


def test_a_number_that_is_missing_is_counted(run, tmp_path):
    lines = run / "0002000" / "ixi, t1" / "results.jsonl"
    lines.write_text(lines.read_text().replace('"psnr": 30', '"psnr": NaN'))
    _, (high, low, *_) = table(RESULTS, "-i", run / "0002000", "-o", tmp_path / "results.csv")
    assert (high["psnr_mean"], high["psnr_missing"], high["ssim_mean"]) == ("", "1", "0.7")
    assert (low["psnr_mean"], low["psnr_missing"]) == ("20.0", "")


def test_mistakes_are_one_line(run, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "empty: no statistics.json in it (--directories)" in error(
        STATISTICS, "-d", run, tmp_path / "empty"
    )
    lines = run / "0002000" / "ixi, t1" / "results.jsonl"
    lines.write_text(lines.read_text()[:-9])
    message = error(RESULTS, "-i", run, "-o", tmp_path / "results.csv")
    assert message.startswith(f"error: {lines}:2: ") and not (tmp_path / "results.csv").exists()
