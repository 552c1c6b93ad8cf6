"""Files of records: JSONL indexed by offset, parquet by row group, both also at URLs."""

import dataclasses
import io
import json
import pickle
import shutil
import sys
import zipfile
from pathlib import Path

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from PIL import Image
from pydicom.data import get_testdata_file

from data import sources
from data.config import load_mixture
from data.files import NamedBytes, folder_of, within
from data.images import ImageError, image_size, read_image, read_scan
from data.records import Form, ImageRef, RecordError, parse_record
from data.sources import JsonlRecords, ParquetRecords, good_records
from data.tally import reason_of
from data.tasks import open_image
from data.volumes import UnreachableError
from tests.data.test_skipping import loader
from tests.data.test_stream import digest
from tests.helpers import RULES, position, write_mixture, write_pairs

TEXT = Form(inputs=(), needs=("texts",))


def line(text: str) -> str:
    return json.dumps({"message": [{"from": "human", "value": text}]})


@pytest.mark.parametrize("block", [1, 7, 64, 2**24])
@pytest.mark.parametrize("end", ["", "\n", "\n\n \n", "\r\n"])
def test_an_index_finds_the_lines_that_reading_finds(tmp_path, monkeypatch, block, end):
    """Blank lines, indented ones, lines longer than a block, other line ends."""
    monkeypatch.setattr(sources, "BLOCK_BYTES", block)
    rng = np.random.default_rng(block)
    lines = [
        ("", " \t", line("é" * 40), " " + line("b"), line(str(i)) + "\r")[int(rng.integers(5))]
        for i in range(50)
    ]
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join([*lines, line("last")]) + end)
    text = path.read_bytes().split(b"\n")
    expected = [parse_record(t, f"{path}:{n}", TEXT) for n, t in enumerate(text, 1) if t.strip()]
    records = JsonlRecords(path, TEXT)
    assert list(records) == expected and len(records) == len(expected) > 20
    assert [records[i] for i in (5, 2, -1)] == [expected[i] for i in (5, 2, -1)]
    assert list(pickle.loads(pickle.dumps(records))) == expected
    assert list(JsonlRecords(path, TEXT, used=3)) == expected[:3]


def test_a_shuffle_before_the_cut_is_that_of_its_seed(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(map(line, "abcdefghij")))
    taken = {
        seed: [r.instruction for r in JsonlRecords(path, TEXT, used=4, shuffle_seed=seed)]
        for seed in (0, 0, 1)
    }
    for seed, found in taken.items():
        chosen = np.random.default_rng(seed).permutation(10)[:4]
        assert found == sorted("abcdefghij"[i] for i in chosen)
    assert taken[0] != taken[1]


def test_good_records_leave_out_the_bad(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join([line("a"), "{oops", line("b")]))
    assert [r.source for r in good_records(JsonlRecords(path, TEXT))] == [f"{path}:1", f"{path}:3"]


def png(value: int, size: tuple[int, int] = (16, 16)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(file, "PNG")
    return file.getvalue()


def write_parquet(path: Path, columns: dict[str, list], rows: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=rows)


@pytest.fixture
def captions(tmp_path) -> Path:
    """Two files of 7 and 4 rows, at most 3 in a group; the caption of a row is its number."""
    for name, first, count in (("a", 0, 7), ("b", 7, 4)):
        rows = range(first, first + count)
        columns = {"image": [png(i) for i in rows], "captions": [str(i) for i in rows]}
        write_parquet(tmp_path / "rows" / f"{name}.parquet", columns, 3)
    return tmp_path / "rows"


FORM = Form(inputs=(), outputs=("image",), needs=("outputs",))


def test_parquet_rows(captions):
    records = ParquetRecords(captions, FORM)
    assert [r.raw["captions"] for r in records] == [str(i) for i in range(11)]
    assert [r.source for r in records][5:9] == [
        *(f"{captions}/a.parquet:{n}" for n in (6, 7)),
        *(f"{captions}/b.parquet:{n}" for n in (1, 2)),
    ]
    assert records[9].outputs[0].content == png(9)
    assert len(ParquetRecords(captions, FORM, used=1)) == 7
    assert len(ParquetRecords(captions / "b.parquet", FORM)) == 4
    with pytest.raises(IndexError):
        records[11]
    (captions / "none").mkdir()
    with pytest.raises(RecordError, match="none:1: no record"):
        ParquetRecords(captions / "none", FORM)


def test_parquet_rows_at_a_url(captions):
    fsspec.filesystem("memory").put(f"{captions}/", "/rows", recursive=True)
    here, there = ParquetRecords(captions, FORM), ParquetRecords("memory://rows", FORM)
    assert [r.outputs[0].content for r in there] == [r.outputs[0].content for r in here]
    assert there[8].source == "memory://rows/b.parquet:2"
    assert len(ParquetRecords("memory://rows/a.parquet", FORM)) == 7
    assert len(pickle.loads(pickle.dumps(there))) == 11


def test_an_epoch_of_parquet_reads_every_group_once(captions, monkeypatch):
    monkeypatch.setattr(sources, "HELD_BYTES", 0)
    records, read = ParquetRecords(captions, FORM), []
    opened = sources._parquet_file
    monkeypatch.setattr(sources, "_parquet_file", lambda f: (read.append(f.name), opened(f))[1])
    orders = [records.order(np.random.default_rng(seed)) for seed in range(3)]
    for order in orders:
        assert sorted(order) == [*range(11)]
        for index in order:
            assert records[int(index)].raw["captions"] == str(index)
    assert len({tuple(order) for order in orders}) == 3
    groups = 3 + 2
    assert 3 * groups - 2 <= len(read) <= 3 * groups  # the last group may be the next epoch's first


def test_planning_and_decoding_share_row_groups(checkpoint, tmp_path, monkeypatch):
    """Eight ranks: planning is whole groups ahead of what one of them decodes."""
    count, rows = 400, 20
    columns = {"image": [png(i % 256) for i in range(count)], "captions": ["a"] * count}
    write_parquet(tmp_path / "rows.parquet", columns, rows)
    group = {"image_transform_args": RULES["image_transform_args"]}
    group["datasets"] = [{"name": "rows", "parquet_path": "${data_root}/rows.parquet"}]
    (tmp_path / "mixture.yaml").write_text(yaml.safe_dump({"text_to_image": group}))
    packs, read = loader(checkpoint, tmp_path / "mixture.yaml", 0, 8), []
    (records,) = (dataset.records for dataset in packs.planner.datasets)
    size = records._rows(0).nbytes
    opened = sources._parquet_file
    monkeypatch.setattr(sources, "_parquet_file", lambda f: (read.append(1), opened(f))[1])
    monkeypatch.setattr(sources, "HELD_BYTES", 8 * size)
    while position(packs) < count:
        packs.next_batch()
        assert len(records._held) <= 9
    assert len(read) <= count / rows + 3


def test_a_stream_from_urls_is_the_one_from_the_disk(checkpoint, tmp_path):
    write_pairs(tmp_path / "pairs", 5)
    # The headers are read too.
    lines = tmp_path / "pairs" / "train.jsonl"
    lines.write_text(lines.read_text().replace('"width"', '"columns"'))
    (tmp_path / "pairs" / "images" / "3_clean.png").unlink()
    system = fsspec.filesystem("memory")
    system.put(str(tmp_path / "pairs"), "/bucket/pairs", recursive=True)
    path = write_mixture(tmp_path / "mixture.yaml", tmp_path / "pairs")
    content = yaml.safe_load(path.read_text())
    here = loader(checkpoint, path)
    expected = [digest(here.next_batch()) for _ in range(4)]
    content["restoration"]["datasets"] = [
        {"name": "pairs", "jsonl_path": "${data_root}/pairs/train.jsonl"}
    ]
    path.write_text(yaml.safe_dump(content))
    mixture = load_mixture(path, "memory://bucket")
    assert mixture[0].datasets[0].data_dir == "memory://bucket/pairs"
    there, url = loader(checkpoint, mixture), "memory://bucket/pairs/train.jsonl"
    for found in expected:
        batch = there.next_batch()
        assert all(name.startswith(f"{url}:") for name in batch.vae.names)
        names = tuple(name.replace(url, str(lines)) for name in batch.vae.names)
        vae = dataclasses.replace(batch.vae, names=names)
        assert digest(dataclasses.replace(batch, vae=vae)) == found
    assert there.skipped == here.skipped and {*there.skipped} == {"pairs/missing_image"}
    with pytest.raises(
        ValueError, match=r"jsonl_path memory://elsewhere/pairs/train.jsonl does no"
    ):
        load_mixture(path, "memory://elsewhere")


def test_a_set_in_an_archive_trains_as_on_the_disk(checkpoint, tmp_path):
    write_pairs(tmp_path / "pairs", 4)
    archive, here = tmp_path / "set.zip", write_mixture(tmp_path / "here.yaml", tmp_path / "pairs")
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as opened:
        for file in (tmp_path / "pairs").rglob("*.*"):
            opened.write(file, f"deep/{file.relative_to(tmp_path / 'pairs')}")
        opened.write(tmp_path / "pairs" / "train.jsonl", "top.jsonl")
    content = yaml.safe_load(here.read_text())
    lines = "zip://deep/train.jsonl::${data_root}/set.zip"
    content["restoration"]["datasets"] = [{"name": "pairs", "jsonl_path": lines}]
    (tmp_path / "there.yaml").write_text(yaml.safe_dump(content))
    mixture = load_mixture(tmp_path / "there.yaml")
    assert mixture[0].datasets[0].data_dir == f"zip://deep::{archive}"
    expected, found = (loader(checkpoint, m).next_batch() for m in (here, mixture))
    there = f"zip://deep/train.jsonl::{archive}"
    names = tuple(n.replace(there, f"{tmp_path}/pairs/train.jsonl") for n in found.vae.names)
    assert names != found.vae.names
    vae = dataclasses.replace(found.vae, names=names)
    assert digest(dataclasses.replace(found, vae=vae)) == digest(expected)
    content["restoration"]["datasets"][0] |= {
        "jsonl_path": "zip://top.jsonl::${data_root}/set.zip",
        "data_dir": "zip://deep::${data_root}/gone.zip",
    }
    (tmp_path / "there.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=r"yaml:3: restoration.datasets: data_dir .*gone.zip'$"):
        load_mixture(tmp_path / "there.yaml")


def test_names_go_into_the_first_link_of_a_url():
    joined = {
        "zip://::s3://b/a.zip": "zip://x/i.png::s3://b/a.zip",
        "zip://in/::a.zip": "zip://in/x/i.png::a.zip",
        "simplecache::s3://b/set": "simplecache::s3://b/set/x/i.png",
        "s3://b/set/": "s3://b/set/x/i.png",
        "file:///set": "file:///set/x/i.png",
    }
    assert {url: within(url, "x/i.png") for url in joined} == joined
    folders = {
        "zip://train.jsonl::s3://b/a.zip": "zip://::s3://b/a.zip",
        "zip://in/train.jsonl::a.zip": "zip://in::a.zip",
        "s3://b/train.jsonl": "s3://b",
        "file:///train.jsonl": "file:///",
    }
    assert {url: folder_of(url) for url in folders} == folders
    assert folder_of("s3://b/rows", ".parquet") == "s3://b/rows"
    assert folder_of("zip://rows/a.parquet::a.zip", ".parquet") == "zip://rows::a.zip"


def test_parquet_in_an_archive(captions, tmp_path):
    archive = tmp_path / "rows.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        for file in captions.iterdir():
            opened.write(file, f"rows/{file.name}")
    records = ParquetRecords(f"zip://rows::{archive}", FORM)
    assert [r.raw["captions"] for r in records] == [str(i) for i in range(11)]
    assert len(ParquetRecords(f"zip://rows/b.parquet::{archive}", FORM)) == 4
    assert len(ParquetRecords(f"zip://rows/::{archive}", FORM)) == 11


def test_a_folder_may_be_called_as_a_parquet_file(captions, tmp_path):
    """So Spark writes."""
    rows = shutil.copytree(captions, tmp_path / "rows.parquet")
    assert [r.raw["captions"] for r in ParquetRecords(rows, FORM)] == [str(i) for i in range(11)]
    assert folder_of(rows, ".parquet") == rows
    assert folder_of(rows / "b.parquet", ".parquet") == rows


def test_images_beside_parquet_are_in_its_folder(captions, tmp_path):
    path = tmp_path / "mixture.yaml"
    rule = {"image_transform_args": RULES["image_transform_args"]}
    for place in ("rows", "rows/a.parquet"):
        sets = [{"name": "rows", "parquet_path": f"${{data_root}}/{place}"}]
        path.write_text(yaml.safe_dump({"text_to_image": rule | {"datasets": sets}}))
        assert load_mixture(path)[0].datasets[0].data_dir == captions


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://b/train.jsonl", "s3://b/train.jsonl: Install s3fs to access S3"),
        ("s33://b/train.jsonl", "Protocol not known: s33"),
        ("zip://a::mixture.yaml", "zip://a::mixture.yaml: File is not a zip file"),
        ("tar://a::set.zip", "tar://a::set.zip: invalid header"),
    ],
)
def test_what_a_url_needs_is_told_in_a_line(tmp_path, monkeypatch, url, message):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as opened:
        opened.writestr("a", "no tar file " * 99)
    content = {"text_only": {"datasets": [{"name": "d", "jsonl_path": url}]}}
    (path := tmp_path / "mixture.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError) as caught:
        load_mixture(path)
    assert str(caught.value) == f"{path}:3: text_only.datasets: jsonl_path {message}"


def test_images_at_a_url_that_cannot_be_read(tmp_path, monkeypatch):
    """Without its package a file may be good; a damaged member of an archive never is."""
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UnreachableError, match="^s3://b/a.png: .*Install s3fs to access S3$"):
        open_image("s3://b", ImageRef(path="a.png"))
    archive = tmp_path / "set.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("a.png", png(3))
    archive.write_bytes(archive.read_bytes().replace(b"IDAT", b"XDAT"))
    for name, text, reason in (
        ("a.png", "Bad CRC-32", "unreadable_image"),
        ("b.png", "", "missing_image"),
    ):
        with pytest.raises(ImageError, match=rf"^zip://{name}::{archive}: {text}") as caught:
            open_image(f"zip://::{archive}", ImageRef(path=name))
        assert caught.type is ImageError and reason_of(caught.value) == reason


@pytest.mark.parametrize(
    ("place", "field", "text"),
    [(6, 1, "File .* is encrypted, password required"), (8, 99, "That compression method is not")],
)
def test_members_of_archives_that_no_reader_takes(tmp_path, place, field, text):
    """One bad image each: the flag of encryption, an unknown method, in both headers."""
    with zipfile.ZipFile(archive := tmp_path / "set.zip", "w") as opened:
        opened.writestr("a.png", png(3))
    content = bytearray(archive.read_bytes())
    for start in (content.index(b"PK\3\4") + place, content.index(b"PK\1\2") + place + 2):
        content[start] = field
    archive.write_bytes(content)
    with pytest.raises(ImageError, match=rf"^zip://a.png::{archive}: {text}") as caught:
        open_image(f"zip://::{archive}", ImageRef(path="a.png"))
    assert caught.type is ImageError and reason_of(caught.value) == "unreadable_image"


def test_scans_at_a_url_and_in_parquet_are_those_on_the_disk(tmp_path):
    file = Path(get_testdata_file("CT_small.dcm", download=False))
    fsspec.filesystem("memory").pipe("/scans/a.dcm", file.read_bytes())
    fsspec.filesystem("memory").pipe("/scans/a.nii.gz", b"no matter")
    expected, size = read_image(file), image_size(file)
    there = ImageRef(path="a.dcm"), ImageRef(path="f:1: image", content=file.read_bytes())
    for ref in there:
        assert np.array_equal(open_image("memory://scans", ref), expected)
        content = NamedBytes(file.read_bytes(), ref.path)
        assert image_size(content) == size == expected.size == (128, 128)
    with pytest.raises(ImageError, match=r"^memory://scans/a.nii.gz: NIfTI is read from local"):
        read_scan(NamedBytes(b"no matter", "memory://scans/a.nii.gz"))
    with pytest.raises(ImageError, match=r"^memory://scans/a.nii.gz: NIfTI holds volumes: see"):
        open_image("memory://scans", ImageRef(path="a.nii.gz"))


def test_messages_about_bytes_name_them(tmp_path):
    """An address in memory would differ from process to process."""
    ref = ImageRef(path="f:3: image", content=b"no image")
    with pytest.raises(ImageError) as caught:
        open_image(tmp_path, ref)
    assert str(caught.value) == "f:3: image: cannot identify image file 'f:3: image'"
