"""Records without a right answer are counted and named; the others are scored, in whole groups."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dora_vl.cli import main
from dora_vl.data.example import Answer, Example, write_examples
from dora_vl.evaluation.questions import read_set


def entry_of(
    name: str, examples: Sequence[Example], answers: dict[str, str], tmp_path: Path, capsys: Any
) -> tuple[dict[str, Any], list[str]]:
    """The benchmark's entry of metrics.json, and what the command said."""
    write_examples(tmp_path / "records.jsonl", examples)
    rows = [json.dumps({"id": one, "answer": said}) + "\n" for one, said in answers.items()]
    (tmp_path / "p.jsonl").write_text("".join(rows))
    options = ["--benchmarks", f"{name}={tmp_path / 'records.jsonl'}", "--predictions", str(tmp_path / "p.jsonl")]
    capsys.readouterr()
    main(["evaluate", *options, "--to", str(tmp_path)])
    said = capsys.readouterr().out.splitlines()
    return json.loads((tmp_path / "metrics.json").read_text())["benchmarks"][name], said


def person(name: str, people: list[str] | None, *answers: str) -> Example:
    extra = {} if people is None else {"human_answers": people}
    return Example(id=name, answers=tuple(Answer(text=text) for text in answers), extra=extra)


@pytest.mark.parametrize("name", ["vqav2", "vizwiz", "textvqa"])
@pytest.mark.parametrize(
    "bare", [person("2", None), person("2", []), person("2", [""] * 10), person("2", [" "] * 10, "")]
)
def test_one_record_without_answers_leaves_the_others_their_score(
    name: str, bare: Example, tmp_path: Path, capsys: Any
) -> None:
    examples = [person("1", ["yes"] * 10, "yes"), bare, person("3", ["no"] * 10, "no")]
    entry, said = entry_of(name, examples, {"1": "yes", "2": "yes", "3": "dog"}, tmp_path, capsys)
    assert (entry["n"], entry["metrics"]["accuracy"]["value"]) == (2, 50.0)
    assert entry["not_scored"] == {"2": "its record holds no right answer"}
    assert f"{name}: 1 of 3 records hold no right answer and are in no score, first '2'; metrics.json names all" in said


def test_an_answer_to_a_record_without_its_own_is_no_stranger(tmp_path: Path, capsys: Any) -> None:
    extra = {"category": "random"}
    examples = [Example(id=n, images=("a",), answers=(Answer(text="yes"),), extra=extra) for n in ("1", "2")]
    bare = Example(id="3", images=("a",), extra=extra)
    entry, _ = entry_of("pope", [*examples, bare], {"1": "yes", "2": "no", "3": "no"}, tmp_path, capsys)
    assert (entry["n"], entry["metrics"]["accuracy"]["value"]) == (2, 50.0)


def test_what_is_scored_together_is_left_out_together(tmp_path: Path, capsys: Any) -> None:
    def choice(name: str, index: int, **correct: int) -> Example:
        return Example(id=name, choices=("red", "blue"), extra={"index": index, **correct})

    examples = [choice("1", 1, correct=0), choice("2", 1_000_001), choice("3", 2, correct=1)]
    entry, _ = entry_of("mmbench", examples, {"1": "A", "2": "A", "3": "B"}, tmp_path, capsys)
    assert (entry["n"], entry["metrics"]["accuracy"]["value"]) == (1, 100.0)
    assert entry["not_scored"].keys() == {"1", "2"}
    statements = [
        Example(id="dev-1-0-0", answers=(Answer(text="True"),)),
        Example(id="dev-1-1-0"),
        Example(id="dev-2-0-0", answers=(Answer(text="True"),)),
    ]
    entry, _ = entry_of("nlvr2", statements, {one.id: "True" for one in statements}, tmp_path, capsys)
    assert (entry["n"], entry["metrics"]["consistency"]["value"]) == (1, 100.0)


def test_one_caption_serves_all_records_of_its_clip(tmp_path: Path) -> None:
    examples = [
        Example(id="1", extra={"clip_id": 5}),
        Example(id="2", answers=(Answer(text="a dog"),), extra={"clip_id": 5}),
        Example(id="3", extra={"clip_id": 6}),
    ]
    write_examples(tmp_path / "records.jsonl", examples)
    one = read_set(f"tvc={tmp_path / 'records.jsonl'}", tmp_path, mode=None, limit=None)
    assert one.not_scored.keys() == {"3"}
    assert [example.id for example in one.scored] == ["1", "2"]


def test_a_choice_that_is_not_said_is_left_out_and_without_any_there_is_no_score(tmp_path: Path, capsys: Any) -> None:
    said, unsaid = ({"correct": 0}, {})
    examples = [Example(id=str(n), choices=("red", "blue"), extra=extra) for n, extra in enumerate((said, unsaid))]
    entry, _ = entry_of("seed", examples, {"0": "A", "1": "A"}, tmp_path, capsys)
    assert (entry["n"], entry["metrics"]["accuracy"]["value"]) == (1, 100.0)
    write_examples(tmp_path / "kept.jsonl", examples[1:])
    assert read_set(f"seed={tmp_path / 'kept.jsonl'}", tmp_path, mode=None, limit=None).scorer is None


@pytest.mark.parametrize("name", ["exact_match", "pope", "mme", "gqa", "openbookqa", "boolq"])
def test_a_record_that_names_a_choice_and_no_answer_is_named(name: str, tmp_path: Path, capsys: Any) -> None:
    extra = {"task": name, "category": "color", "global_group": "color"}
    whole = Example(id="a", images=("a.jpg",), answers=(Answer(text="yes"),), extra=extra)
    bare = Example(id="b", images=("a.jpg",), choices=("yes", "no"), extra={**extra, "correct": 0})
    if name == "gqa":
        bare = Example(id="b", images=("a.jpg",), extra={**extra, "human_answers": ["yes"]})
    with pytest.raises(SystemExit) as left:
        entry_of(name, [whole, bare], {"a": "yes", "b": "yes"}, tmp_path, capsys)
    assert left.value.code == 2
    assert "error: example 'b' has no right answer; prepare the set again" in capsys.readouterr().err
