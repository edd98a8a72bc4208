"""Receipts, drawn here, with questions that no colour alone decides, as a folder of pictures and a table of questions.

Run it as `python -m data_prep.receipts --to receipts`. A receipt has the shop's name on a band of its colour, a few
items, a total, and how it was paid; place, paper, light and what stands between differ. Each is asked one of three
questions: which shop, how paid, what total. The same seed gives the same pictures. It writes `photos/000.png`, ... and
`questions.csv` with the columns image, question, answer.
"""

from __future__ import annotations

import argparse
import csv
import random
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from dora_vl.data.example import whole_file
from dora_vl.errors import UserError, exit_on_user_error

SHOPS = {
    "Corner Cafe": (220, 140, 20),
    "City Books": (30, 60, 200),
    "Green Market": (20, 150, 50),
    "Toy House": (200, 30, 40),
}
PAYMENTS = ("cash", "card")
TOTALS = ("5.00", "10.00", "15.00", "20.00", "25.00", "30.00")
ITEMS = ("bread", "tea", "pen", "soap", "milk", "map", "cup", "cord")
QUESTIONS = ("which shop is it from?", "how was it paid?", "what is the total?")
SIDE, WIDTH = 320, 220


def draw(chance: random.Random) -> tuple[Image.Image, tuple[str, str, str]]:
    """A receipt on a table, and the answers to the three questions about it."""
    shop, paid, total = chance.choice(list(SHOPS)), chance.choice(PAYMENTS), chance.choice(TOTALS)
    picture = Image.new("RGB", (SIDE, SIDE), (chance.randrange(150, 180),) * 3)
    pen, left, top = ImageDraw.Draw(picture), chance.randrange(30, 70), chance.randrange(4, 18)
    paper, ink = (chance.randrange(225, 256),) * 3, (chance.randrange(10, 60),) * 3
    light = chance.uniform(0.85, 1.15)

    def write(text: str, down: int, size: int, fill: tuple[int, ...] = ink) -> None:
        pen.text((left + 10, top + down), text, fill=fill, font=ImageFont.load_default(size))

    pen.rectangle((left, top, left + WIDTH, top + 290), fill=paper)
    pen.rectangle((left, top, left + WIDTH, top + 84), fill=tuple(int(part * light) for part in SHOPS[shop]))
    write(shop, 24, 30, (255, 255, 255))
    for line, item in enumerate(chance.sample(ITEMS, chance.randrange(2, 5))):
        write(f"{item} {chance.randrange(1, 5)}.{chance.randrange(10, 100)}", 94 + 20 * line, 16)
    write(f"TOTAL {total}", 174, 30)
    by_card = paid == "card"
    pen.rectangle(
        (left + 6, top + 216, left + WIDTH - 6, top + 280), outline=ink, width=3, fill=ink if by_card else None
    )
    write(paid.upper(), 226, 36, paper if by_card else ink)
    return picture, (shop, paid, total)


def make(to: Path, count: int, *, seed: int) -> None:
    """Draws so many receipts and writes the questions about them."""
    if (to / "questions.csv").exists():
        raise UserError(f"{to / 'questions.csv'} is there already; name another folder with --to")
    (to / "photos").mkdir(parents=True, exist_ok=True)
    chance = random.Random(seed)
    with whole_file(to / "questions.csv") as file:
        table = csv.writer(file)
        table.writerow(["image", "question", "answer"])
        for number in range(count):
            picture, answers = draw(chance)
            picture.save(to / "photos" / f"{number:03}.png")
            asked = number % len(QUESTIONS)
            table.writerow([f"{number:03}.png", QUESTIONS[asked], answers[asked]])


@exit_on_user_error
def main(arguments: list[str] | None = None) -> None:
    """Draws the receipts and says where they are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=Path("receipts"), help="folder that gets pictures and questions")
    parser.add_argument("--count", type=int, default=200, help="receipts; each is asked one question")
    parser.add_argument("--seed", type=int, default=0, help="fixes every picture")
    options = parser.parse_args(arguments)
    make(options.to, options.count, seed=options.seed)
    print(f"{options.to}: {options.count} receipts in photos, questions.csv")


if __name__ == "__main__":
    main()
