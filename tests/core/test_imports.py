"""The core needs torch, safetensors, jaxtyping and the standard library; Triton in its own files, where it is there."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ALLOWED = {"torch", "safetensors", "jaxtyping", "dora_vl"} | set(sys.stdlib_module_names)
BLOCKED = ("transformers", "peft", "deepspeed", "accelerate", "datasets", "timm", "bitsandbytes", "triton")
OPTIONAL = "triton"
"""What the files named after it may import besides; `fused.py` alone imports them, where the package is there."""


def test_core_loads_where_everything_else_is_missing():
    blocks = "; ".join(f"sys.modules[{name!r}] = None" for name in BLOCKED)
    subprocess.run([sys.executable, "-c", f"import sys; {blocks}; import dora_vl.core"], check=True, cwd=ROOT)


def test_no_file_imports_anything_else():
    for path in (ROOT / "dora_vl" / "core").glob("*.py"):
        own = path.name.startswith(f"{OPTIONAL}_")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                assert name.split(".")[0] in ALLOWED | ({OPTIONAL} if own else set()), (path.name, name)
                assert own or not name.startswith(f"dora_vl.core.{OPTIONAL}_"), path.name
            if isinstance(node, ast.ImportFrom) and node.module == "dora_vl.core" and path.name != "fused.py":
                assert not any(alias.name.startswith(f"{OPTIONAL}_") for alias in node.names), path.name
                inside = not name.startswith("dora_vl") or name.startswith(("dora_vl.core", "dora_vl.errors"))
                assert inside, (path.name, name)
