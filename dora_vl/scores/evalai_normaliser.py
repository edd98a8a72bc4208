"""How EvalAI's VQA server and TextVQA's m4c evaluator rewrite an answer before they compare.

The steps of `vqa_normaliser` with three differences, which change about a tenth of tricky strings:

- Lower case first, then "," and "?" go, so that the rule for a comma between digits never applies ("1,2/3" -> "12 3").
- "'s" is split off before numbers and contractions are looked up: "two's" -> "2 's", "she's" -> "she 's".
- Line breaks become spaces after the ends were stripped, not before.

Like there, at most 32 periods go, and the contractions with a capital I never match.
"""

from __future__ import annotations

from dora_vl.scores.vqa_normaliser import map_words, one_line, strip_punctuation


def normalise(answer: str) -> str:
    """The whole treatment, for predictions and references alike."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return map_words(strip_punctuation(one_line(text)))
