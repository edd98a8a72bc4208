"""The parts of the page and where they stand; what they do is in `page.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import gradio as gr  # pyright: ignore[reportMissingImports] - of the extra `web`

from dora_vl.app.example_questions import ExampleQuestion
from dora_vl.app.page_view import column_view, heading_view, notice_view, shown_view, thumbnail_view
from dora_vl.app.side_by_side import NOTHING, Talk

STYLE = Path(__file__).parent / "page_files" / "page.css"
TAKE_QUESTION, DIAL = STYLE.with_name("take_question.js"), STYLE.with_name("dial.js")
FONT, MONOSPACE = ("system-ui", "Segoe UI", "Roboto", "DejaVu Sans", "sans-serif"), ("ui-monospace", "monospace")
"""Those that the visitor's own system has: none is fetched."""
STRONGEST, STEP = 2.0, 0.05
"""Of the dial; a request may ask for more."""
LONGEST_ANSWER = 1024


@dataclass(frozen=True)
class Column:
    """One of the two who answer."""

    model: gr.Dropdown
    strength: gr.Slider
    talk: gr.HTML


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts that do something."""

    person: gr.State
    key: gr.State
    files: gr.File
    webcam: gr.Image
    seen: gr.HTML
    nothing: gr.Button
    examples: gr.Dataset | None
    notice: gr.HTML
    columns: tuple[Column, Column]
    question: gr.Textbox
    asked: gr.Textbox
    answered: gr.State
    ask: gr.Button
    stop: gr.Button
    anew: gr.Button
    tokens: gr.Slider
    temperature: gr.Slider
    remember: gr.Checkbox

    @property
    def chosen(self) -> list[Any]:
        """What a question is asked with: who asks, the talk, who answers and how."""
        models = [column.model for column in self.columns]
        strengths = [column.strength for column in self.columns]
        return [self.person, self.key, *models, *strengths, self.tokens, self.temperature, self.remember]

    @property
    def changing(self) -> list[Any]:
        """All that something else may change."""
        talks = [column.talk for column in self.columns]
        own = [
            self.key,
            self.files,
            self.webcam,
            self.seen,
            self.notice,
            self.question,
            self.answered,
            self.ask,
            self.stop,
        ]
        return [*own, *talks]


@dataclass(frozen=True, kw_only=True)
class Start:
    """What the page starts with.

    Attributes:
        models: what can be asked, the base first.
        place: where the base is from.
        new_tokens: longest answer.
        temperature: 0 takes the likeliest token.
        examples: questions that a click takes.
    """

    models: tuple[str, ...]
    place: str
    new_tokens: int
    temperature: float
    examples: tuple[ExampleQuestion, ...] = ()


def theme() -> gr.themes.Base:
    """Colours and the visitor's own fonts."""
    own = gr.themes.Default(
        primary_hue="blue",
        secondary_hue="blue",
        neutral_hue="slate",
        radius_size="lg",
        font=[gr.themes.Font(name) for name in FONT],
        font_mono=[gr.themes.Font(name) for name in MONOSPACE],
    )
    return own.set(body_background_fill="*neutral_50", block_shadow="none")


def lay_out(start: Start) -> tuple[gr.Blocks, Parts]:
    """The page without anything happening on it yet."""
    found: dict[str, Any] = {}
    with gr.Blocks(title="dora-vl demo", analytics_enabled=False, fill_width=True) as blocks:
        gr.HTML(heading_view(start.place, start.models[1:]))
        found |= {"person": gr.State(""), "key": gr.State("")}
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=300):
                found |= _left(start)
            with gr.Column(scale=9, min_width=480):
                found |= _right(start)
    return blocks, Parts(**{field.name: found[field.name] for field in fields(Parts)})


def _left(start: Start) -> dict[str, Any]:
    """What the models are shown, examples, settings."""
    with gr.Tab("Pictures or a video"):
        files = gr.File(
            label="Pictures or a video", show_label=False, file_count="multiple", height=124, elem_id="dv-files"
        )
    with gr.Tab("Webcam"):
        webcam = gr.Image(
            label="Webcam",
            show_label=False,
            sources=["webcam"],
            type="filepath",
            image_mode=None,
            height=220,
            elem_id="dv-webcam",
        )
    seen = gr.HTML(shown_view(NOTHING), elem_id="dv-seen")
    nothing = gr.Button("Remove the pictures", size="sm", variant="secondary", elem_id="dv-nothing")
    examples = _examples(start.examples) if start.examples else None
    with gr.Accordion("Settings", open=False):
        tokens = gr.Slider(
            1, max(LONGEST_ANSWER, start.new_tokens), start.new_tokens, step=1, label="Longest answer, in tokens"
        )
        temperature = gr.Slider(
            0, 2, start.temperature, step=0.1, label="Temperature", info="0 takes the likeliest token each time"
        )
        remember = gr.Checkbox(True, label="Later questions see the earlier ones")
    return {
        "files": files, "webcam": webcam, "seen": seen, "nothing": nothing, "examples": examples, "tokens": tokens,
        "temperature": temperature, "remember": remember,
    }  # fmt: skip


def _examples(examples: Sequence[ExampleQuestion]) -> gr.Dataset:
    """Rows of a small picture and its question."""
    return gr.Dataset(
        components=[gr.HTML(render=False), gr.Textbox(render=False)],
        samples=[[thumbnail_view(one.picture), one.question] for one in examples],
        headers=["", "A question of the run's test"],
        type="index",
        samples_per_page=len(examples),
        label="Try one",
        elem_id="dv-examples",
    )


def _right(start: Start) -> dict[str, Any]:
    """Who answers, and what is asked and said."""
    base, *adapters = start.models
    notice = gr.HTML(notice_view(""), elem_id="dv-notice")
    with gr.Row(equal_height=True):
        columns = (_column(start, adapters[0], "left"), _column(start, base, "right"))
    with gr.Row(equal_height=True, elem_id="dv-asking"):
        question = gr.Textbox(
            placeholder="Type a question, then Enter", show_label=False, container=False, lines=1, scale=8,
            autofocus=True, elem_id="dv-question",
        )  # fmt: skip
        ask = gr.Button("Ask", variant="primary", scale=1, min_width=80, interactive=False, elem_id="dv-ask")
        stop = gr.Button("Stop", variant="stop", scale=1, min_width=80, interactive=False, elem_id="dv-stop")
        anew = gr.Button("New chat", scale=1, min_width=100, elem_id="dv-anew")
    asked, answered = gr.Textbox(visible="hidden"), gr.State("")
    return {
        "notice": notice, "columns": columns, "question": question, "asked": asked, "answered": answered, "ask": ask,
        "stop": stop, "anew": anew,
    }  # fmt: skip


def _column(start: Start, chosen: str, side: str) -> Column:
    with gr.Column(min_width=230):
        model = gr.Dropdown(list(start.models), value=chosen, show_label=False, elem_id=f"dv-model-{side}")
        strength = gr.Slider(
            0, STRONGEST, 1.0, step=STEP, label="Strength of the adapter", interactive=chosen != start.models[0],
            info="0 the base, 1 the adapter", elem_id=f"dv-strength-{side}",
        )  # fmt: skip
        talk = gr.HTML(column_view(Talk(), 0, named=chosen), elem_id=f"dv-talk-{side}")
    return Column(model, strength, talk)
