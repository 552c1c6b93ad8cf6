"""SSIM forward + backward: ours against its peers, side by side, with targets.

    python benchmarks/ssim.py [--sizes 2,3,256,256 1,3,512,512] [--compile] [--threads 2]

Peers are installed for the benchmark only: pip install pytorch-msssim torchmetrics
Times and memory are taken as `benchmarks/measure.py` says; peak memory is what is needed beyond the
two images.
Exit code 1: a target was missed.
"""

import argparse
import functools
import importlib
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from skimage.metrics import structural_similarity
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.measure import median_seconds, peak_bytes  # noqa: E402
from modeling.bagel.ssim import gaussian_window, ssim_per_image  # noqa: E402

Implementation = Callable[[Tensor, Tensor], Tensor]

SIZES = [(2, 3, 256, 256), (1, 3, 512, 512), (1, 3, 1024, 1024)]
SPEED = {"ours": 4.0, "ours, compiled": 8.0}
MEMORY = {(2, 3, 256, 256): 4.0, (1, 3, 512, 512): 6.0, (1, 3, 1024, 1024): 8.0}
VALUE_ERROR, GRADIENT_ERROR = 1e-6, 1e-5


def conv_ssim(x: Tensor, y: Tensor, padding: int, epsilon: float) -> Tensor:
    """Mean SSIM by 2-D depthwise convolutions, E[x^2] - E[x]^2 and autograd."""
    window = gaussian_window(11, dtype=x.dtype, device=x.device)
    kernel = torch.outer(window, window).expand(x.shape[1], 1, 11, 11).contiguous()

    def blur(z: Tensor) -> Tensor:
        return F.conv2d(z, kernel, padding=padding, groups=z.shape[1])

    c1, c2 = 0.01**2, 0.03**2
    mx, my = blur(x), blur(y)
    mxx, myy, mxy = mx * mx, my * my, mx * my
    vx, vy, cov = blur(x * x) - mxx, blur(y * y) - myy, blur(x * y) - mxy
    top = (2 * mxy + c1) * (2 * cov + c2)
    return (top / ((mxx + myy + c1) * (vx + vy + c2) + epsilon)).mean()


def fork(x: Tensor, y: Tensor) -> Tensor:
    """The formulation that the users' fork has today: zero padding and an epsilon."""
    return conv_ssim(x, y, padding=5, epsilon=1e-8)


def implementations(compiled: bool) -> dict[str, Implementation]:
    found: dict[str, Implementation] = {
        "fork": fork,
        "ours": lambda x, y: ssim_per_image(x, y).mean(),
    }
    if compiled:
        found["ours, compiled"] = lambda x, y: ssim_per_image(x, y, compiled=True).mean()
    peers: dict[str, tuple[str, Callable]] = {
        "pytorch-msssim": (
            "pytorch_msssim",
            lambda peer: lambda x, y: peer.ssim(x, y, data_range=1.0),
        ),
        "torchmetrics": (
            "torchmetrics.functional.image",
            lambda peer: (
                lambda x, y: peer.structural_similarity_index_measure(x, y, data_range=1.0)
            ),
        ),
    }
    for name, (module, wrap) in peers.items():
        try:
            found[name] = wrap(importlib.import_module(module))
        except ImportError as error:
            print(f"{name} is left out: pip install {name} ({error})")
    return found


def step(implementation: Implementation, x: Tensor, y: Tensor) -> tuple[float, Tensor]:
    """SSIM and the gradient of 1 - SSIM."""
    x.grad = None
    value = implementation(x, y)
    (1 - value).backward()
    return value.item(), x.grad


def truth(x: Tensor, y: Tensor) -> tuple[float, Tensor]:
    """Value from scikit-image (valid windows), gradient from plain float64 autograd."""
    values = []
    for a, b in zip(x.detach().double().numpy(), y.double().numpy(), strict=True):
        _, full = structural_similarity(
            a,
            b,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1,
            channel_axis=0,
            full=True,
        )
        values.append(full[:, 5:-5, 5:-5].mean())
    x64 = x.detach().double().requires_grad_()
    _, gradient = step(lambda a, b: conv_ssim(a, b, padding=0, epsilon=0.0), x64, y.double())
    return statistics.mean(values), gradient


def measure(
    size: tuple[int, ...], found: dict[str, Implementation], rounds: int, wanted_threads: int
) -> list[str]:
    """Prints the table of one size; returns the targets that were missed."""
    # Every size as in a run that has no other: after a change of size torch.compile goes on with
    # a kernel for any size, which is up to a third slower.
    torch.compiler.reset()
    y = torch.rand(size)
    x = (y + 0.1 * torch.randn(size)).clamp(0, 1).requires_grad_()
    true_value, true_gradient = truth(x, y)
    errors = {}
    for name, implementation in found.items():
        value, gradient = step(implementation, x, y)
        gradient_error = (gradient.double() - true_gradient).norm() / true_gradient.norm()
        errors[name] = abs(value - true_value), gradient_error.item()
    runs = {name: functools.partial(step, run, x, y) for name, run in found.items()}
    seconds, how = median_seconds(runs, rounds, wanted_threads)
    peaks = {}
    for name, run in runs.items():
        x.grad = None
        peaks[name] = peak_bytes(run)

    print(f"\n{size}, {how}")
    print(f"{'':16}{'ms':>9}{'speed':>9}{'MB':>9}{'memory':>9}{'value':>11}{'gradient':>11}")
    missed = []
    for name, (value_error, gradient_error) in errors.items():
        speed, memory = seconds["fork"] / seconds[name], peaks["fork"] / peaks[name]
        print(
            f"{name:16}{1e3 * seconds[name]:9.1f}{speed:8.1f}x{peaks[name] / 1e6:9.1f}"
            f"{'1/' + format(memory, '.1f'):>9}{value_error:11.1e}{gradient_error:11.1e}"
        )
        if name in SPEED:
            missed += [
                f"{size} {name}: {text}"
                for met, text in (
                    (speed >= SPEED[name], f"{speed:.1f}x < {SPEED[name]}x"),
                    (memory >= MEMORY.get(size, 4.0), f"memory 1/{memory:.1f}"),
                    (value_error <= VALUE_ERROR, f"value error {value_error:.1e}"),
                    (gradient_error <= GRADIENT_ERROR, f"gradient error {gradient_error:.1e}"),
                )
                if not met
            ]
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--sizes",
        nargs="+",
        default=SIZES,
        type=lambda text: tuple(int(n) for n in text.split(",")),
        help="B,C,H,W each",
    )
    parser.add_argument("--compile", action="store_true", help="also ours with compiled=True")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    found = implementations(arguments.compile)
    print(f"torch {torch.__version__}, load {os.getloadavg()[0]:.1f}")
    missed = []
    for size in arguments.sizes:
        missed += measure(size, found, arguments.rounds, arguments.threads)
    print("\n" + ("\n".join(["Targets missed:", *missed]) if missed else "All targets met."))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
