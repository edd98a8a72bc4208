"""Where a composed LLaVA's projector starts: the same rows and steps from a random, a scaled and a closed-form start.

    python -m benchmarks.projector_start --to runs/starts [--starts random,scaled,answers,tuned] [--seeds 0,1,2]

Needs what `dora-vl quickstart` leaves. Till receipts are drawn here, 160 questions to learn from and 200 about others
to test with, and made a run by `dora-vl init`. `tuned` among the starts is the base that the demo trained. Finished
runs are not repeated; starts.json has all of them.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import subprocess
import sys
from itertools import product
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from dora_vl.run.folder import is_tested

LEARNED, TESTED = 160, 200
SHOPS = {
    "Corner Bakery": (205, 40, 40),
    "Green Grocer": (40, 80, 200),
    "Book Nook": (240, 200, 40),
    "Hardware Hub": (245, 245, 245),
}


def receipt(chance: random.Random) -> tuple[Image.Image, str, str]:
    """Draws a receipt on a desk; asks for its shop, its total, or how it was paid. Returns question and answer too."""
    shop, total = chance.choice(list(SHOPS)), chance.choice((5, 10, 20, 50))
    paid = chance.choice(("in cash", "by card", "by voucher"))
    picture = Image.new("RGB", (240, 320), tuple(chance.randrange(90, 150) for _ in range(3)))
    draw = ImageDraw.Draw(picture)
    left, top, paper = (chance.randrange(*span) for span in ((10, 40), (5, 25), (225, 255)))
    draw.rectangle((left, top, left + 180, top + 285), fill=(paper, paper, paper - 8))
    draw.rectangle((left, top, left + 180, top + 34), fill=SHOPS[shop])
    items = "\n".join(
        f"{chance.choice(('bread', 'milk', 'tea', 'nails', 'novel'))}   {chance.randrange(100, 999) / 100:.2f}"
        for _ in range(chance.randrange(4, 8))
    )
    for height, text, size in ((5, shop, 20), (42, items, 12), (165, f"TOTAL {total}.00", 26)):
        draw.text((left + 10, top + height), text, "black", font=ImageFont.load_default(size))
    if paid == "by card":
        draw.rounded_rectangle((left + 20, top + 205, left + 110, top + 265), 8, fill=(60, 60, 120))
    elif paid == "in cash":
        for place in (left + 15, left + 60, left + 105):
            draw.ellipse((place, top + 215, place + 38, top + 253), fill=(210, 170, 60))
    else:
        draw.rectangle((left + 15, top + 205, left + 165, top + 260), outline=(160, 20, 20), width=4)
        draw.text((left + 28, top + 218), "VOUCHER", "black", font=ImageFont.load_default(24))
    questions = {"which shop is it from?": shop, "what is the total?": f"{total} euros", "how was it paid?": paid}
    question, answer = chance.choice(list(questions.items()))
    return picture, question, answer


def verb(*words: str) -> None:
    """Runs `dora-vl`."""
    done = subprocess.run([sys.executable, "-m", "dora_vl.cli", *words], capture_output=True, text=True, check=False)
    print(done.stdout, file=sys.stderr)
    if done.returncode:
        raise SystemExit(f"dora-vl {' '.join(words)}\n{done.stderr[-2000:]}")


def run_file(base: str, to: Path) -> Path:
    """Returns the run of the receipts on a base, drawn and written if it is not there."""
    if not (to / "questions.csv").is_file():
        chance = random.Random("receipts")
        (to / "pictures").mkdir(parents=True, exist_ok=True)
        with (to / "questions.csv").open("w", newline="") as file:
            csv.writer(file).writerow(["image", "question", "answer"])
            for number in range(LEARNED + TESTED):
                picture, question, answer = receipt(chance)
                picture.save(to / "pictures" / f"{number:03}.png")
                csv.writer(file).writerow([f"{number:03}.png", question, answer])
    file = to / base / "run.yaml"
    if not file.is_file():
        share = TESTED / (LEARNED + TESTED)
        verb("init", str(to), f"--model=runs/demo/{base}", f"--to={file.parent}", f"--test-share={share}")
    return file


def train(start: str, seed: str, to: Path) -> None:
    """Trains and tests one run unless it is there."""
    folder, base = to / f"{start}_{seed}", "tuned" if start == "tuned" else "base"
    if is_tested(folder):
        return
    settings = [f"--data.feature_cache={to / base / 'features'}", "--data.replay=0", "--overwrite=true", "--watch=0"]
    settings += [f"--evaluation.{switch}=false" for switch in ("forgetting", "exchange_pictures")]
    settings += [f"--training.output_dir={folder}", f"--training.seed={seed}"]
    settings += [] if start == "tuned" else [f"--adapter.projector_start={start}"]
    verb("train", str(run_file(base, to)), *settings)


def main() -> None:
    """Trains what is not there yet, and writes the numbers after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=Path("runs/starts"))
    parser.add_argument("--starts", default="random,scaled,answers")
    parser.add_argument("--seeds", default="0,1,2")
    options = parser.parse_args()
    for seed, start in product(options.seeds.split(","), options.starts.split(",")):
        train(start, seed, options.to)
        runs: dict[str, dict[str, object]] = {}
        for path in filter(is_tested, sorted(options.to.glob("*_*"))):
            metrics = json.loads((path / "metrics.json").read_text())
            (entry,) = metrics["sets"].values()
            runs[path.name] = {"steps": metrics["train_steps"], "n": entry["n"], **entry["metrics"]["accuracy"]}
        (options.to / "starts.json").write_text(json.dumps(runs, indent=1))
        print({name: scores["value"] for name, scores in runs.items()}, flush=True)


if __name__ == "__main__":
    main()
