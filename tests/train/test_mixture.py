"""A mixture of five data sets, of several tasks and kinds of files, trains the tiny model."""

import io
import json
import math
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from PIL import Image

from tests.faulty import ended
from tests.helpers import RULES, run_arguments, write_pairs
from train.build import build_trainer

STEPS = 6
NAMES = ("ct", "mr", "captions", "questions", "texts")


@pytest.fixture(scope="module")
def five_sets(tmp_path_factory) -> Path:
    """The mixture; the clean image of one `mr` record is damaged, one line of `texts` is bad."""
    root = tmp_path_factory.mktemp("root")
    write_pairs(root / "ct", 4)
    write_pairs(root / "mr", 3)
    (root / "mr" / "images" / "0_clean.png").write_bytes(b"no image")
    rows: dict[str, list[object]] = {"image": [], "captions": []}
    for grey in range(6):
        file = io.BytesIO()
        Image.new("L", (16, 16), 40 * grey).save(file, "PNG")
        rows["image"].append(file.getvalue())
        rows["captions"].append(json.dumps({"short": "Grey.", "long": f"Grey {grey}."}))
    pyarrow.parquet.write_table(pyarrow.table(rows), root / "captions.parquet", row_group_size=2)
    said = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "Noise."}]
    texts = [json.dumps({"conversations": said})] * 3
    (root / "texts.jsonl").write_text("\n".join([*texts, "{oops"]))
    vae, vit = RULES.items()
    content = {
        "MedicalImageEditingIterableDataset_ver1": {
            "weight": 2,
            "is_mandatory": True,
            **RULES,
            "datasets": [
                {
                    "name": name,
                    "jsonl_path": f"${{data_root}}/{name}/train.jsonl",
                    "data_dir": f"${{data_root}}/{name}",
                    "weight": weight,
                }
                for name, weight in (("ct", 1), ("mr", 1.5))
            ],
        },
        "t2i_pretrain": {
            vae[0]: vae[1],
            "datasets": [{"name": "captions", "parquet_path": "${data_root}/captions.parquet"}],
        },
        "asked": {
            "task": "vqa_reconstruction",
            "shuffle_lines": True,
            "shuffle_seed": 1,
            **RULES,
            "datasets": [
                {
                    "name": "questions",
                    "jsonl_path": "${data_root}/ct/train.jsonl",
                    "num_used_data": 3,
                }
            ],
        },
        "text_only": {"datasets": [{"name": "texts", "jsonl_path": "${data_root}/texts.jsonl"}]},
    }
    (root / "mixture.yaml").write_text(yaml.safe_dump(content))
    return root / "mixture.yaml"


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_five_data_sets_train(checkpoint, five_sets, tmp_path):
    sizes = {"expected_num_tokens": 500, "max_num_tokens": 600, "max_bad_share": 0.9}
    args = run_arguments(checkpoint, five_sets, tmp_path / "run", total_steps=STEPS, **sizes)
    trainer = build_trainer(args)
    trainer.fit()
    *_, last = lines(tmp_path / "run")
    assert all(math.isfinite(last[name]) for name in ("ce", "mse", "total_norm"))
    assert {name: last[f"samples/{name}"] for name in NAMES} == trainer.loader.counts
    assert all(last[f"samples/{name}"] > 0 for name in NAMES)
    skipped = {k.removeprefix("skipped/"): n for k, n in last.items() if k.startswith("skipped/")}
    assert skipped == trainer.loader.skipped
    assert {*skipped} == {"mr/unreadable_image", "texts/bad_record"}
    folder = tmp_path / "run" / f"{STEPS:07d}"
    rules = json.loads((folder / "preprocessor_config.json").read_text())
    assert {name: rules[name]["image_stride"] for name in RULES} == {
        name: rule["image_stride"] for name, rule in RULES.items()
    }


def test_ranks_skip_and_count_together(checkpoint, five_sets, tmp_path):
    """Two processes, stopped and continued by one: the counts are those of one process alone."""
    sizes = {"expected_num_tokens": 300, "max_num_tokens": 400, "max_bad_share": 0.9}
    common, alone, pair = (checkpoint, five_sets), tmp_path / "alone", tmp_path / "pair"
    both = {"gradient_accumulation_steps": 1, "num_shard": 2}
    codes, texts = ended(common, pair, ranks=2, total_steps=3, save_every=3, **both, **sizes)
    assert codes == [0, 0], texts
    kept = {"gradient_accumulation_steps": 2, "total_steps": 4, "save_every": 3}
    for folder in (pair, alone):
        build_trainer(run_arguments(*common, folder, **kept, **sizes)).fit()
    totals = []
    for folder in (pair, alone):
        totals.append(
            [
                Counter({k: n for k, n in line.items() if k.startswith(("skipped/", "samples/"))})
                for line in lines(folder)
            ]
        )
    assert totals[0] == totals[1] and totals[0][2]["skipped/mr/unreadable_image"] > 0
    states = [json.loads((f / "0000003/trainer_state.json").read_text()) for f in (pair, alone)]
    assert states[0]["loader"] == states[1]["loader"]


def test_too_many_bad_images_end_all_ranks(checkpoint, five_sets, tmp_path):
    """A third of the `mr` images is damaged; no rank waits for the other."""
    sizes = {"expected_num_tokens": 300, "max_num_tokens": 400, "max_bad_share": 0.1}
    common, quick = (checkpoint, five_sets), {"total_steps": 200, "num_shard": 2}
    codes, texts = ended(common, tmp_path / "run", ranks=2, **quick, **sizes)
    assert 0 not in codes
    told = "samples cannot be used, more than max_bad_share=0.1: "
    assert any(told in text and "first " in text for text in texts), texts
