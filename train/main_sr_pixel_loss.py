"""Trains or fine-tunes a BAGEL: parse, build, fit.

python train/main_sr_pixel_loss.py --config configs/tiny/demo.yaml --total_steps 100
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from train.arguments import TrainingArguments as TrainingArguments  # noqa: E402
from train.arguments import help_text, parse_arguments  # noqa: E402
from train.build import build_trainer  # noqa: E402
from train.checkpoint import SaveError  # noqa: E402
from train.distributed import (  # noqa: E402
    STOP_EXIT_CODE,
    HangWatch,
    launched_rank,
    local_device,
    locked,
    process_group,
    rank,
)
from train.guard import NonFiniteError  # noqa: E402
from train.preflight import dry_run  # noqa: E402
from train.trainer import Stopped  # noqa: E402


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        print(f"{__doc__}\nArguments and defaults:\n\n{help_text()}")
        return
    try:
        args = parse_arguments(argv)
        if args.training.dry_run:
            sys.exit(dry_run(args) if launched_rank() == 0 else 0)
        training, run = args.training, Path(args.training.checkpoint_dir)
        device = local_device(training.device)
        wanted = training.backend in ("fsdp", "deepspeed")
        # A collective must not time out before the watch has printed the stacks.
        with process_group(device, 2 * training.hang_timeout, wanted), locked(run / "run.lock"):
            if rank() == 0:
                print(args.table(), flush=True)
            with HangWatch(training.hang_timeout):
                trainer = build_trainer(args)
            if rank() == 0:
                args.save(run / "training_args.json")
            trainer.fit()
    except Stopped as stopped:
        print(stopped, flush=True)
        sys.exit(STOP_EXIT_CODE)
    except (ValueError, OSError, NonFiniteError, SaveError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
