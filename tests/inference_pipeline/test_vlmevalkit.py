"""Tables of questions, written and read back by pandas as VLMEvalKit does."""

import base64
import csv
import errno
import fcntl
import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from rich.progress import Progress

from data.packer import TextSegment, VitSegment
from data.tasks import filled
from inference_pipeline import vlmevalkit
from inference_pipeline.restorer import Restorer
from inference_pipeline.results import ResumeError, locked
from inference_pipeline.vlmevalkit import REQUEST, accuracy, letters, main, read_rows, run
from modeling.bagel.context import Context
from modeling.bagel.generation import TextConfig

CHECKPOINT = Path(__file__).parents[2] / "configs" / "tiny" / "checkpoint"
SHORT = TextConfig(max_new_tokens=24)
CHOICES = {"A": "None", "B": "Noise", "C": "Blur", "D": "Motion"}


@pytest.fixture(scope="module")
def restorer():
    return Restorer.load(CHECKPOINT)


def picture(seed: int, side: int = 96) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def encoded(image: Image.Image) -> str:
    content = io.BytesIO()
    image.save(content, "PNG")
    return base64.b64encode(content.getvalue()).decode()


def write(path: Path, rows: list[dict]) -> Path:
    pd.DataFrame(rows).to_csv(path, sep="\t", index=False)
    return path


def read(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)


class Killed(BaseException):
    """No error that a run may catch."""


class Asked:
    """Echoes questions in place of a model, the last first; keeps what it was asked."""

    def __init__(self, folder: Path = CHECKPOINT, dies_at: int = -1):
        self.report = SimpleNamespace(folder=str(folder), weights="ema")
        self.model = SimpleNamespace(dtype=torch.float32)
        self.dies_at, self.requests = dies_at, []

    def answers(self, requests, text, batch_size=8):
        first = len(self.requests)
        self.requests += requests
        if batch_size > 2:
            raise RuntimeError("out of memory")
        for place in reversed(range(len(self.requests) - first)):
            if place == self.dies_at:
                raise Killed
            if self.questions[first + place] == "too long":
                raise RuntimeError("no room")
            yield place, self.questions[first + place]

    @property
    def questions(self) -> list[str]:
        return [question.split("\n")[0] for _, question in self.requests]


def only(output: Path) -> Path:
    (table,) = output.glob("*.tsv")
    return table


def test_images_and_prompts_are_those_of_the_rows(tmp_path):
    """Base64, a list of two, the index of another row, a path; hint and options as far as given."""
    one, two, three = (picture(seed) for seed in range(3))
    large = picture(3, side=320)
    assert len(encoded(large)) > csv.field_size_limit(131072)
    three.save(tmp_path / "three.png")
    common = {"image_path": "", "hint": "", "question": "What is it?"}
    rows = [
        common | {"index": 7, "image": encoded(one)} | CHOICES,
        common | {"index": 8, "image": str([encoded(one), encoded(two)])},
        common | {"index": 9, "image": "8", "hint": "A pair.", "A": "Yes", "B": "No"},
        common | {"index": 10, "image": "", "image_path": "three.png"},
        common | {"index": 11, "image": "", "image_path": "['three.png', 'three.png']"},
        common | {"index": 12, "image": encoded(large)},
        common | {"index": 13, "image": "['7', '10']"},
    ]
    asked = Asked()
    run(asked, write(tmp_path / "q.tsv", rows), tmp_path / "out", SHORT)
    expected = [[one], [one, two], [one, two], [three], [three, three], [large], [one, three]]
    for (images, _), wanted in zip(asked.requests, expected, strict=True):
        assert [image.tobytes() for image in images] == [image.tobytes() for image in wanted]
    prompts = [question for _, question in asked.requests]
    assert prompts[0] == f"What is it?\nA. None\nB. Noise\nC. Blur\nD. Motion\n{REQUEST}"
    assert prompts[1] == "What is it?"
    assert prompts[2] == f"Hint: A pair.\nWhat is it?\nA. Yes\nB. No\n{REQUEST}"


def test_the_table_comes_back_with_predictions(restorer, tmp_path):
    """By the command, against answers asked one by one; cells with tabs, quotes and line ends."""
    one, two = picture(0), Image.new("RGB", (96, 128), "gray")
    odd = 'Is it "noise"?\n\tWhat\r else – ü?'
    rows = [
        {"index": "a", "image": encoded(one), "question": odd, "category": "x\ty"},
        {"index": "b", "image": str([encoded(one), encoded(two)]), "question": "Which? "},
        {"index": "c", "image": "a", "question": "Increase the resolution.", "l2-category": "NA"},
    ]
    tsv, output = write(tmp_path / "MedQ_test.tsv", rows), tmp_path / "out"
    common = ["--model_path", str(CHECKPOINT), "--tsv", str(tsv), "--output_dir", str(output)]
    assert main([*common, "--max_text_tokens", "24", "--batch_size", "2"]) == 0
    found, given = read(output / "tiny_checkpoint_MedQ_test.tsv"), read(tsv)
    assert list(found) == [*given.columns.drop("image"), "prediction", "error"]
    pd.testing.assert_frame_equal(found[given.columns.drop("image")], given.drop(columns="image"))
    images = [one], [one, two], [one]
    asked = zip(images, (row["question"] for row in rows), strict=True)
    assert list(found["prediction"]) == [restorer.answer(i, q, SHORT) for i, q in asked]
    assert len(set(found["prediction"])) > 1 and set(found["error"]) == {""}


def test_a_question_is_seen_by_the_vit_alone(restorer):
    """Images in their order, then the question: decoded step by step without the library's loop."""
    images, question = [picture(0), Image.new("RGB", (128, 96), "gray")], "Is there noise?"
    task = restorer.task
    ids: list[int] = []
    for _ in range(24):
        segments = [VitSegment(image_pm1=task.vit_rule(image)) for image in images]
        context = filled(
            Context(restorer.model, task.tokenizer.special),
            [*segments, TextSegment(ids=task.tokenizer.encode(question))],
        )
        hidden = context.append_ids([task.tokenizer.special.bos, *ids])
        logits = restorer.model.language_model.lm_head(hidden[-1])[: task.tokenizer.size]
        ids.append(int(logits.argmax()))
        if ids[-1] == task.tokenizer.special.eos:
            break
    expected = task.tokenizer.decode(ids)
    assert expected and restorer.answer(images, question, SHORT) == expected
    requests = [(images[:1], question), (images, question)]
    assert dict(restorer.answers(requests, SHORT)) == {
        place: restorer.answer(*request, SHORT) for place, request in enumerate(requests)
    }
    with pytest.raises(ValueError, match="question is empty"):
        restorer.answer(images, " ")


def test_bad_rows_are_told_and_the_rest_is_asked(tmp_path, monkeypatch):
    good = encoded(picture(0))
    bad = {
        "no-question": ({"question": " "}, "question: empty"),
        "cut": ({"image": good[: len(good) // 2 // 4 * 4]}, "image: encoded image:"),
        "letters": ({"image": "?" * 100}, "image: Only base64"),
        "padding": ({"image": good[:101]}, "image: Invalid base64"),
        "unknown": ({"image": "nobody"}, "image: 'nobody' is not the index of"),
        "chain": ({"image": "chained"}, "image: 'good' is not the index of"),
        "chained": ({"image": "good"}, ""),
        "none": ({"image": ""}, "image: the row has none"),
        "list": ({"image": "['x"}, "image: unterminated string"),
        "nested": ({"image": "[{[]: 1}]"}, "image: unhashable"),
        "path": ({"image": "", "image_path": "missing.png"}, "missing.png"),
        "good": ({}, ""),
    }
    common = {"image": good, "image_path": "", "question": "What?"}
    rows = [common | changes | {"index": index} for index, (changes, _) in bad.items()]
    tsv = write(tmp_path / "q.tsv", [*rows, rows[-1]])
    with tsv.open("a") as file:
        file.write(f"{good}\t\tWhat?\ttab\tbed\n")
    asked, bars = Asked(), []
    monkeypatch.setattr(vlmevalkit, "Progress", lambda: bars.append(Progress()) or bars[-1])
    run(asked, tsv, tmp_path / "out", SHORT)
    assert bars[0].finished and bars[0].tasks[0].completed == len(rows) + 2
    found = read(only(tmp_path / "out"))
    expected = [*(text for _, text in bad.values()), "index: 'good' is that of", "a tab stands"]
    for error, wanted, prediction in zip(
        found["error"], expected, found["prediction"], strict=True
    ):
        assert wanted in error and bool(wanted) == bool(error)
        assert prediction == ("" if wanted else "What?")
    assert len(asked.requests) == 2
    cli = main(
        ["--model_path", str(CHECKPOINT), "--tsv", str(tsv), "--output_dir", str(tmp_path / "cli")]
    )
    assert cli == 1


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    image = {"image": encoded(picture(0)), "image_path": ""}
    rows = [image | {"index": i, "question": f"q{i}"} | CHOICES for i in range(6)]
    rows[2] |= {"image": "", "image_path": "late.png"}
    rows[4] |= {"image": "2"}
    tsv, output = write(tmp_path / "q.tsv", rows), tmp_path / "out"
    with pytest.raises(Killed):
        run(Asked(dies_at=1), tsv, output, SHORT)  # q5, q4 and q3 are answered
    log = output / "answers.jsonl"
    log.write_text(log.read_text()[:-10])
    for asked_now, left in ((["q0", "q1", "q3"], 2), (["q2", "q4"], 0), ([], 0)):
        again = Asked()
        run(again, tsv, output, SHORT)
        assert again.questions == asked_now
        assert sum(found != "" for found in read(only(output))["error"]) == left
        picture(2).save(tmp_path / "late.png")
    assert list(read(only(output))["prediction"]) == [f"q{i}" for i in range(6)]
    run(Asked(), tsv, tmp_path / "whole", SHORT)
    assert only(output).read_bytes() == only(tmp_path / "whole").read_bytes()
    assert len(log.read_text().splitlines()) == 6
    for image, asked_now in (
        (picture(3), ["q2", "q4"]),
        (None, []),
    ):  # changed, then not to be read
        (tmp_path / "late.png").unlink()
        if image:
            image.save(tmp_path / "late.png")
        run(again := Asked(), tsv, output, SHORT)
        assert again.questions == asked_now
    assert list(read(only(output))["prediction"]) == [f"q{i}" for i in range(6)]
    picture(4).save(tmp_path / "late.png")
    with pytest.raises(Killed):
        run(Asked(dies_at=0), tsv, output, SHORT)
    assert not [*output.glob("*.tsv")]  # of the image as it was


def test_a_batch_that_fails_goes_on_one_by_one(tmp_path):
    texts = ["q0", "too long", "q2", "q3"]
    rows = [{"index": i, "image": encoded(picture(i)), "question": q} for i, q in enumerate(texts)]
    rows[3]["image"] = "[" + "-" * 100000 + "1]"
    tsv, asked = write(tmp_path / "q.tsv", rows), Asked()
    table = run(asked, tsv, tmp_path / "out", SHORT, batch_size=3)
    assert [row["prediction"] for row in table] == ["q0", "", "q2", ""]
    assert [row["error"] for row in table[:3]] == ["", "RuntimeError: no room", ""]
    assert table[3]["error"].startswith("image: ")
    assert asked.questions == ["q0", "too long", "q2", "q0", "too long", "q2"]


class InBatches(Asked):
    """Takes no more questions than a batch at a time; notes (batch size, question)."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def answers(self, requests, text, batch_size=8):
        for i, (_, question) in enumerate(requests):
            self.seen.append((batch_size, question))
            if question == "too long" or (question == "large" and batch_size > 1):
                raise RuntimeError("no room")
            if i % batch_size == batch_size - 1:
                yield from ((j, f"a{j}") for j in range(i - batch_size + 1, i + 1))


def test_one_failing_batch_does_not_slow_the_rest(tmp_path):
    texts = ["q0", "q1", "q2", "large", "q4", "too long", "q6", "q7"]
    image = encoded(picture(0))
    rows = [{"index": i, "image": image, "question": q} for i, q in enumerate(texts)]
    asked = InBatches()
    table = run(asked, write(tmp_path / "q.tsv", rows), tmp_path / "out", SHORT, batch_size=2)
    assert asked.seen == [
        *((2, q) for q in texts[:4]),
        *((1, q) for q in texts[2:4]),
        *((2, q) for q in texts[4:6]),
        *((1, q) for q in texts[4:6]),
        *((2, q) for q in texts[6:]),
    ]
    assert [row["error"] for row in table] == [""] * 5 + ["RuntimeError: no room"] + [""] * 2


def test_a_folder_belongs_to_one_run_at_a_time(tmp_path):
    """The second would drop what the first has answered since."""
    rows = [{"index": 0, "image": encoded(picture(0)), "question": "q"}]
    tsv, output = write(tmp_path / "q.tsv", rows), tmp_path / "out"
    with locked(output), pytest.raises(ResumeError, match="out: another run is at work in it"):
        run(Asked(), tsv, output, SHORT)
    assert run(Asked(), tsv, output, SHORT)[0]["prediction"] == "q"


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path):
        told = f"WARNING: {tmp_path}: no lock: [Errno {errno.ENOLCK}] No locks available: start no"
        assert capsys.readouterr().out.startswith(told)


def test_other_settings_do_not_share_a_folder(tmp_path):
    rows = [{"index": 0, "image": encoded(picture(0)), "question": "q"}]
    tsv, output = write(tmp_path / "q.tsv", rows), tmp_path / "out"
    run(Asked(), tsv, output, SHORT)
    before = json.loads((output / "settings.json").read_text())
    for model, text, name in (
        (Asked(), TextConfig(max_new_tokens=25), "text"),
        (Asked(folder=tmp_path), SHORT, "checkpoint"),
    ):
        with pytest.raises(ValueError, match=rf"see .*{name}.* in settings.json.*--output_dir"):
            run(model, tsv, output, text)
    write(tsv, [rows[0] | {"question": "another"}])
    with pytest.raises(ValueError, match="see questions in settings.json"):
        run(Asked(), tsv, output, SHORT)
    assert json.loads((output / "settings.json").read_text()) == before


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("B", "B"),
        ("b", "B"),
        (" (b). ", "B"),
        ("B.", "B"),
        ("B. Noise", "B"),
        ("B: Noise", "B"),
        ("**B**", "B"),
        ("(B) Noise", "B"),
        ("The answer is B.", "B"),
        ("Answer:\nB", "B"),
        ("There is grain, so B is correct.", "B"),
        ("B, because of the grain. B it is.", "B"),
        ("A", "A"),
        ("A.", "A"),
        ("A\nBecause it is sharp", "A"),
        ("A because it is sharp", "A"),
        ("Option A is right", "A"),
        ("A noisy image, so B", "B"),
        ("A or B", "AB"),
        ("A, B", "AB"),
        ("Neither A nor C", "AC"),
        ("A. None\nB. Noise\nC. Blur", "ABC"),
        ("A noisy image", ""),
        ("A CT scan with noise", ""),
        ("A 3T scan", ""),
        ("E", ""),
        ("Noise", ""),
        ("A-scan", ""),
        ("B-mode ultrasound", ""),
        ("x B1 field, T2, Dixon, MRI", ""),
        ("", ""),
    ],
)
def test_letters_of_a_prediction(prediction, expected):
    assert letters(prediction, CHOICES) == set(expected)


def test_accuracy_counts_the_undecided_apart():
    given = [  # prediction, answer, error
        ("B.", "B", ""),
        ("b", " b ", ""),
        ("C", "B", ""),
        ("B or C", "B", ""),
        ("Noise", "B", ""),
        ("", "B", "image: the row has none"),
        ("B", "Noise", ""),
        ("B", "", ""),
    ]
    rows = [
        CHOICES | {"prediction": p, "answer": answer, "error": error} for p, answer, error in given
    ]
    rows.append({"prediction": "Noise.", "answer": "Noise.", "error": ""})
    line = accuracy(rows)
    assert line.startswith("accuracy 33.3% of 6 questions with an answer: 2 right, ")
    assert {*line.split(": ")[1].split(", ")[1:]} == {
        "1 wrong",
        "1 ambiguous",
        "1 without a letter",
        "1 failed",
    }
    assert accuracy(rows[6:]) == "accuracy unknown of 0 questions with an answer: none"


def test_tables_that_are_none(tmp_path):
    path = tmp_path / "q.tsv"
    for content, message in (
        (b"", "column 'image'"),
        (b"index\timage\tquestion\n", "no rows"),
        (b"index\timages\tquestion\n1\tx\ty\n", r"column 'image': did you mean 'images'"),
        (b"idx\timage_path\tquestion\n1\tx\ty\n", "column 'index': did you mean 'idx'"),
        (b"index\timage\tquestion\n1\tx\t\xff\n", "no table: 'utf-8'"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message) as caught:
            read_rows(path)
        assert str(path) in str(caught.value)
    path.write_bytes("\ufeffindex\timage\tquestion\n1\tx\ty\n".encode())
    assert read_rows(path) == [{"index": "1", "image": "x", "question": "y"}]


def test_a_mistake_on_the_command_line_is_one_line(tmp_path):
    command = [sys.executable, "-m", "inference_pipeline.vlmevalkit", "--model_path", "nope"]
    command += ["--tsv", str(tmp_path / "none.tsv"), "--output_dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=CHECKPOINT.parents[2])
    assert done.returncode == 1 and done.stderr.startswith("error: ")
    assert "none.tsv" in done.stderr and "Traceback" not in done.stderr
