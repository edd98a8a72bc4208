"""Caption metrics: CIDEr, BLEU, ROUGE-L and METEOR, times 100, as COCO's and VALUE's official code gives them.

CIDEr, ROUGE-L and METEOR are pycocoevalcap's (equal to the official Python 2 code to 1e-13); BLEU is counted here, so
that a bootstrap can add the counts up, and agrees with it to rounding. METEOR needs Java; without it it is left out.
CIDEr takes its document frequencies from the references given: on a part of a split it is another number than on the
whole, and with one clip it is 0. An interval keeps the whole set's.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from dora_vl.data.example import Example
from dora_vl.errors import UserError, needs_extra
from dora_vl.evaluation.scores.benchmark import (
    Benchmark,
    ByKey,
    PromptFunction,
    Submission,
    caption_of_picture,
    caption_of_video,
    json_lines,
    published_id,
)
from dora_vl.evaluation.scores.scored import PERCENT, AnswersById, Formula, Numbers, Ratio, Scored, Sums, Tally

Tokenizer = Literal["ptb", "fallback"]

DROPPED = frozenset({"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"})
"""The official list drops these; its names of brackets are in capitals, which no token has."""

_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_NOT_ASCII = re.compile(r"[^\x00-\x7f]")
_SYMBOLS = str.maketrans(
    {"£": "#", "€": "$", "½": "1/2", "¼": "1/4", "¾": "3/4", "’": "'", "‘": "`", "“": '"', "”": '"'}
    | dict.fromkeys("–—", "--")
)
_CLITICS = re.compile(r"(?<=[a-z])(n't|'(?:s|m|d|re|ve|ll))(?![a-z])")
_SPLIT_WORDS = {"cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na", "lemme": "lem me"}
_TOKEN = re.compile(
    r"(?:[a-z]\.){2,}"  # abbreviations: u.s.
    r"|\d+(?:[.,:/]\d+)+"  # 3.5, 1,000, 10:30, 1/2
    r"|n't|'(?:s|m|d|re|ve|ll)\b"
    r"|[^\W_]+(?:[-'&_/][^\W_]+)*"  # words, with hyphens or strokes inside
    r"|[!?]{2,}|\.{3}|--+"
    r"|\S"
)


def one_line(caption: str) -> str:
    """Returns the caption without line breaks, each of which shifts the official tokenizer's later captions."""
    return " ".join(caption.splitlines()).replace("\x00", " ")


def tokenized(captions: Mapping[str, Sequence[str]], tokenizer: Tokenizer) -> dict[str, list[str]]:
    """Returns the words of every caption of each clip, with a space between them.

    With Java, the tokenizer is the official one: Stanford's PTBTokenizer (CoreNLP 3.4.1) through pycocoevalcap, lower
    case, most punctuation dropped. Its quirks stay: brackets survive as "-lrb-" and the like (they are dropped in
    capitals only), "!!" and "?!" survive, "£" becomes "#", "€" becomes "$", "½" becomes "1/2", some tokens hold a
    no-break space. Without Java, `fallback_tokens` does the same for ordinary captions; on odd ones it differs, so that
    scores are comparable with each other only. The settings say which one it was.
    """
    clean = {clip: [one_line(caption) for caption in several] for clip, several in captions.items()}
    if tokenizer == "fallback":
        return {clip: [" ".join(fallback_tokens(caption)) for caption in several] for clip, several in clean.items()}
    return _official(clean)


def fallback_tokens(caption: str) -> list[str]:
    """Returns the words of one caption by rules that follow the Penn Treebank's, without Java."""
    text = _CLITICS.sub(r" \1", one_line(caption).translate(_SYMBOLS).lower())
    tokens = [_BRACKETS.get(match[0], match[0]) for match in _TOKEN.finditer(text)]
    words = [word for token in tokens for word in _SPLIT_WORDS.get(token, token).split()]
    return [word for word in words if word not in DROPPED and word != '"']


def _official(captions: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    # Its own tokenizer loses a caption that is empty, and with it the count of lines: keep a word in its place.
    standing = {clip: [{"caption": text.strip() or "."} for text in texts] for clip, texts in captions.items()}
    try:
        words = PTBTokenizer().tokenize(standing)  # it writes a file into its own folder
    except OSError as error:
        raise UserError(f"the official caption tokenizer cannot run: {error}") from error
    lost = [clip for clip, several in standing.items() if len(words.get(clip, ())) != len(several)]
    if lost:
        raise UserError(f"Java's tokenizer lost captions of {len(lost)} clips, first {lost[0]}; see what it said above")
    return words


log = logging.getLogger(__name__)

Style = Literal["coco", "value"]
ORDERS = (1, 2, 3, 4)
_ALMOST_ZERO, _SMALL = 1e-15, 1e-9  # the official code's guards against division by zero


@dataclass(frozen=True)
class Bleu:
    """Corpus BLEU of one order, brevity against the reference of the closest length."""

    order: int
    decimals: int | None = None

    def __call__(self, sums: Sums, totals: Sums | None = None) -> Numbers:
        """Returns the score of each draw; every draw has clips."""
        product = np.ones_like(sums["words"])
        for order in ORDERS[: self.order]:
            product = product * (sums[f"matched {order}"] + _ALMOST_ZERO) / (sums[f"said {order}"] + _SMALL)
        ratio = (sums["words"] + _ALMOST_ZERO) / (sums["reference words"] + _SMALL)
        brevity = np.where(ratio < 1, np.exp(np.minimum(0.0, 1 - 1 / ratio)), 1.0)
        value = PERCENT * product ** (1 / self.order) * brevity
        return value if self.decimals is None else np.round(value, self.decimals)


@dataclass(frozen=True)
class Meteor:
    """The whole set's METEOR, moved in proportion to the mean of the drawn clips' own."""

    whole: float
    mean: float
    decimals: int | None = None

    def __call__(self, sums: Sums, totals: Sums | None = None) -> Numbers:
        """Returns the score of each draw; every draw has clips."""
        moved = sums["meteor"] / sums["clips"] / self.mean if self.mean else np.ones_like(sums["clips"])
        value = PERCENT * self.whole * moved
        return value if self.decimals is None else np.round(value, self.decimals)


def score(examples: Sequence[Example], answers: AnswersById, *, style: Style = "coco") -> Scored:
    """Scores captions by every metric; a clip without a prediction counts as an empty caption.

    `value` replaces every character outside ASCII by a space and rounds to two decimals, as VALUE's server does; `coco`
    does neither. The server needs the references' order; here the ids match. METEOR and the official tokenizer are used
    where Java is.
    """
    tokenizer: Tokenizer = "ptb" if shutil.which("java") else "fallback"
    scorers = _scorers()
    truth, answered = _references(examples), _predictions(examples, answers)
    answers_said = {clip: [caption or ""] for clip, caption in answered.items()}
    if style == "value":
        truth, answers_said = (
            {clip: [_NOT_ASCII.sub(" ", caption) for caption in several] for clip, several in captions.items()}
            for captions in (truth, answers_said)
        )
    references, predictions = tokenized(truth, tokenizer), tokenized(answers_said, tokenizer)
    cider, rouge = (list(scorer.compute_score(references, predictions)[1]) for scorer in scorers)
    meteor = meteor_of(references, predictions) if tokenizer == "ptb" else None
    tally = Tally()
    for number, (clip, caption) in enumerate(answered.items()):
        columns = {"clips": 1.0, "cider": cider[number], "rouge": rouge[number]}
        columns |= bleu_counts(predictions[clip][0], references[clip])
        columns |= {"meteor": meteor[1][number]} if meteor else {}
        tally.add(clip, PERCENT * cider[number], columns, failed=caption is None)
    decimals = 2 if style == "value" else None
    formulas: dict[str, Formula] = {"CIDEr": Ratio("cider", "clips", decimals=decimals)}
    formulas |= {f"BLEU-{order}": Bleu(order, decimals) for order in ORDERS}
    formulas["ROUGE-L"] = Ratio("rouge", "clips", decimals=decimals)
    if meteor:
        formulas["METEOR"] = Meteor(meteor[0], float(np.mean(meteor[1])), decimals)
    made_by = {
        "ptb": "PTBTokenizer (CoreNLP 3.4.1)",
        "fallback": "fallback without Java; compare only with scores made by it",
    }
    return tally.scored(formulas, settings={"style": style, "tokenizer": made_by[tokenizer]})


def score_value(examples: Sequence[Example], answers: AnswersById) -> Scored:
    """Scores TVC and YC2C as VALUE's server does."""
    return score(examples, answers, style="value")


def check_scoring(examples: Sequence[Example]) -> None:
    """Tells what `score` would miss, without starting its Java programs."""
    _references(examples)
    _scorers()


def clip_of(example: Example) -> str:
    """Returns the clip (TVC, YC2C) or picture (COCO) whose captions are all references."""
    return str(example.extra.get("clip_id", example.extra.get("image_id", example.id)))


class CiderOfAnswers:
    """CIDEr-D (arXiv 1411.5726) of single captions, from 0 to 1, a tenth of the official code's number for a caption.

    Every caption of each picture says in how many pictures an n-gram occurs.
    """

    def __init__(self, references: Sequence[Sequence[str]]) -> None:
        self._pictures = Counter[tuple[str, ...]]()
        for captions in references:
            self._pictures.update({words for text in captions for grams in _all_ngrams(text) for words in grams})
        self._most = math.log(max(2, len(references)))

    def __call__(self, caption: str, references: Sequence[str]) -> float:
        """Returns the mean over references and over n-grams of one to four words."""
        return float(np.mean([self._similarity(caption, reference) for reference in references]))

    def _similarity(self, caption: str, reference: str) -> float:
        caption_ngrams, right = _all_ngrams(caption), _all_ngrams(reference)
        cosines = [self._cosine(*both) for both in zip(caption_ngrams, right, strict=True)]
        longer = caption_ngrams[1].total() - right[1].total()  # the official code counts pairs of words
        return float(np.mean(cosines)) * math.exp(-(longer**2) / (2 * 6.0**2))

    def _cosine(self, caption_ngrams: Counter[tuple[str, ...]], right: Counter[tuple[str, ...]]) -> float:
        first, second = self._weighted(caption_ngrams), self._weighted(right)
        lengths = math.sqrt(sum(value**2 for value in first.values()) * sum(value**2 for value in second.values()))
        shared = sum(min(first[words], second[words]) * second[words] for words in first.keys() & second.keys())
        return shared / lengths if lengths else 0.0

    def _weighted(self, counts: Counter[tuple[str, ...]]) -> dict[tuple[str, ...], float]:
        return {
            words: count * (self._most - math.log(max(1, self._pictures[words]))) for words, count in counts.items()
        }


def _all_ngrams(caption: str) -> list[Counter[tuple[str, ...]]]:
    """Counts a caption's n-grams of one to four words, its words by the tokenizer that needs no Java."""
    words = fallback_tokens(caption)
    return [_ngrams(words, order) for order in ORDERS]


def bleu_counts(prediction: str, references: Sequence[str]) -> dict[str, float]:
    """Counts a caption's n-grams, those that a reference has (clipped), and lengths in words."""
    words, references_words = prediction.split(), [reference.split() for reference in references]
    closest = min((abs(len(other) - len(words)), len(other)) for other in references_words)[1]
    counts = {"words": float(len(words)), "reference words": float(closest)}
    for order in ORDERS:
        most: Counter[tuple[str, ...]] = Counter()
        for other in references_words:
            most |= _ngrams(other, order)
        ngrams = _ngrams(words, order)
        counts |= {f"said {order}": float(ngrams.total()), f"matched {order}": float((ngrams & most).total())}
    return counts


def _ngrams(words: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[start : start + order]) for start in range(len(words) - order + 1))


def _references(examples: Sequence[Example]) -> dict[str, list[str]]:
    references: dict[str, list[str]] = {}
    for example in examples:
        # An empty reference would make an empty caption right.
        texts = [answer.text for answer in example.answers if answer.text.strip()]
        references.setdefault(clip_of(example), []).extend(texts)
    if without := [clip for clip, captions in references.items() if not captions]:
        message = f"{len(without)} clips have no reference caption, first {without[0]}; they cannot be scored here"
        raise UserError(message)
    return references


def _predictions(examples: Sequence[Example], answers: AnswersById) -> dict[str, str | None]:
    """Returns the answer of each clip that is scored and uploaded: its examples' first; None where there is none."""
    predictions: dict[str, str | None] = {}
    for example in examples:
        if predictions.get(clip := clip_of(example)) is None:
            predictions[clip] = answers.get(example.id)
    return predictions


def _scorers() -> tuple[Any, Any]:
    with needs_extra("caption", "a caption's score"):
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    return Cider(), Rouge()


def meteor_of(
    references: Mapping[str, list[str]], predictions: Mapping[str, list[str]]
) -> tuple[float, list[float]] | None:
    """Computes METEOR of the whole set and of each clip by a Java process; None, and a warning, where that fails."""
    from pycocoevalcap.meteor.meteor import Meteor as Official

    separator = "|||"  # of its protocol
    safe = {clip: [caption.replace(separator, "") for caption in several] for clip, several in references.items()}
    official = Official()
    try:
        score, each = official.compute_score(safe, predictions)
    except (OSError, ValueError) as error:
        official.lock.release()  # it holds its lock, and its end would wait for it
        stdin = official.meteor_p.stdin
        if stdin is not None:
            with contextlib.suppress(OSError):
                stdin.close()
        log.warning("METEOR is left out: its Java program failed (%s); it needs 2 GB of memory", error)
        return None
    return score, each


def coco_caption(examples: Sequence[Example], answers: AnswersById) -> tuple[str, str]:
    """Writes the file of COCO's server, a caption for each image."""
    predictions = _predictions(examples, answers)
    records = [{"image_id": published_id(image), "caption": text or ""} for image, text in predictions.items()]
    return "captions_results.json", json.dumps(records, ensure_ascii=False)


def value_captions(
    examples: Sequence[Example], answers: AnswersById, *, file: str, video_name: str = "vid_name"
) -> tuple[str, str]:
    """Writes VALUE's file, a caption a clip in the references' order; YC2C names its video differently."""
    entries: dict[str, dict[str, object]] = {}
    predictions = _predictions(examples, answers)
    for example in examples:
        clip, extra = clip_of(example), example.extra
        entry: dict[str, object] = {video_name: extra.get("vid_name", ""), "clip_id": published_id(clip)}
        entry |= {"ts": extra["ts"]} if "ts" in extra else {}
        entries.setdefault(clip, {**entry, "descs": [{"desc": predictions[clip] or ""}]})
    return file, json_lines(list(entries.values()))


tvc = partial(value_captions, file="tvc_test_predictions.jsonl")
yc2c = partial(value_captions, file="yc2c_test_predictions.jsonl", video_name="video_id")


def _benchmark(style: Style, prompt: PromptFunction, submission: Submission, splits: tuple[str, ...]) -> Benchmark:
    other: Style = "coco" if style == "value" else "value"
    return Benchmark(
        modes={style: partial(score, style=style), other: partial(score, style=other)},
        prompt=prompt,
        splits=splits,
        submission=submission,
        together=clip_of,
        shares_answers=True,
        joins=(
            ByKey(
                "clip_id or image_id",
                lambda prediction: prediction.id,
                lambda example: clip_of(example) if {"clip_id", "image_id"} & example.extra.keys() else None,
            ),
        ),
    )


COCO = _benchmark("coco", caption_of_picture, coco_caption, ("test", "validation"))
TVC = _benchmark("value", caption_of_video, tvc, ("validation", "test"))
YC2C = _benchmark("value", caption_of_video, yc2c, ("validation", "test"))
