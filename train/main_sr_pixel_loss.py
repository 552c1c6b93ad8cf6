"""Trains or fine-tunes a BAGEL: parse, build, fit.

python train/main_sr_pixel_loss.py --config configs/tiny/demo.yaml --total_steps 100
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from train.arguments import TrainingArguments as TrainingArguments  # noqa: E402
from train.arguments import help_text, parse_arguments  # noqa: E402
from train.build import build_trainer  # noqa: E402
from train.distributed import require_single_process  # noqa: E402
from train.trainer import NonFiniteError  # noqa: E402


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        print(f"{__doc__}\nArguments and defaults:\n\n{help_text()}")
        return
    try:
        require_single_process()
        args = parse_arguments(argv)
        print(args.table(), flush=True)
        trainer = build_trainer(args)
        trainer.run.mkdir(parents=True, exist_ok=True)
        args.save(trainer.run / "training_args.json")
        trainer.fit()
    except (ValueError, OSError, NonFiniteError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
