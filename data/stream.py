"""The one global stream of packs, planned before any image is decoded.

Sample i of the stream is a function of (seed, i) alone: group, data set, place in that epoch's
permutation, dropout, time and noise. Packs are made of samples by their lengths in tokens alone, so
every rank and every worker plans the same packs and decodes those that are its own. Ranks and
workers have no part in the plan: a stream resumes exactly on any number of them.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from modeling.batch import PackedBatch

from .config import DatasetConfig, GroupConfig
from .packer import Packer, PackerConfig
from .records import read_records
from .tasks import RestorationTask
from .tokenizer import Tokenizer

MAX_DROPPED_IN_A_ROW = 100


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    data_seed: int = 42
    expected_num_tokens: int = 32768
    """A pack is full once it holds this many tokens, counted before conditions are dropped."""
    max_num_tokens: int = 36864
    """No pack holds more; a sample that would exceed it waits in the buffer."""
    max_num_tokens_per_sample: int = 16384
    """Longer samples are dropped and counted."""
    prefer_buffer_before: int = 16384
    """While a pack holds fewer tokens, samples that wait in the buffer come first."""
    max_buffer_size: int = 50
    """Samples that may wait; one more that does not fit closes the pack. 0 keeps the order."""
    num_workers: int = 1
    """Processes per rank that decode images; 0 decodes in the training process."""
    prefetch_factor: int = 2
    """Packs that each worker prepares ahead."""

    def __post_init__(self) -> None:
        for name in ("max_num_tokens_per_sample", "expected_num_tokens"):
            if (value := getattr(self, name)) > self.max_num_tokens:
                raise ValueError(f"{name}={value} exceeds max_num_tokens={self.max_num_tokens}")
        for name, value in vars(self).items():
            # The buffer is tried by an empty pack at least, or its samples would wait for ever.
            least = int(name not in ("data_seed", "max_buffer_size", "num_workers"))
            if value < least:
                raise ValueError(f"{name}={value} is less than {least}")


class Draw(NamedTuple):
    """One sample of the stream."""

    dataset: int
    record: int
    seed: int
    """Of its dropout, times and noise."""


class Dataset:
    """Samples of one data set, its records in an order that changes every epoch."""

    def __init__(
        self, config: DatasetConfig, task: RestorationTask, packing: PackerConfig, seed: int
    ) -> None:
        self.name, self.folder = config.name, config.data_dir
        self.task, self.packing, self.seed = task, packing, seed
        self.records = read_records(config.jsonl_path)[: config.num_used_data or None]
        # Shared with the workers: what one of them has measured costs the others nothing.
        self._lengths = torch.zeros(len(self.records), dtype=torch.int32).share_memory_()
        self._epoch, self._order = -1, np.zeros(0, dtype=np.int64)

    def record_of(self, draw: int) -> int:
        """Index of the record that the `draw`-th draw from this set takes."""
        epoch, place = divmod(draw, len(self.records))
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self._epoch, self._order = epoch, rng.permutation(len(self.records))
        return int(self._order[place])

    def length(self, record: int) -> int:
        """Tokens of a record without any dropout; its images are not decoded."""
        if not (known := int(self._lengths[record])):
            known = self.packing.num_tokens(self.task.outline(self.records[record], self.folder))
            self._lengths[record] = known
        return known


class Planner:
    """Makes the packs of the stream one after the other; `state` and `load` move between them."""

    def __init__(
        self,
        mixture: tuple[GroupConfig, ...],
        config: LoaderConfig,
        packing: PackerConfig,
        tokenizer: Tokenizer,
    ) -> None:
        self.config, self.packing, self.special = config, packing, tokenizer.special
        self.datasets: list[Dataset] = []
        weights: list[float] = []
        for group in mixture:
            task = RestorationTask(
                tokenizer, group.image_transform_args, group.vit_image_transform_args
            )
            task.require_strides(packing.latent_stride, packing.vit_patch_size)
            first_seed = config.data_seed + len(self.datasets)
            sets = [Dataset(d, task, packing, first_seed + i) for i, d in enumerate(group.datasets)]
            # A group's share is its weight; inside a group every record is equally likely.
            sizes = [len(d.records) for d in sets]
            weights += [group.weight * size / sum(sizes) for size in sizes]
            self.datasets += sets
        self.shares = np.array(weights) / np.sum(weights)
        self.draws, self.packed = [0] * len(weights), [0] * len(weights)
        self.buffer: list[Draw] = []

    def next_pack(self) -> list[Draw]:
        """Raises ValueError when samples keep being too long for a pack."""
        pack: list[Draw] = []
        tokens = 0
        while tokens < self.config.expected_num_tokens:
            if (draw := self._next_that_fits(tokens)) is None:
                break
            pack.append(draw)
            tokens += self._length(draw)
            self.packed[draw.dataset] += 1
        return pack

    def decode(self, pack: list[Draw]) -> PackedBatch:
        packer = Packer(self.packing, self.special)
        for draw in pack:
            dataset = self.datasets[draw.dataset]
            sample = dataset.task.sample(dataset.records[draw.record], dataset.folder)
            packer.add(sample, torch.Generator().manual_seed(draw.seed))
        return packer.build()

    def state(self) -> dict[str, Any]:
        """Draws from each data set, samples of it that were packed, and the samples that wait."""
        buffer = [list(draw) for draw in self.buffer]
        return {"draws": [*self.draws], "packed": [*self.packed], "buffer": buffer}

    def load(self, state: dict[str, Any]) -> None:
        self.draws, self.packed = [*state["draws"]], [*state["packed"]]
        self.buffer = [Draw(*draw) for draw in state["buffer"]]

    def _next_that_fits(self, tokens: int) -> Draw | None:
        """The next sample of a pack that holds `tokens`; None closes the pack."""
        config, dropped = self.config, 0
        room, longest = config.max_num_tokens - tokens, config.max_num_tokens_per_sample
        if tokens < config.prefer_buffer_before:
            for place, waiting in enumerate(self.buffer):
                if self._length(waiting) <= room:
                    return self.buffer.pop(place)
        while dropped < MAX_DROPPED_IN_A_ROW:
            draw = self._draw()
            length = self._length(draw)
            if length > longest:
                dropped += 1
            elif length > room:
                if len(self.buffer) >= config.max_buffer_size:
                    return None
                self.buffer.append(draw)
                dropped = 0
            self.draws[draw.dataset] += 1
            if length <= min(room, longest):
                return draw
        raise ValueError(
            f"{dropped} samples in a row exceed max_num_tokens_per_sample={longest} "
            f"(the last has {length} tokens)"
        )

    def _draw(self) -> Draw:
        """The next sample of the stream; it stays the next until it is counted in `draws`."""
        rng = np.random.default_rng([self.config.data_seed, sum(self.draws)])
        chosen = int(rng.choice(len(self.datasets), p=self.shares))
        record = self.datasets[chosen].record_of(self.draws[chosen])
        return Draw(chosen, record, int(rng.integers(2**62)))

    def _length(self, draw: Draw) -> int:
        return self.datasets[draw.dataset].length(draw.record)
