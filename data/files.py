"""Files by path, or by a URL (`s3://bucket/train.jsonl`) through fsspec."""

import io
from pathlib import Path
from typing import BinaryIO

import fsspec

Place = Path | str
"""A local path, or a URL."""


def place(text: str) -> Place:
    return text if "://" in text else Path(text)


def within(folder: Place, name: str) -> Place:
    """A file of a folder; `name` may be a whole path or URL."""
    if "://" in name:
        return name
    return f"{folder.rstrip('/')}/{name}" if isinstance(folder, str) else folder / name


def exists(where: Place) -> bool:
    if isinstance(where, Path):
        return where.exists()
    system, path = fsspec.core.url_to_fs(where)
    return bool(system.exists(path))


def open_binary(where: Place) -> BinaryIO:
    """Raises FileNotFoundError, or the OSError of the file system."""
    return where.open("rb") if isinstance(where, Path) else fsspec.open(where, "rb").open()


def files_of(where: Place, suffix: str) -> list[Place]:
    """The file itself, or the files of a folder whose names end so, in order of their names."""
    if str(where).endswith(suffix):
        return [where]
    if isinstance(where, Path):
        return [*sorted(where.glob(f"*{suffix}"))]
    system, path = fsspec.core.url_to_fs(where)
    return [system.unstrip_protocol(found) for found in sorted(system.glob(f"{path}/*{suffix}"))]


class NamedBytes(io.BytesIO):
    """The content of a file; `str` and `repr` tell its name, so that messages about it do."""

    def __init__(self, content: bytes, name: str) -> None:
        super().__init__(content)
        self.name = name

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return repr(self.name)
