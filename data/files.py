"""Files by path, or by URL (`s3://bucket/a.jsonl`, `zip://in/a.png::s3://bucket/b.zip`)."""

import io
import posixpath
import re
import tarfile
import zlib
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import BadZipFile

import fsspec

Place = Path | str
"""A local path, or a URL."""
UNREADABLE = (OSError, EOFError, ValueError, RuntimeError, BadZipFile, zlib.error)
"""What `read_bytes` raises, over damaged archives too."""
INSIDE = re.compile("(?<=://).*?(?=::|$)")
"""The path of a URL: `bucket/a.jsonl`, `in/a.png`."""
_archive_system = cache(fsspec.core.url_to_fs)
"""Kept, because open files of an archive end with it, and its table is read once."""


def place(text: str) -> Place:
    return text if "://" in text else Path(text)


def within(folder: Place, name: str) -> Place:
    """A file of a folder; `name` may be a whole path or URL."""
    if "://" in name:
        return name
    if isinstance(folder, Path):
        return folder / name
    return INSIDE.sub(lambda path: posixpath.join(path[0], name), folder, 1)


def folder_of(where: Place, suffix: str = "") -> Place:
    """The folder of a file, whose name ends so; anything else is a folder itself."""
    if isinstance(where, Path):
        return where.parent if where.name.endswith(suffix) and not where.is_dir() else where
    is_file = INSIDE.findall(where)[0].endswith(suffix)
    return INSIDE.sub(lambda path: posixpath.dirname(path[0]), where, 1) if is_file else where


def _system(where: Place) -> tuple[Any, Any]:
    """What has `exists` and `open`, and the path for these. Raises OSError without the package for
    a URL or where an archive is damaged, ValueError for an unknown scheme."""
    try:
        if isinstance(where, Path):
            return Path, where
        if re.match("[^:]+://.*::", where):
            return _archive_system(INSIDE.sub("", where, 1))[0], INSIDE.findall(where)[0]
        return fsspec.core.url_to_fs(where)
    except (ImportError, BadZipFile, tarfile.TarError) as error:
        raise OSError(f"{where}: {error}") from error


def existing(text: str) -> Place:
    """Raises FileNotFoundError where nothing is there, and as `_system` does."""
    system, path = _system(where := place(text))
    if not system.exists(path):
        raise FileNotFoundError(f"{where} does not exist")
    return where


def open_binary(where: Place) -> BinaryIO:
    """Raises FileNotFoundError or the OSError of the file system, and as `_system` does."""
    system, path = _system(where)
    return system.open(path, "rb")


def read_bytes(where: Place) -> bytes:
    """Raises UNREADABLE."""
    with open_binary(where) as opened:
        return opened.read()


def files_of(where: Place, suffix: str) -> list[Place]:
    """The file itself, or the files of a folder whose names end so, in order of their names."""
    if folder_of(where, suffix) != where:
        return [where]
    if isinstance(where, Path):
        return [*sorted(where.glob(f"*{suffix}"))]
    system, path = _system(where)
    found = sorted(system.glob(f"{path.rstrip('/')}/*{suffix}"))
    return [within(where, posixpath.basename(name)) for name in found]


class NamedBytes(io.BytesIO):
    """The content of a file; `str` and `repr` tell its name, so that messages about it do."""

    def __init__(self, content: bytes, name: str) -> None:
        super().__init__(content)
        self.name = name

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return repr(self.name)
