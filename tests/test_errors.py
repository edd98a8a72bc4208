"""An error is one short line, whatever it quotes."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dora_vl.cli import main
from dora_vl.errors import (
    LEFT_OUT,
    LONGEST_MESSAGE,
    BadSample,
    UserError,
    exit_on_user_error,
    leave_out_foreign_lines,
    one_line,
    shown,
    shown_names,
    shown_text,
)

LONG = 60_755


@settings(deadline=None)
@example(message="0\t0", most=30)
@given(message=st.text(), most=st.integers(min_value=30, max_value=200))
def test_any_message_is_one_short_line(message: str, most: int) -> None:
    line = one_line(message, most)
    assert len(line) <= most
    assert len(line.splitlines()) <= 1
    assert not any(character < " " or "\x7f" <= character < "\xa0" for character in line)


def test_the_beginning_and_the_end_of_a_long_message_stay() -> None:
    error = UserError(f"a.jsonl, line 7: {'x' * LONG} is no answer; write it again")
    assert len(str(error)) == LONGEST_MESSAGE
    assert str(error).startswith("a.jsonl, line 7: xxx")
    assert str(error).endswith("xxx is no answer; write it again")
    assert " [...] " in str(error)
    assert str(UserError("two\n  lines\x1b[31m \ud83d")) == "two lines?[31m ?"


def test_a_bad_sample_is_short_too_and_travels() -> None:
    error = pickle.loads(pickle.dumps(BadSample("i" * LONG, "r" * LONG)))
    assert len(str(error)) <= LONGEST_MESSAGE
    assert len(error.reason) == LONGEST_MESSAGE
    assert error.sample_id == "i" * LONG


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("it's", '"it\'s"'),
        ([1, "b"], "[1, 'b']"),
        ("x" * LONG, "'" + "x" * 56 + "..."),
        (b"y" * LONG, "b'" + "y" * 55 + "..."),
        ([0] * LONG, "[" + "0, " * 18 + "0," + "..."),
        ([10**5000], "a list too large to be shown"),
        ({"a": [1, {"b": None}], 2: "\ud83d"}, "{'a': [1, {'b': None}], 2: '\\ud83d'}"),
        ({name: name for name in range(LONG)}, "{0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 6, 7: 7, 8: 8, 9:..."),
    ],
)
def test_a_quoted_value_is_short(value: object, text: str) -> None:
    assert shown(value) == text


def test_values_nested_without_end_are_short_too() -> None:
    inside: list[object] = []
    inside.append(inside)
    deep: Any = 1
    for _ in range(LONG):
        deep = {"a": [deep]}
    for value in (inside, deep, [["x" * LONG] * LONG] * LONG):
        assert len(shown(value)) <= 60
    while isinstance(deep, dict):  # Python's own end of it would need as many calls
        deep = deep["a"].pop()


def test_text_without_quotes_and_names_are_short_and_can_be_printed() -> None:
    assert shown_text("two\nlines \ud83d\x00é") == r"two\nlines \ud83d\x00é"
    assert shown_text("x" * LONG) == "x" * 57 + "..."
    assert shown_text("\n" * LONG, 10) == r"\n\n\n\..."
    assert shown_names(["a", 1, "y" * LONG]) == "a, 1, " + "y" * 21 + "..."
    assert shown_names(range(11)) == "0, 1, 2, 3, 4, 5, 6, 7 and 3 more"
    assert shown_names([]) == "nothing"


def test_the_line_on_stderr_has_at_most_500_characters(capsys: Any) -> None:
    @exit_on_user_error
    def fails() -> None:
        raise UserError("é" * LONG)

    with pytest.raises(SystemExit) as status:
        fails()
    error = capsys.readouterr().err
    assert status.value.code == 2
    assert error.startswith("error: é")
    assert error.count("\n") == 1
    assert len(error) <= 500


@pytest.mark.parametrize("option", ["--predictions", "--records", "--against"])
def test_a_path_of_any_length_is_a_persons_error(option: str, tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(f"name: own\nscoring: exact\nfile: {'y' * LONG}\n")
    for benchmark in ("pope", str(own)):
        options = {"--predictions": str(own), option: f"{tmp_path}/{'x' * LONG}", "--benchmarks": benchmark}
        with pytest.raises(SystemExit) as status:
            main(["evaluate", *(word for pair in options.items() for word in pair)])
        assert status.value.code == 2


@pytest.mark.parametrize("name", LEFT_OUT)
def test_known_lines_of_other_libraries_alone_are_left_out(name: str, caplog: pytest.LogCaptureFixture) -> None:
    leave_out_foreign_lines()
    logger = logging.getLogger(name)
    logger.addHandler(caplog.handler)  # DeepSpeed's hands nothing on
    for line in (*(f"{beginning}: %s" for beginning in LEFT_OUT[name]), "what matters: %s"):
        logger.warning(line, "this")
    logger.removeHandler(caplog.handler)
    assert {record.getMessage() for record in caplog.records} == {"what matters: this"}
