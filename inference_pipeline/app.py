"""A page to try a checkpoint: drop an image, read the assessment, compare the restoration.

python -m inference_pipeline.app --model_path configs/tiny/checkpoint
"""

import argparse
import inspect
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from data.images import read_image
from modeling.bagel.generation import SamplingConfig

from .restorer import Restorer
from .results import command

CACHE_SECONDS = 3600
"""Images on the server's disk that are older go, and all of them with the page."""


def build_page(restorer: Restorer) -> Any:
    """The page, a gradio.Interface with the endpoint `/restore`."""
    import gradio as gr

    def restore(
        path: str | None, instruction: str, seed: int, steps: int, text: float, image: float
    ) -> Iterator[tuple[str, tuple[Image.Image, Image.Image] | None]]:
        """The assessment as soon as it is there, then with it input and restoration."""
        if path is None:
            raise ValueError("there is no image yet")
        sampling = SamplingConfig(num_timesteps=steps, cfg_text_scale=text, cfg_img_scale=image)
        degraded = read_image(path)
        yield restorer.assess(degraded, instruction, seed=seed), None
        restored = restorer.restore(degraded, instruction, sampling, seed=seed)
        enlarged = degraded.resize(restored.image.size, Image.Resampling.BICUBIC)
        yield restored.assessment, (enlarged, restored.image)

    initial = {"seed": inspect.signature(restorer.restore).parameters["seed"].default}
    for name in ("num_timesteps", "cfg_text_scale", "cfg_img_scale"):
        initial[name] = getattr(SamplingConfig, name)
    numbers = [
        gr.Number(value, precision=0 if isinstance(value, int) else None, label=name)
        for name, value in initial.items()
    ]
    # The file as it is: gradio's own conversion clips images of 16 bits.
    degraded = gr.Image(type="filepath", image_mode=None, label="Degraded image")
    pair = gr.ImageSlider(format="png", label="Degraded | restored")
    return gr.Interface(
        restore,
        [degraded, gr.Textbox(label="Instruction"), *numbers],
        [gr.Textbox(label="Assessment"), pair],
        description=str(restorer.report),
        flagging_mode="never",
        analytics_enabled=False,
        api_name="restore",
        concurrency_limit=1,
        delete_cache=(CACHE_SECONDS, CACHE_SECONDS),
    )


def main(argv: list[str] | None = None) -> None:
    """Serves the page until it is interrupted; raises ValueError without gradio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model_path", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in")
    parser.add_argument("--port", type=int, default=7860)
    args = parser.parse_args(argv)
    if find_spec("gradio") is None:
        raise ValueError("the page needs gradio: pip install 'bagel-restore[app]'")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    page = build_page(Restorer.load(args.model_path, device=device))
    where = {"server_name": args.host, "server_port": args.port, "share": False}
    page.launch(**where, show_error=True, run_history=False, footer_links=[])


if __name__ == "__main__":
    command(main)
