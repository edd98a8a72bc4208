"""Answers by id from a file of predictions: ours, the plain form, or LLaVA's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from dora_vl.errors import UserError

IDS = ("id", "question_id")
ANSWERS = ("prediction", "answer", "text")
"""Where a line's answer stands: `predictions.jsonl` of this project, `{"id", "answer"}`, LLaVA's answer files."""


def read_answers(path: Path) -> dict[str, str]:
    """Answers by id; of two with one id the later stands, as in a run that was resumed.

    Raises:
        UserError: no such file, or a line without an id or an answer; it names the line.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file of predictions; give JSON lines with an id and an answer each")
    answers: dict[str, str] = {}
    with path.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                name, answer = _pair(line, f"{path}:{number}")
                answers[name] = answer
    if not answers:
        raise UserError(f"{path}: holds no predictions")
    return answers


def _pair(line: str, where: str) -> tuple[str, str]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error}); one prediction a line is expected") from None
    if not isinstance(record, Mapping):
        raise UserError(f"{where}: a {type(record).__name__}, not an object with an id and an answer")
    name = next((record[key] for key in IDS if key in record), None)
    answer = next((record[key] for key in ANSWERS if key in record), None)
    if not isinstance(name, str | int) or not isinstance(answer, str):
        raise UserError(
            f"{where}: needs {' or '.join(IDS)}, and {' or '.join(ANSWERS)} as text; has {', '.join(map(str, record))}"
        )
    return str(name), answer
