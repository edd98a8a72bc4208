"""Every benchmark's score on rows worked out by hand, and on the published files by rules written out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dora_vl.data.example import Answer, Example
from dora_vl.errors import UserError
from dora_vl.evaluation.benchmarks import BENCHMARKS
from dora_vl.evaluation.scores import exact, llava, vqa
from dora_vl.evaluation.scores.exact import SCORINGS
from tests.shared_data import shared

FOUR = ("red", "green", "blue", "white")


def example(
    number: object, *answers: str, images: Sequence[str] = (), choices: Sequence[str] = (), **extra: Any
) -> Example:
    right = tuple(Answer(text=text) for text in answers)
    return Example(id=str(number), images=tuple(images), answers=right, choices=tuple(choices), extra=extra)


def said(answers: Sequence[str | None]) -> dict[str, str]:
    return {str(number): answer for number, answer in enumerate(answers) if answer is not None}


PEOPLE = [  # the ten people, the prediction, points before 2021, points after, points of TextVQA and VizWiz
    (["yes"] * 10, "Yes.", 1.0, 0.0, 1.0),  # after 2021 nothing is normalised where all agree
    (["yes"] * 10, "yes", 1.0, 1.0, 1.0),
    (["No"] * 10, "No", 0.0, 1.0, 1.0),  # before 2021 the people's capital stays
    (["2"] * 9 + ["3"], "two", 1.0, 1.0, 1.0),
    (["two"] * 9 + ["3"], "two", 0.0, 1.0, 1.0),  # before 2021 the people's number words stay
    (["the dog"] * 5 + ["cat"] * 5, "dog", 0.0, 1.0, 1.0),
    (["red"] * 1 + ["blue"] * 9, "red", 0.3, 0.3, 0.3),  # 9 of the 10 see one match of three
    (["red"] * 2 + ["blue"] * 8, "red", 0.6, 0.6, 0.6),
    (["red"] * 3 + ["blue"] * 7, "red", 0.9, 0.9, 0.9),
    (["a,b"] * 4 + ["c"] * 6, "a b", 0.0, 1.0, 0.0),  # "b" against "a b", "b" and EvalAI's "ab"
]
KINDS = ["yes/no"] * 3 + ["number"] * 2 + ["other"] * 5
ASKED = [
    example(n, images=[f"{n // 2}.jpg"], human_answers=row[0], answer_type=kind, answerable=n != 9)
    for n, (row, kind) in enumerate(zip(PEOPLE, KINDS, strict=True))
]


@pytest.mark.parametrize(
    ("benchmark", "mode", "column"),
    [("vqav2", "before_2021", 2), ("vqav2", "after_2021", 3), ("textvqa", "", 4), ("vizwiz", "", 4)],
)
def test_soft_accuracy(benchmark: str, mode: str, column: int) -> None:
    expected = [row[column] for row in PEOPLE]
    scored = BENCHMARKS[benchmark].modes[mode](ASKED, said([row[1] for row in PEOPLE]))
    assert list(scored.per_item.values()) == pytest.approx(expected)
    assert scored.metrics["accuracy"] == pytest.approx(10 * sum(expected))
    if benchmark == "vqav2":
        assert scored.metrics["answer type/number"] == pytest.approx(50 * sum(expected[3:5]))
        assert scored.settings == {"vqa_version": mode}
    if benchmark == "vizwiz":
        assert scored.metrics["accuracy/unanswerable"] == 0.0


GQA = [  # truth, answer, structural, semantic, entailed, group
    ("yes", "Yes.", "verify", "obj", ["1", "2"], None),
    ("no", "no", "verify", "obj", [], None),
    ("yes", "no", "logical", "obj", [], None),
    ("red", "red", "query", "attr", ["3"], "color"),
    ("blue", "red", "query", "attr", [], "color"),
    ("red", "Red", "query", "attr", ["0", "1"], "color"),
    ("dog", "dog ", "query", "cat", [], "animal"),
    ("cat", "cat", "choose", "cat", ["6"], "animal"),
    ("left", "right", "choose", "rel", ["7"], None),
    ("table", "table", "query", "rel", [], None),
]


def gqa_rows() -> list[Example]:
    rows = []
    for n, (truth, _, shape, meaning, entailed, group) in enumerate(GQA):
        grouped = {} if group is None else {"global_group": group}
        rows.append(example(n, truth, types={"structural": shape, "semantic": meaning}, entailed=entailed, **grouped))
    return rows


def test_gqa() -> None:
    scored = vqa.gqa_score(gqa_rows(), said([row[1] for row in GQA]))
    assert list(scored.per_item.values()) == [1, 1, 0, 1, 0, 1, 0, 1, 0, 1]
    # color: red 3 said of 2, blue 0 of 1; animal: "dog " is another word than dog: 0 of 1, cat 1 of 1
    color, animal = (3 - 2) ** 2 / 2 + (0 - 1) ** 2 / 1, (0 - 1) ** 2 / 1
    expected = {"accuracy": 60.0, "accuracy/open": 60.0, "accuracy/binary": 60.0, "structural/choose": 50.0}
    # right and entailing others: 0 (half of 1, 2), 5 (both of 0, 1), 7 (6 is wrong); 3 entails itself alone
    expected |= {"semantic/attr": 200 / 3, "consistency": 100 * (0.5 + 1 + 0) / 3}
    expected["distribution"] = (color * 3 + animal * 2) / 5 / 100
    assert {name: scored.metrics[name] for name in expected} == pytest.approx(expected)
    unbalanced = [example(1, "yes"), example(2, "yes", is_balanced=False)]
    assert vqa.gqa_score(unbalanced, {"1": "yes"}).metrics == {"accuracy": 100.0}
    several = Example(id="1", answers=(Answer(text="car", weight=0.6), Answer(text="taxi", weight=0.3)))
    for answer, in_llava, in_vl_t5 in (("car", 60.0, 60.0), ("Taxi.", 30.0, 0.0), ("taxi", 30.0, 30.0), ("bus", 0, 0)):
        assert vqa.gqa_score([several], {"1": answer}).metrics["accuracy"] == pytest.approx(in_llava)
        of_vl_t5 = vqa.gqa_score([several], {"1": answer}, conversion="vl_t5")
        assert of_vl_t5.metrics["accuracy"] == pytest.approx(in_vl_t5)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("types", value) for value in ([1], {"structural": ["query"]}, {"semantic": {"a": 1}})),
        *(("entailed", "12"), ("entailed", [["1"]]), ("global_group", ["color"])),
    ],
)
def test_gqa_refuses_what_a_record_should_not_hold(field: str, value: object) -> None:
    rows = gqa_rows()
    rows[4] = example(4, "blue", **{**rows[4].extra, field: value})
    with pytest.raises(UserError):
        vqa.gqa_score(rows, said([row[1] for row in GQA]))


def test_mme() -> None:
    rows = [  # subtask, picture, label, answer
        *(("existence", "1.jpg", "Yes", "yes"), ("existence", "1.jpg", "No", "No.")),
        *(("existence", "2.jpg", "Yes", "yes"), ("existence", "2.jpg", "No", "yes")),
        *(("OCR", "1.jpg", "Yes", "Yes"), ("OCR", "1.jpg", "No", "no")),
        *(("code_reasoning", "9.jpg", "Yes", "maybe"), ("code_reasoning", "9.jpg", "No", "no")),
        *(("code_reasoning", "8.jpg", "Yes", "no"), ("code_reasoning", "8.jpg", "No", "yes")),
    ]
    examples = [example(n, label, images=[picture], category=task) for n, (task, picture, label, _) in enumerate(rows)]
    answers = said([row[-1] for row in rows])
    metrics = llava.mme_score(examples, answers).metrics
    expected = {"perception": 325, "cognition": 25, "existence": 75 + 50, "OCR": 200, "code_reasoning": 25 + 0}
    assert metrics == pytest.approx(expected)
    assert list(metrics) == list(expected)
    with pytest.raises(UserError):
        llava.mme_score(examples[1:], answers)
    del answers["0"]
    assert llava.mme_score(examples, answers).metrics["existence"] == pytest.approx(50 + 0)


def test_pope() -> None:
    rows = [  # category, label, answer
        *(("random", "yes", "Yes"), ("random", "yes", "No"), ("random", "no", "yes"), ("random", "no", "no")),
        *(("popular", "yes", "yes"), ("popular", "no", "no."), ("popular", "yes", "nope")),
        *(("adversarial", "no", "yes"), ("adversarial", "no", "yes"), ("adversarial", "yes", "not")),
    ]
    examples = [example(n, row[1], images=[f"{n % 4}.jpg"], category=row[0]) for n, row in enumerate(rows)]
    answers = said([row[-1] for row in rows])
    scored = llava.pope_score(examples, answers)
    expected = dict.fromkeys(("f1", "accuracy", "recall"), (50 + 100 + 0) / 3)
    expected |= {"random/f1": 50.0, "random/accuracy": 50.0}  # tp fn fp tn, one each
    expected |= {"popular/f1": 100.0, "adversarial/f1": 0.0}  # the script divides by zero here
    expected |= {"adversarial/precision": 0.0, "adversarial/yes share": 200 / 3}
    assert {name: scored.metrics[name] for name in expected} == pytest.approx(expected)
    assert next(iter(scored.metrics)) == "f1"
    assert scored.settings["labels"] == "3 adversarial, 3 popular, 4 random"
    more = llava.pope_score(examples, {**answers, "3": "yes"}).metrics  # random: 1 tp, 1 fn, 2 fp
    assert [more[f"random/{name}"] for name in ("precision", "recall", "f1")] == pytest.approx([100 / 3, 50.0, 40.0])
    with pytest.raises(UserError):
        llava.pope_score(examples, {**answers, "stranger": "yes"})
    del answers["0"]
    assert llava.pope_score(examples, answers).metrics["random/recall"] == 0.0


def test_scienceqa() -> None:
    two = ("yes", "no")
    rows = [
        (example(0, choices=FOUR, correct=0), "A", 1),
        (example(1, choices=FOUR, correct=1, images=["1.png"]), "B. green", 1),
        (example(2, choices=FOUR, correct=2, images=["2.png"]), "The answer is C.", 1),
        (example(3, choices=FOUR, correct=2, images=["3.png"]), "The answer is C", 0),
        (example(4, choices=FOUR, correct=1), "The answer is Because", 1),
        (example(5, choices=two, correct=1), "C", 0),  # beyond the choices
        (example(6, choices=two, correct=0, images=["6.png"]), "a", 0),
        (example(7, choices=FOUR, correct=3), "white", 0),
        (example(8, choices=FOUR, correct=3), "D", 1),
        (example(9, choices=FOUR, correct=0), "E", 0),
    ]
    scored = llava.scienceqa_score([row[0] for row in rows], said([row[1] for row in rows]))
    assert list(scored.per_item.values()) == [row[2] for row in rows]
    assert list(scored.metrics.items()) == [("image accuracy", pytest.approx(50.0)), ("accuracy", pytest.approx(50.0))]


def test_seed() -> None:
    media, types = ["image"] * 6 + ["video"] * 4, ["count"] * 8 + ["text"] * 2
    examples = [
        example(n, choices=FOUR, correct=n % 3, data_type=medium, question_type=kind)
        for n, (medium, kind) in enumerate(zip(media, types, strict=True))
    ]
    scored = llava.seed_score(examples, said(["A", "B", "C", "A.", "a", None, "B", "A", "C", "D"]))
    assert list(scored.per_item.values()) == [1, 1, 1, 0, 0, 0, 0, 0, 1, 0]
    expected = {"accuracy": 40.0, "accuracy/image": 50.0, "accuracy/video": 25.0, "type/count": 37.5, "type/text": 50.0}
    assert scored.metrics == pytest.approx(expected)


@pytest.mark.parametrize(("matcher", "right"), [("opencompass_2023", 1), ("2025", 2)])
def test_mmbench(matcher: llava.Matcher, right: int) -> None:
    """Three questions in four, four and two rotations."""
    rows = [
        example(
            f"{question}-{turn}",
            choices=FOUR[:rotations],
            correct=turn,
            index=question + turn * 1_000_000,
            l2_category="seeing" if question == 7 else "logic",
        )
        for question, rotations in ((7, 4), (8, 4), (9, 2))
        for turn in range(rotations)
    ]
    answers = {row.id: "ABCD"[row.extra["correct"]] for row in rows}
    answers["8-3"] = "A"  # one rotation wrong: the question is wrong
    answers["9-1"] = "Answer:B"  # read by one matcher alone
    scored = llava.mmbench_score(rows, answers, matcher=matcher)
    expected = {"accuracy": 100 * right / 3, "vanilla": 70.0 + 10 * right}
    expected |= {"l2/seeing": 100.0, "l2/logic": 50.0 * (right - 1)}
    assert scored.metrics == pytest.approx(expected)
    assert (scored.settings["matcher"], len(scored.units)) == (matcher, 3)


def test_video_questions() -> None:
    answers = said(["a0", "a1", "a2", "a3", "A0", "a1.", " a2", "", "x3", "a"])
    examples = [example(n, choices=FOUR, correct=n % 4) for n in range(10)]
    scored = exact.video_score(examples, answers)
    parsed = [0, 1, 2, 3, 0, 1, 0, 0, 3, 0]
    right = sum(index == n % 4 for n, index in enumerate(parsed))
    assert scored.metrics == pytest.approx({"accuracy": 40.0, "value_accuracy": 10.0 * right})
    third = exact.video_score(examples[:3], {"0": "a0"}).metrics
    assert third == {"accuracy": pytest.approx(100 / 3), "value_accuracy": 33.33}  # two decimals, as the server
    assert exact.video_score(examples, {**answers, "x": "a1"}).metrics == scored.metrics
    with pytest.raises(UserError):
        exact.how2qa_score(examples, {**answers, "x": "a1"})


def test_nlvr2() -> None:
    rows = [  # identifier, label, answer, right
        ("dev-1-0-0", "True", "true", 1),
        ("dev-1-1-0", "False", "False", 1),
        ("dev-1-0-1", "True", "True", 1),
        ("dev-1-1-1", "False", "true", 0),
        ("dev-2-0-0", "True", " True", 0),
        ("dev-2-1-0", "True", "TRUE", 1),
        ("dev-3-0-0", "False", "false.", 0),
        ("dev-3-0-1", "False", "false", 1),
        ("dev-4-0-0", "True", "", 0),
        ("dev-4-0-1", "True", "yes", 0),
    ]
    examples = [example(name, label) for name, label, *_ in rows]
    scored = vqa.nlvr2_score(examples, {name: answer for name, _, answer, _ in rows})
    assert list(scored.per_item.values()) == [row[-1] for row in rows]
    # sentences: 1-0 both right, 1-1 one wrong, 2-0 one wrong, 3-0 wrong, 3-1 right, 4-0 and 4-1 wrong
    assert scored.metrics == pytest.approx({"accuracy": 50.0, "consistency": 100 * 2 / 7})
    assert len(scored.units) == 7
    with pytest.raises(UserError):
        vqa.nlvr2_score([example("12-3", "true")], {})


def test_commonsense_is_the_mean_over_tasks() -> None:
    rows = [("boolq", "true", "true")] * 4 + [("piqa", "solution1", "solution2")] * 5 + [("boolq", "true", "TRUE")]
    examples = [example(n, truth, task=task) for n, (task, truth, _) in enumerate(rows)]
    scored = exact.commonsense_score(examples, said([row[2] for row in rows]), rule="llm_adapters")
    assert scored.metrics == pytest.approx({"average": 40.0, "boolq": 80.0, "piqa": 0.0})
    assert scored.settings == {"extraction": "llm_adapters"}


def test_judged_benchmarks_take_grades_and_reviews() -> None:
    capable = [example(f"v1_{n}", capability=["rec"] if n < 5 else ["rec", "ocr"]) for n in range(10)]
    scored = llava.score_grades(capable, {f"v1_{n}": n / 10 for n in range(9)})
    assert scored.metrics == pytest.approx({"total": 36.0, "capability/ocr": 52.0, "capability/rec": 36.0})
    assert scored.failed == ("v1_9",)
    with pytest.raises(UserError):
        llava.score_grades(capable, {"v1_0": 7.0})
    bench = [example(n, "ref", category=kind) for n, kind in enumerate(["conv"] * 4 + ["detail"] * 3 + ["complex"] * 3)]
    reviews = {str(n): f"{8 if n < 4 else 10} {n}\nbecause, 3 things" for n in range(10)}
    metrics = llava.score_reviews(bench, reviews).metrics
    expected = {"relative score": 100 * 45 / 92, "category/conv": 100 * 6 / 32, "mean/model": 4.5}
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert llava.scores_of("8.5, 7\nText") == (8.5, 7.0)
    with pytest.raises(UserError):
        llava.scores_of("Both are good\n8 7")
    with pytest.raises(UserError):
        llava.score_reviews(bench, {str(n): "1 1" for n in range(9)})


def test_exact_match_by_kind() -> None:
    kinds = {"0": "color", "1": "color", "2": "color", "3": "yes/no"}
    truth = ["red", "red", "red", "yes", "yes"]
    examples = [example(n, text, **({"kind": kinds[str(n)]} if n < 4 else {})) for n, text in enumerate(truth)]
    found = exact.score(examples, said(["red", "blue", None, "yes", " "]))
    assert (found.n, found.failed) == (5, ("2",))
    assert found.metrics == pytest.approx({"accuracy": 40.0, "kind/color": 100 / 3, "kind/yes/no": 100.0})
    assert {name: found.items_of(name) for name in found.metrics} == {"accuracy": 5, "kind/color": 3, "kind/yes/no": 1}
    reasoned = [example(0, "blue circle, so no"), example(1, "no")]
    after = exact.score(reasoned, said(["red square, so no", "it is blue, so yes"]), answer_after=", so ")
    assert after.metrics["accuracy"] == 50.0
    with pytest.raises(ValueError, match="nothing"):
        exact.score([], {})


def test_own_scores_take_the_best_of_several_right_answers() -> None:
    examples = [example(1, "a dog", "Dog", kind="animal"), example(2, "4", kind="number"), example(3, "x")]
    scored = SCORINGS["exact"](examples, {"1": "dog.", "2": "5"})
    assert scored.metrics == pytest.approx({"accuracy": 100 / 3, "kind/animal": 100.0, "kind/number": 0.0})
    assert scored.failed == ("3",)
    anls = SCORINGS["anls"](examples, {"1": "dogs", "2": "4"}).metrics
    assert anls["anls"] == pytest.approx(100 * (0.75 + 1) / 3)
    assert SCORINGS["relaxed"](examples, {"2": "4.1"}).metrics["relaxed accuracy"] == pytest.approx(100 / 3)


@pytest.mark.parametrize(
    ("answer", "choices", "right"),
    [
        *((answer, ("red", "pale blue"), right) for answer, right in (("A.", 0), ("a pale blue", 1), ("no", None))),
        *((answer, ("red", "blue"), right) for answer, right in (("a.", 0), (" B.", 1), ("A) red", 0))),
        *(("10", ("1", "10"), 1), ("10 or 1", ("1", "10"), None)),
        *(("unknown", ("no", "unknown"), 1), ("b", ("yes", "no"), 1)),
        *(("Cats and dogs.", ("cat", "cats and dogs"), 1), ("cat", ("cat", "cats and dogs"), 0)),
        *(("CO", ("Co", "CO"), 1), ("co", ("Co", "CO"), None), ("a", ("b", "a"), 1)),
        ("A", ("B", "A"), 0),  # the prompt asks for a letter
    ],
)
def test_a_choice_by_letter_or_text(answer: str, choices: tuple[str, ...], right: int | None) -> None:
    for correct in range(len(choices)):
        scored = SCORINGS["choice"]([example(1, choices=choices, correct=correct)], {"1": answer})
        assert scored.metrics["accuracy"] == 100.0 * (correct == right)


TEXTS = st.text(alphabet="aB10 .", min_size=2, max_size=5).filter(lambda text: len(exact.normalised(text)) > 1)
"""No letters alone: as answers they are letters, whatever the choices' texts."""


@given(choices=st.lists(TEXTS, min_size=2, max_size=4, unique_by=exact.normalised), data=st.data())
def test_the_text_of_any_choice_is_that_choice(choices: list[str], data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, len(choices) - 1))
    text = choices[correct]
    answer = data.draw(st.sampled_from([text, text.upper(), f" {text}.", "ABCD"[correct], "abcd"[correct]]))
    scored = SCORINGS["choice"]([example(1, choices=choices, correct=correct)], {"1": answer})
    assert scored.metrics["accuracy"] == 100.0


def any_row(number: int) -> Example:
    """A record that every benchmark can score; two of each picture."""
    extra = {"human_answers": ["yes"] * 10, "index": number, "correct": 0, "category": "count", "task": "boolq"}
    return example(f"dev-{number}-0-0", "yes", images=[f"{number // 2}.jpg"], choices=FOUR, **extra)


@pytest.mark.parametrize(
    ("name", "mode"),
    [(name, mode) for name, row in BENCHMARKS.items() if not row.shares_answers for mode in row.modes],
)
def test_a_missing_answer_is_wrong_and_named(name: str, mode: str) -> None:
    examples = [any_row(number) for number in range(4)]
    answers = dict.fromkeys((row.id for row in examples[1:]), "a0" if name in {"tvqa", "how2qa"} else "yes")
    scored = BENCHMARKS[name].modes[mode](examples, answers)
    assert (scored.n, scored.failed, scored.per_item[examples[0].id]) == (4, (examples[0].id,), 0.0)
    assert all(value >= 0 for value in scored.metrics.values())


def test_what_a_record_must_say_to_be_scored() -> None:
    with pytest.raises(UserError):
        llava.seed_score([example(1, choices=FOUR)], {"1": "A"})
    with pytest.raises(UserError):
        vqa.vqa_score([example("q", "yes")], {"q": "yes"})  # one person


def lines(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in shared(path).read_text().splitlines()]


def test_how2qa_and_tvqa_as_published() -> None:
    rows = lines("value/how2qa_val_release.jsonl")
    examples = [example(row["qid"], choices=FOUR, correct=row["answer_idx"]) for row in rows]
    counts = Counter(row["answer_idx"] for row in rows)
    assert (len(rows), [counts[n] for n in range(4)]) == (3115, [778, 727, 781, 829])
    for answer, accuracy, value in (("a1", 100 * 727 / 3115, 23.34), ("", 0.0, 24.98)):  # 778 of 3,115
        metrics = exact.how2qa_score(examples, {row.id: answer for row in examples}).metrics
        assert metrics == {"accuracy": pytest.approx(accuracy), "value_accuracy": value}
    shows = json.loads(shared("value/tvqa_val_solution.json").read_text())["solution"]
    answers = {name: correct for questions in shows.values() for name, correct in questions.items()}
    asked = [example(name, choices="abcde", correct=correct) for name, correct in answers.items()]
    scored = exact.video_score(asked, {name: f"a{correct}" for name, correct in answers.items()})
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
    assert len(scored.units) == len({row["identifier"].split("-")[0] for row in rows})


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
        mine = [(row.answers[0].text, answers[row.id][:2] == "No") for row in examples if row.id.startswith(category)]
        tp, yes = sum(label == "yes" and not no for label, no in mine), sum(not no for _, no in mine)
        assert scored.metrics[f"{category}/yes share"] == pytest.approx(100 * yes / 3000)
        assert scored.metrics[f"{category}/precision"] == pytest.approx(100 * tp / yes)
        assert scored.metrics[f"{category}/f1"] == pytest.approx(200 * tp / (yes + 1500))  # 1,500 are yes in each
