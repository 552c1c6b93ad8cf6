from pathlib import Path

import pytest
import torch

from tests.helpers import write_checkpoint, write_mixture, write_pairs


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
