"""Packs of the global stream -> this rank's PackedBatches, decoded by worker processes.

Micro-batch m of rank r among W takes pack m * W + r of the stream, so what a global batch holds
does not depend on W as long as W times the accumulated micro-batches stays the same.
"""

import copy
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import count, product, zip_longest
from multiprocessing import resource_tracker
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from modeling.batch import PackedBatch

from .config import GroupConfig
from .packer import PackerConfig
from .stream import LoaderConfig, Planner
from .tally import TOO_LONG, Bad, Tally
from .tokenizer import Tokenizer
from .transforms import NO_IMAGES, RULES

WAY_OUT = (
    "take the weights alone into a new run: --resume_from with --resume_model_only True and "
    "another checkpoint_dir"
)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Save and end; until it has, the trainer needs its workers."""


class PackedLoader:
    """Iterates this rank's batches without end; `state_dict` / `load_state_dict` resume exactly.

    The state is that after the last batch taken, whatever workers have prepared ahead. It is the
    same on all ranks after as many batches, `damaged` apart (`joined_states`), and valid on any
    number of ranks and workers. Where the data sets hold less than a global batch, the stream
    wraps: records come again in the next epoch.

    Samples that cannot be used are left out and counted. Taking a batch raises ValueError when
    these are too many (`max_bad_share`, or one after the other), UnreachableError
    and OSError where a file system fails, ChildProcessError for a worker that died.
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
        self.resize_rules: dict[str, dict[str, int]] = {}
        """Of the first group that has such images, as keys of a mixture."""
        for name, group in product(RULES, mixture):
            if (rule := getattr(group, name)) != NO_IMAGES:
                self.resize_rules.setdefault(name, asdict(rule))
        self.planner = Planner(mixture, config, packer_config, tokenizer)
        """Stands after the last global step whose batch was taken."""
        self.names = [dataset.name for dataset in self.planner.datasets]
        self.damaged = Tally.of(len(self.names))
        """Samples that this rank could not decode; rank 0 also has those of before a resumption."""
        self._found, self._taken = Tally.of(len(self.names)), Counter[int]()
        """The same since the start, and the samples it has tried, by data set."""
        self._told: set[str] = set()
        self._batches: Iterator[Any] | None = None
        records = sum(len(d.records) for d in self.planner.datasets)
        if rank == 0 and records < world_size * max(config.num_workers, 1):
            workers = f"{world_size} ranks with num_workers={config.num_workers}"
            print(f"WARNING: {records} records for {workers}: records will repeat", flush=True)

    @property
    def too_long(self) -> int:
        """Samples of the stream that were dropped for their length, on all ranks."""
        return sum(found.get(TOO_LONG, [0])[0] for found in self.planner.skipped.found)

    @property
    def counts(self) -> dict[str, int]:
        """Samples packed on all ranks, by the name of their data set."""
        total: Counter[str] = Counter()
        for name, packed in zip(self.names, self.planner.packed, strict=True):
            total[name] += packed
        return dict(total)

    @property
    def skipped(self) -> dict[str, int]:
        """Samples that could not be used, by `data set/reason`; those of the run are the sum over
        ranks. Samples that could not be decoded are in `counts` too."""
        planned = self.planner.skipped.by_name(self.names) if self.rank == 0 else {}
        return self.damaged.by_name(self.names) + Counter(planned)

    def __iter__(self) -> Iterator[PackedBatch]:
        while True:
            yield self.next_batch()

    def next_batch(self) -> PackedBatch:
        if self._batches is None:
            self._batches = self._start()
        try:
            found, state, taken, bad = next(self._batches)
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
        self._taken.update(taken)
        for sample in bad:
            self.damaged.add(sample)
            self._found.add(sample)
        self._judge()
        return found

    def _judge(self) -> None:
        """Tells of every reason once. Raises ValueError when too many samples cannot be used."""
        # What only decoding shows, a rank judges by what it has decoded.
        taken, share = [self._taken[i] for i in range(len(self.names))], self.config.max_bad_share
        for tally, seen in ((self.planner.skipped, self.planner.draws), (self._found, taken)):
            own = tally is self._found or self.rank == 0
            for name, found in zip(self.names, tally.found, strict=True):
                for reason, (_, message) in found.items() if own else ():
                    if (text := f"WARNING: {name}: {reason}: ") not in self._told:
                        print(f"{text}{message}. Such samples are left out and counted", flush=True)
                    self._told.add(text)
            tally.require_few(self.names, seen, share)

    def state_dict(self) -> dict[str, Any]:
        sets = [[d.name, len(d.records)] for d in self.planner.datasets]
        damaged = copy.deepcopy(self.damaged.found)
        own = {"datasets": sets, "settings": {**self.planner.settings}}
        return own | self.planner.state() | {"damaged": damaged}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError when the state belongs to another mixture or other settings."""
        if missing := sorted({*self.state_dict()} - {*state}):
            raise ValueError(
                f"the saved stream has no {', '.join(missing)}, as of an earlier version: {WAY_OUT}"
            )
        pairs = zip_longest(state["datasets"], self.state_dict()["datasets"])
        if changed := [f"{saved} -> {ours}" for saved, ours in pairs if saved != ours]:
            raise ValueError(
                "dataset_config_file: the saved stream has other data sets (name, records): "
                + "; ".join(changed)
            )
        saved, ours = state["settings"], self.planner.settings
        if changed := [
            f"{name}: {saved.get(name)} -> {ours.get(name)}"
            for name in {**saved, **ours}
            if saved.get(name) != ours.get(name)
        ]:
            raise ValueError(
                f"the saved stream was planned with other settings: {'; '.join(changed)}. Set them "
                f"back, or {WAY_OUT}"
            )
        self.planner.load(state)
        self.damaged = Tally(state["damaged"]) if self.rank == 0 else Tally.of(len(self.names))
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
            worker_init_fn=end_with_the_parent,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # so that the global one is left alone
        )
        # Processes that begin here get no signal that is sent to the whole group of the trainer.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        resource_tracker.ensure_running()  # which unblocks SIGTERM
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            return iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def joined_states(states: list[dict[str, Any]]) -> dict[str, Any]:
    """The state of a run, from those of its ranks at one step.

    Raises ValueError unless all ranks have planned the same stream.
    """
    first, *others = states
    for key in sorted({*first} - {"damaged", "skipped"}):
        if any(state[key] != first[key] for state in others):
            found = "; ".join(f"rank {r} {state[key]!r:.300}" for r, state in enumerate(states))
            raise ValueError(
                f"the ranks have planned different streams: {key} is {found}. Do all of them read "
                "the same files? The run goes on from its last step folder"
            )
    damaged = Tally(first["damaged"])
    for state in others:
        for dataset, found in enumerate(state["damaged"]):
            for reason, (times, message) in found.items():
                damaged.add(Bad(dataset, reason, message), times)
    return first | {"damaged": damaged.found}


def end_with_the_parent(_: int) -> None:
    """Begins a worker, to end with its trainer (torch's own watch is on the server) or by it."""
    trainer = multiprocessing.parent_process()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)

    def wait() -> None:
        while trainer.is_alive():  # type: ignore[union-attr]
            sent = signal.sigtimedwait(STOP_SIGNALS, 1.0)
            if sent and sent.si_pid == trainer.pid:  # type: ignore[union-attr]
                break
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@dataclass
class _Packs(IterableDataset):
    """Of one rank: batch, state after its global step, data sets of its samples, those that could
    not be decoded. An error stands in its batch's place."""

    planner: Planner
    rank: int
    world_size: int

    def __iter__(self) -> Iterator[tuple[PackedBatch | Exception, dict[str, Any], list, list]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        try:
            for step in count():
                packs = [self.planner.next_pack() for _ in range(self.world_size)]
                if step % workers == worker:
                    batch, bad, tried = self.planner.decode(packs[self.rank])
                    taken = [draw.dataset for draw in tried]
                    yield batch, self.planner.state(), taken, bad
        except (ValueError, OSError) as error:
            # Raised by the loader, it keeps its type and its one line of text.
            yield error, {}, [], []
