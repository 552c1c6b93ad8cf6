"""Batch restoration over a JSONL test set with PSNR and SSIM.

    python inference_pipeline/MedQ-Uni_run_batch_test2.py --model_path configs/tiny/checkpoint \\
        --annotation_file build/demo/data/test.jsonl --image_root build/demo/data \\
        --output_dir build/demo/before --num_timesteps 2
"""

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch

HERE = Path(__file__).resolve().parent
# As a script's own folder, it would hide the standard library's modules of the same names.
sys.path = [str(HERE.parent), *(p for p in sys.path if Path(p) != HERE)]

from inference_pipeline.metrics import KINDS, PROTOCOL, describe  # noqa: E402
from inference_pipeline.restorer import Restorer, TextConfig  # noqa: E402
from inference_pipeline.runner import RunConfig, run  # noqa: E402
from modeling.bagel.generation import SamplingConfig  # noqa: E402

Config = TypeVar("Config", SamplingConfig, RunConfig)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--annotation_file", type=Path, required=True, help="test set, JSONL")
    parser.add_argument("--image_root", type=Path, required=True, help="folder of its image paths")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--model_path", type=Path, required=True, help="checkpoint folder")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--use_ema_checkpoint", action="store_true", help="the default")
    source.add_argument("--use_model_checkpoint", action="store_true")
    parser.add_argument("--target_gpu_device", default="0", help="GPU index, or cpu")
    parser.add_argument("--cfg_text_scale", type=float, default=1.0)
    parser.add_argument("--cfg_img_scale", type=float, default=1.0)
    parser.add_argument("--cfg_renorm_type", default="text_channel")
    parser.add_argument("--num_timesteps", type=int, default=50, help="Euler steps plus one")
    parser.add_argument("--timestep_shift", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=42, help="seed of every sample")
    parser.add_argument("--text_do_sample", action="store_true")
    parser.add_argument("--text_temperature", type=float, default=0.3)
    parser.add_argument("--max_text_tokens", type=int, default=800)
    parser.add_argument("--num_samples", type=int, default=-1, help="first N; -1 takes all")
    return parser.parse_args(argv)


def of_options(kind: type[Config], args: argparse.Namespace, **others: Any) -> Config:
    """A `kind` whose fields are the options of the same names and `others`."""
    return kind(**{f.name: getattr(args, f.name) for f in fields(kind) if f.name in args}, **others)


def main(argv: list[str] | None = None) -> int:
    """0 when every sample was restored, 1 when some failed."""
    args = parse(argv)
    use_gpu = torch.cuda.is_available() and args.target_gpu_device != "cpu"
    restorer = Restorer.load(
        args.model_path,
        weights="model" if args.use_model_checkpoint else "ema",
        device=f"cuda:{args.target_gpu_device}" if use_gpu else "cpu",
    )
    print(restorer.report)
    temperature = args.text_temperature if args.text_do_sample else 0.0
    text = TextConfig(max_new_tokens=args.max_text_tokens, temperature=temperature)
    sampling = of_options(SamplingConfig, args)
    statistics = run(restorer, of_options(RunConfig, args, sampling=sampling, text=text))
    print(describe(PROTOCOL))
    for task, summary in statistics["by_task_type"].items():
        print(f"{task}: {summary['total_samples']} samples, {summary['n_failed']} failed", end="")
        for kind in KINDS:
            if f"psnr{kind}_mean" in summary:
                psnr, ssim = (summary[f"{metric}{kind}_mean"] for metric in ("psnr", "ssim"))
                print(f", {kind.strip('_') or 'restored'} {psnr:.2f}/{ssim:.3f}", end="")
        print()
    return 1 if statistics["overall"]["n_failed"] else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
