"""LLaMA-Factory's names of data sets, looked up in its `dataset_info.json`, as files that training reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dora_vl.data.media import PICTURE_KEYS
from dora_vl.data.readers.messages import ANSWERS, QUESTIONS
from dora_vl.data.turns import VIDEO_KEYS
from dora_vl.errors import UserError, shown_names
from dora_vl.translation.rules import Asked, Found, words

INFO = "dataset_info.json"
TALKS: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("from", "value"): ("conversations",),
    ("role", "content"): ("messages", "conversations"),
}
"""Where a row may hold its turns, by what the turns call the speaker and the words."""
INSTRUCTIONS: Mapping[str, str] = {"prompt": "instruction", "query": "input", "response": "output"}
"""The columns that are read as an instruction, its input and the output: all by these names, or none."""
PAIRS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = ((QUESTIONS, ANSWERS), (("prompt",), ("completion",)))
"""Other names of a question and its answer; beside them no `input` is read."""


@dataclass(frozen=True)
class _Set:
    """One data set: where it is, and what of it has no counterpart."""

    path: str
    trouble: str = ""


def dataset(asked: Asked) -> Found:
    """`dataset`: one file, or several with weights."""
    return _files(asked, "data.train")


def eval_dataset(asked: Asked) -> Found:
    """`eval_dataset`: one file."""
    found = _files(asked, "data.validation")
    if isinstance(found.settings.get("data.validation"), list):
        return Found(note="one file of validation samples; put them together", is_lost=True)
    return found


def media_folder(asked: Asked) -> Found:
    """`media_dir`: where pictures' paths start; by default where `dataset_info.json` lies."""
    return Found(settings={"data.image_folder": asked.value or _folder(asked)})


def _folder(asked: Asked) -> str:
    return str(asked.settings.get("dataset_dir") or "data")


def _files(asked: Asked, name: str) -> Found:
    names = words(asked)
    info = _read_info(asked)
    if info is None:
        where = f"{_folder(asked)}/{INFO}"
        return Found(note=f"{where}, which says what file that is, is not there; put the file here", is_lost=True)
    if unknown := [one for one in names if one not in info]:
        raise UserError(f"{asked.file}: {asked.key} names {unknown[0]}, which {INFO} has not: {shown_names(info)}")
    sets = [_set(info[one], _folder(asked)) for one in names]
    trouble = [f"{one}: {found.trouble}" for one, found in zip(names, sets, strict=True) if found.trouble]
    if without := [one for one, found in zip(names, sets, strict=True) if not found.path]:
        return Found(note="; ".join(trouble) or f"{without[0]} is no file", is_lost=True)
    paths = [one.path for one in sets]
    return Found(
        settings={name: paths[0] if len(paths) == 1 else paths}, note="; ".join(trouble), is_lost=bool(trouble)
    )


def _read_info(asked: Asked) -> Mapping[str, Any] | None:
    folder = Path(_folder(asked))
    tried = (folder, asked.file.parent / folder, *(above / folder for above in asked.file.resolve().parents[:4]))
    path = next((one / INFO for one in tried if (one / INFO).is_file()), None)
    if path is None:
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: no object of data sets")
    return content


def _set(entry: Any, folder: str) -> _Set:
    if not isinstance(entry, Mapping):
        return _Set("", "its entry is no object")
    if entry.get("ranking"):
        return _Set("", "pairs of a better and a worse answer are no samples")
    if name := entry.get("file_name"):
        path = str(Path(folder) / str(name))
    elif name := entry.get("hf_hub_url"):
        split = str(entry.get("split") or "train")
        path = f"hub:{name}" if split == "train" else f"hub:{name}:{split}"
    else:
        return _Set("", "it is loaded by a script, or from another hub; put its rows into a file")
    return _Set(path, "; ".join(_trouble(entry)))


def _trouble(entry: Mapping[str, Any]) -> list[str]:
    """What our readers, which go by a row's own keys, would not find."""
    columns = entry.get("columns") or {}
    tags = entry.get("tags") or {}
    found = [f"num_samples {entry['num_samples']}: data.limit"] if entry.get("num_samples") else []
    found += [f"subset {entry['subset']}: `dora-vl prepare hugging-face` takes one"] if entry.get("subset") else []
    if entry.get("formatting", "alpaca") == "alpaca":
        found += _question_trouble(columns)
        wanted: dict[str, tuple[str, ...]] = {}
    else:
        names = (tags.get("role_tag", "from"), tags.get("content_tag", "value"))
        wanted = {"messages": TALKS.get(names, ("messages",))}
        if names not in TALKS:
            found.append("its turns' keys: rename them to from and value, or role and content")
    known = {"images": PICTURE_KEYS, "videos": VIDEO_KEYS, "system": ("system",)}
    wanted |= {name: keys for name, keys in known.items() if columns.get(name)}
    for name, keys in wanted.items():
        if (column := columns.get(name) or keys[0]) not in keys:
            found.append(f"rename its column {column} to {keys[0]}")
    found += [f"its column {columns[name]} is not read" for name in ("tools", "audios", "history") if columns.get(name)]
    return found


def _question_trouble(columns: Mapping[str, Any]) -> list[str]:
    """Which of the columns of a question, its input and its answer are not read by their names."""
    said = {
        name: str(columns.get(name) or own) for name, own in INSTRUCTIONS.items() if columns.get(name) or not columns
    }
    asked, answer = said.get("prompt", "instruction"), said.get("response", "output")
    renamed = [(column, INSTRUCTIONS[name]) for name, column in said.items() if column != INSTRUCTIONS[name]]
    if not any(asked in questions and answer in answers for questions, answers in PAIRS):
        return [f"rename its column {column} to {name}" for column, name in renamed]
    if "query" not in said:
        return []
    whole = ", ".join(f"{column} to {name}" for column, name in renamed)
    return [f"its column {said['query']} is not read beside {asked} and {answer}: rename {whole}"]
