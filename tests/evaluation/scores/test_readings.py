"""Questions in LLaVA's wording, how each official script reads an answer, and rewards by name or by own functions."""

import json
import math
import time
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml

from dora_vl.data.example import Answer, Example, Subtitle
from dora_vl.data.turns import Turn
from dora_vl.errors import BadSample, SettingError, UserError
from dora_vl.evaluation import vlbart_tasks
from dora_vl.evaluation.benchmarks import read_set
from dora_vl.evaluation.rewards import check_truths, rewards_of
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
def test_wording(prompt: prompts.PromptFunction, fields: dict[str, object], text: str) -> None:
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
    check_choices(letters, tmp_path / "test.jsonl", max_choices=None)
    with pytest.raises(UserError):  # there are not so many letters
        check_choices(letters, tmp_path / "test.jsonl")


# Rewards by name against values written out, and functions of one's own.


LETTERED = "What is it?\nA. a red cat\nB. a dog\nAnswer with the option's letter from the given choices directly."


def example_of(answer: str, question: str = "What is it?") -> Example:
    return Example("q", turns=(Turn("user", question),), question=question, answers=(Answer(text=answer),))


def points(name: str, right: str, answer: str, question: str = "What is it?", **how: str | None) -> float:
    options = {"answer_format": None, "answer_after": None, **how}
    return rewards_of([name], **options)[name]([example_of(right, question)], [answer])[0]


@pytest.mark.parametrize(
    ("name", "right", "answer", "expected"),
    [
        *(("exact", "Red cat.", " red  CAT", 1.0), ("exact", "red cat", "a red cat", 0.0)),
        *(("anls", "colour", "color", 1 - 1 / 6), ("relaxed", "100", "104", 1.0)),
        ("vqa", "2 dogs", "The two dogs.", 1.0),
        ("box", "[10, 20, 30, 40]", "[10, 20, 30, 40]", 1.0),
        ("box", "[0, 0, 10, 10]", "at 2 corners: (5, 0, 15, 10)", 50 / 150),
        ("box", "[0, 0, 10, 10]", "[10, 10, 0, 0]", 0.0),
        ("box", "[0, 0, 10, 10]", "I see none", 0.0),
    ],
)
def test_points_of_an_answer(name: str, right: str, answer: str, expected: float) -> None:
    assert points(name, right, answer) == pytest.approx(expected)


@pytest.mark.parametrize(("answer", "expected"), [("crimson", 1.0), ("Red.", 1.0), ("blue", 0.0)])
@pytest.mark.parametrize("name", ["exact", "anls", "vqa"])
def test_the_nearest_of_several_right_answers_counts(name: str, answer: str, expected: float) -> None:
    example = replace(example_of("crimson"), answers=(Answer(text="crimson"), Answer(text="red.")))
    assert rewards_of([name], answer_format=None, answer_after=None)[name]([example], [answer]) == [expected]


HOSTILE: list[dict[str, Any]] = yaml.safe_load(
    Path(__file__).with_name("hostile_answers.yaml").read_text(encoding="utf-8")
)


@pytest.mark.parametrize("row", HOSTILE, ids=lambda row: f"{row['scoring']}-{row['truth']}")
def test_a_reward_and_a_scoring_pay_what_is_right_and_nothing_else(row: dict[str, Any]) -> None:
    name, choices = row["scoring"], row.get("choices", [])
    extra = {"correct": choices.index(row["truth"])} if choices else {}
    example = replace(example_of(row["truth"]), choices=tuple(choices), extra=extra)
    reward = rewards_of([name], answer_format=None, answer_after=None)[name]
    for expected, answers in ((1.0, row.get("pays", [])), (0.0, row["earns_nothing"])):
        for answer in answers:
            scored = exact.SCORINGS[name]([example], {"q": answer}).items["q"].share
            assert (answer, *reward([example], [answer]), scored) == (answer, expected, expected)


def test_there_are_two_hundred_hostile_answers() -> None:
    assert sum(len(row["earns_nothing"]) for row in HOSTILE) >= 200


def test_a_choice_is_one_of_those_that_the_question_names() -> None:
    assert [points("choice", "B", answer, LETTERED) for answer in ("B. a dog", "A")] == [1.0, 0.0]
    with pytest.raises(UserError):
        points("choice", "B", "B")


def test_the_end_of_an_answer_is_compared_and_a_format_fits_from_end_to_end() -> None:
    assert points("exact", "it is a cat, so no", "a dog, so no", answer_after=", so ") == 1.0
    assert points("exact", "it is a cat, so no", "a dog, so no") == 0.0
    pattern = "<think>.+</think>\\w+"
    assert points("format", "", "<think>a\nb</think>yes", answer_format=pattern) == 1.0
    assert points("format", "", "<think>a</think>yes and no", answer_format=pattern) == 0.0


CAPTIONS = {
    "a.png": ["A red cat sits on a mat.", "The cat is sitting."],
    "b.png": ["Two dogs run along the beach.", "Dogs on a beach in the sun."],
    "c.png": ["A man rides a red bicycle."],
}


def test_a_caption_by_cider_of_coco() -> None:
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    rows = [
        Example(f"{image}-{number}", images=(image,), turns=(Turn("user", "Describe."), Turn("assistant", caption)))
        for image, captions in CAPTIONS.items()
        for number, caption in enumerate(captions)
    ]
    drawn = {"a.png": "A cat sits on a red mat.", "b.png": "Two dogs.", "c.png": "A man rides a red bicycle."}
    reward = rewards_of(["cider"], answer_format=None, answer_after=None, examples=lambda: rows)["cider"]
    official = CiderScorer()
    for image, captions in CAPTIONS.items():
        official += (words(drawn[image]), [words(caption) for caption in captions])
    expected = official.compute_score()[1] / 10
    by_picture = {row.images[0]: reward([row], [drawn[row.images[0]]])[0] for row in rows}
    assert [*by_picture.values()] == pytest.approx(expected.tolist())
    assert by_picture["c.png"] == pytest.approx(1.0)
    assert reward(rows[:1], [""]) == [0.0]


def words(caption: str) -> str:
    return caption.lower().replace(".", "")


def test_functions_of_a_file_and_of_a_module(tmp_path: Path) -> None:
    own = f"{tmp_path / 'mine.py'}:length"
    (tmp_path / "mine.py").write_text("def length(example, answer):\n    return len(answer) - len(example.question)\n")
    rewards = rewards_of([own, "os.path:exists"], answer_format=None, answer_after=None)
    assert list(rewards) == [own, "os.path:exists"]
    assert rewards[own]([example_of("cat", "Why?")], ["a bird"]) == [2.0]


@pytest.mark.parametrize("name", ["precise", "nowhere.py:f", "no.such.module:f", "os.path:nothing"])
def test_what_is_no_reward_is_refused(name: str) -> None:
    with pytest.raises(SettingError) as error:
        rewards_of([name], answer_format=None, answer_after=None)
    assert error.value.key == "objective.rewards"


EXAMPLES = [Example(id=f"row {n}", question="How many?", answers=(Answer(text=str(n)),)) for n in range(4)]
ANSWERS = ["0", "no", "2", ""]
RIGHT = [1.0, 0.0, 1.0, 0.0]
IN_LISTS = (
    "def own(examples, answers):\n    return [float(e.answers[0].text == a) for e, a in zip(examples, answers)]\n"
)
EACH = "def own(example, answer):\n    return example.answers[0].text == answer\n"
AWAITED = "import asyncio\nasync def own(example, answer):\n    await asyncio.sleep(0.2)\n    return EACH\n".replace(
    "EACH", "float(example.answers[0].text == answer)"
)
WAITING = "import time\ndef own(example, answer):\n    time.sleep(0.2)\n    return example.answers[0].text == answer\n"


def rewarded(folder: Path, code: str, **settings: Any) -> list[float]:
    path = folder / "own.py"
    path.write_text(code)
    (reward,) = rewards_of([f"{path}:own"], answer_format=None, answer_after=None, **settings).values()
    return reward(EXAMPLES, ANSWERS)


@pytest.mark.parametrize(
    "code", [EACH, IN_LISTS, AWAITED, IN_LISTS.replace("def", "async def")], ids=["each", "lists", "async", "both"]
)
def test_a_function_takes_one_answer_or_all_of_a_step(code: str, tmp_path: Path) -> None:
    assert rewarded(tmp_path, code) == RIGHT


@pytest.mark.parametrize(("code", "threads"), [(AWAITED, 1), (WAITING, 4)], ids=["async", "threads"])
def test_answers_wait_together(code: str, threads: int, tmp_path: Path) -> None:
    began = time.monotonic()
    assert rewarded(tmp_path, code, threads=threads) == RIGHT
    assert time.monotonic() - began < 0.7  # 0.8 one after the other


@pytest.mark.parametrize(
    "code",
    [
        "def own(example, answer):\n    return None if answer == 'no' else 1\n",
        "def own(examples, answers):\n    return [None if answer == 'no' else 1 for answer in answers]\n",
    ],
)
def test_none_does_not_apply(code: str, tmp_path: Path) -> None:
    assert rewarded(tmp_path, code) == [1, pytest.approx(math.nan, nan_ok=True), 1, 1]


FAULTY = {
    "raises": "def own(example, answer):\n    return {'2': 1}[answer]\n",
    "exits": "import sys\ndef own(example, answer):\n    sys.exit(0)\n",
    "no number": "def own(example, answer):\n    return 'good'\n",
    "infinite": "def own(example, answer):\n    return float('inf')\n",
    "not a number": "def own(example, answer):\n    return float('nan')\n",
    "one too few": "def own(examples, answers):\n    return [1.0] * (len(answers) - 1)\n",
    "awaits": "async def own(example, answer):\n    raise KeyError(answer)\n",
}


@pytest.mark.parametrize("code", FAULTY.values(), ids=FAULTY)
def test_a_failing_function_is_named_with_its_sample(code: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        rewarded(tmp_path, code)
    assert "own.py" in str(error.value)
    assert "row 0" in str(error.value)
    skipped = rewarded(tmp_path, code, skips_errors=True)
    assert math.isnan(skipped[0])


def test_a_line_is_named_and_a_file_that_exits_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"own\.py:2: KeyError"):
        rewarded(tmp_path, FAULTY["raises"])
    with pytest.raises(UserError):
        rewarded(tmp_path, "import sys\nsys.exit(0)\n" + EACH)


@pytest.mark.parametrize(
    ("reward", "truth", "earned"),
    [
        ("box", "[1, 2, 3]", False),
        ("box", "the dog", False),
        ("box", "[5, 5, 1, 1]", False),
        ("box", "[1, 2, 30, 40]", True),
        ("relaxed", "inf", False),
        ("relaxed", "1e1", True),
        ("vqa", "A", False),
        ("vqa", "The", False),
        ("vqa", "?", False),
        ("vqa", "a cat", True),
        ("exact", "A", True),
        ("anls", "?", True),
    ],
)
def test_a_truth_that_no_answer_earns_is_named(reward: str, truth: str, earned: bool) -> None:
    examples = [replace(example_of(text), id=name) for name, text in (("fine", "[1, 2, 3, 4]"), ("odd", truth))]
    if earned:
        check_truths([reward], examples, "data.json", answer_after=None)
        return
    with pytest.raises(UserError) as error:
        check_truths([reward], examples, "data.json", answer_after=None)
    assert all(word in str(error.value) for word in ("data.json", "'odd'", reward))
