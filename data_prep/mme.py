"""MME (Fu et al., 2023): two yes/no questions for each picture, 14 subtasks, 2,374 questions.

Files: `MME_Benchmark_release_version.zip`, given by its authors on request
(github.com/BradyFU/Awesome-Multimodal-Large- Language-Models). Licence: for research. Layout: a folder a subtask.
Five (artwork, celebrity, landmark, posters, scene) have `images/*.jpg` and `questions_answers_YN/*.txt`; in the
others pictures and texts lie side by side. A text has two lines, "question<TAB>Yes" and "question<TAB>No".

Quirks: questions end in "Please answer yes or no." already; a subtask's score is accuracy + accuracy+ (both of a
picture right), so at most 200; perception has 10 subtasks, cognition 4. Some releases hold stray files: only .txt
are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from data_prep.fields import filled, given, text
from data_prep.published import WANTED, Progress, Raw, Split
from dora_vl.data.examples import Answer, Example
from dora_vl.data.text_file import NotUtf8, whole_text
from dora_vl.errors import BadSample, UserError, shown

COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
QUESTIONS, PICTURES = "questions_answers_YN", "images"
ENDINGS = (".jpg", ".png", ".jpeg", ".JPG", ".PNG")


def splits(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """The one test split, of `folder` or of the release's folder in it."""
    root = next(
        (
            place
            for place in (folder, folder / "MME_Benchmark_release_version", folder / "MME_Benchmark")
            if _texts(place)
        ),
        None,
    )
    if root is None:
        raise UserError(
            f"{folder}: none of the subtasks' folders ({', '.join(PERCEPTION[:3])}, ...) with .txt is in it"
        )
    yield Split(
        task="mme",
        name="test",
        inputs=tuple(_texts(root)),
        rows=partial(_rows, root),
        convert=convert,
        published_rows=1_187,
        notes={"rows": "one a picture, each of two questions", "pictures": f"paths are relative to {root.name}"},
    )


def _texts(root: Path) -> list[Path]:
    found: list[Path] = []
    for category in (*PERCEPTION, *COGNITION):
        split = root / category / QUESTIONS
        found += sorted((split if split.is_dir() else root / category).glob("*.txt"))
    return found


def _rows(root: Path, progress: Progress) -> Iterator[Raw]:
    for path in _texts(root):
        progress(path.stat().st_size)
        apart = path.parent.name == QUESTIONS
        folder = path.parent.parent / PICTURES if apart else path.parent
        picture = next(
            (folder / f"{path.stem}{end}" for end in ENDINGS if (folder / f"{path.stem}{end}").is_file()), None
        )
        yield {
            "category": (path.parent.parent if apart else path.parent).name,
            "name": path.stem,
            "image": None if picture is None else picture.relative_to(root).as_posix(),
            "text": _content(path),
        }


def _content(path: Path) -> str | None:
    """The text, None where it is not UTF-8."""
    try:
        return whole_text(path, WANTED)
    except NotUtf8:
        return None


def convert(raw: Raw) -> list[Example]:
    """The two questions of one picture."""
    category = text(raw, "category")
    name = f"{category}/{text(raw, 'name')}"
    if given(raw, "image") is None:
        raise BadSample(name, "its picture is missing")
    if given(raw, "text") is None:
        raise BadSample(name, "its text is not UTF-8")
    lines = [line for line in text(raw, "text", name).splitlines() if line.strip()]
    pairs = [line.rsplit("\t", 1) for line in lines]
    if len(pairs) != 2 or any(len(pair) != 2 for pair in pairs):
        raise BadSample(name, f"it must have two lines of question, tab, answer; it has {len(lines)} lines")
    return [
        _example(filled(raw, "image"), category, number, question.strip(), answer.strip())
        for number, (question, answer) in enumerate(pairs, 1)
    ]


def _example(image: str, category: str, number: int, question: str, answer: str) -> Example:
    sample_id = f"{image}#{number}"
    if answer not in {"Yes", "No"}:
        raise BadSample(sample_id, f"question {number}'s answer is {shown(answer)}, which is neither Yes nor No")
    if not question:
        raise BadSample(sample_id, f"question {number} is empty")
    return Example(
        id=sample_id,
        images=(image,),
        question=question,
        answers=(Answer(text=answer),),
        extra={"category": category},
    )
