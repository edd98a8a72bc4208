"""Caption metrics agree with pycocoevalcap and with hand-worked counts; captions are grouped by clip."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from dora_vl.data.example import Answer, Example
from dora_vl.errors import UserError
from dora_vl.evaluation.scores import caption
from dora_vl.evaluation.scores.caption import fallback_tokens, tokenized
from tests.shared_data import shared

pytest.importorskip("pycocoevalcap", reason="pip install '.[caption]'")

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="the official PTB tokenizer and METEOR need Java")

ROWS = [  # references, prediction
    (["a cat sits on the mat", "the cat is on the mat"], "the cat sits on a mat"),
    (["a man rides a horse"], "a man rides a horse"),
    (["two dogs run in the park", "dogs running"], "a dog runs"),
    (["stir the pan"], "stir stir stir stir"),
    (["add salt and pepper", "season the meat"], "add salt"),
    (["a red bus on a street"], "a red bus on a street with people and many cars"),
    (["chop the onion finely"], ""),
    (["a bird in the sky", "the bird flies"], "an airplane in the sky"),
    (["pour the oil into the pan"], "pour oil in a pan"),
    (["a boy kicks a ball"], "ball a kicks boy a"),
]


@pytest.fixture
def no_java(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")


def ten() -> tuple[list[Example], dict[str, str]]:
    examples = [
        Example(id=str(n), answers=tuple(Answer(text=text) for text in references), extra={"image_id": 100 + n})
        for n, (references, _) in enumerate(ROWS)
    ]
    return examples, {str(n): prediction for n, (_, prediction) in enumerate(ROWS)}


def official(references: dict[str, list[str]], predictions: dict[str, list[str]]) -> dict[str, float]:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    bleu, _ = Bleu(4).compute_score(references, predictions, verbose=0)
    metrics = {f"BLEU-{order}": 100 * float(value) for order, value in enumerate(bleu, 1)}
    metrics["CIDEr"] = 100 * float(Cider().compute_score(references, predictions)[0])
    metrics["ROUGE-L"] = 100 * float(Rouge().compute_score(references, predictions)[0])
    return metrics


@pytest.mark.usefixtures("no_java")
def test_captions_as_pycocoevalcap_scores_them() -> None:
    for examples, answers in (ten(), yc2c()):
        scored = caption.score(examples, answers)
        references = {caption.clip_of(sample): [words(answer.text) for answer in sample.answers] for sample in examples}
        predictions = {caption.clip_of(sample): [words(answers[sample.id])] for sample in examples}
        assert scored.metrics == pytest.approx(official(references, predictions), abs=1e-9)
        assert (next(iter(scored.metrics)), scored.n) == ("CIDEr", len(examples))
        assert "without Java" in scored.settings["tokenizer"]
        value = caption.score(examples, answers, style="value")
        assert value.metrics == {name: round(number, 2) for name, number in scored.metrics.items()}


def words(text: str) -> str:
    return " ".join(fallback_tokens(text))


def yc2c() -> tuple[list[Example], dict[str, str]]:
    with shared("value/yc2c_val_predictions_sample.jsonl").open() as file:
        answers = {str(row["clip_id"]): row["descs"][0]["desc"] for row in map(json.loads, file)}
    with shared("value/yc2c_val_release.jsonl").open() as file:
        rows = [json.loads(line) for line in file]
    captions = {str(row["clip_id"]): tuple(Answer(text=entry["desc"]) for entry in row["descs"]) for row in rows}
    assert (len(rows), len(answers)) == (3492, 200)
    return [Example(id=clip, answers=captions[clip], extra={"clip_id": clip}) for clip in answers], answers


@needs_java
def test_with_java_the_official_tokenizer_and_meteor_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    examples, answers = yc2c()
    examples = examples[:40]
    scored = caption.score_value(examples, answers)
    assert scored.settings == {"style": "value", "tokenizer": "PTBTokenizer (CoreNLP 3.4.1)"}
    assert 0 < scored.metrics["METEOR"] < 100
    monkeypatch.setenv("PATH", "")
    fallback = caption.score_value(examples, answers)
    assert {name: scored.metrics[name] for name in fallback.metrics} == pytest.approx(fallback.metrics, abs=0.5)


@needs_java
def test_the_official_tokenizers_quirks_and_how_near_the_fallback_is() -> None:
    texts = ["A man (in red), what?!", "He isn't here; she'll cannot go -- ok...", 'a "STOP", 3.5', "", "£5 or €6, ½"]
    ours, theirs = (tokenized({"clip": texts}, tokenizer)["clip"] for tokenizer in ("fallback", "ptb"))
    assert theirs[:2] == ["a man -lrb- in red -rrb- what ?!", "he is n't here she 'll can not go ok"]
    assert theirs[4].startswith("# 5 or $ 6 ")
    assert ours[:4] == theirs[:4]


def test_a_java_that_fails_leaves_meteor_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "java").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "java").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(UserError):
        tokenized({"clip": ["a cat", "a dog"]}, "ptb")
    assert caption.meteor_of({"clip": ["a cat"]}, {"clip": ["a cat"]}) is None


@needs_java
def test_a_line_break_does_not_shift_the_captions_after_it() -> None:
    captions = {"1": ["one\u2028two"], "2": ["three", "\r\nfour"], "3": ["five"]}
    assert tokenized(captions, "ptb") == {"1": ["one two"], "2": ["three", "four"], "3": ["five"]}


@pytest.mark.usefixtures("no_java")
def test_flattened_captions_come_together_by_clip() -> None:
    examples = [
        Example(id=f"clip-{clip}-{n}", answers=(Answer(text=text),), extra={"clip_id": clip})
        for clip, texts in enumerate([["a b c d", "a b x y"], ["e f g h", "z f g h"]])
        for n, text in enumerate(texts)
    ]
    answers = {"clip-0-1": "a b c d", "clip-1-0": "e f g h", "clip-1-1": "another"}
    scored = caption.score(examples, answers)
    assert scored.n == 2
    assert scored.metrics["BLEU-4"] == pytest.approx(100.0)
    assert scored.failed == ()


@pytest.mark.usefixtures("no_java")
def test_a_clip_without_a_caption_counts_as_empty_and_without_a_reference_is_refused() -> None:
    examples, answers = ten()
    del answers["1"]
    scored = caption.score(examples, answers)
    assert scored.failed == ("101",)
    assert scored.shares["101"] == 0.0
    with pytest.raises(UserError):
        caption.score([*examples, Example(id="7")], answers)


@pytest.mark.usefixtures("no_java")
def test_an_empty_reference_makes_no_empty_caption_right() -> None:
    examples, answers = ten()
    with_empty = [replace(example, answers=(*example.answers, Answer(text=" "))) for example in examples]
    assert caption.score(with_empty, answers).metrics == caption.score(examples, answers).metrics
    with pytest.raises(UserError):
        caption.score([*examples, Example(id="7", answers=(Answer(text=""),))], answers)


@pytest.mark.usefixtures("no_java")
def test_value_takes_other_letters_for_spaces() -> None:
    examples = [
        Example(id=name, answers=(Answer(text=text),)) for name, text in (("1", "caf bar here now"), ("2", "x"))
    ]
    answers = {"1": "caféébar here now", "2": "x"}
    for style, expected in (("value", True), ("coco", False)):
        scored = caption.score(examples, answers, style=style)
        assert (scored.metrics["BLEU-1"] == 100.0) is expected
