"""What the page shows, as HTML whose text is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from io import StringIO

from PIL import Image
from rich.console import Console
from rich.text import Text

from dora_vl.evaluation.predictor import PromptMedia
from dora_vl.run.folder import data_url
from dora_vl.serving.side_by_side import ColumnAnswer, Conversation

THUMB_PX = 320
ENDINGS = {"length": " · as long as allowed", "ended": " · stopped"}
LONG_CELL = 40
"""A table's cell of more characters is wide, so that it does not stand as a column of single words."""
NO_WORDS = '<span class="dv-faint">(no words)</span>'


def shown_view(shown: PromptMedia, *, frames_are_pictures: bool = False) -> str:
    """Returns the pictures, and a video's frames with their times, as the model sees them."""
    figures = [_figure(picture, f"{picture.width} × {picture.height}") for picture in shown.pictures]
    parts = [f'<div class="dv-pictures">{"".join(figures)}</div>'] if figures else []
    for video in shown.videos:
        times = zip(video.pictures, video.seconds, strict=True)
        frames = "".join(_figure(picture, f"{seconds:.1f} s") for picture, seconds in times)
        heading = f"what the model sees: {len(video.pictures)} of {video.count} frames, of {video.duration:.1f} s"
        heading += ", as separate pictures: it takes no videos" if frames_are_pictures else ""
        parts.append(f'<div class="dv-frames">{frames}</div><p class="dv-faint">{heading}</p>')
    return "".join(parts) or '<p class="dv-faint dv-nothing">Nothing is shown yet. A question needs no picture.</p>'


def head_view(names: Sequence[str], base: str) -> str:
    """Returns who answers: the base's name among the models first, and its folder."""
    if not names:
        return '<header class="dv-head"><p>Nothing to ask yet: train first, or start with --adapter.</p></header>'
    adapters = ", ".join(f"<b>{escape(name)}</b>" for name in names[1:])
    who = f"{adapters} and its untrained base, <b>{escape(base)}</b>"
    return f'<header class="dv-head"><p>The same question to {who}.</p></header>'


def column_view(conversation: Conversation, column: int, *, named: str) -> str:
    """Returns what one model was asked and said."""
    if not conversation.exchanges:
        hint = f"{escape(named) or 'A model'} will answer here."
        return f'<div class="dv-conversation"><p class="dv-faint dv-nothing">{hint}</p></div>'
    turns = "".join(
        f'<div class="dv-asked">{escape(exchange.question) or NO_WORDS}</div>{_answer_view(exchange.answers[column])}'
        for exchange in conversation.exchanges
    )
    return f'<div class="dv-conversation"><div class="dv-turns">{turns}</div></div>'


def notice_view(text: str) -> str:
    """Returns what went wrong, if anything did."""
    return f'<div class="dv-notice" role="alert">{escape(text)}</div>' if text else ""


def _answer_view(answer: ColumnAnswer) -> str:
    words = escape(answer.text)
    if not answer.is_finished:
        words += '<span class="dv-caret"></span>'
    elif not answer.text and not answer.trouble:
        words = '<span class="dv-faint">(the model ended its answer at once)</span>'
    message = f'<div class="dv-said" data-over="{str(answer.is_finished).lower()}">{words}</div>' if words else ""
    trouble = f'<div class="dv-trouble">{escape(answer.trouble)}</div>' if answer.trouble else ""
    copy = '<button class="dv-copy" type="button">copy</button>' if answer.is_finished and answer.text else ""
    return message + trouble + f'<div class="dv-tally"><span>{escape(tally(answer))}</span>{copy}</div>'


def tally(answer: ColumnAnswer) -> str:
    """Says in a line who answered, with tokens and speed."""
    choice = answer.choice
    who = choice.name if choice.strength == 1 else f"{choice.name} at {choice.strength:g}"
    ended = ENDINGS.get(answer.reason or "", "")
    if not answer.new_tokens or answer.seconds <= 0:  # it is not over
        return f"{who} · {answer.seconds:.1f} s{ended}" if answer.seconds else who
    tokens = "1 token" if answer.new_tokens == 1 else f"{answer.new_tokens} tokens"
    speed = answer.new_tokens / answer.seconds  # the time of its prompt included
    return f"{who} · {tokens} · {speed:.1f} tokens/s · prompt of {answer.prompt_tokens}{ended}"


def _figure(picture: Image.Image, caption: str) -> str:
    heading = escape(caption)
    return (
        f'<figure><img alt="{heading}" src="{data_url(picture, THUMB_PX)}"><figcaption>{heading}</figcaption></figure>'
    )


def state_view(state: str, text: str, more: str = "") -> str:
    """Returns how far a run is, and what it said last."""
    return f'<div class="dv-run" data-state="{state}"><b>{escape(text)}</b><p>{escape(more)}</p></div>'


def printed_view(lines: Sequence[str]) -> str:
    """Returns what a command printed, in its colours."""
    console = Console(record=True, file=StringIO(), width=100_000, color_system="256", force_terminal=True)
    console.print(Text.from_ansi("\n".join(lines)))
    return console.export_html(inline_styles=True, code_format='<pre class="dv-lines">{code}</pre>')


def table_view(
    title: str, head: Sequence[str], rows: Sequence[tuple[Sequence[str], Sequence[str]]], warnings: Sequence[str] = ()
) -> str:
    """Returns a table; each row is a picture, as a data URL or why there is none, and its texts."""
    text = "".join(f"<th>{escape(name)}</th>" for name in head)
    for (url, why), cells in rows:
        picture = f'<img alt="" src="{url}">' if url else escape(why)
        texts = (f"<td{' class=dv-long' if len(cell) > LONG_CELL else ''}>{escape(cell)}</td>" for cell in cells)
        text += f"<tr><td>{picture}</td>{''.join(texts)}</tr>"
    below = "".join(f'<p class="dv-trouble">{escape(warning)}</p>' for warning in warnings)
    return f'<div class="dv-wide"><table><caption>{escape(title)}</caption>{text}</table></div>{below}'
