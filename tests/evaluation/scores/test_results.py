"""What a test wrote is read again as it was: every benchmark's metrics, intervals and differences, without scoring."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from dora_vl.data.example import Answer, Example
from dora_vl.errors import UserError
from dora_vl.evaluation.benchmarks import BENCHMARKS
from dora_vl.evaluation.predictions import Prediction, Predictions
from dora_vl.evaluation.results import read_results
from dora_vl.evaluation.scores import caption, exact
from dora_vl.evaluation.scores.benchmark import Scorer
from dora_vl.evaluation.scores.scored import intervals
from dora_vl.evaluation.test_sets import ResultFolder, Tested, TestSet, average_of, scored
from tests.evaluation.scores.test_scores import any_row

SOME = ("yes", "no", "yes", "yes", "no", "A", "yes")


def clips() -> list[Example]:
    """Two captions each of three clips, the names of which are those of other examples."""
    return [
        Example(id=str(n), extra={"clip_id": str(5 - n // 2)}, answers=(Answer(text=f"a man {n} runs fast"),))
        for n in range(6)
    ]


def of_answers(name: str, score: Scorer, examples: Sequence[Example], texts: Sequence[str]) -> Tested:
    """The last example has no answer."""
    rows = [Prediction(id=example.id, prediction=text) for example, text in zip(examples[:-1], texts, strict=False)]
    of_caption = "clip_id" in examples[0].extra
    item = caption.clip_of if of_caption else lambda example: example.id
    return scored(TestSet(name=name, examples=examples, score=score, item=item), Predictions(rows=rows))


def everything() -> Iterator[Tested]:
    scorers = {f"{name} {mode}": score for name, row in BENCHMARKS.items() for mode, score in row.modes.items()}
    for name, score in {**scorers, **{f"own {name}": score for name, score in exact.SCORINGS.items()}}.items():
        examples, texts = [any_row(number) for number in range(8)], list(SOME)
        if name.endswith("cloze"):
            texts = [f"-1.5 -{text.count('e')}.25" for text in texts]
        elif name in ("tvqa ", "how2qa "):
            texts = [f"a{text.count('e')}" for text in texts]
        elif "caption" in name or name.startswith(("tvc", "yc2c")):
            examples, texts = clips(), ["a man 0 runs", "", "a man 2"]
        tested = of_answers(name, score, examples, texts)
        assert tested.refused is None, name
        yield tested


def test_every_score_is_read_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # without Java, which takes eight seconds for each score of a caption
    tested = list(everything())
    ResultFolder(folder=tmp_path).write(tested)
    results = read_results(tmp_path)
    assert list(results) == [ours.test.name for ours in tested]
    for number, ours in enumerate(tested):
        own, result = ours.scored, results[ours.test.name]
        assert own is not None
        assert result.scored is not None
        assert list(result.scored.metrics.items()) == list(own.metrics.items())
        assert (result.scored.items, result.scored.formulas) == (own.items, own.formulas), ours.test.name
        assert (result.scored.failed, result.scored.settings) == (own.failed, own.settings)
        written = {name: entry["interval_95"] for name, entry in result.entry["metrics"].items()}
        assert {name: tuple(pair) for name, pair in written.items() if pair} == ours.intervals
        if number % 6 == 0:
            assert intervals(result.scored) == ours.intervals


def test_a_clip_s_line_is_of_the_answer_that_was_scored(tmp_path: Path) -> None:
    """Clips are items, whatever examples are called as they are; the first answer of one counts."""
    examples = clips()
    rows = [Prediction(id="1", prediction="a man 1 runs"), Prediction(id="4", prediction="a dog")]
    score = caption.score
    test = TestSet(
        name="c", examples=examples, score=lambda *both: score(*both, tokenizer="fallback"), item=caption.clip_of
    )
    ResultFolder(folder=tmp_path).write([scored(test, Predictions(rows=rows, failed={"2": "a broken clip"}))])
    result = read_results(tmp_path)["c"]
    assert result.entry["failed"] == {"4": "a broken clip"}
    assert {name: (item.truth, item.answer) for name, item in result.items.items()} == {
        "5": ("a man 1 runs fast", "a man 1 runs"),
        "4": ("a man 2 runs fast", ""),
        "3": ("a man 4 runs fast", "a dog"),
    }
    assert result.items["5"].score.share > result.items["3"].score.share == result.items["4"].score.share == 0


def test_an_average_is_over_sets_of_one_metric() -> None:
    def entry(metric: str, value: float) -> dict[str, object]:
        return {"headline": metric, "metrics": {metric: {"value": value}}}

    accuracies = {"a": entry("accuracy", 100.0), "b": entry("accuracy", 0.0), "judged": {"metrics": {}}}
    assert average_of(accuracies) == {"metric": "accuracy", "value": 50.0, "sets": 2}
    assert average_of({**accuracies, "c": entry("CIDEr", 309.0)}) is None
    assert average_of({"generation": entry("average", 50.0), "likelihood": entry("average", 60.0)}) is None
    assert average_of({"a": entry("accuracy", 100.0)}) is None


@pytest.mark.parametrize(
    ("file", "content"), [("metrics.json", '{"sets": {"gqa": {}}}'), ("scores.jsonl", '{"id": "1"}')]
)
def test_damaged_files_are_refused(tmp_path: Path, file: str, content: str) -> None:
    examples = [any_row(number) for number in range(4)]
    ResultFolder(folder=tmp_path).write([of_answers("gqa", BENCHMARKS["gqa"].modes["llava"], examples, SOME)])
    (tmp_path / file).write_text(content + "\n")
    with pytest.raises(UserError):
        read_results(tmp_path)
