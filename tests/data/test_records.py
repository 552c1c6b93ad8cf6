"""Every bad line is an error that begins with file:line."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from data.records import Record, RecordError, parse_record
from data.sources import JsonlRecords
from data.volumes import MAX_PIXELS

GOOD: dict[str, Any] = {
    "input_img": [{"path": "a.png", "height": 4, "width": 4}],
    "output_img": [{"path": "b.png", "height": 4, "width": 4}],
    "message": [
        {"from": "human", "value": "<image>\n Remove it. "},
        {"from": "gpt", "value": "Mild noise."},
    ],
    "main_task_type": "denoising",
    "degrade_type": "rician",
}


def written(path: Path, *lines: str | bytes) -> Path:
    encoded = [line.encode() if isinstance(line, str) else line for line in lines]
    path.write_bytes(b"\n".join(encoded) + b"\n")
    return path


def read_records(path: Path) -> list[Record]:
    return list(JsonlRecords(path))


def test_a_good_line(tmp_path):
    path = written(tmp_path / "train.jsonl", json.dumps(GOOD), "", json.dumps(GOOD))
    first, second = read_records(path)
    assert (first.source, second.source) == (f"{path}:1", f"{path}:3")
    assert [ref.path for ref in (*first.inputs, *first.outputs)] == ["a.png", "b.png"]
    assert (first.instruction, first.assessment) == ("Remove it.", "Mild noise.")
    assert first.raw == GOOD


def test_the_last_messages_count_and_optional_fields_may_be_absent(tmp_path):
    turns = [("human", "one"), ("gpt", "two"), ("human", "three")]
    record = {
        "input_img": GOOD["input_img"],
        "message": [{"from": who, "value": text} for who, text in turns],
    }
    path = written(
        tmp_path / "x.jsonl", json.dumps(record), json.dumps(GOOD | {"message": turns[:0]})
    )
    with pytest.raises(RecordError, match=":2: message must be a list"):
        read_records(path)
    (record_,) = read_records(written(path, json.dumps(record)))
    assert (record_.instruction, record_.assessment) == ("three", "two")
    assert record_.outputs == ()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{oops", "no JSON: Expecting property name"),
        ("[1, 2]", "a JSON object is expected, not list"),
        (json.dumps(GOOD)[:-9], "no JSON"),
        (json.dumps(GOOD | {"message": "hello"}), "message must be a list of {from, value}"),
        (json.dumps(GOOD | {"message": [{"from": "system", "value": "x"}]}), "message entry"),
        (json.dumps(GOOD | {"message": [{"from": "human", "value": 3}]}), "message entry"),
        (json.dumps(GOOD | {"message": GOOD["message"][1:]}), "no entry from `human`"),
        (json.dumps(GOOD | {"input_img": []}), "input_img must be a list"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "input_img"}), "input_img must be"),
        (json.dumps(GOOD | {"output_img": 3}), "output_img must be a list"),
        (json.dumps(GOOD | {"output_img": [{"height": 3}]}), "output_img entry {'height': 3} has"),
        (b'{"input_img": "caf\xe9"}', "utf-8"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, reason):
    path = written(tmp_path / "train.jsonl", json.dumps(GOOD), "", line, json.dumps(GOOD))
    with pytest.raises(RecordError, match=re.escape(f"{path}:3: ")) as caught:
        read_records(path)
    assert reason in str(caught.value)


def test_files_without_records(tmp_path):
    with pytest.raises(RecordError, match=r"empty.jsonl:1: no record in the file"):
        read_records(written(tmp_path / "empty.jsonl", "", "  "))
    with pytest.raises(FileNotFoundError, match=r"nowhere.jsonl"):
        read_records(tmp_path / "nowhere.jsonl")


def test_null_is_no_entry():
    found = [parse_record(json.dumps(GOOD | {"output_img": x}), "f:1").outputs for x in (None, [])]
    assert found == [(), ()]
    with pytest.raises(RecordError, match="f:1: input_img must be a list"):
        parse_record(json.dumps(GOOD | {"input_img": None}), "f:1")


@pytest.mark.parametrize(
    "side", [10**400, MAX_PIXELS + 1, -5, "3", True], ids=lambda side: f"{side!r:.9}"
)
def test_a_size_that_no_image_has_is_not_stated(side):
    line = GOOD | {"input_img": [{"path": "a.png", "height": 4, "width": side}]}
    assert parse_record(json.dumps(line), "f:1").inputs[0].size is None
    line["input_img"][0]["width"] = MAX_PIXELS
    assert parse_record(json.dumps(line), "f:1").inputs[0].size == (MAX_PIXELS, 4)
