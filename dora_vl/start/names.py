"""Things with names, as four artists drew them (emoji): three to learn from, the fourth to be asked about.

`convert` writes pictures, and as LLaVA's JSON

- `train.json`: pictures of three artists, each with two questions, what it is and of which kind, in either order;
- `test.json`: both questions about each of the fourth artist's, one per sample, whose `kind` is `name` or `category`;
- `manifest.json`: the settings that it was made by.

The artists' sets are Iconify's: `icons.json` has an SVG of each, `chars.json` which character it draws.
"""

from __future__ import annotations

import io
import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from dora_vl.errors import needs_extra
from dora_vl.files import json_or_nothing, read_json, whole_folder, write_json
from dora_vl.start.easy_vqa import conversation

ARTISTS, UNSEEN = ("noto", "fluent_emoji_flat", "openmoji"), "twemoji"
"""Runs learn from the first artists' asset folders, and not from the last one's."""
NAME, CATEGORY = "what is this?", "what kind of thing is it?"
VARIANTS = 2
SIDE, LARGEST = 160, 0.92
"""A picture's side has this many pixels, and a thing takes at most this share of it."""
NOUNS = Path(__file__).with_name("names.json")
"""Maps a category to its things: each is the character that is drawn and its name, with _ for a space."""
BACKGROUNDS = ("white", "#ebf0fa", "#faebe1", "#e1f5e1", "#f0f0c8", "#c8d7eb", "#e1e1e1", "#fff0f5")


def things() -> Iterator[tuple[str, str, str]]:
    """Yields each thing's code point as Iconify writes it, its name and its category."""
    for category, named in read_json(NOUNS).items():
        for thing in named:
            yield f"{ord(thing[0]):x}", thing[1:].replace("_", " "), category


def drawings(source: Path) -> dict[str, Image.Image]:
    """Draws an artist's things, each cut to what is drawn: code point -> picture with transparency."""
    with needs_extra("names", "drawing SVG"):
        from resvg_py import svg_to_bytes
    icons, characters = read_json(source / "icons.json"), read_json(source / "chars.json")
    pictures: dict[str, Image.Image] = {}
    for code, *_ in things():
        icon = icons["icons"][characters[code]]
        width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
        png = svg_to_bytes(svg_string=svg, width=2 * SIDE, skip_system_fonts=True)
        picture = Image.open(io.BytesIO(png)).convert("RGBA")
        pictures[code] = picture.crop(picture.getbbox(alpha_only=True))
    return pictures


def placed(thing: Image.Image, rng: random.Random | None) -> Image.Image:
    """Places a thing on white, filling the picture; with `rng` perhaps mirrored, of a random size, place and colour."""
    side = round(SIDE * (LARGEST if rng is None else rng.uniform(0.55, LARGEST)))
    thing = ImageOps.contain(thing, (side, side), Image.Resampling.BICUBIC)
    left, top = ((SIDE - length) // 2 for length in thing.size)
    colour = BACKGROUNDS[0]
    if rng is not None:
        thing = ImageOps.mirror(thing) if rng.random() < 0.5 else thing
        left, top = (rng.randint(0, SIDE - length) for length in thing.size)
        colour = rng.choice(BACKGROUNDS)
    picture = Image.new("RGBA", (SIDE, SIDE), colour)
    picture.alpha_composite(thing, (left, top))
    return picture.convert("RGB")


def convert(source: Path, to: Path, *, seed: int = 0) -> None:
    """Makes the folder `to` from the artists' folders in `source`, unless it exists with the same settings.

    Each artist that is learned from has `VARIANTS` of a thing, the first one plain. The seed fixes all else.
    """
    receipts = {name: json_or_nothing(source / name / "source.json").get("sha256") for name in (*ARTISTS, UNSEEN)}
    settings = {"artists": receipts, "unseen": UNSEEN, "variants": VARIANTS, "seed": seed, "side": SIDE}
    if json_or_nothing(to / "manifest.json") == settings:
        return
    rng, train, test = random.Random(seed), list[dict[str, Any]](), list[dict[str, Any]]()
    with whole_folder(to) as folder:
        (folder / "pictures").mkdir()
        for artist in (*ARTISTS, UNSEEN):
            pictures = drawings(source / artist)
            for (code, name, category), variant in itertools.product(things(), range(VARIANTS)):
                key, pairs = f"{artist}-{name.replace(' ', '_')}-{variant}", [(NAME, name), (CATEGORY, category)]
                row = {"id": key, "image": f"pictures/{key}.png"}
                if artist in ARTISTS:
                    train.append({**row, "conversations": conversation(rng.sample(pairs, 2))})
                elif variant == 0:
                    for kind, pair in zip(("name", "category"), pairs, strict=True):
                        test.append({**row, "id": f"{key}-{kind}", "kind": kind, "conversations": conversation([pair])})
                else:
                    continue
                placed(pictures[code], rng if variant else None).save(folder / row["image"])
        for split, rows in (("train", train), ("test", test)):
            rng.shuffle(rows)
            (folder / f"{split}.json").write_text(json.dumps(rows, indent=0), encoding="utf-8")
        write_json(folder / "manifest.json", settings)
