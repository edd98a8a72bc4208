"""Measures how the code is built, and prints it beside what issue 31 promises.

    python -m benchmarks.structure [--root CHECKOUT] [--json FILE]

Imports inside functions count as imports. Trips are followed call by call in real runs of two steps on tiny models,
so that another checkout is measured by the same rule: a row of the training file to a sample, a batch to the loss, and
the rank from the settings to the first layer (files of functions that are handed a rank or settings that hold one).
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

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
    parser.add_argument("--trace", metavar="MODEL", help=argparse.SUPPRESS)  # in a process of its own
    options = parser.parse_args()
    if options.trace is not None:
        print(json.dumps(traced(options.trace)))
        return
    from benchmarks.report import table  # another checkout's own may differ

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
    imports = {name: set(imported(tree, modules)) - {name} for name, tree in trees.items()}
    reached = {name: reach(name, imports) for name in imports}
    circles = {frozenset(other for other in reached[name] if name in reached[other]) for name in imports}
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
    reached: set[str] = set()
    waiting = list(imports[start])
    while waiting:
        module = waiting.pop()
        if module not in reached:
            reached.add(module)
            waiting += imports[module]
    return reached


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
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "DORA_VL_CPU_STEP": "0"}
    figures: dict[str, Any] = {}
    for model in ("Qwen", "LLaVA"):
        done = subprocess.run(
            [sys.executable, __file__, "--trace", model],
            cwd=root,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"the traced run failed:\n{done.stderr[-3000:]}")
        figures |= json.loads(done.stdout.splitlines()[-1])
    return figures


class Trace:
    """The functions of the package that ran, by part; a part begins with a function of a package."""

    def __init__(self, model: str) -> None:
        self.row = f"a {model} row to a sample"
        self._begins = {self.row: ("data/", "__getitem__"), "a batch to the loss": ("training/", "forward")}
        self._package = str(Path.cwd() / PACKAGE)
        self.whole: set[CodeType] = set()
        self.parts: dict[str, set[CodeType]] = defaultdict(set)
        self.rank: set[str] = set()
        self._open: dict[str, FrameType] = {}
        self._layer_is_there = False

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        """One event of the interpreter."""
        code = frame.f_code
        # Bodies of modules and classes, and comprehensions, are no functions.
        named = bool(code.co_flags & inspect.CO_OPTIMIZED) and not code.co_name.startswith("<")
        if event not in ("call", "return") or not (named and code.co_filename.startswith(self._package)):
            return
        path = code.co_filename[len(self._package) + 1 :]
        for part, (package, function) in self._begins.items():
            if path.startswith(package) and code.co_name == function:
                if event == "call" and part not in self._open:
                    self._open[part] = frame
                elif event == "return" and self._open.get(part) is frame:
                    del self._open[part]
                    self.parts[part].add(code)
        if event == "return":
            self._layer_is_there = self._layer_is_there or (
                path.startswith("core/") and code.co_name == "start_adapter"
            )
            return
        self.whole.add(code)
        for part in self._open:
            self.parts[part].add(code)
        if not self._layer_is_there and any(_holds_rank(name, value) for name, value in frame.f_locals.items()):
            self.rank.add(path)

    def figures(self) -> dict[str, Any]:
        """`files, functions` of each part."""
        rows = {f"{part}: files, functions": _counted(codes) for part, codes in sorted(self.parts.items())}
        if "LLaVA" not in self.row:
            return {f"{self.row}: files, functions": rows[f"{self.row}: files, functions"]}
        return {
            "a run of two steps: files, functions": _counted(self.whole),
            "a run of two steps: modules": sum(name.partition(".")[0] == "dora_vl" for name in sys.modules),
            "rank to a layer: files": len(self.rank),
        } | rows


def _holds_rank(name: str, value: object) -> bool:
    kind = type(value)
    return name in ("rank", "adapter") or (
        "rank" in getattr(kind, "__dataclass_fields__", ()) or "adapter" in getattr(kind, "__dataclass_fields__", ())
    )


def _counted(codes: set[CodeType]) -> str:
    return f"{len({code.co_filename for code in codes})}, {len(codes)}"


def traced(model: str) -> dict[str, Any]:
    """The figures of one run, in this process."""
    sys.path.insert(0, str(Path.cwd()))
    from tests.backbones.tiny_image_text import write_tiny
    from tests.training.tiny_run import write_run, write_tiny_data, write_tiny_llava

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, data = folder / "base", write_tiny_data(folder / "data", samples=8)
        if model == "LLaVA":
            write_tiny_llava(base)
        else:
            write_tiny("qwen2_5_vl", base)
        config = write_run(folder / "run.yaml", base, data, training={"max_steps": 2, "warmup_steps": 0})
        sys.argv = ["llava_instruct.py", "--config", str(config)]
        trace = Trace(model)
        sys.setprofile(trace)
        try:
            runpy.run_path("tasks/llava_instruct.py", run_name="__main__")
        finally:
            sys.setprofile(None)
    return trace.figures()


if __name__ == "__main__":
    main()
