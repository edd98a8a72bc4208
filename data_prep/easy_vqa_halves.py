"""easy-VQA in two halves for a VL-BART that is pretrained here and then adapted to questions of other kinds.

Run it as `python -m data_prep.easy_vqa_halves --from runs/demo/assets/easy_vqa --to runs/demo-vlbart/records`; it
writes

- `pretrain.jsonl`: yes/no questions about one half of the training pictures, balanced and with answers that say what
  is seen first (`easy_vqa`: "blue circle, absent, so no");
- `adapt.jsonl`: the other kinds, "what color" and "what shape", about the other half of the pictures;
- `validation.jsonl`, with `--validation N`: the same about N pictures of that half, which `adapt.jsonl` then lacks;
- `test.jsonl`: all of the package's test questions of those kinds;
- `manifest.json`: counts and settings.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from dora_vl.data.example import Answer, Example, write_examples
from dora_vl.errors import exit_on_user_error, positive_int
from dora_vl.files import write_json
from dora_vl.start.easy_vqa import (
    YES_NO,
    Question,
    balanced,
    kind_of,
    picture_path,
    read_questions,
    reasoned,
    seen_in_pictures,
)


def examples(questions: Sequence[Question], *, split: str, seed: int) -> list[Example]:
    """Yields one example per question, in an order shuffled by the seed."""
    samples = [
        Example(
            id=f"easyvqa-{split}-{question.index:05d}",
            images=(picture_path(split, question.picture),),
            question=question.text,
            answers=(Answer(text=question.answer),),
            extra={"kind": kind_of(question)},
        )
        for question in questions
    ]
    random.Random(f"{seed}/{split}").shuffle(samples)
    return samples


def convert(source: Path, to: Path, *, validation: int, seed: int) -> dict[str, object]:
    """Writes the files and the manifest; returns the manifest."""
    questions = read_questions(source, "train")
    pictures = sorted({question.picture for question in questions})
    random.Random(f"{seed}/halves").shuffle(pictures)
    first = set(pictures[: len(pictures) // 2])
    pretrain = [question for question in questions if question.picture in first and question.answer in YES_NO]
    held_out = set(pictures[len(pictures) - validation :])
    second = [question for question in questions if question.picture not in first and question.answer not in YES_NO]
    test = [question for question in read_questions(source, "test") if question.answer not in YES_NO]
    splits = {
        "pretrain": (reasoned(balanced(pretrain, seed), seen_in_pictures(questions)), "train"),
        "adapt": ([question for question in second if question.picture not in held_out], "train"),
        "test": (test, "test"),
    }
    if validation:
        splits["validation"] = [question for question in second if question.picture in held_out], "train"
    manifest: dict[str, object] = {"source": "easy-vqa 1.0", "seed": seed}
    for name, (subset, split) in splits.items():
        write_examples(to / f"{name}.jsonl", examples(subset, split=split, seed=seed))
        kinds = Counter(kind_of(question) for question in subset)
        manifest[name] = {"questions": len(subset), "by_kind": dict(sorted(kinds.items()))}
    write_json(to / "manifest.json", manifest)
    return manifest


@exit_on_user_error
def main(arguments: list[str] | None = None) -> None:
    """Converts the unpacked package and prints what each file holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="source", type=Path, default=Path("runs/demo/assets/easy_vqa"))
    parser.add_argument("--to", type=Path, default=Path("runs/demo-vlbart/records"))
    parser.add_argument(
        "--validation", type=positive_int, default=0, metavar="PICTURES", help="held out of the second half"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    print(json.dumps(convert(options.source, options.to, validation=options.validation, seed=options.seed), indent=1))


if __name__ == "__main__":
    main()
