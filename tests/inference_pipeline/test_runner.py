"""Batch inference with the checkpoint that ships, on held-out slices."""

import json
import math
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from data.scores import scores
from data.transforms import ResizeRule
from inference_pipeline.restorer import DEFAULT_RULES, Restorer
from inference_pipeline.runner import ResumeError, RunConfig, _claim_folder, run
from modeling.bagel.generation import SamplingConfig, TextConfig
from modeling.pretrained import PREPROCESSOR_FILE
from scripts.tiny.make_pairs import test_records as make_test_records
from tests.data.test_scans import dataset, written

CHECKPOINT = Path(__file__).parents[2] / "configs" / "tiny" / "checkpoint"
FAST = {"sampling": SamplingConfig(num_timesteps=2), "text": TextConfig(max_new_tokens=32)}


@pytest.fixture(scope="module")
def restorer():
    return Restorer.load(CHECKPOINT)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Two slices, both tasks: four samples."""
    folder = tmp_path_factory.mktemp("pairs")
    records = make_test_records(folder, every=20)
    (folder / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def config(pairs: Path, output: Path, **changes: object) -> RunConfig:
    common = {"annotation_file": pairs / "test.jsonl", "image_root": pairs, "output_dir": output}
    return RunConfig(**(common | FAST | changes))


def results(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]


def without_times(result: dict) -> dict:
    return {k: v for k, v in result.items() if k not in ("timestamp", "inference_time")}


@pytest.fixture(scope="module")
def finished(restorer, pairs, tmp_path_factory):
    output = tmp_path_factory.mktemp("finished")
    return output, run(restorer, config(pairs, output))


def test_held_out_slices_get_better(finished):
    """The issue's own measure, at half its distance: noise 55 %, resolution 1.3 dB over bicubic."""
    tasks = finished[1]["by_task_type"]
    noise, blur = tasks["denoising"], tasks["super-resolution"]
    distance = noise["psnr_ceiling_mean"] - noise["psnr_input_mean"]
    assert noise["psnr_mean"] - noise["psnr_input_mean"] > 0.55 * distance
    assert blur["psnr_mean"] > blur["psnr_bicubic_mean"] + 1.3
    for task in (noise, blur):
        assert task["ssim_mean"] > task["ssim_input_mean"]
        assert task["psnr_ceiling_mean"] > task["psnr_input_mean"] + 6


def test_every_number_and_image_is_written(finished, pairs):
    output, statistics = finished
    assert json.loads((output / "statistics.json").read_text()) == statistics
    assert statistics["overall"]["total_samples"] == 4
    assert statistics["overall"]["n_failed"] == 0
    assert statistics["protocol"] == "medq"
    for result in results(output):
        images = {
            kind: Image.open(output / result[key])
            for kind, key in (("pred", "pred_img"), ("GT", "saved_output_img"))
        }
        again = scores(images["pred"], images["GT"])
        assert again == {"psnr": result["psnr"], "ssim": result["ssim"]}
        assert ("psnr_bicubic" in result) == (result["main_task_type"] == "super-resolution")
    texts = {r["main_task_type"]: r["understanding_text"] for r in results(output)}
    assert texts["denoising"] == "Moderate noise."
    assert texts["super-resolution"] == "Low resolution, factor four."
    means = np.mean([r["psnr"] for r in results(output)])
    assert statistics["overall"]["psnr_mean"] == pytest.approx(means)


def test_failed_samples_are_counted_and_the_rest_goes_on(restorer, pairs, tmp_path):
    good = json.loads((pairs / "test.jsonl").read_text().splitlines()[0])
    whole = (pairs / good["input_img"][0]["path"]).read_bytes()
    (pairs / "cut.png").write_bytes(whole[: len(whole) // 2])
    (pairs / "dot.png").write_bytes(b"")
    bad = [
        "{no json",
        json.dumps(good | {"input_img": [{"path": "missing.png"}]}),
        json.dumps(good | {"input_img": [{"path": "cut.png"}]}),
        json.dumps(good | {"input_img": [{"path": "dot.png"}]}),
        json.dumps({k: v for k, v in good.items() if k != "output_img"}),
        json.dumps(good | {"message": [{"from": "human", "value": "<image>"}]}),
        json.dumps(good | {"input_img": [{"path": "n" * 300}]}),
        json.dumps(good | {"input_img": [{"path": "images"}]}),
        json.dumps(good | {"input_img": [{"path": "a\0b.png"}]}),
        json.dumps(good | {"main_task_type": "\ud800"}),
        "[" * 100_000,
    ]
    (tmp_path / "test.jsonl").write_text("\n".join([*bad, json.dumps(good)]) + "\n")
    statistics = run(
        restorer, config(pairs, tmp_path / "out", annotation_file=tmp_path / "test.jsonl")
    )
    assert statistics["overall"]["total_samples"] == 12
    assert statistics["overall"]["n_failed"] == 11
    assert {name: task["n_failed"] for name, task in statistics["by_task_type"].items()} == {
        good["main_task_type"]: 8,
        "None": 3,
    }
    errors = [r.get("error", "") for r in results(tmp_path / "out")]
    expected = [":1: no JSON", "missing.png", "cut.png", "dot.png", "output_img", "empty"]
    expected += ["n" * 300, "images", "null", "surrogate", ":11: no JSON", ""]
    assert all(part in error for part, error in zip(expected, errors, strict=True))


def test_lines_are_those_of_the_file(restorer, pairs, tmp_path):
    """Blank lines, bytes that are no text, separators inside a string, one input used twice."""
    good = json.loads((pairs / "test.jsonl").read_text().splitlines()[0])
    odd = good | {"message": [{"from": "human", "value": "Remove\u2028the\u0085noise."}]}
    lone = good | {"message": [{"from": "human", "value": "\ud800"}]}
    lines = [
        b"",
        json.dumps(good).encode(),
        b'{"a": "\xff"}',
        json.dumps(odd, ensure_ascii=False).encode(),
        json.dumps(lone).encode(),
    ]
    (tmp_path / "test.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    output = tmp_path / "out"
    run(restorer, config(pairs, output, annotation_file=tmp_path / "test.jsonl"))
    first, bytes_, second, surrogate = results(output)
    assert ":3: no JSON" in bytes_["error"] and ":5: a lone surrogate" in surrogate["error"]
    assert first["pred_img"] != second["pred_img"]
    (tmp_path / "test.jsonl").write_bytes(lines[1] + b"\n")
    with pytest.raises(ResumeError, match="another configuration"):
        run(restorer, config(pairs, output, annotation_file=tmp_path / "test.jsonl"))


def test_a_killed_run_goes_on_where_it_was(restorer, pairs, finished, tmp_path):
    expected = [without_times(r) for r in results(finished[0])]
    run(restorer, config(pairs, tmp_path, num_samples=2))
    lines = (tmp_path / "results.jsonl").read_text()
    (tmp_path / "results.jsonl").write_text(lines[:-40])  # killed while writing
    statistics = run(restorer, config(pairs, tmp_path))
    assert [without_times(r) for r in results(tmp_path)] == expected
    psnr = "psnr_mean"
    assert statistics["overall"][psnr] == pytest.approx(finished[1]["overall"][psnr], abs=1e-12)


def test_other_settings_do_not_share_a_folder(restorer, pairs, tmp_path):
    run(restorer, config(pairs, tmp_path, num_samples=1))
    for changes in ({"seed": 7}, {"sampling": SamplingConfig(num_timesteps=3)}):
        with pytest.raises(ResumeError, match="another configuration"):
            run(restorer, config(pairs, tmp_path, **changes))


def test_a_folder_is_of_one_content_wherever_it_lies(restorer, pairs, tmp_path):
    """Weights without a manifest, another dtype; but neither paths nor a copy of the same files."""
    folder = shutil.copytree(CHECKPOINT, tmp_path / "bare" / "checkpoint")
    (folder / "manifest.json").unlink()
    bare = Restorer.load(folder)
    for name, model in (("manifest", restorer), ("bare", bare)):
        output = tmp_path / name
        run(model, config(pairs, output, num_samples=1))
        before = results(output)
        root = shutil.copytree(pairs, tmp_path / f"moved_{name}")
        moved = config(root, output, num_samples=1)
        run(model, moved)
        assert results(output) == before
        wide = Restorer.load(model.report.folder, dtype=torch.float32)
        with pytest.raises(ResumeError, match="see dtype in settings.json"):
            run(wide, moved)
    weights = folder / "ema.safetensors"
    tensors = load_file(weights)
    save_file(tensors | {"llm2vae.bias": tensors["llm2vae.bias"] / 2}, weights)
    with pytest.raises(ResumeError, match="see checkpoint in settings.json"):
        run(Restorer.load(folder), config(pairs, tmp_path / "bare", num_samples=1))


def test_names_of_files_are_no_content(restorer, pairs, tmp_path):
    """A checkpoint, a test set and weights of LPIPS by other names; other weights at one path."""
    copy = Restorer.load(shutil.copytree(CHECKPOINT, tmp_path / "run" / "0000020"))
    test_set, weights = tmp_path / "renamed.jsonl", [tmp_path / "a.st", tmp_path / "b.st"]
    shutil.copy(pairs / "test.jsonl", test_set)
    for path in weights:
        path.write_bytes(b"same")
    run(restorer, config(pairs, tmp_path / "bytes", num_samples=1))
    crlf = (pairs / "test.jsonl").read_bytes().replace(b"\n", b"\r\n")
    test_set.write_bytes(crlf.strip())
    again = config(pairs, tmp_path / "bytes", num_samples=1, annotation_file=test_set)
    assert run(restorer, again)["overall"]["total_samples"] == 1
    lines, output = test_set.read_bytes().splitlines(), tmp_path / "out"
    first = config(pairs, output, lpips_weights=weights[0])
    _claim_folder(restorer, first, lines)
    other = config(pairs, output, lpips_weights=weights[1], annotation_file=test_set)
    _claim_folder(copy, other, lines)
    settings = json.loads((output / "settings.json").read_text())
    assert (settings["model_id"], settings["step"]) == ("run/0000020", 20)
    assert settings["split"] == "renamed"
    weights[1].write_bytes(b"other")
    with pytest.raises(ResumeError, match="see lpips in settings.json"):
        _claim_folder(copy, other, lines)


def test_images_that_are_away_do_not_cost_their_results(
    restorer, pairs, finished, tmp_path, capsys
):
    output = shutil.copytree(finished[0], tmp_path / "out")
    before = results(output)
    run(restorer, config(pairs, output, image_root=tmp_path / "not_mounted"))
    assert results(output) == before
    assert "the results of 4 samples stay, whose images cannot be read" in capsys.readouterr().out


def test_a_folder_of_others_is_left_as_it_is(restorer, pairs, tmp_path):
    (tmp_path / "results.jsonl").write_text('{"sample_id": 0, "psnr": 30.0}\n')
    with pytest.raises(ResumeError, match="results without settings.json"):
        run(restorer, config(pairs, tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "results.jsonl"}


def test_statistics_are_there_when_all_samples_are(restorer, pairs, tmp_path, monkeypatch):
    run(restorer, config(pairs, tmp_path, num_samples=2))
    assert (tmp_path / "statistics.json").exists()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("inference_pipeline.runner._Batch.restored", killed)
    with pytest.raises(KeyboardInterrupt):
        run(restorer, config(pairs, tmp_path))
    assert len(results(tmp_path)) == 2 and not (tmp_path / "statistics.json").exists()


def test_images_in_an_archive_have_a_digest_too(restorer, pairs, tmp_path):
    record = json.loads((pairs / "test.jsonl").read_text().splitlines()[0])
    shutil.make_archive(tmp_path / "images", "zip", pairs)
    for key in ("input_img", "output_img"):
        path = record[key][0]["path"]
        record[key] = [{"path": f"zip://{path}::{tmp_path / 'images.zip'}"}]
    (tmp_path / "test.jsonl").write_text(json.dumps(record) + "\n")
    test_set = tmp_path / "test.jsonl"
    run(restorer, config(pairs, tmp_path / "zipped", annotation_file=test_set))
    run(restorer, config(pairs, tmp_path / "plain", num_samples=1))
    zipped, plain = results(tmp_path / "zipped")[0], results(tmp_path / "plain")[0]
    assert zipped["psnr"] == plain["psnr"] and zipped["images"] == plain["images"] != ""


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_damaged_archive_costs_its_sample(restorer, pairs, tmp_path, method):
    """A wrong check sum, a stream that cannot be inflated."""
    record = json.loads((pairs / "test.jsonl").read_text().splitlines()[0])
    path, archive = record["input_img"][0]["path"], tmp_path / "images.zip"
    with zipfile.ZipFile(archive, "w", method) as opened:
        opened.write(pairs / path, path)
    content = bytearray(archive.read_bytes())
    start = 30 + len(path)
    content[start : start + 8] = b"\xff" * 8  # after the header of the member
    archive.write_bytes(content)
    record["input_img"] = [{"path": f"zip://{path}::{archive}"}]
    (tmp_path / "test.jsonl").write_text(json.dumps(record) + "\n")
    settings = config(pairs, tmp_path / "out", annotation_file=tmp_path / "test.jsonl")
    assert run(restorer, settings)["overall"] == {"total_samples": 1, "n_failed": 1}
    (found,) = results(tmp_path / "out")
    assert found["images"] == "" and found["error"].startswith(f"ImageError: zip://{path}::")
    assert ("Bad CRC-32" if method == zipfile.ZIP_STORED else "decompressing") in found["error"]


def test_samples_whose_images_have_changed_are_restored_anew(restorer, pairs, tmp_path):
    root = shutil.copytree(pairs, tmp_path / "pairs")
    run(restorer, config(root, tmp_path / "out"))
    before = results(tmp_path / "out")
    truth = root / before[1]["output_img"][0]["path"]
    Image.new("L", Image.open(truth).size, 90).save(truth)
    run(restorer, config(root, tmp_path / "out"))
    after = results(tmp_path / "out")
    changed = [a["psnr"] != b["psnr"] for a, b in zip(after, before, strict=True)]
    sharing = [r["output_img"] == before[1]["output_img"] for r in before]
    assert changed == sharing and changed[1] and not all(changed)
    few = run(restorer, config(root, tmp_path / "out", num_samples=1))["overall"]
    assert (few["total_samples"], few["psnr_mean"]) == (1, after[0]["psnr"])


def test_a_truth_of_another_shape_is_an_error_of_its_task(restorer, pairs, tmp_path):
    root = shutil.copytree(pairs, tmp_path / "pairs")
    lines = [json.loads(x) for x in (root / "test.jsonl").read_text().splitlines()[:2]]
    Image.new("L", (40, 112)).save(root / "narrow.png")
    lines[0]["output_img"] = [{"path": "narrow.png"}]
    del lines[1]["message"]
    written(dataset(np.arange(96 * 112).reshape(112, 96)), root / "bare.dcm")
    lines.append(lines[0] | {key: [{"path": "bare.dcm"}] for key in ("input_img", "output_img")})
    (root / "test.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    statistics = run(restorer, config(root, tmp_path / "out"))
    errors = [r["error"] for r in results(tmp_path / "out")]
    assert "the target must have the input's shape" in errors[0] and "message" in errors[1]
    assert "bare.dcm: no window, and a guess scales a pair unequally" in errors[2]
    tasks = {x["main_task_type"] for x in lines}
    assert {*statistics["by_task_type"]} == tasks


def test_an_image_depends_on_its_seed_alone(restorer, pairs):
    image = Image.open(next((pairs / "images" / "test").glob("*_0_input.png")))
    a, b, c = (
        restorer.restore(image, "Remove the noise.", **FAST, seed=seed).image for seed in (1, 1, 2)
    )
    assert a.tobytes() == b.tobytes() != c.tobytes()
    assert restorer.assess(image, "Remove the noise.", FAST["text"]) == "Moderate noise."


def test_guidance_acts_in_a_restoration(restorer, pairs):
    image = Image.open(next((pairs / "images" / "test").glob("*_0_input.png")))
    plain, text, both = (
        np.asarray(
            restorer.restore(
                image,
                "Remove the noise.",
                SamplingConfig(num_timesteps=3, cfg_text_scale=t, cfg_img_scale=i),
                FAST["text"],
            ).image
        )
        for t, i in ((1.0, 2.0), (3.0, 1.0), (3.0, 2.0))
    )
    assert (plain != text).any() and (text != both).any()


def test_rules_come_from_the_folder(restorer, tmp_path):
    assert restorer.task.vae_rule.image_stride == 8
    skip = shutil.ignore_patterns(PREPROCESSOR_FILE)
    folder = shutil.copytree(CHECKPOINT, tmp_path / "checkpoint", ignore=skip)
    task = Restorer.load(folder).task
    rules = dict(zip(DEFAULT_RULES, (task.vae_rule, task.vit_rule), strict=True))
    assert rules == {name: ResizeRule(**rule) for name, rule in DEFAULT_RULES.items()}


def test_a_failed_sample_is_tried_again(restorer, pairs, tmp_path):
    shutil.copytree(pairs, tmp_path / "pairs")
    record = json.loads((pairs / "test.jsonl").read_text().splitlines()[0])
    image = tmp_path / "pairs" / record["input_img"][0]["path"]
    image.rename(tmp_path / "away.png")
    settings = config(tmp_path / "pairs", tmp_path / "out", num_samples=2)
    assert run(restorer, settings)["overall"]["n_failed"] == 1
    (tmp_path / "away.png").rename(image)
    assert (
        run(restorer, settings)["overall"] | {"n_failed": 0, "total_samples": 2}
        == run(restorer, settings)["overall"]
    )
    assert sorted(r["sample_id"] for r in results(tmp_path / "out")) == [0, 1]


def test_mistakes_on_the_command_line_are_one_line(pairs, tmp_path):
    script = Path(__file__).parents[2] / "inference_pipeline" / "MedQ-Uni_run_batch_test2.py"
    command = [sys.executable, str(script), "--annotation_file", str(pairs / "test.jsonl")]
    command += ["--image_root", str(pairs), "--output_dir", str(tmp_path), "--model_path", "nope"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: nope: ema.safetensors not found")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "wrong", [{"num_timesteps": 1}, {"timestep_shift": 0.0}, {"cfg_text_scale": math.nan}]
)
def test_settings_of_sampling_that_cannot_be(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SamplingConfig(**wrong)
