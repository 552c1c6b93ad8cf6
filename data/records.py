"""One line of a JSONL file, or one row of a parquet file -> Record. Errors name file and line."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .volumes import MAX_PIXELS

Size = tuple[int, int]
"""(width, height)"""
IMAGE_TAG = "<image>"


class RecordError(ValueError):
    """A record that cannot be used; the message starts with `file:line:`."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """Where a task finds its parts in a record: names of fields, of which the first that is there
    counts."""

    inputs: tuple[str, ...] = ("input_img", "image", "images")
    outputs: tuple[str, ...] = ("output_img",)
    texts: tuple[str, ...] = ("message", "conversations")
    needs: tuple[str, ...] = ("inputs", "texts")
    """Parts that must be there."""
    paired: bool = False
    """Whether an image is made from another, so that both must be scaled alike."""


DEFAULT_FORM = Form()


@dataclass(frozen=True, kw_only=True)
class ImageRef:
    """An image that a record names or, in parquet files, holds."""

    path: str
    """Relative to the data set's folder; the name in messages where `content` is given."""
    size: Size | None = None
    """What the record states."""
    content: bytes | None = None


@dataclass(frozen=True, kw_only=True)
class Record:
    """One sample of a data set."""

    source: str
    """`file:line`, for messages."""
    inputs: tuple[ImageRef, ...]
    outputs: tuple[ImageRef, ...]
    messages: tuple[tuple[str, str], ...]
    """(`human` or `gpt`, text) in order."""
    raw: Mapping[str, Any]
    """The line as it was, with what else it says (`main_task_type`, `degrade_type`)."""

    @property
    def instruction(self) -> str:
        """The last human message without its image tags."""
        return self._last("human") or ""

    @property
    def assessment(self) -> str | None:
        """The last gpt message, if any."""
        return self._last("gpt")

    def _last(self, who: str) -> str | None:
        said = [text for speaker, text in self.messages if speaker == who]
        return said[-1].replace(IMAGE_TAG, "").strip() if said else None


def parse_record(line: str | bytes, source: str, form: Form = DEFAULT_FORM) -> Record:
    """Raises RecordError when the line is no JSON object or a field is missing or misshapen."""
    try:
        raw = json.loads(line)
        json.dumps(raw, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise RecordError(f"{source}: a lone surrogate is no text: {error}") from error
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or nested too deeply
        raise RecordError(f"{source}: no JSON: {error}") from error
    if not isinstance(raw, dict):
        raise RecordError(f"{source}: a JSON object is expected, not {type(raw).__name__}")
    return record_of(raw, source, form)


def record_of(raw: Mapping[str, Any], source: str, form: Form = DEFAULT_FORM) -> Record:
    """Raises RecordError when a field that the form names is missing or misshapen."""
    inputs, outputs, messages = (
        _entries(raw, getattr(form, part), part in form.needs, source, read)
        for part, read in (("inputs", _image), ("outputs", _image), ("texts", _message))
    )
    videos = form.inputs and not inputs + outputs and (raw.get("video") or raw.get("videos"))
    if videos or any("<video>" in text for _, text in messages):
        raise RecordError(f"{source}: videos are not read: give their frames as images")
    if "texts" in form.needs and all(who != "human" for who, _ in messages):
        raise RecordError(f"{source}: {form.texts[0]} holds no entry from `human`")
    return Record(source=source, inputs=inputs, outputs=outputs, messages=messages, raw=raw)


def _entries(
    raw: Mapping[str, Any],
    fields: tuple[str, ...],
    needed: bool,
    source: str,
    read: Callable[[Any, str, str], Any],
) -> tuple[Any, ...]:
    field = next((name for name in fields if name in raw), fields[0] if needed else "")
    value = raw.get(field)
    if not needed and (not field or value is None or value == []):
        return ()
    if read is _image and isinstance(value, str | bytes | dict):
        value = [value]
    if not isinstance(value, list) or not value:
        expected = "{path}" if read is _image else "{from, value}"
        raise RecordError(f"{source}: {field} must be a list of {expected}")
    return tuple(read(entry, field, source) for entry in value)


def _message(entry: Any, field: str, source: str) -> tuple[str, str]:
    known = isinstance(entry, dict) and isinstance(entry.get("value"), str)
    if not known or not isinstance(entry.get("from"), str):
        raise RecordError(f"{source}: {field} entry {entry!r:.200} has no texts {{from, value}}")
    if entry["from"] not in ("human", "gpt"):
        raise RecordError(f"{source}: {field} entry {entry!r:.200} is from neither human nor gpt")
    return entry["from"], entry["value"]


def _image(entry: Any, field: str, source: str) -> ImageRef:
    """A path, the bytes of a file, or a mapping with one of them and perhaps the size."""
    if isinstance(entry, str | bytes):
        entry = {"path" if isinstance(entry, str) else "bytes": entry}
    if isinstance(entry, dict) and isinstance(entry.get("bytes"), bytes):
        named = f"{source}: {field}"
        return ImageRef(path=named, size=_stated_size(entry), content=entry["bytes"])
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
        raise RecordError(f"{source}: {field} entry {entry!r:.200} has no texts {{path}}")
    return ImageRef(path=entry["path"], size=_stated_size(entry))


def _stated_size(image: dict[str, Any]) -> Size | None:
    width, height = size = image.get("width", 0), image.get("height", 0)
    return size if all(type(side) is int and 0 < side <= MAX_PIXELS for side in size) else None
