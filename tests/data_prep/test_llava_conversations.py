"""Records as LLaVA's training JSON: the benchmark's wording, what is left out, and what the reader makes of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_prep.llava_conversations import conversation_of, main
from dora_vl.data.examples import Answer, Clip, Example, write_examples
from dora_vl.data.records import load_llava
from dora_vl.data.turns import Turn
from dora_vl.errors import BadSample
from dora_vl.scores.prompts import as_is, true_or_false

TRUE = Answer(text="true")


def test_one_picture_is_asked_in_the_benchmark_s_words() -> None:
    example = Example(id="12-0", images=("a/b.png",), question="There is a box.", answers=(TRUE, Answer(text="no")))
    asked = "<image>\nThere is a box.\nIs this true or false? Answer the question using a single word or phrase."
    assert conversation_of(example, true_or_false) == {
        "id": "12-0",
        "image": "a/b.png",
        "conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": "true"}],
    }


def test_several_pictures_and_turns() -> None:
    turns = (Turn("user", "<image>\n<image>\nWhich?"), Turn("assistant", "The first."))
    made = conversation_of(Example(id="7", images=("l.png", "r.png"), turns=turns), as_is)
    assert made["image"] == ["l.png", "r.png"]
    assert [turn["value"] for turn in made["conversations"]] == ["<image>\n<image>\nWhich?", "The first."]


@pytest.mark.parametrize(
    ("example", "reason"),
    [
        (Example(id="1", question="?"), "no answer"),
        (Example(id="1", question="?", answers=(Answer(text=" "),)), "no answer"),
        (Example(id="1", turns=(Turn("user", "?"),)), "no answer"),
        (Example(id="1", question="?", answers=(TRUE,), video=Clip(path="a.mp4")), "video"),
    ],
)
def test_what_cannot_be_trained_on(example: Example, reason: str) -> None:
    with pytest.raises(BadSample, match=f"sample 1: .*{reason}"):
        conversation_of(example, as_is)


def test_the_command_writes_what_the_reader_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    records, written = tmp_path / "train.jsonl", tmp_path / "out" / "llava.jsonl"
    sound = [Example(id=str(n), images=(f"{n}.png",), question=f"q{n}", answers=(TRUE,)) for n in range(20)]
    write_examples(records, [*sound, Example(id="unanswered", images=("x.png",), question="?")])
    run(monkeypatch, records, written)
    assert "20 conversations, 1 records left out\n  left out: sample unanswered" in capsys.readouterr().out
    first = written.read_bytes()
    ids = [json.loads(line)["id"] for line in first.splitlines()]
    assert sorted(ids, key=int) == [example.id for example in sound]
    assert ids != [example.id for example in sound], "publishers' order was kept"
    rows = load_llava(written, cache_folder=tmp_path / "cache")
    assert rows.num_rows == 20
    assert not any(rows["problem"])
    run(monkeypatch, records, written)
    assert written.read_bytes() == first


def test_bad_files_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written = tmp_path / "out.jsonl"
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, tmp_path / "nothing.jsonl", written)
    assert stopped.value.code == 2
    unanswered = tmp_path / "unanswered.jsonl"
    write_examples(unanswered, [Example(id="1", question="?")])
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, unanswered, written)
    assert stopped.value.code == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert "nothing.jsonl: no such file" in errors[0]
    assert "none of its 1 records can be trained on; sample 1: it has no answer" in errors[1]
    assert not written.exists()


def run(monkeypatch: pytest.MonkeyPatch, records: Path, to: Path) -> None:
    """The command as it is typed."""
    typed = ["llava_conversations", "--records", str(records), "--benchmark", "nlvr", "--to", str(to)]
    monkeypatch.setattr("sys.argv", typed)
    main()
