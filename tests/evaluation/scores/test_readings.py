"""Questions in LLaVA's wording, which choice is right, and how each official script reads an answer.

`readings.jsonl` holds a reading a line, quirks included.
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from dora_vl.data.example import Example, Subtitle
from dora_vl.data.turns import Turn
from dora_vl.errors import BadSample, UserError
from dora_vl.evaluation import vlbart_tasks
from dora_vl.evaluation.benchmarks import read_set
from dora_vl.evaluation.scores import benchmark as prompts
from dora_vl.evaluation.scores import exact, llava, vqa
from dora_vl.evaluation.scores.benchmark import check_choices
from dora_vl.evaluation.scores.vqa import CONTRACTIONS
from tests.shared_data import shared

ROWS: list[dict[str, Any]] = [
    json.loads(line) for line in Path(__file__).with_name("readings.jsonl").read_text().splitlines()
]
MODULES = {"exact": exact, "llava": llava, "vqa": vqa}


@pytest.mark.parametrize("name", dict.fromkeys(row["read"] for row in ROWS))
def test_answers_are_read_as_the_script_does(name: str) -> None:
    module, _, function = name.partition(".")
    read = getattr(MODULES[module], function)
    for row in (row for row in ROWS if row["read"] == name):
        expected = row["expected"]
        expected = pytest.approx(expected) if isinstance(expected, float) else expected
        assert read(*row["given"], **row.get("options", {})) == expected, row


def test_the_table_of_contractions_is_the_published_one_without_its_empty_entries() -> None:
    assert len(CONTRACTIONS) == 118  # 120 less two that map to themselves
    assert {"Im", "Ive", "Id've", "I'dve"} < set(CONTRACTIONS)
    assert (CONTRACTIONS["'ow'sat"], CONTRACTIONS["y'all'dve"]) == ("'ow's'at", "y'all'd've")
    assert not {"shed", "wed", "well", "id", "shell"} & set(CONTRACTIONS)  # words of their own


FILES = {"openbookqa/test.json": 500, "ARC-Easy/test.json": 2376, "ARC-Challenge/test.json": 1172}
FILES |= dict.fromkeys([f"{task}/test_sample.json" for task in ("boolq", "piqa", "social_i_qa", "winogrande")], 40)


@pytest.mark.parametrize("file", FILES)
def test_the_published_commonsense_targets_score_full_marks(file: str) -> None:
    records = json.loads(shared(f"commonsense/{file}").read_text())
    assert len(records) == FILES[file]
    task = file.partition("/")[0]
    for rule in ("nvlabs", "llm_adapters"):
        assert [exact.extracted(row["output"], task, rule) for row in records] == [row["answer"] for row in records]


SHORT, LETTER = prompts.SHORT, "Answer with the option's letter from the given choices directly."
HINTED = {"choices": ("red", "blue"), "extra": {"hint": "Look."}}
CAPTION = "Provide a one-sentence caption for the provided video."
LINES = (Subtitle("well"), Subtitle(""), Subtitle("no"))


@pytest.mark.parametrize(
    ("prompt", "fields", "text"),
    [
        (prompts.letter, HINTED, f"Look.\nWhich?\nA. red\nB. blue\n{LETTER}"),
        (prompts.as_is, {"images": ("a.jpg", "b.jpg")}, "<image>\n<image>\nWhich?"),
        (prompts.about_video, {"subtitles": LINES[1:2]}, "Which?"),  # subtitles without words
        (prompts.caption_of_video, {"subtitles": LINES}, f"Subtitles: well no\n{CAPTION}"),
    ],
)
def test_wording(prompt: prompts.Prompt, fields: dict[str, object], text: str) -> None:
    assert prompts.prompt_turns(Example(id="1", question="Which?", **fields), prompt) == (Turn("user", text),)  # pyright: ignore[reportArgumentType]


def question(**changes: object) -> dict[str, object]:
    return {"id": "q7", "question": "which?", "choices": ["red", "blue", "green"], "extra": {"correct": 1}, **changes}


@pytest.mark.parametrize(
    "changes", [*({"extra": {"correct": index}} for index in (3, "blue", 1.0, True)), {"choices": []}]
)
def test_a_file_whose_right_choice_is_not_there_is_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in (question(id="q6"), question(**changes))))
    with pytest.raises(UserError):
        read_set(f"tvqa={path}", tmp_path)


@pytest.mark.parametrize("task", ["tvqa", "video_words"])
def test_a_choice_task_refuses_to_train_on_what_is_no_choice(task: str) -> None:
    target = vlbart_tasks.video_subtasks()[task].target
    right = Example(id="1", choices=("red", "blue"), extra={"correct": 1})
    assert target(right, None, Random(0)).text == {"tvqa": "a1", "video_words": "blue"}[task]
    for wrong in (Example(id="2", extra={"correct": 0}), Example(id="2", choices=("red",), extra={"correct": -1})):
        with pytest.raises(BadSample) as caught:
            target(wrong, None, Random(0))
        assert caught.value.sample_id == "2"


def test_a_file_whose_answers_the_publisher_keeps_is_no_mistake(tmp_path: Path) -> None:
    kept = [Example(id=name, choices=("red", "blue")) for name in "ab"]
    check_choices(kept, tmp_path / "test.jsonl")
    letters = [Example(id="a", choices=("x",) * 27)]
    check_choices(letters, tmp_path / "test.jsonl", most=None)
    with pytest.raises(UserError):  # there are not so many letters
        check_choices(letters, tmp_path / "test.jsonl")
