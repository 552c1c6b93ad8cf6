from pathlib import Path

import pytest
import torch

from tests.helpers import write_checkpoint, write_mixture, write_pairs

LONGEST = ("test_faults", "test_backends", "test_batch", "test_end_to_end", "test_ranks")
"""Files that take minutes, the longest first: begun last, one process would wait for the other."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        found = [i for i, name in enumerate(LONGEST) if f"{name}.py" in str(item.path)]
        return found[0] if found else len(LONGEST)

    items.sort(key=place)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint folder that no test changes."""
    folder = tmp_path_factory.mktemp("shared") / "checkpoint"
    write_checkpoint(folder)
    return folder


@pytest.fixture(scope="session")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture file with one data set of five pairs that no test changes."""
    folder = tmp_path_factory.mktemp("shared") / "pairs"
    write_pairs(folder, 5)
    return write_mixture(folder / "mixture.yaml", folder)
