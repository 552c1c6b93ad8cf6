"""The data mixture: a YAML file -> MixtureConfig, every key checked.

restoration:
  weight: 1
  image_transform_args: {image_stride: 16, max_image_size: 1024, min_image_size: 512}
  vit_image_transform_args: {image_stride: 14, max_image_size: 518, min_image_size: 224}
  datasets:
    - {name: ixi_t1, jsonl_path: "${data_root}/ixi/train.jsonl", data_dir: "${data_root}/ixi"}
"""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .transforms import ResizeRule

TASKS = {"restoration": "restoration", "MedicalImageEditingIterableDataset_ver1": "restoration"}
"""Task names of the top level, the users' class name included."""
RULES = ("image_transform_args", "vit_image_transform_args")
"""Keys of the resize rules: of the autoencoder's and of the ViT's images."""


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    name: str
    jsonl_path: Path
    data_dir: Path
    """Image paths of the JSONL file are relative to this folder."""
    num_used_data: int = 0
    """Records used, from the top; 0 uses all."""


@dataclass(frozen=True, kw_only=True)
class GroupConfig:
    task: str
    weight: float
    """Share of the group's samples is weight / sum of weights."""
    image_transform_args: ResizeRule
    vit_image_transform_args: ResizeRule
    datasets: tuple[DatasetConfig, ...]


@dataclass(frozen=True)
class MixtureConfig:
    groups: tuple[GroupConfig, ...]


def load_mixture(path: str | Path, data_root: str | Path | None = None) -> MixtureConfig:
    """Reads a mixture. `${data_root}` in paths is `data_root` or the YAML file's folder.

    Raises ValueError that names the file, the key and the nearest known key.
    """
    path = Path(path)
    content = yaml.safe_load(path.read_text())
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path}: a mapping of tasks is expected")
    _check_keys(str(path), content, set(), set(TASKS))
    root = str(data_root or path.parent.resolve())
    groups = (_group(f"{path}: {name}", name, group, root) for name, group in content.items())
    return MixtureConfig(tuple(groups))


def _check_keys(where: str, found: Any, required: set[str], optional: set[str]) -> None:
    """Raises ValueError for an unknown key (naming the nearest) or a missing one."""
    if not isinstance(found, dict):
        raise ValueError(f"{where}: a mapping is expected, not {found!r}")
    known = required | optional
    for key in found:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {sorted(known)}"
            raise ValueError(f"{where}: unknown key {key!r}; {hint}")
    if missing := required - set(found):
        raise ValueError(f"{where}: missing {sorted(missing)}")


def _group(where: str, name: str, group: Any, root: str) -> GroupConfig:
    _check_keys(where, group, {*RULES, "datasets"}, {"weight"})
    sizes = {"image_stride", "max_image_size", "min_image_size"}
    for key in RULES:
        _check_keys(f"{where}.{key}", group[key], sizes, {"max_pixels"})
    rules = {key: ResizeRule(**group[key]) for key in RULES}
    weight = float(group.get("weight", 1.0))
    if weight <= 0 or not group["datasets"]:
        raise ValueError(f"{where}: needs a positive weight and at least one data set")
    datasets = tuple(_dataset(f"{where}.datasets", d, root) for d in group["datasets"])
    return GroupConfig(task=TASKS[name], weight=weight, datasets=datasets, **rules)


def _dataset(where: str, content: Any, root: str) -> DatasetConfig:
    _check_keys(where, content, {"name", "jsonl_path", "data_dir"}, {"num_used_data"})
    used = content.get("num_used_data", 0)
    if not isinstance(used, int) or used < 0:
        raise ValueError(f"{where}: num_used_data={used!r} is no number of records")
    paths = {}
    for key in ("jsonl_path", "data_dir"):
        paths[key] = Path(str(content[key]).replace("${data_root}", root))
        if not paths[key].exists():
            raise ValueError(f"{where}: {key} {paths[key]} does not exist")
    return DatasetConfig(name=content["name"], num_used_data=used, **paths)
