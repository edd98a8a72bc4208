"""Where a composed LLaVA's projector starts: the same rows and steps from a random, a scaled and a closed-form start.

python -m benchmarks.projector_start --to runs/starts [--sets receipts,signs,lights,easy_vqa] [--starts random,answers]

Needs what `dora-vl quickstart` leaves. Sets are drawn here, 160 rows to learn from and 200 of other pictures to test
with, made a run by `dora-vl init`; easy-VQA is the demo's. Finished runs are not repeated; starts.json has all of them.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

STARTS = ("random", "scaled", "answers")
LEARNED, TESTED = 160, 200
BASE, DEMO = Path("runs/demo/base"), "llava/easyvqa_smollm2_dora"
WITHOUT = ("--evaluation.forgetting=false", "--evaluation.exchange_pictures=false", "--watch=0")
COLOURS = {"red": (205, 40, 40), "blue": (40, 80, 200), "yellow": (240, 200, 40), "white": (245, 245, 245)}
Drawn = tuple[Image.Image, str, str]


def receipt(chance: random.Random) -> Drawn:
    """Draws a till receipt on a desk; asks for its shop, its total, or how it was paid."""
    shops = {"Corner Bakery": "red", "Green Grocer": "blue", "Book Nook": "yellow", "Hardware Hub": "white"}
    shop, total = chance.choice(list(shops)), chance.choice((5, 10, 20, 50))
    paid = chance.choice(("in cash", "by card", "by voucher"))
    picture = Image.new("RGB", (240, 320), tuple(chance.randrange(90, 150) for _ in range(3)))
    draw, left, top = ImageDraw.Draw(picture), chance.randrange(10, 40), chance.randrange(5, 25)
    paper = chance.randrange(225, 255)
    draw.rectangle((left, top, left + 180, top + 285), fill=(paper, paper, paper - 8))
    draw.rectangle((left, top, left + 180, top + 34), fill=COLOURS[shops[shop]])
    write(draw, (left + 10, top + 5), shop, 20)
    for line in range(chance.randrange(4, 8)):
        name, price = chance.choice(("bread", "milk", "tea", "nails", "novel", "apples")), chance.randrange(100, 999)
        write(draw, (left + 10, top + 42 + 16 * line), f"{name}   {price / 100:.2f}", 12)
    write(draw, (left + 10, top + 165), f"TOTAL {total}.00", 26)
    if paid == "by card":
        draw.rounded_rectangle((left + 20, top + 205, left + 110, top + 265), 8, fill=(60, 60, 120))
        draw.rectangle((left + 20, top + 217, left + 110, top + 229), fill=(20, 20, 20))
    elif paid == "in cash":
        for place in range(3):
            draw.ellipse((left + 15 + 45 * place, top + 215, left + 53 + 45 * place, top + 253), fill=(210, 170, 60))
    else:
        draw.rectangle((left + 15, top + 205, left + 165, top + 260), outline=(160, 20, 20), width=4)
        write(draw, (left + 28, top + 218), "VOUCHER", 24)
    return picture, *chance.choice(
        (("which shop is it from?", shop), ("what is the total?", f"{total} euros"), ("how was it paid?", paid))
    )


def sign(chance: random.Random) -> Drawn:
    """Draws a road sign before a landscape."""
    name = chance.choice(("stop", "give way", "no entry", "parking", "limit 30", "limit 70", "roundabout", "priority"))
    picture = Image.new("RGB", (200, 200), tuple(chance.randrange(130, 220) for _ in range(3)))
    draw, size = ImageDraw.Draw(picture), chance.randrange(45, 70)
    x, y = chance.randrange(75, 125), chance.randrange(75, 105)
    draw.rectangle((0, chance.randrange(140, 175), 200, 200), fill=(80, chance.randrange(90, 140), 70))
    draw.rectangle((x - 4, y, x + 4, 200), fill=(110, 110, 110))
    circle = (x - size, y - size, x + size, y + size)
    if name == "stop":
        draw.regular_polygon((x, y, size), 8, rotation=22, fill=COLOURS["red"])
        write(draw, (x - 0.72 * size, y - 0.3 * size), "STOP", size * 0.55, "white")
    elif name == "give way":
        draw.regular_polygon((x, y, size), 3, rotation=180, fill=COLOURS["red"])
        draw.regular_polygon((x, y, size * 0.6), 3, rotation=180, fill="white")
    elif name == "no entry":
        draw.ellipse(circle, fill=COLOURS["red"])
        draw.rectangle((x - 0.7 * size, y - 0.18 * size, x + 0.7 * size, y + 0.18 * size), fill="white")
    elif name == "parking":
        draw.rectangle(circle, fill=COLOURS["blue"])
        write(draw, (x - 0.4 * size, y - 0.8 * size), "P", size * 1.4, "white")
    elif name == "roundabout":
        draw.ellipse(circle, fill=COLOURS["blue"])
        for turn in (0, 120, 240):
            draw.arc((x - 0.6 * size, y - 0.6 * size, x + 0.6 * size, y + 0.6 * size), turn, turn + 85, "white", 8)
    elif name == "priority":
        draw.regular_polygon((x, y, size), 4, rotation=45, fill="white")
        draw.regular_polygon((x, y, size * 0.8), 4, rotation=45, fill=COLOURS["yellow"])
    else:
        draw.ellipse(circle, fill=COLOURS["red"])
        draw.ellipse((x - 0.8 * size, y - 0.8 * size, x + 0.8 * size, y + 0.8 * size), fill="white")
        write(draw, (x - 0.55 * size, y - 0.6 * size), name[-2:], size)
    return picture, "what does the sign say?", name


def light(chance: random.Random) -> Drawn:
    """Draws a traffic light, as docs/your_pictures.md does."""
    lights = {"red": (230, 40, 30), "yellow": (240, 200, 40), "green": (40, 190, 80)}
    shown = chance.choice(list(lights))
    picture = Image.new("RGB", (160, 160), tuple(chance.randrange(120, 230) for _ in range(3)))
    draw, left, size = ImageDraw.Draw(picture), chance.randrange(40, 70), chance.randrange(36, 44)
    draw.rectangle((left, 8, left + size + 12, 3 * size + 26), fill=(35, 35, 35))
    for place, (name, colour) in enumerate(lights.items()):
        top = 12 + place * (size + 4)
        draw.ellipse((left + 6, top, left + 6 + size, top + size), fill=colour if name == shown else (70, 70, 70))
    return picture, "which light is on?", f"the {shown} one"


def write(draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, size: float, fill: str = "black") -> None:
    """Writes a text."""
    draw.text(place, text, fill, font=ImageFont.load_default(size))


SETS: dict[str, Callable[[random.Random], Drawn]] = {"receipts": receipt, "signs": sign, "lights": light}


def draw_set(name: str, folder: Path, rows: int = LEARNED + TESTED) -> None:
    """Draws a set's pictures and writes its questions."""
    chance = random.Random(name)
    (folder / "pictures").mkdir(parents=True)
    with (folder / "questions.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "question", "answer"])
        for number in range(rows):
            picture, question, answer = SETS[name](chance)
            picture.save(folder / "pictures" / f"{number:03}.png")
            table.writerow([f"{number:03}.png", question, answer])


def verb(*words: str) -> str:
    """Runs `dora-vl` and returns what it prints."""
    done = subprocess.run([sys.executable, "-m", "dora_vl.cli", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"dora-vl {' '.join(words)}\n{done.stderr[-2000:]}")
    return done.stdout


def main() -> None:
    """Trains what is not there yet, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=Path("runs/starts"))
    parser.add_argument("--sets", default="receipts,signs,lights,easy_vqa")
    parser.add_argument("--starts", default=",".join(STARTS), help="of these, and tuned: from runs/demo/tuned")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", default="", help="default: what init writes; of easy-VQA 40 steps")
    options = parser.parse_args()
    for seed in range(options.seeds):
        for name in options.sets.split(","):
            for start in options.starts.split(","):
                train_one(name, start, seed, options.to, options.epochs)
                table(options.to)


def train_one(name: str, start: str, seed: int, to: Path, epochs: str) -> None:
    """Trains and tests one run unless it is there."""
    folder = to / f"{name}{'_' + epochs if epochs else ''}" / f"{start}_{seed}"
    if (folder / "metrics.json").is_file():
        return
    base = BASE.with_name("tuned") if start == "tuned" else BASE
    if name == "easy_vqa":
        settings = [DEMO, "--training.max_steps=40", "--training.eval_strategy=no", "--evaluation.limit=400"]
    else:
        settings = [str(to / name / base.name / "run.yaml"), f"--data.feature_cache={to / name / 'features'}"]
        if not (to / name / "questions.csv").is_file():
            draw_set(name, to / name)
        if not Path(settings[0]).is_file():
            share = f"{TESTED / (LEARNED + TESTED)}"
            print(
                verb(
                    "init",
                    str(to / name),
                    "--model",
                    str(base),
                    "--to",
                    str(to / name / base.name),
                    "--test-share",
                    share,
                )
            )
        settings += [f"--training.num_train_epochs={epochs}"] if epochs else []
    settings += [f"--training.output_dir={folder}", f"--training.seed={seed}", "--training.save_strategy=no", *WITHOUT]
    settings += [] if start == "tuned" else [f"--adapter.projector_start={start}"]
    verb("train", *settings, "--overwrite=true")


def table(to: Path) -> None:
    """Writes starts.json: the runs of each set and start, and their mean."""
    runs: dict[str, dict[str, list[dict[str, float]]]] = {}
    for path in sorted(to.glob("*/*_*/metrics.json")):
        (entry,) = json.loads(path.read_text())["sets"].values()
        start = path.parent.name.rpartition("_")[0]
        steps = json.loads(path.read_text())["train_steps"]
        accuracy = entry["metrics"][entry["headline"]]
        number = {
            "accuracy": accuracy["value"],
            "interval_95": accuracy["interval_95"],
            "n": entry["n"],
            "steps": steps,
        }
        runs.setdefault(path.parent.parent.name, {}).setdefault(start, []).append(number)
    means = {
        name: {start: round(math.fsum(run["accuracy"] for run in each) / len(each), 1) for start, each in of.items()}
        for name, of in runs.items()
    }
    (to / "starts.json").write_text(json.dumps({"means": means, "runs": runs}, indent=1))
    print(json.dumps(means), flush=True)


if __name__ == "__main__":
    main()
