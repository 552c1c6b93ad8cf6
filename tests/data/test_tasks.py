"""Segments of every task against what is written here by hand."""

import io
import json
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.images import ImageError
from data.packer import Sample, TextSegment, VaeSegment, VitSegment
from data.records import RecordError, parse_record, record_of
from data.tasks import TASKS, Task, decoded, open_pair
from data.tokenizer import Tokenizer
from data.transforms import ResizeRule
from scripts.tiny.tokenizer import write_tokenizer
from tests.data.test_scans import dataset, item, written
from tests.helpers import RULES

SIZES = {"a": (16, 16), "b": (16, 24), "c": (32, 32), "d": (20, 20)}
"""(width, height); every image is of one grey."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(["Remove the noise.", "Mild noise."], folder)
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for name, size in SIZES.items():
        Image.new("RGB", size, (ord(name),) * 3).save(folder / f"{name}.png")
    return folder


def task(name: str, tokenizer: Tokenizer) -> Task:
    vae = RULES["image_transform_args"] | {"max_image_size": 64}
    return TASKS[name](
        tokenizer, ResizeRule(**vae), ResizeRule(**RULES["vit_image_transform_args"])
    )


def said(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": who, "value": text} for who, text in turns]


def paths(names: str) -> list[dict[str, str]]:
    return [{"path": f"{name}.png"} for name in names]


def told(sample: Sample, tokenizer: Tokenizer) -> list[str]:
    """One word a segment: kind, image or text; `?` can be dropped, `!` is trained."""
    grey = {round(ord(name) / 127.5 - 1, 4): name for name in SIZES}
    found = []
    for s in sample.segments:
        if isinstance(s, TextSegment):
            text = "text:" + tokenizer.decode(s.ids)
            trained = s.answer
        else:
            image = grey[round(s.image_pm1.mean().item(), 4)]
            text = f"{'vit' if isinstance(s, VitSegment) else 'vae'}:{image}"
            trained = isinstance(s, VaeSegment) and s.target
        found.append(text + "?" * s.droppable + "!" * trained)
    return found


def laid_out(
    name: str, raw: dict[str, Any], tokenizer: Tokenizer, folder: Path, seed: int = 0
) -> list[str]:
    """Of a record as JSON where it is; its outline must have the same tokens."""
    chosen = task(name, tokenizer)
    try:
        record = parse_record(json.dumps(raw), "f:1", chosen.form)
    except TypeError:  # bytes
        record = record_of(raw, "f:1", chosen.form)
    sample = chosen.sample(record, folder, seed)
    outline = chosen.outline(record, folder, seed)
    shapes = [
        [len(s.ids) if isinstance(s, TextSegment) else s.image_pm1.shape for s in found.segments]
        for found in (sample, outline)
    ]
    assert shapes[0] == shapes[1] and outline.name == "f:1"
    return told(sample, tokenizer)


RESTORATION = ["vae:a?", "vit:a?", "text:Remove it.?", "text:Mild.!", "vae:d!"]
QUESTION = said(("human", "<image>\nWhat?"), ("gpt", "Noise."), ("human", "Sure?"), ("gpt", "Yes."))
PAIR = {"input_img": paths("a"), "output_img": paths("d")}
CASES: list[tuple[str, dict[str, Any], list[str]]] = [
    (
        "restoration editing MedicalImageEditingIterableDataset_ver1",
        {**PAIR, "message": said(("human", "<image>\nRemove it."), ("gpt", "Mild."))},
        RESTORATION,
    ),
    (
        "restoration",
        {**PAIR, "message": said(("human", "Go."))},
        ["vae:a?", "vit:a?", "text:Go.?", "vae:d!"],
    ),
    (
        "counterfactual CounterfactualMedicalIterableDataset_ver1",
        {
            **PAIR,
            "message": said(
                ("human", "<image>"), ("human", "One."), ("human", "Two."), ("gpt", "So.")
            ),
        },
        ["vae:a?", "vit:a?", "text:One.?", "text:Two.?", "vae:d!", "text:So.!"],
    ),
    (
        "text_to_image t2i_pretrain T2IIterableDataset T2IIterableDataset_Ver1",
        {"output_img": paths("b"), "message": said(("human", "A scan."))},
        ["text:A scan.?", "vae:b!"],
    ),
    (
        "vlm_sft SftJSONLIterableDataset SftJSONLIterableDataset_Ver1",
        {"input_img": paths("b"), "message": QUESTION},
        ["vit:b", "text:What?", "text:Noise.!", "text:Sure?", "text:Yes.!"],
    ),
    (
        "vlm_sft",
        {
            "image": ["a.png", "b.png"],
            "conversations": said(("human", "Before <image> and <image> after?"), ("gpt", "No.")),
        },
        ["text:Before", "vit:a", "text:and", "vit:b", "text:after?", "text:No.!"],
    ),
    (
        "vlm_sft",
        {"image": "a.png", "conversations": said(("human", "What?"), ("gpt", "No."))},
        ["vit:a", "text:What?", "text:No.!"],
    ),
    (
        "vlm_sft",
        {"images": [], "message": said(("human", "What?"), ("gpt", "No."))},
        ["text:What?", "text:No.!"],
    ),
    (
        "vlm_sft",
        {"image": None, "message": said(("human", "What?"), ("gpt", "No."))},
        ["text:What?", "text:No.!"],
    ),
    (
        "text_to_image",
        {"output_img": paths("b"), "captions": "A scan.", "message": None},
        ["text:A scan.?", "vae:b!"],
    ),
    (
        "text_to_image",
        {"output_img": paths("b"), "captions": None, "caption": "A scan."},
        ["text:A scan.?", "vae:b!"],
    ),
    (
        "vqa_reconstruction SftJSONLIterableDataset_with_VisualReconstruction_Ver1"
        " SftJSONLIterableDataset_with_VisualReconstruction_Ver2",
        {
            "input_img": paths("ab"),
            "message": said(("human", "<image><image>What?"), ("gpt", "No.")),
        },
        ["vit:a", "vit:b", "text:What?", "text:No.!", "vae:a!", "vae:b!"],
    ),
    (
        "text_only SftJSONLIterableDataset_TextOnly",
        {"input_img": paths("a"), "message": said(("human", "What?"), ("gpt", "No."))},
        ["text:What?", "text:No.!"],
    ),
    (
        "edit_sequence unified_edit UnifiedEditIterableDataset",
        {"image_list": ["a.png", "d.png"], "instruction_list": [["Larger."]]},
        ["vae:a?", "vit:a?", "text:Larger.?", "vae:d!"],
    ),
]


@pytest.mark.parametrize(("names", "raw", "expected"), CASES)
def test_segments(names, raw, expected, tokenizer, folder):
    for name in names.split():
        assert laid_out(name, raw, tokenizer, folder) == expected


def test_every_task_has_a_case():
    assert {name for names, _, _ in CASES for name in names.split()} == {*TASKS}


def test_one_caption_is_chosen(tokenizer, folder):
    """Of a text, a list, a mapping or its JSON; the image of a parquet row is in the row."""
    file = io.BytesIO()
    Image.new("RGB", SIZES["c"], (ord("c"),) * 3).save(file, "PNG")
    both = {"short": "One.", "long": "Two."}
    for captions, known in (
        ("One.", {"One."}),
        (["One.", "Two."], {"One.", "Two."}),
        (both, {"One.", "Two."}),
        (json.dumps(both), {"One.", "Two."}),
        ("[CT] axial slice", {"[CT] axial slice"}),
        ("{x} plain", {"{x} plain"}),
        ("[" * 3000, {"[" * 3000}),
    ):
        for image in (file.getvalue(), {"bytes": file.getvalue(), "path": None}):
            raw = {"image": image, "captions": captions}
            found = [laid_out("text_to_image", raw, tokenizer, folder, s) for s in range(12)]
            assert {segments[0] for segments in found} == {f"text:{text}?" for text in known}
            assert {segments[1] for segments in found} == {"vae:c!"}
            assert found == [
                laid_out("text_to_image", raw, tokenizer, folder, s) for s in range(12)
            ]


def test_frames_of_a_video_that_is_named_are_images(tokenizer, folder):
    raw = {"image": ["b.png"], "video": "a.mp4", "message": QUESTION}
    expected = ["vit:b", "text:What?", "text:Noise.!", "text:Sure?", "text:Yes.!"]
    assert laid_out("vlm_sft", raw, tokenizer, folder) == expected


@pytest.mark.parametrize("key", ["video", "videos"])
def test_videos_are_no_matter_where_no_image_is_read(key, tokenizer, folder):
    raw = {key: ["a.mp4"], "message": said(("human", "What?"), ("gpt", "Noise."))}
    assert laid_out("text_only", raw, tokenizer, folder) == ["text:What?", "text:Noise.!"]
    with pytest.raises(RecordError, match="f:1: videos are not read"):
        parse_record(json.dumps(raw), "f:1", task("vlm_sft", tokenizer).form)


def test_an_edit_goes_one_or_two_steps(tokenizer, folder):
    raw = {
        "image_list": ["a.png", "d.png", "c.png", "c.png"],
        "instruction_list": [["Up."], "More.", ["Same.", "Keep."]],
    }
    found = {tuple(laid_out("unified_edit", raw, tokenizer, folder, s)) for s in range(100)}
    ways = {"d": ["Up."], "c": ["More."], "": ["Same.", "Keep."]}
    steps = [("a", "d", [["Up."]]), ("d", "c", [["More."]]), ("a", "c", [["Up."], ["More."]])]
    steps += [("c", "c", [[way]]) for way in ways[""]]
    steps += [("d", "c", [["More."], [way]]) for way in ways[""]]
    assert found == {
        (f"vae:{a}?", f"vit:{a}?", *(f"text:{t}?" for (t,) in texts), f"vae:{b}!")
        for a, b, texts in steps
    }


@pytest.mark.parametrize(
    ("name", "raw", "reason"),
    [
        (
            "restoration",
            {"message": QUESTION, "input_img": paths("a")},
            "output_img must be a list",
        ),
        ("counterfactual", {"message": QUESTION, "output_img": paths("a")}, "input_img must be"),
        ("text_to_image", {"message": QUESTION}, "output_img must be a list"),
        ("text_to_image", {"output_img": paths("a")}, "needs captions or a human message"),
        ("text_to_image", {"output_img": paths("a"), "captions": "[1, 2]"}, "needs captions"),
        ("text_to_image", {"output_img": paths("a"), "captions": [3]}, "needs captions"),
        ("text_to_image", {"output_img": paths("a"), "caption": 5}, "needs captions"),
        ("text_to_image", {"output_img": paths("a"), "captions": True}, "needs captions"),
        ("text_to_image", {"output_img": paths("a"), "captions": {"long": 5}}, "needs captions"),
        (
            "text_to_image",
            {"output_img": paths("a"), "captions": '["\\ud83d cut"]'},
            "f:1: a lone surrogate in JSON captions is no text",
        ),
        ("vlm_sft", {"input_img": paths("ab"), "message": QUESTION}, "1 <image> for 2 images"),
        ("vlm_sft", {"input_img": paths("a")}, "message must be a list of {from, value}"),
        ("text_only", {"message": said(("human", "What?"))}, "holds no answer from `gpt`"),
        (
            "vlm_sft",
            {"video": "a.mp4", "message": said(("human", "Describe."), ("gpt", "A nodule."))},
            "videos are not read: give their frames as images",
        ),
        (
            "vlm_sft",
            {
                "image": ["a.png"],
                "message": said(("human", "<image><video>\nDescribe."), ("gpt", "A nodule.")),
            },
            "videos are not read",
        ),
        (
            "restoration",
            {**PAIR, "message": said(("human", "<video>Remove it."))},
            "videos are not read",
        ),
        (
            "text_only",
            {"message": said(("human", "<video>What?"), ("gpt", "Noise."))},
            "videos are not read",
        ),
        ("vqa_reconstruction", {"message": QUESTION}, "input_img must be a list of {path}"),
        ("edit_sequence", {"image_list": ["a.png"]}, "1 images in image_list need one entry less"),
        (
            "edit_sequence",
            {"image_list": ["a.png", "d.png"], "instruction_list": [[]]},
            "2 images in image_list need one entry less",
        ),
        *(
            (
                "edit_sequence",
                {"image_list": ["a.png", "d.png"], "instruction_list": steps},
                "2 images in image_list need one entry less, of texts, in instruction_list",
            )
            for steps in (5, True, "+", {"Up.": ["Larger."]})
        ),
    ],
)
def test_records_that_do_not_suit_a_task(name, raw, reason, tokenizer, folder):
    chosen = task(name, tokenizer)
    with pytest.raises(RecordError) as caught:
        chosen.segments(
            parse_record(json.dumps(raw), "f:1", chosen.form), lambda _: (16, 16), Random()
        )
    assert str(caught.value).startswith("f:1: ") and reason in str(caught.value)


@pytest.mark.parametrize("name", ["restoration", "counterfactual", "edit_sequence"])
def test_pairs_of_scans_need_a_window(name, tokenizer, tmp_path):
    """One of half the counts would be scaled to the same image."""
    counts = np.arange(400).reshape(20, 20)
    window = {"WindowCenter": 200, "WindowWidth": 400}
    for stem, fields in (("bare", {}), ("shown", window)):
        for part, values in (("whole", counts), ("half", counts // 2)):
            written(dataset(values, **fields), tmp_path / f"{stem}_{part}.dcm")
    raw = {"message": QUESTION, "instruction_list": ["Up."]}
    for stem in ("bare", "shown"):
        files = [f"{stem}_half.dcm", f"{stem}_whole.dcm"]
        raw |= {"input_img": files[:1], "output_img": files[1:], "image_list": files}
        chosen = task(name, tokenizer)
        record = parse_record(json.dumps(raw), "f:1", chosen.form)
        if stem == "bare":
            with pytest.raises(ImageError, match="bare_half.dcm: no window, .* make_pairs.py does"):
                chosen.sample(record, tmp_path)
            asked = parse_record(json.dumps({"message": QUESTION, "image": files}), "f:1")
            assert all(decoded(asked, tmp_path, ref).size == (20, 20) for ref in asked.inputs)
            continue
        found = [s for s in chosen.sample(record, tmp_path).segments if isinstance(s, VaeSegment)]
        means = [s.image_pm1.mean().item() for s in found]
        assert means == pytest.approx([-0.5, 0], abs=0.02)


@pytest.mark.parametrize("name", ["restoration", "counterfactual", "edit_sequence"])
def test_pairs_of_scans_need_one_window(name, tokenizer, tmp_path):
    """Of 1000 / 2000 and 500 / 1000 the same pixels would be pictures 30 of 255 apart."""
    pixels, wide = np.arange(400).reshape(20, 20), {"WindowCenter": 1000, "WindowWidth": 2000}
    half = {"WindowCenter": 500, "WindowWidth": 1000}
    for stem, fields in (("wide", wide), ("half", half), ("same", wide)):
        written(dataset(pixels, **fields), tmp_path / f"{stem}.dcm")
    for stem, fields in (("low", half), ("high", wide)):
        curve = fields | {"VOILUTFunction": "SIGMOID"}
        written(dataset(pixels, **curve), tmp_path / f"{stem}.dcm")
        lut = item(LUTDescriptor=[4096, 0, 12], LUTData=[*range(len(stem), 4096 + len(stem))])
        lut["LUTData"].VR = "US"
        written(dataset(pixels, VOILUTSequence=[lut]), tmp_path / f"{stem}_table.dcm")
    Image.new("L", (20, 20)).save(tmp_path / "grey.png")
    chosen = task(name, tokenizer)
    for first, second, told in (
        ("wide.dcm", "half.dcm", "window 0 to 1999 and window 0 to 999"),
        ("low.dcm", "high.dcm", "window .* by sigmoid .0.0, 1000.0. and window .* by sigmoid .0.0"),
        ("low_table.dcm", "high_table.dcm", r"window 0 to 4095 by table \w+ and window 0"),
        ("wide.dcm", "same.dcm", ""),
        ("grey.png", "wide.dcm", ""),
        ("low_table.dcm", "low_table.dcm", ""),
    ):
        files = [first, second]
        raw = {"message": QUESTION, "instruction_list": ["Up."], "image_list": files}
        raw |= {"input_img": files[:1], "output_img": files[1:]}
        record = parse_record(json.dumps(raw), "f:1", chosen.form)
        pair = parse_record(json.dumps(raw), "f:1")
        if not told:
            chosen.sample(record, tmp_path)
            assert [image.size for image in open_pair(pair, tmp_path)] == [(20, 20)] * 2
            continue
        message = f"^f:1: {told}.* scale a pair unequally: state one window in both, or write PNG"
        with pytest.raises(ImageError, match=message):
            chosen.sample(record, tmp_path)
        with pytest.raises(ImageError, match=message):
            open_pair(pair, tmp_path)
    asked = parse_record(json.dumps({"message": QUESTION, "image": ["wide.dcm"]}), "f:1")
    assert task("vlm_sft", tokenizer).sample(asked, tmp_path).segments


def test_a_pair_is_opened_whatever_sizes_are_stated(tmp_path):
    Image.new("L", (20, 20)).save(tmp_path / "a.png")
    image = [{"path": "a.png", "width": 3, "height": 3}]
    raw = {"input_img": image, "output_img": image, "message": QUESTION}
    pair = open_pair(parse_record(json.dumps(raw), "f:1"), tmp_path)
    assert [image.size for image in pair] == [(20, 20)] * 2


@pytest.mark.parametrize(
    ("given", "target", "fits"),
    [
        ((16, 16), (16, 16), True),
        ((16, 24), (32, 48), True),
        ((16, 16), (64, 64), True),
        ((17, 25), (51, 75), True),  # 16 x 24 and 52 x 76 after the rule: rounding
        ((30, 40), (31, 40), True),
        ((16, 16), (16, 24), False),
        ((16, 24), (24, 16), False),
        ((32, 32), (16, 16), False),
        ((16, 32), (64, 64), False),
    ],
)
def test_sizes_of_input_and_target(given, target, fits, tokenizer):
    raw = {**PAIR, "message": QUESTION}
    for image, (width, height) in (("input_img", given), ("output_img", target)):
        raw[image] = [{"path": "x.png", "width": width, "height": height}]
    for name in ("restoration", "counterfactual"):
        chosen = task(name, tokenizer)
        record = parse_record(json.dumps(raw), "f:1", chosen.form)
        if fits:
            chosen.outline(record, Path())
            continue
        with pytest.raises(RecordError, match="f:1: input and target are .* 1 to 4 times its size"):
            chosen.outline(record, Path())
