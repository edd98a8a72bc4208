"""The YAML of a first run: settings by the size of the base and of the data, each with its reason beside it."""

from __future__ import annotations

import json
import math
import re
import struct
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import yaml
from PIL import Image

from dora_vl.backbones.families import LLAVA, check_trained, model_type_of
from dora_vl.backbones.loading import SETTINGS_FILE as MADE_HERE
from dora_vl.data.columns import USUAL, Columns
from dora_vl.data.containers import BESIDE_ARROW, JSON_ENDINGS, READERS, ending_of, find_files
from dora_vl.data.pictures import MediaFolder, path_inside
from dora_vl.errors import BadSample, UserError, one_line, shown, shown_names

DEMO_BASE, HUB_BASE = Path("runs/demo/tuned"), "HuggingFaceTB/SmolVLM-500M-Instruct"
"""What the demo leaves has a projector that has learned; its own base's is random, and 200 rows do not teach one."""
_HUB_ID = re.compile(r"[\w.\-]+/[\w.\-]+")
_SIZE = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)(b|m)(?![a-z])", re.IGNORECASE)
LARGE, MIDDLE = 2e9, 6e8
"""Parameters from which activations are computed again, and from which batches are small."""
STEP_SAMPLES = 16
LEAST_VALIDATED = 100
"""Of fewer rows a twentieth would be too few to measure anything."""
SEEN_SAMPLES, MOST_EPOCHS = 3_200, 10
"""A small set is seen several times, until about so many samples have been."""


@dataclass(frozen=True, kw_only=True)
class Base:
    """What a first run needs to know of its base."""

    name: str
    is_llava: bool = False
    is_new: bool = False
    """Composed here: its projector has seen few pictures or none, and needs high rates."""
    template: str | None = None
    parameters: float = 0.0
    """About so many; 0: not known."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """What it needs to know of the data; paths as they are written into the file."""

    train: str
    test: str
    root: str
    rows: int
    answer_words: int
    """Of the longest answer."""
    answer_characters: int
    usual_answer_words: float
    has_videos: bool
    follow_links: bool = False


def base_of(model: str | None) -> Base:
    """The base by a folder's config, or by a hub id's name: nothing is fetched.

    Args:
        model: None is what the demo trained where it is, else a small model of the hub.

    Raises:
        UserError: no such folder and no hub id, or a model that cannot be trained here.
    """
    name = model or (str(DEMO_BASE) if DEMO_BASE.is_dir() else HUB_BASE)
    folder = Path(name)
    if not folder.is_dir():
        if not _HUB_ID.fullmatch(name) or name.startswith("."):
            raise UserError(f"--model {shown(name)}: no such folder, and no hub id (OWNER/NAME)")
        return Base(name=name, is_llava="llava-1.5" in name.lower(), parameters=_parameters_said(name))
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise UserError(f"--model {name} is an adapter's folder; name the base that it was trained on")
    kind = model_type_of(name)
    if kind != LLAVA:
        check_trained(name, kind)
    is_llava = kind == LLAVA
    return Base(
        name=name,
        is_llava=is_llava,
        is_new=(folder / MADE_HERE).is_file(),
        template=_template_of(name) if is_llava else None,
        parameters=_parameters_in(folder),
    )


def _template_of(name: str) -> str:
    """The prompt format that the tokenizer has the tokens of."""
    from dora_vl.backbones.loading import load_tokenizer
    from dora_vl.backbones.prompts import get_template

    return get_template(None, load_tokenizer(name)).name


def _parameters_in(folder: Path) -> float:
    """Numbers in the folder's safetensors files, by their headers."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            try:
                header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
                total += sum(math.prod(one["shape"]) for name, one in header.items() if name != "__metadata__")
            except (struct.error, ValueError, KeyError, TypeError, MemoryError, OverflowError):
                return 0.0  # loading it will say what is wrong
    return float(total)


def _parameters_said(name: str) -> float:
    """As a hub id's name says it, such as 2B in Qwen/Qwen2-VL-2B-Instruct."""
    found = [
        float(number) * (1e9 if unit.lower() == "b" else 1e6) for number, unit in _SIZE.findall(name.split("/")[-1])
    ]
    return max(found, default=0.0)


def written(base: Base, data: Data, *, output_dir: str, on_gpu: bool, command: str) -> str:
    """The file's text.

    Args:
        command: what starts it, for its second line.
    """
    lines = [
        "# Written by `dora-vl init`; every line may be changed. docs/training.md explains them, --help all others.",
        f"#   {one_line(command, sys.maxsize)}",
        "",
        *_model(base),
        *_adapter(base),
        *_data(base, data),
        *_training(base, data, output_dir, on_gpu=on_gpu),
        *_evaluation(data),
    ]
    return "\n".join(lines) + "\n"


def _model(base: Base) -> list[str]:
    lines = ["model:", f"  base: {_text(base.name)}"]
    if base.template is not None:
        lines.append(
            f"  template: {base.template:<17} # how questions and answers are put into words; fits its tokenizer"
        )
    return [*lines, ""]


def _adapter(base: Base) -> list[str]:
    return [
        "adapter:",
        "  method: dora                # or lora, magnitude, full",
        "  rank: 16                    # higher for long answers and much data, lower to save memory",
        "  alpha: 32.0                 # the change is scaled by alpha / rank",
        f"  dropout: {0.0 if base.is_new else 0.05}",
        *(
            ["  train_projector: true       # this base was composed here: its projector has seen little"]
            if base.is_new
            else []
        ),
        "",
    ]


def _data(base: Base, data: Data) -> list[str]:
    lines = [
        "data:",
        f"  train: {_read_twice(data.train)}",
        f"  image_folder: {_text(data.root)}   # where the pictures' paths start",
    ]
    if data.follow_links:
        lines.append("  follow_links: true          # some of them are links out of that folder")
    if data.rows >= LEAST_VALIDATED:
        lines.append(
            "  validation_share: 0.05      # of the training rows, whole pictures: their loss is measured each epoch"
        )
    if base.is_llava and not data.has_videos:
        lines += ["  cache_features: true        # the frozen vision tower sees each picture once", "  workers: 0"]
    else:
        lines.append("  workers: 2                  # processes that read pictures")
    return [*lines, ""]


def _training(base: Base, data: Data, output_dir: str, *, on_gpu: bool) -> list[str]:
    each = STEP_SAMPLES if base.parameters < MIDDLE else 4 if base.parameters < LARGE else 2
    epochs = max(1, min(MOST_EPOCHS, round(SEEN_SAMPLES / data.rows)))
    steps = max(1, epochs * data.rows // STEP_SAMPLES)
    rate, projector = ("1.0e-3", "1.0e-3") if base.is_new else ("2.0e-4", "2.0e-5")
    lines = []
    if base.is_llava:
        lines += ["optim:", f"  projector_learning_rate: {projector}", ""]
    lines += [
        "training:",
        f"  output_dir: {_read_twice(output_dir)}",
        f"  num_train_epochs: {epochs:<9} # {data.rows:,} rows: about {steps:,} steps",
        f"  per_device_train_batch_size: {each}   # keep the product of these two, and of the GPUs",
        f"  gradient_accumulation_steps: {STEP_SAMPLES // each}",
        f"  learning_rate: {rate}       # halve it if the loss jumps",
        "  lr_scheduler_type: cosine",
        "  warmup_steps: 0.05          # below 1: a share of all steps",
        f"  logging_steps: {max(1, steps // 50)}",
        "  save_strategy: epoch",
        "  save_total_limit: 1",
        "  seed: 0",
    ]
    if base.parameters >= LARGE:
        lines.append("  gradient_checkpointing: true   # less memory, a third more time")
    if on_gpu:
        lines.append("  deepspeed: zero2            # zero3 where the base does not fit on one GPU")
    return [*lines, ""]


def _evaluation(data: Data) -> list[str]:
    tokens = max(2 * data.answer_words, data.answer_characters // 3) + 8
    lines = ["evaluation:", f"  file: {_text(data.test)}"]
    if data.usual_answer_words > 3:
        lines.append(
            "  # An answer counts as right where it is the true one, word by word: strict for long answers. Look into"
        )
        lines.append("  # predictions.jsonl as well.")
    return [*lines, f"  max_new_tokens: {min(512, math.ceil(tokens / 8) * 8)}"]


def _text(value: str) -> str:
    """A path as YAML takes it in one line: bare where it is read as this text, else in quotes.

    A name may be a number, a date or a yes to YAML (`0x1f`, `no`), and JSON's quotes write an emoji as two halves.
    """
    if _reads_as_itself(value):
        return value
    return yaml.safe_dump(value, default_style='"', allow_unicode=True, width=sys.maxsize).rstrip("\n")


def _reads_as_itself(value: str) -> bool:
    return re.fullmatch(r"(?:/|[^\W\d])[\w./\-]*", value) is not None and yaml.safe_load(value) == value


def _read_twice(value: str) -> str:
    """The same where a list or anything may stand: it is read once more without quotes. `./no` is the folder no."""
    return _text(value if _reads_as_itself(value) or Path(value).is_absolute() else f"./{value}")


# Which file of a person's folder holds the questions, and which folder the pictures' paths start from.


MANIFESTS = ("manifest.json", *BESIDE_ARROW)
SHARDED = (".parquet", ".arrow", ".tar")
"""Of these, several files in one folder are one set."""
MOST_FILES, MOST_NAMES = 2_000, 200
EXAMPLE = "image,question,answer"
RUN_FILE = "run.yaml"
"""What `dora-vl init` writes: a folder that holds one is a run's."""


def find_questions(folder: Path, columns: Columns = USUAL) -> Path:
    """The one file, or folder of shards, below a folder whose rows are questions or captions.

    Raises:
        UserError: there is none (it says what one looks like), or there are several.
    """
    tried: dict[Path, str] = {}
    found: list[Path] = []
    for path in islice(_data_files(folder), MOST_FILES):
        problem = why_no_questions(path, columns)
        if problem is None:
            found.append(path)
        else:
            tried[path] = problem
    if len(found) == 1:
        return found[0]
    if found:
        names = shown_names(path.relative_to(folder) for path in found)
        raise UserError(f"{folder}: {len(found)} files hold questions, {names}; name one with --questions FILE")
    if tried:
        first, problem = next(iter(tried.items()))
        raise UserError(
            f"{folder}: none of its {len(tried)} data files holds questions; {problem} (columns such as {EXAMPLE}, "
            f"or a format of docs/data.md){'' if len(tried) == 1 else f'; that is the first, {first.name}'}"
        )
    pictures = sum(1 for _ in islice(picture_files(folder), MOST_FILES))
    raise UserError(
        f"{folder}: {pictures:,} pictures and no file of questions ({', '.join([*JSON_ENDINGS, *READERS])}); write a "
        f"questions.csv with the first line {EXAMPLE} and a line for each question, or name a file with --questions"
    )


def why_no_questions(path: Path, columns: Columns = USUAL) -> str | None:
    """Why the first row of a file cannot be a sample; None where it can."""
    try:
        first = next(find_files(path).rows(), None)
    except UserError as error:
        return str(error)
    if first is None:
        return f"{path.name} is empty"
    return (
        None
        if columns.resolve(first, strict=False).format is not None
        else f"{path.name}: its columns are {shown_names(first)}"
    )


def root_of_pictures(folder: Path, questions: Path, names: Sequence[str]) -> Path:
    """The folder from which most of the first names lead to files; of equals the nearest to `folder`.

    Args:
        names: of pictures and videos, as rows have them.

    Raises:
        UserError: from no folder does any of them.
    """
    some = list(dict.fromkeys(names))[:MOST_NAMES]
    if not some:
        return folder
    beside = questions if questions.is_dir() else questions.parent
    below = sorted(
        {path.parent for path in islice(picture_files(folder), 50 * MOST_FILES)}, key=lambda one: len(one.parts)
    )
    above = [parent for one in below for parent in one.parents if parent.is_relative_to(folder)]
    roots = list(dict.fromkeys([folder, beside, *below, *above]))[:MOST_FILES]
    hits = Counter({root: sum(_is_there(root, name) for name in some) for root in roots})
    best, count = max(hits.items(), key=lambda pair: (pair[1], -roots.index(pair[0])))
    if not count:
        raise UserError(
            f"{questions}: not one of its first {len(some)} pictures is below {folder}, such as {shown(some[0])}; "
            "give the folder that holds them, or correct the paths"
        )
    return best


def picture_files(folder: Path) -> Iterator[Path]:
    """Files below a folder whose names end as pictures' do."""
    Image.init()
    endings = frozenset(Image.EXTENSION)
    return (path for path in _files_below(folder) if path.suffix.lower() in endings)


def _data_files(folder: Path) -> Iterator[Path]:
    """Data files below a folder, a folder of shards as one."""
    seen: set[Path] = set()
    for path in _files_below(folder):
        ending = ending_of(path)
        if path.name in MANIFESTS or ending not in (*JSON_ENDINGS, *READERS):
            continue
        whole = _shards(path) if ending in SHARDED else path
        if whole not in seen:
            seen.add(whole)
            yield whole


def _shards(path: Path) -> Path:
    """The folder of a shard, where others of its kind are beside it; else the file."""
    siblings = sum(one.suffix.lower() == path.suffix.lower() for one in path.parent.iterdir())
    return path.parent if siblings > 1 or (path.parent / BESIDE_ARROW[0]).is_file() else path


def _files_below(folder: Path) -> Iterable[Path]:
    """Files in order, those of hidden folders and of runs left out."""
    found = sorted(folder.rglob("*"))
    runs = {path.parent for path in found if path.name == RUN_FILE}
    for path in found:
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden and runs.isdisjoint(path.parents):
            yield path


def _is_there(root: Path, name: str) -> bool:
    try:
        return path_inside(MediaFolder(root, follow_links=True), name).is_file()
    except (BadSample, OSError, ValueError):
        return False
