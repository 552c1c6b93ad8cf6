"""Writes a checkpoint's EMA weights as a lean folder for inference and fine-tuning.

python -m scripts.tools.export --checkpoint RUN/0002000 --out FOLDER --dtype bfloat16
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from modeling.pretrained import load_pretrained, save_pretrained  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--weights", choices=("ema", "model"), default="ema")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    model, report = load_pretrained(args.checkpoint, args.weights)
    print(report)
    state = {args.weights: model.state_dict()}
    dtype = getattr(torch, args.dtype)
    save_pretrained(model, args.out, state, tokenizer_from=args.checkpoint, dtype=dtype)
    _, report = load_pretrained(args.out, args.weights)
    print(report)


if __name__ == "__main__":
    main()
