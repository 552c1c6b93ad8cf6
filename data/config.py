"""The data mixture: a YAML file -> GroupConfigs, every key checked.

restoration:
  weight: 1
  image_transform_args: {image_stride: 16, max_image_size: 1024, min_image_size: 512}
  vit_image_transform_args: {image_stride: 14, max_image_size: 518, min_image_size: 224}
  datasets:
    - {name: ixi_t1, jsonl_path: "${data_root}/ixi/train.jsonl", data_dir: "${data_root}/ixi"}
"""

import difflib
import math
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from .transforms import ResizeRule

TASKS = ("restoration", "MedicalImageEditingIterableDataset_ver1")
"""Names of the one task at the top level, the users' class name included."""
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
    weight: float = 1.0
    """Share of the group's samples is weight / sum of weights."""
    image_transform_args: ResizeRule
    vit_image_transform_args: ResizeRule
    datasets: tuple[DatasetConfig, ...]


def load_mixture(path: str | Path, data_root: str | Path | None = None) -> tuple[GroupConfig, ...]:
    """Reads a mixture. `${data_root}` in paths is `data_root` or the YAML file's folder.

    Raises ValueError that names the file, the key and the nearest known key.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"dataset_config_file={path}: there is no such file")
    content = _checked(str(path), read_yaml(path))
    if not content:
        raise ValueError(f"{path}: a mapping of tasks is expected")
    root = str(data_root or path.parent.resolve())
    return tuple(_group(f"{path}: {name}", group, root) for name, group in content.items())


def read_yaml(path: Path) -> Any:
    """Raises ValueError with the file and the line for what is no YAML."""
    try:
        return yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: no YAML: {error}") from error


def _checked(where: str, content: Any, kind: type | None = None) -> dict[str, Any]:
    """A copy of a mapping, whose keys must be fields of the dataclass `kind` (default: TASKS).

    Raises ValueError for an unknown key (naming the nearest) or a missing one.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{where}: a mapping is expected, not {content!r}")
    known = {f.name: f.default for f in fields(kind)} if kind else dict.fromkeys(TASKS)
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {sorted(known)}"
            raise ValueError(f"{where}: unknown key {key!r}; {hint}")
    if missing := sorted(k for k, v in known.items() if v is MISSING and k not in content):
        raise ValueError(f"{where}: missing {missing}")
    return dict(content)


def _group(where: str, content: Any, root: str) -> GroupConfig:
    group = {"weight": 1.0} | _checked(where, content, GroupConfig)
    weight, datasets = group["weight"], group["datasets"]
    positive = isinstance(weight, int | float) and 0 < weight < math.inf
    if not positive or not isinstance(datasets, list) or not datasets:
        raise ValueError(f"{where}: needs a positive weight and at least one data set")
    for key in RULES:
        rule = _checked(f"{where}.{key}", group[key], ResizeRule)
        if any(type(value) is not int for value in rule.values()):
            raise ValueError(f"{where}.{key}: whole numbers are expected, not {rule}")
        group[key] = ResizeRule(**rule)
    group["datasets"] = tuple(_dataset(f"{where}.datasets", d, root) for d in datasets)
    return GroupConfig(**group)


def _dataset(where: str, content: Any, root: str) -> DatasetConfig:
    dataset = _checked(where, content, DatasetConfig)
    used = dataset.get("num_used_data", 0)
    if not isinstance(used, int) or used < 0:
        raise ValueError(f"{where}: num_used_data={used!r} is no number of records")
    for key in ("jsonl_path", "data_dir"):
        dataset[key] = path = Path(str(dataset[key]).replace("${data_root}", root))
        if not path.exists():
            raise ValueError(f"{where}: {key} {path} does not exist")
    return DatasetConfig(**dataset)
