"""Numbers of images and texts against independent statements of their formulas."""

import json
import math
import pickle
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from scipy.linalg import sqrtm
from scipy.signal import convolve2d
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import nn

from data.scores import PSNR_OF_EQUAL_IMAGES, scores
from inference_pipeline import perceptual
from inference_pipeline.metrics import (
    MS_SSIM_SIDE,
    PROTOCOL,
    PROTOCOLS,
    describe,
    measure,
    measure_all,
    number_names,
)
from inference_pipeline.perceptual import Lpips, features, fid, frechet_distance, load_extractor
from inference_pipeline.text_metrics import text_numbers

BOTH = ("psnr", "ssim")


def pair(height: int, width: int, low: int = 20, high: int = 180, seed: int = 0) -> tuple:
    """A smooth coloured truth and a noisy copy, as images and as float64 arrays."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 9 + c) + np.cos(y / 7 - c) for c in range(3)], -1)
    truth = (low + (high - low) * (waves + 2) / 4).astype(np.uint8)
    noisy = np.clip(truth + rng.normal(0, 12, truth.shape), 0, 255).astype(np.uint8)
    return Image.fromarray(noisy), Image.fromarray(truth), noisy * 1.0, truth * 1.0


def windows(a: np.ndarray, b: np.ndarray, data_range: float) -> tuple[float, float]:
    """SSIM and its contrast-structure part of one channel, by two-dimensional convolution."""
    x = np.arange(11) - 5
    kernel = np.exp(-(x[:, None] ** 2 + x**2) / (2 * 1.5**2))
    kernel /= kernel.sum()

    def mean(values: np.ndarray) -> np.ndarray:
        return convolve2d(values, kernel, mode="valid")

    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    ma, mb = mean(a), mean(b)
    va, vb, cov = mean((a - 128) ** 2), mean((b - 128) ** 2), mean((a - 128) * (b - 128))
    va, vb, cov = va - (ma - 128) ** 2, vb - (mb - 128) ** 2, cov - (ma - 128) * (mb - 128)
    structure = (2 * cov + c2) / (va + vb + c2)
    luminance = (2 * ma * mb + c1) / (ma**2 + mb**2 + c1)
    return float((structure * luminance).mean()), float(structure.mean())


def test_medq_is_the_users_definition_to_the_bit():
    image, truth, a, b = pair(40, 31)
    expected = structural_similarity(np.uint8(a), np.uint8(b), channel_axis=2, data_range=255)
    psnr = 10 * np.log10(255.0**2 / np.mean((a - b) ** 2))
    assert measure(image, truth) == {"psnr": psnr, "ssim": expected} == scores(image, truth)
    assert psnr == pytest.approx(peak_signal_noise_ratio(np.uint8(b), np.uint8(a)), abs=1e-9)
    assert PROTOCOL == "medq"


def test_gaussian_protocols_against_scikit_image_and_the_formula():
    image, truth, a, b = pair(40, 31)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    for protocol, scale, data_range in (("standard", 1, 255), ("amir", 255, np.ptp(b) / 255)):
        x, y = a / scale, b / scale
        found = measure(image, truth, protocol)
        mine = structural_similarity(x, y, channel_axis=2, data_range=data_range, **options)
        assert found["ssim"] == pytest.approx(mine, abs=1e-10)
        parts = [windows(a[..., c], b[..., c], scale * data_range)[0] for c in range(3)]
        assert found["ssim"] == pytest.approx(np.mean(parts), abs=1e-10)
        psnr = peak_signal_noise_ratio(y, x, data_range=data_range)
        assert found["psnr"] == pytest.approx(psnr, abs=1e-9)
    assert measure(image, truth, "amir")["psnr"] < measure(image, truth, "standard")["psnr"] - 4


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_ms_ssim_against_the_formula(protocol):
    """Odd sides at three of the five scales."""
    image, truth, a, b = pair(165, 177)
    data_range = np.ptp(b) if protocol == "amir" else 255
    channels = []
    for c in range(3):
        x, y, value = a[..., c], b[..., c], 1.0
        for scale, weight in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
            value *= windows(x, y, data_range)[scale < 4] ** weight
            x, y = (
                np.array(
                    [
                        [z[i : i + 2, j : j + 2].mean() for j in range(0, z.shape[1], 2)]
                        for i in range(0, z.shape[0], 2)
                    ]
                )
                for z in (x, y)
            )
        channels.append(value)
    found = measure(image, truth, protocol, ["ms_ssim"], "_input")
    assert found == {"ms_ssim_input": pytest.approx(np.mean(channels), abs=1e-10)}


def test_equal_and_opposite_images():
    image, truth, *_ = pair(161, 161)
    metrics = (*BOTH, "ms_ssim")
    for protocol in PROTOCOLS:
        same = measure(truth, truth, protocol, metrics)
        assert same["psnr"] == PSNR_OF_EQUAL_IMAGES
        assert same["ssim"] == same["ms_ssim"] == pytest.approx(1, abs=1e-12)
        opposite = Image.fromarray(255 - np.asarray(truth))
        assert measure(opposite, truth, protocol, metrics)["ms_ssim"] == 0


def test_ms_ssim_is_absent_where_it_is_too_small_and_said_once():
    image, truth, *_ = pair(MS_SSIM_SIDE, 200)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        found = [measure(image, truth, "medq", ("psnr", "ms_ssim")) for _ in range(3)]
    assert [list(numbers) for numbers in found] == [["psnr"]] * 3
    assert [str(w.message) for w in caught] == [
        "ms_ssim is left out where the shorter side is at most 160"
    ]


@pytest.mark.parametrize(
    ("protocol", "metric", "size", "message"),
    [
        ("medq", "ssim", (6, 40), "ssim of 'medq' needs sides of at least 7, not 40 x 6"),
        ("amir", "ssim", (40, 10), "at least 11, not 10 x 40"),
        ("standart", "psnr", (20, 20), "did you mean 'standard'"),
        ("medq", "ms-ssim", (20, 20), "did you mean 'ms_ssim'"),
        ("medq", "qqq", (20, 20), "known are \['ms_ssim', 'psnr', 'ssim'\]"),
    ],
)
def test_what_cannot_be_measured(protocol, metric, size, message):
    image, truth, *_ = pair(*size)
    with pytest.raises(ValueError, match=message):
        measure(image, truth, protocol, [metric])


def test_images_that_cannot_be_compared():
    image, truth, *_ = pair(20, 20)
    with pytest.raises(ValueError, match="cannot be compared"):
        measure(image.resize((21, 20)), truth)
    with pytest.raises(ValueError, match="no data range for protocol 'amir'"):
        measure(image, Image.new("RGB", image.size, "gray"), "amir")


def test_names_of_further_protocols():
    image, truth, *_ = pair(20, 20)
    found = measure_all(image, truth, ["amir", "medq"], BOTH, "_ceiling")
    amir, medq = measure(image, truth, "amir"), measure(image, truth, "medq")
    assert found == {
        "psnr_ceiling": amir["psnr"],
        "ssim_ceiling": amir["ssim"],
        "medq:psnr_ceiling": medq["psnr"],
        "medq:ssim_ceiling": medq["ssim"],
    }
    names = number_names(["amir", "medq"])
    assert found.keys() <= {*names} and len(names) == len({*names}) == 2 * 4 * 4 + 3
    assert describe("medq") == "medq: PSNR in dB; 8-bit RGB, range 255, SSIM 7 x 7 uniform window"
    assert "11 x 11 Gaussian window, sigma 1.5" in describe("standard")
    assert "max - min of the truth" in describe("amir")


@pytest.fixture(scope="module")
def lpips_file(tmp_path_factory):
    """Random weights under the names of a VGG16 built layer by layer, and that network."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    before = 3
    for step in (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool"):
        if step == "pool":
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(before, step, 3, padding=1), nn.ReLU()]
            before = step
    layers += [layer for _ in range(3) for layer in (nn.Conv2d(512, 512, 3, padding=1), nn.ReLU())]
    vgg = nn.Sequential(*layers)
    for layer in vgg:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.normal_(layer.bias, std=0.1)
    heads = {
        f"lin{i}.model.1.weight": torch.rand(1, n, 1, 1)
        for i, n in enumerate((64, 128, 256, 512, 512))
    }
    tensors = {f"features.{name}": x for name, x in vgg.state_dict().items()}
    path = tmp_path_factory.mktemp("lpips") / "lpips.safetensors"
    save_file({**tensors, **heads, "classifier.0.bias": torch.zeros(1)}, path)
    return path, vgg, heads


def test_lpips_against_the_network_layer_by_layer(lpips_file):
    path, vgg, heads = lpips_file
    image, truth, a, b = pair(37, 50)
    # Statistics of ImageNet: pixels in [0, 1].
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    ys = [torch.tensor((x / 255 - mean) / deviation).permute(2, 0, 1)[None] for x in (a, b)]
    expected, head = 0.0, iter(heads.values())
    vgg = vgg.double()
    with torch.no_grad():
        for i, layer in enumerate(vgg):
            ys = [layer(y) for y in ys]
            if i in (3, 8, 15, 22, 29):
                units = [y / torch.sqrt((y**2).sum(1, keepdim=True)) for y in ys]
                difference = torch.nan_to_num(units[0] - units[1]) ** 2
                expected += float((difference * next(head)).sum(1).mean())
    lpips = Lpips(path)
    assert lpips(image, truth) == pytest.approx(expected, rel=1e-4)
    assert lpips(truth, truth) == 0


def test_lpips_of_weights_that_are_not_there(lpips_file, tmp_path):
    with pytest.raises(ValueError, match=r"lpips weights .*none.*features\.0\.weight.*lin4\.model"):
        Lpips(tmp_path / "none.safetensors")
    (tmp_path / "pickle.safetensors").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match="lpips weights"):
        Lpips(tmp_path / "pickle.safetensors")
    save_file({"features.0.bias": torch.zeros(63)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"misshapen: features\.0\.weight, features\.0\.bias"):
        Lpips(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="sides of at least 16"):
        Lpips(lpips_file[0])(*pair(15, 40)[:2])


def test_frechet_distance_against_closed_forms():
    zero, one = np.zeros(3), np.eye(3)
    assert frechet_distance(zero, one, zero, one) == pytest.approx(0, abs=1e-12)
    # Commuting covariances: the squared differences of means and of deviations.
    a, b = np.array([1.0, 4.0, 9.0]), np.array([4.0, 4.0, 0.0])
    found = frechet_distance(zero, np.diag(a), zero + 2, np.diag(b))
    assert found == pytest.approx(3 * 4 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), abs=1e-12)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(50, 6)), rng.normal(size=(40, 6)) @ rng.normal(size=(6, 6)) + 1
    covariances = np.cov(x.T), np.cov(y.T)
    traces = np.trace(covariances[0] + covariances[1] - 2 * sqrtm(covariances[0] @ covariances[1]))
    means = ((x.mean(0) - y.mean(0)) ** 2).sum()
    assert fid(x, y) == pytest.approx(means + traces.real, rel=1e-9)
    few = rng.normal(size=(3, 6))  # covariance of rank 2
    assert fid(few, few + 1) == pytest.approx(6, rel=1e-6)
    with pytest.raises(ValueError, match="1 and 3 images"):
        fid(few[:1], few)


class Means(nn.Module):
    """Mean red and mean blue."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3))[:, ::2]


def test_fid_of_a_folder(tmp_path, monkeypatch, capsys):
    torch.jit.trace(Means(), torch.rand(1, 3, 8, 8)).save(tmp_path / "means.pt")
    values = {
        "GT": [(0, 9, 0), (51, 9, 102)],
        "pred": [(51, 0, 0), (102, 0, 102)],
        "input": [(0, 0, 0), (51, 0, 102)],
    }
    results = [{"sample_id": 2, "error": "x"}]
    for i in range(2):
        for kind, colours in values.items():
            Image.new("RGB", (8 + i, 9), colours[i]).save(tmp_path / f"{i}_{kind}.png")
        keys = (("saved_output_img", "GT"), ("saved_input_img", "input"), ("pred_img", "pred"))
        results.append({"sample_id": i} | {key: f"{i}_{kind}.png" for key, kind in keys})
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in results))
    extractor = str(tmp_path / "means.pt")
    monkeypatch.setattr(sys, "argv", ["perceptual", str(tmp_path), "--extractor", extractor])
    perceptual.main()
    head, numbers = capsys.readouterr().out.split(": ")
    assert head == "FID against the truth by means.pt, 2 images"
    degraded, restored = (float(part.split()[1]) for part in numbers.split(", "))
    # The restored images are redder by 51 / 255 and vary alike.
    assert degraded == pytest.approx(0, abs=1e-6) and restored == pytest.approx(0.04, abs=1e-6)


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_an_extractor_is_no_pickle(tmp_path):
    torch.save(Evil(tmp_path / "ran"), tmp_path / "zipped.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    for name in ("zipped.pt", "plain.pt", "missing.pt"):
        with pytest.raises(ValueError, match=rf"--extractor .*{name}: no file of torch.jit.trace"):
            load_extractor(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_an_extractor_of_another_shape():
    image = Image.new("RGB", (8, 8))
    for extractor in (torch.sum, torch.nn.Conv2d(1, 1, 3)):
        with pytest.raises(ValueError, match=r"--extractor: not \(1, 3, H, W\) in, \(1, D\) out"):
            features(extractor, [image])


def test_numbers_of_texts_by_hand():
    same = text_numbers("Strong noise in the image.", "Strong noise in the image.")
    assert same["bleu"] == pytest.approx(100) and same["rouge_l"] == 1
    # Six words match in one chunk.
    assert same["meteor"] == pytest.approx(1 - 0.5 * (1 / 6) ** 3)
    found = text_numbers("a b c d", "a b c e")
    # The one quadruple does not match: smoothing counts it half.
    assert found["bleu"] == pytest.approx(100 * (3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25)
    assert found["rouge_l"] == pytest.approx(3 / 4)
    assert found["meteor"] == pytest.approx(3 / 4 * (1 - 0.5 * (1 / 3) ** 3))
    short = text_numbers("blurred edges", "blurring of an edge")
    # Stems: both words of two match two words of four, in two chunks.
    assert short["rouge_l"] == pytest.approx(2 * 1 * 0.5 / 1.5)
    assert short["meteor"] == pytest.approx(0.5 / (0.9 + 0.1 * 0.5) * 0.5)
    assert text_numbers("picture", "image") == {"bleu": 0, "rouge_l": 0, "meteor": 0}
    assert not any(math.isnan(x) for x in text_numbers("", "image").values())
