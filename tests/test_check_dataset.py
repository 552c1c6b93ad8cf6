"""The check of a data set: what is wrong, where, in the loader's words; resumed after a kill."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image, ImageFont

from data.config import load_mixture
from data.loader import PackedLoader
from data.stream import LoaderConfig
from data.tally import Tally
from data.tokenizer import Tokenizer
from data.volumes import MAX_PIXELS
from scripts.tools import dataset_checks
from scripts.tools.check_dataset import main
from scripts.tools.dataset_report import drawable
from tests.data.test_scans import dataset, written
from tests.data.test_stream import LIMITS
from tests.helpers import packer_config, tiny_config, write_mixture, write_pairs

SCRIPT = Path(__file__).parents[1] / "scripts" / "tools" / "check_dataset.py"
SIZES = {name: value for name, value in LIMITS.items() if name != "num_workers"}
FILES = ("report.txt", "report.csv", "contact_sheet.png")


def arguments(output: Path, *more: object, **changes: object) -> list[str]:
    """Of a check in this process, without a bar; `changes` are arguments by name."""
    named = {"output_dir": output, "max_workers": 1} | SIZES | changes
    return ["--no-progress", *map(str, more), *(f"--{k}={v}" for k, v in named.items())]


def findings(output: Path) -> set[tuple[str, int, str, str]]:
    """Data set, line, reason, message."""
    with (output / "report.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = {(r["dataset"], int(r["line"]), r["reason"], r["message"]) for r in rows}
    assert len(found) == len(rows)
    return found


def rewritten(lines: Path, change: Any) -> list[str]:
    """Lines of records that `change(number, record)` has changed."""
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    for number, record in enumerate(records):
        change(number, record)
    return [json.dumps(record) for record in records]


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> Path:
    """Of restoration: lines 1, 11 and 13 are good. Of questions about images: line 1. `test` holds
    an image and a volume of the first set."""
    folder = tmp_path_factory.mktemp("damaged")
    pairs, images = write_pairs(folder / "pairs", 12), folder / "pairs" / "images"
    for i in range(12):  # those of one size are all the same
        path = images / f"{i}_clean.png"
        Image.fromarray(np.asarray(Image.open(path)) ^ np.uint8(i)).save(path)

    def spoil(number: int, record: dict[str, Any]) -> None:
        if number == 3:
            for field in ("input_img", "output_img"):
                record[field][0]["height"] += 4
        if number == 4:
            record["output_img"][0] = {"path": "images/0_clean.png"}
        if number == 7:
            record["message"][0]["value"] = "<image><image>Remove it."
        if number == 8:
            record["message"][0]["value"] = "Remove the noise of it. " * 40
        if number == 10:
            record |= {"volume": "IXI012", "dataset": "ixi"}
        if number == 11:  # of another data set, which has the name by chance
            record |= {"volume": "IXI012", "dataset": "other"}

    lines = rewritten(pairs, spoil)
    pairs.write_text("\n".join([*lines[:11], "  ", lines[11], "{oops"]))
    (images / "1_clean.png").write_bytes(b"no image")
    (images / "2_input.png").unlink()
    whole = (images / "5_clean.png").read_bytes()
    (images / "5_clean.png").write_bytes(whole[:-40])
    Image.new("1", (5000, MAX_PIXELS // 5000 + 1)).save(images / "6_input.png")

    def ask(number: int, record: dict[str, Any]) -> None:
        if number == 1:
            record["message"][0]["value"] = "<image> and <image>?"
        if number == 2:
            record["message"] = record["message"][:1]

    asked = write_pairs(folder / "asked", 3)
    asked.write_text("\n".join(rewritten(asked, ask)))
    (folder / "test").mkdir()
    Image.open(images / "9_clean.png").save(folder / "test" / "other_name.bmp")
    held_out = [{"input_img": ["other_name.bmp"]}, {"volume": "IXI012", "dataset": "ixi"}]
    held_out.append({"input_img": ["gone"]})
    (folder / "test" / "test.jsonl").write_text("\n".join(map(json.dumps, held_out)))
    path = write_mixture(folder / "mixture.yaml", folder / "pairs")
    content = yaml.safe_load(path.read_text())
    questions = yaml.safe_load(write_mixture(folder / "x.yaml", folder / "asked").read_text())
    content["questions"] = questions["restoration"] | {"task": "vlm_sft"}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def test_every_finding_with_its_line(checkpoint, damaged, tmp_path, capsys):
    held_out = damaged.parent / "test" / "test.jsonl"
    source = f"--dataset_config_file={damaged}", f"--model_path={checkpoint}"
    status = main(arguments(tmp_path, *source, "--against", held_out))
    assert status == 1
    folder = damaged.parent / "pairs"
    lines, images = folder / "train.jsonl", folder / "images"
    expected = [
        ("pairs", 2, "unreadable_image", f"{images}/1_clean.png: cannot identify image file"),
        ("pairs", 3, "missing_image", f"{images}/2_input.png: [Errno 2] No such file"),
        ("pairs", 4, "bad_record", f"{lines}:4: says that width and height of images/3_input.png "
         "are (16, 20), but they are (16, 16)"),
        ("pairs", 4, "bad_record", f"{lines}:4: says that width and height of images/3_clean.png"),
        ("pairs", 5, "bad_record", f"{lines}:5: input and target are (24, 16) and (16, 16) after"),
        ("pairs", 6, "unreadable_image", f"{images}/5_clean.png: image file is truncated"),
        ("pairs", 7, "oversized_image", f"{images}/6_input.png: 5000x4001 is more than"),
        ("pairs", 8, "image_tags", f"{lines}:8: 2 <image> for 1 images"),
        ("pairs", 9, "too_long", f"{lines}:9: "),
        ("pairs", 10, "in_test_set", "images/9_clean.png is in the test set too: "
         f"{held_out}:1 as other_name.bmp"),
        ("pairs", 11, "volume_in_test_set", "a volume named IXI012 of data set ixi is in the test "
         f"set too: {held_out}:2"),
        ("pairs", 14, "bad_record", f"{lines}:14: no JSON: Expecting property name"),
        ("asked", 2, "bad_record", f"{folder.parent}/asked/train.jsonl:2: 2 <image> for 1 images"),
        ("asked", 3, "bad_record", f"{folder.parent}/asked/train.jsonl:3: the conversation holds"),
        (f"test:{held_out}", 3, "missing_image", f"{held_out.parent}/gone: [Errno 2]"),
    ]  # fmt: skip
    found = findings(tmp_path)
    assert len(found) == len(expected)
    for name, line, reason, message in expected:
        assert [row for row in found if row[:3] == (name, line, reason) and message in row[3]]
    text, told = (tmp_path / "report.txt").read_text(), capsys.readouterr().out
    assert re.search(
        r"^pairs +13 +3 .* bad_record 4, image_tags 1, in_test_set 1, missing", text, re.M
    )
    assert re.search(r"^asked +3 +1 ", text, re.M)
    assert f"missing_image: {lines}:3: {images}/2_input.png: [Errno 2]" in text
    assert f"\nbad_record: {lines}:14: no JSON" in text
    assert f"{len(expected)} findings: {tmp_path / 'report.txt'}" in told


def test_the_messages_are_those_of_the_loader(checkpoint, damaged, tmp_path, monkeypatch):
    """Every message with which the loader leaves out a sample, and none that it does not have."""
    told = set()
    add = Tally.add

    def heard(self, bad, times=1):
        told.add((["pairs", "asked"][bad.dataset], bad.reason, bad.message))
        add(self, bad, times)

    monkeypatch.setattr(Tally, "add", heard)
    config = LoaderConfig(**LIMITS, max_bad_share=1.0)
    packs = PackedLoader(
        load_mixture(damaged), config, packer_config(tiny_config()), Tokenizer(checkpoint)
    )
    while min(packs.planner.draws) < 30:  # more than twice all that the sets hold
        packs.next_batch()
    main(arguments(tmp_path, f"--dataset_config_file={damaged}", f"--model_path={checkpoint}"))
    found = {(name, reason, text) for name, _, reason, text in findings(tmp_path)}
    assert len(told) >= 9 and told <= found
    # The loader stops at the first fault of a record, and tags do not matter to restoration.
    assert {row[1:] for row in found - told} == {
        (reason, text)
        for _, reason, text in found
        if "images/3_clean.png" in text or reason == "image_tags"
    }


def test_lengths_and_packing_are_those_of_training(checkpoint, mixture, tmp_path):
    def loader(**changes: int) -> PackedLoader:
        config, packing = LoaderConfig(**(LIMITS | changes)), packer_config(tiny_config())
        return PackedLoader(load_mixture(mixture), config, packing, Tokenizer(checkpoint))

    source = f"--dataset_config_file={mixture}", f"--model_path={checkpoint}"
    assert main(arguments(tmp_path, *source, num_packs=20)) == 0
    assert findings(tmp_path) == set()
    text = (tmp_path / "report.txt").read_text()
    alone = loader(expected_num_tokens=1, max_buffer_size=0)
    lengths = sorted(alone.next_batch().num_tokens for _ in range(5))
    of_the_set = lengths[0], lengths[2], lengths[4], lengths[4]
    assert text.splitlines()[1].split() == ["pairs", "5", "5", *map(str, of_the_set)]
    packs = loader()
    batches = [packs.next_batch() for _ in range(20)]
    full = sum(b.num_tokens for b in batches) / 20 / LIMITS["max_num_tokens"]
    samples = sum(len(b.sample_lens) for b in batches) / 20
    most = LIMITS["max_num_tokens"]
    line = f"packing: {full:.1%} of max_num_tokens={most}, {samples:.1f} samples a pack"
    assert line in text and full > 0.5


def test_sets_of_one_name_are_counted_apart(checkpoint, tmp_path):
    for folder, lines in (("good", 4), ("bad", 3)):
        write_pairs(tmp_path / folder, lines)
    (tmp_path / "bad" / "train.jsonl").open("a").write("{oops\n[]\n")
    content = {}
    for group, folder in (("restoration", "good"), ("vqa_reconstruction", "bad")):
        own = yaml.safe_load(write_mixture(tmp_path / "x.yaml", tmp_path / folder).read_text())
        own["restoration"]["datasets"][0]["name"] = "vqa_rad"
        content[group] = own["restoration"]
    (path := tmp_path / "mixture.yaml").write_text(yaml.safe_dump(content))
    source = f"--dataset_config_file={path}", f"--model_path={checkpoint}"
    assert main(arguments(tmp_path / "out", *source)) == 1
    rows = (tmp_path / "out" / "report.txt").read_text().splitlines()[1:3]
    assert [(*row.split()[:3], *row.split()[7:]) for row in rows] == [
        ("vqa_rad", "4", "4"),
        ("vqa_rad", "5", "3", "bad_record", "2"),
    ]
    assert {row[:3] for row in findings(tmp_path / "out")} == {
        ("vqa_rad", 4, "bad_record"),
        ("vqa_rad", 5, "bad_record"),
    }


def test_pairs_without_a_window_are_found(checkpoint, tmp_path):
    lines, ramp = write_pairs(tmp_path / "pairs", 1), np.arange(256).reshape(16, 16)
    for name in ("0_input", "0_clean"):
        written(dataset(ramp), tmp_path / "pairs" / "images" / f"{name}.png")
    mixture = write_mixture(tmp_path / "mixture.yaml", tmp_path / "pairs")
    source = f"--dataset_config_file={mixture}", f"--model_path={checkpoint}"
    assert main(arguments(tmp_path / "out", *source)) == 1
    found = findings(tmp_path / "out")
    assert {row[:3] for row in found} == {("pairs", 1, "unreadable_image")} and len(found) == 2
    assert all("no window, and a guess scales a pair unequally" in row[3] for row in found)
    assert f"{lines}:1" in (tmp_path / "out" / "report.txt").read_text()


def test_pairs_of_two_windows_are_found(checkpoint, tmp_path):
    lines, ramp = write_pairs(tmp_path / "pairs", 2), np.arange(256).reshape(16, 16)
    for i, widths in enumerate([(2000, 1000), (1000, 1000)]):
        for name, width in zip(("input", "clean"), widths, strict=True):
            path = tmp_path / "pairs" / "images" / f"{i}_{name}.png"
            written(dataset(ramp, WindowCenter=width // 2, WindowWidth=width), path)
    for line in (records := [json.loads(line) for line in lines.read_text().splitlines()]):
        for key in ("input_img", "output_img"):
            line[key] = [line[key][0]["path"]]
    lines.write_text("\n".join(map(json.dumps, records)))
    mixture = write_mixture(tmp_path / "mixture.yaml", tmp_path / "pairs")
    source = f"--dataset_config_file={mixture}", f"--model_path={checkpoint}"
    assert main(arguments(tmp_path / "out", *source)) == 1
    ((name, line, reason, message),) = findings(tmp_path / "out")
    assert (name, line, reason) == ("pairs", 1, "unreadable_image")
    windows = "window 0 to 1999 and window 0 to 999 scale a pair unequally: state one"
    assert message.startswith(f"{lines}:1: {windows} window in both")


def test_a_volume_is_told_once_and_spoils_no_record(checkpoint, tmp_path, monkeypatch):
    """Slabs of a single volume, as make_pairs.py cuts them, and another volume of the test set."""
    monkeypatch.setattr(dataset_checks, "RECORDS_PER_JOB", 2)
    for folder, kinds in (("pairs", "aaaaab"), ("test", "aab")):
        lines = write_pairs(tmp_path / folder, len(kinds))
        for i in range(len(kinds)):
            for part in ("input", "clean"):
                path = tmp_path / folder / "images" / f"{i}_{part}.png"
                shade = np.uint8(i + 1 + 100 * (folder == "test"))
                Image.fromarray(np.asarray(Image.open(path)) ^ shade).save(path)
        change = lambda n, r, kinds=kinds: r.update(volume=kinds[n], dataset="ixi")  # noqa: E731
        lines.write_text("\n".join(rewritten(lines, change)))
    mixture = write_mixture(tmp_path / "mixture.yaml", tmp_path / "pairs")
    test, train = tmp_path / "test" / "train.jsonl", tmp_path / "pairs" / "train.jsonl"
    source = f"--dataset_config_file={mixture}", f"--model_path={checkpoint}", "--against", test
    for run in ("whole", "parts"):
        limits = {"max_errors": 1} if run == "parts" else {}
        assert main(arguments(tmp_path / run, *source, **limits)) == 1
    assert len(findings(tmp_path / "parts")) == 1
    assert main(arguments(tmp_path / "parts", *source, "--resume")) == 1
    for run in ("whole", "parts"):
        told = "a volume named {0} of data set ixi is in the test set too: {1}:{2}"
        assert findings(tmp_path / run) == {
            ("pairs", 1, "volume_in_test_set", told.format("a", test, 1)),
            ("pairs", 6, "volume_in_test_set", told.format("b", test, 3)),
        }
        text = (tmp_path / run / "report.txt").read_text()
        assert re.search(r"^pairs +6 +6 .* volume_in_test_set 2$", text, re.M)
        assert f"volume_in_test_set: {train}:1: a volume named a of" in text


def test_letters_that_a_font_lacks_are_escaped():
    font = ImageFont.load_default(12)
    assert drawable("Gr\u00f6\u00dfe \u80ba.\n(a)", font) == "Gr\\xf6\\xdfe \\u80ba.\n(a)"


def test_a_folder_of_jsonl_files(tmp_path, capsys):
    write_pairs(tmp_path / "set", 3)
    (tmp_path / "lists" / "deep").mkdir(parents=True)
    (tmp_path / "set" / "train.jsonl").rename(tmp_path / "lists" / "deep" / "train.jsonl")
    # The users' spelling of a call; sizes as for a large model.
    own = ["--no-progress", "--enable_autosave", "--save_every_n=1", "--keep_progress_files=1"]
    own += ["--jsonl_dir", str(tmp_path / "lists"), "--output_dir", str(tmp_path / "out")]
    own += ["--max_workers", "1", "--num_packs", "3", "--num_pairs", "2", "--verbose"]
    assert main([*own, "--image_base_path", str(tmp_path / "set")]) == 0
    text = (tmp_path / "out" / "report.txt").read_text()
    assert "deep/train" in text and "without --model_path: tokens of images alone" in text
    # 128 x 128: twice 8 x 8 latents, 16 x 16 patches; two tokens around each part and both texts.
    assert re.search(r"^deep/train +3 +3 +394 ", text, re.M)
    with Image.open(tmp_path / "out" / "contact_sheet.png") as sheet:
        assert sheet.height == 2 * 192
        dark = np.asarray(sheet.convert("L")) < 128
        assert dark[:, :192].any() and dark[:, 2 * 192 :].any()  # a picture, a text
    assert {p.name for p in (tmp_path / "out").iterdir()} == {*FILES}
    capsys.readouterr()
    assert main([*own, "--image_base_path", str(tmp_path)]) == 1
    assert capsys.readouterr().out.count("missing_image: ") == 6


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("--jsonl_dir={}", "no .jsonl file is there"),
        ("--dataset_config_file={}/none.yaml", "none.yaml: there is no such file"),
        (
            "--dataset_config_file={}/x.yaml",
            "x.yaml:1: restoratoin: unknown key 'restoratoin'; did",
        ),
        ("--model_path={0} --dataset_config_file={1}", "no tokenizer (vocab.json and merges.txt)"),
        ("--against {0}/test.jsonl --dataset_config_file={1}", "test.jsonl"),
    ],
)
def test_what_prevents_a_check(mixture, tmp_path, capsys, source, message):
    (tmp_path / "x.yaml").write_text("restoratoin: {}")
    words = source.format(tmp_path, mixture).split()
    assert main(arguments(tmp_path / "out", *words)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "report.txt").exists()


def test_max_errors_ends_it_and_resume_goes_on(checkpoint, damaged, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_checks, "RECORDS_PER_JOB", 2)
    source = f"--dataset_config_file={damaged}", f"--model_path={checkpoint}"
    assert main(arguments(tmp_path / "whole", *source)) == 1
    assert main(arguments(tmp_path / "parts", *source, max_errors=2)) == 1
    text = (tmp_path / "parts" / "report.txt").read_text()
    assert "ended by --max_errors=2: not all records were checked" in text
    assert 2 <= len(findings(tmp_path / "parts")) < len(findings(tmp_path / "whole"))
    assert main(arguments(tmp_path / "parts", *source, "--resume")) == 1
    for name in FILES:
        whole, parts = (tmp_path / run / name for run in ("whole", "parts"))
        assert whole.read_bytes() == parts.read_bytes()


def group_lives(number: int) -> bool:
    """Whether a group of processes has any that are not yet reaped."""
    with suppress(ProcessLookupError):
        os.killpg(number, 0)
        return True
    return False


def test_killed_and_resumed_it_reports_the_same(checkpoint, damaged, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(damaged.parent, tmp_path / "sets")
    lines, test = folder / "pairs" / "train.jsonl", folder / "test" / "test.jsonl"
    lines.write_text((lines.read_text() + "\n") * 150)
    mixture = write_mixture(tmp_path / "mixture.yaml", folder / "pairs")
    source = f"--dataset_config_file={mixture}", f"--model_path={checkpoint}", "--against", test
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, SCRIPT, *arguments(killed, *source, max_workers=2, save_every_n=1)]
    process = subprocess.Popen(command, start_new_session=True)
    while len([*killed.glob("progress_*.json")]) < 3:
        assert process.poll() is None
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    # Counted now: while files come and go a folder's list may name more than were there at a time.
    progress = [*killed.glob("progress_*.json")]
    assert 2 <= len(progress) <= 4 and not (killed / "report.txt").exists()
    end = time.monotonic() + 60
    while group_lives(process.pid):
        assert time.monotonic() < end, "workers outlive the process that was killed"
        time.sleep(0.1)

    assert main(arguments(whole, *source)) == 1
    (killed / "progress_999999999999.json").write_text('{"fingerprint": "cut o')
    decoded, calls = dataset_checks.decoded, []
    monkeypatch.setattr(
        dataset_checks, "decoded", lambda *args: (calls.append(1), decoded(*args))[1]
    )
    assert main(arguments(killed, *source, "--resume")) == 1
    assert 0 < len(calls) < 150 * 24
    for name in FILES:
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    assert not [*killed.glob("progress_*")]

    assert main(arguments(killed, *source, max_errors=1)) == 1
    lines.write_text(lines.read_text() + "\n")
    capsys.readouterr()
    assert main(arguments(killed, *source, "--resume")) == 2
    assert "is of other data sets or arguments" in capsys.readouterr().err
