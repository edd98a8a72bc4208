"""Scenes of NLVR's kind (Suhr et al., 2017), drawn here, with sentences whose truth follows from the scene.

NLVR's development set has 989 human sentences, too few to teach a small model to see and to count. This gives it the
pictures to learn that from: three grey boxes, towers of blocks or scattered shapes, in NLVR's sizes and colours.

    python -m data_prep.nlvr_scenes --to runs/nlvr/scenes --scenes 6000

writes `pictures/`, records like those of `dora-vl prepare nlvr` (`towers.jsonl`: sentences that say "tower",
`boxes.jsonl`: the others; `validation.jsonl`: of other scenes) and `questions.jsonl`: what each box holds, of a tower
from its base on, and how many of something, from which seeing and counting are learned sooner. `question_talks.jsonl`
and `sentence_talks.jsonl` have a scene's questions, and as many sentences but no tower's, as one conversation each, for
a LLaVA, which sees it once for them. No sentence of NLVR's is used; a number means "exactly", as NLVR's validators
took it.
"""

from __future__ import annotations

import argparse
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from PIL import Image, ImageDraw

from dora_vl.data.example import Answer, Example, write_examples
from dora_vl.data.turns import IMAGE_PLACEHOLDER, Turn
from dora_vl.errors import exit_on_user_error, positive_int
from dora_vl.evaluation.benchmarks import BENCHMARKS

BOX, GAP, BOXES = 100, 50, 3
LIGHT, DARK = (211, 211, 211), (128, 128, 128)
COLOURS = {"yellow": (255, 255, 0), "black": (0, 0, 0), "blue": (0, 153, 255)}
SHAPES = ("square", "circle", "triangle")
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven")
SIDES = ("left", "right", "top", "bottom")
WALLS = {"edge": SIDES, "wall": SIDES, "side": SIDES, "base": ("bottom",), "bottom": ("bottom",), "top": ("top",)} | {
    f"{side} wall": (side,) for side in ("left", "right")
}
"""Maps each word for a wall to the sides of the box that it means."""
OVER = ("over", "above", "on")
ENDS = {"base": 0, "top": -1}
FORMS = {"block": "all box towers towers stacked base", "": "all box both boxes boxes colours"}
OTHERS = 20  # scenes drawn at most in search of one where a sentence's truth differs
SHARP = 4  # shapes are drawn at this multiple of their size, then shrunk, for smooth edges


@dataclass(frozen=True)
class SceneShape:
    """A shape by its upper left corner and its side, in pixels of its box."""

    shape: str
    colour: str
    x: int
    y: int
    size: int

    def touches(self, wall: str) -> bool:
        """Tells whether the shape touches a wall of its box."""
        last = BOX - self.size
        near = {"left": self.x == 0, "right": self.x == last, "top": self.y == 0, "bottom": self.y == last}
        return any(near[side] for side in WALLS[wall])


Box = Sequence[SceneShape]
Scene = Sequence[Box]
Phrase = tuple[str, Callable[[Box], int]]
"""Pairs the words for what is counted, with `{s}` for a plural's ending, with the function that counts it in a box."""


def tower(rng: random.Random) -> Box:
    """Draws one to four blocks, the lowest first."""
    return [SceneShape("square", rng.choice([*COLOURS]), 40, 80 - 21 * level, 20) for level in range(rng.randint(1, 4))]


def scattered(rng: random.Random) -> Box:
    """Draws one to seven shapes that do not overlap, a third of them at a wall."""
    items: list[SceneShape] = []
    count = rng.randint(1, 7)
    while len(items) < count:
        size = rng.choice((10, 20, 30))
        x, y = rng.randint(1, BOX - size - 1), rng.randint(1, BOX - size - 1)
        if rng.random() < 1 / 3:
            x, y = rng.choice(((0, y), (BOX - size, y), (x, 0), (x, BOX - size)))
        if all(
            abs(2 * x + size - 2 * item.x - item.size) > size + item.size
            or abs(2 * y + size - 2 * item.y - item.size) > size + item.size
            for item in items
        ):
            items.append(SceneShape(rng.choice(SHAPES), rng.choice([*COLOURS]), x, y, size))
    return items


def draw(scene: Scene) -> Image.Image:
    """Draws a scene at NLVR's size, 400 x 100 pixels."""
    picture = Image.new("RGB", (SHARP * (BOXES * BOX + (BOXES - 1) * GAP), SHARP * BOX), LIGHT)
    pen = ImageDraw.Draw(picture)
    for number, box in enumerate(scene):
        left = number * (BOX + GAP)
        pen.rectangle([SHARP * (left + BOX), 0, SHARP * (left + BOX + GAP) - 1, SHARP * BOX], fill=DARK)
        for item in box:
            x, y, size = (SHARP * value for value in (left + item.x, item.y, item.size))
            corners = (x, y, x + size - 1, y + size - 1)
            if item.shape == "triangle":
                pen.polygon([(x, corners[3]), (corners[2], corners[3]), (x + size / 2, y)], fill=COLOURS[item.colour])
            else:
                (pen.ellipse if item.shape == "circle" else pen.rectangle)(corners, fill=COLOURS[item.colour])
    return picture.resize((picture.width // SHARP, picture.height // SHARP), Image.Resampling.BOX)


def quantity(rng: random.Random) -> tuple[str, str, Callable[[int], bool]]:
    """Draws a quantity: "at least two", its plural's ending, and the numbers that it holds for."""
    number = rng.choices((0, 1, 2, 3, 4, 5), (1, 4, 4, 3, 1, 1))[0]
    word = rng.choice((NUMBERS[number], str(number))) if number else "no"
    if number == 1 and rng.random() < 0.5:
        return "a", "", lambda count: count >= 1
    kind = rng.choice(("", "exactly ", "only ", "at least ")) if number else ""
    holds = (lambda count: count >= number) if kind == "at least " else (lambda count: count == number)
    return kind + word, "" if number == 1 else "s", holds


def things(rng: random.Random, noun: str) -> Phrase:
    """Draws a phrase like "yellow square" or "square touching the wall", of some or any colour and shape."""
    colour = rng.choice(("", *COLOURS, *COLOURS))
    shape = noun or rng.choice(("item", "object", *SHAPES, *SHAPES))
    touching, near = rng.choice((("touching the", True), ("closely touching the", True), ("not touching any", False)))
    wall = rng.choice([*WALLS] if near else ("edge", "wall", "side")) if not noun and rng.random() < 0.4 else ""
    words = " ".join(filter(None, (colour, shape + "{s}", f"{touching} {wall}" if wall else "")))

    def count(box: Box) -> int:
        return sum(
            (not colour or item.colour == colour)
            and (shape not in SHAPES or item.shape == shape)
            and (not wall or item.touches(wall) == near)
            for item in box
        )

    return words, count


def stacked(rng: random.Random) -> Phrase:
    """Draws a phrase like "blue block on a black block" or "blue block as the base of a tower"."""
    colour, other = rng.choice([*COLOURS]), rng.choice([*COLOURS])
    if rng.random() < 0.5:
        end, level = rng.choice([*ENDS.items()])
        return f"{colour} block{{s}} as the {end} of a tower", lambda box: box[level].colour == colour
    words = f"{colour} block{{s}} {rng.choice(OVER)} a {other} block"
    return words, lambda box: [*pairwise(item.colour for item in box)].count((other, colour))


def towers(rng: random.Random) -> Phrase:
    """Draws a phrase like "tower with a black block at the top"; a box has one tower, so it counts 0 or 1 in each."""
    colour, other = rng.choice([*COLOURS]), rng.choice([*COLOURS])
    some, plural, holds = quantity(rng)
    forms: dict[str, Callable[[Box], bool]] = {
        f"{some} block{plural}": lambda box: holds(len(box)),
        f"{some} {colour} block{plural}": lambda box: holds(sum(item.colour == colour for item in box)),
        f"{some} block{plural} with a {colour} block at the top": lambda box: (
            holds(len(box)) and box[-1].colour == colour
        ),
        f"a {colour} block at the base": lambda box: box[0].colour == colour,
        f"a {colour} base": lambda box: box[0].colour == colour,
        f"a {colour} block at the top": lambda box: box[-1].colour == colour,
        f"a {colour} block {{over}} a {other} block": lambda box: (
            (other, colour) in pairwise(item.colour for item in box)
        ),
        "blocks of the same color": lambda box: len({item.colour for item in box}) == 1,
    }
    words, is_so = rng.choice([*forms.items()])
    first = f"tower{{s}} {rng.choice(('with', 'having'))} {words.format(over=rng.choice(OVER))}"
    return first, lambda box: int(is_so(box))


def claim(rng: random.Random, noun: str) -> tuple[str, Callable[[Scene], bool]]:
    """Draws a sentence and the test of its truth; `noun` is "block" for towers."""
    some, plural, holds = quantity(rng)
    form = rng.choice(FORMS[noun].split())
    words, count = {"towers": towers, "stacked": stacked}.get(form, lambda rng: things(rng, noun))(rng)
    first = f"{some} {words.format(s=plural)}"
    if form in ("all", "towers", "stacked"):
        return f"There {'are' if plural else 'is'} {first}", lambda scene: holds(sum(map(count, scene)))
    if form == "box":
        return f"There is a box with {first}", lambda scene: any(holds(count(box)) for box in scene)
    if form == "both":
        more, ending, also = quantity(rng)
        words, other = things(rng, noun)
        text = f"There is a box with {first} and {more} {words.format(s=ending)}"
        return text, lambda scene: any(holds(count(box)) and also(other(box)) for box in scene)
    if form == "base":
        colour, (end, level) = rng.choice([*COLOURS]), rng.choice([*ENDS.items()])
        text = f"There is a {colour} block as the {end} of a tower with {some} block{plural}"
        return text, lambda scene: any(holds(len(box)) and box[level].colour == colour for box in scene)
    if form == "colours":
        pair = set(rng.sample([*COLOURS], rng.randint(1, 2)))
        text = f"There is a box with only {' and '.join(sorted(pair))} {rng.choice(('items', 'objects'))}"
        return text, lambda scene: any({item.colour for item in box} == pair for box in scene)
    subjects = {"Each box contains": 3, "One box contains": 1, "One of the grey squares has": 1, "Two boxes contain": 2}
    subject, boxes = rng.choice([*subjects.items()])
    return f"{subject} {first}", lambda scene: sum(holds(count(box)) for box in scene) == boxes


def examples_of(number: int, count: int, seed: int) -> tuple[Scene, list[Example], list[Example]]:
    """Draws a scene, sentences and questions; the result depends only on seed and number.

    A sentence is taken if it is true of just one of this scene and another drawn for it, so the words tell nothing.
    """
    rng = random.Random(f"{seed}/{number}")
    noun = rng.choice(("block", "block", ""))
    scene, *others = ([(tower if noun else scattered)(rng) for _ in range(BOXES)] for _ in range(1 + OTHERS))

    def example(name: object, question: str, answer: str) -> Example:
        pictures = (f"pictures/{number:05d}.png",)
        return Example(id=f"{number}-{name}", images=pictures, question=question, answers=(Answer(text=answer),))

    sentences: list[Example] = []
    while len(sentences) < count:
        text, is_true = claim(rng, noun)
        if is_true(scene) != is_true(rng.choice(others)):
            text = rng.choice((text, f"{text}.", text[0].lower() + text[1:]))
            sentences.append(example(len(sentences), text, str(is_true(scene)).lower()))
    questions: list[Example] = []
    for side, box in zip(("left", "middle", "right"), scene, strict=True):
        blocks, shapes = [item.colour for item in box], sorted(f"{item.colour} {item.shape}" for item in box)
        questions.append(example(side, f"What is in the {side} box?", ", ".join(blocks if noun else shapes)))
    while len(questions) < BOXES + count // 2:
        words, count_in = towers(rng) if noun and rng.random() < 0.7 else things(rng, noun)
        counts = [count_in(box) for box in scene]
        if any(counts) or rng.random() < 1 / 4:
            text = f"How many {words.format(s='s')} are in each box?"
            questions.append(example(f"count-{len(questions)}", text, ", ".join(NUMBERS[number] for number in counts)))
    return scene, sentences, questions


def conversation(rows: Sequence[Example], seed: int, prompt: Callable[[Example], str]) -> Example:
    """Joins a scene's rows to one conversation, in an order drawn from the seed."""
    turns: list[Turn] = []
    for row in random.Random(seed).sample(rows, len(rows)):
        question = prompt(row) if turns else f"{IMAGE_PLACEHOLDER}\n{prompt(row)}"
        turns += [Turn("user", question), Turn("assistant", row.answers[0].text)]
    return Example(id=f"{seed}", images=rows[0].images, turns=tuple(turns))


@exit_on_user_error
def main() -> None:
    """Draws the scenes and writes the records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--scenes", type=positive_int, default=6000)
    parser.add_argument("--questions", type=positive_int, default=8, help="about each scene")
    parser.add_argument("--validation", type=positive_int, default=50, help="scenes held out")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    (options.to / "pictures").mkdir(parents=True, exist_ok=True)
    parts = defaultdict[str, list[Example]](list)
    for number in range(options.scenes + options.validation):
        scene, sentences, questions = examples_of(number, options.questions, options.seed)
        draw(scene).save(options.to / sentences[0].images[0])
        if number < options.scenes:
            parts["questions"] += questions
            parts["question_talks"].append(conversation(questions, number, lambda row: row.question))
            more = examples_of(number, 2 * options.questions, options.seed)[1]  # more about the same scene
            if others := [row for row in more if "tower" not in row.question][: options.questions]:
                parts["sentence_talks"].append(conversation(others, number, BENCHMARKS["nlvr"].prompt))
        for row in sentences:
            part = "validation" if number >= options.scenes else "towers" if "tower" in row.question else "boxes"
            parts[part].append(row)
    for part, examples in parts.items():
        write_examples(options.to / f"{part}.jsonl", examples)
        print(f"{options.to / part}.jsonl: {len(examples):,} records")


if __name__ == "__main__":
    main()
