"""Step folders: saved completely or not at all, beside training; found, verified, kept or dropped.

A step folder is a checkpoint folder in BAGEL's layout (so inference reads it as it is) plus the
optimizer's moments in `optimizer*.safetensors`, `trainer_state.json` and `training_args.json`.
Tensors are whole and stand under their names, whatever ranks and back end have written them, so any
other number of ranks and any other back end reads them. No file is a pickle.
"""

import re
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from data.loader import joined_states
from modeling.pretrained import (
    MANIFEST,
    PREPROCESSOR_FILE,
    TOKENIZER_FILES,
    DamagedError,
    file_plan,
    read_json,
    read_tensors,
    save_settings,
    saved_names,
    sha256,
    verify_manifest,
    weight_files,
    write_index,
    write_json,
    write_manifest,
)

from .adapters import BASE, A, B, is_adapter, merged
from .backends import MOMENTS
from .distributed import all_gather, first_error, rank, sum_over_ranks, world_size

if TYPE_CHECKING:
    from .arguments import RunArguments, TrainingArguments
    from .trainer import Trainer

STEP_FOLDER = re.compile(r"\d{7}|[1-9]\d{7,}")
SAVING, DROPPING = ".saving-", ".dropping-"
"""Prefixes of folders that are not complete yet, and not any more."""
POLL_SECONDS = 0.05


class SaveError(RuntimeError):
    """A checkpoint could not be written, too often or for a reason that will not pass."""


def step_folders(run: Path) -> list[Path]:
    """Complete step folders, the oldest first."""
    complete = [manifest.parent for manifest in run.glob(f"*/{MANIFEST}")]
    return sorted((p for p in complete if STEP_FOLDER.fullmatch(p.name)), key=lambda p: int(p.name))


def verify(folder: Path, names: Collection[str] = ()) -> None:
    """Checks the hashes of those files, or of all, the ranks some each. Raises DamagedError on all
    ranks."""
    error = None
    try:
        checked = sorted(names or read_json(folder / MANIFEST))
        # A rank without files of its own still sees whether there is a manifest.
        verify_manifest(folder, checked[rank() :: world_size()] or [MANIFEST])
    except DamagedError as found:
        error = found
    first_error(error)


def newest_good(run: Path, check: Callable[..., None] = verify) -> Path | None:
    """The newest step folder that passes the check; says which newer ones are damaged.

    Raises DamagedError when there are step folders and all are damaged.
    """
    damaged: DamagedError | None = None
    for folder in reversed(step_folders(run)):
        try:
            check(folder)
            return folder
        except DamagedError as error:
            damaged = error
            if rank() == 0:
                print(f"WARNING: {error}: trying the step before", flush=True)
    if damaged is not None:
        raise damaged
    return None


def changed_arguments(folder: Path, args: "RunArguments") -> list[str]:
    """What a step folder was saved with and the run resumes without."""
    before = read_json(folder / "training_args.json")["arguments"]
    return [
        f"resumed with {name}={value}, saved with {before[name]}"
        for name, value in args.flat().items()
        if before.get(name, value) != value
    ]


def saved_moments(
    folder: Path, trained: Iterable[str], headers_only: bool = False
) -> dict[str, Tensor]:
    """The optimizer's moments. Raises ValueError when they are not those of the trained weights."""
    moments = read_tensors(weight_files(folder, "optimizer"), "", headers_only)
    if changed := sorted({key.rsplit("/", 1)[0] for key in moments} ^ set(trained)):
        raise ValueError(
            f"{folder}: the optimizer state is not that of the trained weights: "
            f"{', '.join(changed[:5])} ({len(changed)} in all) were trained and are frozen "
            "now, or the reverse; were freeze flags changed? "
            f"--resume_from {folder} --resume_model_optimizer False and another checkpoint_dir "
            "start a new optimizer"
        )
    return moments


def takes_optimizer(folder: Path, args: "TrainingArguments") -> bool:
    """Whether the optimizer goes on too: from another run as is asked for, within a run always."""
    own = folder.resolve().parent == Path(args.checkpoint_dir).resolve()
    return own or args.resume_model_optimizer


def load_state(folder: Path, trainer: "Trainer") -> None:
    """Continues where the step folder stopped. Raises ValueError when it trained other weights."""
    backend, args = trainer.backend, trainer.args
    for change in changed_arguments(folder, args):
        if rank() == 0:
            print(f"WARNING: {change}", flush=True)
    state = read_json(folder / "trainer_state.json")
    if takes_optimizer(folder, args.training):
        backend.load_moments(saved_moments(folder, backend.weights), state["updates"])

    def read(weights: str, adapters: str) -> None:
        stems = (weights, adapters) if backend.adapted else (weights,)
        backend.load(read_tensors([file for stem in stems for file in weight_files(folder, stem)]))

    # The averages pass through the model on their way into the EMA.
    read("ema", "adapters_ema")
    trainer.ema.restart()
    read("model", "adapters")
    trainer.step = state["step"]
    trainer.loader.load_state_dict(state["loader"])
    trainer.telemetry.steps_without |= state["steps_without"]
    trainer.guard.load_state_dict(state["guard"])


Stem = tuple[str, bool, Mapping[str, Callable[[], Tensor]]]
"""A weight file's name, whether it holds averages, and its tensors: each is asked for on all
ranks at once."""


def contents(trainer: "Trainer") -> Iterator[Stem]:
    """The tensors of a step folder, whole."""
    backend, lora = trainer.backend, trainer.args.model

    def weight(name: str) -> Tensor:
        whole = backend.full(name)
        if not name.endswith(BASE + ".weight"):
            return whole
        stem = name.split(BASE)[0]
        return merged(whole, backend.full(stem + A), backend.full(stem + B), lora)

    own = saved_names(trainer.model.config, backend.sizes)
    plain = {n.replace(BASE, ""): partial(weight, n) for n in own if not is_adapter(n)}
    adapters = {n: partial(backend.full, n) for n in own if is_adapter(n)}
    yield "model", False, plain
    yield "ema", True, plain
    pairs = [(name, kind) for name in backend.weights for kind in MOMENTS]
    yield "optimizer", False, {f"{n}/{kind}": partial(backend.moment, n, kind) for n, kind in pairs}
    if backend.adapted:
        yield "adapters", False, adapters
        yield "adapters_ema", True, adapters


def plans(trainer: "Trainer") -> dict[str, tuple[dict[str, list[str]], int]]:
    """Files and total size in bytes of every weight file's name."""
    sizes = {name.replace(BASE, ""): size for name, size in trainer.backend.sizes.items()}
    found = {}
    for stem, _, tensors in contents(trainer):
        bytes_of = {name: sizes[name.partition("/")[0]] for name in tensors}
        found[stem] = file_plan(stem, bytes_of), sum(bytes_of.values())
    return found


def snapshot(trainer: "Trainer") -> dict[str, dict[str, Tensor]]:
    """This rank's files with their tensors, copied to the host in float32."""
    own: dict[str, dict[str, Tensor]] = {}
    files, all_plans = count(), plans(trainer)
    for stem, averaged, tensors in contents(trainer):
        with trainer.ema.swapped() if averaged else nullcontext():
            for file, names in all_plans[stem][0].items():
                mine = next(files) % world_size() == rank()
                for name in names:
                    whole = tensors[name]()
                    if mine:
                        copy = whole.detach().float().to("cpu", copy=True).contiguous()
                        own.setdefault(file, {})[name] = copy
    return own


class Saver:
    """Writes step folders in the background, every rank its own files.

    Rank 0 waits for the others' files, writes the rest, then the manifest, and moves the folder to
    its place. Only then are older ones dropped. All ranks have to call each method together.
    """

    def __init__(self, trainer: "Trainer") -> None:
        self.trainer, self.args = trainer, trainer.args.training
        self.run = Path(self.args.checkpoint_dir)
        files = [trainer.source / name for name in TOKENIZER_FILES]
        # Kept, because the source may be a step folder that is dropped one day.
        self.tokenizer = {file.name: file.read_bytes() for file in files if file.exists()}
        self.thread: threading.Thread | None = None
        self.error: Exception | None = None
        """What this rank has met and `finish` has not told yet."""
        self.ended = True
        """Whether the thread has come to its end instead of dying on the way."""
        self.given_up = threading.Event()
        self.failures = 0
        """In a row."""
        self.passed_over: set[str] = set()
        """Damaged step folders: they do not count among those that are kept."""

    @property
    def failed(self) -> bool:
        """Whether this rank's writing is over without success."""
        died = self.thread is not None and not self.thread.is_alive() and not self.ended
        return died or self.error is not None

    def start(self) -> None:
        """Copies the state to the host, then writes it beside training."""
        self.finish()
        staging = self.run / f"{SAVING}{self.trainer.step:07d}"
        self.error = self._make(staging) if rank() == 0 else None
        if any(all_gather(self.error)):  # then there is nowhere to write to
            return
        own, rest = snapshot(self.trainer), self._rest()
        self.given_up.clear()
        self.ended = False
        arguments = own, rest, staging, self.run / f"{self.trainer.step:07d}"
        self.thread = threading.Thread(target=self._write, args=arguments, daemon=True)
        self.thread.start()

    def _make(self, staging: Path) -> OSError | None:
        try:
            for prefix in (SAVING, DROPPING):
                for debris in self.run.glob(f"{prefix}*"):
                    shutil.rmtree(debris)
            staging.mkdir(parents=True)
        except OSError as error:
            return error
        return None

    def _rest(self) -> Callable[[Path], None]:
        """Writes all but the tensors of `snapshot`; the state is that of now.

        All ranks have to ask for it.
        """
        trainer = self.trainer
        state = {
            "step": trainer.step,
            "updates": trainer.backend.steps(),
            "loader": joined_states(all_gather(trainer.loader.state_dict())),
            "steps_without": dict(trainer.telemetry.steps_without),
            "guard": trainer.guard.state_dict(),
        }
        if trainer.backend.adapted:
            state["base"] = [str(trainer.source.resolve()), trainer.start]

        def write(folder: Path) -> None:
            for stem, (plan, size) in plans(trainer).items():
                write_index(folder, stem, plan, size)
            save_settings(trainer.model, folder)
            for name, content in self.tokenizer.items():
                (folder / name).write_bytes(content)
            write_json(folder / "trainer_state.json", state)
            # So that inference prepares images as training did.
            write_json(folder / PREPROCESSOR_FILE, trainer.loader.resize_rules)
            trainer.args.save(folder / "training_args.json")

        return write

    def _write(
        self,
        own: dict[str, dict[str, Tensor]],
        rest: Callable[[Path], None],
        staging: Path,
        final: Path,
    ) -> None:
        """In the thread. Errors are raised by `finish`, on all ranks."""
        try:
            for file in own:
                save_file(own[file], staging / file, {"format": "pt"})
            unfinished = staging / f".part-{rank()}.tmp"
            write_json(unfinished, {file: sha256(staging / file) for file in own})
            unfinished.rename(staging / f".part-{rank()}")
            if rank() == 0:
                rest(staging)
                self._complete(staging, final)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            self.error = error
        self.ended = True

    def _complete(self, staging: Path, final: Path) -> None:
        parts = [staging / f".part-{r}" for r in range(world_size())]
        while not all(part.exists() for part in parts):
            if self.given_up.wait(POLL_SECONDS):
                return
        hashes: dict[str, str] = {}
        for part in parts:
            hashes |= read_json(part)
            part.unlink()
        write_manifest(staging, hashes)
        if final.exists():
            _drop(final)
        staging.rename(final)
        self.passed_over.discard(final.name)
        folders = [f for f in step_folders(self.run) if f.name not in self.passed_over]
        best = self.trainer.best_steps([int(folder.name) for folder in folders])
        for old in folders[: -self.args.max_checkpoints]:
            if int(old.name) not in best:
                _drop(old)

    def finish(self) -> bool:
        """Waits until all ranks have written; False if one could not, which is told.

        Raises SaveError on all ranks after `max_save_failures` in a row, or for an error that is
        not one of the disk's.
        """
        while True:
            writing = self.thread is not None and self.thread.is_alive()
            failed, busy = sum_over_ranks([float(self.failed), float(writing)])
            if failed or not busy:
                break
            self.trainer.watch.alive()
            time.sleep(POLL_SECONDS)
        self.given_up.set()
        if self.thread is not None:
            self.thread.join()
        if not failed:
            # Without a thread nothing has been written.
            self.failures = self.failures if self.thread is None else 0
            self.thread = None
            return True
        own = self.error
        if own is None and self.failed:
            own = SaveError("the writing thread has died of the error above")
        errors = [error for error in all_gather(own) if error is not None]
        self.thread, self.error, self.failures = None, None, self.failures + 1
        text = f"saving has failed {self.failures} time(s) in a row: {errors[0]}"
        if self.failures >= self.args.max_save_failures or not all(map(_of_the_disk, errors)):
            raise SaveError(f"{text} (max_save_failures={self.args.max_save_failures})")
        if rank() == 0:
            print(f"WARNING: {text}; training goes on and tries again", flush=True)
        return False


def _drop(folder: Path) -> None:
    """Removes a step folder, which must not look complete on the way."""
    doomed = folder.rename(folder.with_name(DROPPING + folder.name))
    shutil.rmtree(doomed)


def _of_the_disk(error: Exception) -> bool:
    """Whether the reason may pass, as that of a full disk."""
    return isinstance(error, OSError) or "I/O error" in str(error)
