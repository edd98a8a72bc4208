"""Where an adapter comes from: the base's content, the versions that made it, and whether a folder is that base."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from dora_vl.adapters.adapter import Adapter
from dora_vl.errors import UserError
from dora_vl.model_files import weight_files

PACKAGES = ("dora-vl", "torch", "transformers", "deepspeed", "accelerate", "timm", "open_clip_torch")
CONFIG_FILE = "config.json"
_SHA256_HEX = 64


def local_folder(folder_or_id: str, revision: str | None = None) -> Path:
    """Where a model's files are: the folder itself, or a hub id's snapshot in the cache."""
    if Path(folder_or_id).is_dir():
        return Path(folder_or_id)
    config = cached_file(folder_or_id, "config.json", revision=revision or "main", local_files_only=True)
    return Path(str(config)).parent


def content_hash(folder: Path) -> str:
    """SHA-256 over a model folder's config and the weights files that are loaded, in the order of their names.

    A file in the hub's cache is a link to a blob named by its SHA-256; that name is taken instead of reading
    gigabytes again.

    Raises:
        UserError: a list of shards names one that is not there.
    """
    digest = hashlib.sha256()
    config = [folder / CONFIG_FILE] if (folder / CONFIG_FILE).is_file() else []
    for path in sorted([*config, *weight_files(folder)]):
        digest.update(f"{path.name} {file_hash(path)}\n".encode())
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    blob = path.resolve().name
    if path.is_symlink() and len(blob) == _SHA256_HEX and set(blob) <= set("0123456789abcdef"):
        return blob
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Installed versions of what a run depends on; packages that are not there are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def base_of(adapter: Adapter) -> Path:
    """The base's folder that an adapter states: a folder, or a hub id's snapshot in the local cache.

    Raises:
        UserError: it states none, or it is not on this machine.
    """
    stated = str(adapter.config.get("base_model_name_or_path") or "")
    if not stated:
        raise UserError(f"{adapter.source} does not say which base it was trained on; add --base FOLDER")

    try:
        return local_folder(stated, adapter.config.get("revision"))
    except OSError as error:
        raise UserError(f"base {stated!r} of {adapter.source} is not on this machine; add --base FOLDER") from error


def refuse_other_base(recipe: Mapping[str, Any], base: Path, source: str) -> None:
    """Raises a `UserError` where the recipe holds the base's content hash and this folder's is another."""
    stated = recipe.get("base_sha256")
    if stated is None:
        return

    found = content_hash(base)
    if found != stated:
        raise UserError(
            f"{source} was trained on another base than {base} (content hash {stated[:12]}, this one {found[:12]}); "
            "give the right --base, or --any-base if you know that its weights are the same"
        )
