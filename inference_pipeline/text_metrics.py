"""Numbers of an assessment against the text of the test set, sample by sample."""

import re
from collections.abc import Sequence

TEXT_PROTOCOLS = {
    "bleu": "sentence BLEU of sacrebleu with effective order, in percent",
    "rouge_l": "F measure of rouge-score with stems",
    "meteor": "nltk, exact and stem matches (no WordNet)",
}
"""How each number is measured."""


class _NoWordNet:
    """Where METEOR looks for synonyms: what lies on a disk must not change a number."""

    @staticmethod
    def synsets(word: str) -> Sequence[object]:
        return ()


def text_numbers(text: str, reference: str) -> dict[str, float]:
    """`bleu` in [0, 100], `rouge_l` and `meteor` in [0, 1]."""
    # Half a second, which runs without reference texts are spared.
    from nltk.translate.meteor_score import single_meteor_score
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import sentence_bleu

    words = [re.findall(r"\w+|[^\w\s]", part) for part in (reference, text)]
    rouge = RougeScorer(["rougeL"], use_stemmer=True).score(reference, text)["rougeL"]
    return {
        "bleu": float(sentence_bleu(text, [reference], use_effective_order=True).score),
        "rouge_l": float(rouge.fmeasure),
        "meteor": float(single_meteor_score(*words, wordnet=_NoWordNet)),
    }
