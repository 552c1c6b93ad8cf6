"""One JSONL line -> Record. Every error names file and line."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class RecordError(ValueError):
    """A bad line; the message starts with `file:line:`."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One restoration sample of a JSONL file."""

    source: str
    """`file:line`, for messages."""
    input_image: str
    """Path of the first input image, relative to the data set's folder."""
    output_image: str | None
    """Of the first output image, if the line has any."""
    input_size: tuple[int, int] | None
    """(width, height) of the input image, if the line states them."""
    output_size: tuple[int, int] | None
    instruction: str
    """The last human message without its `<image>` tags."""
    assessment: str | None
    """The last gpt message, if any."""
    raw: dict[str, Any]
    """The line as it was, with what else it says (`main_task_type`, `degrade_type`)."""


def read_records(path: str | Path) -> list[Record]:
    """All records of a JSONL file; blank lines are allowed.

    Raises RecordError (`file:line: reason`) for a bad line or a file without any record,
    FileNotFoundError without the file.
    """
    with Path(path).open("rb") as lines:
        records = [
            parse_record(line, f"{path}:{number}")
            for number, line in enumerate(lines, start=1)
            if line.strip()
        ]
    if not records:
        raise RecordError(f"{path}:1: no record in the file")
    return records


def parse_record(line: str | bytes, source: str) -> Record:
    """Raises RecordError when the line is no JSON object or a field is missing or misshapen."""
    try:
        raw = json.loads(line)
        json.dumps(raw, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise RecordError(f"{source}: a lone surrogate is no text: {error}") from error
    except ValueError as error:  # no JSON, or no UTF-8
        raise RecordError(f"{source}: no JSON: {error}") from error
    if not isinstance(raw, dict):
        raise RecordError(f"{source}: a JSON object is expected, not {type(raw).__name__}")
    last = {}
    for entry in _entries(raw, "message", source, "from", "value"):
        if entry["from"] not in ("human", "gpt"):
            raise RecordError(f"{source}: message entry {entry!r} is from neither human nor gpt")
        last[entry["from"]] = entry["value"].replace("<image>", "").strip()
    if "human" not in last:
        raise RecordError(f"{source}: message holds no entry from `human`")
    degraded = _entries(raw, "input_img", source, "path")[0]
    clean = _entries(raw, "output_img", source, "path")[0] if "output_img" in raw else {}
    return Record(
        source=source,
        input_image=degraded["path"],
        output_image=clean.get("path"),
        input_size=_stated_size(degraded),
        output_size=_stated_size(clean),
        instruction=last["human"],
        assessment=last.get("gpt"),
        raw=raw,
    )


def _stated_size(image: dict[str, Any]) -> tuple[int, int] | None:
    width, height = size = image.get("width", 0), image.get("height", 0)
    return size if all(type(side) is int and side > 0 for side in size) else None


def _entries(raw: dict[str, Any], field: str, source: str, *keys: str) -> list[dict[str, Any]]:
    """The objects of a field, each with a text under all `keys`."""
    entries, expected = raw.get(field), f"{{{', '.join(keys)}}}"
    if not isinstance(entries, list) or not entries:
        raise RecordError(f"{source}: {field} must be a list of {expected}")
    for entry in entries:
        if not isinstance(entry, dict) or not all(isinstance(entry.get(k), str) for k in keys):
            raise RecordError(f"{source}: {field} entry {entry!r} has no texts {expected}")
    return entries
