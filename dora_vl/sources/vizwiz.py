"""VizWiz-VQA (Gurari et al., 2018): questions that blind people asked about their own photographs, ten answers each.

Files, from vizwiz.org/tasks-and-datasets/vqa: `Annotations.zip` with `{train,val,test}.json` (20,523 / 4,319 /
8,000), and the pictures in `train.zip`, `val.zip`, `test.zip`. Licence: CC BY 4.0. Pictures:
`train/VizWiz_train_00000000.jpg` and so on.

Quirks: there is no question id; the picture's name is one, for each picture has one question. Test has no answers;
the server takes [{image, answer}]. "unanswerable" is an answer, "unsuitable image" too. LLaVA-1.5 appends "When the
provided information is insufficient, respond with 'Unanswerable'." to the question: that belongs to its prompt, not
to the record.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from dora_vl.data.examples import Example
from dora_vl.sources.fields import filled, identifier, kept
from dora_vl.sources.joins import people_answers, soft_answers
from dora_vl.sources.published import Raw, Split, json_rows, present, some_present

FILES = {"train": ("train.json", 20_523), "validation": ("val.json", 4_319), "test": ("test.json", 8_000)}


def splits(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """The splits whose annotations are there, in `folder` or in `folder/Annotations`."""
    names = [file for file, _ in FILES.values()]
    found = present(folder / "Annotations", names) or some_present(folder, names)
    for name, (file, size) in FILES.items():
        if file in found:
            yield Split(
                task="vizwiz",
                name=name,
                inputs=(found[file],),
                rows=partial(json_rows, found[file]),
                convert=partial(convert, pictures=Path(file).stem, answered=name != "test"),
                published_rows=size,
            )


def convert(raw: Raw, *, pictures: str, answered: bool) -> Example:
    """One question; `pictures` is the folder of its picture, `answered` that its answers must be there."""
    image = identifier(raw, "image")
    answers = people_answers(raw, "answers", image) if answered else []
    return Example(
        id=image,
        images=(f"{pictures}/{image}",),
        question=filled(raw, "question", image),
        answers=soft_answers(answers),
        extra=({"human_answers": answers} if answers else {}) | kept(raw, "answer_type", "answerable", sample_id=image),
    )
