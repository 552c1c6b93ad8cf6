"""`--dry_run True`: all that can be known before the first step, on one page.

It needs no GPU and no other process, reads no values of weights, and writes nothing.
"""

import copy
import math
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from data.config import DatasetConfig, GroupConfig, load_mixture
from data.loader import PackedLoader
from data.records import RecordError
from data.tokenizer import Tokenizer
from modeling.bagel.bagel import Bagel
from modeling.batch import PackedBatch
from modeling.pretrained import MANIFEST, LoadReport, read_json, verify_manifest

from .adapters import require_base
from .arguments import RunArguments
from .backends import backend_name, deepspeed_config, mesh_shape
from .build import build_loader, configure, open_model, resume_folder, start
from .checkpoint import changed_arguments, saved_moments, takes_optimizer
from .distributed import launched_processes
from .freezing import parameter_lines
from .memory import OFFLOADED, static_memory, step_memory
from .optim import fate_of
from .validation import first_pairs, metric_names

PACKS = 10
CHECKED_RECORDS = 10_000
"""Of each data set."""
HASHED_BYTES = 100 * 2**20
"""Larger files are not hashed."""


class Findings:
    """What the checks have found; what they could not find is no attribute."""

    kind: str
    """`single`, `fsdp` or `deepspeed`."""
    zero_stage: int
    """That of `ds_config_file` if there is one."""
    mesh: tuple[int, int]
    """(replicate, shard)."""
    folder: Path | None = None
    """Step folder that the run would continue."""
    refused: bool
    """Whether the run folder cannot be used."""
    model: Bagel
    """On the meta device."""
    source: Path
    report: LoadReport | str
    weights: dict[str, float]
    """Of the loss terms."""
    loader: PackedLoader
    packs: list[PackedBatch]

    def __init__(self, args: RunArguments) -> None:
        self.args = copy.deepcopy(args)
        self.args.data.num_workers = 0
        self.zero_stage = args.training.zero_stage
        self.problems: list[str] = []
        self.unhashed: set[str] = set()

    def has(self, *names: str) -> bool:
        return all(hasattr(self, name) for name in names)

    def attempt(self, check: Callable[..., Any], *inputs: Any) -> bool:
        """Runs a check and keeps what it finds wrong; whether that is nothing."""
        try:
            check(*inputs)
        except (ValueError, OSError) as error:
            self.problems.append(str(error))
            return False
        return True


def dry_run(args: RunArguments) -> int:
    """Prints the page. 0, or 1 when something is wrong: all of it stands at the end of the page."""
    found = examine(args)
    for title, (lines, *needed) in SECTIONS.items():
        for i, line in enumerate(lines(found) if found.has(*needed) else ()):
            print(f"{title if i == 0 else '':12s} {line}", flush=True)
    return 1 if found.problems else 0


def examine(args: RunArguments) -> Findings:
    """All checks, each as soon as what it needs is found."""
    found = Findings(args)
    found.attempt(find_mesh, found)
    found.refused = not found.attempt(find_folder, found)
    # A run that is to continue may need no other weights.
    if not found.refused or args.model.model_path is not None:
        found.attempt(find_model, found)
    find_places(found)
    if found.has("model"):
        found.attempt(find_packs, found)
    found.attempt(read_every_data_set, found, args.data.dataset_config_file)
    if args.training.enable_validation:
        found.attempt(find_validation, found, str(args.training.val_dataset_config_file))
    found.problems = list(dict.fromkeys(found.problems))
    return found


def find_mesh(found: Findings) -> None:
    """Of the launcher's processes, else of those that the sizes of the mesh name."""
    training = found.args.training
    stated = (training.num_replicate or 1) * (training.num_shard or 1)
    ranks = launched_processes() if launched_processes() > 1 else stated
    found.kind = kind = backend_name(training, ranks)
    found.mesh = mesh_shape(training, ranks)
    if kind == "deepspeed":
        config = deepspeed_config(training, torch.device("cpu"))
        found.zero_stage = config["zero_optimization"]["stage"]


def find_folder(found: Findings) -> None:
    found.folder = resume_folder(found.args.training, partial(verify_small, found))


def verify_small(found: Findings, folder: Path, names: Collection[str] = ()) -> None:
    """As `checkpoint.verify`, but large files only have to be there."""
    paths = [folder / name for name in names or read_json(folder / MANIFEST)]
    large = {p.name for p in paths if p.exists() and p.stat().st_size > HASHED_BYTES}
    found.unhashed |= large
    verify_manifest(folder, {p.name for p in paths} - large or {MANIFEST})


def find_model(found: Findings) -> None:
    """The model on the meta device, every tensor of its checkpoint compared by name and shape."""
    args, check = found.args, partial(verify_small, found)
    source, weights = start(args, found.folder)
    # Random weights would take the memory of the whole model.
    with torch.device("meta") if weights == "random" else nullcontext():
        model, tensors, found.report = open_model(args, source, weights, check, True)
    found.weights = configure(model, args)
    if found.folder is not None and args.model.lora_rank > 0:
        require_base(found.folder, tensors, model, args.model)
    found.source, found.model = source, model


def find_places(found: Findings) -> None:
    """Folders that the run would write to."""
    for name in ("checkpoint_dir", "results_dir"):
        folder = getattr(found.args.training, name)
        place = Path(folder or found.args.training.checkpoint_dir).absolute()
        while not place.exists():
            place = place.parent
        if folder and not (place.is_dir() and os.access(place, os.W_OK)):
            found.problems.append(f"{name}={folder}: cannot write to {place}")


def find_packs(found: Findings) -> None:
    """The first packs of the run, from where it would resume."""
    found.loader = build_loader(found.args, found.model, found.source)
    if found.folder is not None:
        state = read_json(found.folder / "trainer_state.json")
        found.attempt(found.loader.load_state_dict, state["loader"])
        if takes_optimizer(found.folder, found.args.training):
            trained = [n for n, p in found.model.named_parameters() if p.requires_grad]
            found.attempt(saved_moments, found.folder, trained, True)
    found.packs = [found.loader.next_batch() for _ in range(PACKS)]


def find_validation(found: Findings, path: str) -> None:
    """Its first pack and its pairs."""
    if not Path(path).is_file():
        raise ValueError(f"val_dataset_config_file={path}: there is no such file")
    read_every_data_set(found, path)
    if found.has("weights"):
        args = copy.deepcopy(found.args)
        args.data.dataset_config_file = path
        build_loader(args, found.model, found.source).next_batch()
        mixture = load_mixture(path, args.data.data_root)
        pairs = first_pairs(mixture, Tokenizer(found.source), args.training.val_images)
        metric_names(args.training.best_metrics, found.weights, pairs)


def read_every_data_set(found: Findings, path: str | None) -> None:
    """The first records of each, without their images."""
    data = found.args.data
    for group in () if path is None else load_mixture(path, data.data_root):
        for dataset in group.datasets:
            found.attempt(read_first_records, group, dataset, data.max_bad_share)


def read_first_records(group: GroupConfig, dataset: DatasetConfig, share: float) -> None:
    """Raises ValueError when too many of them are bad."""
    records, bad = group.open_records(dataset), Counter[str]()
    checked = min(len(records), CHECKED_RECORDS)
    for number in range(checked):
        try:
            records[number]
        except RecordError as error:
            bad[str(error)] += 1
    if bad.total() > share * checked:
        raise ValueError(f"{next(iter(bad))} ({bad.total()} of {checked} records are bad)")


def of_run_folder(found: Findings) -> Iterator[str]:
    run = found.args.training.checkpoint_dir
    if found.refused:
        yield f"{run}: refused, see below"
    elif found.folder is None:
        yield f"{run}: a new run"
    else:
        step = read_json(found.folder / "trainer_state.json")["step"]
        yield f"{run}: resumes from step {step} of {found.folder}"
        yield from changed_arguments(found.folder, found.args)


def of_weights(found: Findings) -> Iterator[str]:
    """Of what was loaded, only names, dtypes and shapes were read."""
    yield str(found.report)
    if found.unhashed:
        yield f"sha256 not checked in a dry run: {', '.join(sorted(found.unhashed))}"


def of_parameters(found: Findings) -> Iterator[str]:
    """Sizes of what is trained, by group, and of what is frozen, by the argument that does it."""
    numbers = Counter[str]()
    for name, parameter in found.model.named_parameters():
        numbers[fate_of(name, found.args)] += parameter.numel()
    yield f"{numbers.total():,} in all"
    yield from (f"{number:,} {fate}" for fate, number in numbers.items())
    if found.args.training.print_param_details:
        yield from parameter_lines(found.model, found.args)


def of_losses(found: Findings) -> Iterator[str]:
    yield ", ".join(f"{weight:g} x {name}" for name, weight in found.weights.items())


def of_processes(found: Findings) -> Iterator[str]:
    replicate, shard = found.mesh
    zero = f", ZeRO {found.zero_stage}" if found.kind == "deepspeed" else ""
    yield f"{found.kind}{zero}: {replicate} (replicate) x {shard} (shard) = {replicate * shard}"
    if replicate * shard > launched_processes():
        yield "this is one process: the run needs a launcher that starts as many"


def of_data(found: Findings) -> Iterator[str]:
    planner = found.loader.planner
    for dataset, share in zip(planner.datasets, planner.shares, strict=True):
        yield f"{len(dataset.records):,} records, {share:.1%} of the samples: {dataset.name}"


def of_packs(found: Findings) -> Iterator[str]:
    data, packs, losses = found.args.data, found.packs, found.model.losses
    tokens, samples = [p.num_tokens for p in packs], [len(p.sample_lens) for p in packs]
    yield f"tokens a pack: {_spread(tokens)}; samples a pack: {_spread(samples)}"
    yield (
        f"{mean(tokens) / data.expected_num_tokens:.1%} of expected_num_tokens, "
        f"{mean(tokens) / data.max_num_tokens:.1%} of max_num_tokens"
    )
    answers = sum(len(p.labels.ids) for p in packs if p.labels is not None)
    longest = max(max(p.sample_lens) for p in packs)
    yield f"{answers} answer tokens in {sum(samples)} samples, the longest of {longest} tokens"
    yield f"{found.loader.too_long} samples dropped: longer than max_num_tokens_per_sample"
    yield from (f"{n} samples left out: {name}" for name, n in found.loader.skipped.items())
    shift = found.model.config.timestep_shift
    images = [vae for vae in (p.vae for p in packs) if vae is not None]
    drawn = [zip(vae.times(shift), vae.is_target, strict=True) for vae in images]
    times = [time for pairs in drawn for time, target in pairs if target]
    gates = {f"with t < {term.max_t:g} ({term.name})": term.max_t for term in losses.pixel_terms}
    seen = [f"{sum(time < gate for time in times)} {name}" for name, gate in gates.items()]
    yield ", ".join([f"{len(times)} target images", *seen])


def of_a_step(found: Findings) -> Iterator[str]:
    packs = math.prod(found.mesh) * found.args.training.gradient_accumulation_steps
    samples = packs * mean(len(p.sample_lens) for p in found.packs)
    records = sum(len(dataset.records) for dataset in found.loader.planner.datasets)
    yield f"{packs * mean(p.num_tokens for p in found.packs):,.0f} tokens in {packs} packs"
    yield f"an epoch (as many samples as there are records): {records / samples:.4g} steps"


def of_memory(found: Findings) -> Iterator[str]:
    """The rank and the pack that need most."""
    training = replace(found.args.training, zero_stage=found.zero_stage)
    static = static_memory(found.model, training, found.kind, found.mesh[1])
    steps = [step_memory(found.model, training, found.kind, pack) for pack in found.packs]
    needed = max(steps, key=lambda sizes: sum(sizes.values()))
    away = OFFLOADED if training.cpu_offload and found.kind == "fsdp" else ()
    yield f"{_size(sum((static | needed).values()) - sum(static[n] for n in away))} on a GPU"
    for name, size in (static | needed).items():
        estimate = " (estimate)" if name in needed else ""
        yield f"{_size(size)} {name}{estimate}{' in host memory' if name in away else ''}"


Section = tuple[Callable[[Findings], Iterator[str]], *tuple[str, ...]]
SECTIONS: dict[str, Section] = {
    "run folder": (of_run_folder,),
    "weights": (of_weights, "report"),
    "parameters": (of_parameters, "model"),
    "losses": (of_losses, "weights"),
    "processes": (of_processes, "mesh"),
    "data": (of_data, "loader"),
    f"{PACKS} packs": (of_packs, "packs"),
    "a step": (of_a_step, "packs", "mesh"),
    "memory": (of_memory, "packs", "mesh"),
    "WARNING": (lambda found: iter(found.args.warnings),),
    "WRONG": (lambda found: iter("\n".join(found.problems).splitlines()),),
}
"""Title -> lines, and the findings that these need."""


def _spread(numbers: list[int]) -> str:
    return f"{mean(numbers):.1f} ({min(numbers)} to {max(numbers)})"


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:8.1f} {unit:3s}"
        size /= 1024
    return f"{size:8.1f} GiB"
