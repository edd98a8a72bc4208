"""Records as LLaVA's training JSON: the benchmark's wording, what is left out, and what the reader makes of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.llava_conversations import conversation_of, main
from dora_vl.data.example import Answer, Example, from_record, write_examples
from dora_vl.data.table import load_table
from dora_vl.errors import BadSample
from dora_vl.evaluation.benchmarks import BENCHMARKS

TRUE = Answer(text="true")
CASES = [json.loads(line) for line in Path(__file__).with_name("llava_conversations.jsonl").read_text().splitlines()]
"""Records, and the conversations that they become; nothing where they cannot be trained on."""


@pytest.fixture(autouse=True)
def a_cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("case", CASES)
def test_a_record_is_the_written_conversation_or_cannot_be_trained_on(tmp_path: Path, case: dict[str, Any]) -> None:
    benchmark = BENCHMARKS[case["benchmark"]]
    if "conversation" not in case:
        with pytest.raises(BadSample) as bad:
            conversation_of(from_record(case["record"]), benchmark)
        assert bad.value.sample_id == "1"
        return
    example = from_record(case["record"])
    conversation = conversation_of(example, benchmark)
    assert conversation == case["conversation"]
    (tmp_path / "llava.jsonl").write_text(json.dumps(conversation) + "\n", encoding="utf-8")
    rows = load_table(tmp_path / "llava.jsonl")
    assert rows["problem"] == [None]
    assert [turn["text"] for turn in rows["turns"][0]] == [turn["value"] for turn in conversation["conversations"]]
    reply = conversation["conversations"][-1]["value"]
    for score in benchmark.modes.values() if benchmark.chooses and not example.turns else ():
        assert score([example], {example.id: reply}).metrics["accuracy"] == 100.0


def test_the_command_writes_what_the_reader_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records, written = tmp_path / "train.jsonl", tmp_path / "out" / "llava.jsonl"
    sound = [Example(id=str(n), images=(f"{n}.png",), question=f"q{n}", answers=(TRUE,)) for n in range(20)]
    write_examples(records, [*sound, Example(id="unanswered", images=("x.png",), question="?")])
    run(monkeypatch, records, written)
    first = written.read_bytes()
    ids = [json.loads(line)["id"] for line in first.splitlines()]
    assert sorted(ids, key=int) == [example.id for example in sound]
    assert ids != [example.id for example in sound], "publishers' order was kept"
    rows = load_table(written)
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
    typed = ["llava_conversations", "--records", str(records), "--benchmark", benchmark, "--to", str(to)]
    monkeypatch.setattr("sys.argv", typed)
    main()
