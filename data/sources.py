"""Records of a file, indexed when it is opened and read when they are drawn.

What is kept of a JSONL file is the place of every line, of a parquet file the place of every row
group. The former goes to shared memory, the latter is small: workers get both for nothing.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from .files import Place, files_of, open_binary
from .records import DEFAULT_FORM, Form, Record, RecordError, parse_record, record_of

BLOCK_BYTES = 2**24
HELD_BYTES = 2**28
"""Of row groups that a process keeps of a parquet data set; two are kept whatever their size."""


class JsonlRecords:
    """Lines of a JSONL file, found by their offsets; blank lines are allowed.

    Raises RecordError for a file without any record, FileNotFoundError without the file.
    """

    def __init__(
        self, path: Place, form: Form = DEFAULT_FORM, used: int = 0, shuffle_seed: int | None = None
    ) -> None:
        """Takes the first `used` lines (0: all), after a shuffle if that has a seed."""
        self.path, self.form = path, form
        self._file: BinaryIO | None = None
        starts, numbers = _index(path)
        if shuffle_seed is not None:
            kept = np.random.default_rng(shuffle_seed).permutation(len(starts))[: used or None]
            kept.sort()
            starts, numbers = starts[kept], numbers[kept]
        starts, numbers = starts[: used or None], numbers[: used or None]
        if not len(starts):
            raise RecordError(f"{path}:1: no record in the file")
        self.starts, self.numbers = torch.from_numpy(starts), torch.from_numpy(numbers)
        self.index = self.starts, self.numbers

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Record:
        self._file = self._file or open_binary(self.path)
        self._file.seek(int(self.starts[index]))
        return parse_record(self._file.readline(), self.source(index), self.form)

    def source(self, index: int) -> str:
        return f"{self.path}:{int(self.numbers[index])}"

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_file": None}

    def order(self, rng: np.random.Generator) -> np.ndarray:
        """All numbers in a random order that is quick to read."""
        return rng.permutation(len(self))


def _index(path: Place) -> tuple[np.ndarray, np.ndarray]:
    """Offset (int64) and number (int32, from 1) of every line that is not blank."""
    starts, numbers = [np.zeros(0, np.int64)], [np.zeros(0, np.int32)]
    offset = lines = 0
    with open_binary(path) as file:
        rest = b""
        while block := file.read(BLOCK_BYTES):
            end = block.rfind(b"\n") + 1
            whole, rest = (rest + block[:end], block[end:]) if end else (b"", rest + block)
            found, kept = _lines(whole)
            starts.append(offset + found[kept])
            numbers.append((lines + 1 + kept).astype(np.int32))
            offset, lines = offset + len(whole), lines + len(found)
        if rest.strip():
            starts.append(np.array([offset]))
            numbers.append(np.array([lines + 1], np.int32))
    return np.concatenate(starts), np.concatenate(numbers)


def _lines(block: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Places where the lines of a block begin, and which of them are not blank."""
    symbols = np.frombuffer(block, np.uint8)
    ends = np.flatnonzero(symbols == ord("\n"))
    starts = np.concatenate([np.zeros(min(1, len(ends)), np.int64), ends[:-1] + 1])
    # A line that begins with a letter or a bracket is not blank; the others are few.
    doubtful = np.flatnonzero(symbols[starts] <= ord(" "))
    blank = [line for line in doubtful if not block[starts[line] : ends[line]].strip()]
    return starts, np.delete(np.arange(len(starts)), blank)


class ParquetRecords:
    """Rows of parquet files: a file, or a folder of which the first `used` (0: all) are taken.

    A few row groups are held at a time, so records in `order` come group by group, shuffled within
    each. Planning is ahead of decoding, by groups that must not evict each other. Raises
    RecordError without any row, ValueError without pyarrow.
    """

    index: tuple[Tensor, ...] = ()

    def __init__(self, path: Place, form: Form = DEFAULT_FORM, used: int = 0) -> None:
        self.path, self.form = path, form
        self.files = files_of(path, ".parquet")[: used or None]
        self._groups: list[tuple[int, int]] = []
        """(file, row group)"""
        self._held: dict[int, Any] = {}
        """Rows of groups by number, the last used last."""
        rows = [0]
        for number, file in enumerate(self.files):
            with open_binary(file) as opened:
                footer = _parquet_file(opened).metadata
            self._groups += [(number, group) for group in range(footer.num_row_groups)]
            rows += [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
        self._ends = np.cumsum(rows)
        if not len(self):
            raise RecordError(f"{path}:1: no record in the file")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Record:
        group = self._group(index)
        row = index - int(self._ends[group])
        (raw,) = self._rows(group).slice(row, 1).to_pylist()
        present = {k: v for k, v in raw.items() if v is not None}
        return record_of(present, self.source(index), self.form)

    def _rows(self, group: int) -> Any:
        rows = self._held.pop(group, None)
        if rows is None:
            number, inside = self._groups[group]
            with open_binary(self.files[number]) as opened:
                rows = _parquet_file(opened).read_row_group(inside)
            held = rows.nbytes + sum(others.nbytes for others in self._held.values())
            # Planning and decoding stand in two groups, which must not evict each other.
            while len(self._held) > 1 and held > HELD_BYTES:
                held -= self._held.pop(next(iter(self._held))).nbytes
        self._held[group] = rows
        return rows

    def source(self, index: int) -> str:
        number, _ = self._groups[self._group(index)]
        before = int(self._ends[self._groups.index((number, 0))])
        return f"{self.files[number]}:{index - before + 1}"

    def _group(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return int(np.searchsorted(self._ends, index, side="right")) - 1

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_held": {}}

    def order(self, rng: np.random.Generator) -> np.ndarray:
        groups = rng.permutation(len(self._groups))
        return np.concatenate([rng.permutation(np.arange(*self._ends[g : g + 2])) for g in groups])


Records = JsonlRecords | ParquetRecords
"""Records by number; one that cannot be used raises RecordError when it is read."""


def share(tensors: Sequence[Tensor]) -> None:
    """Moves tensors into one piece of shared memory: a process is sent 253 pieces at most."""
    sizes = [-(-tensor.nbytes // 8) * 8 for tensor in tensors]
    # `share_memory_` of a tensor would hold all of it twice.
    memory = torch.UntypedStorage._new_shared(sum(sizes), device="cpu")
    pieces = torch.empty(0, dtype=torch.uint8).set_(memory).split(sizes)
    for tensor, piece in zip(tensors, pieces, strict=True):
        tensor.data = piece[: tensor.nbytes].view(tensor.dtype).copy_(tensor)


def good_records(records: Records) -> Iterator[Record]:
    """All that can be read, in the order of the file."""
    for index in range(len(records)):
        with suppress(RecordError):
            yield records[index]


def _parquet_file(opened: BinaryIO) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError("parquet_path needs pyarrow: pip install '.[parquet]'") from error
    return pyarrow.parquet.ParquetFile(opened)
