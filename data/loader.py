"""Packs of the global stream -> this rank's PackedBatches, decoded by worker processes.

Micro-batch m of rank r among W takes pack m * W + r of the stream, so what a global batch holds
does not depend on W as long as W times the accumulated micro-batches stays the same.
"""

import copy
import multiprocessing
import os
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import count, zip_longest
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from modeling.batch import PackedBatch

from .config import RULES, GroupConfig
from .packer import PackerConfig
from .stream import LoaderConfig, Planner
from .tokenizer import Tokenizer


class PackedLoader:
    """Iterates this rank's batches without end; `state_dict` / `load_state_dict` resume exactly.

    The state is that after the last batch taken, whatever workers have prepared ahead. It is the
    same on all ranks after as many batches and valid on any number of ranks and workers. Where the
    data sets hold less than a global batch, the stream wraps: records come again in the next epoch.

    Taking a batch raises ValueError for what cannot be packed (a RecordError, an ImageError, only
    samples that are too long), OSError for a file, ChildProcessError for a worker that died.
    """

    def __init__(
        self,
        mixture: tuple[GroupConfig, ...],
        config: LoaderConfig,
        packer_config: PackerConfig,
        tokenizer: Tokenizer,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.config, self.packer_config = config, packer_config
        self.rank, self.world_size = rank, world_size
        self.resize_rules = {name: asdict(getattr(mixture[0], name)) for name in RULES}
        """Of the first group, as keys of a mixture."""
        self.planner = Planner(mixture, config, packer_config, tokenizer)
        """Stands after the last global step whose batch was taken."""
        self._batches: Iterator[Any] | None = None
        records = sum(len(d.records) for d in self.planner.datasets)
        if rank == 0 and records < world_size * max(config.num_workers, 1):
            workers = f"{world_size} ranks with num_workers={config.num_workers}"
            print(f"WARNING: {records} records for {workers}: records will repeat", flush=True)

    @property
    def position(self) -> int:
        """Samples of the stream that were packed or dropped, on all ranks."""
        return sum(self.planner.draws) - len(self.planner.buffer)

    @property
    def too_long(self) -> int:
        """Samples of the stream that were dropped, on all ranks."""
        return self.position - sum(self.planner.packed)

    @property
    def counts(self) -> dict[str, int]:
        """Samples packed on all ranks, by the name of their data set."""
        total: Counter[str] = Counter()
        for dataset, packed in zip(self.planner.datasets, self.planner.packed, strict=True):
            total[dataset.name] += packed
        return dict(total)

    def __iter__(self) -> Iterator[PackedBatch]:
        while True:
            yield self.next_batch()

    def next_batch(self) -> PackedBatch:
        if self._batches is None:
            self._batches = self._start()
        try:
            found, state = next(self._batches)
        except RuntimeError as error:
            if not (workers := self.config.num_workers):
                raise
            self._batches = None
            raise ChildProcessError(
                f"rank {self.rank}: a data worker failed: {error}. If the host ran out of memory, "
                f"lower num_workers={workers} or prefetch_factor={self.config.prefetch_factor}"
            ) from error
        if isinstance(found, Exception):
            self._batches = None
            raise found
        self.planner.load(state)
        return found

    def state_dict(self) -> dict[str, Any]:
        sets = [[d.name, len(d.records)] for d in self.planner.datasets]
        return {"datasets": sets} | self.planner.state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError when the state belongs to another mixture."""
        pairs = zip_longest(state["datasets"], self.state_dict()["datasets"])
        if changed := [f"{saved} -> {ours}" for saved, ours in pairs if saved != ours]:
            raise ValueError(
                "dataset_config_file: the saved stream has other data sets (name, records): "
                + "; ".join(changed)
            )
        self.planner.load(state)
        self._batches = None

    def _start(self) -> Iterator[Any]:
        """Begins to prepare what follows the last batch taken."""
        planner, workers = copy.copy(self.planner), self.config.num_workers
        planner.load(self.planner.state())
        # A fork of a process with threads may deadlock, so a server without any forks the workers.
        context = torch.multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["__main__", __name__])
        loader = DataLoader(
            _Packs(planner, self.rank, self.world_size),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=self.config.prefetch_factor if workers else None,
            multiprocessing_context=context if workers else None,
            worker_init_fn=_end_with_the_trainer,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # so that the global one is left alone
        )
        return iter(loader)


def _end_with_the_trainer(_: int) -> None:
    """In a worker. Torch ends it with its parent, which is the server and outlives a SIGKILL."""
    trainer = multiprocessing.parent_process()

    def wait() -> None:
        trainer.join()  # type: ignore[union-attr]
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@dataclass
class _Packs(IterableDataset):
    """(batch, state after its global step) of one rank; an error stands in its batch's place."""

    planner: Planner
    rank: int
    world_size: int

    def __iter__(self) -> Iterator[tuple[PackedBatch | Exception, dict[str, Any]]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        try:
            for step in count():
                packs = [self.planner.next_pack() for _ in range(self.world_size)]
                if step % workers == worker:
                    yield self.planner.decode(packs[self.rank]), self.planner.state()
        except (ValueError, OSError) as error:
            # Raised by the loader, it keeps its type and its one line of text.
            yield error, {}
