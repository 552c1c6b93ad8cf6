"""The data mixture: a YAML file -> GroupConfigs, every key checked.

restoration:
  weight: 1
  image_transform_args: {image_stride: 16, max_image_size: 1024, min_image_size: 512}
  vit_image_transform_args: {image_stride: 14, max_image_size: 518, min_image_size: 224}
  datasets:
    - {name: ixi_t1, jsonl_path: "${data_root}/ixi/train.jsonl", data_dir: "${data_root}/ixi"}
questions:
  task: vlm_sft
  ...
"""

import difflib
import math
from collections.abc import Hashable, Iterable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from .files import Place, existing, folder_of
from .sources import JsonlRecords, ParquetRecords, Records
from .tasks import TASKS, Task
from .tokenizer import Tokenizer
from .transforms import NO_IMAGES, RULES, ResizeRule


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    name: str
    jsonl_path: Place | None = None
    parquet_path: Place | None = None
    """A file or a folder of files, instead of jsonl_path."""
    data_dir: Place = Path()
    """Image paths of the records are relative to this folder; default in a mixture: that of the
    records."""
    num_used_data: int = 0
    """Records used (of parquet_path: files), from the top; 0 uses all."""
    weight: float = 1.0
    """Records of the set come this many times as often as others of their group."""


@dataclass(frozen=True, kw_only=True)
class GroupConfig:
    task: str = ""
    """One of TASKS; default: the name of the group."""
    weight: float = 1.0
    """Share of the group's samples is weight / sum of weights."""
    is_mandatory: bool = False
    """Every pack holds a sample of the group, unless that does not fit beside the one that has
    waited longest; it comes in a later pack then."""
    image_transform_args: ResizeRule = NO_IMAGES
    vit_image_transform_args: ResizeRule = NO_IMAGES
    shuffle_lines: bool = False
    """Lines of JSONL files are shuffled before num_used_data are taken."""
    shuffle_seed: int = 0
    datasets: tuple[DatasetConfig, ...]

    def make_task(self, tokenizer: Tokenizer) -> Task:
        return TASKS[self.task](tokenizer, self.image_transform_args, self.vit_image_transform_args)

    def open_records(self, dataset: DatasetConfig) -> Records:
        """Raises RecordError without any record, OSError for a file."""
        form, used = TASKS[self.task].form, dataset.num_used_data
        if dataset.parquet_path is not None:
            return ParquetRecords(dataset.parquet_path, form, used)
        seed = self.shuffle_seed if self.shuffle_lines else None
        return JsonlRecords(dataset.jsonl_path or "", form, used, seed)


def load_mixture(path: str | Path, data_root: str | Path | None = None) -> tuple[GroupConfig, ...]:
    """Reads a mixture. `${data_root}` in paths is `data_root` or the YAML file's folder.

    Raises ValueError that names the file, the line, the key and the nearest known key.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"dataset_config_file={path}: there is no such file")
    content = read_yaml(path, LinedLoader)
    if not isinstance(content, Lined) or not content:
        raise ValueError(f"{path}: a mapping of tasks is expected")
    root = str(data_root or path.parent.resolve())
    return tuple(
        _group(f"{path}:{content.lines.get(str(name), 1)}: {name}", str(name), group, root)
        for name, group in content.items()
    )


def read_yaml(path: Path, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """Raises ValueError with the file and the line for what is no YAML."""
    try:
        return yaml.load(path.read_text("utf-8"), loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: no YAML: {error}") from error


class Lined(dict[Hashable, Any]):
    """A mapping that knows the lines of its keys."""

    lines: dict[str, int]


class LinedLoader(yaml.SafeLoader):
    """Refuses keys that stand twice: the later would win unseen."""

    def construct_yaml_map(self, node: yaml.MappingNode) -> Any:
        found = Lined()
        found.lines = {}
        yield found
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if line := found.lines.get(key.value):
                text = f"{key.value!r} stands in line {line} already"
                raise yaml.constructor.ConstructorError(None, None, text, key.start_mark)
            found.lines[key.value] = key.start_mark.line + 1
        found.update(self.construct_mapping(node))


LinedLoader.add_constructor("tag:yaml.org,2002:map", LinedLoader.construct_yaml_map)


def at_line(where: str, content: Lined, key: str) -> str:
    """`where` is `file:line: keys`; the same with the line of that key."""
    file, _, keys = where.rpartition(": ")
    line = content.lines.get(key)
    return f"{file.rpartition(':')[0]}:{line}: {keys}" if line else where


def checked(where: str, content: Any, kind: type) -> dict[str, Any]:
    """A copy of a mapping, whose keys must be fields of the dataclass `kind`.

    Raises ValueError for an unknown key (naming the nearest), a missing one or another type.
    """
    if not isinstance(content, Lined):
        raise ValueError(f"{where}: a mapping is expected, not {content!r}")
    types: dict[str, Any] = {f.name: f.type for f in fields(kind)}
    for key, value in content.items():
        here = at_line(where, content, str(key))
        if key not in types:
            raise ValueError(f"{here}: unknown key {key!r}; {nearest(str(key), types)}")
        require_type(f"{here}: {key}={value!r}", value, types[str(key)])
    needed = [f.name for f in fields(kind) if f.default is MISSING]
    if missing := sorted({*needed} - {*content}):
        raise ValueError(f"{where}: missing {missing}")
    return {str(key): value for key, value in content.items()}


def require_type(where: str, value: Any, wanted: Any) -> None:
    """Raises ValueError; numbers that are measures must be positive, whole ones not negative."""
    if wanted not in (bool, int, float, str):
        return
    good = isinstance(value, int | float) if wanted is float else isinstance(value, wanted)
    if not good or isinstance(value, bool) != (wanted is bool):
        raise ValueError(f"{where} is no {wanted.__name__}")
    if wanted is float and not 0 < value < math.inf:
        raise ValueError(f"{where} must be positive and finite")
    if wanted is int and value < 0:
        raise ValueError(f"{where} is negative")


def nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known are {sorted(known)}"


def _group(where: str, name: str, content: Any, root: str) -> GroupConfig:
    own = isinstance(content, Lined) and "task" in content
    task = content["task"] if own else name
    if not isinstance(task, str) or task not in TASKS:
        here, what = (at_line(where, content, "task"), "task") if own else (where, "key")
        raise ValueError(
            f"{here}: unknown {what} {task!r}; {nearest(str(task), TASKS)} "
            "(a group of another name needs `task:`)"
        )
    group = checked(where, content, GroupConfig) | {"task": task}
    if missing := [rule for rule in TASKS[task].rules if rule not in group]:
        raise ValueError(f"{where}: missing {missing}")
    for key in RULES:
        if key in group:
            here = f"{at_line(where, content, key)}.{key}"
            rule = checked(here, group[key], ResizeRule)
            try:
                group[key] = ResizeRule(**rule)
            except ValueError as error:
                raise ValueError(f"{here}: {error}") from error
    if not isinstance(group["datasets"], list) or not group["datasets"]:
        raise ValueError(f"{where}: needs at least one data set")
    group["datasets"] = tuple(
        _dataset(f"{where}.datasets", dataset, root) for dataset in group["datasets"]
    )
    return GroupConfig(**group)


def _dataset(where: str, content: Any, root: str) -> DatasetConfig:
    dataset = checked(where, content, DatasetConfig)
    where = at_line(where, content, "name")
    if ("jsonl_path" in dataset) == ("parquet_path" in dataset):
        raise ValueError(f"{where}: needs jsonl_path or parquet_path")
    for key in (key for key in ("jsonl_path", "parquet_path", "data_dir") if key in dataset):
        try:
            dataset[key] = existing(str(dataset[key]).replace("${data_root}", root))
        except (ValueError, OSError) as error:
            raise ValueError(f"{at_line(where, content, key)}: {key} {error}") from error
    suffix = ".parquet" if "parquet_path" in dataset else ""
    folder = folder_of(dataset.get("jsonl_path") or dataset["parquet_path"], suffix)
    return DatasetConfig(**{"data_dir": folder} | dataset)
