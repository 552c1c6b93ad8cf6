"""A fork's DATASET_INFO and YAML -> a mixture that loads, or an error with file and line."""

import json
import re
from pathlib import Path

import pytest

from data.config import load_mixture
from data.transforms import ResizeRule
from scripts.tools.migrate_datasets import main

TABLE = """import os  # not run: {boom}
raise SystemExit("this file was run")
DATASET_INFO = {{
    "MedicalImageEditingIterableDataset_ver1": {{
        "ixi_t1": {{
            "data_dir": "{root}/ixi", "jsonl_path": "{root}/ixi/train.jsonl",
            "num_total_samples": 3,
        }},
        "eyeq": {{"data_dir": "{root}/eyeq", "jsonl_path": "{root}/lists/eyeq.jsonl"}},
    }},
    "SftJSONLIterableDataset_TextOnly": {{"talk": {{"jsonl_path": "{root}/lists/talk.jsonl"}}}},
    "unified_edit": {{
        "edits": {{"data_dir": "{root}/parquet", "num_files": 1, "num_total_samples": 9,
                   "parquet_info_path": "{root}/parquet_info.json"}},
    }},
}}
"""
RULES = """
  image_transform_args: {image_stride: 16, max_image_size: 1024, min_image_size: 128}
  vit_image_transform_args: {image_stride: 14, max_image_size: 518, min_image_size: 224}
"""
CONFIG = f"""MedicalImageEditingIterableDataset_ver1:
  dataset_names: {{t1: [ixi_t1], eyes: [eyeq]}}
  weight: {{t1: 3, eyes: 0.5}}
  num_used_data: {{t1: [2], eyes: [0]}}
  is_mandatory: true
  shuffle_lines: true
  shuffle_seed: 7
  resume_data_status: true{RULES}
SftJSONLIterableDataset_TextOnly:
  dataset_names: [talk]
  weight: 2
unified_edit:
  dataset_names: [edits]
  num_used_data: [1]
  frame_sampler_args: {{max_num_frames: 8, min_num_frames: 2}}{RULES}"""


def written(folder: Path, table: str = TABLE, config: str = CONFIG) -> tuple[Path, Path]:
    info, old = folder / "dataset_info.py", folder / "old.yaml"
    info.write_text(table.format(root=folder / "cluster", boom=folder))
    old.write_text(config)
    return info, old


def migrated(folder: Path, *more: str) -> tuple[int, Path]:
    arguments = {
        "--dataset_info": folder / "dataset_info.py",
        "--dataset_config_file": folder / "old.yaml",
        "--output": folder / "mixture.yaml",
    }
    listed = [str(part) for pair in arguments.items() for part in pair]
    return main([*listed, *more]), folder / "mixture.yaml"


def test_the_mixture_loads_from_another_root(tmp_path, capsys):
    written(tmp_path)
    status, mixture = migrated(tmp_path)
    assert status == 0 and str(tmp_path) not in mixture.read_text()
    assert not re.search(r": [&*]", mixture.read_text())  # every group says all of its own
    moved = tmp_path / "moved"
    for name in ("ixi/train.jsonl", "lists/eyeq.jsonl", "lists/talk.jsonl", "parquet/0.parquet"):
        (moved / name).parent.mkdir(parents=True, exist_ok=True)
        (moved / name).write_text(json.dumps({}))
    (moved / "eyeq").mkdir()
    t1, eyes, talk, edits = load_mixture(mixture, moved)
    assert {g.task for g in (t1, eyes)} == {"MedicalImageEditingIterableDataset_ver1"}
    assert (t1.weight, eyes.weight, talk.weight, edits.weight) == (3, 0.5, 2, 1)
    assert t1.is_mandatory and t1.shuffle_lines and t1.shuffle_seed == 7
    assert not talk.is_mandatory and not talk.shuffle_lines
    rule = ResizeRule(image_stride=16, max_image_size=1024, min_image_size=128)
    assert t1.image_transform_args == eyes.image_transform_args == edits.image_transform_args
    assert t1.image_transform_args == rule and t1.vit_image_transform_args.image_stride == 14
    sets = [group.datasets[0] for group in (t1, eyes, talk, edits)]
    assert [d.name for d in sets] == ["ixi_t1", "eyeq", "talk", "edits"]
    assert [d.num_used_data for d in sets] == [2, 0, 0, 1]
    assert [d.jsonl_path for d in sets] == [
        moved / "ixi" / "train.jsonl",
        moved / "lists" / "eyeq.jsonl",
        moved / "lists" / "talk.jsonl",
        None,
    ]
    assert [d.data_dir for d in sets[:2]] == [moved / "ixi", moved / "eyeq"]
    assert sets[3].parquet_path == moved / "parquet"
    told = capsys.readouterr().out
    old = tmp_path / "old.yaml"
    assert f"left out: {old}:1: MedicalImageEditingIterableDataset_ver1: resume_data_sta" in told
    assert f"left out: {old}:15: unified_edit: frame_sampler_args: videos are not read" in told
    assert f"stands for {tmp_path / 'cluster'}\n" in told


def test_the_image_rule_of_the_vit_alone_becomes_its_own(tmp_path, capsys):
    """As in the released model's file, where questions have no other."""
    rule = "{image_stride: 14, max_image_size: 980, min_image_size: 378, max_pixels: 2_007_040}"
    written(
        tmp_path,
        TABLE.replace("SftJSONLIterableDataset_TextOnly", "vlm_sft"),
        f"vlm_sft:\n  dataset_names: [talk]\n  image_transform_args: {rule}\n",
    )
    status, mixture = migrated(tmp_path)
    told, old = capsys.readouterr().out, tmp_path / "old.yaml"
    assert status == 0
    assert f"{old}:1: vlm_sft: image_transform_args is written as vit_image_transform_args" in told
    assert "image_transform_args" not in mixture.read_text().replace("vit_image", "")
    (tmp_path / "talk.jsonl").write_text("{}")
    (group,) = load_mixture(mixture, tmp_path)
    assert group.vit_image_transform_args == ResizeRule(
        image_stride=14, max_image_size=980, min_image_size=378, max_pixels=2_007_040
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  vit_image_transform_args", "  # ", "missing ['vit_image_transform_args']"),
        ("min_image_size: 128", "min_image_size: 2048", "image sizes must satisfy"),
        ("[talk]", "[]", "SftJSONLIterableDataset_TextOnly: needs at least one data set"),
    ],
)
def test_what_the_loader_would_refuse_is_told_with_its_line(tmp_path, capsys, old, new, message):
    written(tmp_path, config=CONFIG.replace(old, new, 1))
    status, mixture = migrated(tmp_path)
    found = re.search(rf"^error: {mixture}:(\d+): (.*)\n$", capsys.readouterr().err)
    assert status == 2 and found and message in found[2]
    line = mixture.read_text().splitlines()[int(found[1]) - 1]
    assert line.strip().rstrip(":") in found[2] and "${data_root}/ixi" in mixture.read_text()


def test_an_old_root_keeps_what_lies_outside(tmp_path):
    written(tmp_path)
    _, mixture = migrated(tmp_path, "--old_root", str(tmp_path / "cluster" / "ixi"))
    text = mixture.read_text()
    assert "${data_root}/train.jsonl" in text
    assert f"jsonl_path: {tmp_path / 'cluster'}/lists/eyeq.jsonl" in text


def test_a_group_of_weight_zero_is_left_out(tmp_path, capsys):
    written(tmp_path, config=CONFIG.replace("eyes: 0.5", "eyes: 0"))
    status, mixture = migrated(tmp_path)
    assert status == 0 and "eyeq" not in mixture.read_text() and "ixi" in mixture.read_text()
    assert "MedicalImageEditingIterableDataset_ver1/eyes has weight 0" in capsys.readouterr().out


def test_every_name_that_stands_twice_is_told_with_both_lines(tmp_path, capsys):
    line = (
        '        "ixi_t1": {{"jsonl_path": "elsewhere", "jsonl_path": "here"}},\n    }},\n    "Sft'
    )
    info, _ = written(tmp_path, table=TABLE.replace('    }},\n    "Sft', line))
    status, mixture = migrated(tmp_path)
    told = capsys.readouterr().err
    assert status == 2 and not mixture.exists()
    assert f"{info}:10: 'ixi_t1' stands in line 5 already: remove one of them" in told
    assert f"{info}:10: 'jsonl_path' stands in line 10 already" in told


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        (
            "old.yaml",
            "weight: 2",
            "wieght: 2",
            "old.yaml:14: SftJSONLIterableDataset_TextOnly: unknown key 'wieght'; did you mean",
        ),
        (
            "old.yaml",
            "{image_stride",
            "{image_strid",
            "_ver1.image_transform_args: unknown key 'image_strid'; did you mean 'image_stride'?",
        ),
        ("old.yaml", "weight: 2", "weight: 2\n  weight: 3", "'weight' stands in line 14 already"),
        (
            "old.yaml",
            "unified_edit",
            "unified_edits",
            "old.yaml:15: unified_edits: not among the tasks; did you mean 'unified_edit'?",
        ),
        ("old.yaml", "unified_edit", "edit_sequence", "old.yaml:15: edit_sequence: not among the "),
        ("old.yaml", "[talk]", "[talks]", "'talks' is not in "),
        ("old.yaml", "[talk]", "talk", "SftJSONLIterableDataset_TextOnly: dataset_names must be"),
        ("old.yaml", "unified_edit", "7", "old.yaml:15: 7: not among the tasks; known are ["),
        (
            "old.yaml",
            "[1]",
            "[1, 2]",
            "old.yaml:15: unified_edit: num_used_data [1, 2] for 1 dataset_names",
        ),
        ("old.yaml", "t1: 3, ", "", "_ver1: weight has no entry for 't1'"),
        ("old.yaml", "is_mandatory: true", "is_mandatory: 1", "_ver1: is_mandatory=1 is no bool"),
        (
            "dataset_info.py",
            '"num_files"',
            '"num_file"',
            "_info.py:13: edits: unknown key 'num_file'; did you mean 'num_files'?",
        ),
        (
            "dataset_info.py",
            '"num_files": 1',
            '"num_files": len("x")',
            "DATASET_INFO is read, not run: line 13 is no literal",
        ),
        (
            "dataset_info.py",
            '"eyeq": {',
            '**more, "eyeq": {',
            "DATASET_INFO is read, not run: line 9 is no literal",
        ),
        (
            "dataset_info.py",
            "DATASET_INFO =",
            "INFO =",
            "one dict literal DATASET_INFO is expected; lines with it: []",
        ),
        (
            "dataset_info.py",
            "DATASET_INFO =",
            "DATASET_INFO = {}\nDATASET_INFO =",
            "lines with it: [3, 4]",
        ),
        ("dataset_info.py", "DATASET_INFO =", "DATASET_INFO =)", "dataset_info.py, line 3"),
    ],
)
def test_what_cannot_be_translated_is_named(tmp_path, capsys, file, old, new, message):
    written(tmp_path)
    text = (tmp_path / file).read_text()
    assert old in text
    (tmp_path / file).write_text(text.replace(old, new, 1))
    status, mixture = migrated(tmp_path)
    assert status == 2 and not mixture.exists()
    assert message in capsys.readouterr().err
