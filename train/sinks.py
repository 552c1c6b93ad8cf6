"""Where the numbers and images of a run go besides its JSONL files: text log, TensorBoard, W&B.

Names are tags: `train/<name>` of a log line, `val/<name>` of a validation.
"""

import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .arguments import TrainingArguments
from .distributed import rank

PROJECT = "bagel-restore"
"""Of the package, whose extras hold the optional sinks, and of the W&B runs."""


class Sink:
    """Takes numbers and RGB images by tag; what a sink has no use for it leaves out."""

    works = True  # until it has raised an error

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...
    def image(self, step: int, tag: str, image: Image.Image) -> None: ...
    def close(self) -> None: ...


def hand_on(sinks: Iterable[Sink], method: str, *values: Any) -> None:
    """Calls all that work. One that fails is told of once and closed: it must not end the run."""
    for sink in filter(lambda sink: sink.works, sinks):
        try:
            getattr(sink, method)(*values)
        except Exception as error:  # noqa: BLE001 - code of others, which raises what it likes
            sink.works = False
            print(f"WARNING: {type(sink).__name__} gets nothing more: {error!r}", flush=True)
            with suppress(Exception):
                sink.close()


class TextLog(Sink):
    """One line a call in `log.txt`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "log.txt"

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        shown = "  ".join(f"{tag} {value:.6g}" for tag, value in values.items())
        with self.path.open("a") as file:
            file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S}  step {step}  {shown}\n")


class TensorBoard(Sink):
    """Event files in `<run>/tensorboard`; a resumed run hides what came after its step."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """Raises ImportError without the package."""
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, step)
        self.writer.flush()

    def image(self, step: int, tag: str, image: Image.Image) -> None:
        self.writer.add_image(tag, np.asarray(image), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class WandB(Sink):
    """Weights & Biases. The run's id stands in `<run>/wandb_id.txt`, so that it can go on.

    Beside the values it stores its versions and the platform: no code, command line, console,
    package list, host name or statistics. Steps that a resumed run repeats stay as they were.
    """

    def __init__(self, folder: Path, name: str, offline: bool) -> None:
        """Raises ImportError without the package, ValueError when a run cannot be opened."""
        import wandb

        path = folder / "wandb_id.txt"
        if not path.exists():
            path.write_text(uuid.uuid4().hex[:12])
        quiet = wandb.Settings(console="off", disable_git=True, disable_code=True, silent=True)
        quiet.x_disable_meta = quiet.x_disable_stats = quiet.x_disable_machine_info = True
        quiet.x_save_requirements, quiet.host = False, ""
        own: dict[str, Any] = {"project": PROJECT, "name": name, "id": path.read_text()}
        own |= {"dir": folder, "mode": "offline" if offline else "online"}
        try:
            self.run: Any = wandb.init(**own, resume="allow", settings=quiet)
        except wandb.Error as error:
            told = f"enable_wandb: {' '.join(str(error).split())} (or set wandb_offline)"
            raise ValueError(told) from error
        self.picture = wandb.Image

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def image(self, step: int, tag: str, image: Image.Image) -> None:
        self.run.log({tag: self.picture(image)}, step=step)

    def close(self) -> None:
        self.run.finish()


def build_sinks(args: TrainingArguments, folder: Path, first_step: int) -> list[Sink]:
    """What the arguments turn on, on rank 0 alone; a missing package is warned of."""
    if rank() != 0:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    sinks: list[Sink] = []
    if args.results_dir:
        sinks.append(TextLog(Path(args.results_dir)))
    wanted = {
        "tensorboard": args.enable_tensorboard and (lambda: TensorBoard(folder, first_step)),
        "wandb": args.enable_wandb and (lambda: WandB(folder, args.wandb_name, args.wandb_offline)),
    }
    for extra, build in wanted.items():
        try:
            if build:
                sinks.append(build())
        except ImportError as error:
            told = f"{error}; training goes on without (pip install '{PROJECT}[{extra}]')"
            print(f"WARNING: enable_{extra}: {told}", flush=True)
    return sinks
