"""Benchmarks of one's own and question files of others, the cloze form, and a row of each source up to its score."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dora_vl.backbones.families.formats import PROMPTS, TEMPLATES, Instruction
from dora_vl.cli import main
from dora_vl.data import prepare
from dora_vl.data.benchmarks.commonsense import cloze_row
from dora_vl.data.benchmarks.table import SOURCES
from dora_vl.data.example import Answer, Example, iterate_examples, write_examples
from dora_vl.data.readers import read_row
from dora_vl.data.turns import Turn
from dora_vl.errors import BadSample, UserError
from dora_vl.evaluation import vlbart_tasks
from dora_vl.evaluation.benchmarks import BENCHMARKS, find_benchmark, read_own, read_set
from dora_vl.evaluation.predictions import read_predictions
from dora_vl.evaluation.questions import outputs_of, read_question_file, read_questions
from dora_vl.evaluation.scores import benchmark as prompts
from dora_vl.evaluation.scores.benchmark import LETTER, SHORT, prompt_turns
from dora_vl.evaluation.scores.exact import PATTERNS, cloze_score
from dora_vl.evaluation.test_sets import score_lines
from dora_vl.evaluation.vlbart_tasks import Subtask
from tests.backbones.tiny_language import write_tiny_language

RECEIPTS = "name: receipts\nscoring: anls\nfile: receipts.jsonl\nprompt: as_is\nmax_new_tokens: 24\nframes: 2\n"


def written(folder: Path, text: str = RECEIPTS) -> Path:
    (folder / "receipts.yaml").write_text(text)
    examples = [
        Example(id=name, question="Total?", answers=(Answer(text="12.50"), Answer(text="12.5 euro"))) for name in "ab"
    ]
    write_examples(folder / "receipts.jsonl", examples)
    return folder / "receipts.yaml"


def test_a_file_of_a_few_lines_is_a_benchmark(tmp_path: Path, capsys: Any) -> None:
    benchmark = written(tmp_path)
    (tmp_path / "p.jsonl").write_text('{"id": "a", "answer": "12.51"}\n{"id": "b", "answer": "12.5  Euro"}\n')
    options = ["--predictions", str(tmp_path / "p.jsonl"), "--to", str(tmp_path / "to")]
    main(["evaluate", "--benchmarks", str(benchmark), *options])
    entry = json.loads((tmp_path / "to" / "metrics.json").read_text())["sets"]["receipts"]
    assert (entry["headline"], entry["metrics"]["anls"]["value"]) == ("anls", pytest.approx(90.0))
    assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["receipts", "anls", "90.00"]
    own = read_own(benchmark).benchmark
    assert (own.max_new_tokens, own.frames, own.prompt) == (24, 2, prompts.as_is)
    write_examples(tmp_path / "other.jsonl", [Example(id="z", answers=(Answer(text="x"),))])
    test_set = read_set(f"{benchmark}={tmp_path / 'other.jsonl'}", tmp_path)
    assert [example.id for example in test_set.examples] == ["z"]


@pytest.mark.parametrize(
    "text",
    [
        *("name: mine", "name: mine\nscoring: bleu", "- name", "name: [", "[" * 5000),
        *(f"name: mine\nscoring: exact\n{more}" for more in ("prompt: long", "files: x", "frames: 0")),
        *(f"name: {name}\nscoring: exact" for name in ("pope", "../mine", "3")),
    ],
)
def test_a_file_that_says_something_else_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError):
        find_benchmark(str(written(tmp_path, text)))


# What a model is asked: the last round of any format's rows, LLaVA's question files, the outputs that are admitted.


def record(name: object, *texts: str, **more: object) -> dict[str, object]:
    turns = [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(texts)]
    return {"id": name, "conversations": turns, **more}


def about_picture(name: object, *texts: str, **more: object) -> dict[str, object]:
    return record(name, *texts, image="a.png", **more)


def lines(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_last_round_is_the_question_and_the_rounds_before_it_are_its_context(tmp_path: Path) -> None:
    rows = [
        about_picture(7, "<image>\nwhat?", "a cat", "which colour?", "grey", kind="color", unit=9),
        about_picture("a", "<image>\nwhat?", "a cat"),
    ]
    (question, first), unreadable = read_questions(lines(tmp_path / "q.jsonl", rows))
    assert unreadable == {}
    turns = (Turn("user", "<image>\nwhat?"), Turn("assistant", "a cat"), Turn("user", "which colour?"))
    assert (question.id, question.images, question.turns) == ("7", ("a.png",), turns)
    assert question.question == "which colour?"
    assert (question.answers, question.extra) == ((Answer(text="grey"),), {"kind": "color", "unit": "9"})
    assert (first.question, first.extra) == ("what?", {})  # without its placeholder


def test_unreadable_records_are_named_and_the_limit_counts_them(tmp_path: Path) -> None:
    embedded = {"id": "d", "image": "data:image/png;base64,aGk=", "question": "q", "answer": "a"}
    rows = [about_picture(name, text, "x") for name, text in (("a", "<image><image> two"), ("b", "<image> q"))]
    path = lines(tmp_path / "q.jsonl", [*rows, embedded, about_picture("c", "<image>", "x")])
    questions, unreadable = read_questions(path, limit=3)
    assert [question.id for question in questions] == ["b"]
    assert unreadable.keys() == {"a", "d"}


@pytest.mark.parametrize("rows", [None, [], [about_picture("a", "<image>", answer) for answer in "xy"]])
def test_what_is_no_question_file_is_refused(rows: list[dict[str, Any]] | None, tmp_path: Path) -> None:
    if rows is not None:
        lines(tmp_path / "q.jsonl", rows)
    with pytest.raises(UserError):
        read_questions(tmp_path / "q.jsonl")


# LLaVA's own question files as a benchmark's file: asked as they stand, scored where they hold the answers.


@pytest.mark.parametrize("name", ["vqav2", "gqa", "textvqa", "pope", "mme", "vizwiz", "seed", "mmbench", "mmvet"])
def test_questions_are_asked_as_they_stand(name: str, tmp_path: Path) -> None:
    rows = [
        {"question_id": 5, "image": "a.jpg", "text": f"Is it <image> red?\n{SHORT}", "category": "random"},
        {"question_id": "x7", "text": f"Why?\nA. so\nB. no\n{LETTER}"},
    ]
    path = lines(tmp_path / "q.jsonl", rows)
    test_set = read_set(f"{name}={path}", tmp_path)
    first, second = test_set.examples
    assert (first.id, first.images, first.extra) == ("5", ("a.jpg",), {"category": "random"})
    assert prompt_turns(first, test_set.benchmark.prompt) == (Turn("user", f"<image>\nIs it  red?\n{SHORT}"),)
    assert prompt_turns(second, test_set.benchmark.prompt) == (Turn("user", f"Why?\nA. so\nB. no\n{LETTER}"),)
    assert test_set.score is None
    assert read_set(f"{name}={path}", tmp_path, limit=1).examples == [first]


def test_questions_of_one_id_are_numbered(tmp_path: Path) -> None:
    rows = [{"question_id": name, "text": f"{name}{n}?"} for name, n in (("a", 1), ("b", 1), ("a", 2), ("a", 3))]
    names = [question.id for question in read_question_file(lines(tmp_path / "q.jsonl", rows))]
    assert names == ["a#1", "b", "a#2", "a#3"]


@pytest.mark.parametrize(
    "row", [{"question_id": [1]}, {"question_id": 1, "image": ["a"]}, {"id": 1}, {"question_id": 0}]
)
def test_what_is_no_question_or_one_once_more_is_refused(row: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError):
        read_question_file(lines(tmp_path / "q.jsonl", [{"question_id": 0, "text": "?"}, {"text": "?", **row}]))


def test_scienceqas_conversations_have_choices(tmp_path: Path) -> None:
    options = "Which?\nA. map\nB. pen"
    rows = [
        record("4", f"Context: A. Look.\n{options}\n<image>", "The answer is B.", image="4/image.png"),
        record("5", "Which?\nContext: N/A\nOptions: (A) red (B) pale blue (C) green", "The answer is A.\nBECAUSE: so"),
        record("6", options, "pen"),
        record("7", options, "nothing of it"),
        record("8", options, ""),
    ]
    path = tmp_path / "llava_test_CQM-A.json"
    path.write_text(json.dumps(rows))
    test_set = read_set(f"scienceqa={path}", tmp_path)
    by_id = {example.id: example for example in test_set.examples}
    assert (by_id["4"].choices, by_id["5"].choices) == (("map", "pen"), ("red", "pale blue", "green"))
    assert [by_id[name].extra.get("correct") for name in "4567"] == [1, 0, 1, None]
    (turn,) = prompt_turns(by_id["4"], test_set.benchmark.prompt)
    assert turn.text == f"<image>\nContext: A. Look.\n{options}\n{LETTER}"
    assert (test_set.not_scored.keys(), test_set.unreadable.keys()) == ({"7", "8"}, {"8"})
    answers = {"4": "B", "5": "B", "6": "The answer is B.", "7": "A"}
    lines(tmp_path / "p.jsonl", [{"question_id": name, "text": text} for name, text in answers.items()])
    predictions = ["--predictions", str(tmp_path / "p.jsonl"), "--to", str(tmp_path)]
    main(["evaluate", "--benchmarks", f"scienceqa={path}", *predictions])
    entry = json.loads((tmp_path / "metrics.json").read_text())["sets"]["scienceqa"]
    assert (entry["n"], entry["metrics"]["accuracy"]["value"]) == (3, pytest.approx(200 / 3))  # two of 4, 5, 6
    assert entry["metrics"]["image accuracy"]["value"] == 100.0


@pytest.mark.parametrize("truth", ["G", "(G)", "G.", "g:", "The answer is G.", "G. 6", "6"])
def test_a_right_choice_may_be_any_letter_of_the_choices(truth: str, tmp_path: Path) -> None:
    (tmp_path / "many.yaml").write_text("name: many\nscoring: choice\n")
    choices = "\n".join(f"{letter}. {number}" for number, letter in enumerate("ABCDEFGHIJ"))
    path = lines(tmp_path / "q.jsonl", [record("1", f"How many?\n{choices}", truth)])
    test_set = read_set(f"{tmp_path / 'many.yaml'}={path}", tmp_path)
    assert test_set.examples[0].extra["correct"] == 6
    assert test_set.score is not None
    for said in ("G", "(G)", "g.", "6"):
        assert test_set.score(test_set.examples, {"1": said}).metrics["accuracy"] == 100.0


TRUTH = "the correct answer is answer2"
TEXT = "Is it?\n\nAnswer1: a Answer2: b\n\nAnswer format: answer1/answer2"


def instruction(text: str, answer: str = "answer2", added: str = "") -> Example:
    turn = Turn("user", f"{text}\n{added}" if added else text, len(added))
    return Example(id="q", turns=(turn,), answers=(Answer(text=answer),), extra={"output": TRUTH})


def test_the_choices_stand_in_the_instruction_s_last_line_and_the_answer_is_one_of_them() -> None:
    for added in ("", "a text\nabout it"):
        assert outputs_of(instruction(TEXT, added=added)) == ["the correct answer is answer1", TRUTH]
    for text, answer in (("Is it?", "answer2"), (TEXT, "answer3"), (TEXT, "answer1")):
        with pytest.raises(BadSample) as refused:
            outputs_of(instruction(text, answer))
        assert refused.value.sample_id == "q"


CLOZE_ROWS: dict[str, dict[str, Any]] = {
    row["form"]: row
    for row in map(json.loads, Path(__file__).with_name("cloze_rows.jsonl").read_text("utf-8").splitlines())
}
"""By form a published file's row, and the contexts, endings and right choice that it becomes."""


@pytest.mark.parametrize("form", CLOZE_ROWS)
def test_rows_of_every_form(form: str) -> None:
    expected = CLOZE_ROWS[form]
    example = cloze_row({**expected["row"], "row": 7}, task=expected["task"], split="test")
    assert example.id == f"{expected['task']}-test-7"
    assert example.extra == {name: expected[name] for name in ("task", "correct", "contexts", "endings")}
    right = (expected[name][expected["correct"]] for name in ("contexts", "endings"))
    assert (example.question, example.answers[0].text) == (*right,)


@pytest.mark.parametrize(
    ("task", "raw"),
    [
        ("boolq", {"instruction": "Please answer: x?\n\nAnswer format: true/false", "answer": "true"}),
        ("winogrande", {"sentence": "No blank.", "option1": "a", "option2": "b", "answer": "1"}),
        ("piqa", {"goal": "g", "sol1": "a", "sol2": "b", "label": "2"}),
        ("piqa", {"title": "x"}),
    ],
)
def test_rows_that_cannot_be_used_are_named(task: str, raw: dict[str, Any]) -> None:
    with pytest.raises(BadSample) as caught:
        cloze_row({**raw, "row": 3}, task=task, split="train")
    assert caught.value.sample_id == f"{task}-train-3"


def test_a_sample_is_trained_on_what_follows_the_context() -> None:
    prompt = Instruction(name="cloze", train_on="answer", end="</s>")
    chat = prompt.render([Turn("user", "Question: q\nAnswer:"), Turn("assistant", "fire")])
    ((start, end),) = chat.answer_spans
    assert (chat.text, chat.text[start:end]) == ("Question: q\nAnswer: fire</s>", " fire</s>")


def example(name: str, task: str, endings: list[str], correct: int) -> Example:
    contexts = [f"c {number}" for number in range(len(endings))] if task == "winogrande" else ["c"] * len(endings)
    extra = {"task": task, "correct": correct, "contexts": contexts, "endings": endings}
    return Example(id=name, extra=extra)


def test_both_accuracies_by_hand() -> None:
    examples = [
        example("a", "piqa", ["x", "long one"], 1),  # -2 > -4, but -2/1 < -4/8
        example("b", "piqa", ["x", "y"], 0),
        example("c", "winogrande", ["same", "same"], 0),
        example("d", "winogrande", ["same", "same"], 0),
    ]
    answers = {"a": "-2.0 -4.0", "b": "-1.5 -1.5", "c": "-3 -2", "d": "-1 -2"}
    scored = cloze_score(examples, answers)
    assert scored.metrics == {"average": 50.0, "piqa": 50.0, "winogrande": 50.0, "normalised piqa": 100.0}
    assert scored.shares == {"a": 0.0, "b": 1.0, "c": 0.0, "d": 1.0}
    for task in PATTERNS:  # the normalised one is of the sets whose task file in lm-eval has acc_norm
        scored = cloze_score([example("a", task, ["x", "long one"], 1)], {"a": "-2.0 -4.0"})
        has_it = task not in ("boolq", "social_i_qa", "winogrande")
        assert scored.metrics == {"average": 0.0, task: 0.0} | ({f"normalised {task}": 100.0} if has_it else {})


@pytest.fixture(scope="module")
def scored_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cloze")
    write_tiny_language(folder / "model")
    for name, form in (("piqa", "piqa"), ("winogrande", "winogrande"), ("ARC-Easy", "arc")):
        rows = [CLOZE_ROWS[form]["row"] | ({"goal": f"Dry {n} hands"} if form == "piqa" else {}) for n in range(3)]
        (folder / "raw" / name).mkdir(parents=True)
        (folder / "raw" / name / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(["prepare", "cloze", "--from", str(folder / "raw"), "--to", str(folder / "records")])
    words = ["--benchmarks", "piqa,winogrande,ARC-Easy", "--answer-by", "cloze", "--template", "cloze"]
    words += ["--records", str(folder / "records"), "--to", str(folder / "scores"), "--batch-size", "4"]
    main(["evaluate", "--model", str(folder / "model"), *words])
    return folder


def likelihood(model: Any, tokenizer: Any, context: str, ending: str) -> float:
    """Written out: the log-softmax of each token of the ending, summed."""
    ids, before = tokenizer(f"{context} {ending}")["input_ids"], len(tokenizer(context)["input_ids"])
    with torch.no_grad():
        scores = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(scores[position - 1, ids[position]]) for position in range(before, len(ids)))


def test_likelihoods_are_the_model_s(scored_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(scored_folder / "model", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(scored_folder / "model")
    scores = {(line["set"], line["id"]): line for line in score_lines(scored_folder / "scores")}
    for task in ("piqa", "winogrande", "ARC-Easy"):
        examples = list(iterate_examples(scored_folder / "records" / task / "test.jsonl"))
        rows = read_predictions(scored_folder / "scores" / "predictions.jsonl")[task]
        answers = {name: row.prediction for name, row in rows.items()}
        assert set(answers) == {example.id for example in examples}
        for example in examples:
            pairs = zip(example.extra["contexts"], example.extra["endings"], strict=True)
            expected = [likelihood(model, tokenizer, *pair) for pair in pairs]
            assert [float(number) for number in answers[example.id].split()] == pytest.approx(expected, abs=2e-4)
            endings = [ending.strip() for ending in example.extra["endings"]]
            compared = scores[task, example.id]
            assert compared["truth"] == endings[example.extra["correct"]]
            assert compared["answer"] == endings[expected.index(max(expected))]


FIXTURES = Path(__file__).parents[1] / "data" / "fixtures"
ROWS: list[dict[str, Any]] = [
    json.loads(line) for line in Path(__file__).with_name("rows_to_scores.jsonl").read_text("utf-8").splitlines()
]
SUBTASKS: Mapping[str, Subtask] = {**vlbart_tasks.image_subtasks(), **vlbart_tasks.video_subtasks()}
OF_ONES_OWN = {"cloze", "llava-json"}  # several forms; test_cloze, test_prepare


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['fixture']}-{row['split']}")
def test_a_row_becomes_prompt_target_and_score(row: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("PATH", "")  # without Java, which takes eight seconds for each score of a caption
    file = prepared(row, tmp_path)
    assert {"asked", "vlbart", "trained", "instruction"} & set(row), "nothing is expected of the prompt"
    benchmark = row.get("benchmark", row["split"].partition("/")[0])
    questions = read_set(f"{benchmark}={file}", tmp_path)
    (example,) = (item for item in questions.examples if item.id == row["id"])
    if "asked" in row:
        (turn,) = prompt_turns(example, questions.benchmark.prompt)
        assert turn.text == row["asked"]
    if "vlbart" in row:
        expected = row["vlbart"]
        prompt = (subtask := SUBTASKS[expected["task"]]).prompt(example)
        assert prompt.subtitles_before + prompt.subtitles + prompt.text == expected["text"]
        assert subtask.target(example, 0, Random(0)).text == expected["target"]
    if "trained" in row:
        expected = row["trained"]
        assert trained_text(expected["template"], file, row["id"]) == (expected["text"], expected["answers"])
    if "instruction" in row:
        prompt = PROMPTS["nvlabs"].before_output(example.question, "", test=True)
        assert (prompt, example.extra["output"]) == (row["instruction"]["text"], row["instruction"]["target"])
    assert bool(row["scores"]) == (questions.score is not None)  # a judge scores the others
    for prediction, share in row["scores"].items():
        scored = questions.score(questions.examples, {example.id: prediction})
        assert scored.shares[example.id] == pytest.approx(share, rel=1e-9), prediction


def test_every_source_is_followed_to_its_score() -> None:
    assert {row["source"] for row in ROWS} | OF_ONES_OWN == set(SOURCES)
    assert {row.get("benchmark", row["split"].partition("/")[0]) for row in ROWS} >= set(BENCHMARKS) - set(PATTERNS)


def prepared(row: Mapping[str, Any], to: Path) -> Path:
    parser = argparse.ArgumentParser()
    prepare.add_arguments(parser)
    words = [row["source"], "--from", str(FIXTURES / row["fixture"]), "--to", str(to)]
    list(prepare.run(parser.parse_args(words)))
    return to / f"{row['split']}.jsonl"


def trained_text(template: str, file: Path, name: str) -> tuple[str, list[str]]:
    """A conversation under a template, and the parts of it that carry labels."""
    rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    (record,) = (row for row in rows if row["id"] == name)
    rendered = TEMPLATES[template].render(read_row(record).turns)
    return rendered.text, [rendered.text[start:end] for start, end in rendered.answer_spans]
