"""easy-VQA (V. Zhou, 2020; MIT): questions about one coloured shape, turned into LLaVA's training JSON.

Run it as `python -m data_prep.easy_vqa --from runs/demo/assets/easy_vqa --to runs/demo/data`. It writes

- `train.json`: multi-round conversations, several questions of one picture in each, as in LLaVA-1.5's mix;
- `validation.json`: pictures held out from the package's training pictures, one question a sample;
- `test.json`: the package's own test questions, one a sample, in a shuffled order, so that the first n are
  a fair sample of all; each has its `kind`;
- `manifest.json`: counts, settings and the sha256 of each file.

Picture paths are relative to the `--from` folder, which stays the run's image folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dora_vl.errors import UserError, exit_on_user_error

Record = dict[str, object]

YES_NO = frozenset({"yes", "no"})
NEGATIONS = frozenset({"no", "not"})
PLACEHOLDER = "<image>"


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question of the package, at its place in the package's list."""

    index: int
    text: str
    answer: str
    picture: int


def read_answers(folder: Path) -> frozenset[str]:
    """The package's list of all possible answers (13 of them)."""
    path = folder / "answers.txt"
    if not path.is_file():
        raise UserError(
            f"{path} is missing; fetch the package: python -m data_prep.demo_assets --to {folder.parent}"
        )
    return frozenset(path.read_text(encoding="utf-8").split())


def read_questions(folder: Path, split: str, answers: frozenset[str]) -> list[Question]:
    """The questions of one of the package's splits, in its own order.

    Raises:
        UserError: the file is missing or not a list of [text, answer, picture], an answer is not in the
            package's list, or a picture is missing; it names the question's index or the picture.
    """
    path = folder / split / "questions.json"
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        questions = [
            Question(index=index, text=text, answer=answer, picture=picture)
            for index, (text, answer, picture) in enumerate(rows)
        ]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{path}: not easy-VQA's list of [question, answer, picture number] ({error})"
        ) from error
    check_questions(folder, split, questions, answers)
    return questions


def check_questions(folder: Path, split: str, questions: list[Question], answers: frozenset[str]) -> None:
    """Refuses a split with an answer outside the package's list or with a picture missing."""
    for question in questions:
        if question.answer not in answers:
            raise UserError(
                f"{split}: question {question.index}: answer {question.answer!r} is not in answers.txt"
            )
    pictures = sorted({question.picture for question in questions})
    missing = [number for number in pictures if not (folder / picture_path(split, number)).is_file()]
    if missing:
        first = picture_path(split, missing[0])
        raise UserError(f"{folder}: {len(missing)} of {len(pictures)} pictures are missing, first {first}")


def picture_path(split: str, number: int) -> str:
    """A picture's path relative to the package's data folder."""
    return f"{split}/images/{number}.png"


def kind_of(question: Question) -> str:
    """What is asked for: "color", "shape", "yes/no", or "yes/no negated" ("is no blue shape present?")."""
    words = set(question.text.rstrip("?").split())
    if question.answer in YES_NO:
        return "yes/no negated" if words & NEGATIONS else "yes/no"
    return "color" if "color" in words else "shape"


def hold_out(
    questions: Sequence[Question], pictures: int, seed: int
) -> tuple[list[Question], list[Question]]:
    """Splits off every question of `pictures` randomly chosen pictures: (the rest, the held out).

    Raises:
        UserError: nothing would be left to train on.
    """
    numbers = sorted({question.picture for question in questions})
    if not 0 <= pictures < len(numbers):
        raise UserError(
            f"--validation-pictures is {pictures}; at least one of the {len(numbers)} must be left"
        )
    held = set(random.Random(f"{seed}/validation").sample(numbers, pictures))
    rest = [question for question in questions if question.picture not in held]
    return rest, [question for question in questions if question.picture in held]


def conversation(questions: Sequence[Question]) -> list[dict[str, str]]:
    """The rounds in LLaVA's form; the picture's placeholder stands in the first turn."""
    turns: list[dict[str, str]] = []
    for number, question in enumerate(questions):
        text = f"{PLACEHOLDER}\n{question.text}" if number == 0 else question.text
        turns += [{"from": "human", "value": text}, {"from": "gpt", "value": question.answer}]
    return turns


def rounds_of(questions: Sequence[Question], *, most: int, order: random.Random) -> list[list[Question]]:
    """Shuffles one picture's questions and cuts them into groups of nearly equal size, at most `most` each.

    The order matters: a round can be guessed from the rounds before it ("is it blue? no"), so every kind of
    question has to come first, with only the picture to go by, equally often.
    """
    shuffled = list(questions)
    order.shuffle(shuffled)
    groups = -(-len(shuffled) // most)
    return [shuffled[start::groups] for start in range(groups)]


def training_records(questions: Sequence[Question], *, rounds: int, seed: int) -> list[Record]:
    """Conversations of up to `rounds` rounds, each about one picture; randomness by (seed, picture)."""
    by_picture: dict[int, list[Question]] = defaultdict(list)
    for question in questions:
        by_picture[question.picture].append(question)
    records: list[Record] = []
    for number in sorted(by_picture):
        groups = rounds_of(by_picture[number], most=rounds, order=random.Random(f"{seed}/{number}"))
        for part, group in enumerate(groups):
            name = f"easyvqa-train-{number:04d}-{part}"
            records.append(
                {"id": name, "image": picture_path("train", number), "conversations": conversation(group)}
            )
    return records


def single_records(questions: Iterable[Question], *, name: str, split: str, seed: int) -> list[Record]:
    """One question a record, with its kind, in an order shuffled by the seed."""
    records: list[Record] = [
        {
            "id": f"easyvqa-{name}-{question.index:05d}",
            "image": picture_path(split, question.picture),
            "kind": kind_of(question),
            "conversations": conversation([question]),
        }
        for question in questions
    ]
    random.Random(f"{seed}/{name}").shuffle(records)
    return records


def write_whole(path: Path, text: str) -> None:
    """Writes under a temporary name, then renames, so that a file under its own name is a whole one."""
    scratch = path.with_name(f".{path.name}.part")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


def write_split(path: Path, records: Sequence[Record], questions: Sequence[Question]) -> Record:
    """Writes one split, a record a line inside one JSON list; returns its entry in the manifest."""
    text = "[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n"
    write_whole(path, text)
    return {
        "samples": len(records),
        "questions": len(questions),
        "pictures": len({question.picture for question in questions}),
        "questions_by_kind": dict(sorted(Counter(kind_of(question) for question in questions).items())),
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
    }


def convert(source: Path, to: Path, *, validation_pictures: int, rounds: int, seed: int) -> Record:
    """Writes the three splits and the manifest into `to`; returns the manifest.

    Raises:
        UserError: the package's files are missing or broken, or a setting leaves nothing to train on.
    """
    if rounds < 1:
        raise UserError(f"--rounds is {rounds}; a conversation needs at least 1 round")
    answers = read_answers(source)
    train, validation = hold_out(read_questions(source, "train", answers), validation_pictures, seed)
    test = read_questions(source, "test", answers)
    to.mkdir(parents=True, exist_ok=True)
    held = single_records(validation, name="validation", split="train", seed=seed)
    splits = {
        "train": write_split(to / "train.json", training_records(train, rounds=rounds, seed=seed), train),
        "validation": write_split(to / "validation.json", held, validation),
        "test": write_split(
            to / "test.json", single_records(test, name="test", split="test", seed=seed), test
        ),
    }
    settings = {"validation_pictures": validation_pictures, "rounds": rounds, "seed": seed}
    manifest: Record = {
        "source": "easy-vqa 1.0",
        "answers": sorted(answers),
        "settings": settings,
        "splits": splits,
    }
    write_whole(to / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    return manifest


@exit_on_user_error
def main(arguments: list[str] | None = None) -> None:
    """Converts the unpacked package and prints what each split holds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        default=Path("runs/demo/assets/easy_vqa"),
        help="the package's data folder",
    )
    parser.add_argument(
        "--to", type=Path, default=Path("runs/demo/data"), help="folder that gets the JSON files"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=5,
        help="most rounds in a training conversation; 1: one question a sample",
    )
    parser.add_argument(
        "--validation-pictures", type=int, default=25, help="training pictures held out for validation"
    )
    parser.add_argument("--seed", type=int, default=0, help="fixes the held-out pictures and every order")
    given = parser.parse_args(arguments)
    manifest = convert(
        given.source,
        given.to,
        validation_pictures=given.validation_pictures,
        rounds=given.rounds,
        seed=given.seed,
    )
    print(json.dumps(manifest["splits"], indent=1))


if __name__ == "__main__":
    main()
