"""Tables and pictures of a run for its page: settings and watched questions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from dora_vl.data.example import Clip
from dora_vl.data.pictures import open_image
from dora_vl.data.video import Uniform, VideoReader
from dora_vl.errors import BadSample
from dora_vl.evaluation.scores.exact import final_answer, normalised
from dora_vl.report.run_record import RunRecord
from dora_vl.run.settings import FIELDS
from dora_vl.run.settings_parser import flattened, run_parser
from dora_vl.run.watched_questions import SIDE, Watched, WatchedQuestion, data_url, evenly, tiled

ABSENT = "–"


def setting_tables(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """Returns all settings of all runs: of one run what is not its default first, of several what differs first."""
    flat = [flattened(run.settings) for run in runs]
    names = list(dict.fromkeys(name for item in flat for name in item))
    rows = {name: [_text(item.get(name, ABSENT)) for item in flat] for name in names}
    if len(runs) > 1:
        title, first = "What differs", [name for name in names if len(set(rows[name])) > 1]
    else:
        title, task = "What is not the default", runs[0].settings.get("task")
        parsed = run_parser(task).get_defaults().as_dict() if task in FIELDS else {}
        defaults = flattened(json.loads(json.dumps(parsed, default=str)))
        first = [name for name in names if name not in defaults or defaults[name] != flat[0][name]]
    others = {name: rows[name] for name in names if name not in first}
    return {"first_title": title, "first": {name: rows[name] for name in first}, "others": others}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# -- the fixed questions of a run: a row for each question, a column for each step they were asked at ------------------


MOST_STEPS = 8


def watched_tables(runs: Sequence[RunRecord], pictures: InlinePictures) -> tuple[list[dict[str, Any]], list[str]]:
    """Makes a table for each run that was watched, and a note for each that was not."""
    tables: list[dict[str, Any]] = []
    notes: list[str] = []
    for run in runs:
        watched = run.watched
        if watched is None or not watched.answers:
            notes.append(
                f"{run.label}: no fixed questions were asked while it trained; that needs validation data or a test, "
                "and watch above 0."
            )
            continue
        all_steps = sorted(watched.answers)
        steps = sorted({*evenly(all_steps, MOST_STEPS - 1), all_steps[-1]})
        after = run.section("evaluation").get("answer_after")
        after = after if isinstance(after, str) else None
        rows = [_row(question, watched, steps, after, pictures) for question in watched.questions]
        tables.append({"label": run.label, "steps": steps, "asked": len(all_steps), "rows": rows})
    return tables, notes


def _row(
    question: WatchedQuestion, watched: Watched, steps: Sequence[int], after: str | None, pictures: InlinePictures
) -> dict[str, Any]:
    """Returns a question with its answers; None where it could not be asked."""
    picture = ("", question.why_no_picture)
    if question.picture:
        picture = pictures.file(watched.folder / question.picture)
    texts = [watched.answers[step].get(question.id) for step in steps]
    right = _compared(question.truth, after)
    answers = [(text, text is not None and _compared(text, after) == right) for text in texts]
    return {"question": question.question, "truth": question.truth, "picture": picture, "answers": answers}


def _compared(text: str, after: str | None) -> str:
    return normalised(final_answer(text, after))


# -- pictures inside the page ---------------------------------------------------------------------------------------


TOO_MANY = "left out, so that the page stays small"


class InlinePictures:
    """Small pictures as data URLs, each once and up to a budget of bytes; close it after use."""

    def __init__(self) -> None:
        self._left = 3_400_000
        self._seen: set[str] = set()
        self._reader = VideoReader()

    def close(self) -> None:
        """Closes the videos."""
        self._reader.close()

    def file(self, path: Path) -> tuple[str, str]:
        """Returns a picture file as a data URL, or why there is none."""
        return self._add(lambda: open_image(path.parent, path.name))

    def shown(self, root: Path | None, pictures: Sequence[str], clip: Clip | None) -> tuple[str, str]:
        """Returns a question's pictures or clip as one small picture, or why there is none."""
        if not pictures and clip is None:
            return "", ""
        if root is None:
            return "", "the settings name no folder of its pictures"
        if clip is not None:
            return self._add(lambda: tiled(self._reader.read(root, clip, Uniform(SIDE**2)).pictures))
        return self._add(lambda: tiled([open_image(root, path) for path in pictures]))

    def _add(self, opened: Callable[[], Image.Image]) -> tuple[str, str]:
        if self._left <= 0:
            return "", TOO_MANY
        try:
            url = data_url(opened())
        except BadSample as error:
            return "", error.reason
        name = hashlib.sha256(url.encode()).hexdigest()
        if name not in self._seen:
            if len(url) > self._left:
                return "", TOO_MANY
            self._left -= len(url)
            self._seen.add(name)
        return url, ""
