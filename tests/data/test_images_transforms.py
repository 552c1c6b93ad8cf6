"""Image files of every kind, and the resize rule against its text in MODEL.md."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import volumes
from data.images import ImageError, read_image, to_image, to_pm1
from data.transforms import ResizeRule


def saved(array: np.ndarray, path: Path) -> Path:
    Image.fromarray(array).save(path)
    return path


def test_eight_bits_are_kept(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(read_image(saved(rgb, tmp_path / "rgb.png"))), rgb)
    grey = np.asarray(read_image(saved(rgb[..., 0], tmp_path / "grey.png")))
    assert np.array_equal(grey, np.repeat(rgb[..., :1], 3, axis=2))


def test_sixteen_bit_grey_keeps_its_range(tmp_path):
    values = np.array([[0, 128, 129, 32768], [257, 65535, 65407, 65406]], dtype=np.uint16)
    read = np.asarray(read_image(saved(values, tmp_path / "deep.png")))
    expected = np.round(values / 65535 * 255)
    assert read.shape == (2, 4, 3) and np.array_equal(read[..., 0], expected)
    assert np.array_equal(read[..., 0], read[..., 2])


def test_transparency_is_laid_on_white(tmp_path):
    rgba = np.zeros((1, 3, 4), dtype=np.uint8)
    rgba[0, :, 0], rgba[0, :, 3] = 200, (0, 51, 255)
    read = np.asarray(read_image(saved(rgba, tmp_path / "rgba.png")))
    share = np.array([0, 0.2, 1.0])[:, None]
    expected = share * np.array([200, 0, 0]) + (1 - share) * 255
    assert np.abs(read[0] - expected).max() <= 1
    grey = np.array([[[0, 0], [0, 255]]], dtype=np.uint8)
    Image.fromarray(grey, "LA").save(tmp_path / "la.png")
    assert np.asarray(read_image(tmp_path / "la.png"))[0, :, 0].tolist() == [255, 0]
    palette = Image.new("P", (2, 1))
    palette.putpalette([9, 8, 7, 1, 2, 3])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "p.png", transparency=1)
    read = np.asarray(read_image(tmp_path / "p.png"))
    assert read.tolist() == [[[9, 8, 7], [255, 255, 255]]]


def test_damaged_files_are_image_errors(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (32, 32, 4), dtype=np.uint8)
    for name in ("cut.png", "cut.jpg"):
        whole = saved(rgb if name.endswith("png") else rgb[..., :3], tmp_path / name).read_bytes()
        for length in (*range(40), 100, len(whole) // 2):
            (tmp_path / name).write_bytes(whole[:length])
            with pytest.raises(ImageError, match=name):
                read_image(tmp_path / name)
    with pytest.raises(ImageError, match=r"nowhere.png"):
        read_image(tmp_path / "nowhere.png")


def test_a_wrong_header_length_is_an_image_error(tmp_path):
    whole = bytearray(saved(np.zeros((4, 4), np.uint8), tmp_path / "head.png").read_bytes())
    whole[11] = 5  # length of the first chunk
    (tmp_path / "head.png").write_bytes(whole)
    with pytest.raises(ImageError, match=r"head.png"):
        read_image(tmp_path / "head.png")


def test_oversized_images_are_refused(tmp_path, monkeypatch):
    path = saved(np.zeros((40, 30), np.uint8), tmp_path / "big.png")
    monkeypatch.setattr(volumes, "MAX_PIXELS", 1199)
    with pytest.raises(ImageError, match=r"big.png: 30x40 is more than 1199 pixels"):
        read_image(path)
    monkeypatch.setattr(volumes, "MAX_PIXELS", 1200)
    assert read_image(path).size == (30, 40)


def test_pixels_to_tensors_and_back():
    array = np.arange(256 * 3, dtype=np.uint8).reshape(16, 16, 3)
    tensor = to_pm1(Image.fromarray(array))
    assert tensor.shape == (3, 16, 16) and tensor.dtype == torch.float32
    assert tensor[1, 2, 3] == pytest.approx((array[2, 3, 1] / 255 - 0.5) / 0.5, abs=1e-6)
    assert (tensor.min().item(), tensor.max().item()) == (-1.0, 1.0)
    assert np.array_equal(to_image(tensor), array)
    beyond = to_image(torch.tensor([-3.0, 3.0, 0.0]).reshape(3, 1, 1))
    assert beyond.mode == "RGB" and beyond.getpixel((0, 0)) == (0, 255, 128)


VAE = ResizeRule(image_stride=16, max_image_size=1024, min_image_size=512)
VIT = ResizeRule(image_stride=14, max_image_size=518, min_image_size=224)


@pytest.mark.parametrize(
    ("rule", "before", "after"),
    [
        (VAE, (1024, 1024), (1024, 1024)),
        (VAE, (600, 700), (608, 704)),  # inside the limits: 37.5 and 43.75 strides
        (VAE, (2048, 1024), (1024, 512)),  # longer side down to 1024
        (VAE, (256, 256), (512, 512)),  # shorter side up to 512
        (VAE, (3000, 1500), (1024, 512)),
        (VAE, (4000, 500), (1024, 128)),  # 512 / 500 wins, then the longer side comes down again
        (VIT, (512, 512), (518, 518)),  # 36.57 strides
        (VIT, (100, 50), (448, 224)),
        (VIT, (5000, 20), (518, 14)),  # at least one stride
        (VIT, (231, 245), (224, 252)),  # 16.5 and 17.5 strides round to even
    ],
)
def test_resize_rule(rule, before, after):
    assert rule.size(*before) == after
    assert rule.size(*before[::-1]) == after[::-1]


def test_resize_rule_limits_pixels():
    """4000 x 3000 -> 1024 x 768 -> times 400000 / 786432 -> 520.8 x 390.6."""
    rule = ResizeRule(image_stride=16, max_image_size=1024, min_image_size=512, max_pixels=400_000)
    assert rule.size(4000, 3000) == (528, 384)
    assert rule.size(512, 512) == (512, 512)


def literal_size(rule: ResizeRule, width: int, height: int) -> tuple[int, int]:
    """The text of MODEL.md, sentence by sentence."""
    stride, longest = rule.image_stride, rule.max_image_size

    def rounded(side: float) -> int:
        return max(round(side / stride) * stride, stride)

    scale = min(longest / max(width, height), 1)
    scale = max(scale, rule.min_image_size / min(width, height))
    w, h = rounded(width * scale), rounded(height * scale)
    if w * h > rule.max_pixels:
        scale = rule.max_pixels / (w * h)
        w, h = rounded(w * scale), rounded(h * scale)
    if max(w, h) > longest:
        scale = longest / max(w, h)
        w, h = rounded(w * scale), rounded(h * scale)
    return w, h


def test_resize_rule_is_its_text():
    rng = np.random.default_rng(0)
    small = ResizeRule(image_stride=14, max_image_size=518, min_image_size=224, max_pixels=90_000)
    for rule in (VAE, VIT, small):
        for width, height in rng.integers(10, 3000, (300, 2)).tolist():
            size = rule.size(width, height)
            assert size == literal_size(rule, width, height)
            assert max(size) <= rule.max_image_size and not any(s % rule.image_stride for s in size)


def test_resizing_is_bicubic_with_antialias():
    rule = ResizeRule(image_stride=8, max_image_size=32, min_image_size=16)
    array = np.random.default_rng(0).integers(0, 256, (64, 128, 3), dtype=np.uint8)
    resized = rule(Image.fromarray(array))
    assert resized.shape == (3, 16, 32)
    full = torch.from_numpy(array).permute(2, 0, 1)[None].float()
    expected = torch.nn.functional.interpolate(full, (16, 32), mode="bicubic", antialias=True)
    assert (resized - (expected[0].clamp(0, 255) / 127.5 - 1)).abs().max() < 2 / 127.5
    unchanged = rule(Image.fromarray(array[:16, :32]))
    assert torch.equal(unchanged, to_pm1(Image.fromarray(array[:16, :32])))


def test_sizes_that_contradict_each_other():
    for stride, longest, shortest in ((16, 500, 512), (0, 512, 256), (600, 1024, 512)):
        with pytest.raises(ValueError, match="0 < image_stride <= min_image_size <= max"):
            ResizeRule(image_stride=stride, max_image_size=longest, min_image_size=shortest)
