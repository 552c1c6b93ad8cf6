"""The Qwen2 tokenizer of a checkpoint folder and BAGEL's four special tokens."""

from dataclasses import dataclass
from pathlib import Path

from transformers import Qwen2Tokenizer

from modeling.batch import SpecialTokens

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")


@dataclass(frozen=True)
class Tokenizer:
    """Bare text <-> ids; special tokens never come out of text that spells them."""

    qwen2: Qwen2Tokenizer
    special: SpecialTokens
    size: int
    """Ids from here on lie in the padded part of the vocabulary."""

    def encode(self, text: str) -> list[int]:
        return self.qwen2.encode(text, add_special_tokens=False, split_special_tokens=True)

    def decode(self, ids: list[int]) -> str:
        return self.qwen2.decode(ids, skip_special_tokens=True)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Raises FileNotFoundError without `vocab.json`, ValueError without a special token."""
    folder = Path(folder)
    if not (folder / "vocab.json").exists() and not (folder / "tokenizer.json").exists():
        raise FileNotFoundError(f"{folder}: no tokenizer (vocab.json and merges.txt) found")
    qwen2 = Qwen2Tokenizer.from_pretrained(str(folder))
    ids = [qwen2.convert_tokens_to_ids(token) for token in SPECIAL]
    unknown = [t for t, i in zip(SPECIAL, ids, strict=True) if i is None or i == qwen2.unk_token_id]
    if unknown:
        raise ValueError(f"{folder}: the tokenizer lacks {unknown}")
    bos, eos, start, end = ids
    special = SpecialTokens(bos=bos, eos=eos, image_start=start, image_end=end)
    return Tokenizer(qwen2, special, len(qwen2))
