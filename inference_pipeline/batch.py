"""The command line of batch restoration: checkpoints x test sets, with PSNR and SSIM.

    python inference_pipeline/MedQ-Uni_run_batch_test2.py --model_path configs/tiny/checkpoint \\
        --annotation_file build/demo/data/test.jsonl --image_root build/demo/data \\
        --output_dir build/demo/before --num_timesteps 2

Several checkpoints or test sets write to `<output_dir>/<checkpoint>/<test set>`. The same command
under `torchrun --nproc_per_node N` shares each test set among N processes.
"""

import argparse
from dataclasses import fields
from itertools import product
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch

from modeling.bagel.generation import SamplingConfig, TextConfig

from .metrics import ALWAYS, KINDS, METRICS, PROTOCOLS, describe, prefixes
from .restorer import PromptStyle, Restorer, Rules
from .runner import RunConfig, identity, run
from .shards import Processes, join, leave

Config = TypeVar("Config", SamplingConfig, RunConfig)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--annotation_file", type=Path, nargs="+", required=True, help="test sets, JSONL")
    add("--image_root", type=Path, required=True, help="folder of their image paths")
    add("--output_dir", type=Path, required=True)
    add("--model_path", type=Path, nargs="+", required=True, help="checkpoint folders")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--use_ema_checkpoint", action="store_true", help="the default")
    source.add_argument("--use_model_checkpoint", action="store_true")
    add("--target_gpu_device", default="0", help="GPU index, or cpu; torchrun gives each its own")
    add("--max_mem_per_gpu", help='like "40GiB": spreads the decoder over all GPUs and the CPU')
    add("--max_mem_cpu", default="1000GiB", help="for layers that fit no GPU; they are slow")
    add("--dtype", choices=DTYPES, help="of the weights; the files' own by default")
    add("--batch_size", type=int, default=1, help="samples at a time")
    add("--cfg_text_scale", type=float, default=1.0)
    add("--cfg_img_scale", type=float, default=1.0)
    add("--cfg_interval", type=float, nargs=2, default=(0.0, 1.0), metavar=("LOW", "HIGH"))
    add("--cfg_renorm_type", default="text_channel")
    add("--cfg_renorm_min", type=float, default=0.0)
    add("--num_timesteps", type=int, default=50, help="Euler steps plus one")
    add("--timestep_shift", type=float, default=1.0)
    add("--seed", type=int, default=42, help="seed of every sample")
    add("--text_do_sample", action="store_true")
    add("--text_temperature", type=float, default=0.3)
    add("--text_top_p", type=float, default=1.0)
    add("--max_text_tokens", type=int, default=800)
    add("--prompt_style", choices=get_args(PromptStyle), default="trained")
    add("--num_samples", type=int, default=-1, help="first N; -1 takes all")
    add("--protocols", nargs="+", choices=PROTOCOLS, default=PROTOCOLS[:1])
    add("--metrics", nargs="+", choices=METRICS, default=ALWAYS)
    add("--lpips_weights", type=Path, help="safetensors file: LPIPS is measured too")
    args = parser.parse_args(argv)
    for name in ("protocols", "metrics", "cfg_interval"):
        setattr(args, name, tuple(getattr(args, name)))
    return args


def of_options(kind: type[Config], args: argparse.Namespace, **others: Any) -> Config:
    """A `kind` whose fields are `others` and the options of the same names."""
    named = {f.name: getattr(args, f.name) for f in fields(kind) if f.name in args}
    return kind(**(named | others))


def main(argv: list[str] | None = None, rules: Rules | None = None) -> int:
    """0 when every sample was restored, 1 when some failed.

    `rules` are the resize rules for folders that do not say theirs.
    """
    args = parse(argv)
    if missing := [str(path) for path in args.annotation_file if not path.exists()]:
        raise FileNotFoundError(f"{', '.join(missing)}: not found")
    processes, failed = join(), 0
    temperature = args.text_temperature if args.text_do_sample else 0.0
    text = TextConfig(
        max_new_tokens=args.max_text_tokens, temperature=temperature, top_p=args.text_top_p
    )
    sampling = of_options(SamplingConfig, args)
    several = len(args.model_path) * len(args.annotation_file) > 1
    folders = _folders(args) if several else {}
    restorer: Restorer | None = None
    for checkpoint, annotations in product(args.model_path, args.annotation_file):
        if restorer is None or restorer.report.folder != str(checkpoint):
            restorer = None  # two models at a time may not fit
            restorer = _load(checkpoint, args, processes, rules)
        config = of_options(
            RunConfig,
            args,
            annotation_file=annotations,
            output_dir=folders.get((checkpoint, annotations), args.output_dir),
            sampling=sampling,
            text=text,
        )
        statistics = run(restorer, config, processes)
        failed += statistics["overall"]["n_failed"]
        if processes.rank == 0:
            print(f"{restorer.report}\n{config.output_dir}")
            _print(statistics, config.protocols)
    leave(processes)
    return 1 if failed else 0


def _folders(args: argparse.Namespace) -> dict[tuple[Path, Path], Path]:
    """Raises ValueError where two checkpoints or two test sets have the same name."""
    pairs = list(product(args.model_path, args.annotation_file))
    folders = {(c, a): args.output_dir / identity(c)[0] / a.stem for c, a in pairs}
    if len(set(folders.values())) < len(pairs):
        raise ValueError("--model_path, --annotation_file: two have the same name: run them apart")
    return folders


def _load(
    checkpoint: Path, args: argparse.Namespace, processes: Processes, rules: Rules | None
) -> Restorer:
    use_gpu = torch.cuda.is_available() and args.target_gpu_device != "cpu"
    index = processes.local_rank if processes.count > 1 else args.target_gpu_device
    memory: dict[int | str, str] | None = None
    if args.max_mem_per_gpu:
        if processes.count > 1:
            raise ValueError("--max_mem_per_gpu spreads one process over all GPUs: no torchrun")
        if not use_gpu:
            raise ValueError("--max_mem_per_gpu: no GPU is used")
        memory = dict.fromkeys(range(torch.cuda.device_count()), args.max_mem_per_gpu)
        memory["cpu"] = args.max_mem_cpu
    return Restorer.load(
        checkpoint,
        weights="model" if args.use_model_checkpoint else "ema",
        max_memory=memory,
        rules=rules,
        device=f"cuda:{index}" if use_gpu else "cpu",
        dtype=DTYPES.get(args.dtype),
    )


def _print(statistics: dict[str, Any], protocols: tuple[str, ...]) -> None:
    """PSNR and SSIM of every task by every protocol, floor and ceiling beside them."""
    for protocol, prefix in prefixes(protocols).items():
        print(f"protocol {describe(protocol)}")
        for task, summary in statistics["by_task_type"].items():
            found = f"{summary['total_samples']} samples, {summary['n_failed']} failed"
            for kind in KINDS:
                psnr, ssim = (summary.get(f"{prefix}{n}{kind}_mean") for n in ALWAYS)
                if ssim is not None:
                    shown = "-" if psnr is None else f"{psnr:.2f}"
                    found += f", {kind.strip('_') or 'restored'} {shown}/{ssim:.3f}"
                    if equal := summary.get(f"{prefix}n_equal{kind}"):
                        found += f" ({equal} equal)"
            print(f"  {task}: {found}")
