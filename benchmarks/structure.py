"""Measures how the code is built, and prints it beside what issue 31 promises.

    python -m benchmarks.structure [--root CHECKOUT] [--json FILE]

Imports inside functions count as imports. Trips are followed call by call in real runs
of two steps on tiny models (`structure_trace.py`), so that another checkout is measured by the same rule.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.report import table

PACKAGE = "dora_vl"
COMMANDS = ("serve", "evaluate")
ISSUE_31: Mapping[str, tuple[str, str]] = {
    "files outside tests": ("489", "220"),
    "lines outside tests": ("71,425", "48,000"),
    "lines of tests": ("49,931", "30,000"),
    "% of tests that match a message's wording": ("34", "10"),
    "circles of modules": ("5", "0"),
    "imports inside functions": ("198", ""),
    "rank to a layer: files": ("12", "7"),
    "a LLaVA row to a sample: files, functions": ("9, 47", "6, 20"),
    "a Qwen row to a sample: files, functions": ("12, 53", "6, 20"),
    "a batch to the loss: files, functions": ("13, 63", "7, 30"),
    "a run of two steps: files, functions": ("98, 573", "50, 300"),
    "a run of two steps: modules": ("205", "110"),
    "modules of `serve`": ("209", "110"),
    "modules of `evaluate`": ("190", "110"),
    "modules of core.inject": ("29", "15"),
    "numbers in 1,000 words of the README": ("84", "30"),
    "words of the README": ("1,755", "900"),
    "words of docs": ("41,537", "25,000"),
}
"""Figure -> that of c4ae0ab, and the promise."""


def main() -> None:
    """Prints the figures of one checkout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(), help="the checkout that is measured")
    parser.add_argument("--no-trace", action="store_true", help="without the runs, which take two minutes")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    root = options.root.resolve()
    figures = {**sizes(root), **arrows(root), **pages(root), **({} if options.no_trace else trips(root))}
    rows = [(name, was, figures.get(name, ""), promised) for name, (was, promised) in ISSUE_31.items()]
    print(table(("figure", "c4ae0ab", "now", "promise"), rows))
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def sizes(root: Path) -> dict[str, Any]:
    """Files, lines, and the share of tests that match the wording of a message."""
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=root, capture_output=True, text=True, check=True)
    paths = [name for name in listed.stdout.split() if (root / name).is_file()]
    text = {name: (root / name).read_text(encoding="utf-8") for name in paths}
    lines = {name: content.count("\n") for name, content in text.items()}
    tests = [name for name in paths if name.startswith("tests/")]
    functions = [
        node
        for name in tests
        for node in ast.walk(ast.parse(text[name]))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]
    return {
        "files outside tests": len(paths) - len(tests),
        "lines outside tests": f"{sum(lines[name] for name in paths if name not in tests):,}",
        "lines of tests": f"{sum(lines[name] for name in tests):,}",
        "% of tests that match a message's wording": round(100 * sum(map(matches, functions)) / len(functions)),
    }


def matches(test: ast.FunctionDef) -> bool:
    """Whether it looks at the words of an error, of stderr or of the log."""
    return bool(re.search(r"match=|str\(\w+\.value|\.err\b|stderr|\bsaid\b|caplog", ast.unparse(test)))


def arrows(root: Path) -> dict[str, Any]:
    """Circles (imports for type checkers counted), imports inside functions, and the modules that commands lead to."""
    paths = sorted([*(root / PACKAGE).rglob("*.py"), *(root / "benchmarks").glob("*.py")])
    modules = {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in modules.items()}
    every = {name: set(imported(tree, modules)) - {name} for name, tree in trees.items()}
    reached = {name: reach(name, every) for name in every}
    circles = {frozenset(other for other in reached[name] if name in reached[other]) for name in every}
    inside = {
        node
        for name, tree in trees.items()
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef) and name.startswith(PACKAGE)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    figures: dict[str, Any] = {
        "circles of modules": len(circles - {frozenset()}),
        "imports inside functions": len(inside),
    }
    at_run_time = {name: set(imported(tree, modules, typing=False)) - {name} for name, tree in trees.items()}
    commands = "".join(path.read_text() for path in paths if path.name in ("cli.py", "commands.py"))
    for command in COMMANDS:
        module = re.findall(rf'"{command}": Command\(\s*"([\w.]+)"', commands)[0]
        figures[f"modules of `{command}`"] = len(reach(module, at_run_time) | {module})
    module = f"{PACKAGE}.core.inject"
    return figures | {"modules of core.inject": len(reach(module, at_run_time) | {module})}


def reach(start: str, imports: Mapping[str, set[str]]) -> set[str]:
    """The modules that a way of one import or more leads to."""
    found: set[str] = set()
    waiting = list(imports[start])
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            waiting += imports[module]
    return found


def imported(tree: ast.Module, modules: Mapping[str, Path], *, typing: bool = True) -> Iterator[str]:
    """Modules of ours that a file imports, inside functions too."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and not typing:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from (whole & modules.keys()) or ({node.module} & modules.keys())
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        waiting += ast.iter_child_nodes(node)


def pages(root: Path) -> dict[str, Any]:
    """Words, and numbers among those of the README, code left out."""
    readme = (root / "README.md").read_text(encoding="utf-8")
    prose = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", " ", readme, flags=re.DOTALL)
    words = [word for word in prose.split() if re.search(r"\w", word)]
    numbers = [word for word in words if re.search(r"\d", word)]
    docs = sum(len(path.read_text(encoding="utf-8").split()) for path in (root / "docs").glob("*.md"))
    return {
        "numbers in 1,000 words of the README": round(1000 * len(numbers) / len(words)),
        "words of the README": len(words),
        "words of docs": f"{docs:,}",
    }


def trips(root: Path) -> dict[str, Any]:
    """Files and functions that runs of two steps cross, and parts of them."""
    tracer = Path(__file__).with_name("structure_trace.py")
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "DORA_VL_CPU_STEP": "0"}
    figures: dict[str, Any] = {}
    for model in ("Qwen", "LLaVA"):
        done = subprocess.run(
            [sys.executable, str(tracer), model], cwd=root, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"the traced run failed:\n{done.stderr[-3000:]}")
        figures |= json.loads(done.stdout.splitlines()[-1])
    return figures


if __name__ == "__main__":
    main()
