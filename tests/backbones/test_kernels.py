"""No module of a model that is opened here is replaced by a kernel of the hub's, whatever transformers' default."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

from transformers.utils.import_utils import KERNELS_MIN_VERSION

ROOT = Path(__file__).parents[2]
NO_MODELS = ("Config", "Tokenizer", "TokenizerFast", "Processor", "ProcessorPil", "PeftModel")


def loads(file: Path) -> list[str]:
    """The function that each `X.from_pretrained(...)` stands in, but those of configs, tokenizers and processors."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return [
        next((made.name for made in reversed(functions) if call in ast.walk(made)), "")
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "from_pretrained"
        if not ast.unparse(call.func.value).endswith(NO_MODELS)
    ]


def test_one_function_opens_models() -> None:
    files = [
        file
        for folder in ("dora_vl", "tasks", "data_prep", "benchmarks")
        for file in sorted((ROOT / folder).rglob("*.py"))
    ]
    found = [(str(file.relative_to(ROOT)), function) for file in files for function in loads(file)]
    assert found == [("dora_vl/backbones/loading.py", "load_pretrained")]


def test_nothing_asks_for_a_kernel_where_the_package_is_installed(tmp_path: Path) -> None:
    described = tmp_path / f"kernels-{KERNELS_MIN_VERSION}.dist-info" / "METADATA"
    for folder in (tmp_path / "kernels", described.parent):
        folder.mkdir()
    shutil.copy(Path(__file__).with_name("fake_kernels.py"), tmp_path / "kernels" / "__init__.py")
    described.write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).with_name("kernels_checks.py"))]
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env={**os.environ, "PYTHONPATH": path, "USE_HUB_KERNELS": "YES"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout
