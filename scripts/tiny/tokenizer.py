"""Byte-level Qwen2 tokenizer of the tiny model: 256 bytes, a few merges, the special tokens."""

import json
import tempfile
from pathlib import Path

from tokenizers import ByteLevelBPETokenizer
from transformers import Qwen2Tokenizer

from data.tokenizer import SPECIAL

MERGES = 160
VOCABULARY = 512
"""Rows of the embedding; ids beyond the tokenizer are padding, as in the released model."""


def write_tokenizer(texts: list[str], folder: Path) -> None:
    """Trains the merges on `texts` and writes the files that `Tokenizer` reads."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(sorted(set(texts)), vocab_size=256 + MERGES, min_frequency=1)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        bpe.save_model(scratch)
        vocab = json.loads((Path(scratch) / "vocab.json").read_text())
        lines = (Path(scratch) / "merges.txt").read_text().splitlines()[1:]
    tokenizer = Qwen2Tokenizer(
        vocab=vocab,
        merges=[tuple(line.split(" ")) for line in lines],
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        extra_special_tokens=list(SPECIAL),
    )
    tokenizer.save_pretrained(folder)
