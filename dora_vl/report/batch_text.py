"""A micro-batch for a terminal, in colours or in signs, and as a page or a picture."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from dora_vl.errors import BadSample
from dora_vl.report.batch_view import JOINED, NAMES, BatchRow, BatchView, Kind, Opens, Piece
from dora_vl.report.inline_pictures import data_url
from dora_vl.report.page import rendered
from dora_vl.run.watched import small_picture

COLOURS: Mapping[Kind, tuple[int, int]] = {
    "trained": (22, 28),
    "context": (236, 239),
    "picture-place": (18, 18),
    "padding": (94, 94),
}
"""Backgrounds of a terminal's 256, for every other token."""
SIGNS: Mapping[Kind, tuple[str, str]] = {
    "trained": ("[", "]"),
    "context": ("", ""),
    "picture-place": ("<", ">"),
    "padding": ("{", "}"),
}
"""Around a stretch of tokens of one kind, where there are no colours."""
RESET = "\x1b[0m"


def terminal_lines(view: BatchView, *, colours: bool) -> Iterator[str]:
    """Counts, the legend, and each row."""
    yield ", ".join(f"{name} {value}" for name, value in view.facts)
    kinds: Sequence[Kind] = ("trained", "context", "picture-place", "padding")
    yield "  ".join(_marked([Piece(NAMES[kind], kind)], colours=colours) for kind in kinds)
    for row in view.rows:
        yield ""
        yield row.title
        for pieces in row.lines:
            yield "  " + _marked(pieces, colours=colours)
    for name, reason in view.skipped:
        yield f"skipped {name}: {reason}"


def _marked(pieces: Sequence[Piece], *, colours: bool) -> str:
    if colours:
        return "".join(
            f"\x1b[48;5;{COLOURS[one.kind][number % 2]}m\x1b[38;5;255m{shown(one)}{RESET}"
            for number, one in enumerate(pieces)
        )
    stretches: list[list[Piece]] = []
    for one in pieces:
        if stretches and stretches[-1][-1].kind == one.kind:
            stretches[-1].append(one)
        else:
            stretches.append([one])
    return "".join(
        "".join([SIGNS[several[0].kind][0], *map(shown, several), SIGNS[several[0].kind][1]]) for several in stretches
    )


def shown(piece: Piece) -> str:
    """A piece's text on one line; a joined one with its length."""
    text = piece.text.replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍").replace("\x1b", "␛")
    return f"{text} × {piece.count}" if piece.kind in JOINED and piece.count > 1 else text


def batch_page(view: BatchView, *, title: str) -> str:
    """The batch as a page, pictures beside their samples."""
    beside = dict(_pictures(view.pictures))
    rows = [{"row": row, "picture": beside.get(row.title, ("", ""))} for row in view.rows]
    apart = [] if all(row.title in beside for row in view.rows) else list(beside.items())
    return rendered(
        "batch.html.j2",
        {"view": view, "rows": rows, "apart": apart, "title": title, "names": NAMES, "shown": shown, "joined": JOINED},
    )


def _pictures(pictures: Sequence[tuple[str, Opens]]) -> Iterator[tuple[str, tuple[str, str]]]:
    for name, opens in pictures:
        if opens is None:
            yield name, ("", "")
            continue
        try:
            yield name, (data_url(opens()), "")
        except BadSample as error:
            yield name, ("", error.reason)


WIDTH, MARGIN, LINE, SIDE, TEXT, FACTS_CHARACTERS = 1280, 24, 26, 112, 15, 130
PAPER, INK, FAINT = "#ffffff", "#1d2630", "#66727f"
FILLS: Mapping[Kind, tuple[str, str]] = {
    "trained": ("#cfe8d5", "#b4dabd"),
    "context": ("#eef0f3", "#e1e5ea"),
    "picture-place": ("#d9e5fb", "#d9e5fb"),
    "padding": ("#f4e3d3", "#f4e3d3"),
}


def batch_picture(view: BatchView) -> bytes:
    """The batch as a PNG file: a block for each row, its picture at the left."""
    beside = dict(view.pictures)
    blocks = [_legend(view)] + [_block(row, beside.get(row.title)) for row in view.rows]
    height = sum(block.height for block in blocks) + MARGIN * (len(blocks) + 1)
    sheet = Image.new("RGB", (WIDTH, height), PAPER)
    top = MARGIN
    for block in blocks:
        sheet.paste(block, (0, top))
        top += block.height + MARGIN
    file = io.BytesIO()
    sheet.save(file, format="png", optimize=True)
    return file.getvalue()


@cache
def _font(size: int) -> Any:
    """matplotlib's, which has most of the world's letters, where it is installed; else Pillow's own."""
    try:
        import matplotlib
    except ImportError:
        return ImageFont.load_default(size)
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def _legend(view: BatchView) -> Image.Image:
    kinds: Sequence[Kind] = ("trained", "context", "picture-place", "padding")
    facts = textwrap.wrap(", ".join(f"{name} {value}" for name, value in view.facts), FACTS_CHARACTERS)
    block = Image.new("RGB", (WIDTH, (len(facts) + 1) * LINE), PAPER)
    draw = ImageDraw.Draw(block)
    for number, line in enumerate(facts):
        draw.text((MARGIN, number * LINE), line, INK, _font(TEXT))
    _flow(draw, [Piece(f" {NAMES[kind]} ", kind) for kind in kinds], left=MARGIN, top=len(facts) * LINE)
    return block


def _block(row: BatchRow, opens: Opens) -> Image.Image:
    left = MARGIN + SIDE + MARGIN
    measured = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    top, tops = LINE, []
    for pieces in row.lines:
        tops.append(top)
        top = _flow(measured, pieces, left=left, top=top, drawn=False) + LINE + 6
    block = Image.new("RGB", (WIDTH, max(top, 0 if opens is None else SIDE)), PAPER)
    draw = ImageDraw.Draw(block)
    draw.text((left, 0), row.title, FAINT, _font(TEXT))
    for pieces, start in zip(row.lines, tops, strict=True):
        _flow(draw, pieces, left=left, top=start)
    if opens is not None:
        try:
            picture = small_picture(opens().convert("RGB"), SIDE)
        except BadSample:
            return block
        grown = picture.resize((picture.width * 2, picture.height * 2), 0) if 2 * max(picture.size) <= SIDE else picture
        block.paste(grown, (MARGIN, 0))
    return block


def _flow(draw: Any, pieces: Sequence[Piece], *, left: int, top: int, drawn: bool = True) -> int:
    """Sets pieces one behind the other, in as many lines as they need; the last line's top."""
    x = left
    for number, piece in enumerate(pieces):
        text, font = shown(piece), _font(TEXT)
        wide = max(4, int(draw.textlength(text, font)))
        if x + wide > WIDTH - MARGIN and x > left:
            x, top = left, top + LINE
        if drawn:
            draw.rectangle((x, top, x + wide, top + LINE - 5), FILLS[piece.kind][number % 2])
            draw.text((x, top + 1), text, INK, font)
        x += wide + 1
    return top
