"""The stream of packs: its order, its limits, exact resumption; the mixture file."""

import dataclasses
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml

from data.config import load_mixture
from data.loader import LoaderConfig, PackedLoader
from data.tokenizer import Tokenizer
from modeling.batch import PackedBatch
from tests.helpers import RULES, packer_config, position, tiny_config, write_mixture, write_pairs

LONGEST = 72
"""Tokens of the longest pair of `mixture`; those of 16 x 16 pixels have 53 or 54."""
SIZES = {"expected_num_tokens": 150, "max_num_tokens": 300, "max_num_tokens_per_sample": 120}


def loader(checkpoint: Path, mixture: Path, dropout: float = 0.3, **changes: int) -> PackedLoader:
    packing = packer_config(tiny_config(), vae_cond_dropout_prob=dropout)
    config = LoaderConfig(**({"num_workers": 0} | SIZES | changes))
    return PackedLoader(load_mixture(mixture), config, packing, Tokenizer(checkpoint))


def identical(a: PackedBatch, b: PackedBatch) -> bool:
    tensors: list[list[torch.Tensor]] = [[], []]
    for batch, found in zip((a, b), tensors, strict=True):
        batch.map_tensors(lambda t, found=found: (found.append(t), t)[1])
    plain = [
        (
            x.sample_lens,
            x.split_lens,
            x.attn_modes,
            x.vae.names,
            x.vae.noise_seeds,
            x.vae.time_logits,
        )
        for x in (a, b)
    ]
    same = all(torch.equal(x, y) for x, y in zip(*tensors, strict=True))
    return plain[0] == plain[1] and same


def targets(batches: list[PackedBatch]) -> list[tuple[str, int, float]]:
    """(sample, noise seed, time) of every target image, in stream order."""
    return [
        entry[:3]
        for batch in batches
        for *entry, target in zip(
            batch.vae.names,
            batch.vae.noise_seeds,
            batch.vae.time_logits,
            batch.vae.is_target,
            strict=True,
        )
        if target
    ]


def test_a_stream_repeats_itself_and_changes_with_its_seed(checkpoint, mixture):
    a, b = (loader(checkpoint, mixture) for _ in range(2))
    assert all(identical(a.next_batch(), b.next_batch()) for _ in range(5))
    other = loader(checkpoint, mixture, data_seed=43)
    assert not identical(loader(checkpoint, mixture).next_batch(), other.next_batch())


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_resumption_gives_identical_batches(checkpoint, mixture, steps):
    a, b = (loader(checkpoint, mixture) for _ in range(2))
    for _ in range(steps):
        a.next_batch()
    b.load_state_dict(a.state_dict())
    b.load_state_dict(yaml.safe_load(yaml.safe_dump(a.state_dict())))
    assert all(identical(a.next_batch(), b.next_batch()) for _ in range(4))
    assert a.state_dict() == b.state_dict()


def test_the_stream_does_not_depend_on_the_pack_size(checkpoint, mixture):
    streams = []
    for sizes in ((1, 120), (150, 300), (500, 500)):
        limits = {"expected_num_tokens": sizes[0], "max_num_tokens": sizes[1], "max_buffer_size": 0}
        packs = loader(checkpoint, mixture, **limits)
        streams.append(targets([packs.next_batch() for _ in range(24)]))
    assert len(streams[0]) == 24 and len(streams[1]) > 30
    assert streams[1][:24] == streams[0] and streams[2][:24] == streams[0]


def test_packs_are_full_and_never_too_large(checkpoint, mixture):
    packs = loader(checkpoint, mixture, dropout=0.0, max_num_tokens=170)
    sizes = [packs.next_batch().num_tokens for _ in range(30)]
    assert max(sizes) <= 170 and min(sizes) > 170 - LONGEST


def test_an_epoch_holds_every_record_once_in_an_order_of_its_own(checkpoint, mixture):
    packs = loader(checkpoint, mixture, expected_num_tokens=1)
    names = [packs.next_batch().vae.names[0] for _ in range(15)]
    epochs = [names[i : i + 5] for i in (0, 5, 10)]
    assert all(len(set(epoch)) == 5 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert all(re.search(r"train\.jsonl:[1-5]$", name) for name in names)


@pytest.fixture(scope="module")
def three_sets(tmp_path_factory) -> list[Path]:
    folders = [tmp_path_factory.mktemp("sets") / name for name in ("one", "two", "three")]
    for folder, count in zip(folders, (2, 6, 4), strict=True):
        write_pairs(folder, count)
    return folders


def test_shares_of_groups_and_data_sets(checkpoint, three_sets, tmp_path):
    """Groups share by weight (3 : 1), the data sets inside a group by their records."""
    path = write_mixture(tmp_path / "mixture.yaml", *three_sets[:2], weight=3)
    second = yaml.safe_load(write_mixture(tmp_path / "x.yaml", three_sets[2]).read_text())
    both = yaml.safe_load(path.read_text())
    both["MedicalImageEditingIterableDataset_ver1"] = second["restoration"]
    path.write_text(yaml.safe_dump(both, sort_keys=False))
    packs = loader(checkpoint, path, expected_num_tokens=1)
    assert packs.planner.shares.tolist() == pytest.approx([3 / 4 * 1 / 4, 3 / 4 * 3 / 4, 1 / 4])
    drawn: Counter[str] = Counter()
    for _ in range(200):
        drawn[Path(packs.next_batch().vae.names[0]).parent.name] += 1
    assert drawn["three"] / 200 == pytest.approx(0.25, abs=0.09)
    assert drawn["two"] / 200 == pytest.approx(0.5625, abs=0.1)
    assert packs.counts == drawn and packs.planner.draws == [*packs.counts.values()]
    one = loader(checkpoint, write_mixture(tmp_path / "one.yaml", three_sets[0]))
    with pytest.raises(ValueError, match=re.escape("(name, records): ['two', 6] -> None; ")):
        one.load_state_dict(packs.state_dict())


def test_num_used_data_takes_the_first(checkpoint, three_sets, tmp_path):
    path = write_mixture(tmp_path / "mixture.yaml", three_sets[1])
    content = yaml.safe_load(path.read_text())
    content["restoration"]["datasets"][0]["num_used_data"] = 2
    path.write_text(yaml.safe_dump(content))
    packs = loader(checkpoint, path, expected_num_tokens=1)
    names = {packs.next_batch().vae.names[0].rsplit(":")[-1] for _ in range(8)}
    assert names == {"1", "2"}
    content["restoration"]["datasets"][0]["num_used_data"] = -1
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match="num_used_data"):
        loader(checkpoint, path)


def test_samples_that_are_too_long_are_dropped_and_counted(checkpoint, mixture):
    """Of the sizes 16 x 16, 16 x 24 and 20 x 16 only the first fits."""
    sizes = {"max_num_tokens_per_sample": 60, "expected_num_tokens": 1}
    packs = loader(checkpoint, mixture, **sizes)
    names = [packs.next_batch().vae.names[0].rsplit(":")[-1] for _ in range(12)]
    assert set(names) == {"1", "4"}
    assert packs.too_long == position(packs) - 12 > 6
    resumed = loader(checkpoint, mixture, **sizes)
    resumed.load_state_dict(packs.state_dict())
    assert resumed.too_long == packs.too_long


def test_nothing_but_long_samples_is_an_error_and_some_are_not(checkpoint, mixture):
    with pytest.raises(
        ValueError,
        match=r"100 samples in a row .*jsonl:\d: \d\d tokens exceed max_num_tokens_per_sample",
    ):
        loader(checkpoint, mixture, max_num_tokens_per_sample=20).next_batch()
    sizes = {"max_num_tokens_per_sample": 60, "expected_num_tokens": 5600, "max_num_tokens": 6000}
    packs = loader(checkpoint, mixture, dropout=0.0, **sizes)
    assert packs.next_batch().num_tokens >= 5600  # more than 100 were dropped, but not in a row
    assert packs.too_long > 100


def test_limits_that_cannot_be_met():
    for name, value, message in (
        ("max_num_tokens_per_sample", 500, "exceeds max_num_tokens=300"),
        ("max_num_tokens_per_sample", 0, "is less than 1"),
        ("expected_num_tokens", 400, "exceeds max_num_tokens=300"),
        ("expected_num_tokens", 0, "is less than 1"),
        ("prefer_buffer_before", 0, "is less than 1"),
        ("max_buffer_size", -1, "is less than 0"),
        ("num_workers", -1, "is less than 0"),
        ("prefetch_factor", 0, "is less than 1"),
    ):
        with pytest.raises(ValueError, match=f"{name}={value} {message}"):
            LoaderConfig(**(SIZES | {name: value}))


def test_a_mixture(tmp_path):
    write_pairs(tmp_path, 1)
    rules = {key: dict(rule) for key, rule in RULES.items()}
    dataset = {"name": "d", "jsonl_path": "${data_root}/train.jsonl", "data_dir": "${data_root}"}
    path = tmp_path / "mixture.yaml"
    path.write_text(yaml.safe_dump({"restoration": rules | {"datasets": [dataset]}}))
    for mixture in (load_mixture(path), load_mixture(path, tmp_path)):
        (group,) = mixture
        assert group.weight == 1.0
        assert dataclasses.asdict(group.image_transform_args) == rules["image_transform_args"] | {
            "max_pixels": 14 * 14 * 9 * 1024
        }
        assert group.datasets[0].jsonl_path == tmp_path / "train.jsonl"
        assert (group.datasets[0].data_dir, group.datasets[0].num_used_data) == (tmp_path, 0)
    with pytest.raises(ValueError, match=r"elsewhere/train.jsonl does not exist"):
        load_mixture(path, tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda m: m.update(restorations=m.pop("restoration")),
            "unknown key 'restorations'; did you mean 'restoration'?",
        ),
        (
            lambda m: m["restoration"].update(wieght=1),
            "restoration: unknown key 'wieght'; did you mean 'weight'?",
        ),
        (lambda m: m["restoration"].update(zzz=1), "unknown key 'zzz'; known are ['datasets'"),
        (lambda m: m["restoration"].pop("datasets"), "restoration: missing ['datasets']"),
        (lambda m: m["restoration"].update(datasets=[]), "at least one data set"),
        (lambda m: m["restoration"].update(weight=0), "weight=0 must be positive"),
        (
            lambda m: m["restoration"]["image_transform_args"].update(max_imgae_size=1),
            "restoration.image_transform_args: unknown key 'max_imgae_size'; did you mean 'max_im",
        ),
        (
            lambda m: m["restoration"]["vit_image_transform_args"].pop("image_stride"),
            "restoration.vit_image_transform_args: missing ['image_stride']",
        ),
        (
            lambda m: m["restoration"]["datasets"][0].update(jsonl_pth="x"),
            "unknown key 'jsonl_pth'; did you mean 'jsonl_path'?",
        ),
        (lambda m: m["restoration"]["datasets"][0].update(jsonl_path=5), "jsonl_path"),
        (lambda m: m["restoration"]["datasets"][0].update(num_used_data="10"), "num_used_data"),
        (lambda m: m["restoration"].update(task=["a"]), "restoration: unknown task ['a']; known"),
        (lambda m: m.update(restoration=3), "a mapping is expected, not 3"),
        (lambda m: m.clear(), "a mapping of tasks is expected"),
    ],
)
def test_mistakes_in_a_mixture_are_named(tmp_path, edit, message):
    write_pairs(tmp_path, 1)
    path = write_mixture(tmp_path / "mixture.yaml", tmp_path)
    content = yaml.safe_load(path.read_text())
    edit(content)
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_mixture(path)
    assert str(caught.value).startswith(f"{path}:")


def test_mistakes_are_found_in_their_line(tmp_path):
    write_pairs(tmp_path, 1)
    rules = "".join(f"  {name}: {rule}\n" for name, rule in RULES.items())
    texts = {
        3: f"a:\n  task: restoration\n  wieght: 2\n{rules}  datasets: []\n",
        5: f"restoration:\n{rules}  datasets:\n    - {{name: d, jsonl_pth: train.jsonl}}\n",
        6: f"restoration:\n{rules}  datasets:\n    - name: d\n      jsonl_path: no.jsonl\n",
        7: f"restoration:\n{rules}  datasets: [{{name: d}}]\n\n\nrestoration: 3\n",
        2: f"a:\n  task: restration\n{rules}  datasets: []\n",
        1: f"a:\n{rules}  datasets: []\n",
    }
    told = {
        3: "a: unknown key 'wieght'; did you mean 'weight'?",
        5: "restoration.datasets: unknown key 'jsonl_pth'; did you mean 'jsonl_path'?",
        6: "restoration.datasets: jsonl_path no.jsonl does not exist",
        7: "'restoration' stands in line 1 already",
        2: "a: unknown task 'restration'; did you mean 'restoration'?",
        1: "a: unknown key 'a'; known are [",
    }
    for line, text in texts.items():
        (path := tmp_path / "mixture.yaml").write_text(text)
        with pytest.raises(ValueError) as caught:
            load_mixture(path)
        found = str(caught.value)
        assert told[line] in found
        assert f"{path}:{line}: " in found or f"line {line}," in found, (line, found)


def test_a_mixture_in_another_encoding_is_named(tmp_path):
    path = tmp_path / "mixture.yaml"
    path.write_bytes("größe:".encode("latin-1"))
    with pytest.raises(ValueError, match=f"^{path}: no YAML: 'utf-8' codec .* position 2.*[^\n]$"):
        load_mixture(path)


def test_groups_by_name_task_and_old_class(tmp_path):
    write_pairs(tmp_path, 1)
    dataset = {"name": "d", "jsonl_path": "${data_root}/train.jsonl"}
    keys = {
        "is_mandatory": True,
        "shuffle_lines": True,
        "shuffle_seed": 3,
        "weight": 0.5,
        "datasets": [dataset | {"weight": 2}],
    }
    vit = {"vit_image_transform_args": RULES["vit_image_transform_args"]}
    content = {
        "MedicalImageEditingIterableDataset_ver1": RULES | keys,
        "more": RULES | keys | {"task": "restoration"},
        "SftJSONLIterableDataset_TextOnly": {"datasets": [dataset]},
        "vlm_sft": vit | {"datasets": [dataset]},
    }
    (path := tmp_path / "mixture.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    old, more, text, vlm = load_mixture(path)
    assert dataclasses.replace(more, task=old.task) == old
    assert (old.is_mandatory, old.shuffle_lines, old.shuffle_seed, old.weight) == (
        True,
        True,
        3,
        0.5,
    )
    assert old.datasets[0].weight == 2 and old.datasets[0].data_dir == tmp_path
    assert (text.task, vlm.task) == ("SftJSONLIterableDataset_TextOnly", "vlm_sft")
    for name, needed in (("vlm_sft", "vit_"), ("text_to_image", ""), ("restoration", "")):
        path.write_text(yaml.safe_dump({name: {"datasets": [dataset]}}))
        with pytest.raises(ValueError, match=rf"{name}: missing \['{needed}image_transform_args"):
            load_mixture(path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("is_mandatory", 1, "is_mandatory=1 is no bool"),
        ("weight", True, "weight=True is no float"),
        ("weight", float("inf"), "must be positive and finite"),
        ("shuffle_seed", -1, "is negative"),
        (
            "image_transform_args",
            {"image_stride": 16, "max_image_size": 32, "min_image_size": 64},
            "mixture.yaml:6: restoration.image_transform_args: image sizes must satisfy",
        ),
        ("shuffle_seed", 1.5, "is no int"),
        ("datasets", [{"name": "d"}], "needs jsonl_path or parquet_path"),
        ("datasets", [{"name": 5, "jsonl_path": "x"}], "name=5 is no str"),
    ],
)
def test_values_of_another_type_are_refused(tmp_path, key, value, message):
    write_pairs(tmp_path, 1)
    path = write_mixture(tmp_path / "mixture.yaml", tmp_path, **{key: value})
    with pytest.raises(ValueError, match=re.escape(message)):
        load_mixture(path)


def test_every_pack_holds_a_sample_of_a_mandatory_group(checkpoint, three_sets, tmp_path):
    path = write_mixture(tmp_path / "mixture.yaml", three_sets[0], weight=1e-9, is_mandatory=True)
    content = yaml.safe_load(path.read_text())
    second = write_mixture(tmp_path / "x.yaml", three_sets[2], weight=1)
    content["others"] = yaml.safe_load(second.read_text())["restoration"] | {"task": "restoration"}
    path.write_text(yaml.safe_dump(content, sort_keys=True))
    packs = loader(checkpoint, path, max_num_tokens=170, max_buffer_size=3)
    first = [d.name for d in packs.planner.datasets].index("one")
    for _ in range(20):
        pack = packs.planner.next_pack()
        assert [draw.dataset == first for draw in pack].index(True) <= 1  # behind what waited
        assert sum(draw.dataset == first for draw in pack) == 1
    assert packs.planner.packed[first] == 20


def test_inference_gets_the_rules_of_the_first_group_that_has_them(checkpoint, tmp_path):
    write_pairs(tmp_path, 1)
    dataset = {"name": "d", "jsonl_path": "${data_root}/train.jsonl"}
    vae, vit = RULES
    larger = {name: rule | {"max_image_size": 56} for name, rule in RULES.items()}
    content = {
        "vlm_sft": {vit: RULES[vit], "datasets": [dataset]},
        "restoration": larger | {"datasets": [dataset]},
        "more": RULES | {"task": "restoration", "datasets": [dataset]},
    }
    (path := tmp_path / "mixture.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    rules = loader(checkpoint, path).resize_rules
    sizes = {name: rule["max_image_size"] for name, rule in rules.items()}
    assert sizes == {vae: 56, vit: RULES[vit]["max_image_size"]}


def test_weights_of_data_sets_and_a_shuffle_before_the_cut(checkpoint, three_sets, tmp_path):
    path = write_mixture(tmp_path / "mixture.yaml", *three_sets[1:])
    content = yaml.safe_load(path.read_text())
    content["restoration"]["datasets"][0] |= {"weight": 2.0, "num_used_data": 3}
    taken = set()
    for seed in range(4):
        content["restoration"] |= {"shuffle_lines": True, "shuffle_seed": seed}
        path.write_text(yaml.safe_dump(content))
        planner = loader(checkpoint, path).planner
        assert planner.shares.tolist() == pytest.approx([0.6, 0.4])  # 2 x 3 records, 1 x 4
        records = planner.datasets[0].records
        taken.add(tuple(records[i].source.rpartition(":")[2] for i in range(len(records))))
    assert len(taken) > 1 and all(len(set(lines)) == 3 for lines in taken)
    assert all(1 <= int(line) <= 6 for lines in taken for line in lines)


def test_an_anchor_may_be_merged_and_overridden(tmp_path):
    write_pairs(tmp_path, 1)
    rules = "".join(f"  {name}: {rule}\n" for name, rule in RULES.items())
    sets = "  datasets: [{name: d, jsonl_path: train.jsonl}]\n"
    second = "second:\n  <<: *first\n  task: editing\n  weight: 3\n"
    text = f"restoration: &first\n{rules}{sets}{second}"
    text = text.replace("train.jsonl", str(tmp_path / "train.jsonl"))
    (path := tmp_path / "mixture.yaml").write_text(text)
    first, other = load_mixture(path)
    assert other == dataclasses.replace(first, task="editing", weight=3)
