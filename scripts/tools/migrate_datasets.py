"""A fork's DATASET_INFO and its YAML -> a mixture file.

python scripts/tools/migrate_datasets.py --dataset_info dataset_info.py \\
  --dataset_config_file OLD.yaml --output MIXTURE.yaml

The Python file is read, not run. Ends with 0, or with 2 and what cannot be translated.
"""

import argparse
import ast
import copy
import math
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from data.config import (  # noqa: E402
    Lined,
    LinedLoader,
    at_line,
    checked,
    load_mixture,
    nearest,
    read_yaml,
    require_type,
)
from data.tasks import TASKS, VAE_RULE, VIT_RULE  # noqa: E402
from data.transforms import RULES, ResizeRule  # noqa: E402

TABLE = "DATASET_INFO"
DATA_ROOT = "${data_root}"
PATHS = ("jsonl_path", "parquet_path", "data_dir")
LEFT_OUT = {
    "frame_sampler_args": "videos are not read",
    "resume_data_status": "a run that is continued always goes on where the data were",
}


@dataclass
class Entry:
    """A data set in DATASET_INFO."""

    data_dir: str = ""
    jsonl_path: str = ""
    num_total_samples: int = 0
    num_files: int = 0
    parquet_info_path: str = ""


@dataclass
class Group:
    """What stands under a class in the YAML; values by group are mappings."""

    dataset_names: Any
    weight: Any = 1
    num_used_data: Any = 0
    is_mandatory: bool = False
    image_transform_args: Any = None
    vit_image_transform_args: Any = None
    shuffle_lines: bool = False
    shuffle_seed: int = 0
    frame_sampler_args: Any = None
    resume_data_status: bool = True


def read_table(path: Path) -> Lined:
    """The dict literal DATASET_INFO. Raises ValueError for names that stand twice and for code."""
    body = ast.parse(path.read_text(), str(path)).body
    names = {node: [n.id for n in ast.walk(node) if isinstance(n, ast.Name)] for node in body}
    found = [node for node in body if TABLE in names[node]]
    value, twice = getattr(found[0], "value", None) if found else None, list[str]()
    if len(found) != 1 or not isinstance(value, ast.Dict):
        lines = [node.lineno for node in found]
        raise ValueError(f"{path}: one dict literal {TABLE} is expected; lines with it: {lines}")
    try:
        table = _lined(value, twice)
    except ValueError as error:
        raise ValueError(f"{path}: {TABLE} is read, not run: {error}") from error
    if twice:
        raise ValueError("\n".join(f"{path}:{text}" for text in twice))
    return table


def _lined(node: ast.expr, twice: list[str]) -> Any:
    """A literal whose mappings know the lines of their keys; `twice` gets those that repeat."""
    if not isinstance(node, ast.Dict):
        try:
            return ast.literal_eval(node)
        except ValueError as error:
            raise ValueError(f"line {node.lineno} is no literal") from error
    table = Lined()
    table.lines = {}
    for key, value in zip(node.keys, node.values, strict=True):
        if not isinstance(key, ast.Constant):  # None stands for **
            raise ValueError(f"line {value.lineno} is no literal")
        name = key.value
        if line := table.lines.get(name):
            text = f"{value.lineno}: {name!r} stands in line {line} already: remove one of them"
            twice.append(text)
        table[name], table.lines[name] = _lined(value, twice), value.lineno
    return table


def translate(info: Path, config: Path, old_root: str) -> tuple[dict[str, Any], list[str]]:
    """The mixture and what was left out; raises ValueError with file and line."""
    table, content = read_table(info), read_yaml(config, LinedLoader)
    if not isinstance(content, Lined):
        raise ValueError(f"{config}: a mapping of classes is expected")
    mixture: dict[str, Any] = {}
    notes: list[str] = []
    for name, values in ((str(key), values) for key, values in content.items()):
        where = f"{config}:{content.lines[name]}: {name}"
        for known, holder in ((TASKS, "tasks"), (table, str(info))):
            if name not in known:
                raise ValueError(f"{where}: not among the {holder}; {nearest(name, known)}")
        group = checked(where, values, Group)
        for key in {*RULES} & {*group}:
            group[key] = checked(f"{at_line(where, values, key)}.{key}", group[key], ResizeRule)
        for key, why in LEFT_OUT.items():
            notes += [f"left out: {where}: {key}: {why}"] if group.pop(key, None) else []
        if TASKS[name].rules == (VIT_RULE,) and VAE_RULE in group and VIT_RULE not in group:
            group[VIT_RULE] = group.pop(VAE_RULE)
            notes.append(f"{where}: {VAE_RULE} is written as {VIT_RULE}: its images are the ViT's")
        for part, own in _parts(where, name, group):
            rows = zip(own.pop("dataset_names"), own.pop("num_used_data"), strict=True)
            sets = [_dataset(where, n, used, info, table[name]) for n, used in rows]
            if own["weight"]:
                mixture[part] = {"task": name} | own | {"datasets": sets}
            else:
                notes.append(f"left out: {where}: {part} has weight 0")
    sets = [dataset for group in mixture.values() for dataset in group["datasets"]]
    paths = [d[key] for d in sets for key in PATHS if key in d and "://" not in d[key]]
    if not old_root and len({Path(path).is_absolute() for path in paths}) > 1:
        raise ValueError(f"{info}: some paths are absolute, some are not: name --old_root")
    root = old_root or os.path.commonpath([str(Path(path).parent) for path in paths] or [""])
    for dataset in sets:
        dataset |= {key: _moved(dataset[key], root) for key in PATHS if key in dataset}
    return mixture, [*notes, f"{DATA_ROOT} stands for {root}"]


def _parts(where: str, name: str, group: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """A class with several groups -> each of them, with the values that are its own."""
    names = group["dataset_names"]
    for part in names if isinstance(names, dict) else [""]:
        own = {"weight": 1, "num_used_data": 0} | copy.deepcopy(group)
        for key in ("dataset_names", "weight", "num_used_data"):
            if isinstance(own[key], dict):
                if part not in own[key]:
                    raise ValueError(f"{where}: {key} has no entry for {part!r}")
                own[key] = own[key][part]
        if not isinstance(own["dataset_names"], list):
            raise ValueError(f"{where}: dataset_names must be lists")
        if twice := [n for n, times in Counter(own["dataset_names"]).items() if times > 1]:
            raise ValueError(f"{where}: dataset_names holds {', '.join(map(str, twice))} twice")
        count, used = len(own["dataset_names"]), own["num_used_data"]
        own["num_used_data"] = used if isinstance(used, list) else [used] * count
        if len(own["num_used_data"]) != count:
            raise ValueError(f"{where}: num_used_data {used} for {count} dataset_names")
        for rows in own["num_used_data"]:
            require_type(f"{where}: num_used_data={rows!r}", rows, int)
        if own["weight"] != 0:  # left out later
            require_type(f"{where}: weight={own['weight']!r}", own["weight"], float)
        yield f"{name}/{part}" if part else name, own


def _dataset(where: str, name: str, used: int, info: Path, known: Lined) -> dict[str, Any]:
    if name not in known:
        raise ValueError(f"{where}: {name!r} is not in {info}; {nearest(name, map(str, known))}")
    here = f"{info}:{known.lines[name]}: {name}"
    entry = checked(here, known[name], Entry)
    if not {"jsonl_path", "data_dir"} & {*entry}:
        raise ValueError(f"{here}: needs jsonl_path or data_dir")
    if "jsonl_path" not in entry:
        entry["parquet_path"] = entry.pop("data_dir")
    kept = {"name": name} | {key: entry[key] for key in PATHS if key in entry}
    return kept | ({"num_used_data": used} if used else {})


def write(mixture: dict[str, Any], output: Path) -> None:
    """Raises ValueError where the loader would refuse the mixture, whose files may be elsewhere."""
    present = copy.deepcopy(mixture)
    for dataset in (dataset for group in present.values() for dataset in group["datasets"]):
        dataset |= {key: str(output) for key in PATHS if key in dataset}
    # The loader's messages have lines of the file, which stays: the same in both.
    try:
        output.write_text(_yaml(present))
        load_mixture(output)
    finally:
        output.write_text(_yaml(mixture))


def _yaml(mixture: dict[str, Any]) -> str:
    return yaml.safe_dump(mixture, sort_keys=False, allow_unicode=True, width=math.inf)


def _moved(path: str, root: str) -> str:
    inside = "://" not in path and Path(path).is_relative_to(root)
    return f"{DATA_ROOT}/{Path(path).relative_to(root)}" if inside else path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--dataset_info", type=Path, required=True, help="Python file with the dict DATASET_INFO")
    add("--dataset_config_file", type=Path, required=True, help="the YAML that went with it")
    add("--output", type=Path, required=True, help="mixture file to write")
    add("--old_root", default="", help=f"what {DATA_ROOT} stands for (default: longest in common)")
    args = parser.parse_args(argv)
    try:
        mixture, notes = translate(args.dataset_info, args.dataset_config_file, args.old_root)
        write(mixture, args.output)
    except (ValueError, SyntaxError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(*notes, f"{len(mixture)} groups: {args.output}", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
