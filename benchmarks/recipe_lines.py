"""How much the recipes repeat each other: files, runs (a file's variants), lines, and lines that differ.

    python benchmarks/recipe_lines.py [--folder configs]

Every line counts, comments and empty ones too; two lines are the same if they are to the last space.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from dora_vl.run.command_line import variants_of


@dataclass(frozen=True)
class Counted:
    """What is counted of a folder of YAML files."""

    files: int
    runs: int
    lines: int
    distinct: int

    @property
    def share(self) -> float:
        """Distinct lines of all lines."""
        return self.distinct / self.lines


def count(folder: Path) -> Counted:
    """Counts the YAML files below a folder."""
    paths = sorted(folder.rglob("*.yaml"))
    lines = [line for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    runs = sum(len(variants_of(path)) or 1 for path in paths)
    return Counted(files=len(paths), runs=runs, lines=len(lines), distinct=len(set(lines)))


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("configs"), help="folder of recipes")
    found = count(parser.parse_args().folder)
    print(f"{found.files} files, {found.runs} runs, {found.lines} lines, {found.distinct} distinct: {found.share:.1%}")


if __name__ == "__main__":
    main()
