"""The invented files in each publisher's form, and `dora-vl prepare` over them."""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from dora_vl.data import prepare

FIXTURES = Path(__file__).parent / "fixtures"
EXPECTED = [
    json.loads(line) for line in FIXTURES.with_name("expected_records.jsonl").read_text(encoding="utf-8").splitlines()
]
"""For each split of each fixture: its source, the counts and the second record, written out by hand."""
SOURCE_OF: dict[str, str] = {entry["fixture"]: entry["source"] for entry in EXPECTED}
FIXTURE_NAMES = sorted(SOURCE_OF)


def prepared(source: str, folder: Path, to: Path, *options: str) -> list[str]:
    """What the command says."""
    parser = argparse.ArgumentParser()
    prepare.add_arguments(parser)
    words = [source, "--from", str(folder), "--to", str(to), *options]
    return list(prepare.run(parser.parse_args(words)))


def copied(fixture: str, to: Path) -> Path:
    """A fixture's files, to be damaged."""
    return Path(shutil.copytree(FIXTURES / fixture, to / "published"))


def manifest(folder: Path, split: str) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["splits"][split]
