"""A run's YAML file: found by path or by a recipe's name, with one of its named variants laid over it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jsonargparse import get_loader
from yaml import YAMLError

from dora_vl.errors import UserError, shown

ENDING = ".yaml"
VARIANTS, VARIANT = "variants", "variant"


def shipped_folder() -> Path:
    """The folder of recipes and DeepSpeed JSON: in the package where it is installed, beside it in a checkout."""
    package = Path(str(files("dora_vl")))
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def recipe_names() -> list[str]:
    """Every recipe's name, such as `llava/llava15_7b`."""
    folder = shipped_folder()
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob(f"*{ENDING}"))


def find_recipe(name: str) -> Path:
    """The file that a path or a recipe's name stands for; a file that is there comes first.

    Raises:
        UserError: neither; it lists the recipes.
    """
    if Path(name).is_file():
        return Path(name)
    shipped = shipped_folder() / f"{name.removesuffix(ENDING).removeprefix('configs/')}{ENDING}"
    if shipped.is_file():
        return shipped
    raise UserError(f"--config {shown(name, 200)}: no such file or recipe; the recipes are {', '.join(recipe_names())}")


def with_variant(names: Sequence[str], variant: str | None) -> list[str]:
    """What the parser reads for each `--config`: the file, or the text of its settings under the variant.

    Args:
        names: paths or recipes' names.
        variant: what `--variant` says; None: each file's own choice, its key `variant`, or the file as it stands.

    Raises:
        UserError: a file is not there, has not the variant, or none of them has any.
    """
    paths = [find_recipe(name) for name in names]
    resolved = [_resolved(path, variant) for path in paths]
    if variant is not None and all(one is None for one in resolved):
        where = f"{', '.join(map(str, paths))}: no variants there" if paths else "no --config FILE is given"
        raise UserError(f"--variant {shown(variant)}: {where}")
    return [str(path) if one is None else json.dumps(one) for path, one in zip(paths, resolved, strict=True)]


def variants_of(path: Path) -> list[str]:
    """Names of a file's variants."""
    return list(_read(path).get(VARIANTS) or {})


def merged(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with changes over them: mappings are merged, all else is replaced."""
    over = {
        key: merged(settings[key], value)
        if isinstance(value, Mapping) and isinstance(settings.get(key), Mapping)
        else value
        for key, value in changes.items()
    }
    return {**settings, **over}


def _read(path: Path) -> Mapping[str, Any]:
    """A file's content; empty where it is no mapping: the parser says what is wrong with it."""
    try:
        content = get_loader("yaml")(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, YAMLError):
        return {}
    return content if isinstance(content, Mapping) else {}


def _resolved(path: Path, variant: str | None) -> dict[str, Any] | None:
    """A file's settings under a variant; None where the file has no variants."""
    content = _read(path)
    if VARIANTS not in content:
        return None
    variants = content[VARIANTS]
    if not isinstance(variants, Mapping) or not all(isinstance(one, Mapping) for one in variants.values()):
        raise UserError(f"{path}: variants is not a mapping of names to settings")
    settings = {key: value for key, value in content.items() if key != VARIANTS}
    name = settings.get(VARIANT) if variant is None else variant
    if name is None:
        return settings
    if name not in variants:
        raise UserError(f"{path}: no variant {shown(name)}; there are {', '.join(map(str, variants))}")
    return {**merged(settings, variants[name]), VARIANT: name}
