"""Writes a checkpoint's weights as a lean folder for inference and fine-tuning, and verifies it.

python -m scripts.tools.export --checkpoint RUN/0002000 --out FOLDER --save_dtype bfloat16
python -m scripts.tools.export --verify FOLDER

The folder holds the outputs of one forward pass (`forward.safetensors`). Verifying loads it
strictly, with its hashes, and computes them again.
"""

import argparse
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.packer import Packer, PackerConfig, Sample, TextSegment, VaeSegment, VitSegment  # noqa: E402
from modeling.bagel.bagel import Bagel  # noqa: E402
from modeling.batch import SpecialTokens  # noqa: E402
from modeling.pretrained import (  # noqa: E402
    CheckpointError,
    Weights,
    load_pretrained,
    save_pretrained,
    verify_manifest,
    write_manifest,
)

FORWARD_FILE = "forward.safetensors"
TOLERANCE = 1e-4
"""Of an output, relative to its norm: between machines, not between weights."""


@torch.no_grad()
def forward(model: Bagel) -> dict[str, Tensor]:
    """Hidden states and, if it generates, velocities of a fixed sample, in float32."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    vocabulary = config.llm.vocab_size
    ids = torch.randint(vocabulary, (8,), generator=generator).tolist()
    segments: list[TextSegment | VitSegment | VaeSegment] = [TextSegment(ids=ids)]
    if config.vit is not None:
        patch = config.vit_patch
        image = torch.rand(3, 2 * patch, patch, generator=generator) * 2 - 1
        segments.append(VitSegment(image_pm1=image))
    if config.vae is not None:
        stride = config.latent_stride
        image = torch.rand(3, stride, 2 * stride, generator=generator) * 2 - 1
        segments.append(VaeSegment(image_pm1=image, target=True))
    packer_config = PackerConfig(
        latent_stride=config.latent_stride or 1,
        max_latent_size=config.max_latent_size,
        vit_patch_size=config.vit.patch_size if config.vit is not None else 1,
        vit_max_num_patch_per_side=config.vit_max_num_patch_per_side,
        interpolate_pos=config.interpolate_pos,
    )
    special = dict.fromkeys(("bos", "eos", "image_start", "image_end"), vocabulary - 1)
    packer = Packer(packer_config, SpecialTokens(**special))
    packer.add(Sample("forward", segments), generator)
    out = model.float().step_outputs(packer.build())
    outputs = {"hidden": out.hidden.float()}
    return outputs | ({"velocity": out.velocity_pred} if config.vae is not None else {})


def export(checkpoint: Path, out: Path, weights: Weights, dtype: torch.dtype) -> None:
    if out.exists() and any(out.iterdir()):
        raise CheckpointError(f"{out} is not empty: an export goes into a folder of its own")
    model, report = load_pretrained(checkpoint, weights)
    print(report)
    state = {weights: model.state_dict()}
    save_pretrained(model, out, state, tokenizer_from=checkpoint, dtype=dtype)
    rounded = {n: v.to(dtype) for n, v in state[weights].items() if not n.startswith("vae.")}
    model.load_state_dict(state[weights] | rounded)
    save_file(forward(model), out / FORWARD_FILE, {"format": "pt"})
    write_manifest(out)


def verify(folder: Path) -> None:
    """Raises CheckpointError when the folder does not load or computes something else."""
    verify_manifest(folder)
    if not (folder / FORWARD_FILE).exists():
        raise CheckpointError(f"{folder}: {FORWARD_FILE} not found: was it written by this script?")
    weights: Weights = "ema" if list(folder.glob("ema*.safetensors")) else "model"
    model, report = load_pretrained(folder, weights, dtype=torch.float32, verify=False)
    print(report)
    stored = load_file(folder / FORWARD_FILE)
    for name, found in forward(model).items():
        error = float((found - stored[name]).norm() / stored[name].norm())
        print(f"{name}: relative error {error:.1e}")
        if not error <= TOLERANCE:
            raise CheckpointError(f"{folder}: {name} differs by {error:.1e} from {FORWARD_FILE}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--checkpoint", type=Path, help="folder to export from")
    task.add_argument("--verify", type=Path, help="exported folder to check")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--weights", choices=("ema", "model"), default="ema")
    parser.add_argument(
        "--save_dtype", "--dtype", choices=("float32", "bfloat16"), default="float32"
    )
    args = parser.parse_args()
    try:
        if args.checkpoint is not None:
            if args.out is None:
                parser.error("--checkpoint needs --out")
            export(args.checkpoint, args.out, args.weights, getattr(torch, args.save_dtype))
        verify(args.verify or args.out)
    except (CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
