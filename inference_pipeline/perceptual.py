"""LPIPS (Zhang et al. 2018) and FID (Heusel et al. 2017), with networks that the user has on disk.

FID: python -m inference_pipeline.perceptual results/A --extractor inception.pt
LPIPS, VGG16: the file holds torchvision's tensors and the heads that the authors of LPIPS ship,
save_file({**vgg16.state_dict(), **torch.load("vgg.pth", weights_only=True)}, "lpips.safetensors")
"""

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional as F

from data.images import read_image
from data.scores import rgb_arrays

from .results import command, read_results

BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Channels of VGG16's convolutions; a head looks at the end of each block."""
MIN_SIDE = 2 ** (len(BLOCKS) - 1)
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Mean and deviation of the training images, for pixels in [-1, 1]."""
EPSILON = 1e-10
Extractor = Callable[[Tensor], Tensor]
"""(1, 3, H, W) float32 RGB in [0, 1] -> (1, D) features; it resizes and normalises for itself."""


def _shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of LPIPS's tensors, in the order in which an image meets them."""
    shapes: dict[str, tuple[int, ...]] = {}
    position, before = 0, 3
    for i, block in enumerate(BLOCKS):
        for channels in block:
            shapes[f"features.{position}.weight"] = (channels, before, 3, 3)
            shapes[f"features.{position}.bias"] = (channels,)
            position, before = position + 2, channels  # a ReLU has a number too,
        shapes[f"lin{i}.model.1.weight"] = (1, before, 1, 1)
        position += 1  # and the pooling after a block
    return shapes


class Lpips:
    """Distance of two RGB images as VGG16 sees them; 0 for equal images, lower is better."""

    def __init__(self, weights: str | Path, device: str = "cpu") -> None:
        """Raises ValueError when the safetensors file is missing or lacks a tensor."""
        shapes = _shapes()
        try:
            with safe_open(weights, "pt", device=device) as file:
                names = shapes.keys() & file.keys()
                self.tensors = {k: file.get_tensor(k).float() for k in shapes if k in names}
        except (OSError, SafetensorError) as error:
            raise ValueError(f"lpips weights {weights}: {error}; keys: {[*shapes]}") from error
        wrong = [k for k in shapes if k not in names or self.tensors[k].shape != shapes[k]]
        if wrong:
            raise ValueError(f"lpips weights {weights}: missing or misshapen: {', '.join(wrong)}")

    @torch.inference_mode()
    def __call__(self, image: Image.Image, truth: Image.Image) -> float:
        """Raises ValueError for sizes that differ or are too small for VGG16's poolings."""
        if min(image.size) < MIN_SIDE:
            raise ValueError(f"lpips needs sides of at least {MIN_SIDE}, not {image.size}")
        pixels = torch.stack([torch.tensor(x) for x in rgb_arrays(image, truth)])
        x = (pixels / 127.5 - 1 - torch.tensor(SHIFT)) / torch.tensor(SCALE)
        x = x.permute(0, 3, 1, 2).to(self.tensors["features.0.bias"].device)
        distance = 0.0
        for name, tensor in self.tensors.items():
            if name.startswith("lin"):
                a, b = x / (x.norm(dim=1, keepdim=True) + EPSILON)
                distance += float(F.conv2d((a - b)[None] ** 2, tensor).mean())
                x = F.max_pool2d(x, 2)
            elif name.endswith("weight"):
                bias = self.tensors[name.replace("weight", "bias")]
                x = F.conv2d(x, tensor, bias, padding=1).relu()
        return distance


def load_extractor(path: Path) -> Extractor:
    """A TorchScript program.

    TorchScript, because its reader builds tensors and programs over tensors alone, where that of
    `torch.export` may unpickle objects of Python. A program still runs, so the path is the user's
    own and has no default. Raises ValueError for a missing file and for any other kind.
    """
    try:
        return torch.jit.load(path, map_location="cpu").eval()
    except (ValueError, RuntimeError) as error:
        text = f"--extractor {path}: no file of torch.jit.trace(extractor, image).save(path)"
        raise ValueError(text) from error


@torch.inference_mode()
def features(extractor: Extractor, images: Iterable[Image.Image]) -> np.ndarray:
    """(N, D) float64 of RGB images, one at a time, as their sizes may differ."""
    pixels = (torch.tensor(np.asarray(image.convert("RGB"))) / 255 for image in images)
    try:
        return torch.cat([extractor(x.permute(2, 0, 1)[None]) for x in pixels]).double().numpy()
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"--extractor: not (1, 3, H, W) in, (1, D) out: {error}") from error


def frechet_distance(
    mean_a: np.ndarray, covariance_a: np.ndarray, mean_b: np.ndarray, covariance_b: np.ndarray
) -> float:
    """Squared distance of two Gaussians: means (D,), covariances (D, D), float64.

    The trace of (AB)^(1/2) is that of (A^(1/2) B A^(1/2))^(1/2), which is symmetric.
    """
    values, vectors = np.linalg.eigh(covariance_a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    shared = np.sqrt(np.linalg.eigvalsh(root @ covariance_b @ root).clip(0)).sum()
    traces = np.trace(covariance_a) + np.trace(covariance_b)
    return float(((mean_a - mean_b) ** 2).sum() + traces - 2 * shared)


def fid(a: np.ndarray, b: np.ndarray) -> float:
    """Of two sets of features (N, D). Raises ValueError for fewer than two images in a set."""
    if min(len(a), len(b)) < 2:
        raise ValueError(f"sets of {len(a)} and {len(b)} images have no covariance")
    moments = [(x.mean(0), np.atleast_2d(np.cov(x, rowvar=False))) for x in (a, b)]
    return frechet_distance(*moments[0], *moments[1])


def main() -> None:
    parser = argparse.ArgumentParser(description="FID of a folder of results.", allow_abbrev=False)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--extractor", type=Path, required=True, help="TorchScript file")
    args = parser.parse_args()
    extractor = load_extractor(args.extractor)
    good = [r for r in read_results(args.folder) if "error" not in r]
    if not good:
        raise ValueError(f"{args.folder}: no restored image")
    keys = ("saved_output_img", "saved_input_img", "pred_img")
    images = ((read_image(args.folder / r[key]) for r in good) for key in keys)
    truth, degraded, restored = (features(extractor, x) for x in images)
    print(f"FID against the truth by {args.extractor.name}, {len(good)} images: ", end="")
    print(f"degraded {fid(degraded, truth):.4g}, restored {fid(restored, truth):.4g}")


if __name__ == "__main__":
    command(main)
