"""Tables, charts and pictures of a run for its page: settings, watched questions, what changed in the weights."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from dora_vl.adapters.adapter import base_of, read_adapter
from dora_vl.adapters.base_weights import CONFIG_FILE, BaseWeights
from dora_vl.adapters.decomposition import (
    Panel,
    Point,
    Request,
    Saved,
    layers_to_compare,
    measured,
    refuse_saved_on_another_base,
    saved_in,
)
from dora_vl.adapters.files import WEIGHTS_FILE
from dora_vl.data.example import Clip
from dora_vl.data.pictures import open_image
from dora_vl.data.video import Uniform, VideoReader
from dora_vl.errors import BadSample
from dora_vl.evaluation.scores.exact import final_answer, normalised
from dora_vl.report.charts import COLOURS, Chart, Series, chart
from dora_vl.report.run_record import RunRecord
from dora_vl.run.folder import ADAPTER
from dora_vl.run.reading import flattened, run_parser
from dora_vl.run.settings import FIELDS
from dora_vl.run.watched import SIDE, Watched, WatchedQuestion, data_url, evenly, tiled

ABSENT = "–"


def setting_tables(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """Returns all settings of all runs: of one run what is not its default first, of several what differs first."""
    flat = [flattened(run.settings) for run in runs]
    names = list(dict.fromkeys(name for item in flat for name in item))
    rows = {name: [_text(item.get(name, ABSENT)) for item in flat] for name in names}
    if len(runs) > 1:
        title, first = "What differs", [name for name in names if len(set(rows[name])) > 1]
    else:
        title, defaults = "What is not the default", _defaults(runs[0])
        first = [name for name in names if name not in defaults or defaults[name] != flat[0][name]]
    others = {name: rows[name] for name in names if name not in first}
    return {"first_title": title, "first": {name: rows[name] for name in first}, "others": others}


def _defaults(run: RunRecord) -> dict[str, Any]:
    """Returns the defaults of the run's task; none where its settings name no task."""
    task: Any = run.settings.get("task")
    parsed = run_parser(task).get_defaults().as_dict() if task in FIELDS else {}
    return flattened(json.loads(json.dumps(parsed, default=str)))


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


# -- what training changed in each adapted layer's weight, magnitude and direction: the paper's plot -------------------


MOST_CHECKPOINTS = 3
_DEPTH = re.compile(r"\.(?:layers|layer|blocks|block|h)\.(\d+)\.")


def weight_charts(run: RunRecord, base: Path | None) -> list[Chart]:
    """Draws how the run's adapter and its last checkpoints changed the base, read from where it is now."""
    final = Saved(run.folder / ADAPTER, run.last_step)
    if (final.folder / WEIGHTS_FILE).is_file():
        earlier = [item for item in saved_in(run.folder) if item.step is not None and item.step < run.last_step]
        saved = [*evenly(earlier, MOST_CHECKPOINTS - 1), final]
    else:
        saved = list(saved_in(run.folder))[-MOST_CHECKPOINTS:]
    if base is None:
        stated = run.path(run.section("model").get("base", ""))
        base = stated if (stated / CONFIG_FILE).is_file() else base_of(read_adapter(saved[-1].folder))
    with BaseWeights(base) as weights:
        refuse_saved_on_another_base(saved[-1], weights)
        request = Request(run.label, run.folder, tuple(saved))
        layers = layers_to_compare([request], weights, ())
        with tqdm(total=len(layers) * len(saved), desc="comparing", unit="layer") as progress:
            panel = measured(request, weights, layers, axis="output", done=progress.update)
    drawn = plane(panel)
    return [*([] if drawn is None else [drawn]), *over_depth(panel)]


def plane(panel: Panel) -> Chart | None:
    """Draws every layer of the last checkpoint as a point; the line is through all checkpoints."""
    series = [
        Series(
            name=kind,
            x=[point.change.direction for point in points],
            y=[point.change.magnitude for point in points],
            look="dots",
            colour=colour % (len(COLOURS) - 1),
            names=[f"{item.layer}: ΔM {item.change.magnitude:.3g}, ΔD {item.change.direction:.3g}" for item in points],
        )
        for colour, (kind, points) in enumerate(by_kind(_of_last_step(panel)).items())
    ]
    if (line := panel.line) is not None:
        xs = [point.change.direction for point in panel.points]
        ends = [min(xs), max(xs)]
        name = f"slope {line.slope:.3g}, correlation {line.correlation:.2f}"
        ys = [line.intercept + line.slope * end for end in ends]
        series.append(Series(name=name, x=ends, y=ys, look="dashed", colour=len(COLOURS) - 1))
    title = f"{panel.label} ({panel.method})"
    return chart(title, series, x_label="direction change ΔD", y_label="magnitude change ΔM")


def _of_last_step(panel: Panel) -> list[Point]:
    return [point for point in panel.points if point.step == panel.steps[-1]]


def over_depth(panel: Panel) -> list[Chart]:
    """Draws the last checkpoint's magnitude and direction change by depth, a line for each stack of layers."""
    numbered = [point for point in _of_last_step(panel) if depth_of(point.layer) is not None]
    stacks = {kind: points for kind, points in by_stack(numbered).items() if len(points) > 1}
    values: dict[str, Callable[[Point], float]] = {
        "magnitude change ΔM": lambda point: point.change.magnitude,
        "direction change ΔD": lambda point: point.change.direction,
    }
    charts = [
        chart(
            f"{panel.label}, by depth",
            [
                Series(
                    name=kind,
                    x=[float(depth_of(point.layer) or 0) for point in points],
                    y=[value(point) for point in points],
                    colour=colour % (len(COLOURS) - 1),
                )
                for colour, (kind, points) in enumerate(stacks.items())
            ],
            x_label="layer",
            y_label=title,
            zero=True,
        )
        for title, value in values.items()
    ]
    return [item for item in charts if item is not None]


def by_kind(points: Sequence[Point]) -> dict[str, list[Point]]:
    """Returns points by the last word of the layer's name, such as q_proj."""
    result: dict[str, list[Point]] = {}
    for point in points:
        result.setdefault(point.layer.rpartition(".")[2], []).append(point)
    return result


def by_stack(points: Sequence[Point]) -> dict[str, list[Point]]:
    """Groups points by the layer's name without its number, as short as tells them apart."""
    result: dict[str, list[Point]] = {}
    for point in points:
        result.setdefault(_DEPTH.sub(".", point.layer), []).append(point)
    short = [name.rpartition(".")[2] for name in result]
    names = short if len(set(short)) == len(short) else [name.removeprefix("model.") for name in result]
    return dict(zip(names, result.values(), strict=True))


def depth_of(layer: str) -> int | None:
    """Returns a layer's number in its stack; None where its name has none."""
    result = _DEPTH.search(layer)
    return None if result is None else int(result[1])


# -- pictures inside the page ---------------------------------------------------------------------------------------


TOO_MANY = "left out, so that the page stays small"


class InlinePictures:
    """Small pictures as data URLs, each once and up to a budget of bytes; to be closed."""

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
