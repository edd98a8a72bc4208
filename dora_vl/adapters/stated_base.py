"""Which base an adapter says it was trained on, and whether a folder is that base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dora_vl.adapters.adapter import Adapter
from dora_vl.errors import UserError


def base_of(adapter: Adapter) -> Path:
    """The base's folder that an adapter states: a folder, or a hub id's snapshot in the local cache.

    Raises:
        UserError: it states none, or it is not on this machine.
    """
    stated = str(adapter.config.get("base_model_name_or_path") or "")
    if not stated:
        raise UserError(f"{adapter.source} does not say which base it was trained on; add --base FOLDER")
    from dora_vl.adapters.provenance import local_folder

    try:
        return local_folder(stated, adapter.config.get("revision"))
    except OSError as error:
        raise UserError(f"base {stated!r} of {adapter.source} is not on this machine; add --base FOLDER") from error


def refuse_other_base(recipe: Mapping[str, Any], base: Path, source: str) -> None:
    """Raises a `UserError` where the recipe holds the base's content hash and this folder's is another."""
    stated = recipe.get("base_sha256")
    if stated is None:
        return
    from dora_vl.adapters.provenance import content_hash

    found = content_hash(base)
    if found != stated:
        raise UserError(
            f"{source} was trained on another base than {base} (content hash {stated[:12]}, this one {found[:12]}); "
            "give the right --base, or --any-base if you know that its weights are the same"
        )
