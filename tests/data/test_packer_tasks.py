"""Tokens, positions, modes and labels of packed samples, spelt out; the prompt builder."""

import dataclasses
import json

import pytest
import torch
from PIL import Image

from data.packer import Packer, Sample, TextSegment, VaeSegment, VitSegment
from data.records import RecordError, parse_record
from data.tasks import RestorationTask
from data.tokenizer import SPECIAL, Tokenizer
from data.transforms import ResizeRule
from scripts.tiny.tokenizer import write_tokenizer
from tests.helpers import RULES, TOKENS, image_pm1, pack, packer_config, tiny_config, write_pairs

BOS, EOS, START, END = 60, 61, 62, 63
SOURCE, VIT, CLEAN = image_pm1(8, 12, 1), image_pm1(14, 28, 2), image_pm1(8, 8, 3)
CONDITIONS = [
    VaeSegment(image_pm1=SOURCE, droppable=True),  # 2 x 3 tokens
    VitSegment(image_pm1=VIT, droppable=True),  # 1 x 2 tokens
    TextSegment(ids=[1, 2], droppable=True),
]
ANSWER = TextSegment(ids=[5], answer=True, end_label=START)
TARGET = VaeSegment(image_pm1=CLEAN, target=True)  # 2 x 2 tokens
SAMPLE = Sample("s", [*CONDITIONS, ANSWER, TARGET, TextSegment(ids=[7], answer=True)])


def all_dropped(**kept: float) -> dict[str, float]:
    return {f"{kind}_cond_dropout_prob": kept.get(kind, 1.0) for kind in ("text", "vae", "vit")}


def test_a_sample_without_dropout():
    batch = pack(tiny_config(), SAMPLE)
    assert batch.sample_lens == (8 + 4 + 4 + 3 + 6 + 3,) and batch.num_tokens == 28
    assert batch.split_lens == (8, 4, 4, 3, 6, 3)
    assert batch.attn_modes == ("full", "full", "causal", "causal", "noise", "causal")
    positions = [0] * 8 + [1] * 4 + [2, 3, 4, 5] + [6, 7, 8] + [9] * 6 + [9, 10, 11]
    assert batch.position_ids.tolist() == positions
    ids = [START, END, START, END, BOS, 1, 2, EOS, BOS, 5, EOS, START, END, BOS, 7, EOS]
    assert batch.text.ids.tolist() == ids
    places = [0, 7, 8, 11, 12, 13, 14, 15, 16, 17, 18, 19, 24, 25, 26, 27]
    assert batch.text.indexes.tolist() == places
    assert batch.labels.indexes.tolist() == [16, 17, 18, 25, 26]
    assert batch.labels.ids.tolist() == [5, EOS, START, 7, EOS]
    assert batch.labels.weights.tolist() == [1.0] * 5 and batch.labels.total_weight == 5
    assert (batch.vit.indexes.tolist(), batch.vit.lens) == ([9, 10], (2,))
    assert batch.vae.indexes.tolist() == [1, 2, 3, 4, 5, 6, 20, 21, 22, 23]
    assert batch.vae.grids == ((2, 3), (2, 2)) and batch.vae.lens == (6, 4)
    assert batch.vae.splits == (0, 4)
    assert batch.vae.position_ids.tolist() == [0, 1, 2, 8, 9, 10, 0, 1, 8, 9]
    assert batch.vae.is_target == (False, True) and batch.vae.time_logits[0] == -torch.inf
    assert batch.vae.target_tokens().tolist() == [6, 7, 8, 9]
    assert batch.vae.num_target_tokens == 4 and batch.vae.names == ("s", "s")


def test_everything_dropped_leaves_positions_of_images():
    """Two images advance the position by one each, the text does not."""
    batch = pack(tiny_config(), SAMPLE, **all_dropped())
    assert batch.split_lens == (3, 6, 3) and batch.vit is None
    assert batch.position_ids.tolist() == [2, 3, 4] + [5] * 6 + [5, 6, 7]
    assert batch.vae.is_target == (True,) and torch.equal(batch.vae.images[0], CLEAN)


@pytest.mark.parametrize(
    ("kept", "splits", "first_answer_position"),
    [("vae", (8, 3, 6, 3), 2), ("vit", (4, 3, 6, 3), 2), ("text", (4, 3, 6, 3), 6)],
)
def test_one_kind_kept(kept, splits, first_answer_position):
    batch = pack(tiny_config(), SAMPLE, **all_dropped(**{kept: 0.0}))
    assert batch.split_lens == splits
    assert batch.position_ids[splits[0]].item() == first_answer_position
    assert (batch.vit is not None) == (kept == "vit")
    assert batch.vae.is_target == ((False, True) if kept == "vae" else (True,))


def test_an_answer_may_go_with_the_text_before_it():
    """One draw for both; other answers stay."""
    tied = TextSegment(ids=[5], answer=True, with_text=True)
    sample = Sample("s", [*CONDITIONS, tied, TARGET])
    whole = pack(tiny_config(), sample)
    assert whole.split_lens == (8, 4, 4, 3, 6) and len(whole.labels.ids) == 2
    bare = pack(tiny_config(), sample, **all_dropped(vae=0.0, vit=0.0))
    images = pack(tiny_config(), Sample("s", [*CONDITIONS[:2], TARGET]))
    assert bare.labels is None and bare.split_lens == images.split_lens == (8, 4, 6)
    assert torch.equal(bare.position_ids, images.position_ids)
    config, found = packer_config(tiny_config(), text_cond_dropout_prob=0.5), set()
    for seed in range(20):
        packer = Packer(config, TOKENS)
        packer.add(sample, torch.Generator().manual_seed(seed))
        found.add(tuple(packer.split_lens))
    assert found == {(8, 4, 4, 3, 6), (8, 4, 6)}
    assert config.num_tokens(sample) == 25


def test_what_is_not_droppable_stays():
    fixed = [dataclasses.replace(segment, droppable=False) for segment in CONDITIONS]
    batch = pack(tiny_config(), Sample("s", fixed), **all_dropped())
    assert batch.split_lens == (8, 4, 4)


def test_dropout_has_its_probability():
    config = packer_config(tiny_config(), text_cond_dropout_prob=0.3)
    text = Sample("s", [TextSegment(ids=[1], droppable=True), TextSegment(ids=[2])])
    packer, generator = Packer(config, TOKENS), torch.Generator().manual_seed(0)
    for _ in range(2000):
        packer.add(text, generator)
    dropped = packer.sample_lens.count(3) / 2000
    assert dropped == pytest.approx(0.3, abs=0.03)


def test_an_images_end_may_announce_the_next():
    first = dataclasses.replace(TARGET, end_label=START)
    batch = pack(tiny_config(), Sample("s", [first, TARGET]))
    assert (batch.labels.indexes.tolist(), batch.labels.ids.tolist()) == ([5], [START])
    assert batch.position_ids.tolist() == [0] * 12  # a target does not advance
    assert batch.attn_modes == ("noise", "noise")


def test_samples_lie_end_to_end_and_start_at_position_0():
    alone, batch = pack(tiny_config(), SAMPLE), pack(tiny_config(), SAMPLE, SAMPLE)
    assert batch.sample_lens == alone.sample_lens * 2
    assert torch.equal(batch.position_ids, alone.position_ids.repeat(2))
    assert batch.vae.indexes[10:].tolist() == (alone.vae.indexes + 28).tolist()
    assert batch.vae.time_logits == alone.vae.time_logits * 2
    tokens = torch.cat([batch.text.indexes, batch.vit.indexes, batch.vae.indexes])
    assert tokens.sort().values.tolist() == list(range(56))


def test_full_noise_share():
    config, generator = tiny_config(), torch.Generator().manual_seed(0)
    packer = Packer(packer_config(config, full_noise_fraction=0.25), TOKENS)
    for _ in range(2000):
        packer.add(Sample("s", [TARGET]), generator)
    batch = packer.build()
    times = torch.tensor(batch.vae.times(1.0))
    assert (times == 1).float().mean().item() == pytest.approx(0.25, abs=0.03)
    logits = torch.tensor([x for x in batch.vae.time_logits if x < torch.inf])
    assert logits.mean().item() == pytest.approx(0, abs=0.08)
    assert logits.std().item() == pytest.approx(1, abs=0.06)
    assert len(set(batch.vae.noise_seeds)) == 2000


def test_low_times_have_their_share_and_are_uniform():
    settings = {"full_noise_fraction": 0.2, "low_t_fraction": 0.3, "low_t_max": 0.1}
    config = dataclasses.replace(tiny_config(), timestep_shift=3.0)
    packer = Packer(packer_config(config, **settings), TOKENS)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3000):
        packer.add(Sample("s", [TARGET]), generator)
    times = torch.tensor(packer.build().vae.times(3.0), dtype=torch.float64)
    usual = torch.randn(200_000).sigmoid().double()
    usual_low = (3 * usual / (1 + 2 * usual) <= 0.1).double().mean().item()
    low = times[times <= 0.1]
    assert len(low) / 3000 == pytest.approx(0.3 + 0.5 * usual_low, abs=0.03)
    assert low.min() > 0 and low.quantile(torch.tensor([0.25, 0.5, 0.75]).double()).tolist() == (
        pytest.approx([0.025, 0.05, 0.075], abs=0.006)
    )
    assert (times == 1).double().mean().item() == pytest.approx(0.2, abs=0.03)
    with pytest.raises(ValueError, match=r"pixel_space_t_fraction=0.9 exceed 1 together"):
        packer_config(config, full_noise_fraction=0.2, low_t_fraction=0.9)


def test_token_counts_before_packing():
    config = packer_config(tiny_config())
    assert config.num_tokens(SAMPLE) == 28
    with pytest.raises(ValueError, match="8x10 is no multiple of the stride 4"):
        config.num_tokens(Sample("s", [VaeSegment(image_pm1=torch.zeros(3, 8, 10))]))


def test_packs_that_cannot_be_built():
    with pytest.raises(ValueError, match="empty pack"):
        Packer(packer_config(tiny_config()), TOKENS).build()
    large = VaeSegment(image_pm1=torch.zeros(3, 36, 8), target=True)
    with pytest.raises(ValueError, match="grid of 9x2 patches does not fit .* side 8"):
        pack(tiny_config(), Sample("s", [large]))
    batch = pack(tiny_config(), SAMPLE)
    for change in (
        {"sample_lens": (27,)},
        {"split_lens": (28,)},
        {"attn_modes": ("full",) * 5 + ("random",)},
        {"position_ids": torch.zeros(3)},
        {"vit": None},
        {"vae": dataclasses.replace(batch.vae, splits=(0,))},
        {"vae": dataclasses.replace(batch.vae, splits=(0, 6))},
        {"sample_lens": (10, 18)},  # no sample ends inside a split
    ):
        with pytest.raises(ValueError, match="PackedBatch: inconsistent"):
            dataclasses.replace(batch, **change)


def test_tensors_of_a_batch_move_together():
    batch = pack(tiny_config(), SAMPLE).to("meta")
    assert batch.position_ids.is_meta and batch.text.ids.is_meta and batch.labels.weights.is_meta
    assert batch.vit.patches.is_meta and all(image.is_meta for image in batch.vae.images)
    assert batch.vae.grids == ((2, 3), (2, 2))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(["Remove the noise.", "Mild noise."], folder)
    return Tokenizer(folder)


def restoration_task(tokenizer) -> RestorationTask:
    return RestorationTask(tokenizer, *(ResizeRule(**rule) for rule in RULES.values()))


@pytest.mark.parametrize("text", [*SPECIAL, "<|endoftext|>", "a <|im_end|> b", "Größe 5 µm\n😀"])
def test_text_never_becomes_special_tokens(tokenizer, text):
    ids = tokenizer.encode(text)
    special = set(tokenizer.qwen2.all_special_ids)
    assert len(special) == 5 and not special & set(ids)
    assert tokenizer.decode(ids) == text


def test_special_tokens_of_a_tokenizer(tokenizer):
    special = tokenizer.special
    ids = [special.bos, special.eos, special.image_start, special.image_end]
    assert tokenizer.qwen2.convert_ids_to_tokens(ids) == list(SPECIAL)
    assert max(ids) < tokenizer.size == len(tokenizer.qwen2)
    assert tokenizer.decode([special.bos, *tokenizer.encode("Mild"), special.eos]) == "Mild"
    assert tokenizer.encode("") == []


def test_tokenizers_that_do_not_fit(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer"):
        Tokenizer(tmp_path)
    write_tokenizer(["x"], tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (tmp_path / name).read_text()
        (tmp_path / name).write_text(text.replace("<|vision_end|>", "<|other|>"))
    with pytest.raises(ValueError, match=r"lacks \['<\|vision_end\|>'\]"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "{}", "[]"])
def test_damaged_tokenizers_name_their_folder(content, tmp_path):
    write_tokenizer(["x"], tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError) as caught:
        Tokenizer(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}: the tokenizer's files are damaged: ")


def test_restoration_sample(tokenizer, tmp_path):
    line = write_pairs(tmp_path, 1).read_text()
    task = restoration_task(tokenizer)
    sample = task.sample(parse_record(line, "f:1"), tmp_path)
    vae, vit, prompt, answer, target = sample.segments
    assert sample.name == "f:1"
    assert (vae.image_pm1.shape, vit.image_pm1.shape) == ((3, 16, 16), (3, 28, 28))
    assert [s.droppable for s in sample.segments] == [True, True, True, False, False]
    assert (prompt.ids, prompt.answer) == (tokenizer.encode("Remove it."), False)
    assert (answer.ids, answer.answer) == (tokenizer.encode("Mild."), True)
    bare = pack(tiny_config(), sample, **all_dropped(vae=0.0, vit=0.0))
    assert bare.attn_modes == ("full", "full", "noise") and bare.labels is None
    assert target.target and not torch.equal(target.image_pm1, vae.image_pm1)
    with Image.open(tmp_path / "images" / "0_input.png") as degraded:
        context = task.context(degraded.convert("RGB"), "Remove it.")
    assert torch.equal(context[0].image_pm1, vae.image_pm1)
    assert torch.equal(context[1].image_pm1, vit.image_pm1)
    assert context[2].ids == prompt.ids and not any(s.droppable for s in context)


def test_restoration_of_several_images_takes_the_first(tokenizer, tmp_path):
    record = json.loads(write_pairs(tmp_path, 2).read_text().splitlines()[1])
    for field, kind in (("input_img", "input"), ("output_img", "clean")):
        record[field].append({"path": f"images/0_{kind}.png"})
    parsed = parse_record(json.dumps(record), "f:1")
    sample = restoration_task(tokenizer).sample(parsed, tmp_path)
    assert sample.segments[0].image_pm1.shape == sample.segments[-1].image_pm1.shape == (3, 16, 24)


def test_restoration_without_a_clean_image(tokenizer, tmp_path):
    record = json.loads(write_pairs(tmp_path, 1).read_text())
    del record["output_img"]
    with pytest.raises(RecordError, match=r"f:1: output_img must be a list of {path}"):
        parse_record(json.dumps(record), "f:1", RestorationTask.form)


def test_rules_that_do_not_fit_the_model(tokenizer):
    task = restoration_task(tokenizer)
    task.require_strides(4, 14)
    with pytest.raises(ValueError, match="^image_transform_args: image_stride=4 .* model's 8"):
        task.require_strides(8, 14)
    with pytest.raises(ValueError, match="^vit_image_transform_args: image_stride=14 .* model's 4"):
        task.require_strides(4, 4)
