"""One stream of packs on any number of ranks and workers: its plan, its state, its faults."""

import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import data.tasks
from data.config import load_mixture
from data.loader import PackedLoader
from data.packer import Packer, Sample, TextSegment
from data.records import parse_record
from data.stream import LoaderConfig, Planner
from data.tasks import RestorationTask
from data.tokenizer import Tokenizer
from data.transforms import ResizeRule
from tests.helpers import (
    TOKENS,
    pack,
    packer_config,
    position,
    tiny_config,
    write_mixture,
    write_pairs,
)

LIMITS = {
    "expected_num_tokens": 180,
    "max_num_tokens": 190,
    "max_num_tokens_per_sample": 120,
    "prefer_buffer_before": 100,
    "max_buffer_size": 3,
    "num_workers": 0,
}
DROPOUT = {f"{kind}_cond_dropout_prob": 0.3 for kind in ("text", "vae", "vit")}


@pytest.fixture(scope="module")
def two_sets(tmp_path_factory) -> Path:
    """13 pairs; of the second set no size is stated."""
    folder = tmp_path_factory.mktemp("sets")
    write_pairs(folder / "one", 6)
    lines = write_pairs(folder / "other", 7)
    lines.write_text(lines.read_text().replace('"width"', '"columns"'))
    return write_mixture(folder / "mixture.yaml", folder / "one", folder / "other")


def loader(
    checkpoint: Path, mixture: Path, rank: int = 0, world_size: int = 1, **changes: int
) -> PackedLoader:
    packing = packer_config(tiny_config(), **DROPOUT)
    config = LoaderConfig(**(LIMITS | changes))
    tokenizer = Tokenizer(checkpoint)
    return PackedLoader(load_mixture(mixture), config, packing, tokenizer, rank, world_size)


def digest(value: Any) -> str:
    """Of every bit of a batch, types and shapes included."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}{tuple(value.shape)}{hashlib.sha256(value.numpy()).hexdigest()}"
    if dataclasses.is_dataclass(value):
        parts = [digest(getattr(value, f.name)) for f in dataclasses.fields(value)]
        return hashlib.sha256(repr(parts).encode()).hexdigest()
    return repr([digest(v) for v in value] if isinstance(value, tuple) else value)


def digests(packs: PackedLoader, count: int) -> list[str]:
    return [digest(packs.next_batch()) for _ in range(count)]


@pytest.fixture(scope="module")
def reference(checkpoint, two_sets) -> list[str]:
    found = digests(loader(checkpoint, two_sets), 36)
    assert len(set(found)) == 36
    return found


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_share_one_stream(checkpoint, two_sets, reference, world_size):
    ranks = [loader(checkpoint, two_sets, r, world_size) for r in range(world_size)]
    waiting = 0
    for step in range(6):
        found = [digest(packs.next_batch()) for packs in ranks]
        assert found == reference[step * world_size : (step + 1) * world_size]
        assert all(packs.state_dict() == ranks[0].state_dict() for packs in ranks)
        waiting += len(ranks[0].state_dict()["buffer"])
    assert waiting > 0


@pytest.mark.parametrize(
    ("rank", "world_size", "workers"), [(0, 1, 1), (0, 1, 2), (1, 2, 2), (2, 3, 1), (3, 4, 2)]
)
def test_workers_change_no_bit(checkpoint, two_sets, reference, rank, world_size, workers):
    before = torch.random.get_rng_state()
    packs = loader(checkpoint, two_sets, rank, world_size, num_workers=workers)
    inside = loader(checkpoint, two_sets, rank, world_size)
    for step in range(5):
        assert digest(packs.next_batch()) == reference[step * world_size + rank]
        inside.next_batch()
        # Workers are ahead of the batches that were taken, the state is not.
        assert packs.state_dict() == inside.state_dict()
        assert (position(packs), packs.counts) == (position(inside), inside.counts)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("first", "second"), [((2, 0), (3, 0)), ((1, 2), (4, 0)), ((4, 0), (2, 2)), ((3, 1), (1, 0))]
)
def test_resumption_on_other_numbers_of_ranks_and_workers(
    checkpoint, two_sets, reference, first, second
):
    world_size, workers = first
    rank = world_size - 1
    packs = loader(checkpoint, two_sets, rank, world_size, num_workers=workers)
    assert digests(packs, 3) == reference[rank::world_size][:3]
    state = json.loads(json.dumps(packs.state_dict()))
    taken, (world_size, workers) = 3 * world_size, second
    for rank in range(world_size):
        resumed = loader(checkpoint, two_sets, rank, world_size, num_workers=workers)
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        assert digests(resumed, 4) == reference[taken + rank :: world_size][:4]


def test_a_stream_can_be_set_back(checkpoint, two_sets, reference):
    packs = loader(checkpoint, two_sets, num_workers=1)
    start = packs.state_dict()
    assert digests(packs, 2) == reference[:2]
    packs.load_state_dict(start)
    assert digests(packs, 2) == reference[:2]
    assert digest(next(iter(packs))) == reference[2]


def test_workers_take_many_data_sets(checkpoint, tmp_path):
    """A process is sent 253 pieces of shared memory at most; these sets have 600 tensors."""
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"message": turns}) + "\n")
    sets = [{"name": f"set{i}", "jsonl_path": str(tmp_path / "a.jsonl")} for i in range(200)]
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text(yaml.safe_dump({"text_only": {"datasets": sets}}))
    alone, packs = loader(checkpoint, mixture), loader(checkpoint, mixture, num_workers=2)
    assert digests(packs, 4) == digests(alone, 4)
    measured = [int(d.lengths.sum()) > 0 for d in packs.planner.datasets]
    assert sum(measured) > 10  # what the workers have written is seen here


def test_another_process_plans_the_same_stream(checkpoint, two_sets, reference):
    """Hashes of texts differ between processes; nothing may hang on them."""
    script = (
        "import sys; from pathlib import Path; from tests.data.test_stream import digests, loader;"
        "print(*digests(loader(Path(sys.argv[1]), Path(sys.argv[2])), 4), sep='\\n')"
    )
    found = subprocess.run(
        [sys.executable, "-c", script, checkpoint, two_sets],
        env=os.environ | {"PYTHONHASHSEED": "7"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.split("\n")[-5:-1] == reference[:4]


def test_a_worker_that_is_killed_is_named(checkpoint, two_sets, reference):
    packs = loader(checkpoint, two_sets, num_workers=1, prefetch_factor=1)
    before = {child.pid for child in multiprocessing.active_children()}
    assert digests(packs, 1) == reference[:1]
    (worker,) = {child.pid for child in multiprocessing.active_children()} - before
    os.kill(worker, signal.SIGKILL)
    message = (
        rf"rank 0: a data worker failed: .*{worker}.* lower num_workers=1 or prefetch_factor=1"
    )
    taken = 1
    with pytest.raises(ChildProcessError, match=message):
        for taken in itertools.count(1):
            assert digests(packs, 1) == [reference[taken]]
    assert taken <= 4
    assert digests(packs, 2) == reference[taken : taken + 2]  # a new worker goes on


def test_workers_end_at_a_signal_of_their_trainer_alone(checkpoint, two_sets, reference):
    packs = loader(checkpoint, two_sets, num_workers=1, prefetch_factor=1)
    before = {child.pid for child in multiprocessing.active_children()}
    assert digests(packs, 1) == reference[:1]
    (worker,) = (c for c in multiprocessing.active_children() if c.pid not in before)
    for name in ("TERM", "USR1"):
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    assert digests(packs, 3) == reference[1:4] and worker.is_alive()
    worker.terminate()  # torch does so with a worker that does not end in time
    worker.join(5)
    assert worker.exitcode == 1


def record(width: Any, height: Any, text: str, answer: str | None = None) -> str:
    image = [{"path": "absent.png", "width": width, "height": height}]
    said = [{"from": "human", "value": text}]
    said += [{"from": "gpt", "value": answer}] if answer else []
    return json.dumps({"input_img": image, "output_img": image, "message": said})


def test_lengths_are_those_of_the_packed_samples(checkpoint, tmp_path):
    tokenizer, rng = Tokenizer(checkpoint), np.random.default_rng(0)
    packing = packer_config(tiny_config(max_latent_size=64, vit_max_num_patch_per_side=64))
    for case in range(40):
        least, stride = int(rng.integers(14, 60)), 14
        vae = ResizeRule(image_stride=4, max_image_size=least + 60, min_image_size=least)
        vit = ResizeRule(
            image_stride=stride,
            max_image_size=least + 100,
            min_image_size=least,
            max_pixels=int(rng.integers(1, 9) * 1000),
        )
        task = RestorationTask(tokenizer, vae, vit)
        sizes = [rng.integers(5, 200, 2).tolist()] * 2
        for name, size in zip(("a.png", "b.png"), sizes, strict=True):
            Image.new("RGB", size).save(tmp_path / name)
        line = json.loads(record(None, None, "Remove it. " * case, "Mild." * (case % 3) or None))
        line["input_img"][0]["path"], line["output_img"][0]["path"] = "a.png", "b.png"
        from_headers = parse_record(json.dumps(line), "x:1")
        for image, (width, height) in zip(("input_img", "output_img"), sizes, strict=True):
            line[image][0] |= {"width": width, "height": height}
        stated = parse_record(json.dumps(line), "x:2")
        assert from_headers.inputs[0].size is None and stated.inputs[0].size == tuple(sizes[0])
        packer = Packer(packing, TOKENS)
        packer.add(task.sample(stated, tmp_path), torch.Generator())
        for source in (stated, from_headers):
            outline = task.outline(source, tmp_path)
            assert packing.num_tokens(outline) == packer.num_tokens == packer.build().num_tokens


def test_lengths_follow_the_choice_of_a_caption(checkpoint, tmp_path):
    write_pairs(tmp_path, 3)
    lines = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    text = "\n".join(json.dumps(x | {"captions": ["a", "bcd " * 9]}) for x in lines)
    (tmp_path / "train.jsonl").write_text(text)
    mixture = write_mixture(tmp_path / "mixture.yaml", tmp_path, task="text_to_image")
    stream, found = planner(checkpoint, mixture), set()
    for _ in range(12):
        pack = stream.next_pack()
        batch, bad, tried = stream.decode(pack)
        assert batch.sample_lens == tuple(draw.tokens for draw in pack)
        assert tried == pack and not bad
        found |= {(draw.record, draw.tokens) for draw in pack}
    assert len(found) == 2 * 3


@pytest.mark.parametrize("size", [(None, 8), (8, 0), (8, -1), ("8", 8), (8.0, 8), (True, 8)])
def test_what_is_no_size_is_not_stated(size):
    assert parse_record(record(*size, "x"), "x:1").inputs[0].size is None


def planner(checkpoint: Path, mixture: Path, **changes: int) -> Planner:
    config = LoaderConfig(**(LIMITS | changes))
    packing = packer_config(tiny_config(max_latent_size=64))
    return Planner(load_mixture(mixture), config, packing, Tokenizer(checkpoint))


def test_the_buffer_fills_packs_and_loses_no_sample(checkpoint, tmp_path):
    """Planning needs no image file where sizes are stated."""
    rng = np.random.default_rng(0)
    (tmp_path / "pairs").mkdir()
    sides = rng.choice([16, 40, 80], (60, 2)).tolist()
    lines = [record(*size, f"{i}") for i, size in enumerate(sides)]
    (tmp_path / "pairs" / "train.jsonl").write_text("\n".join(lines))
    rule = {"image_stride": 4, "max_image_size": 80, "min_image_size": 16}
    mixture = write_mixture(
        tmp_path / "mixture.yaml", tmp_path / "pairs", image_transform_args=rule
    )
    limits = {
        "expected_num_tokens": 1950,
        "max_num_tokens": 2000,
        "max_num_tokens_per_sample": 1000,
        "prefer_buffer_before": 1000,
    }
    shares, streams = {}, {}
    for size in (0, 10):
        stream = planner(checkpoint, mixture, **limits, max_buffer_size=size)
        packs = [stream.next_pack() for _ in range(100)]
        tokens = [sum(d.tokens for d in p) for p in packs]
        assert max(tokens) <= 2000 and len(stream.buffer) <= size
        shares[size] = sum(tokens) / (2000 * len(packs))
        streams[size] = [draw for p in packs for draw in p]
        assert len(streams[size]) + len(stream.buffer) == sum(stream.draws)
        streams[size] += stream.buffer
    assert shares[0] < 0.9 and shares[10] > 0.96
    n = len(streams[0])
    assert sorted(streams[10], key=lambda d: d.seed) != streams[10][:n]
    assert len(set(streams[10])) == len(streams[10]) > n
    unbuffered = planner(checkpoint, mixture, **limits, max_buffer_size=0)
    drawn: list[Any] = []
    while len(drawn) < len(streams[10]):
        drawn += unbuffered.next_pack()
    assert set(drawn[: len(streams[10])]) == set(streams[10])


def texts(folder: Path, **groups: tuple[list[int], bool]) -> Path:
    """A mixture of conversations: for each group, words of the answers and `is_mandatory`."""
    content = {}
    for name, (words, mandatory) in groups.items():
        asked = {"from": "human", "value": "a"}
        said = [[asked, {"from": "gpt", "value": "a " * n}] for n in words]
        lines = [json.dumps({"message": messages}) for messages in said]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
        sets = [{"name": name, "jsonl_path": f"${{data_root}}/{name}.jsonl"}]
        group = {"task": "text_only", "is_mandatory": mandatory, "datasets": sets}
        content[name] = group
    (folder / "mixture.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder / "mixture.yaml"


def room_for(checkpoint: Path, mixture: Path, tokens: int) -> dict[str, int]:
    """Limits of packs that hold the longest sample and so many tokens more."""
    limits = dict.fromkeys(LIMITS, 10**6) | {"max_buffer_size": 5}
    measured = planner(checkpoint, mixture, **limits)
    longest = max(d.length(i, 0) for d in measured.datasets for i in range(len(d.records)))
    most = dict.fromkeys(("max_num_tokens", "max_num_tokens_per_sample"), longest + tokens)
    return most | dict.fromkeys(("expected_num_tokens", "prefer_buffer_before"), longest)


@pytest.mark.parametrize("buffer", [0, 1, 5])
def test_mandatory_groups_leave_no_sample_waiting_for_ever(checkpoint, tmp_path, buffer):
    mixture = texts(tmp_path, short=([20] * 20, True), mixed=([20, 450] * 10, False))
    limits = room_for(checkpoint, mixture, 2) | {"max_buffer_size": buffer}
    stream, waited, fill = planner(checkpoint, mixture, **limits), {}, []
    seen = {"long": 0, "mixed": 0, "with short": 0}
    for _ in range(300):
        pack = stream.next_pack()
        fill.append(sum(draw.tokens for draw in pack))
        long = [d for d in pack if d.tokens > limits["expected_num_tokens"] / 2]
        seen["long"] += len(long)
        seen["mixed"] += sum(d.dataset for d in pack)
        seen["with short"] += any(d.dataset == 0 for d in pack)
        waited = {draw: waited.get(draw, 0) + 1 for draw in stream.buffer}
        assert max(waited.values(), default=0) <= buffer + 2
        assert len(long) == 1 or not long
        assert seen["with short"] or long
    assert len(stream.buffer) <= buffer + 2
    # Every second record of the set is long, and each fills a pack.
    assert abs(seen["mixed"] - 2 * seen["long"]) <= 2 * (buffer + 2) + 20
    assert seen["long"] > 60 and max(fill) <= limits["max_num_tokens"]
    assert seen["long"] + seen["with short"] == 300


def test_mandatory_groups_that_do_not_fit_together_take_turns(checkpoint, tmp_path):
    groups = {f"m{i}": ([300] * 10, True) for i in range(3)} | {"short": ([20] * 9, False)}
    mixture = texts(tmp_path, **groups)
    limits = room_for(checkpoint, mixture, 100) | {"max_buffer_size": 2}
    limits["expected_num_tokens"] = limits["max_num_tokens"]
    stream = planner(checkpoint, mixture, **limits)
    packs = [[draw.dataset for draw in stream.next_pack()] for _ in range(60)]
    counts = [sum(pack.count(i) for pack in packs) for i in range(4)]
    assert sum(counts[:3]) == 60 and min(counts[:3]) >= 15 and counts[3] > 0
    # Set back to any of its states, the stream goes on with the same packs.
    again = planner(checkpoint, mixture, **limits)
    for expected in packs:
        state = json.loads(json.dumps(again.state()))
        again = planner(checkpoint, mixture, **limits)
        again.load(state)
        assert [draw.dataset for draw in again.next_pack()] == expected
    message = r"max_buffer_size=1 must be 2 or more for 3 groups with is_mandatory"
    with pytest.raises(ValueError, match=message):
        planner(checkpoint, mixture, **limits | {"max_buffer_size": 1})


def test_a_second_epoch_reads_no_header(checkpoint, two_sets, monkeypatch):
    read: list[Path] = []
    header = data.tasks.image_size
    monkeypatch.setattr(data.tasks, "image_size", lambda p: (read.append(p), header(p))[1])
    stream = planner(checkpoint, two_sets)
    while sum(stream.draws) < 60:
        stream.next_pack()
    assert len(read) == len(set(read)) == 2 * 7  # of the set without stated sizes


def test_a_stream_that_is_smaller_than_its_ranks_wraps(checkpoint, mixture, capsys):
    ranks = [loader(checkpoint, mixture, r, 4, expected_num_tokens=1) for r in range(4)]
    assert "WARNING" not in capsys.readouterr().out
    names = [packs.next_batch().vae.names[0] for _ in range(5) for packs in ranks]
    assert len(names) == 20 and all(len({*names[i : i + 5]}) == 5 for i in range(0, 20, 5))
    assert ranks[0].counts == {"pairs": 20} and position(ranks[0]) == 20
    for rank in range(4):
        loader(checkpoint, mixture, rank, 4, num_workers=2)
    out = capsys.readouterr().out
    assert out == "WARNING: 5 records for 4 ranks with num_workers=2: records will repeat\n"


def test_another_mixture_is_refused(checkpoint, two_sets, tmp_path):
    state = loader(checkpoint, two_sets).state_dict()
    assert state["datasets"] == [["one", 6], ["other", 7]]
    write_pairs(tmp_path / "one", 5)
    write_pairs(tmp_path / "others", 7)
    mixture = write_mixture(tmp_path / "mixture.yaml", tmp_path / "one", tmp_path / "others")
    with pytest.raises(ValueError, match="dataset_config_file") as caught:
        loader(checkpoint, mixture).load_state_dict(state)
    text = str(caught.value)
    assert text.endswith("['one', 6] -> ['one', 5]; ['other', 7] -> ['others', 7]")


def test_other_settings_of_the_plan_are_refused(checkpoint, two_sets, tmp_path):
    packs = loader(checkpoint, two_sets)
    packs.next_batch()
    state = json.loads(json.dumps(packs.state_dict()))
    limits = {"data_seed": 7, "max_num_tokens": 191, "max_buffer_size": 2}
    for name, value in limits.items():
        old = getattr(packs.config, name)
        with pytest.raises(ValueError, match=f"other settings: {name}: {old} -> {value}. Set"):
            loader(checkpoint, two_sets, **{name: value}).load_state_dict(state)
    content = yaml.safe_load(two_sets.read_text())
    group = content["restoration"]
    changes = {"weight": 3, "is_mandatory": True, "shuffle_lines": True, "shuffle_seed": 1}
    changes["image_transform_args"] = group["image_transform_args"] | {"max_image_size": 20}
    for key, value in changes.items():
        text = yaml.safe_dump({"restoration": group | {key: value}}).replace(
            "${data_root}", str(two_sets.parent)
        )
        (tmp_path / "mixture.yaml").write_text(text)
        with pytest.raises(ValueError, match=f"settings: group 1: {key}: .* -> .*. Set them back"):
            loader(checkpoint, tmp_path / "mixture.yaml").load_state_dict(state)
    group["datasets"][1]["weight"] = 9
    (tmp_path / "mixture.yaml").write_text(yaml.safe_dump({"restoration": group}))
    groups = load_mixture(tmp_path / "mixture.yaml", two_sets.parent)
    arguments = LoaderConfig(**LIMITS), packs.packer_config, Tokenizer(checkpoint)
    with pytest.raises(ValueError, match=r"group 1: datasets: \[1.0, 1.0\] -> \[1.0, 9\]"):
        PackedLoader(groups, *arguments).load_state_dict(state)
    # How it runs is no part of the plan, nor is another name of the task.
    text = two_sets.read_text().replace("restoration:", "editing:")
    (tmp_path / "mixture.yaml").write_text(text)
    groups = load_mixture(tmp_path / "mixture.yaml", two_sets.parent)
    again = PackedLoader(groups, *arguments)
    again.load_state_dict(state)
    assert digest(again.next_batch()) == digest(packs.next_batch())


def test_reweighted_answers():
    """1 / sqrt(n) for each of the n labels of a sample: n ids and the end of each answer."""
    texts = {n: TextSegment(ids=[5] * n, answer=True) for n in (1, 3, 8)}
    samples = [Sample("a", [texts[3]]), Sample("b", [texts[8], texts[1]]), Sample("c", [texts[8]])]
    lens = [4, 11, 9]
    labels = pack(tiny_config(), *samples, ce_loss_reweighting=True).labels
    expected = [n**-0.5 for n in lens for _ in range(n)]
    assert labels.weights.tolist() == pytest.approx(expected, rel=1e-6)
    assert labels.total_weight == pytest.approx(sum(n**0.5 for n in lens), rel=1e-12)
    assert pack(tiny_config(), *samples).labels.weights.tolist() == [1.0] * 24
