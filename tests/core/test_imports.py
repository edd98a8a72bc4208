"""The core needs torch, safetensors, jaxtyping and the standard library; Triton in its own file, where it is there."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ALLOWED = {"torch", "safetensors", "jaxtyping"} | set(sys.stdlib_module_names)
BLOCKED = ("transformers", "peft", "deepspeed", "accelerate", "datasets", "timm", "bitsandbytes", "triton")


def test_core_loads_where_everything_else_is_missing():
    blocks = "; ".join(f"sys.modules[{name!r}] = None" for name in BLOCKED)
    subprocess.run([sys.executable, "-c", f"import sys; {blocks}; import dora_vl.core"], check=True, cwd=ROOT)


def test_no_file_imports_anything_else():
    for path in (ROOT / "dora_vl" / "core").rglob("*.py"):
        allowed = ALLOWED | ({"triton"} if path.name == "triton.py" else set())
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                inside = name.startswith(("dora_vl.core", "dora_vl.errors"))
                assert inside or name.split(".")[0] in allowed, (path.name, name)
