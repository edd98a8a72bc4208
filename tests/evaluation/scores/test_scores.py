"""Every benchmark's score on rows worked out by hand; files for servers and judges, read back by the official rule."""

import csv
import io
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from dora_vl.data.example import Answer, Example, from_record
from dora_vl.errors import UserError
from dora_vl.evaluation.benchmarks import BENCHMARKS
from dora_vl.evaluation.predictions import Prediction, Predictions
from dora_vl.evaluation.scores import caption, exact, llava, vqa
from dora_vl.evaluation.scores.benchmark import Benchmark, Scorer
from dora_vl.evaluation.scores.exact import SCORINGS
from dora_vl.evaluation.scores.llava import chosen
from dora_vl.evaluation.scores.scored import intervals
from dora_vl.evaluation.scores.vqa import accuracy, leave_one_out, normalise_evalai
from dora_vl.evaluation.test_sets import ResultFolder, Tested, TestSet, average_of, read_results, scored
from tests.shared_data import shared

FOUR = ("red", "green", "blue", "white")
ROWS: list[dict[str, Any]] = [
    json.loads(line) for line in Path(__file__).with_name("scored_rows.jsonl").read_text().splitlines()
]


def example(
    number: object, *answers: str, images: Sequence[str] = (), choices: Sequence[str] = (), **extra: Any
) -> Example:
    right = tuple(Answer(text=text) for text in answers)
    return Example(id=str(number), images=tuple(images), answers=right, choices=tuple(choices), extra=extra)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['benchmark']}-{row['mode']}-{row['about']:.30}")
def test_rows_score_as_worked_out(row: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dora_vl.evaluation.scores.scored.RESAMPLES", 200)
    own, name = row["benchmark"].startswith("own "), row["benchmark"].removeprefix("own ")
    score = SCORINGS[name] if own else BENCHMARKS[name].modes[row["mode"]]
    scored = score([from_record(record) for record in row["examples"]], row["answers"])
    assert list(scored.shares.values()) == pytest.approx(row.get("per_item", list(scored.shares.values())))
    metrics = scored.metrics if "only" in row else {name: scored.metrics[name] for name in row["metrics"]}
    assert metrics == pytest.approx(row["metrics"])
    if "only" in row:
        assert next(iter(metrics)) == next(iter(row["metrics"]))
    assert scored.settings == row.get("settings", scored.settings)
    assert len(scored.columns) == row.get("units", len(scored.columns))
    assert {name: scored.items_of(name) for name in row.get("items", {})} == row.get("items", {})
    for name, (low, high) in intervals(scored).items():
        assert low - 1e-9 <= scored.metrics[name] <= high + 1e-9, name
    assert set(scored.failed) == scored.shares.keys() - row["answers"].keys()


@pytest.mark.parametrize(
    ("score", "examples", "answers"),
    [
        (llava.mme_score, [example(1, "Yes", images=["1.jpg"], category="count")], {}),  # one question about a picture
        (llava.pope_score, [example(1, "yes")], {"2": "yes"}),  # another version's questions
        (llava.pope_score, [example(1, "maybe")], {}),
        (exact.how2qa_score, [example(1, choices=FOUR, correct=0)], {"2": "a1"}),
        (vqa.nlvr2_score, [example("12-3", "true")], {}),
        (llava.seed_score, [example(1, choices=FOUR)], {"1": "A"}),
        (vqa.vqa_score, [example("q", "yes")], {"q": "yes"}),  # one person
    ],
)
def test_what_cannot_be_scored_is_refused(score, examples, answers) -> None:
    with pytest.raises(UserError):
        score(examples, answers)


def test_what_stands_before_the_answer_is_left_out() -> None:
    reasoned = [example(0, "blue circle, so no"), example(1, "no")]
    answers = {"0": "red square, so no", "1": "it is blue, so yes"}
    assert exact.score(reasoned, answers, answer_after=", so ").metrics["accuracy"] == 50.0


@pytest.mark.parametrize(
    ("answer", "choices", "right"),
    [
        *((answer, ("red", "pale blue"), right) for answer, right in (("a.", 0), ("a pale blue", 1), ("no", None))),
        ("A) red", ("red", "blue"), 0),
        *(("10", ("1", "10"), 1), ("10 or 1", ("1", "10"), None)),
        *(("unknown", ("no", "unknown"), 1), ("b", ("yes", "no"), 1)),
        *(("Cats and dogs.", ("cat", "cats and dogs"), 1), ("cat", ("cat", "cats and dogs"), 0)),
        *(("CO", ("Co", "CO"), 1), ("co", ("Co", "CO"), None), ("a", ("b", "a"), 1)),
        *(("A dog", ("cat", "dog"), 1), ("dog.", ("the cat", "The dog"), 1), ("An owl", ("cat", "a owl"), 1)),
        ("A", ("B", "A"), 0),  # the prompt asks for a letter
    ],
)
def test_a_choice_by_letter_or_text(answer: str, choices: tuple[str, ...], right: int | None) -> None:
    for correct in range(len(choices)):
        scored = SCORINGS["choice"]([example(1, choices=choices, correct=correct)], {"1": answer})
        assert scored.metrics["accuracy"] == 100.0 * (correct == right)


def any_row(number: int) -> Example:
    """A record that every benchmark can score; two of each picture."""
    extra = {"human_answers": ["yes"] * 10, "index": number, "correct": 0, "category": "count", "task": "boolq"}
    extra |= {"contexts": ["", ""], "endings": ["no", "yes"]}
    return example(f"dev-{number}-0-0", "yes", images=[f"{number // 2}.jpg"], choices=FOUR, **extra)


@pytest.mark.parametrize(
    ("name", "mode"), [(name, mode) for name, row in BENCHMARKS.items() if not row.shares_answers for mode in row.modes]
)
def test_a_missing_answer_is_wrong_and_named(name: str, mode: str) -> None:
    examples = [any_row(number) for number in range(4)]
    answer = "-2.5 -1.5" if mode == "cloze" else "a0" if name in {"tvqa", "how2qa"} else "yes"
    answers = dict.fromkeys((row.id for row in examples[1:]), answer)
    scored = BENCHMARKS[name].modes[mode](examples, answers)
    assert (scored.n, scored.failed, scored.shares[examples[0].id]) == (4, (examples[0].id,), 0.0)
    assert all(value >= 0 for value in scored.metrics.values())


# What a test wrote is read again as it was: metrics, intervals and differences, without scoring.


SOME = ("yes", "no", "yes", "yes", "no", "A", "yes")


def lines(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in shared(path).read_text().splitlines()]


def test_how2qa_and_tvqa_as_published() -> None:
    rows = lines("value/how2qa_val_release.jsonl")
    examples = [example(row["qid"], choices=FOUR, correct=row["answer_idx"]) for row in rows]
    counts = Counter(row["answer_idx"] for row in rows)
    assert (len(rows), [counts[n] for n in range(4)]) == (3115, [778, 727, 781, 829])
    for answer, expected, value in (("a1", 100 * 727 / 3115, 23.34), ("", 0.0, 24.98)):  # 778 of 3,115
        metrics = exact.how2qa_score(examples, {row.id: answer for row in examples}).metrics
        assert metrics == {"accuracy": pytest.approx(expected), "value_accuracy": value}
    shows = json.loads(shared("value/tvqa_val_solution.json").read_text())["solution"]
    answers = {name: correct for questions in shows.values() for name, correct in questions.items()}
    video_examples = [example(name, choices="abcde", correct=correct) for name, correct in answers.items()]
    scored = exact.video_score(video_examples, {name: f"a{correct}" for name, correct in answers.items()})
    assert (scored.n, scored.metrics["accuracy"]) == (15253, 100.0)


def test_nlvr2_and_nlvr_as_published() -> None:
    rows = lines("nlvr2/dev.json")
    sentences = [example(row["identifier"], row["label"]) for row in rows]
    scored = vqa.nlvr2_score(sentences, {row.id: "true" for row in sentences})
    of_sentence: dict[str, set[str]] = {}
    for row in rows:
        split, number, _, sentence = row["identifier"].split("-")
        of_sentence.setdefault(f"{split} {number} {sentence}", set()).add(row["label"])
    consistent = sum(labels == {"True"} for labels in of_sentence.values())
    true = sum(row["label"] == "True" for row in rows)
    expected = {"accuracy": 100 * true / 6982, "consistency": 100 * consistent / len(of_sentence)}
    assert scored.metrics == pytest.approx(expected)
    rows = lines("nlvr/dev/dev.json")
    boxes = [example(row["identifier"], row["label"]) for row in rows]
    scored = vqa.score_nlvr(boxes, {row["identifier"]: row["label"] for row in rows})
    assert (scored.n, scored.metrics) == (989, {"accuracy": 100.0, "consistency": 100.0})
    assert len(scored.columns) == len({row["identifier"].split("-")[0] for row in rows})


def test_pope_as_published_by_hand_written_rules() -> None:
    examples, answers = [], {}
    for category in ("random", "popular", "adversarial"):
        for row in lines(f"pope/coco_pope_{category}.json"):
            name = f"{category}-{row['question_id']}"
            examples.append(example(name, row["label"], images=[row["image"]], category=category))
            # says yes unless the object's name is short: some of both, wrong and right
            answers[name] = "No, there is not." if len(row["text"]) % 3 == 0 else "Yes, there is."
    scored = llava.pope_score(examples, answers)
    assert (scored.n, scored.settings["labels"]) == (9000, "current")
    for category in ("random", "popular", "adversarial"):
        rows = [(row.answers[0].text, answers[row.id][:2] == "No") for row in examples if row.id.startswith(category)]
        tp, yes = sum(label == "yes" and not no for label, no in rows), sum(not no for _, no in rows)
        assert scored.metrics[f"{category}/yes share"] == pytest.approx(100 * yes / 3000)
        assert scored.metrics[f"{category}/precision"] == pytest.approx(100 * tp / yes)
        assert scored.metrics[f"{category}/f1"] == pytest.approx(200 * tp / (yes + 1500))  # 1,500 are yes in each


def clips() -> list[Example]:
    """Two captions each of three clips, the names of which are those of other examples."""
    return [
        Example(id=str(n), extra={"clip_id": str(5 - n // 2)}, answers=(Answer(text=f"a man {n} runs fast"),))
        for n in range(6)
    ]


def of_answers(name: str, score: Scorer, examples: Sequence[Example], texts: Sequence[str]) -> Tested:
    rows = [Prediction(id=example.id, prediction=text) for example, text in zip(examples[:-1], texts, strict=False)]
    of_caption = "clip_id" in examples[0].extra
    item = caption.clip_of if of_caption else lambda example: example.id
    return scored(TestSet(name=name, examples=examples, score=score, item=item), Predictions(answered=rows))


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
        assert list(result.scored.metrics.items()) == list(own.metrics.items())
        assert (result.scored.items, result.scored.formulas) == (own.items, own.formulas), ours.test.name
        assert (result.scored.failed, result.scored.settings) == (own.failed, own.settings)
        written = {name: entry["interval_95"] for name, entry in result.entry["metrics"].items()}
        assert {name: tuple(pair) for name, pair in written.items() if pair} == ours.intervals
        if number % 6 == 0:
            assert intervals(result.scored) == ours.intervals


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


TEXTS = (
    *("True", "False", " true", "True,0.9", "", "a dog.", "The Dog", "1,2/3", "two's", "Yes.", "no", "NO..", "a0"),
    *("a1", "a1", "a3", "B", "B.", "(C)", "x\ny", "tab\there", '"quoted", twice', "dont", "none", "3. 4."),
    *("it's a man's hat", "ü"),
)
Rule = Callable[[Sequence[Example], str], float]


def percent(points: Sequence[float]) -> float:
    return 100 * sum(points) / len(points)


def nlvr2(examples: Sequence[Example], text: str) -> float:
    """metrics.py: `line.strip().split(",")`, the second field against the label, letter case aside."""
    lines = [line.strip().split(",") for line in text.splitlines()]
    texts = {fields[0]: fields[1] for fields in lines}
    return percent([texts[example.id].lower() == example.answers[0].text.lower() for example in examples])


def vqav2(version: str) -> Rule:
    def rule(examples: Sequence[Example], text: str) -> float:
        texts = {str(row["question_id"]): row["answer"] for row in json.loads(text)}
        return percent([accuracy(texts[example.id], example.extra["human_answers"], version) for example in examples])

    return rule


def vizwiz(examples: Sequence[Example], text: str) -> float:
    texts = {row["image"]: normalise_evalai(row["answer"]) for row in json.loads(text)}
    truth = [[normalise_evalai(answer) for answer in example.extra["human_answers"]] for example in examples]
    return percent([leave_one_out(texts[row.images[0]], people) for row, people in zip(examples, truth, strict=True)])


def gqa(examples: Sequence[Example], text: str) -> float:
    """eval.py: letter by letter."""
    texts = {row["questionId"]: row["prediction"] for row in json.loads(text)}
    return percent([texts[example.id] == example.answers[0].text for example in examples])


def mmbench(examples: Sequence[Example], text: str) -> float:
    rows = {row["index"]: row for row in csv.DictReader(io.StringIO(text), delimiter="\t")}
    right = []
    for example in examples:
        row = rows[str(example.extra["index"])]
        choices = {letter: row[letter] for letter in "ABCD" if row[letter]}
        assert (row["question"], row["hint"], row["category"]) == ("which?", "a\tb", "c")
        right.append(chosen(row["prediction"], choices, "2025") == "ABCD"[example.extra["correct"]])
    return percent(right)


def value_choice(examples: Sequence[Example], text: str) -> float:
    choices = {name: int(index) for name, index in json.loads(text).items()}
    return round(percent([choices[example.id] == example.extra["correct"] for example in examples]), 2)


OFFICIAL: Mapping[tuple[str, str], tuple[str, Rule]] = {
    ("nlvr2", ""): ("accuracy", nlvr2),
    ("vqav2", "after_2021"): ("upload accuracy", vqav2("after_2021")),
    ("vqav2", "before_2021"): ("upload accuracy", vqav2("before_2021")),
    ("vizwiz", ""): ("accuracy", vizwiz),
    ("gqa", "llava"): ("accuracy", gqa),
    ("gqa", "vl_t5"): ("accuracy", gqa),
    ("mmbench", "2025"): ("accuracy", mmbench),
    ("tvqa", ""): ("value_accuracy", value_choice),
    ("how2qa", ""): ("value_accuracy", value_choice),
}
"""Benchmark and version -> the metric of the official script, and the script's rule over the file."""
SUBMITTED: list[dict[str, Any]] = [
    json.loads(line) for line in Path(__file__).with_name("submissions.jsonl").read_text().splitlines()
]
"""Records of a benchmark, answers, and the file's name and rows; some ids are no numbers, or hardly."""


def made(number: int, rng: random.Random) -> Example:
    correct = rng.randrange(4)
    extra = {"human_answers": rng.choices(TEXTS, k=10), "index": number, "correct": correct, "clip_id": number // 2}
    extra |= {"hint": "a\tb", "category": "c"}
    return Example(
        id=f"dev-{number}-0-0",
        images=(f"{number}.jpg",),
        question="which?",
        answers=(Answer(text=rng.choice(("True", "False", "yes", "a dog"))),),
        choices=("dog", "a cat", "x y", "none"),
        extra=extra,
    )


@pytest.mark.parametrize(("name", "mode"), OFFICIAL)
def test_an_upload_scores_as_metrics_json_says(name: str, mode: str) -> None:
    benchmark: Benchmark = BENCHMARKS[name]
    metric, rule = OFFICIAL[name, mode]
    rng = random.Random(7)
    examples = [made(number, rng) for number in range(400)]
    answers = {example.id: rng.choice(TEXTS) for example in examples if rng.random() < 0.8}
    write = benchmark.submissions.get(mode, benchmark.submission)
    scored = benchmark.modes[mode](examples, answers)
    assert 0 < scored.metrics[metric] < 100
    assert rule(examples, write(examples, answers)[1]) == pytest.approx(scored.metrics[metric], abs=1e-9)


def written(name: str, examples: Sequence[Example], answers: Mapping[str, str]) -> tuple[str, str]:
    write = BENCHMARKS[name].submission
    return write(examples, answers)


@pytest.mark.parametrize("row", SUBMITTED, ids=lambda row: f"{row['benchmark']}-{row['examples'][0]['id']:.9}")
def test_files_hold_what_the_server_takes(row: dict[str, Any]) -> None:
    examples = [from_record(record) for record in row["examples"]]
    name, text = written(row["benchmark"], examples, row["answers"])
    rows = [json.loads(line) for line in text.splitlines()] if name.endswith(".jsonl") else json.loads(text)
    assert (name, rows) == (row["file"], row["content"])


@pytest.mark.parametrize("name", ["tvc", "yc2c"])
def test_value_files_have_the_published_form(name: str) -> None:
    with shared(f"value/{name}_val_predictions_sample.jsonl").open() as file:
        published = [json.loads(line) for line in file]
    examples, answers = [], {}
    for row in published:
        extra = {"clip_id": row["clip_id"], "vid_name": row.get("video_id") or row["vid_name"]}
        extra |= {"ts": row["ts"]} if "ts" in row else {}
        examples.append(Example(id=str(row["clip_id"]), answers=(Answer(text="x"),), extra=extra))
        answers[str(row["clip_id"])] = row["descs"][0]["desc"]
    file_name, text = written(name, examples, answers)
    assert file_name == f"{name}_test_predictions.jsonl"
    assert [json.loads(line) for line in text.splitlines()] == published


def test_a_judges_request_holds_all_it_needs() -> None:
    extra = {"category": "conv", "context": "a cat"}
    example = Example(id="0", question="q0", answers=(Answer(text="ref"),), extra=extra)
    (first,) = llava.judge_requests([example], {"0": "mine"})
    assert first["category"] == "conv"
    positions = [first["text"].index(part) for part in ("a cat", "q0", "ref", "mine")]
    assert positions == sorted(positions)
