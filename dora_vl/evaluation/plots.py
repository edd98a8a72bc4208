"""Pictures of a run: its loss curve, and a sheet of pictures with questions and answers. Needs matplotlib."""

from __future__ import annotations

import math
import random
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from PIL import Image

from dora_vl.errors import BadSample
from dora_vl.evaluation.predictions import Prediction

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT, GRID = "#1f2933", "#9aa5b1", "#e4e7eb"
TRAIN, VALIDATION = "#2f6fde", "#e8590c"
RIGHT, WRONG = "#2b8a3e", "#c92a2a"
COLUMNS = 6
SHEET_CELLS = 24
CELL_WIDTH, CELL_HEIGHT, TITLE_HEIGHT, MARGIN = 1.75, 2.45, 0.75, 0.2  # inches
TITLE_FONT: Mapping[str, Any] = {"fontsize": 12, "fontweight": "bold", "linespacing": 1.4}
QUESTION_CHARACTERS, ANSWER_CHARACTERS = 25, 24  # of one line under a picture
SUBTITLE_CHARACTERS = 34
SMALL_PX = 160
RIGHT_SHARE = 0.5
PLAIN_TEXT: Mapping[str, Any] = {"parse_math": False}
"""Text that somebody else wrote is drawn as it is: two dollars in it are not a formula."""


def series(entries: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of one logged number, finite ones only (the log writes NaN as text)."""
    known = [entry for entry in entries if isinstance(entry.get(key), int | float)]
    return [float(entry["step"]) for entry in known], [float(entry[key]) for entry in known]


def smoothed(values: Sequence[float]) -> list[float]:
    """Returns the exponential moving average without the start's pull: of the logarithms, where no value is below 0.

    A loss of 0 counts as the smallest one above it.
    """
    is_geometric = min(values, default=0.0) >= 0
    least = min((value for value in values if value > 0), default=1.0)
    weight, average, result = 0.8, 0.0, []
    for count, value in enumerate(values, start=1):
        average = weight * average + (1 - weight) * (math.log(max(value, least)) if is_geometric else value)
        mean = average / (1 - weight**count)
        result.append(math.exp(mean) if is_geometric else mean)
    return result


def loss_unit(objective: Mapping[str, Any]) -> str:
    """Names what a run's loss is, by the settings of its objective: nats of words, or a sum of other losses."""
    loss = objective.get("loss", "sft")
    if loss == "sft":
        return "nats per answer token"
    weights = {loss: 1} if isinstance(loss, str) else loss
    return " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in weights.items())


def write_loss_curve(entries: Sequence[Mapping[str, Any]], to: Path, *, unit: str) -> None:
    """Draws losses and learning rate; below them, where answers are compared, their margin and accuracy."""
    steps, losses = series(entries, "loss")
    below = [key for key in ("rewards/margin", "rewards/accuracy") if series(entries, key)[0]]
    figure = new_figure(8.0, 4.5 + 1.5 * len(below))
    figure.set_layout_engine("constrained")
    heights = [3, *(1 for _ in below)]
    axes, *lower = figure.subplots(len(heights), squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    axes.plot(steps, losses, color=TRAIN, alpha=0.25, linewidth=1)
    axes.plot(steps, smoothed(losses), color=TRAIN, linewidth=2, label="training loss")
    validation = series(entries, "eval_loss")
    if validation[0]:
        axes.plot(*validation, color=VALIDATION, marker="o", markersize=5, linewidth=2, label="validation loss")
    axes.set_yscale("log" if min(losses + validation[1]) > 0 else "linear")
    plain_axes(axes, "" if below else "step", f"loss ({unit})")
    rates = series(entries, "learning_rate")
    if rates[0]:
        _draw_rates(axes, *rates)
    axes.legend(frameon=False, loc="upper right", labelcolor=INK)
    for key, panel in zip(below, lower, strict=True):
        panel.plot(*series(entries, key), color=TRAIN, linewidth=2)
        plain_axes(panel, "step" if key == below[-1] else "", key.removeprefix("rewards/"))
        if key == "rewards/accuracy":
            panel.set_ylim(-0.05, 1.05)
    save_png(figure, to)


def _draw_rates(axes: Axes, steps: list[float], rates: list[float]) -> None:
    """Draws the learning rate behind the losses, on an axis of its own."""
    right = axes.twinx()
    right.fill_between(steps, rates, color=FAINT, alpha=0.15, linewidth=0)
    right.set_ylim(0, max([*rates, 1e-12]) * 1.6)
    right.set_ylabel("learning rate", color=FAINT)
    right.ticklabel_format(axis="y", scilimits=(0, 0))
    right.tick_params(colors=FAINT, length=0)
    right.spines[:].set_visible(False)
    axes.set_zorder(right.get_zorder() + 1)
    axes.patch.set_visible(False)


def plain_axes(axes: Axes, x_label: str, y_label: str) -> None:
    """Gives axes labels, a faint grid and no frame."""
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel(y_label, color=INK)
    axes.grid(color=GRID, linewidth=0.8)
    axes.tick_params(which="both", colors=INK, length=0)
    axes.spines[:].set_visible(False)
    axes.margins(x=0.01)


def chosen_for_sheet(
    predictions: Sequence[Prediction], shares: Mapping[str, float]
) -> tuple[list[Prediction], list[Prediction]]:
    """Returns a random sample for all lines of the sheet but the last, and mistakes for the last."""
    shuffled = list(predictions)
    random.Random(0).shuffle(shuffled)
    fair = shuffled[: SHEET_CELLS - COLUMNS]
    mistakes = [wrong for wrong in shuffled[len(fair) :] if shares.get(wrong.id, 1.0) < RIGHT_SHARE]
    return fair, mistakes[:COLUMNS]


def write_contact_sheet(
    predictions: Sequence[Prediction],
    open_picture: Callable[[Prediction], Image.Image],
    to: Path,
    *,
    title: str,
    shares: Mapping[str, float],
    subtitles: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Draws pictures with their questions and the model's answers, green where right, red where wrong.

    Args:
        shares: by id, how right each answer is, from 0 to 1; half is right, and one without has neither colour.
        subtitles: by id, what is said in a video; drawn over its picture's lower edge.
    """
    fair, mistakes = chosen_for_sheet(predictions, shares)
    chosen = fair + mistakes
    title += "\nrandom questions, then a row of mistakes" if mistakes else "\nrandom questions"
    lines = -(-len(chosen) // COLUMNS)
    width, height = CELL_WIDTH * COLUMNS + MARGIN, CELL_HEIGHT * lines + TITLE_HEIGHT
    figure = new_figure(width, height)
    middle = 1 - 0.5 * TITLE_HEIGHT / height
    figure.text(0.5, middle, plain_text(title), ha="center", va="center", color=INK, **TITLE_FONT, **PLAIN_TEXT)
    for number, prediction in enumerate(chosen):
        line, column = divmod(number, COLUMNS)
        left = (MARGIN + column * CELL_WIDTH) / width
        top = 1 - (TITLE_HEIGHT + line * CELL_HEIGHT) / height
        side = CELL_WIDTH - MARGIN
        axes = figure.add_axes((left, top - side / height, side / width, side / height))
        _draw_picture(axes, prediction, open_picture, subtitles.get(prediction.id, ""))
        share = shares.get(prediction.id)
        _draw_answer(axes, prediction, inches=side, right=None if share is None else share >= RIGHT_SHARE)
    save_png(figure, to)


def _draw_picture(
    axes: Axes, prediction: Prediction, open_picture: Callable[[Prediction], Image.Image], subtitles: str
) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_color(GRID)
    style: dict[str, Any] = {"ha": "center", "fontsize": 6, "transform": axes.transAxes, **PLAIN_TEXT}
    if prediction.images:
        try:
            picture = open_picture(prediction)
        except BadSample as error:
            reason = plain_text(textwrap.fill(error.reason, QUESTION_CHARACTERS))
            axes.text(0.5, 0.5, reason, va="center", color=WRONG, **style)
        else:
            # Pixels stay squares where a picture is smaller than its place on the sheet.
            axes.imshow(picture, interpolation="nearest" if max(picture.size) < SMALL_PX else "antialiased")
    if lines := textwrap.wrap(subtitles, SUBTITLE_CHARACTERS, max_lines=2, placeholder=" …"):
        box = {"facecolor": INK, "alpha": 0.75, "linewidth": 0, "pad": 1.5}
        axes.text(0.5, 0.03, plain_text("\n".join(lines)), va="bottom", color="white", bbox=box, **style)


def _draw_answer(axes: Axes, prediction: Prediction, *, inches: float, right: bool | None) -> None:
    """Draws question and answer under a picture `inches` high; None is neither right nor wrong."""
    color = INK if right is None else RIGHT if right else WRONG
    axes.spines[:].set_color(color)
    axes.spines[:].set_linewidth(2.5 if right is False else 1.2)
    question = textwrap.wrap(prediction.question, QUESTION_CHARACTERS, max_lines=2, placeholder=" …")
    answer = prediction.prediction.strip() or "(empty)"
    lines = textwrap.wrap(f"✓ {answer}" if right else answer, ANSWER_CHARACTERS)
    # the last one too, where an answer that reasons gives its result
    line = "\n".join(lines if len(lines) <= 2 else [f"{lines[0]} …", lines[-1]])
    if right is False:
        line = f"✗ {_ending(answer)}\ntrue: {_ending(prediction.truth)}"
    style = {"ha": "center", "va": "top", "transform": axes.transAxes, "linespacing": 1.15, **PLAIN_TEXT}
    axes.text(0.5, -0.07 / inches, plain_text("\n".join(question)), fontsize=8.5, color=INK, **style)
    below = -(0.12 + 0.145 * len(question)) / inches
    axes.text(0.5, below, plain_text(line), fontsize=8.5, fontweight="bold", color=color, **style)


def _ending(answer: str) -> str:
    """Returns an answer's last words, as many as fit after a label in one line."""
    room = ANSWER_CHARACTERS - len("true: ")
    if len(answer) <= room:
        return answer
    last = answer[-(room - len("… ")) :]
    return "… " + (last.partition(" ")[2] or last)


def plain_text(text: str) -> str:
    """Returns text that can be drawn or written: half a surrogate pair becomes the sign for the unknown."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def new_figure(width: float, height: float) -> Figure:
    """Returns a figure of this size in inches."""
    # A Figure of its own, not pyplot's: nothing global is changed, and no display is looked for.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=130, facecolor="white")


def save_png(figure: Figure, to: Path) -> None:
    """Writes under a temporary name, then renames."""
    scratch = to.with_name(f".{to.name}.part")
    figure.savefig(scratch, format="png")
    scratch.replace(to)
