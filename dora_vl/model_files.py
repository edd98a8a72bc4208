"""Which files of a model's folder are loaded, in transformers' order of preference."""

from __future__ import annotations

import json
from pathlib import Path

from dora_vl.core.weight_file import check_whole
from dora_vl.errors import UserError

PREFERRED = ("model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors")
"""The one weights file of a folder; with `.index.json` behind the name, what lists the shards."""
WEIGHT_SUFFIXES = (".safetensors", ".bin")


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The weights files that are loaded, by name; where no known name is there, all of one kind.

    Raises:
        UserError: the list of shards is broken, or names one that is not there or outside the folder.
    """
    for name in PREFERRED:
        if (folder / name).is_file():
            return (folder / name,)
        if (folder / f"{name}.index.json").is_file():
            return _shards(folder / f"{name}.index.json")
    kinds = ([path for path in sorted(folder.iterdir()) if path.suffix == suffix] for suffix in WEIGHT_SUFFIXES)
    return tuple(next((found for found in kinds if found), []))


def check_model_folder(folder_or_id: str | Path) -> None:
    """Refuses a folder one of whose weights files was cut; a hub id is left to its own cache.

    Raises:
        UserError: it names the file and the sizes.
    """
    if Path(folder_or_id).is_dir():
        for path in weight_files(Path(folder_or_id)):
            check_whole(path)


def _shards(index: Path) -> tuple[Path, ...]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        shards = tuple(index.parent / name for name in names)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{index} is no list of shards ({error}); copy or fetch it again") from None
    if outside := [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]:
        raise UserError(f"{index} names {outside[0]!r}, which is outside its folder; no such file is read")
    if lost := [path.name for path in shards if not path.is_file()]:
        raise UserError(
            f"{index} names {len(shards)} shards, {len(lost)} are not there, first {lost[0]}; copy or fetch them"
        )
    return shards
