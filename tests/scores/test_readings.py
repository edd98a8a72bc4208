"""How each official script reads or rewrites an answer, quirks included: one table a rule."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dora_vl.evaluation.scores import exact, llava, vqa
from dora_vl.evaluation.scores.vqa import ARTICLES, CONTRACTIONS, DIGITS
from tests.shared_data import shared

CHOICES = {"A": "red", "B": "green", "C": "blue", "D": "white"}
BOTH_NORMALISERS = {
    **{"The  Dogs": "dogs", "two": "2", "None": "0", "ten dogs": "10 dogs", "eleven": "eleven", "a an the": ""},
    **{"dont": "don't", "couldn'tve": "couldn't've", "couldntve": "couldntve"},  # two apostrophes less: in no table
    "somebody'd": "somebodyd",  # loses its apostrophe
    "Im": "im",  # the key has a capital that lower-casing took away
    **{"3.": "3", ".5": ".5", "3.5": "3.5", "a.m.": "am"},  # "3." is what the pattern meant to keep
    "red-white": "red white",  # no space beside the mark: a space
    "red - white-blue": "red whiteblue",  # a space beside one: all of them vanish
    **{"yes!": "yes", "yes\n": "yes", "x" + "." * 40 + "y": "x" + "." * 8 + "y"},  # 32 periods at most
}
VQA = {
    **{"1,2/3": "123", "1,000": "1000"},  # a comma between digits deletes all punctuation
    **{"she's": "she's", "two's": "two's", "ow's'at": "'ow's'at", "let's": "let's"},
    **{"red,white": "red white", "what?yes": "what yes", "theyre?": "they're"},
}
EVALAI = {
    **{"1,2/3": "12 3", "1,000": "1000"},  # EvalAI has no comma left
    **{"she's": "she 's", "two's": "2 's", "ow's'at": "ow 's'at", "let's": "let 's"},
    **{"red,white": "redwhite", "what?yes": "whatyes", "theyre?": "they're"},
}
MME = {
    **{"Yes": "yes", "YES.": "yes", "eyes": "yes", " yes": "yes", "know": "no", "No": "no", "nyes": "yes"},
    **{"  yes": "other", "unknown": "other", "noyes": "no", "": "other", "the answer is yes": "other"},
}
POPE = {
    **dict.fromkeys(["no", "No", "no, it is not.", "There is no dog.", "it is not there", "No. Yes", "no ,"], True),
    **dict.fromkeys(["yes", "", "NO", "Not", "nope", "isn't", "No\n", "no!", "nothing", ".no"], False),
    "Yes. There is no doubt.": False,
}
SCIENCEQA = {
    **{"B": "B", "F": None, "B.": None, "B. green": "B", "B.green": None, "b": None, "": None},
    "The answer is C.": "C",
    "The answer is C": None,  # the last "." of the pattern needs a character
    "The answer is Because": "B",
    "The answer is A. The answer is B.": None,
    "I think The answer is D!": "D",
}
COMMONSENSE = {
    "boolq": {"the correct answer is true": "true", "it is untrue": "true", "True": "", "false, true": "false"},
    "openbookqa": {"answer10": "answer1"},
    "hellaswag": {"ending4 or ending1": "ending4"},
    **{"piqa": {"solution2": "solution2"}, "winogrande": {"Option1": ""}, "social_i_qa": {"": ""}},
}
READINGS: list[tuple[Callable[[str], object], Mapping[str, object]]] = [
    (vqa.normalise, BOTH_NORMALISERS | VQA),
    (vqa.normalise_evalai, BOTH_NORMALISERS | EVALAI),
    (vqa.converted, {"Yes.": "yes", "yes...": "yes", "yes. ": "yes. ", " yes": " yes", "U.S.": "u.s", "": ""}),
    *((llava.said, MME), (llava.says_no, POPE), (llava.parsed, SCIENCEQA)),
    (exact.submitted_index, {"a0": 0, "a1.": 1, "A0": 0, " a2": 0, "": 0, "x3": 3, "a": 0, "a²": 0}),
    (exact.normalised, {"Yes.": "yes", " Light \n blue ": "light blue", "yes, it is": "yes, it is", "3.5": "3.5"}),
    (partial(exact.final_answer, after=", so "), {"blue circle, so no": "no", "no": "no", "a, so b, so c": "c"}),
    *((partial(exact.extracted, task=task, rule="nvlabs"), rows) for task, rows in COMMONSENSE.items()),
    (lambda answer: vqa.leave_one_out("x", [*answer]), {"x" * n + "y" * (10 - n): min(1, 0.3 * n) for n in range(11)}),
]


@pytest.mark.parametrize(
    ("read", "answer", "expected"), [(read, *row) for read, rows in READINGS for row in rows.items()]
)
def test_an_answer_is_read_as_the_script_does(read: Callable[[str], object], answer: str, expected: object) -> None:
    assert read(answer) == (pytest.approx(expected) if isinstance(expected, float) else expected)


@pytest.mark.parametrize(
    ("answer", "in_2023", "in_2025"),
    [
        ("B", "B", "B"),
        ("B.", "B", "B"),
        ("(C)", "C", "C"),
        ("The answer is B", "B", "B"),
        ("it is green", "B", "B"),  # a choice's text
        ("red and green", None, None),
        ("A red ball, so it must be B", "A", "A"),  # two letters stand alone, so "red", a choice's text, decides
        ("A is what one sees in the picture here", None, None),
        ("E", "E", None),  # 2023 looks for A to E whatever the choices
        ("C is right, look at the middle part of it", "C", None),  # 2025: not one of the last four words
        ("Answer:D", None, "D"),
        ("**B**", None, "B"),
        ("Z", None, "Z"),
        ("Cannot determine the answer B", "B", "Z"),
        ("Failed to obtain answer via API B", None, None),
        ("GREEN", "B", "B"),
        ("green " * 10, "B", None),  # longer than twice all choices
    ],
)
def test_mmbench_reading(answer: str, in_2023: str | None, in_2025: str | None) -> None:
    read = (llava.chosen(answer, CHOICES, "opencompass_2023"), llava.chosen(answer, CHOICES, "2025"))
    assert read == (in_2023, in_2025)


@pytest.mark.parametrize("answer", ["True ", "true\t\n", "True,0.9", "True ,0.9", " True", "True.", "", ",True"])
def test_nlvr2_reads_the_line_of_a_csv(answer: str) -> None:
    """Against the published script's `line.strip().split(",")[1]`, in a file that ends a line with the answer."""
    assert vqa.as_read(answer) == f"dev-1-0-0,{answer}".strip().split(",")[1]


def test_the_two_rules_of_commonsense_take_different_parts() -> None:
    goes_on = f"the correct answer is answer1\n\n### Instruction:\n\n{exact.RESPONSE} the correct answer is answer2"
    assert exact.extracted(goes_on, "openbookqa", "llm_adapters") == "answer1"
    assert exact.extracted(goes_on, "openbookqa", "nvlabs") == "answer2"


@given(st.text(), st.sampled_from(sorted(exact.PATTERNS)), st.sampled_from(["nvlabs", "llm_adapters"]))
def test_what_is_extracted_is_in_the_text(text: str, task: str, rule: exact.Rule) -> None:
    found = exact.extracted(text, task, rule)
    assert found in text
    assert not found or exact.PATTERNS[task].fullmatch(found)


def test_the_table_of_contractions_is_the_published_one_without_its_empty_entries() -> None:
    assert len(CONTRACTIONS) == 118  # 120 less two that map to themselves
    assert {"Im", "Ive", "Id've", "I'dve"} < set(CONTRACTIONS)
    assert (CONTRACTIONS["'ow'sat"], CONTRACTIONS["y'all'dve"]) == ("'ow's'at", "y'all'd've")
    assert not {"shed", "wed", "well", "id", "shell"} & set(CONTRACTIONS)  # words of their own


@given(
    st.text(max_size=60)
    | st.lists(st.sampled_from([*CONTRACTIONS, *DIGITS, *ARTICLES, "1,2", "-", "/", ".", "dog", "?"]), max_size=6).map(
        " ".join
    )
)
@pytest.mark.parametrize("normalise", [vqa.normalise, vqa.normalise_evalai])
def test_any_text_ends_in_plain_words(normalise: Callable[[str], str], text: str) -> None:
    words = normalise(text).split(" ")
    assert words == [""] or all(words)
    assert not {*words} & {*ARTICLES, *DIGITS}
    assert [word.lower() for word in words] == words
    assert normalise(f"\t{text.strip()} \n") == normalise(text.strip())


@pytest.mark.parametrize(
    ("said", "true", "points"),
    [
        ("Hello World", " hello  world", 1.0),
        ("hello worle", "hello world", 10 / 11),
        ("kitten", "sitting", 4 / 7),  # three edits
        ("abcd", "abxy", 0.0),  # one half is not above one half
        ("abcde", "abcxy", 0.6),
        ("", "a", 0.0),
        ("", "", 1.0),
        ("a" * 1_000_000, "b", 0.0),
    ],
)
def test_anls(said: str, true: str, points: float) -> None:
    assert exact.similarity(said, true) == exact.similarity(true, said) == pytest.approx(points)


def distance(first: str, second: str) -> int:
    """Levenshtein's recursion as it is defined."""
    if not first or not second:
        return len(first) + len(second)
    rest = distance(first[1:], second[1:]) + (first[0] != second[0])
    return min(rest, distance(first[1:], second) + 1, distance(first, second[1:]) + 1)


@given(first=st.text(alphabet="abc", max_size=5), second=st.text(alphabet="abc", max_size=5))
def test_anls_is_by_the_edit_distance(first: str, second: str) -> None:
    share = 1 - distance(first, second) / max(len(first), len(second), 1)
    assert exact.similarity(first, second) == pytest.approx(share if share > 0.5 else 0.0)


@pytest.mark.parametrize(
    ("said", "true", "right"),
    [
        ("105", "100", True),
        ("95.0", "100", True),
        ("105.1", "100", False),
        ("-105", "-100", True),
        ("10.2%", "0.1", True),
        ("12%", "12", False),
        ("0", "0", True),
        ("0.001", "0", False),  # nothing is within five percent of zero
        ("Yes", "yes ", True),
        ("yess", "yes", False),
        ("nan", "100", False),
        ("12 apples", "12", False),
    ],
)
def test_relaxed(said: str, true: str, right: bool) -> None:
    assert exact.is_close(said, true) is right


FILES = {"openbookqa/test.json": 500, "ARC-Easy/test.json": 2376, "ARC-Challenge/test.json": 1172}
FILES |= dict.fromkeys([f"{task}/test_sample.json" for task in ("boolq", "piqa", "social_i_qa", "winogrande")], 40)


@pytest.mark.parametrize("file", FILES)
def test_the_published_commonsense_targets_score_full_marks(file: str) -> None:
    records = json.loads(shared(f"commonsense/{file}").read_text())
    assert len(records) == FILES[file]
    task = file.partition("/")[0]
    for rule in ("nvlabs", "llm_adapters"):
        assert [exact.extracted(row["output"], task, rule) for row in records] == [row["answer"] for row in records]
