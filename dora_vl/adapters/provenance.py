"""Where an adapter comes from: the base's content, and the versions that made it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from pathlib import Path

from transformers.utils import cached_file

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
        digest.update(f"{path.name} {_file_hash(path)}\n".encode())
    return digest.hexdigest()


def _file_hash(path: Path) -> str:
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
