"""`dora-vl doctor`: what this machine has for a run: versions, devices, disk space, extras and how to install them."""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from dora_vl import __version__
from dora_vl.errors import MissingExtra

DESCRIPTION = """\
Says which versions are installed, on which devices a run would train, how much memory and disk there is, where files
can be written, and which extras are missing, with the command that installs each. Asks nobody on the network. Exit
status 1 when something is missing that every run needs.

  dora-vl doctor
"""
SHOWN_FIRST = ("torch", "transformers", "deepspeed", "accelerate", "datasets", "timm", "open_clip_torch")

PROGRAMS = {
    "java": "caption scores take the official tokenizer",
    "ninja": "the operations of a step on a CPU are compiled",
    "g++": "training.deepspeed zero3_offload",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`dora-vl doctor` has no options."""
    parser.description = DESCRIPTION
    parser.set_defaults(work=run)


def run(arguments: argparse.Namespace) -> Iterator[str]:
    """Yields the lines to print; ends with status 1 if a needed package is missing or a folder cannot be written to."""
    needed, extras = declared(requires("dora-vl") if installed_version("dora-vl") else [])
    yield f"dora-vl {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    yield "versions: " + ", ".join(f"{name} {installed_version(name) or 'missing'}" for name in SHOWN_FIRST)
    yield from devices()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    yield f"room: {memory:.0f} GiB of memory, {free:.0f} GiB free on the disk of {Path.cwd()}"
    unwritable = [f"{path} ({reason})" for path in places() if (reason := why_not_writable(path))]
    yield f"writing: {'; '.join(f'{entry} cannot be written' for entry in unwritable) or 'here and in the caches'}"
    for extra, packages in extras.items():
        missing = [name for name in packages if not installed_version(name)]
        how = MissingExtra(f"missing {', '.join(missing)}", extra) if missing else "installed"
        yield f"extra {extra}: {how}"
    for name, why in PROGRAMS.items():
        is_there = shutil.which(name) is not None or Path(sys.executable).with_name(name).is_file()
        yield f"program {name}: {'there' if is_there else f'missing ({why})'}"
    missing = [name for name in needed if not installed_version(name)]
    if missing:
        yield f"missing, and needed by every run: {', '.join(missing)}; pip install dora-vl"
    if missing or unwritable:
        raise SystemExit(1)


def declared(lines: list[str] | None) -> tuple[list[str], Mapping[str, list[str]]]:
    """Returns the packages that are needed, and those of each extra, as the metadata declares them."""
    needed: list[str] = []
    extras: dict[str, list[str]] = {}
    for line in lines or ():
        name = re.split(r"[^\w.\-]", line, maxsplit=1)[0]
        extra = re.search(r"extra == ['\"]([\w\-]+)['\"]", line)
        if extra is None:
            needed.append(name)
        elif extra[1] != "dev":
            extras.setdefault(extra[1], []).append(name)
    return needed, extras


def devices() -> Iterator[str]:
    """Yields the GPUs with their memory, or the CPU's cores and threads."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else (os.cpu_count() or 1)
    try:
        import torch
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # one that does not fit its libraries
        yield f"devices: torch cannot be imported: {' '.join(str(error).split())[:200]}"
        return
    threads = f"{cores} CPU cores, {torch.get_num_threads()} threads a process"
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        yield f"devices: no GPU ({built}); {threads}"
        return
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        bfloat16 = "" if gpu.major >= 8 else ", no bfloat16: set model.dtype float16"
        yield f"devices: GPU {number} {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB{bfloat16}"
    yield f"devices: {threads}"


def places() -> list[Path]:
    """Lists the folders that runs write to: the current one, temporary files, the hub's and `datasets`' caches."""
    cache = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    tables = Path(os.environ.get("HF_DATASETS_CACHE") or cache / "datasets")
    return [Path.cwd(), Path(tempfile.gettempdir()), cache.expanduser(), tables.expanduser()]


def why_not_writable(path: Path) -> str:
    """Says why no file can be made below a folder, by trying in the nearest existing one; "" if it works."""
    nearest = next((folder for folder in (path, *path.parents) if folder.is_dir()), path)
    try:
        with tempfile.TemporaryFile(dir=nearest):
            return ""
    except OSError as error:
        return str(error.strerror or error)


def installed_version(name: str) -> str:
    """Returns the version of an installed package; empty where it is not."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
