"""Means, intervals and paired comparisons against hand-computed and independent values."""

import json
import math
import sys

import numpy as np
import pytest
from scipy.stats import norm, wilcoxon

from data.scores import PSNR_OF_EQUAL_IMAGES
from inference_pipeline import compare
from inference_pipeline.summary import interval, paired, summarise


def result(i: int, task: str = "denoising", kind: str = "noise", **others: object) -> dict:
    place = {"sample_id": i, "input_img": [{"path": f"{i}.png"}]}
    return place | {"main_task_type": task, "degrade_type": kind, "inference_time": 2.0} | others


def failed(i: int) -> dict:
    return {k: v for k, v in result(i).items() if k != "inference_time"} | {"error": "x"}


def test_groups_by_hand():
    results = [
        result(0, psnr=20.0, ssim=0.5, psnr_input=10.0),
        result(1, psnr=30.0, ssim=0.7, psnr_input=14.0),
        result(2, "sr", "4x", psnr=40.0, ssim=0.9, psnr_bicubic=35.0),
        failed(3),
    ]
    found = summarise(results)
    overall, sr = found["overall"], found["by_task_type"]["sr"]
    assert (overall["total_samples"], overall["n_failed"]) == (4, 1)
    assert overall["psnr_mean"] == 30 and overall["avg_inference_time"] == 2
    assert overall["psnr_std"] == pytest.approx(math.sqrt(200 / 3))
    assert overall["psnr_input_mean"] == 12 and overall["psnr_input_std"] == 2
    assert overall["ssim_mean"] == pytest.approx(0.7)
    assert sr["psnr_bicubic_mean"] == 35 and "psnr_ci95" not in sr  # one sample has no interval
    assert list(found["by_task_type"]) == ["denoising", "sr"]
    assert found["by_degrade_type"]["noise"] == found["by_task_type"]["denoising"]
    assert found["by_degrade_type"]["noise"]["total_samples"] == 3
    assert found["protocol"] == "medq" and "n_equal" not in overall
    # Any two of the two values, equally often: the mean is 20, 25, 25 or 30.
    assert found["by_task_type"]["denoising"]["psnr_ci95"] == [20, 30]
    assert json.loads(json.dumps(found)) == found


def test_statistics_without_any_success():
    summary = summarise([{"sample_id": 0, "error": "x"}])
    assert summary["overall"] == {"total_samples": 1, "n_failed": 1}
    assert list(summary["by_task_type"]) == ["None"]


def test_infinite_psnr_is_in_the_mean_of_medq_alone():
    equal = dict.fromkeys(("psnr", "standard:psnr", "psnr_input"), PSNR_OF_EQUAL_IMAGES)
    other = dict.fromkeys(("psnr", "standard:psnr"), 30.0) | {"psnr_input": 20.0}
    found = summarise([result(0, **equal), result(1, **other)], ["medq", "standard"])["overall"]
    assert found["psnr_mean"] == (30 + PSNR_OF_EQUAL_IMAGES) / 2
    assert found["standard:psnr_mean"] == 30 and "standard:psnr_ci95" not in found
    assert found["n_equal"] == found["n_equal_input"] == found["standard:n_equal"] == 1
    assert (
        summarise([result(0, **equal), result(1, **other)], ["amir"])["overall"]["psnr_mean"] == 30
    )


def test_intervals_against_theory_and_a_plain_bootstrap():
    rng = np.random.default_rng(1)
    values = rng.normal(30, 3, 500)
    low, high = interval(values)
    half = norm.ppf(0.975) * values.std() / math.sqrt(len(values))
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.04)
    skewed = rng.exponential(1, 30)
    plain = [rng.choice(skewed, len(skewed)).mean() for _ in range(20000)]
    assert interval(skewed) == pytest.approx(np.quantile(plain, (0.025, 0.975)), abs=0.03)
    assert interval(skewed) == interval(skewed)
    assert interval(np.full(5, 7.0)) == (7, 7)


def test_intervals_cover_the_mean_as_often_as_they_say():
    rng = np.random.default_rng(2)
    found = [interval(rng.normal(0, 1, 60)) for _ in range(300)]
    assert 0.91 <= np.mean([low <= 0 <= high for low, high in found]) <= 0.98


def test_paired_by_hand():
    a = [result(i, psnr=20.0 + 5 * i) for i in range(6)]
    b = [result(i, psnr=21.0 + 5 * i + 0.1 * i) for i in reversed(range(6))]
    found = paired(a, b)
    assert (found.n, found.n_failed, found.n_equal) == (6, 0, 0)
    assert found.difference == pytest.approx(1.25) and found.mean_a == 32.5
    assert found.mean_b == pytest.approx(found.mean_a + found.difference)
    assert found.p == pytest.approx(2 / 2**6)  # six of six signs
    assert 1 <= found.interval[0] < 1.25 < found.interval[1] <= 1.5
    back = paired(b, a)
    assert back.difference == -found.difference and back.p == found.p
    assert paired(a, a).p == 1 and paired(a, a).interval == (0, 0)


def test_pairs_see_what_means_hide():
    """A small gain on every sample of a test set of very different samples."""
    rng = np.random.default_rng(3)
    base = rng.normal(30, 6, 80)
    gain = rng.normal(0.3, 0.4, 80)
    a = [result(i, psnr=x) for i, x in enumerate(base)]
    b = [result(i, psnr=x) for i, x in enumerate(base + gain)]
    found, of_a = paired(a, b), interval(base)
    assert of_a[0] < found.mean_b < of_a[1]
    assert 0 < found.interval[0] < 0.3 < found.interval[1] and found.p < 1e-4
    assert found.p == pytest.approx(wilcoxon(gain).pvalue, rel=1e-6)


def test_what_pairs_leave_out():
    a = [result(0, psnr=20.0), result(1, psnr=30.0), result(2, psnr=31.0), failed(3)]
    b = [failed(0), result(1, psnr=31.0), result(2, psnr=34.0), result(3, psnr=9.0)]
    a.append(result(4, psnr=40.0))
    b.append(result(4, psnr=PSNR_OF_EQUAL_IMAGES))
    found = paired(a, b)
    assert (found.n, found.n_failed, found.n_equal, found.difference) == (2, 2, 1, 2.0)


def test_missing_numbers_are_left_out_and_counted():
    """NaN in a results folder is None when it is read."""
    a = [result(i, psnr=20.0 + i, ssim=0.5) for i in range(5)]
    b = [r | {"psnr": r["psnr"] + 1} for r in a]
    a[0]["psnr"] = b[0]["psnr"] = None
    b[1] |= {"psnr": math.nan, "inference_time": None}
    found = paired(a, b)
    assert (found.n, found.n_missing, found.n_equal, found.n_failed) == (3, 2, 0, 0)
    assert (found.mean_a, found.mean_b, found.difference) == (23.0, 24.0, 1.0)
    overall = summarise(b)["overall"]
    assert (overall["psnr_mean"], overall["psnr_missing"]) == (24.0, 2)
    assert overall["ssim_mean"] == 0.5 and "ssim_missing" not in overall
    assert overall["avg_inference_time"] == 2
    none = summarise([a[0]])["overall"]
    assert none["psnr_missing"] == 1 and "psnr_mean" not in none


def test_names_of_samples_may_be_numbers_and_texts():
    a = [result(i, psnr=20.0 + i) for i in range(3)]
    a[1]["sample_id"] = "1"
    assert paired(a, a).n == 3
    other = [r | {"sample_id": int(r["sample_id"])} for r in a]
    with pytest.raises(ValueError, match=r"test sets differ: sample '1' is \['1.png'\] and -$"):
        paired(a, other)


def test_what_cannot_be_paired():
    a = [result(i, psnr=20.0 + i, ssim=0.5) for i in range(3)]
    other = [*a[:2], a[2] | {"input_img": [{"path": "other.png"}]}]
    with pytest.raises(ValueError, match=r"test sets differ: sample 2 is .*2\.png.*other\.png"):
        paired(a, other)
    seen, changed = ([r | {"images": f"{r['sample_id']}{x}"} for r in a] for x in "ab")
    assert paired(seen, seen).n == paired(seen, a).n == 3
    with pytest.raises(
        ValueError, match=r"test sets differ: images of sample 0, .*0\.png.*changed"
    ):
        paired(seen, changed)
    sized = [r | {"input_img": [x | {"height": 9} for x in r["input_img"]]} for r in a]
    alone = [r | {"input_img": r["input_img"][0]} for r in a]
    assert paired(a, sized).n == paired(a, alone).n == 3
    with pytest.raises(ValueError, match="test sets differ: sample 0"):
        paired(alone, [r | {"input_img": {"path": "other.png"}} for r in a])
    with pytest.raises(ValueError, match="test sets differ: sample 2 is .* and -"):
        paired(a, a[:2])
    with pytest.raises(ValueError, match="did you mean 'psnr'"):
        paired(a, a, "pnsr")
    with pytest.raises(ValueError, match="number 'input_img' is unknown"):
        paired(a, a, "input_img")
    renamed = [{("amir:ssim" if k == "ssim" else k): v for k, v in r.items()} for r in a]
    with pytest.raises(ValueError, match="ssim stands in one run alone"):
        paired(a, renamed, "ssim")
    with pytest.raises(ValueError, match="psnr: too few samples to compare: 1"):
        paired(a[:1], a[:1])


def folder(path, protocols: list[str], gain: float):
    path.mkdir()
    settings = {"model_id": f"run/{path.name}", "split": "test", "protocols": protocols}
    (path / "settings.json").write_text(json.dumps(settings))
    (path / "statistics.json").write_text("{}")
    tasks = ["denoising"] * 6 + ["sr"]
    lines = [result(i, t, psnr=20 + i + gain * (i + 1)) for i, t in enumerate(tasks)]
    (path / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))


def test_comparison_of_folders(tmp_path, monkeypatch, capsys):
    folder(tmp_path / "a", ["medq"], 0.0)
    folder(tmp_path / "b", ["medq", "amir"], 0.5)
    folder(tmp_path / "c", ["amir"], 0.5)
    monkeypatch.setattr(sys, "argv", ["compare", str(tmp_path / "a"), str(tmp_path / "b")])
    compare.main()
    title, protocol, overall, denoising, sr = capsys.readouterr().out.splitlines()
    assert title == "psnr of A run/a and B run/b on test" and protocol.startswith("medq: PSNR")
    # Gains of 0.5 to 3.5, all positive.
    assert overall.startswith("overall: A 23, B 25, B - A +2 [") and "p 0.016, 7 samples" in overall
    assert denoising.startswith("denoising: A 22.5, B 24.25, B - A +1.75 [")
    assert overall.endswith(", 7 samples, without 0 failed, 0 missing, 0 equal images")
    assert sr == "sr: psnr: too few samples to compare: 1"
    monkeypatch.setattr(sys, "argv", ["compare", str(tmp_path / "a"), str(tmp_path / "c")])
    with pytest.raises(ValueError, match="psnr is by 'medq' in A and by 'amir' in B"):
        compare.main()


def test_bicubic_has_a_mean_where_every_sample_has_one():
    """Its mean over some samples would stand beside means over all."""
    rows = [{"psnr": 20.0, "psnr_bicubic": 18.0, "main_task_type": "sr"}, {"psnr": 30.0}]
    statistics = summarise(rows)
    assert "psnr_bicubic_mean" not in statistics["overall"]
    assert statistics["by_task_type"]["sr"]["psnr_bicubic_mean"] == 18.0
