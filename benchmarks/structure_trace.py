"""Follows a run of two steps on a tiny LLaVA or Qwen, call by call; prints a line of JSON. Started by `structure.py`.

Three parts of the run are counted for themselves: a row of the training file to a sample, a batch to the loss, and the
rank from the settings to the first layer (files of functions that are handed a rank or settings that hold one).
"""

from __future__ import annotations

import inspect
import json
import runpy
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

sys.path.insert(0, str(Path.cwd()))
PACKAGE = str(Path.cwd() / "dora_vl")
MODEL = sys.argv[1]
ROW = f"a {MODEL} row to a sample"
BELOW = {ROW: ("data/", "__getitem__"), "a batch to the loss": ("training/", "forward")}
"""Part -> the function whose calls belong to it, and the package that it is in."""


class Trace:
    """The functions of the package that ran, by part."""

    def __init__(self) -> None:
        self.whole: set[CodeType] = set()
        self.parts: dict[str, set[CodeType]] = defaultdict(set)
        self.rank: set[str] = set()
        self._open: dict[str, FrameType] = {}
        self._layer_is_there = False

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        """One event of the interpreter."""
        code = frame.f_code
        if event not in ("call", "return") or not _is_function(code):
            return
        path = code.co_filename[len(PACKAGE) + 1 :]
        for part, (package, function) in BELOW.items():
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
        if MODEL != "LLaVA":
            return {f"{ROW}: files, functions": rows[f"{ROW}: files, functions"]}
        return {
            "a run of two steps: files, functions": _counted(self.whole),
            "a run of two steps: modules": sum(name.partition(".")[0] == "dora_vl" for name in sys.modules),
            "rank to a layer: files": len(self.rank),
        } | rows


def _is_function(code: CodeType) -> bool:
    """Whether it is a named function of the package; bodies of modules and classes, and comprehensions, are none."""
    named = bool(code.co_flags & inspect.CO_OPTIMIZED) and not code.co_name.startswith("<")
    return named and code.co_filename.startswith(PACKAGE)


def _holds_rank(name: str, value: object) -> bool:
    kind = type(value)
    return name in ("rank", "adapter") or (
        "rank" in getattr(kind, "__dataclass_fields__", ()) or "adapter" in getattr(kind, "__dataclass_fields__", ())
    )


def _counted(codes: set[CodeType]) -> str:
    return f"{len({code.co_filename for code in codes})}, {len(codes)}"


def main() -> None:
    """Runs and prints."""
    from tests.backbones.tiny_image_text import write_tiny
    from tests.training.tiny_run import write_run, write_tiny_data, write_tiny_llava

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, data = folder / "base", write_tiny_data(folder / "data", samples=8)
        if MODEL == "LLaVA":
            write_tiny_llava(base)
        else:
            write_tiny("qwen2_5_vl", base)
        config = write_run(folder / "run.yaml", base, data, training={"max_steps": 2, "warmup_steps": 0})
        sys.argv = ["llava_instruct.py", "--config", str(config)]
        trace = Trace()
        sys.setprofile(trace)
        try:
            runpy.run_path("tasks/llava_instruct.py", run_name="__main__")
        finally:
            sys.setprofile(None)
    print(json.dumps(trace.figures()))


if __name__ == "__main__":
    main()
