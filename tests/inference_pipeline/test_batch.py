"""The batch command: several checkpoints and sets, kills, processes, batches, prompt styles."""

import fcntl
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.scores import psnr_db
from data.tasks import RestorationTask
from data.transforms import ResizeRule
from inference_pipeline.batch import _print, main
from inference_pipeline.devices import spread
from inference_pipeline.restorer import THINK, Restorer
from inference_pipeline.runner import ResumeError, RunConfig, identity, run
from modeling.bagel.generation import SamplingConfig, TextConfig
from scripts.tiny.make_pairs import test_records as make_test_records

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "configs" / "tiny" / "checkpoint"
SCRIPT = ROOT / "inference_pipeline" / "MedQ-Uni_run_batch_test2.py"
FAST = {"sampling": SamplingConfig(num_timesteps=2), "text": TextConfig(max_new_tokens=8)}
OPTIONS = ["--num_timesteps", "2", "--max_text_tokens", "8", "--target_gpu_device", "cpu"]
KILLS = 20


@pytest.fixture(scope="module")
def restorer():
    return Restorer.load(CHECKPOINT)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Eleven samples at most; one has no truth."""
    folder = tmp_path_factory.mktemp("pairs")
    records = make_test_records(folder, every=5)[:11]
    records[4]["output_img"][0]["path"] = "missing.png"
    (folder / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def config(pairs: Path, output: Path, **changes: object) -> RunConfig:
    common = {"annotation_file": pairs / "test.jsonl", "image_root": pairs, "output_dir": output}
    return RunConfig(**(common | FAST | changes))


def results(output: Path) -> list[dict]:
    found = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in ("timestamp", "inference_time")} for r in found]


def command(pairs: Path, output: Path, *more: str) -> list[str]:
    return [
        *(str(SCRIPT), "--model_path", str(CHECKPOINT), "--annotation_file"),
        *(str(pairs / "test.jsonl"), "--image_root", str(pairs), "--output_dir", str(output)),
        *OPTIONS,
        *more,
    ]


@pytest.fixture(scope="module")
def finished(restorer, pairs, tmp_path_factory):
    output = tmp_path_factory.mktemp("finished")
    statistics = run(restorer, config(pairs, output, batch_size=2))
    assert statistics["overall"]["n_failed"] == 1
    return output


def test_a_batch_gives_what_single_samples_give(pairs, tmp_path):
    """In float32; the shipped weights are bfloat16, whose rounding is that much coarser."""
    restorer, folders = Restorer.load(CHECKPOINT, dtype=torch.float32), []
    for batch_size in (1, 3):
        folders.append(tmp_path / str(batch_size))
        run(restorer, config(pairs, folders[-1], batch_size=batch_size))
    for one, batched in zip(*map(results, folders), strict=True):
        assert one.get("understanding_text") == batched.get("understanding_text")
        assert one.get("psnr", 0) == pytest.approx(batched.get("psnr", 0), abs=1e-3)
        if "pred_img" in one:
            a, b = (np.asarray(Image.open(f / one["pred_img"])).astype(int) for f in folders)
            # Rounding to 8 bits may tip over.
            assert np.abs(a - b).max() <= 1 and (a != b).mean() < 1e-3


def test_killed_twenty_times_every_sample_is_there_once_with_the_same_numbers(
    pairs, finished, tmp_path
):
    chance, alive = random.Random(0), 0
    start = [sys.executable, *command(pairs, tmp_path, "--batch_size", "2")]
    for kill in range(KILLS):
        process = subprocess.Popen(start, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        began, target = time.monotonic(), chance.random()
        # After the start-up, whose length differs between machines, at a random moment of the work.
        while process.poll() is None and time.monotonic() - began < 120:
            parts = list(tmp_path.glob("results.part*.jsonl"))
            if parts and time.monotonic() - began > 0:
                time.sleep(2.0 * target if kill % 4 else 0.0)
                break
            time.sleep(0.01)
        alive += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert alive >= KILLS // 2  # most of them were killed at work
    done = subprocess.run(start, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr  # one sample fails in every run
    assert results(tmp_path) == results(finished)
    statistics = json.loads((tmp_path / "statistics.json").read_text())
    assert statistics["overall"]["total_samples"] == len(results(finished)) > 8
    assert not list(tmp_path.glob("*.part*")) and not list(tmp_path.glob("*.staged"))


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_a_test_set(pairs, finished, tmp_path, processes):
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    more = command(pairs, tmp_path, "--batch_size", "2")
    done = subprocess.run([sys.executable, *launch, *more], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr  # one sample fails
    assert done.stdout.count("protocol medq") == 1
    assert results(tmp_path) == results(finished)
    for name in (r["pred_img"] for r in results(finished) if "pred_img" in r):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()


def test_checkpoints_times_sets_and_their_folders(pairs, tmp_path, capsys):
    step = shutil.copytree(CHECKPOINT, tmp_path / "runs" / "denoise" / "0000020")
    shutil.copy(pairs / "test.jsonl", pairs / "second.jsonl")
    sets = [str(pairs / f"{name}.jsonl") for name in ("test", "second")]
    options = ["--image_root", str(pairs), "--output_dir", str(tmp_path / "out"), *OPTIONS]
    models = ["--model_path", str(CHECKPOINT), str(step), "--annotation_file", *sets]
    assert main([*models, *options, "--num_samples", "2", "--protocols", "medq", "standard"]) == 0
    folders = [
        tmp_path / "out" / model / name
        for model in ("checkpoint", "denoise/0000020")
        for name in ("test", "second")
    ]
    for folder in folders:
        assert len(results(folder)) == 2
        settings = json.loads((folder / "settings.json").read_text())
        assert settings["model_id"] in str(folder) and settings["split"] == folder.name
        assert settings["step"] == (20 if "0000020" in str(folder) else None)
        assert {"psnr", "standard:psnr", "standard:ssim_ceiling"} <= set(results(folder)[0])
    printed = capsys.readouterr().out
    assert printed.count("protocol medq") == printed.count("protocol standard") == 4
    clash = [*models[:3], "--annotation_file", sets[0], sets[0]]
    with pytest.raises(ValueError, match="same name"):
        main([*clash, *options])


def test_identity_of_a_checkpoint(tmp_path):
    assert identity(tmp_path / "run" / "0002000") == ("run/0002000", 2000)
    assert identity(tmp_path / "BAGEL-7B-MoT") == ("BAGEL-7B-MoT", None)


def test_other_processes_hear_of_an_error_at_the_start(pairs, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    more = command(pairs, tmp_path / "out", "--seed", "7")
    done = subprocess.run(
        [sys.executable, *launch, *more], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1
    assert done.stderr.count("error: ") == 2 and "another configuration" in done.stderr


def test_a_failing_batch_does_not_take_its_neighbours_along(restorer, pairs, finished, tmp_path):
    """The model fails on one sample, as a GPU out of memory would."""
    original = Restorer.generate

    def failing(self, requests, batch_size=1):
        requests = list(requests)
        if any(len(r.prompt[2].ids) > 100 for r in requests):
            raise RuntimeError("out of memory")
        yield from original(self, requests, batch_size)

    lines = (pairs / "test.jsonl").read_text().splitlines()
    long = json.loads(lines[1])
    long["message"][0]["value"] = "Remove the noise. " * 60
    test_set = tmp_path / "test.jsonl"
    test_set.write_text("\n".join([lines[0], json.dumps(long), *lines[2:4]]) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Restorer, "generate", failing)
        run(restorer, config(pairs, tmp_path / "out", annotation_file=test_set, batch_size=4))
    found = results(tmp_path / "out")
    assert found[1]["error"] == "RuntimeError: out of memory"
    expected = results(finished)
    for i in (0, 2, 3):
        assert found[i]["psnr"] == pytest.approx(expected[i]["psnr"], abs=1e-3)


def test_images_of_every_kind(restorer, pairs, tmp_path):
    """A dot, 16-bit grey, RGBA, palette, 20 megapixels; then one more, and a tag without image."""
    rng = np.random.default_rng(0)
    grey16 = (rng.random((40, 50)) * 65535).astype(np.uint16)
    made = {
        "dot": Image.new("RGB", (1, 1), "red"),
        "grey16": Image.fromarray(grey16),
        "rgba": Image.new("RGBA", (40, 30), (10, 200, 30, 128)),
        "palette": Image.new("P", (30, 30)),
        "large": Image.new("L", (5000, 4000), 90),
        "huge": Image.new("L", (5001, 4000), 90),
    }
    lines = []
    for name, image in made.items():
        image.save(tmp_path / f"{name}.png")
        lines.append(
            {
                "main_task_type": name,
                "input_img": [{"path": f"{name}.png"}],
                "output_img": [{"path": f"{name}.png"}],
                "message": [{"from": "human", "value": "<image>\nRemove the noise."}],
            }
        )
    twice = [{"from": "human", "value": "<image> and <image>\nRemove the noise."}]
    lines.append(lines[0] | {"main_task_type": "tags", "message": twice})
    test_set = tmp_path / "test.jsonl"
    test_set.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = config(tmp_path, tmp_path / "out", annotation_file=test_set, batch_size=3)
    statistics = run(restorer, settings)
    found = {r["main_task_type"]: r for r in results(tmp_path / "out")}
    assert [name for name, r in found.items() if "error" in r] == ["huge", "tags"]
    assert "2 <image> for 1 images" in found["tags"]["error"]
    assert "20000000 pixels" in found["huge"]["error"]
    assert statistics["overall"]["n_failed"] == 2
    for name in made.keys() - {"huge"}:
        size = Image.open(tmp_path / "out" / found[name]["pred_img"]).size
        assert size == restorer.task.vae_rule.size(*made[name].size)


def test_a_larger_truth_is_drawn_at_its_own_size(restorer, pairs, tmp_path):
    """As its target is trained, and measured there: a rule that leaves the small input small."""
    rule = ResizeRule(image_stride=8, max_image_size=112, min_image_size=24)
    small = Restorer(
        restorer.model,
        RestorationTask(restorer.task.tokenizer, rule, restorer.task.vit_rule),
        restorer.report,
    )
    lines = (pairs / "test.jsonl").read_text().splitlines()
    line = next(x for x in lines if json.loads(x)["main_task_type"] == "super-resolution")
    (tmp_path / "test.jsonl").write_text(line + "\n")
    run(small, config(pairs, tmp_path / "out", annotation_file=tmp_path / "test.jsonl"))
    (found,) = results(tmp_path / "out")
    truth = Image.open(pairs / json.loads(line)["output_img"][0]["path"])
    degraded = Image.open(pairs / found["input_img"][0]["path"]).convert("RGB")
    assert degraded.size[0] * 4 == truth.size[0]
    assert Image.open(tmp_path / "out" / found["pred_img"]).size == truth.size == (96, 112)
    enlarged = degraded.resize(truth.size, Image.Resampling.BICUBIC)
    assert found["psnr_bicubic"] == psnr_db(enlarged, truth.convert("RGB"))


def test_no_two_samples_share_images_and_all_are_named_alike(restorer, pairs, tmp_path):
    """Stems that would meet again after a number was added; records that say `image`."""
    lines = [json.loads(x) for x in (pairs / "test.jsonl").read_text().splitlines()[:1]]
    source = pairs / lines[0]["input_img"][0]["path"]
    for name in ("a_2", "a"):
        shutil.copy(source, tmp_path / f"{name}.png")
    shutil.copy(pairs / lines[0]["output_img"][0]["path"], tmp_path / "truth.png")
    base = lines[0] | {"output_img": [{"path": "truth.png"}]}
    del base["input_img"]
    names = ("a_2", "a", "a")
    texts = [json.dumps(base | {"image": f"{name}.png"}) for name in names]
    (tmp_path / "test.jsonl").write_text("\n".join(texts) + "\n")
    settings = config(tmp_path, tmp_path / "out", annotation_file=tmp_path / "test.jsonl")
    run(restorer, settings)
    found = results(tmp_path / "out")
    assert len({r["pred_img"] for r in found}) == 3
    assert [r["input_img"] for r in found] == [[{"path": f"{name}.png"}] for name in names]


def test_what_no_number_may_come_from(restorer, pairs, finished, tmp_path):
    broken = Restorer.load(CHECKPOINT)
    with torch.no_grad():
        broken.model.llm2vae.weight.fill_(torch.nan)
    statistics = run(broken, config(pairs, tmp_path / "nan", num_samples=1))
    assert statistics["overall"] == {"total_samples": 1, "n_failed": 1}
    assert "not finite" in results(tmp_path / "nan")[0]["error"]

    other = shutil.copytree(finished, tmp_path / "rules")
    rules = ResizeRule(image_stride=8, max_image_size=64, min_image_size=32)
    task = RestorationTask(restorer.task.tokenizer, rules, restorer.task.vit_rule)
    with pytest.raises(ResumeError, match="another configuration"):
        run(Restorer(restorer.model, task, restorer.report), config(pairs, other))

    path = other / "results.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0][:30], *lines[1:]]) + "\n")
    with pytest.raises(ValueError, match=r"results\.jsonl:1: "):
        run(restorer, config(pairs, other))
    with pytest.raises(ValueError, match=r"batch_size=0"):
        next(restorer.answers([([], "Why?")], batch_size=0))
    with pytest.raises(ValueError, match="always measured"):
        config(pairs, other, metrics=("ssim",))
    for wrong in ({"cfg_interval": (1.0, 0.0)}, {"cfg_renorm_min": 5.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SamplingConfig(**wrong)


def test_a_folder_belongs_to_one_run_at_a_time(restorer, pairs, tmp_path):
    with (tmp_path / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ResumeError, match="another run is at work"):
            run(restorer, config(pairs, tmp_path))
    assert run(restorer, config(pairs, tmp_path, num_samples=1))["overall"]["n_failed"] == 0


def test_the_origin_prompt_is_that_of_the_users_script(restorer, pairs):
    """The assessment is made without latents and joined to the instruction after an empty line."""
    image = Image.open(next((pairs / "images" / "test").glob("*_0_input.png")))
    seen = []
    original = Restorer.generate

    def noted(self, requests, batch_size=1):
        requests = list(requests)
        seen.extend(requests)
        yield from original(self, requests, batch_size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Restorer, "generate", noted)
        ((_, restored),) = restorer.restorations(
            [(image, "Remove the noise.")], **FAST, prompt_style="origin"
        )
    assess, restore = seen
    assert [type(s).__name__ for s in assess.prompt] == ["VitSegment", "TextSegment"]
    kinds = [type(s).__name__ for s in restore.prompt]
    assert kinds == ["VaeSegment", "VitSegment", "TextSegment"] and restore.text is None
    words = restorer.task.tokenizer.decode(restore.prompt[2].ids)
    assert words == f"Remove the noise.\n\n{restored.assessment}".rstrip()
    assert restored.assessment == restorer.answer([image], "Remove the noise.", FAST["text"])


def test_questions_edits_and_thinking(restorer, pairs):
    image = Image.open(next((pairs / "images" / "test").glob("*_0_input.png")))
    questions = [([image], "Remove the noise."), ([], "Why?"), ([image, image], "Compare.")]
    alone = [restorer.answer(*question, FAST["text"]) for question in questions]
    assert dict(restorer.answers(questions, FAST["text"], batch_size=2)) == dict(enumerate(alone))
    with pytest.raises(ValueError, match="question is empty"):
        restorer.answer([image], " \n")
    plain = restorer.edit(image, "Remove the noise.", FAST["sampling"])
    thought = restorer.edit(image, "Remove the noise.", FAST["sampling"], think=FAST["text"])
    assert plain.assessment == "" and thought.image.tobytes() != plain.image.tobytes()
    assert "<think>" in THINK


def test_layers_that_visit_the_device_give_the_same(restorer, pairs):
    """Layers kept on the CPU by accelerate: parameters live elsewhere until a layer runs."""
    image = Image.open(next((pairs / "images" / "test").glob("*_0_input.png")))
    other = Restorer.load(CHECKPOINT, max_memory={"cpu": "10GiB"})
    layers = other.model.language_model.model.layers
    assert all(p.device.type == "meta" for p in layers.parameters())
    guided = SamplingConfig(num_timesteps=3, cfg_text_scale=2.0, cfg_img_scale=2.0)
    a, b = (r.restore(image, "Remove the noise.", guided, FAST["text"]) for r in (restorer, other))
    assert a.assessment == b.assessment and a.image.tobytes() == b.image.tobytes()
    with pytest.raises(ValueError, match="do not fit"):
        Restorer.load(CHECKPOINT, max_memory={"cpu": "1KiB"})


def test_a_model_that_is_to_be_spread_is_never_on_one_device(monkeypatch):
    """It may not fit: it comes on the CPU, and all but its layers moves to the first device."""
    model = Restorer.load(CHECKPOINT).model
    layers = {f"language_model.model.{n}" for n, _ in model.language_model.model.named_parameters()}
    layers = {name for name in layers if ".layers." in name}
    with pytest.raises(ValueError, match="do not fit"):
        spread(model, {"cpu": "1KiB"}, "meta")
    left = {name for name, p in model.named_parameters() if p.device.type == "cpu"}
    assert left == layers and len(layers) > 100

    handed = []

    def noted(model, *others):
        handed.append((model.device, *others))
        return model

    monkeypatch.setattr("inference_pipeline.restorer.spread", noted)
    Restorer.load(CHECKPOINT, max_memory={0: "1GiB"}, device="cuda:0")
    assert handed == [(torch.device("cpu"), {0: "1GiB"}, "cuda:0")]


def test_the_shell_script_passes_on_what_it_is_told():
    names = {"CHECKPOINTS": "a b", "ANNOTATION_FILES": "x.jsonl", "IMAGE_ROOT": "r"}
    script = ["bash", str(ROOT / "scripts" / "inference" / "run_batch.sh"), "--batch_size", "8"]
    path = {"PATH": "/usr/bin:/bin"}
    env = path | names | {"BASE_OUTPUT_DIR": "out", "GPUS": "2", "DRY_RUN": "1"}
    done = subprocess.run(script, env=env, capture_output=True, text=True)
    assert done.stdout.split() == [
        *["python", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
        *["inference_pipeline/MedQ-Uni_run_batch_test2.py", "--model_path", "a", "b"],
        *["--annotation_file", "x.jsonl", "--image_root", "r", "--output_dir", "out"],
        *["--batch_size", "8"],
    ]
    done = subprocess.run(script, env=path | names, capture_output=True, text=True)
    assert done.returncode == 2 and "BASE_OUTPUT_DIR is not set" in done.stderr


def test_both_dtypes_of_weights_give_an_image(pairs):
    image = Image.open(next((pairs / "images" / "test").glob("*_0_input.png")))
    half = Restorer.load(CHECKPOINT, dtype=torch.bfloat16)
    full = Restorer.load(CHECKPOINT).restore(image, "Remove the noise.", **FAST)
    found = half.restore(image, "Remove the noise.", **FAST)
    difference = np.asarray(found.image).astype(float) - np.asarray(full.image)
    assert np.abs(difference).mean() < 4  # of 255


def test_equal_images_stand_beside_their_mean(capsys):
    numbers = {
        "psnr_mean": 30.0,
        "ssim_mean": 0.9,
        "psnr_input_mean": 180.0,
        "ssim_input_mean": 0.8,
    }
    summary = numbers | {"total_samples": 6, "n_failed": 0, "n_equal_input": 1}
    _print({"by_task_type": {"denoising": summary}}, ("medq",))
    all_equal = {k: v for k, v in summary.items() if k != "psnr_input_mean"} | {"n_equal_input": 6}
    _print({"by_task_type": {"denoising": all_equal}}, ("medq",))
    _, line, _, other = capsys.readouterr().out.splitlines()
    begin = "  denoising: 6 samples, 0 failed, restored 30.00/0.900, input"
    assert line == f"{begin} 180.00/0.800 (1 equal)"
    assert other == f"{begin} -/0.800 (6 equal)"
