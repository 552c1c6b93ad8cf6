"""The one global stream of packs, planned before any image is decoded.

Sample i of the stream is a function of (seed, i) alone: group, data set, place in that epoch's
permutation, dropout, time and noise. Packs are made of samples by their lengths in tokens alone, so
every rank and every worker plans the same packs and decodes those that are its own. Ranks and
workers have no part in the plan: a stream resumes exactly on any number of them.

What a record or the header of its image shows to be useless never enters a pack. What only decoding
shows is left out of its pack by the rank that has it, and the plan stays as it is.
"""

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from modeling.batch import PackedBatch

from .config import DatasetConfig, GroupConfig
from .files import Place
from .images import ImageError
from .packer import Packer, PackerConfig
from .records import RecordError
from .sources import Records, share
from .tally import TOO_LONG, Bad, Tally, reason_of
from .tasks import Task
from .tokenizer import Tokenizer
from .volumes import UnreachableError

MAX_SKIPPED_IN_A_ROW = 100
HOW_IT_RUNS = ("num_workers", "prefetch_factor", "max_bad_share")
"""Fields of LoaderConfig that the plan does not depend on."""
MAY_BE_ZERO = ("data_seed", "max_buffer_size", "num_workers", "max_bad_share")


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
    """Samples that may wait; one more that does not fit closes the pack. 0 keeps the order.
    Samples of mandatory groups may wait beside them."""
    max_bad_share: float = 0.01
    """A run ends once more samples of a data set cannot be used, for other reasons than their
    length, and they are at least `tally.MIN_BAD`."""
    num_workers: int = 1
    """Processes per rank that decode images; 0 decodes in the training process."""
    prefetch_factor: int = 2
    """Packs that each worker prepares ahead."""

    def __post_init__(self) -> None:
        for name in ("max_num_tokens_per_sample", "expected_num_tokens"):
            if (value := getattr(self, name)) > self.max_num_tokens:
                raise ValueError(f"{name}={value} exceeds max_num_tokens={self.max_num_tokens}")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"max_bad_share={self.max_bad_share} is no share in [0, 1]")
        for name, value in vars(self).items():
            # The buffer is tried by an empty pack at least, or its samples would wait for ever.
            least = int(name not in MAY_BE_ZERO)
            if value < least:
                raise ValueError(f"{name}={value} is less than {least}")


class Draw(NamedTuple):
    """One sample of the stream."""

    dataset: int
    record: int
    seed: int
    """Of its choices, dropout, times and noise."""
    tokens: int
    """Without any dropout."""


class Dataset:
    """Samples of one data set, its records in an order that changes every epoch."""

    def __init__(
        self, config: DatasetConfig, records: Records, task: Task, packing: PackerConfig, seed: int
    ) -> None:
        self.name, self.records, self.task = config.name, records, task
        self.folder: Place = config.data_dir
        self.packing, self.seed = packing, seed
        self.lengths = torch.zeros(len(records), dtype=torch.int32)
        """0 where not known yet; shared: what one worker has measured costs the others nothing."""
        self._epoch, self._order = -1, np.zeros(0, dtype=np.int64)

    def __getstate__(self) -> dict[str, Any]:
        """Without the order, which a worker makes itself sooner than it could be sent."""
        return vars(self) | {"_epoch": -1, "_order": np.zeros(0, dtype=np.int64)}

    def record_of(self, draw: int) -> int:
        """Index of the record that the `draw`-th draw from this set takes."""
        epoch, place = divmod(draw, len(self.records))
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self._epoch, self._order = epoch, self.records.order(rng)
        return int(self._order[place])

    def length(self, record: int, seed: int) -> int:
        """Tokens of a record without any dropout; its images are not decoded.

        Raises RecordError and ImageError when it cannot be used.
        """
        if not (known := int(self.lengths[record])):
            outline = self.task.outline(self.records[record], self.folder, seed)
            known = self.packing.num_tokens(outline)
            if not self.task.chooses:
                self.lengths[record] = known
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
        settings = {k: v for k, v in asdict(config).items() if k not in HOW_IT_RUNS}
        self.settings: dict[str, Any] = settings
        """What the plan depends on, beside the records: plain values by name."""
        self.datasets: list[Dataset] = []
        weights: list[float] = []
        mandatory: list[range] = []
        for number, group in enumerate(mixture, 1):
            first, task = len(self.datasets), group.make_task(tokenizer)
            own = asdict(group) | {
                "task": type(task).__name__,
                "datasets": [dataset.weight for dataset in group.datasets],
            }
            settings |= {f"group {number}: {key}": value for key, value in own.items()}
            weights += self._open_group(group, task)
            if group.is_mandatory:
                mandatory.append(range(first, len(self.datasets)))
        share([tensor for d in self.datasets for tensor in (d.lengths, *d.records.index)])
        if len(mandatory) > config.max_buffer_size + 1:
            raise ValueError(
                f"max_buffer_size={config.max_buffer_size} must be {len(mandatory) - 1} or more "
                f"for {len(mandatory)} groups with is_mandatory: what does not fit has to wait"
            )
        self.shares = np.array(weights) / np.sum(weights)
        self.mandatory = [self._shares_of(sets) for sets in mandatory]
        """Of each mandatory group."""
        self.draws, self.packed = [0] * len(weights), [0] * len(weights)
        self.skipped = Tally.of(len(weights))
        self.buffer: list[Draw] = []

    def _open_group(self, group: GroupConfig, task: Task) -> list[float]:
        """Adds its data sets; their weights in the mixture."""
        task.require_strides(self.packing.latent_stride, self.packing.vit_patch_size)
        sizes: list[float] = []
        for dataset in group.datasets:
            seed, records = self.config.data_seed + len(self.datasets), group.open_records(dataset)
            self.datasets.append(Dataset(dataset, records, task, self.packing, seed))
            sizes.append(dataset.weight * len(records))
        # A group's share is its weight; inside, a record's chance is the weight of its set.
        return [group.weight * size / sum(sizes) for size in sizes]

    def _shares_of(self, sets: range) -> np.ndarray:
        kept = np.where(np.isin(np.arange(len(self.shares)), sets), self.shares, 0)
        return kept / kept.sum()

    def next_pack(self) -> list[Draw]:
        """Raises ValueError when sample after sample cannot be used."""
        # Whatever group the longest wait is of: else no room might ever be left for it.
        pack = self.buffer[:1]
        del self.buffer[:1]
        for shares in self.mandatory:
            if not any(shares[draw.dataset] for draw in pack):
                pack += self._next_that_fits(pack, shares, mandatory=True)
        while sum(draw.tokens for draw in pack) < self.config.expected_num_tokens:
            if not (found := self._next_that_fits(pack, self.shares)):
                break
            pack += found
        for draw in pack:
            self.packed[draw.dataset] += 1
        return pack

    def decode(self, pack: list[Draw]) -> tuple[PackedBatch, list[Bad], list[Draw]]:
        """The batch of a pack, without its samples that cannot be decoded; those; all it tried.

        If that is all of them, other records of their data set stand in. Raises ValueError when
        these cannot be decoded either.
        """
        packer, bad, tried = Packer(self.packing, self.special), list[Bad](), [*pack]
        for draw in pack:
            self._add(packer, draw, bad)
        reserve = self._reserve(pack[0])
        while bad and not packer.num_tokens:
            if (stand_in := next(reserve, None)) is None:
                text = f"{len(bad)} samples in a row cannot be decoded; the last"
                raise ValueError(f"{text}: {bad[-1].message}")
            self._add(packer, stand_in, bad)
            tried.append(stand_in)
        return packer.build(), bad, tried

    def _add(self, packer: Packer, draw: Draw, bad: list[Bad]) -> None:
        dataset = self.datasets[draw.dataset]
        try:
            record = dataset.records[draw.record]
            sample = dataset.task.sample(record, dataset.folder, draw.seed)
        except (RecordError, ImageError) as error:
            bad.append(_judged(draw.dataset, error))
            return
        packer.add(sample, torch.Generator().manual_seed(draw.seed))

    def _reserve(self, draw: Draw) -> Iterator[Draw]:
        """Samples for the place of one; a function of that draw alone, so that the stream does not
        depend on who decodes."""
        rng, dataset = np.random.default_rng(draw.seed), self.datasets[draw.dataset]
        for _ in range(MAX_SKIPPED_IN_A_ROW):
            record, seed = int(rng.integers(len(dataset.records))), int(rng.integers(2**62))
            found = self.measured(draw.dataset, record, seed)
            if isinstance(found, Draw):
                yield found

    def state(self) -> dict[str, Any]:
        """Draws from each data set, samples of it that were packed or skipped, and those that
        wait."""
        return {
            "draws": [*self.draws],
            "packed": [*self.packed],
            "skipped": copy.deepcopy(self.skipped.found),
            "buffer": [list(draw) for draw in self.buffer],
        }

    def load(self, state: dict[str, Any]) -> None:
        self.draws, self.packed = [*state["draws"]], [*state["packed"]]
        self.skipped = Tally(state["skipped"])
        self.buffer = [Draw(*draw) for draw in state["buffer"]]

    def _next_that_fits(
        self, pack: list[Draw], shares: np.ndarray, mandatory: bool = False
    ) -> list[Draw]:
        """The next sample of a pack. None closes the pack, or leaves it without this group."""
        config, skipped = self.config, 0
        tokens = sum(draw.tokens for draw in pack)
        room = config.max_num_tokens - tokens
        preferred = mandatory or tokens < config.prefer_buffer_before
        waiting = [i for i, draw in enumerate(self.buffer) if preferred and shares[draw.dataset]]
        for place in waiting:
            if self.buffer[place].tokens <= room:
                return [self.buffer.pop(place)]
        # A group whose own samples wait for room draws no further one.
        closed = bool(waiting) if mandatory else len(self.buffer) > config.max_buffer_size
        if closed:
            return []
        while skipped < MAX_SKIPPED_IN_A_ROW:
            found = self._draw(shares)
            if isinstance(found, Bad):
                self.draws[found.dataset] += 1
                self.skipped.add(found)
                skipped += 1
                continue
            fits, full = found.tokens <= room, len(self.buffer) >= config.max_buffer_size
            if full and not fits and not self.mandatory:
                return []
            self.draws[found.dataset] += 1
            if fits:
                return [found]
            self.buffer.append(found)
            skipped = 0
            # After a mandatory sample it would not be the next again, but another one: it waits
            # too, or long ones would be drawn less often than their share.
            if mandatory or full:
                return []
        raise ValueError(f"{skipped} samples in a row cannot be used; the last: {found[-1]}")

    def _draw(self, shares: np.ndarray) -> Draw | Bad:
        """The next sample of the stream; it stays the next until it is counted in `draws`."""
        rng = np.random.default_rng([self.config.data_seed, sum(self.draws)])
        chosen = int(rng.choice(len(self.datasets), p=shares))
        record = self.datasets[chosen].record_of(self.draws[chosen])
        return self.measured(chosen, record, int(rng.integers(2**62)))

    def measured(self, chosen: int, record: int, seed: int) -> Draw | Bad:
        """A record of data set `chosen` as a sample of the stream, or why it cannot be one."""
        dataset, longest = self.datasets[chosen], self.config.max_num_tokens_per_sample
        try:
            tokens = dataset.length(record, seed)
        except (RecordError, ImageError) as error:
            return _judged(chosen, error)
        if tokens > longest:
            text = f"{tokens} tokens exceed max_num_tokens_per_sample={longest}"
            return Bad(chosen, TOO_LONG, f"{dataset.records[record].source}: {text}")
        return Draw(chosen, record, seed, tokens)


def _judged(dataset: int, error: RecordError | ImageError) -> Bad:
    """Raises an UnreachableError again: left out by one rank alone, the sample would part the
    ranks' plans."""
    if isinstance(error, UnreachableError):
        raise error
    return Bad(dataset, reason_of(error), str(error))
