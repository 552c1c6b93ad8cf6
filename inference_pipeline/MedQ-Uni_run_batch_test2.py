"""Batch restoration with the resize rules of the users' second script; see `batch.py`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from inference_pipeline.batch import main  # noqa: E402
from inference_pipeline.results import command  # noqa: E402

if __name__ == "__main__":
    command(main)
