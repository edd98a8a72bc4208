"""Records as LLaVA's training JSON: the benchmark's wording, what is left out, and what the reader makes of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_prep.llava_conversations import conversation_of, main
from dora_vl.data.example import Answer, Clip, Example, write_examples
from dora_vl.data.table import load_table
from dora_vl.data.turns import Turn
from dora_vl.errors import BadSample
from dora_vl.evaluation.benchmarks import BENCHMARKS
from dora_vl.evaluation.scores.benchmark import Benchmark

TRUE = Answer(text="true")
AS_IS = Benchmark(modes={})
CHOOSING = sorted(name for name, benchmark in BENCHMARKS.items() if benchmark.chooses)


def test_one_picture_is_asked_in_the_benchmark_s_words() -> None:
    example = Example(id="12-0", images=("a/b.png",), question="There is a box.", answers=(TRUE, Answer(text="no")))
    asked = "<image>\nThere is a box.\nIs this true or false? Answer the question using a single word or phrase."
    assert conversation_of(example, BENCHMARKS["nlvr"]) == {
        "id": "12-0",
        "image": "a/b.png",
        "conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": "true"}],
    }


def test_several_pictures_and_turns() -> None:
    turns = (Turn("user", "<image>\n<image>\nWhich?"), Turn("assistant", "The first."))
    made = conversation_of(Example(id="7", images=("l.png", "r.png"), turns=turns), AS_IS)
    assert made["image"] == ["l.png", "r.png"]
    assert [turn["value"] for turn in made["conversations"]] == ["<image>\n<image>\nWhich?", "The first."]


def test_a_system_turn_is_the_first_one(tmp_path: Path) -> None:
    turns = (Turn("system", "Be brief."), Turn("user", "<image>\nWhat?"), Turn("assistant", "A cat."))
    made = conversation_of(Example(id="7", images=("a.png",), turns=turns), AS_IS)
    assert made["conversations"][0] == {"from": "system", "value": "Be brief."}
    (tmp_path / "llava.jsonl").write_text(json.dumps(made) + "\n", encoding="utf-8")
    rows = load_table(tmp_path / "llava.jsonl", cache_folder=tmp_path / "cache")
    assert rows["problem"] == [None]
    assert [turn["text"] for turn in rows["turns"][0]] == [turn.text for turn in turns]


@pytest.mark.parametrize("name", CHOOSING)
@pytest.mark.parametrize("correct", [0, 1])
def test_where_a_letter_is_asked_for_the_reply_is_one_that_counts_as_right(name: str, correct: int) -> None:
    choices = ("a dog", "a cat")
    example = Example(
        id="1",
        images=("a.png",),
        question="Which animal?",
        choices=choices,
        answers=(Answer(text=choices[correct]),),
        extra={"correct": correct, "index": 1},
    )
    made, benchmark = conversation_of(example, BENCHMARKS[name]), BENCHMARKS[name]
    asked, reply = (turn["value"] for turn in made["conversations"])
    assert "\nA. a dog\nB. a cat\n" in asked
    assert reply == "AB"[correct]
    for score in benchmark.modes.values():
        assert score([example], {"1": reply}).metrics["accuracy"] == 100.0


def test_a_whole_talk_about_choices_keeps_its_reply() -> None:
    turns = (Turn("user", "Cat or dog?"), Turn("assistant", "A cat."))
    example = Example(id="1", turns=turns, choices=("dog", "cat"), extra={"correct": 1})
    assert conversation_of(example, BENCHMARKS["seed"])["conversations"][-1]["value"] == "A cat."


@pytest.mark.parametrize(
    ("benchmark", "example"),
    [
        ("scienceqa", Example(id="1", question="?", choices=("a", "b"), answers=(Answer(text="a"),))),
        ("scienceqa", Example(id="1", question="?", answers=(TRUE,), extra={"correct": 0})),
        ("scienceqa", Example(id="1", question="?", choices=("a", "b"), extra={"correct": 2})),
        ("scienceqa", Example(id="1", question="?", choices=tuple("x" * 27), extra={"correct": 0})),
        ("nlvr", Example(id="1", question="?")),
        ("nlvr", Example(id="1", question="?", answers=(Answer(text=" "),))),
        ("nlvr", Example(id="1", turns=(Turn("user", "?"),))),
        ("nlvr", Example(id="1", question="?", answers=(TRUE,), videos=(Clip(path="a.mp4"),))),
    ],
)
def test_what_cannot_be_trained_on(benchmark: str, example: Example) -> None:
    with pytest.raises(BadSample) as bad:
        conversation_of(example, BENCHMARKS[benchmark])
    assert bad.value.sample_id == "1"


def test_the_command_writes_what_the_reader_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records, written = tmp_path / "train.jsonl", tmp_path / "out" / "llava.jsonl"
    sound = [Example(id=str(n), images=(f"{n}.png",), question=f"q{n}", answers=(TRUE,)) for n in range(20)]
    write_examples(records, [*sound, Example(id="unanswered", images=("x.png",), question="?")])
    run(monkeypatch, records, written)
    first = written.read_bytes()
    ids = [json.loads(line)["id"] for line in first.splitlines()]
    assert sorted(ids, key=int) == [example.id for example in sound]
    assert ids != [example.id for example in sound], "publishers' order was kept"
    rows = load_table(written, cache_folder=tmp_path / "cache")
    assert rows.num_rows == 20
    assert not any(rows["problem"])
    run(monkeypatch, records, written)
    assert written.read_bytes() == first


def test_bad_files_end_with_status_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_examples(tmp_path / "unanswered.jsonl", [Example(id="1", question="?")])
    for name in ("nothing.jsonl", "unanswered.jsonl"):
        with pytest.raises(SystemExit) as stopped:
            run(monkeypatch, tmp_path / name, tmp_path / "out.jsonl")
        assert stopped.value.code == 2
    assert not (tmp_path / "out.jsonl").exists()


def run(monkeypatch: pytest.MonkeyPatch, records: Path, to: Path, benchmark: str = "nlvr") -> None:
    """The command as it is typed."""
    typed = ["llava_conversations", "--records", str(records), "--benchmark", benchmark, "--to", str(to)]
    monkeypatch.setattr("sys.argv", typed)
    main()
