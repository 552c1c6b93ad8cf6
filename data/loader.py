"""Endless stream of packed batches whose state is one number.

Sample i of the stream is a function of (seed, i) alone: group, data set, place in that epoch's
permutation, dropout, time and noise. So a stream resumes exactly from its position.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from modeling.batch import PackedBatch, SpecialTokens

from .config import DatasetConfig, GroupConfig, MixtureConfig
from .packer import Packer, PackerConfig, Sample
from .records import Record, read_records
from .tasks import restoration_sample
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
        if self.expected_num_tokens < 1:
            raise ValueError(f"expected_num_tokens={self.expected_num_tokens} must be positive")
        if self.max_num_tokens_per_sample > self.max_num_tokens:
            raise ValueError(
                f"max_num_tokens_per_sample={self.max_num_tokens_per_sample} exceeds "
                f"max_num_tokens={self.max_num_tokens}"
            )
        if self.expected_num_tokens > self.max_num_tokens:
            raise ValueError(
                f"expected_num_tokens={self.expected_num_tokens} exceeds "
                f"max_num_tokens={self.max_num_tokens}"
            )


class _Dataset:
    """Records of one data set in an order that changes every epoch."""

    def __init__(self, config: DatasetConfig, group: GroupConfig, seed: int) -> None:
        self.config, self.group, self.seed = config, group, seed
        records = read_records(config.jsonl_path)
        self.records = records[: config.num_used_data or None]
        self._epoch, self._order = -1, np.zeros(0, dtype=np.int64)

    def record(self, draw: int) -> Record:
        """The record of the `draw`-th sample that is taken from this set."""
        epoch, place = divmod(draw, len(self.records))
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self._epoch, self._order = epoch, rng.permutation(len(self.records))
        return self.records[self._order[place]]


def _check_strides(group: GroupConfig, packer: PackerConfig) -> None:
    """Raises ValueError where a resize rule gives sizes that the model cannot take."""
    rules = (
        ("image_transform_args", group.image_transform_args, packer.latent_stride),
        ("vit_image_transform_args", group.vit_image_transform_args, packer.vit_patch_size),
    )
    for name, rule, stride in rules:
        if rule.image_stride % stride:
            raise ValueError(
                f"{name}: image_stride={rule.image_stride} is no multiple of the model's {stride}"
            )


class PackedLoader:
    """Iterates packed batches; `state_dict` / `load_state_dict` resume exactly."""

    def __init__(
        self,
        mixture: MixtureConfig,
        config: LoaderConfig,
        packer_config: PackerConfig,
        tokenizer: Tokenizer,
    ) -> None:
        self.config, self.packer_config, self.tokenizer = config, packer_config, tokenizer
        pairs = [(group, d) for group in mixture.groups for d in group.datasets]
        self.datasets = [
            _Dataset(d, group, config.data_seed + i) for i, (group, d) in enumerate(pairs)
        ]
        for group in mixture.groups:
            _check_strides(group, packer_config)
        sizes = np.array([len(d.records) for d in self.datasets], dtype=float)
        # A group's share is its weight; inside a group every record is equally likely.
        in_group = [sizes[[d.group is group for d in self.datasets]].sum() for group, _ in pairs]
        shares = np.array([group.weight for group, _ in pairs]) * sizes / np.array(in_group)
        self.shares = shares / shares.sum()
        self.draws = [0] * len(self.datasets)
        self.position = 0
        self.too_long = 0

    def _draw(self) -> tuple[int, Sample, torch.Generator]:
        """The next sample of the stream and the generator of its randomness."""
        rng = np.random.default_rng([self.config.data_seed, self.position])
        chosen = int(rng.choice(len(self.datasets), p=self.shares))
        dataset = self.datasets[chosen]
        sample = restoration_sample(
            dataset.record(self.draws[chosen]),
            dataset.config.data_dir,
            self.tokenizer,
            dataset.group.image_transform_args,
            dataset.group.vit_image_transform_args,
            droppable=True,
        )
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        return chosen, sample, generator

    def _advance(self, chosen: int) -> None:
        self.position += 1
        self.draws[chosen] += 1

    def next_batch(self) -> PackedBatch:
        """Raises ValueError when samples keep being too long for a pack."""
        packer = Packer(self.packer_config, self.special)
        dropped = 0
        while packer.num_tokens < self.config.expected_num_tokens:
            chosen, sample, generator = self._draw()
            tokens = self.packer_config.num_tokens(sample)
            if tokens > self.config.max_num_tokens_per_sample:
                dropped += 1
                if dropped > 100:
                    raise ValueError(
                        f"100 samples in a row exceed max_num_tokens_per_sample="
                        f"{self.config.max_num_tokens_per_sample} (the last has {tokens} tokens)"
                    )
                self.too_long += 1
                self._advance(chosen)
                continue
            if packer.num_tokens + tokens > self.config.max_num_tokens:
                break
            dropped = 0
            packer.add(sample, generator)
            self._advance(chosen)
        return packer.build()

    @property
    def special(self) -> SpecialTokens:
        return self.tokenizer.special

    def __iter__(self) -> Iterator[PackedBatch]:
        while True:
            yield self.next_batch()

    def resize_rules(self) -> dict[str, Any]:
        """Resize rules of the first group, as keys of a mixture."""
        group = self.datasets[0].group
        return {
            "image_transform_args": asdict(group.image_transform_args),
            "vit_image_transform_args": asdict(group.vit_image_transform_args),
        }

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "draws": list(self.draws), "too_long": self.too_long}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError when the state belongs to another mixture."""
        if len(state["draws"]) != len(self.datasets):
            raise ValueError(
                f"the saved stream mixes {len(state['draws'])} data sets, "
                f"this one {len(self.datasets)}"
            )
        self.position, self.too_long = state["position"], state["too_long"]
        self.draws = list(state["draws"])
