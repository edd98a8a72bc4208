"""The parts of the page and where they stand; what they do is in `page.py`. All text in its HTML is escaped."""

from __future__ import annotations

import base64
import contextlib
import json
import secrets
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace

import gradio as gr  # pyright: ignore[reportMissingImports] - of the extra `web`
from PIL import Image

from dora_vl.data.pictures import MediaFolder, open_image
from dora_vl.errors import BadSample, UserError
from dora_vl.evaluation.ask import Shown
from dora_vl.evaluation.predictions import PREDICTIONS, Prediction, read_predictions
from dora_vl.run.folder import SETTINGS
from dora_vl.run.watched import evenly, read_watched
from dora_vl.serving.side_by_side import NOTHING, Answer, Talk

THUMB_PX = 320
JPEG_QUALITY = 85
ENDINGS = {"length": " · as long as allowed", "ended": " · stopped"}
NO_WORDS = '<span class="dv-faint">(no words)</span>'


def shown_view(shown: Shown, *, frames_are_pictures: bool = False) -> str:
    """The pictures, and a video's frames with their times, as the model sees them.

    Args:
        frames_are_pictures: the model takes no videos, and sees their frames as so many pictures.
    """
    figures = [_figure(picture, f"{picture.width} × {picture.height}") for picture in shown.pictures]
    parts = [f'<div class="dv-pictures">{"".join(figures)}</div>'] if figures else []
    for video in shown.videos:
        times = zip(video.pictures, video.seconds, strict=True)
        frames = "".join(_figure(picture, f"{seconds:.1f} s") for picture, seconds in times)
        heading = f"what the model sees: {len(video.pictures)} of {video.count} frames, of {video.duration:.1f} s"
        heading += ", as separate pictures: it takes no videos" if frames_are_pictures else ""
        parts.append(f'<div class="dv-frames">{frames}</div><p class="dv-faint">{heading}</p>')
    return "".join(parts) or '<p class="dv-faint dv-nothing">Nothing is shown yet. A question needs no picture.</p>'


def column_view(talk: Talk, column: int, *, named: str) -> str:
    """What one model was asked and said."""
    if not talk.exchanges:
        return f'<div class="dv-talk"><p class="dv-faint dv-nothing">{escape(named)} will answer here.</p></div>'
    turns = "".join(
        f'<div class="dv-asked">{escape(exchange.question) or NO_WORDS}</div>{_answer_view(exchange.answers[column])}'
        for exchange in talk.exchanges
    )
    return f'<div class="dv-talk"><div class="dv-turns">{turns}</div></div>'


def notice_view(text: str) -> str:
    """What went wrong; nothing where nothing did."""
    return f'<div class="dv-notice" role="alert">{escape(text)}</div>' if text else ""


def _answer_view(answer: Answer) -> str:
    words = escape(answer.text)
    if not answer.over:
        words += '<span class="dv-caret"></span>'
    elif not answer.text and not answer.trouble:
        words = '<span class="dv-faint">(the model ended its answer at once)</span>'
    message = f'<div class="dv-said" data-over="{str(answer.over).lower()}">{words}</div>' if words else ""
    trouble = f'<div class="dv-trouble">{escape(answer.trouble)}</div>' if answer.trouble else ""
    return message + trouble + f'<div class="dv-tally">{escape(tally(answer))}</div>'


def tally(answer: Answer) -> str:
    """Who answered, tokens and speed, in a line."""
    speaker = answer.speaker
    who = speaker.name if speaker.strength == 1 else f"{speaker.name} at {speaker.strength:g}"
    ended = ENDINGS.get(answer.reason or "", "")
    if not answer.new_tokens or answer.seconds <= 0:  # it is not over
        return f"{who} · {answer.seconds:.1f} s{ended}" if answer.seconds else who
    tokens = "1 token" if answer.new_tokens == 1 else f"{answer.new_tokens} tokens"
    speed = answer.new_tokens / answer.seconds  # the time of its prompt included
    return f"{who} · {tokens} · {speed:.1f} tokens/s · prompt of {answer.prompt_tokens}{ended}"


def _figure(picture: Image.Image, caption: str) -> str:
    heading = escape(caption)
    return f'<figure><img alt="{heading}" src="{_data_url(picture)}"><figcaption>{heading}</figcaption></figure>'


def _data_url(picture: Image.Image) -> str:
    """A small copy; a tiny picture as it is, to the pixel."""
    small = picture.copy()
    small.thumbnail((THUMB_PX, THUMB_PX))
    kind = "PNG" if max(picture.size) <= THUMB_PX else "JPEG"
    content = BytesIO()
    small.save(content, kind, quality=JPEG_QUALITY)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content.getvalue()).decode()}"


MOST_EXAMPLES = 6
LOOKED_AT = 5
"""So many times as many are looked at for pictures that are still there and questions that differ."""


@dataclass(frozen=True)
class ExampleQuestion:
    """A question about a picture; what is right is for the test, not for the page."""

    question: str
    picture: Image.Image
    truth: str


def example_questions(adapter: Path, most: int = MOST_EXAMPLES) -> tuple[ExampleQuestion, ...]:
    """A few questions with one picture each from the run that an adapter is of: of its test, else those it watched."""
    for run in adapter.resolve().parents[:2]:  # an adapter is in its run's folder, or in a checkpoint's
        for examples in (_of_test(run, most), _watched(run)):
            chosen: dict[str, ExampleQuestion] = {}
            for example in examples:  # each question once
                chosen.setdefault(example.question, example)
                if len(chosen) == most:
                    break
            if chosen:
                return tuple(chosen.values())
    return ()


def _of_test(run: Path, most: int) -> Iterator[ExampleQuestion]:
    """One of each kind of question, then the next of each, evenly from the whole test."""
    try:
        settings = json.loads((run / SETTINGS).read_bytes())
        predictions = read_predictions(run / PREDICTIONS).values()
    except (OSError, ValueError, UserError):
        return
    stated = [(settings.get(section) or {}).get("image_folder") for section in ("evaluation", "data")]
    if not any(stated):
        return
    # From the folder that the run was started in, where its own still ends as it was named then; else from here.
    folder, output = Path(next(filter(None, stated))), Path(settings["training"]["output_dir"])
    started_in = Path(*run.parts[: -len(output.parts)])
    if not output.is_absolute() and run.parts[-len(output.parts) :] == output.parts and (started_in / folder).exists():
        folder = started_in / folder
    kinds: dict[str | None, list[Prediction]] = {}
    for prediction in predictions:
        if len(prediction.images) == 1:
            kinds.setdefault(prediction.kind, []).append(prediction)
    for of_each in zip_longest(*(evenly(alike, LOOKED_AT * most) for alike in kinds.values())):
        for prediction in filter(None, of_each):
            yield from _opened(folder, prediction.images[0], prediction.question, prediction.truth)


def _watched(run: Path) -> Iterator[ExampleQuestion]:
    watched = read_watched(run)
    for question in watched.questions if watched is not None else ():
        if watched is not None and question.picture:
            yield from _opened(watched.folder, question.picture, question.question, question.truth)


def _opened(folder: Path, image: str, question: str, truth: str) -> Iterator[ExampleQuestion]:
    """The example, where its picture can be opened."""
    with contextlib.suppress(BadSample):
        yield ExampleQuestion(question, open_image(MediaFolder(folder, follow_links=True), image), truth)


STYLE = Path(__file__).parent / "page_files" / "page.css"
TAKE_QUESTION, DIAL = STYLE.with_name("take_question.js"), STYLE.with_name("dial.js")
FONT, MONOSPACE = ("system-ui", "Segoe UI", "Roboto", "DejaVu Sans", "sans-serif"), ("ui-monospace", "monospace")
"""Those that the visitor's own system has: none is fetched."""
STRONGEST, STEP = 2.0, 0.05
"""Of the dial; a request may ask for more."""
LONGEST_ANSWER = 1024


def theme() -> gr.themes.Base:
    """Colours and the visitor's own fonts."""
    colours = gr.themes.Default(
        primary_hue="blue",
        secondary_hue="blue",
        neutral_hue="slate",
        radius_size="lg",
        font=[gr.themes.Font(name) for name in FONT],
        font_mono=[gr.themes.Font(name) for name in MONOSPACE],
    )
    return colours.set(body_background_fill="*neutral_50", block_shadow="none")


def lay_out(
    models: Sequence[str], base: str, examples: Sequence[ExampleQuestion], *, new_tokens: int, temperature: float
) -> tuple[gr.Blocks, SimpleNamespace]:
    """The page without anything happening on it yet, and those of its parts that do something, by name.

    Beside them `chosen`, what a question is asked with (who asks, the talk, who answers and how), and `changing`, all
    that something else may change.

    Args:
        base: where the base is from.
    """
    named = ", ".join(f"<b>{escape(name)}</b>" for name in models[1:])
    with gr.Blocks(title="dora-vl demo", analytics_enabled=False, fill_width=True) as blocks:
        gr.HTML(
            '<header class="dv-head"><h1>Ask, side by side</h1>'
            f"<p>{named} over <b>{escape(base)}</b>, unmerged: both columns are rows of one batch.</p></header>"
        )
        person, key, answered = gr.State(""), gr.State(""), gr.State("")
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=300):  # what the models are shown, examples, settings
                with gr.Tab("Pictures or a video"):
                    files = gr.File(label="Pictures or a video", show_label=False, file_count="multiple", height=124,
                                    elem_id="dv-files")  # fmt: skip
                with gr.Tab("Webcam"):
                    webcam = gr.Image(label="Webcam", show_label=False, sources=["webcam"], type="filepath",
                                      image_mode=None, height=220, elem_id="dv-webcam")  # fmt: skip
                seen = gr.HTML(shown_view(NOTHING), elem_id="dv-seen")
                nothing = gr.Button("Remove the pictures", size="sm", variant="secondary", elem_id="dv-nothing")
                clicked = _examples(examples) if examples else None
                with gr.Accordion("Settings", open=False):
                    tokens = gr.Slider(1, max(LONGEST_ANSWER, new_tokens), new_tokens, step=1,
                                       label="Longest answer, in tokens")  # fmt: skip
                    heat = gr.Slider(0, 2, temperature, step=0.1, label="Temperature",
                                     info="0 takes the likeliest token each time")  # fmt: skip
                    remember = gr.Checkbox(True, label="Later questions see the earlier ones")
            with gr.Column(scale=9, min_width=480):  # who answers, and what is asked and said
                notice = gr.HTML(notice_view(""), elem_id="dv-notice")
                with gr.Row(equal_height=True):
                    columns = (_column(models, models[1], "left"), _column(models, models[0], "right"))
                with gr.Row(equal_height=True, elem_id="dv-asking"):
                    question = gr.Textbox(placeholder="Type a question, then Enter", show_label=False, container=False,
                                          lines=1, scale=8, autofocus=True, elem_id="dv-question")  # fmt: skip
                    ask = gr.Button("Ask", variant="primary", scale=1, min_width=80, interactive=False,
                                    elem_id="dv-ask")  # fmt: skip
                    stop = gr.Button("Stop", variant="stop", scale=1, min_width=80, interactive=False,
                                     elem_id="dv-stop")  # fmt: skip
                    anew = gr.Button("New chat", scale=1, min_width=100, elem_id="dv-anew")
                asked = gr.Textbox(visible="hidden")
    parts = SimpleNamespace(
        person=person, key=key, files=files, webcam=webcam, seen=seen, nothing=nothing, examples=clicked,
        notice=notice, columns=columns, question=question, asked=asked, answered=answered, ask=ask, stop=stop,
        anew=anew,
    )  # fmt: skip
    speakers = [*(column.model for column in columns), *(column.strength for column in columns)]
    parts.chosen = [person, key, *speakers, tokens, heat, remember]
    shown = [key, files, webcam, seen, notice, *(column.talk for column in columns)]
    parts.changing = [*shown, question, answered, ask, stop]
    return blocks, parts


def _examples(examples: Sequence[ExampleQuestion]) -> gr.Dataset:
    """Rows of a small picture and its question."""
    return gr.Dataset(
        components=[gr.HTML(render=False), gr.Textbox(render=False)],
        samples=[
            [f'<img class="dv-thumbnail" alt="" src="{_data_url(item.picture)}">', item.question] for item in examples
        ],
        headers=["", "A question of the run's test"],
        type="index",
        samples_per_page=len(examples),
        label="Try one",
        elem_id="dv-examples",
    )


def _column(models: Sequence[str], chosen: str, side: str) -> SimpleNamespace:
    """One of the two who answer."""
    with gr.Column(min_width=230):
        model = gr.Dropdown(list(models), value=chosen, show_label=False, elem_id=f"dv-model-{side}")
        strength = gr.Slider(
            0, STRONGEST, 1.0, step=STEP, label="Strength of the adapter", interactive=chosen != models[0],
            info="0 the base, 1 the adapter", elem_id=f"dv-strength-{side}",
        )  # fmt: skip
        talk = gr.HTML(column_view(Talk(), 0, named=chosen), elem_id=f"dv-talk-{side}")
    return SimpleNamespace(model=model, strength=strength, talk=talk)


MOST_TALKS = 64
"""A talk holds its pictures; the one that was used longest ago goes."""


class Talks:
    """The talks that people have on the page, each under a key that nobody can guess; for several threads."""

    def __init__(self, most: int = MOST_TALKS) -> None:
        self._most = most
        self._talks: OrderedDict[str, Talk] = OrderedDict()
        self._lock = threading.Lock()

    def begin(self, talk: Talk) -> str:
        """Keeps a new talk; its key."""
        key = secrets.token_urlsafe(16)
        self.keep(key, talk)
        return key

    def get(self, key: str) -> Talk:
        """A talk as it was kept last; of no key an empty one. Raises UserError: it is gone."""
        if not key:
            return Talk()
        with self._lock:
            if key not in self._talks:
                raise UserError("this chat is no longer here; show its pictures again, or press New chat")
            self._talks.move_to_end(key)
            return self._talks[key]

    def keep(self, key: str, talk: Talk) -> None:
        """Keeps how far a talk has come."""
        with self._lock:
            self._talks[key] = talk
            self._talks.move_to_end(key)
            while len(self._talks) > self._most:
                self._talks.popitem(last=False)
