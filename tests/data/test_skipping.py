"""Samples that cannot be used: left out, counted with their reason, too many end the run; a stream
that has some resumes exactly on any number of ranks and workers."""

import errno
import json
import re
from pathlib import Path

import pytest
import yaml
from PIL import Image

import data.tasks
from data import volumes
from data.config import GroupConfig, load_mixture
from data.loader import PackedLoader, joined_states
from data.records import ImageRef
from data.stream import LoaderConfig
from data.tokenizer import Tokenizer
from data.volumes import UnreachableError
from tests.data.test_stream import DROPOUT, LIMITS, digest
from tests.helpers import RULES, packer_config, tiny_config, write_mixture, write_pairs

PACKS = 24


def loader(
    checkpoint: Path,
    mixture: Path | tuple[GroupConfig, ...],
    rank: int = 0,
    world_size: int = 1,
    **changes: float,
) -> PackedLoader:
    packing = packer_config(tiny_config(), **DROPOUT)
    config = LoaderConfig(**(LIMITS | {"max_bad_share": 1.0} | changes))
    tokenizer = Tokenizer(checkpoint)
    groups = load_mixture(mixture) if isinstance(mixture, Path) else mixture
    return PackedLoader(groups, config, packing, tokenizer, rank, world_size)


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> Path:
    """Three data sets in two groups, one of them mandatory: bad lines, and images that are missing,
    damaged or of another size than is stated."""
    folder = tmp_path_factory.mktemp("broken")
    stated = write_pairs(folder / "stated", 6)
    text = stated.read_text().splitlines()
    text[4] = text[4].replace('"height": 16', '"height": 20')
    stated.write_text("\n".join([*text[:2], "{oops", *text[2:]]))
    (folder / "stated" / "images" / "1_clean.png").write_bytes(b"no image")
    (folder / "stated" / "images" / "3_input.png").unlink()
    measured = write_pairs(folder / "measured", 7)
    measured.write_text(measured.read_text().replace('"width"', '"columns"'))
    (folder / "measured" / "images" / "2_input.png").unlink()
    image = folder / "measured" / "images" / "5_clean.png"
    image.write_bytes(image.read_bytes()[:-40])
    write_pairs(folder / "asked", 5)
    path = write_mixture(folder / "mixture.yaml", folder / "stated", folder / "measured", weight=2)
    asked = yaml.safe_load(write_mixture(folder / "x.yaml", folder / "asked").read_text())
    asked["restoration"] |= {"task": "vlm_sft", "is_mandatory": True}
    content = yaml.safe_load(path.read_text()) | {"questions": asked["restoration"]}
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def reference(checkpoint, broken) -> tuple[list[str], list[dict[str, int]]]:
    """Digests of the first packs of the uninterrupted stream, and what is skipped after each."""
    packs, found, skipped = loader(checkpoint, broken), [], []
    for _ in range(PACKS):
        found.append(digest(packs.next_batch()))
        skipped.append(packs.skipped)
    assert len(set(found)) == PACKS
    return found, skipped


def test_every_reason_is_counted(checkpoint, broken, reference, capsys):
    packs = loader(checkpoint, broken)
    names, used = [], 0
    for _ in range(PACKS):
        batch = packs.next_batch()
        names += [
            Path(name).relative_to(broken.parent)
            for name in set(batch.vae.names if batch.vae else ())
        ]
        used += len(batch.sample_lens)
    assert {*packs.skipped} == {
        "stated/bad_record",  # the line, and the size that is not the file's
        "stated/unreadable_image",
        "stated/missing_image",
        "measured/missing_image",
        "measured/unreadable_image",
    }
    assert packs.skipped == reference[1][-1]
    decoded = packs.damaged.by_name(packs.names)
    assert {*decoded} == {*packs.skipped} - {"measured/missing_image"}
    assert used == sum(packs.counts.values()) - decoded.total()
    lines = {(path.parts[0], int(path.name.split(":")[1])) for path in names}
    assert lines == {("stated", n) for n in (1, 4, 7)} | {("measured", n) for n in (1, 2, 4, 5, 7)}
    told = capsys.readouterr().out
    assert told.count("WARNING") == 5
    assert f"stated: bad_record: {broken.parent}/stated/train.jsonl:3: no JSON: " in told
    assert "stated: missing_image: " in told and "images/3_input.png: [Errno 2]" in told


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_broken_mixture_resumes_exactly(checkpoint, broken, reference, world_size, workers):
    """Stopped after another number of batches in each case; resumed on another number of ranks."""
    steps, (found, skipped) = 1 + (3 * world_size + workers) % 4, reference
    ranks = [
        loader(checkpoint, broken, r, world_size, num_workers=workers) for r in range(world_size)
    ]
    for step in range(steps):
        own = [digest(packs.next_batch()) for packs in ranks]
        assert own == found[step * world_size : (step + 1) * world_size]
    state = json.loads(json.dumps(joined_states([packs.state_dict() for packs in ranks])))
    taken, again = steps * world_size, (4 - world_size, 2 - workers)
    ranks = [loader(checkpoint, broken, r, again[0], num_workers=again[1]) for r in range(again[0])]
    for packs in ranks:
        packs.load_state_dict(state)
    assert joined_states([packs.state_dict() for packs in ranks]) == state
    while taken + again[0] <= PACKS:
        own = [digest(packs.next_batch()) for packs in ranks]
        assert own == found[taken : taken + again[0]]
        taken += again[0]
        total = {
            name: sum(packs.skipped.get(name, 0) for packs in ranks)
            for packs in ranks
            for name in packs.skipped
        }
        assert total == skipped[taken - 1]


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_end_the_run(checkpoint, tmp_path, workers):
    """Of a data set: 3 of 60 records are damaged, which is more than 1 % and less than 10 %."""
    write_pairs(tmp_path / "good", 60)
    write_pairs(tmp_path / "some", 60)
    for i in (4, 23, 44):
        (tmp_path / "some" / "images" / f"{i}_clean.png").write_bytes(b"no image")
    mixture = write_mixture(tmp_path / "mixture.yaml", tmp_path / "good", tmp_path / "some")
    packs = loader(checkpoint, mixture, num_workers=workers, max_bad_share=0.01)
    with pytest.raises(ValueError) as caught:
        for _ in range(400):
            packs.next_batch()
    taken = packs.planner.packed[1]
    text = f"some: 10 of {taken} samples cannot be used, more than max_bad_share=0.01: 10 "
    assert str(caught.value).startswith(text + "unreadable_image, first ")
    assert "_clean.png: cannot identify image file" in str(caught.value)
    packs = loader(checkpoint, mixture, num_workers=workers, max_bad_share=0.1)
    while packs.counts["some"] <= taken + 20:
        packs.next_batch()


def test_stand_ins_count_among_the_samples_that_were_tried(checkpoint, tmp_path):
    """One sample a pack, 9 of 10 damaged: there are more bad ones than packs."""
    write_pairs(tmp_path / "pairs", 10)
    for i in range(9):
        (tmp_path / "pairs" / "images" / f"{i}_clean.png").write_bytes(b"no image")
    mixture = write_mixture(tmp_path / "mixture.yaml", tmp_path / "pairs")
    packs = loader(checkpoint, mixture, expected_num_tokens=1, max_bad_share=0.5)
    good = 0
    with pytest.raises(ValueError, match="samples cannot be used, more than max_bad") as caught:
        for good in range(100):  # noqa: B007
            packs.next_batch()
    bad, seen = map(int, re.findall(r"pairs: (\d+) of (\d+) samples", str(caught.value))[0])
    assert seen == bad + good + 1 and bad >= 10


@pytest.mark.parametrize("stated", [True, False])
def test_nothing_but_bad_samples_ends_the_run(checkpoint, tmp_path, stated):
    lines = write_pairs(tmp_path / "pairs", 30)
    for image in (tmp_path / "pairs" / "images").iterdir():
        image.unlink()
    if not stated:
        lines.write_text(lines.read_text().replace('"width"', '"columns"'))
    mixture = write_mixture(tmp_path / "mixture.yaml", tmp_path / "pairs")
    message = r"\d+ samples in a row cannot be .*; the last: \S+_input.png: \[Errno 2\]"
    with pytest.raises(ValueError, match=message):
        loader(checkpoint, mixture).next_batch()


@pytest.mark.parametrize(
    ("fault", "ends"),
    [
        (OSError(errno.ESTALE, "Stale file handle"), True),
        (OSError(errno.EIO, "Input/output error"), True),
        (PermissionError(errno.EACCES, "Permission denied"), True),
        (TimeoutError("timed out"), True),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), False),
        (OSError("image file is truncated"), False),
    ],
)
@pytest.mark.parametrize("stated", [True, False])
def test_a_file_system_that_fails_is_no_bad_sample(
    checkpoint, tmp_path, monkeypatch, fault, ends, stated
):
    """Neither of the header nor of the pixels; afterwards the stream is that without a fault."""
    lines = write_pairs(tmp_path / "pairs", 6)
    if not stated:
        lines.write_text(lines.read_text().replace('"width"', '"columns"'))
    mixture = write_mixture(tmp_path / "mixture.yaml", tmp_path / "pairs")
    expected = [digest(packs.next_batch()) for packs in [loader(checkpoint, mixture)] * 3]
    packs, opened = loader(checkpoint, mixture), Image.open
    first = digest(packs.next_batch())

    def failing(*args, **options):
        raise fault

    packs.load_state_dict(packs.state_dict())
    packs.planner.datasets[0].lengths.zero_()
    monkeypatch.setattr(Image, "open", failing)
    if not ends:
        with pytest.raises(ValueError, match=r"in a row cannot be"):
            packs.next_batch()
        return
    with pytest.raises(UnreachableError, match=rf"\d_\w+.png: .*{fault.args[-1]}"):
        packs.next_batch()
    assert packs.skipped == {}
    monkeypatch.setattr(Image, "open", opened)
    assert [first, *(digest(packs.next_batch()) for _ in range(2))] == expected


def test_a_url_that_fails_is_no_bad_sample(tmp_path, monkeypatch):
    def failing(_):
        raise OSError("503 Slow Down")

    monkeypatch.setattr(data.tasks, "read_bytes", failing)
    with pytest.raises(UnreachableError, match="s3://bucket/a.png: 503 Slow Down"):
        data.tasks.open_image("s3://bucket", ImageRef(path="a.png"))


def test_plans_that_differ_are_not_saved(checkpoint, broken):
    ranks = [loader(checkpoint, broken, r, 2) for r in range(2)]
    for packs in ranks:
        packs.next_batch()
    states = [packs.state_dict() for packs in ranks]
    assert joined_states(states)["draws"] == states[0]["draws"]
    states[1]["draws"][0] += 1
    a, b = (state["draws"] for state in states)
    message = f"draws is rank 0 {a}; rank 1 {b}. Do all of them read the same files"
    with pytest.raises(ValueError, match=re.escape(message)):
        joined_states(states)


def test_an_oversized_image_is_not_decoded(checkpoint, tmp_path, monkeypatch):
    lines = write_pairs(tmp_path / "pairs", 6)
    lines.write_text(lines.read_text().replace('"width"', '"columns"'))
    mixture = write_mixture(tmp_path / "mixture.yaml", tmp_path / "pairs")
    monkeypatch.setattr(volumes, "MAX_PIXELS", 16 * 20)
    packs = loader(checkpoint, mixture)
    shapes = {tuple(i.shape) for _ in range(6) for i in packs.next_batch().vae.images}
    assert shapes == {(3, 16, 16), (3, 20, 16)}
    assert {*packs.skipped} == {"pairs/oversized_image"}


def test_a_pack_without_any_good_sample_takes_another_record(checkpoint, tmp_path):
    write_pairs(tmp_path / "pairs", 8)
    (tmp_path / "pairs" / "images" / "3_clean.png").write_bytes(b"no image")
    mixture = write_mixture(tmp_path / "mixture.yaml", tmp_path / "pairs")
    streams = []
    for world_size in (1, 2):
        ranks = [
            loader(checkpoint, mixture, r, world_size, expected_num_tokens=1)
            for r in range(world_size)
        ]
        streams.append([packs.next_batch() for _ in range(16 // world_size) for packs in ranks])
        assert sum(packs.skipped.get("pairs/unreadable_image", 0) for packs in ranks) >= 2
    names = [batch.vae.names[0].rpartition(":")[2] for batch in streams[0]]
    assert [digest(batch) for batch in streams[0]] == [digest(batch) for batch in streams[1]]
    assert len(names) == 16 and "4" not in names and {*names} == {*"1235678"}


def test_a_pair_that_does_not_match_is_a_bad_record(checkpoint, tmp_path):
    lines = write_pairs(tmp_path / "pairs", 6).read_text().splitlines()
    records = [json.loads(line) for line in lines]
    records[0]["output_img"] = records[1]["output_img"]  # 24 x 16 pixels for 16 x 16
    (tmp_path / "pairs" / "train.jsonl").write_text("\n".join(map(json.dumps, records)))
    mixture = write_mixture(
        tmp_path / "mixture.yaml",
        tmp_path / "pairs",
        image_transform_args=RULES["image_transform_args"] | {"image_stride": 4},
    )
    packs = loader(checkpoint, mixture)
    for _ in range(4):
        packs.next_batch()
    (message,) = [m for _, m in packs.planner.skipped.found[0].values()]
    assert "train.jsonl:1: input and target are (16, 16) and (24, 16) after image_tr" in message
