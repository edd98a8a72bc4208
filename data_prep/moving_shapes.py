"""Short clips of moving coloured shapes, drawn and encoded here, with questions that only the frames can answer.

Run it as `python -m data_prep.moving_shapes --to runs/demo-video/data`. A clip shows one to four shapes, each of
another form and colour, that appear one after the other and move one way each. The same seed gives the same
clips and questions. It writes

- `clips/<split>-<number>.mp4`: H.264, 128 x 128, 10 frames a second, 3.2 s;
- `records/moving_shapes/pretrain.jsonl`: questions on `color` and `shape`, which a small model learns first;
- `records/moving_shapes/adapt.jsonl`: other clips, with all kinds: `direction`, `order`, `count` and `spoken` (a
  subtitle says which shape is meant) come to those;
- `records/moving_shapes/test.jsonl`: clips of their own, one question of each kind; the others ask about every shape;
- `records/moving_shapes_caption/`: what the clips of each split show, in words;
- `manifest.json`: counts and settings.

Questions have four choices.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import partial
from itertools import chain
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dora_vl.data.example import JSON, Answer, Clip, Example, Subtitle, iterate_examples, write_examples
from dora_vl.errors import exit_on_user_error, positive_int
from dora_vl.files import json_or_nothing, write_json

SIDE = 128
RATE = 10
FRAMES = 32
QUARTER = SIDE // 2
RADIUS = 15.0
TRAVEL = 30.0  # pixels from where a shape appears to where it is at the end
LATEST_START = 0.56  # share of the clip, so that the last shape still has time to move

COLORS = {
    "red": (222, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 80, 235),
    "yellow": (240, 215, 40),
    "white": (240, 240, 240),
    "purple": (170, 50, 200),
}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

Array = np.ndarray
Outline = Callable[[Array, Array], Array]


def _triangle(x: Array, y: Array) -> Array:
    half = math.sqrt(3) / 2
    return np.maximum(np.maximum(half * x - 0.5 * y, -half * x - 0.5 * y), y) - 0.55 * RADIUS


def _cross(x: Array, y: Array) -> Array:
    far, near = np.maximum(abs(x), abs(y)), np.minimum(abs(x), abs(y))
    return np.maximum(far - RADIUS, near - 0.33 * RADIUS)


OUTLINES: dict[str, Outline] = {
    "circle": lambda x, y: np.hypot(x, y) - RADIUS,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) - 0.85 * RADIUS,
    "triangle": _triangle,
    "cross": _cross,
}
"""Maps each shape to a function that measures how many pixels a point lies outside it; inside is negative."""

SHAPES = tuple(OUTLINES)


@dataclass(frozen=True)
class Mover:
    """A shape: its look, its direction, the quarter of the picture that it stays in, and when it appears.

    Quarters are counted row by row; the shape of `index` 0 is there from the beginning.
    """

    shape: str
    color: str
    direction: str
    quarter: int
    index: int
    of: int

    @property
    def first_frame(self) -> int:
        """Returns the first frame that shows it."""
        return round(FRAMES * LATEST_START * self.index / max(1, self.of - 1)) if self.of > 1 else 0

    def centre(self, frame: int) -> tuple[float, float]:
        """Returns its position in pixels; it passes the middle of its quarter halfway through."""
        way = TRAVEL * ((frame - self.first_frame) / (FRAMES - 1 - self.first_frame) - 0.5)
        right, down = DIRECTIONS[self.direction]
        row, column = divmod(self.quarter, 2)
        return (column + 0.5) * QUARTER + way * right, (row + 0.5) * QUARTER + way * down


def draw(shown: Sequence[Mover], frame: int, noise: Array) -> Array:
    """Draws one RGB frame."""
    pixels = np.clip(28.0 + noise, 0, 255)[..., None].repeat(3, axis=-1)
    for mover in shown:
        if frame < mover.first_frame:
            continue
        row, column = divmod(mover.quarter, 2)
        part = (slice(row * QUARTER, (row + 1) * QUARTER), slice(column * QUARTER, (column + 1) * QUARTER))
        x, y = mover.centre(frame)
        across = np.arange(column * QUARTER, (column + 1) * QUARTER) + 0.5 - x
        along = np.arange(row * QUARTER, (row + 1) * QUARTER)[:, None] + 0.5 - y
        cover = np.clip(0.5 - OUTLINES[mover.shape](across, along), 0, 1)[..., None]
        pixels[part] = pixels[part] * (1 - cover) + cover * np.array(COLORS[mover.color], dtype=float)
    return pixels.round().astype(np.uint8)


def write_clip(path: Path, shown: Sequence[Mover], *, noise: int) -> None:
    """Encodes one clip; `noise` seeds the grain."""
    import av

    grain = np.random.default_rng(noise).normal(0.0, 6.0, (SIDE, SIDE))
    with av.open(str(path), "w", format="mp4") as container:
        # One thread: the same bytes on every machine, and one clip a core anyway.
        stream = container.add_stream("libx264", rate=RATE, options={"preset": "veryfast", "crf": "20", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        stream.codec_context.time_base = Fraction(1, RATE)
        for number in range(FRAMES):
            frame = av.VideoFrame.from_ndarray(draw(shown, number, grain), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


QUESTIONS, CAPTIONS = "moving_shapes", "moving_shapes_caption"
CAPTION = "caption"
KINDS = ("color", "shape", "direction", "order", "count", "spoken")
ASKED = {
    "color": ("what color is the {shape}?", "color", tuple(COLORS)),
    "shape": ("what shape is {color}?", "shape", SHAPES),
    "direction": ("which way does the {color} shape move?", "direction", tuple(DIRECTIONS)),
    "spoken": ("what shape is the one they talk about?", "shape", SHAPES),
}
"""Maps each kind to its question, the shape's field that answers it, and all possible answers."""
NUMBERS = ("one", "two", "three", "four")
SPEAKERS = ("anna", "ben", "carla", "david")
CLIPS_A_CHUNK = 16
SPLITS = ("pretrain", "adapt", "test")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Says how many clips each split has, and the seed."""

    pretrain: int = 800
    adapt: int = 800
    test: int = 150
    seed: int = 0


@dataclass(frozen=True)
class ShapeQuestion:
    """A question, its answer, all possible answers, and the shape in question."""

    question: str
    answer: str
    possible: Sequence[str]
    about: Mover | None = None


def movers(rng: random.Random) -> list[Mover]:
    """Draws one to four shapes in order of appearance; form, colour and quarter of the picture are never repeated."""
    count = rng.randint(1, 4)
    parts = [rng.sample(tuple(values), count) for values in (SHAPES, COLORS, range(4))]
    return [
        Mover(shape, color, rng.choice(tuple(DIRECTIONS)), quarter=quarter, index=index, of=count)
        for index, (shape, color, quarter) in enumerate(zip(*parts, strict=True))
    ]


def caption(shown: Sequence[Mover]) -> str:
    """Describes the clip, e.g. "red circle left, then blue square up"."""
    return ", then ".join(f"{mover.color} {mover.shape} {mover.direction}" for mover in shown)


def questions_of(kind: str, shown: Sequence[Mover]) -> list[ShapeQuestion]:
    """Returns every question of a kind that the clip can answer."""
    if kind == "count":
        return [ShapeQuestion("how many shapes are there?", NUMBERS[len(shown) - 1], NUMBERS)]
    if kind == "order":
        ends = {"first": shown[0], "last": shown[-1]} if len(shown) > 1 else {}
        questions = {f"which color comes {position}?": mover for position, mover in ends.items()}
        return [ShapeQuestion(text, mover.color, tuple(COLORS), mover) for text, mover in questions.items()]
    text, attribute, possible = ASKED[kind]
    return [ShapeQuestion(text.format(**vars(mover)), vars(mover)[attribute], possible, mover) for mover in shown]


def four_choices(answer: str, possible: Sequence[str], shown: Sequence[Mover], rng: random.Random) -> tuple[str, ...]:
    """Returns the answer among three others. Those that the clip shows come first, so that guessing does not help."""
    seen = {value for mover in shown for value in (mover.shape, mover.color, mover.direction)}
    others = [value for value in possible if value != answer]
    rng.shuffle(others)
    others.sort(key=lambda value: value not in seen)
    choices = [answer, *others[:3]]
    rng.shuffle(choices)
    return tuple(choices)


def subtitle_of(subtitled: Mover, rng: random.Random) -> Subtitle:
    """Returns a subtitle that names a shape by its colour at some time of the clip."""
    start = round(rng.uniform(0.0, FRAMES / RATE - 1.0), 2)
    return Subtitle(f"{rng.choice(SPEAKERS)}: look at the {subtitled.color} one.", start, round(start + 1.0, 2))


def examples_of(split: str, number: int, seed: int) -> tuple[list[Mover], list[Example]]:
    """Returns what one clip shows and is asked; the result depends only on seed and number.

    Training asks about every shape, a test one question of each kind.
    """
    rng = random.Random(f"{seed}/{split}/{number}")
    shown = movers(rng)
    name = f"{split}-{number:05d}"
    clip = Clip(path=f"clips/{name}.mp4")
    captioned = Example(
        id=f"{name}-{CAPTION}",
        videos=(clip,),
        subtitles=(subtitle_of(rng.choice(shown), rng),),
        answers=(Answer(text=caption(shown)),),
        extra={"kind": CAPTION, "clip_id": name},
    )
    examples = [captioned]
    for kind in ("color", "shape") if split == "pretrain" else KINDS:
        pool = questions_of(kind, shown)
        for index, question in enumerate(rng.sample(pool, min(1, len(pool))) if split == "test" else pool):
            choices = four_choices(question.answer, question.possible, shown, rng)
            talked_about = question.about if kind == "spoken" and question.about is not None else rng.choice(shown)
            examples.append(
                Example(
                    id=f"{name}-{kind}-{index}",
                    videos=(clip,),
                    subtitles=(subtitle_of(talked_about, rng),),
                    question=question.question,
                    answers=(Answer(text=question.answer),),
                    choices=choices,
                    extra={"kind": kind, "clip_id": name, "correct": choices.index(question.answer)},
                )
            )
    return shown, examples


def draw_clip(numbered: tuple[str, int], to: Path, seed: int) -> None:
    """Draws a clip by its split and number, in a worker process."""
    split, number = numbered
    shown, examples = examples_of(split, number, seed)
    assert examples[0].video is not None
    noise = random.Random(f"{seed}/{split}/{number}/noise").getrandbits(32)
    write_clip(to / examples[0].video.path, shown, noise=noise)


def write_records(to: Path, settings: Settings) -> dict[str, JSON]:
    """Writes every split of both tasks and returns what each holds."""
    splits: dict[str, JSON] = {}
    for split in SPLITS:
        count, kinds = getattr(settings, split), Counter[str]()
        for task in (QUESTIONS, CAPTIONS):
            path = to / "records" / task / f"{split}.jsonl"
            # Questions about one clip follow each other; a training run shuffles them.
            examples = chain.from_iterable(examples_of(split, number, settings.seed)[1] for number in range(count))
            write_examples(path, (example for example in examples if bool(example.choices) == (task == QUESTIONS)))
            kinds.update(str(example.extra["kind"]) for example in iterate_examples(path))
        splits[split] = {"clips": count, "by_kind": dict(sorted(kinds.items()))}
    return splits


def make(to: Path, settings: Settings, *, workers: int) -> dict[str, JSON]:
    """Draws clips and writes records unless an earlier call did; returns the manifest."""
    manifest: dict[str, JSON] = json_or_nothing(to / "manifest.json")
    if manifest.get("settings") == asdict(settings):
        return manifest
    (to / "manifest.json").unlink(missing_ok=True)
    (to / "clips").mkdir(parents=True, exist_ok=True)
    numbered = [(split, number) for split in SPLITS for number in range(getattr(settings, split))]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        clips = pool.map(partial(draw_clip, to=to, seed=settings.seed), numbered, chunksize=CLIPS_A_CHUNK)
        deque(tqdm(clips, "drawing clips", len(numbered)), maxlen=0)
    manifest = {"settings": asdict(settings), "splits": write_records(to, settings)}
    write_json(to / "manifest.json", manifest)
    return manifest


@exit_on_user_error
def main(arguments: list[str] | None = None) -> None:
    """Makes the clips and the records, and prints what each split holds."""
    usual = Settings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, folder = parser.add_argument, Path("runs/demo-video/data")
    add("--to", type=Path, default=folder, help="folder that gets clips and records")
    for split in SPLITS:
        add(f"--{split}", type=positive_int, default=getattr(usual, split), help=f"clips of the {split} split")
    add("--seed", type=int, default=usual.seed, help="fixes every clip and every question")
    add("--workers", type=positive_int, default=os.cpu_count(), help="processes that draw")
    options = vars(parser.parse_args(arguments))
    to, workers = options.pop("to"), options.pop("workers")
    print(json.dumps(make(to, Settings(**options), workers=workers)["splits"], indent=1))


if __name__ == "__main__":
    main()
