"""Compares starts of a composed LLaVA's projector, random, scaled and closed-form, over the same rows and steps.

python -m benchmarks.projector_start --to runs/starts [--sets receipts,signs,lights] [--times 2]

Needs what `dora-vl quickstart` leaves, for names also what `dora-vl quickstart --names` does. Receipts, signs and
traffic lights are drawn here, 160 rows for training and 200 about other pictures for the test, and `dora-vl init` makes
the run; easy-VQA is the demo's, with 40 steps, and names are those of the demo that names things, with 120 steps.
`--times` multiplies the steps. `tuned` among the starts is the base that the demo trained. Finished runs are not
repeated. Intervals are over seeds, where there are three, and questions.
"""

from __future__ import annotations

import argparse
import csv
import random
import subprocess
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from benchmarks.report import table
from dora_vl.evaluation.results import read_scores
from dora_vl.files import read_json
from dora_vl.report.contrasts import Contenders, Estimate
from dora_vl.run.folder import METRICS, is_tested

LEARNED, TESTED = 160, 200
DEMO = "llava/easyvqa_smollm2_dora"
STEPS = {"easy_vqa": 40, "names": 120}
"""A demo's data takes this many steps at `--times 1`; drawn sets take the steps that init writes."""
DRAWN_STEPS = 100
RED, BLUE, YELLOW, WHITE = (205, 40, 40), (40, 80, 200), (240, 200, 40), (245, 245, 245)
SHOPS = {"Corner Bakery": RED, "Green Grocer": BLUE, "Book Nook": YELLOW, "Hardware Hub": WHITE}
SIGNS = {"stop": (8, 22, RED, "STOP"), "no entry": (40, 0, RED, "-"), "parking": (4, 0, BLUE, "P")}
SIGNS |= {"limit 30": (40, 0, WHITE, "30"), "limit 70": (40, 0, WHITE, "70"), "priority": (4, 45, YELLOW, "")}
SIGNS |= {"give way": (3, 180, WHITE, ""), "bus lane": (40, 0, BLUE, "BUS")}
"""Corners, turn in degrees, colour and text."""
DrawnSample = tuple[Image.Image, str, str]


def draw_receipt(rng: random.Random) -> DrawnSample:
    """Draws a till receipt on a desk, and a question about its shop, its total, or how it was paid."""
    shop, total = rng.choice(list(SHOPS)), rng.choice((5, 10, 20, 50))
    paid = rng.choice(("in cash", "by card", "by voucher"))
    picture = Image.new("RGB", (240, 320), tuple(rng.randrange(90, 150) for _ in range(3)))
    draw = ImageDraw.Draw(picture)
    left = rng.randrange(10, 40)
    top = rng.randrange(5, 25)
    paper = rng.randrange(225, 255)
    draw.rectangle((left, top, left + 180, top + 285), fill=(paper, paper, paper - 8))
    draw.rectangle((left, top, left + 180, top + 34), fill=SHOPS[shop])
    items = "\n".join(
        f"{rng.choice(('bread', 'milk', 'tea', 'nails', 'novel'))}   {rng.randrange(100, 999) / 100:.2f}"
        for _ in range(rng.randrange(4, 8))
    )
    for height, text, size in ((5, shop, 20), (42, items, 12), (165, f"TOTAL {total}.00", 26)):
        draw.text((left + 10, top + height), text, "black", font=ImageFont.load_default(size))
    if paid == "by card":
        draw.rounded_rectangle((left + 20, top + 205, left + 110, top + 265), 8, fill=(60, 60, 120))
    elif paid == "in cash":
        for x in (left + 15, left + 60, left + 105):
            draw.ellipse((x, top + 215, x + 38, top + 253), fill=(210, 170, 60))
    else:
        draw.rectangle((left + 15, top + 205, left + 165, top + 260), outline=(160, 20, 20), width=4)
        draw.text((left + 28, top + 218), "VOUCHER", "black", font=ImageFont.load_default(24))
    questions = {"which shop is it from?": shop, "what is the total?": f"{total} euros", "how was it paid?": paid}
    question, answer = rng.choice(list(questions.items()))
    return picture, question, answer


def draw_sign(rng: random.Random) -> DrawnSample:
    """Draws a road sign before a landscape."""
    name = rng.choice(list(SIGNS))
    corners, turn, colour, text = SIGNS[name]
    picture = Image.new("RGB", (200, 200), tuple(rng.randrange(130, 220) for _ in range(3)))
    draw = ImageDraw.Draw(picture)
    size = rng.randrange(45, 70)
    x, y = rng.randrange(75, 125), rng.randrange(75, 105)
    draw.rectangle((0, rng.randrange(140, 175), 200, 200), fill=(80, rng.randrange(90, 140), 70))
    draw.rectangle((x - 4, y, x + 4, 200), fill=(110, 110, 110))
    draw.regular_polygon((x, y, size), corners, rotation=turn, fill=RED if colour == WHITE else colour)
    draw.regular_polygon((x, y, 0.75 * size), corners, rotation=turn, fill=colour)
    text_colour = "black" if colour == WHITE else "white"
    draw.text((x, y), text, text_colour, font=ImageFont.load_default(size * 1.2 / max(2, len(text))), anchor="mm")
    return picture, "what does the sign say?", name


def draw_light(rng: random.Random) -> DrawnSample:
    """Draws a traffic light in a street, and a question about its lamp, or what to do."""
    lit_lamp = rng.randrange(3)
    picture = Image.new("RGB", (200, 260), tuple(rng.randrange(110, 210) for _ in range(3)))
    draw, x, y = ImageDraw.Draw(picture), rng.randrange(50, 150), rng.randrange(15, 60)
    for _ in range(3):  # houses, whose colours are random
        left, top = rng.randrange(-20, 180), rng.randrange(60, 160)
        draw.rectangle((left, top, left + 60, 220), fill=tuple(rng.randrange(60, 200) for _ in range(3)))
    draw.rectangle((0, 220, 200, 260), fill=(85, 85, 90))
    draw.rectangle((x - 4, y, x + 4, 240), fill=(60, 60, 60))
    draw.rounded_rectangle((x - 22, y, x + 22, y + 120), 8, fill=(25, 25, 25))
    for lamp, colour in enumerate((RED, (250, 160, 20), (40, 190, 80))):
        shade = colour if lamp == lit_lamp else tuple(part // 4 for part in colour)
        draw.circle((x, y + 22 + 38 * lamp), 15, fill=shade)
    questions = {
        "which light is on?": ("red", "amber", "green")[lit_lamp],
        "what should I do?": ("stop", "get ready to stop", "go")[lit_lamp],
    }
    question, answer = rng.choice(list(questions.items()))
    return picture, question, answer


SETS = {"receipts": draw_receipt, "signs": draw_sign, "lights": draw_light}


def run_dora_vl(*words: str) -> None:
    """Runs `dora-vl`."""
    result = subprocess.run([sys.executable, "-m", "dora_vl.cli", *words], capture_output=True, text=True, check=False)
    print(result.stdout, file=sys.stderr)
    if result.returncode:
        raise SystemExit(f"dora-vl {' '.join(words)}\n{result.stderr[-2000:]}")


def run_file(name: str, base: str, to: Path) -> str:
    """Returns the run of a set on a base, drawn and written if it is not there."""
    folder = to / name
    if not (folder / "questions.csv").is_file():
        rng = random.Random(name)
        (folder / "pictures").mkdir(parents=True, exist_ok=True)
        with (folder / "questions.csv").open("w", newline="") as file:
            csv.writer(file).writerow(["image", "question", "answer"])
            for number in range(LEARNED + TESTED):
                picture, question, answer = SETS[name](rng)
                picture.save(folder / "pictures" / f"{number:03}.png")
                csv.writer(file).writerow([f"{number:03}.png", question, answer])
    if not (folder / base / "run.yaml").is_file():
        share = str(TESTED / (LEARNED + TESTED))
        run_dora_vl("init", str(folder), f"--model=runs/demo/{base}", f"--to={folder / base}", f"--test-share={share}")
    return str(folder / base / "run.yaml")


def train(name: str, start: str, seed: int, times: int, to: Path) -> None:
    """Trains and tests one run unless it is there."""
    base = "tuned" if start == "tuned" else "base"
    folder = to / (name if times == 1 else f"{name}_x{times}") / f"{start}_{seed}"
    if is_tested(folder):
        return
    steps = f"--training.max_steps={STEPS.get(name, DRAWN_STEPS) * times}"
    if name in SETS:
        settings = [
            run_file(name, base, to),
            f"--data.feature_cache={to / name / base / 'features'}",
            "--data.replay=0",
        ]
        settings += [steps] if times > 1 else []
    elif name == "names":
        settings = [DEMO, "--variant=names", steps, f"--data.feature_cache={to / 'names_features'}"]
    else:
        settings = [DEMO, steps, "--training.eval_strategy=no", "--evaluation.limit=400"]
    settings += [f"--evaluation.{switch}=false" for switch in ("forgetting", "exchange_pictures")]
    settings += [] if start == "tuned" else [f"--adapter.projector_start={start}"]
    run_dora_vl(
        "train",
        *settings,
        f"--training.output_dir={folder}",
        f"--training.seed={seed}",
        "--overwrite=true",
        "--watch=0",
    )


def summary(to: Path) -> str:
    """Lays out each set's accuracy by start, the mean over seeds, and its gain over the random start."""
    lines: list[list[object]] = []
    for name in sorted({path.parent.name for path in to.glob("*/*_*") if is_tested(path)}):
        folders = [path for path in sorted((to / name).glob("*_*")) if is_tested(path)]
        starts = dict.fromkeys(path.name.rpartition("_")[0] for path in folders)
        runs = {start: [path for path in folders if path.name.rpartition("_")[0] == start] for start in starts}
        compared = Contenders({start: [read_scores(path) for path in paths] for start, paths in runs.items()})
        for start, paths in runs.items():
            accuracy, gain = compared.score(compared.measures[0], start), ""
            if start != "random" and "random" in runs:
                gain = format_estimate(compared.difference(compared.measures[0], start, "random"), "+.1f")
            steps = read_json(paths[0] / METRICS)["train_steps"]
            lines.append([name, f"`{start}`", len(paths), steps, format_estimate(accuracy, ".1f"), gain])
    return table(["set", "start", "seeds", "steps", "accuracy", "gain over `random`"], lines)


def format_estimate(estimate: Estimate, form: str) -> str:
    """Writes a value with its interval."""
    return f"{estimate.value:{form}}" + (f" ({limits})" if (limits := estimate.interval()) else "")


def main() -> None:
    """Trains what is not there yet, and prints the table after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--to", type=Path, default=Path("runs/starts"), help="folder of the runs; default: runs/starts")
    add("--sets", default="receipts,signs,lights,easy_vqa,names", help="sets to train on, by comma; default: all five")
    add("--starts", default="random,scaled,answers", help="starts to compare, by comma, perhaps with tuned")
    add("--seeds", default="0,1,2", help="seeds, by comma; default: 0,1,2")
    add("--times", type=int, default=1, help="multiplies the steps")
    options = parser.parse_args()
    for seed in options.seeds.split(","):
        for name in options.sets.split(","):
            for start in options.starts.split(","):
                train(name, start, int(seed), options.times, options.to)
                print(summary(options.to), flush=True)


if __name__ == "__main__":
    main()
