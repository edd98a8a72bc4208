"""Measures how the code is built: its size, its arrows, and how many files a few trips through it cross.

    python -m benchmarks.structure [--root CHECKOUT] [--json FILE]

Trips are followed call by call in a real run of two steps on a tiny LLaVA (`benchmarks/structure_trace.py`), so that
another checkout, such as an earlier version, is measured by the same rule. Only functions of the package count, not
what a module does while it is imported.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import table
from dora_vl.training.settings_files import variants_of

PACKAGE = "dora_vl"
LONG_FUNCTION = 45


def main() -> None:
    """Prints the figures of one checkout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(), help="the checkout that is measured")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    root = options.root.resolve()
    figures = {**sizes(root), **arrows(root), **yaml_lines(root), **trips(root)}
    print(table(("what", "figure"), list(figures.items())))
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def code_files(root: Path) -> list[Path]:
    """Python files that git keeps, tests left out."""
    listed = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=root, capture_output=True, text=True, check=True
    ).stdout.split()
    return [root / name for name in listed if not name.startswith("tests/") and (root / name).is_file()]


def sizes(root: Path) -> dict[str, float]:
    """Files, lines, public classes, and lengths of functions."""
    files = code_files(root)
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in files]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    functions = [
        (node.end_lineno or node.lineno) - node.lineno + 1
        for node in nodes
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return {
        "files": len(files),
        "lines": sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files),
        "public classes": sum(isinstance(node, ast.ClassDef) and not node.name.startswith("_") for node in nodes),
        "function lines, median": statistics.median(functions),
        f"functions over {LONG_FUNCTION} lines": sum(length > LONG_FUNCTION for length in functions),
    }


def arrows(root: Path) -> dict[str, int]:
    """Packages that import each other, and modules that do, in circles."""
    modules = {_module_name(path, root): path for path in sorted((root / PACKAGE).rglob("*.py"))}
    imports = {name: set(_imported(path, modules)) - {name} for name, path in modules.items()}
    packages: dict[str, set[str]] = {}
    for name, others in imports.items():
        own = _package_of(name)
        packages.setdefault(own, set()).update({_package_of(other) for other in others} - {own})
    return {
        "packages in a circle": len(in_circles(packages)),
        "modules in a circle": len(in_circles(imports)),
    }


def in_circles(arrows_of: Mapping[str, set[str]]) -> set[str]:
    """The nodes from which a way of one arrow or more leads back to themselves."""

    def reached(start: str) -> set[str]:
        found: set[str] = set()
        waiting = list(arrows_of.get(start, ()))
        while waiting:
            node = waiting.pop()
            if node not in found:
                found.add(node)
                waiting += arrows_of.get(node, ())
        return found

    return {node for node in arrows_of if node in reached(node)}


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
    """Counts the YAML files below a folder.

    Every line counts, comments and empty ones too; two lines are the same if they are to the last space.
    """
    paths = sorted(folder.rglob("*.yaml"))
    lines = [line for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    runs = sum(len(variants_of(path)) or 1 for path in paths)
    return Counted(files=len(paths), runs=runs, lines=len(lines), distinct=len(set(lines)))


def yaml_lines(root: Path) -> dict[str, Any]:
    """How much the recipes repeat each other."""
    found = count(root / "configs")
    return {"YAML files": found.files, "runs in them": found.runs, "YAML lines, distinct": f"{found.share:.0%}"}


def trips(root: Path) -> dict[str, Any]:
    """Files and functions that a run of two steps crosses, and parts of it."""
    tracer = Path(__file__).with_name("structure_trace.py")
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "DORA_VL_CPU_STEP": "0"}
    done = subprocess.run(
        [sys.executable, str(tracer)], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"the traced run failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _module_name(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def _package_of(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def _imported(path: Path, modules: Mapping[str, Path]) -> Iterator[str]:
    """Modules of the package that a file imports when it is imported itself, those for type checkers left out."""
    for node in _import_time_nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                if whole in modules or node.module in modules:
                    yield whole if whole in modules else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)


def _import_time_nodes(tree: ast.Module) -> Iterator[ast.AST]:
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if not typing_only and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield node
            waiting += ast.iter_child_nodes(node)


if __name__ == "__main__":
    main()
