"""The YAML of a first run: settings by the size of the base and of the data, each with its reason beside it."""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image
from safetensors import SafetensorError, safe_open

from dora_vl.data.columns import USUAL, Columns, ColumnsError
from dora_vl.data.containers import ending_of
from dora_vl.data.data_files import (
    BESIDE_ARROW,
    NO_SAMPLES,
    WORDS,
    DataFiles,
    files_below,
    find_files,
    is_data_file,
    overlooked,
    picture_folder,
)
from dora_vl.data.pictures import MediaFolder, path_inside
from dora_vl.errors import BadSample, UserError, one_line, short_names, short_repr

DEMO_BASE, HUB_BASE = Path("runs/demo/base"), "HuggingFaceTB/SmolVLM-500M-Instruct"
"""The demo's own base comes before its tuned one: it knows more words, and a projector starts at a run's answers."""
VIDEO_BASE = Path("runs/demo/tuned")
"""Videos take this base: their outputs are not stored, so the projector must have learned before."""
STEP_SAMPLES = 16
WORDLESS = "paligemma"  # its processor takes no words without a picture
LEAST_ROWS = 100
"""Validation takes rows from sets of at least this many."""
SEEN_SAMPLES, MOST_EPOCHS = 3_200, 10
"""A small set is seen several times, until about 3,200 samples were."""


@dataclass(frozen=True, kw_only=True)
class Base:
    """Holds what a first run's settings depend on in its base.

    Attributes:
        is_new: composed here: its projector has seen few pictures or none, and needs high rates.
        parameters: about how many; 0: not known.
        takes_words: it answers without a picture too.
    """

    name: str
    is_llava: bool = False
    is_new: bool = False
    template: str | None = None
    parameters: float = 0.0
    takes_words: bool = True


@dataclass(frozen=True, kw_only=True)
class Data:
    """Holds what a first run's settings depend on in the data: its paths, the longest answer's size, and more."""

    train: str
    test: str
    root: str
    rows: int
    answer_words: int
    answer_characters: int
    usual_answer_words: float
    has_videos: bool
    validation: str | None = None
    follow_links: bool = False
    loss: str | None = None
    """Names the loss of preferences; None where answers are learned word by word."""
    base_answers: bool = False
    """The base gives most right answers already, so that preferences alone can choose among its answers."""

    @property
    def is_validated(self) -> bool:
        """Tells whether the loss is measured while training; a twentieth of few rows is too few for that."""
        return self.validation is not None or self.rows >= LEAST_ROWS


def choose_base(model: str | None) -> Base:
    """Returns the base by a folder's config, or by a hub id's name: nothing is fetched.

    Without a name it is the base that the demo composed where that is, else a small model of the hub.
    """
    name = model or (str(DEMO_BASE) if DEMO_BASE.is_dir() else HUB_BASE)
    folder = Path(name)
    if not folder.is_dir():
        if not re.fullmatch(r"[\w.\-]+/[\w.\-]+", name) or name.startswith("."):
            raise UserError(f"--model {short_repr(name)}: no such folder, and no hub id (OWNER/NAME)")
        sizes = re.findall(r"(?<![\w.])(\d+(?:\.\d+)?)(b|m)(?![a-z])", name.split("/")[-1].lower())
        parameters = max((float(number) * (1e9 if unit == "b" else 1e6) for number, unit in sizes), default=0.0)
        words = WORDLESS not in name.lower()
        return Base(name=name, is_llava="llava-1.5" in name.lower(), parameters=parameters, takes_words=words)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise UserError(f"--model {name} is an adapter's folder; name the base that it was trained on")
    from dora_vl.backbones.base import check_trained, model_type_of  # transformers: not for --help
    from dora_vl.backbones.families.formats import usual_template
    from dora_vl.backbones.families.table import LLAVA
    from dora_vl.backbones.loading import SETTINGS_FILE, load_tokenizer

    kind = model_type_of(name)
    if kind != LLAVA:
        check_trained(name, kind)
    return Base(
        name=name,
        is_llava=kind == LLAVA,
        is_new=(folder / SETTINGS_FILE).is_file(),
        template=usual_template(load_tokenizer(name)) if kind == LLAVA else None,
        parameters=_parameters_in(folder),
        takes_words=kind != WORDLESS,
    )


def _parameters_in(folder: Path) -> float:
    """Returns numbers in the folder's safetensors files, by their headers."""
    total = 0
    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(path, "numpy") as file:
                total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
        except SafetensorError:
            return 0.0  # loading it will say what is wrong
    return float(total)


def run_file_text(base: Base, data: Data, *, output_dir: str, shards: bool, commands: Sequence[str]) -> str:
    """Returns the run file's text, with the commands that write it and start its run at the head."""
    epochs = max(1, min(MOST_EPOCHS, round(SEEN_SAMPLES / data.rows)))
    is_gentle = data.loss is not None and (data.base_answers or not base.is_new)
    tokens = max(2 * data.answer_words, data.answer_characters // 3) + 8
    loader = FileSystemLoader(Path(__file__).parent, encoding="utf-8")
    environment = Environment(
        loader=loader, undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True, autoescape=False
    )
    return environment.get_template("run.yaml.j2").render(
        base=base,
        data=data,
        output_dir=output_dir,
        shards=shards,
        commands=[one_line(command, sys.maxsize) for command in commands],
        rate="5.0e-5" if is_gentle else "2.0e-4" if data.loss or not base.is_new else "1.0e-3",
        epochs=epochs,
        steps=max(1, epochs * data.rows // STEP_SAMPLES),
        step_samples=STEP_SAMPLES,
        each=STEP_SAMPLES if base.parameters < 6e8 else 4 if base.parameters < 2e9 else 2,
        new_tokens=min(512, math.ceil(tokens / 8) * 8),
        text=_text,
        read_twice=_read_twice,
    )


def _text(value: str) -> str:
    """Writes a path on one line of YAML: bare if YAML reads it as this text, else in quotes.

    A name may be a number, a date or a yes to YAML (`0x1f`, `no`), and JSON's quotes make a surrogate pair of an emoji.
    """
    if re.fullmatch(r"(?:/|[^\W\d])[\w./\-]*", value) and yaml.safe_load(value) == value:
        return value
    return yaml.safe_dump(value, default_style='"', allow_unicode=True, width=sys.maxsize).rstrip("\n")


def _read_twice(value: str) -> str:
    """Quotes a value where a list may be too: it is read once more without quotes, so `./no` is the folder no."""
    return _text(value if _text(value) == value or Path(value).is_absolute() else f"./{value}")


# -- which file of a person's folder holds the questions, and which folder the pictures' paths start from ------------

MOST_FILES, MOST_NAMES = 2_000, 200
EXAMPLE, ASK = "image,question,answer", "what is it?"


def find_questions(folder: Path, columns: Columns = USUAL) -> DataFiles:
    """Returns the one file, or folder of shards, below a folder that holds questions; else its pictures."""
    paths = list(islice(data_files(folder), MOST_FILES))
    problems = {path: _why_no_questions(path, columns) for path in paths}
    usable = [path for path, problem in problems.items() if problem is None]
    if len(usable) == 1:
        return find_files(usable[0])
    if usable:
        names = short_names(path.relative_to(folder) for path in usable)
        raise UserError(f"{folder}: {len(usable)} files hold questions, {names}; name one with --questions FILE")
    pictures = picture_folder(folder)
    unread = [problems.pop(path) for path in paths if ending_of(path) in NO_SAMPLES][:1]
    missed = overlooked(folder, pictures.fields if pictures else ())
    advice = "".join(f"{reason}; " for reason in (*unread, missed) if reason)
    asking = Columns(columns.roles, columns.ignored, ASK)
    answers = [path for path in paths if _why_no_questions(path, asking) is None]
    labelled = pictures if pictures is not None and pictures.says_what else None
    if not columns.ask and (answers or (labelled is not None and not labelled.has_texts)):
        what = answers[0] if answers else f"{folder}, a folder for each answer"
        raise UserError(f'{advice}{what}: answers without a question; say it by --ask "{ASK}"')
    if labelled is not None:
        labels = {str(fields.get("label", "")) for fields in labelled.fields.values()}
        if sum(any(label.lower() in words for label in labels) for words in WORDS.values()) > 1:
            raise UserError(
                f"{folder}: the folders {short_names(sorted(labels))} would be the answers, though some are named as "
                "splits; give the folder that holds the splits, with nothing else in it"
            )
        return labelled
    if problems:
        first, problem = next(iter(problems.items()))
        raise UserError(
            f"{advice}{folder}: none of its {len(problems)} data files holds questions with answers; {problem} "
            f"(needed: columns such as {EXAMPLE}; others are named by --columns COLUMN=ROLE,...)"
            f"{'' if len(problems) == 1 else f'; that is the first, {first.name}'}"
        )
    count, places = (0, set()) if pictures is None else (len(pictures.files), {path.parent for path in pictures.fields})
    if count > 1 and len(places) == 1 and folder not in places:
        (only,) = places
        raise UserError(
            f"{advice}{only}: all {count:,} pictures are in this folder; if its name is the answer, add a folder for "
            "each other answer: from one answer alone nothing can be learned"
        )
    raise UserError(
        f"{advice}{folder}: {count:,} pictures, and nothing says what they show: put each in a folder named by the "
        f"answer, a .txt of its name beside each, or write a questions.csv with the first line {EXAMPLE} and a line "
        "for each question (--questions FILE names one elsewhere)"
    )


def _why_no_questions(path: Path, columns: Columns) -> str | None:
    """Says why the first row of a file cannot be a sample; None if it can."""
    try:
        first = next(find_files(path).rows(), None)
    except UserError as error:
        return str(error)
    if first is None:
        return f"{path.name} is empty"
    if columns.resolve(first, strict=False).format is not None:
        return None
    try:
        columns.resolve(first)
    except ColumnsError as error:
        return f"{path.name}: {error.problem} {error.options}"
    return f"{path.name}: its columns are {short_names(first)}"


def root_of_pictures(folder: Path, questions: Path, names: Sequence[str]) -> tuple[Path, bool]:
    """Returns the folder from which most of the first names lead to files; of equals the nearest to `folder`.

    Also tells whether the names' own folders must be left out for that, as where a browser uploaded the files: then all
    of the first names lead to files there.
    """
    some = list(dict.fromkeys(names))[:MOST_NAMES]
    if not some:
        return folder, False
    beside = questions if questions.is_dir() else questions.parent
    below = {path.parent for path in islice(picture_files(folder), 50 * MOST_FILES)}
    ordered = sorted(below, key=lambda path: len(path.parts))
    above = [parent for path in ordered for parent in path.parents if parent.is_relative_to(folder)]
    roots = list(dict.fromkeys([folder, beside, *ordered, *above]))[:MOST_FILES]
    hits = Counter({root: sum(_is_there(root, name) for name in some) for root in roots})
    best = max(roots, key=lambda root: (hits[root], -roots.index(root)))
    if hits[best]:
        return best, False
    for root in roots:
        if all(_is_there(root, PurePosixPath(name).name) for name in some):
            return root, True
    raise UserError(f"{questions}: none of its pictures is below {folder}, such as {short_repr(some[0])}")


def _is_there(root: Path, name: str) -> bool:
    try:
        return path_inside(MediaFolder(root, follow_links=True), name).is_file()
    except (BadSample, OSError, ValueError):
        return False


def picture_files(folder: Path) -> Iterator[Path]:
    """Returns files below a folder whose names end as pictures' do."""
    Image.init()
    return (path for path in files_below(folder) if path.suffix.lower() in Image.EXTENSION)


def data_files(folder: Path) -> Iterator[Path]:
    """Lists data files below a folder, a folder of Parquet, Arrow or tar shards as one; also those of `NO_SAMPLES`."""
    seen: set[Path] = set()
    for path in files_below(folder):
        if not is_data_file(path) and ending_of(path) not in NO_SAMPLES:
            continue
        siblings = sum(other.suffix.lower() == path.suffix.lower() for other in path.parent.iterdir())
        is_shard = siblings > 1 or (path.parent / BESIDE_ARROW[0]).is_file()
        shard_or_folder = path.parent if ending_of(path) in (".parquet", ".arrow", ".tar") and is_shard else path
        if shard_or_folder not in seen:
            seen.add(shard_or_folder)
            yield shard_or_folder
