"""What the page shows of a talk as HTML: what the model sees, answers, what went wrong. All text is escaped."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from io import BytesIO

from PIL import Image

from dora_vl.app.side_by_side import Answer, Exchange, Talk
from dora_vl.evaluation.asker import Shown

THUMB_PX = 320
JPEG_QUALITY = 85
ENDINGS = {"length": " · as long as allowed", "ended": " · stopped"}
EMPTY = "the model ended its answer at once"


def shown_view(shown: Shown, *, frames_are_pictures: bool = False) -> str:
    """The pictures, and a video's frames with their times, as the model sees them.

    Args:
        frames_are_pictures: the model takes no videos, and sees their frames as so many pictures.
    """
    figures = [_figure(picture, _size(picture)) for picture in shown.pictures]
    parts = [f'<div class="dv-pictures">{"".join(figures)}</div>'] if figures else []
    for video in shown.videos:
        times = zip(video.pictures, video.seconds, strict=True)
        frames = "".join(_figure(picture, f"{seconds:.1f} s") for picture, seconds in times)
        told = f"what the model sees: {len(video.pictures)} of {video.count} frames, of {video.duration:.1f} s"
        told += ", as separate pictures: it takes no videos" if frames_are_pictures else ""
        parts.append(f'<div class="dv-frames">{frames}</div><p class="dv-faint">{told}</p>')
    return "".join(parts) or '<p class="dv-faint dv-nothing">Nothing is shown yet. A question needs no picture.</p>'


def column_view(talk: Talk, column: int, *, named: str) -> str:
    """What one model was asked and said.

    Args:
        named: what stands there before the first question.
    """
    if not talk.exchanges:
        return f'<div class="dv-talk"><p class="dv-faint dv-nothing">{escape(named)} will answer here.</p></div>'
    turns = "".join(_exchange(one, column) for one in talk.exchanges)
    return f'<div class="dv-talk"><div class="dv-turns">{turns}</div></div>'


def notice_view(text: str) -> str:
    """What went wrong; nothing where nothing did."""
    return f'<div class="dv-notice" role="alert">{escape(text)}</div>' if text else ""


def heading_view(base: str, adapters: Sequence[str]) -> str:
    """The head of the page."""
    named = ", ".join(f"<b>{escape(name)}</b>" for name in adapters)
    return (
        '<header class="dv-head"><h1>Ask, side by side</h1>'
        f"<p>{named} over <b>{escape(base)}</b>, unmerged: both columns are rows of one batch.</p></header>"
    )


def thumbnail_view(picture: Image.Image) -> str:
    """A very small copy of a picture."""
    return f'<img class="dv-thumbnail" alt="" src="{_data_url(picture)}">'


def _exchange(exchange: Exchange, column: int) -> str:
    answer = exchange.answers[column]
    asked = escape(exchange.question) or '<span class="dv-faint">(no words)</span>'
    return f'<div class="dv-asked">{asked}</div>{_answer(answer)}'


def _answer(answer: Answer) -> str:
    words = escape(answer.text)
    if answer.trouble and not answer.text:
        words = ""
    elif answer.over and not answer.text:
        words = f'<span class="dv-faint">({EMPTY})</span>'
    elif not answer.over:
        words += '<span class="dv-caret"></span>'
    said = f'<div class="dv-said" data-over="{str(answer.over).lower()}">{words}</div>' if words else ""
    trouble = f'<div class="dv-trouble">{escape(answer.trouble)}</div>' if answer.trouble else ""
    return said + trouble + f'<div class="dv-tally">{escape(tally(answer))}</div>'


def tally(answer: Answer) -> str:
    """Who answered, tokens and speed, in a line."""
    speaker = answer.speaker
    who = speaker.name if speaker.strength == 1 else f"{speaker.name} at {speaker.strength:g}"
    speed, ended = answer.tokens_a_second, ENDINGS.get(answer.reason or "", "")
    if speed is None:
        return f"{who} · {answer.seconds:.1f} s{ended}" if answer.seconds else who
    tokens = "1 token" if answer.new_tokens == 1 else f"{answer.new_tokens} tokens"
    return f"{who} · {tokens} · {speed:.1f} tokens/s · prompt of {answer.prompt_tokens}{ended}"


def _size(picture: Image.Image) -> str:
    return f"{picture.width} × {picture.height}"


def _figure(picture: Image.Image, caption: str) -> str:
    told = escape(caption)
    return f'<figure><img alt="{told}" src="{_data_url(picture)}"><figcaption>{told}</figcaption></figure>'


def _data_url(picture: Image.Image) -> str:
    """A small copy; a tiny picture as it is, to the pixel."""
    small = picture.copy()
    small.thumbnail((THUMB_PX, THUMB_PX))
    kind = "PNG" if max(picture.size) <= THUMB_PX else "JPEG"
    content = BytesIO()
    small.save(content, kind, quality=JPEG_QUALITY)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content.getvalue()).decode()}"
