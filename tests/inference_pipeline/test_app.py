"""The page, served on a free port and used through gradio's own client."""

import socket
import sys
from functools import partialmethod
from pathlib import Path

import gradio
import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from data.images import read_image
from inference_pipeline import app
from inference_pipeline.restorer import Restorer
from modeling.bagel.generation import SamplingConfig

CHECKPOINT = Path(__file__).parents[2] / "configs" / "tiny" / "checkpoint"
INSTRUCTION = "Remove the noise."


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(page, address, folder of the images) that `main` serves, and the addresses it reached."""
    folder, pages, reached = tmp_path_factory.mktemp("page"), [], set()
    connect, resolve = socket.socket.connect, socket.getaddrinfo
    with socket.socket() as free, pytest.MonkeyPatch.context() as patch:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "server"))
        launch = partialmethod(gradio.Blocks.launch, prevent_thread_lock=True, quiet=True)
        patch.setattr(gradio.Blocks, "launch", launch)
        build = app.build_page
        patch.setattr(app, "build_page", lambda r: pages.append(build(r)) or pages[0])
        # `or`, because add() returns None
        patch.setattr(socket.socket, "connect", lambda s, to: reached.add(to[0]) or connect(s, to))
        patch.setattr(socket, "getaddrinfo", lambda *a, **k: reached.add(a[0]) or resolve(*a, **k))
        app.main(["--model_path", str(CHECKPOINT), "--port", str(port)])
        yield pages[0], f"http://127.0.0.1:{port}/", folder, reached
        pages[0].close()


@pytest.fixture(scope="module")
def client(served):
    _, address, folder, _ = served
    with pytest.MonkeyPatch.context() as patch:
        # The client, not the page, tells the Hub that it is used.
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield Client(address, verbose=False, download_files=folder / "client")


@pytest.fixture(scope="module")
def restorer():
    return Restorer.load(CHECKPOINT)


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    """A ramp of 16 bits, most of it brighter than 8 bits can say."""
    path = tmp_path_factory.mktemp("scan") / "scan.png"
    ramp = np.linspace(0, 65535, 96 * 112).reshape(96, 112).astype(np.uint16)
    Image.fromarray(ramp).save(path)
    return path


def test_an_assessment_comes_before_its_restoration(client, restorer, scan):
    job = client.submit(handle_file(scan), INSTRUCTION, 42, 2, 1.0, 1.0, api_name="/restore")
    (first, nothing), (second, pair) = job
    assert first == second == restorer.assess(read_image(scan), INSTRUCTION) != ""
    assert nothing is None and len(pair) == 2


def test_a_restoration_is_the_restorers_to_the_bit(client, restorer, scan):
    """Beside the input at the same size; seed, times and guidance arrive where they belong."""
    for seed, times, text, image in ((42, 3, 1.0, 1.0), (7, 2, 3.0, 2.0)):
        assessment, (left, right) = client.predict(
            handle_file(scan), INSTRUCTION, seed, times, text, image, api_name="/restore"
        )
        sampling = SamplingConfig(num_timesteps=times, cfg_text_scale=text, cfg_img_scale=image)
        expected = restorer.restore(read_image(scan), INSTRUCTION, sampling, seed=seed)
        assert assessment == expected.assessment
        assert Image.open(right).tobytes() == expected.image.tobytes()
        ramp = np.asarray(Image.open(left).convert("L"), dtype=float)
        assert Image.open(left).size == expected.image.size
        assert np.abs(ramp.ravel() - np.linspace(0, 255, ramp.size)).max() < 4


def test_controls_start_from_the_defaults(served):
    numbers = [b for b in served[0].blocks.values() if isinstance(b, gradio.Number)]
    default = SamplingConfig()
    assert {number.label: number.value for number in numbers} == {
        "seed": 42,
        "num_timesteps": default.num_timesteps,
        "cfg_text_scale": default.cfg_text_scale,
        "cfg_img_scale": default.cfg_img_scale,
    }


def test_errors_are_shown(client, scan, tmp_path):
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(scan.read_bytes()[:200])
    empty = tmp_path / "empty.png"
    empty.write_bytes(b"no image")
    for image, instruction, times, message in (
        (handle_file(scan), " ", 2, "the instruction is empty"),
        (None, INSTRUCTION, 2, "there is no image yet"),
        (handle_file(damaged), INSTRUCTION, 2, "damaged.png"),
        (handle_file(empty), INSTRUCTION, 2, "cannot identify image file"),
        (handle_file(scan), INSTRUCTION, 1, "num_timesteps=1"),
    ):
        with pytest.raises(AppError, match=message):
            client.predict(image, instruction, 42, times, 1.0, 1.0, api_name="/restore")


def test_nothing_leaves_the_machine(served, client, scan):
    """No analytics, no tunnel, no copy of the images in a browser's history; this host alone."""
    page, address, _, reached = served
    assert (page.analytics_enabled, page.share, page.run_history) == (False, False, False)
    assert page.local_url == address and page.share_url is None
    client.predict(handle_file(scan), INSTRUCTION, 42, 2, 1.0, 1.0, api_name="/restore")
    assert page.server_name == "127.0.0.1" and reached == {"127.0.0.1"}


def test_images_go_with_the_page(served, client, scan):
    page, _, folder, _ = served
    client.predict(handle_file(scan), INSTRUCTION, 42, 2, 1.0, 1.0, api_name="/restore")
    assert len([*(folder / "server").rglob("*.png")]) >= 3
    page.close()
    assert [*(folder / "server").rglob("*.png")] == []


def test_a_missing_gradio_is_told_before_the_model_is_loaded(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ValueError, match=r"pip install 'bagel-restore\[app\]'"):
        app.main(["--model_path", "nowhere"])
