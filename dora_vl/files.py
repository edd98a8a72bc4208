"""Files that a user names: opened only if regular; whether a model's weights are whole; JSON."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from importlib.resources import files
from pathlib import Path
from typing import IO, Any, BinaryIO, Literal, get_args
from urllib.parse import urlsplit
from urllib.request import getproxies
from uuid import uuid4

from safetensors import SafetensorError, safe_open

from dora_vl.errors import UserError, is_communication, is_out_of_memory, one_line, short_repr

METRICS, SETS, NOT_YET = "metrics.json", "sets", "not_yet_tested"
"""A run or an evaluation writes its numbers to this file, those of its test sets under the second key, and the sets
that are still to be tested under the third."""
KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


class NoRegularFile(OSError):
    """A path leads to something other than a regular file; the message says what."""


def open_regular(path: Path) -> BinaryIO:
    """Returns the file's bytes, or raises an `OSError`; never waits for another program to open the other end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise NoRegularFile(f"it is {KINDS.get(stat.S_IFMT(mode), 'something else')}, no file")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


UNFINISHED, PREVIOUS = "unfinished", "previous"
"""The first mark in a hidden name says that it is being written, the second that a new folder replaces it."""


@contextmanager
def unfinished(path: Path, make: Callable[[Path], object] = Path.mkdir) -> Iterator[Path]:
    """Makes a hidden folder (or file) beside `path`, which goes when the block ends unless it was renamed.

    It is locked as long as this process lives, which tells it from what killed ones left; that is cleared first.
    """
    is_new = not path.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(path.parent, path.name)
    staging = path.with_name(f".{path.name}.{UNFINISHED}-{os.getpid()}-{uuid4().hex[:8]}")
    with ExitStack() as held:
        while not staging.exists():
            make(staging)
            with suppress(OSError):  # removed as a dead process's before it was locked, or no locks on this file system
                fcntl.flock(held.enter_context(_opened(staging)), fcntl.LOCK_EX)
        try:
            yield staging
        finally:
            _remove(staging)
            if is_new:
                with suppress(OSError):  # not empty
                    path.parent.rmdir()


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yields an empty folder that replaces `target`, whatever that is, when the block ends without an error."""
    with unfinished(target) as staging:
        yield staging
        replace_folder(staging, target)


def replace_folder(staging: Path, target: Path) -> None:
    """Renames a finished folder into place once it is on disk; an older one steps aside first and is removed last."""
    _sync(*(path for path in staging.rglob("*") if not path.is_symlink()), staging)
    process = staging.name.rpartition(f".{UNFINISHED}-")[2]
    previous = target.with_name(f".{target.name}.{PREVIOUS}-{process}")
    if os.path.lexists(target):
        target.rename(previous)
    staging.rename(target)
    _sync(target.parent)
    _remove(previous)


def clear_leftovers(folder: Path, name: str | None = None) -> None:
    """Removes what killed processes left in a folder, of this name or any; a folder that was set aside comes back."""
    pattern = "*" if name is None else glob.escape(name)
    for left in folder.glob(f".{pattern}.{PREVIOUS}-*"):
        hidden, _, process = left.name.rpartition(f".{PREVIOUS}-")
        if not _is_held(left.with_name(f"{hidden}.{UNFINISHED}-{process}")):
            with suppress(OSError):  # the new one is there
                left.rename(left.with_name(hidden[1:]))
            _remove(left)
    for left in folder.glob(f".{pattern}.{UNFINISHED}-*"):
        if not _is_held(left):
            _remove(left)


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Holds a lock file; `BlockingIOError` where another process holds it and `wait` is False."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _is_held(path: Path) -> bool:
    """Tells whether a living process writes there; True also on a file system without locks, where nobody can tell."""
    try:
        with _opened(path) as descriptor:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return not isinstance(error, FileNotFoundError)
    return False


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():  # what a link points to is not ours
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(*paths: Path) -> None:
    for path in paths:
        # Some file systems do not sync folders.
        with _opened(path) as descriptor, suppress(OSError) if path.is_dir() else nullcontext():
            os.fsync(descriptor)


@contextmanager
def whole_file(path: Path, *, binary: bool = False) -> Iterator[IO[Any]]:
    """Opens a file for text that gets its name only when all of it is on disk; nothing is left of one that failed.

    Several processes may write one file at a time: each has a scratch file of its own, and the last one's stays.
    """
    form = {"mode": "wb"} if binary else {"mode": "w", "encoding": "utf-8", "newline": "\n"}
    try:
        with unfinished(path, Path.touch) as staging:
            with staging.open(**form, buffering=1 << 20) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            staging.replace(path)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: cannot be written ({reason}); nothing half-written was left") from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes one JSON object, indented, as a whole file."""
    with whole_file(path) as file:
        file.write(json.dumps(dict(content), indent=2, ensure_ascii=False, default=str) + "\n")


def write_json_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Writes a JSON object per line, as a whole file."""
    with whole_file(path) as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def read_json(path: Path) -> dict[str, Any]:
    """Returns one JSON object."""
    try:
        with open_regular(path) as file:
            content = json.loads(file.read().decode("utf-8"))
    except NoRegularFile as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (ValueError, RecursionError) as error:  # no JSON, nested endlessly, or a number of thousands of digits
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not an object")
    return content


def json_or_nothing(path: Path) -> dict[str, Any]:
    """Returns a file's object; nothing where there is none, or none that can be read."""
    try:
        return read_json(path)
    except (UserError, OSError):
        return {}


def file_sha256(path: Path) -> str:
    """Returns the file's SHA-256 in hexadecimal, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


HASHED_BYTES = 1 << 16
"""This many bytes of a file's beginning and end, and its size, tell it from another picture or video."""


def content_key(path: Path) -> str:
    """Returns a hash that distinguishes pictures and videos, without reading all of a large one (`open_regular`)."""
    with open_regular(path) as file:
        size = file.seek(0, 2)
        file.seek(0)
        beginning = file.read(HASHED_BYTES)
        file.seek(max(0, size - HASHED_BYTES))
        return hashlib.sha256(b"%d " % size + beginning + file.read(HASHED_BYTES)).hexdigest()


PREFERRED = ("model.safetensors", "pytorch_model.bin")
"""A folder's weights are in one file of these names, or in shards that `NAME.index.json` lists."""
WEIGHT_SUFFIXES = (".safetensors", ".bin")
HUB_SECONDS = 3.0
HUB_ID = re.compile(r"[\w.\-]+(/[\w.\-]+)?")
NO_OWN_CODE: dict[str, Any] = {"trust_remote_code": False}
"""Each `from_pretrained` of transformers' Auto classes takes it, and then never asks whether to run a model's code."""
BRINGS_CODE = "it brings code of its own (auto_map), which is never run here; take a model that transformers itself has"
ZIP_START = b"PK"
"""torch's own files begin so since 1.6; their table is at the end."""


Kernel = Literal["sdpa", "flex_attention", "flash_attention_2", "eager"]
KERNELS: tuple[str, ...] = get_args(Kernel)


def weight_files(folder: Path) -> tuple[Path, ...]:
    """Returns the weights files that are loaded, by name; where no known name is there, all of one kind."""
    for name in PREFERRED:
        if (folder / name).is_file():
            return (folder / name,)
        if (folder / f"{name}.index.json").is_file():
            return _shards(folder / f"{name}.index.json")
    kinds = (
        [path for path in sorted(folder.iterdir()) if path.suffix == suffix and path.is_file()]
        for suffix in WEIGHT_SUFFIXES
    )
    return tuple(next((files for files in kinds if files), []))


@contextmanager
def opening(failed: str) -> Iterator[None]:
    """Turns whatever transformers raises over a model's files into one line that begins with `failed`.

    A file with a value of another type, one nested endlessly and one cut short raise nearly any kind of error, even a
    bare Exception (tokenizers); each was seen. Too little memory and another rank's end pass through, to the caller who
    can say what to do.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_out_of_memory(error) or is_communication(error):
            raise
        raise UserError(f"{failed}: {why_not_read(error)}") from error


def why_not_read(error: Exception) -> str:
    """Returns transformers' error on one line; in our words if it is about running a model's own code."""
    if "trust_remote_code" in str(error):
        return BRINGS_CODE
    speaks = isinstance(error, (OSError, ValueError, ImportError))
    return one_line(str(error) if speaks else f"{type(error).__name__}: {error}", 300)


def check_place(folder_or_id: str | Path) -> None:
    """Refuses what is not a folder here and cannot be a hub id, or is in no cache where the hub cannot be reached."""
    name = str(folder_or_id)
    if Path(name).is_dir():
        return
    missing = f"model.base {name!r}: no such folder in {Path.cwd()}"
    if name.startswith((".", "/", "~")) or not HUB_ID.fullmatch(name):
        raise UserError(f"{missing}; name a model's folder from there, or a hub id (OWNER/NAME)")
    from huggingface_hub import constants

    is_cached = (Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}").is_dir()
    if is_cached or constants.HF_HUB_OFFLINE or getproxies():
        return
    hub = urlsplit(constants.ENDPOINT)
    try:  # the hub's client would try for 40 s
        socket.create_connection((hub.hostname or "", hub.port or 443), timeout=HUB_SECONDS).close()
    except OSError as error:
        raise UserError(f"{missing}, and as a hub id it cannot be fetched: {hub.hostname}: {error}") from None


def check_model_folder(folder_or_id: str | Path, revision: str | None = None) -> None:
    """Refuses what is neither a folder nor a hub id, a folder with a truncated weights file, and unknown attention.

    A hub id's weights are left to its own cache.
    """
    check_place(folder_or_id)
    if Path(folder_or_id).is_dir():
        for path in weight_files(Path(folder_or_id)):
            check_whole(path)
    from transformers.configuration_utils import PreTrainedConfig

    config = None
    # Who opens the model says what is wrong: it is not there, no JSON, nested too deep, or no object.
    with suppress(OSError, ValueError, RecursionError, TypeError, AttributeError):
        config = PreTrainedConfig.get_config_dict(folder_or_id, revision=revision or "main")[0]
    check_attention(folder_or_id, config)


def check_attention(where: str | Path, config: object) -> None:
    """Refuses a config, or a recipe, that names an attention kernel which is none of `KERNELS`, at any depth.

    transformers runs code from the hub by such a name, `owner/kernel`.
    """
    entries: list[tuple[str, Any]] = [("", config)]
    for key, value in entries:  # the loop appends to it
        names_kernels = "attn_implementation" in key
        if isinstance(value, Mapping | list):
            inner = value.items() if isinstance(value, Mapping) else ((key, entry) for entry in value)
            entries += [(key if names_kernels else str(name), entry) for name, entry in inner]
        elif names_kernels and value not in (None, *KERNELS):
            raise UserError(f"{where}: {key} is {short_repr(value)}; there are {', '.join(KERNELS)}")


def _shards(index: Path) -> tuple[Path, ...]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        shards = tuple(index.parent / name for name in names)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{index} is not a list of shards ({error}); copy or fetch it again") from None
    if outside := [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]:
        raise UserError(f"{index} names {outside[0]!r}, which is outside its folder; no such file is read")
    if lost := [path.name for path in shards if not path.is_file()]:
        raise UserError(
            f"{index} names {len(shards)} shards, {len(lost)} are not there, first {lost[0]}; copy or fetch them"
        )
    return shards


def check_whole(path: Path) -> None:
    """Refuses a truncated file, such as an interrupted copy or download leaves; anything else passes."""
    size = path.stat().st_size
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="numpy"):
                return
        except (SafetensorError, OSError) as error:
            problem = f"its {size:,} bytes are not a whole safetensors file ({error})"
            raise UserError(f"{path}: {problem}; copy or fetch it again") from None
    if size == 0:
        raise UserError(f"{path} is empty (0 bytes); copy or fetch it again")
    with path.open("rb") as file:
        start = file.read(len(ZIP_START))
    if start == ZIP_START and not zipfile.is_zipfile(path):
        raise UserError(f"{path} is cut short: its {size:,} bytes lack the table at its end; copy or fetch it again")


def shipped_folder() -> Path:
    """Returns the folder of recipes and DeepSpeed JSON: in an installed package, beside it in a checkout."""
    package = Path(str(files("dora_vl")))
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"
