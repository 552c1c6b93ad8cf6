"""Endless stream of packed batches whose state is the number of draws from each data set.

Sample i of the stream is a function of (seed, i) alone: group, data set, place in that epoch's
permutation, dropout, time and noise. So a stream resumes exactly from its position.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from modeling.batch import PackedBatch

from .config import RULES, DatasetConfig, GroupConfig
from .packer import Packer, PackerConfig, Sample
from .records import read_records
from .tasks import RestorationTask
from .tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    data_seed: int = 42
    expected_num_tokens: int = 32768
    """A pack is full once it holds this many tokens."""
    max_num_tokens: int = 36864
    """No pack holds more; a sample that would exceed it opens the next pack."""
    max_num_tokens_per_sample: int = 16384
    """Longer samples are dropped and counted."""

    def __post_init__(self) -> None:
        for name in ("max_num_tokens_per_sample", "expected_num_tokens"):
            if not 1 <= (value := getattr(self, name)) <= self.max_num_tokens:
                raise ValueError(
                    f"{name}={value} is not in 1..max_num_tokens={self.max_num_tokens}"
                )


class _Dataset:
    """Samples of one data set, its records in an order that changes every epoch."""

    def __init__(self, config: DatasetConfig, task: RestorationTask, seed: int) -> None:
        self.name, self.folder, self.task, self.seed = config.name, config.data_dir, task, seed
        self.records = read_records(config.jsonl_path)[: config.num_used_data or None]
        self._epoch, self._order = -1, np.zeros(0, dtype=np.int64)

    def sample(self, draw: int) -> Sample:
        """The `draw`-th sample that is taken from this set."""
        epoch, place = divmod(draw, len(self.records))
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self._epoch, self._order = epoch, rng.permutation(len(self.records))
        return self.task.sample(self.records[self._order[place]], self.folder)


class PackedLoader:
    """Iterates packed batches; `state_dict` / `load_state_dict` resume exactly."""

    def __init__(
        self,
        mixture: tuple[GroupConfig, ...],
        config: LoaderConfig,
        packer_config: PackerConfig,
        tokenizer: Tokenizer,
    ) -> None:
        self.config, self.packer_config, self.tokenizer = config, packer_config, tokenizer
        self.resize_rules = {name: asdict(getattr(mixture[0], name)) for name in RULES}
        """Of the first group, as keys of a mixture."""
        self.datasets: list[_Dataset] = []
        weights: list[float] = []
        for group in mixture:
            task = RestorationTask(
                tokenizer, group.image_transform_args, group.vit_image_transform_args
            )
            task.require_strides(packer_config.latent_stride, packer_config.vit_patch_size)
            first_seed = config.data_seed + len(self.datasets)
            sets = [_Dataset(d, task, first_seed + i) for i, d in enumerate(group.datasets)]
            # A group's share is its weight; inside a group every record is equally likely.
            sizes = [len(d.records) for d in sets]
            weights += [group.weight * size / sum(sizes) for size in sizes]
            self.datasets += sets
        self.shares = np.array(weights) / np.sum(weights)
        self.draws = [0] * len(self.datasets)
        self.too_long = 0

    @property
    def position(self) -> int:
        """Samples of the stream that were packed or dropped."""
        return sum(self.draws)

    def _draw(self) -> tuple[int, Sample, torch.Generator]:
        """The next sample of the stream and the generator of its randomness."""
        rng = np.random.default_rng([self.config.data_seed, self.position])
        chosen = int(rng.choice(len(self.datasets), p=self.shares))
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        return chosen, self.datasets[chosen].sample(self.draws[chosen]), generator

    def next_batch(self) -> PackedBatch:
        """Raises ValueError when samples keep being too long for a pack."""
        packer, dropped_in_a_row = Packer(self.packer_config, self.tokenizer.special), 0
        longest = self.config.max_num_tokens_per_sample
        while packer.num_tokens < self.config.expected_num_tokens:
            chosen, sample, generator = self._draw()
            tokens = self.packer_config.num_tokens(sample)
            if tokens <= longest:
                if packer.num_tokens + tokens > self.config.max_num_tokens:
                    break
                packer.add(sample, generator)
                dropped_in_a_row = 0
            elif dropped_in_a_row == 100:
                raise ValueError(
                    f"100 samples in a row exceed max_num_tokens_per_sample={longest} "
                    f"(the last has {tokens} tokens)"
                )
            else:
                self.too_long += 1
                dropped_in_a_row += 1
            self.draws[chosen] += 1
        return packer.build()

    def __iter__(self) -> Iterator[PackedBatch]:
        while True:
            yield self.next_batch()

    def state_dict(self) -> dict[str, Any]:
        return {"draws": list(self.draws), "too_long": self.too_long}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError when the state belongs to another mixture."""
        if len(state["draws"]) != len(self.datasets):
            raise ValueError(
                f"the saved stream mixes {len(state['draws'])} data sets, "
                f"this one {len(self.datasets)}"
            )
        self.draws, self.too_long = list(state["draws"]), state["too_long"]
