"""The Qwen2 tokenizer of a checkpoint folder and BAGEL's four special tokens."""

from pathlib import Path

from transformers import Qwen2Tokenizer

from modeling.batch import SpecialTokens

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")


class Tokenizer:
    """Bare text <-> ids; special tokens never come out of text that spells them."""

    def __init__(self, folder: str | Path) -> None:
        """Raises FileNotFoundError without `vocab.json`, ValueError for damaged files and without a
        special token."""
        if not any((Path(folder) / name).exists() for name in ("vocab.json", "tokenizer.json")):
            raise FileNotFoundError(f"{folder}: no tokenizer (vocab.json and merges.txt) found")
        try:
            self.qwen2 = Qwen2Tokenizer.from_pretrained(str(folder))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder}: the tokenizer's files are damaged: {error!r}") from error
        ids = {token: self.qwen2.convert_tokens_to_ids(token) for token in SPECIAL}
        if unknown := [t for t, i in ids.items() if i in (None, self.qwen2.unk_token_id)]:
            raise ValueError(f"{folder}: the tokenizer lacks {unknown}")
        bos, eos, start, end = ids.values()
        self.special = SpecialTokens(bos=bos, eos=eos, image_start=start, image_end=end)
        self.size = len(self.qwen2)
        """Ids from here on lie in the padded part of the vocabulary."""

    def encode(self, text: str) -> list[int]:
        return self.qwen2.encode(text, add_special_tokens=False, split_special_tokens=True)

    def decode(self, ids: list[int]) -> str:
        return self.qwen2.decode(ids, skip_special_tokens=True)
