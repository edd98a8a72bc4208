"""Every Python block of the pages runs as it is printed, in a folder that holds what the page asks for."""

import importlib.util
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dora_vl.core import DoRAConfig, apply_dora
from dora_vl.data.example import Answer, Example, write_examples
from tests.adapters.foreign_files import tiny_llama
from tests.adapters.peft_folders import moved_peft
from tests.test_documented_commands import PAGES, blocks

Names = Mapping[str, Any]
CODE = {page.name: found for page in PAGES if (found := list(blocks(page.read_text(encoding="utf-8"), "python", "py")))}


def adapted() -> Names:
    """A model that `apply_dora` adapted, its B and magnitudes away from where they start."""
    model = tiny_llama()
    apply_dora(model, DoRAConfig(targets=("*.q_proj", "*.down_proj"), rank=3, alpha=7.0, dropout=0.0))
    for name, parameter in model.named_parameters():
        if name.endswith(("lora_B", "magnitude")):
            parameter.data += 0.1
    return {"model": model}


def adapters() -> Names:
    """docs/adapters.md: the bases, and folders of adapters."""
    peft_model = moved_peft(tiny_llama())
    for folder in ("peft_adapter", "adapter_a", "adapter_b"):
        peft_model.save_pretrained(folder)
    return {**adapted(), "base": tiny_llama(), "fresh_base": tiny_llama(), "peft_model": peft_model}


def pope() -> Names:
    """Records of POPE, and two files of answers."""
    examples = [
        Example(id=f"pope-{n}", images=("0.png",), question="Is there a dog?", answers=(Answer(text=text),))
        for n, text in enumerate(("yes", "no", "yes", "no"))
    ]
    write_examples(Path("records/pope/test.jsonl"), examples)
    for file, answer in (("answers.jsonl", "yes"), ("other_answers.jsonl", "no")):
        lines = [json.dumps({"id": example.id, "prediction": answer}) for example in examples]
        Path(file).write_text("\n".join(lines), encoding="utf-8")
    return {}


def photo() -> Names:
    """docs/serving.md: a picture, and the demo's adapter in little."""
    from tests.backbones.tiny_image_text import write_tiny_video
    from tests.serving.tiny_served import ADAPTERS, spread, write_adapter

    Image.new("RGB", (21, 15), "red").save("photo.png")
    base = spread(write_tiny_video("qwen2_5_vl", Path("base").resolve()))
    write_adapter(base, Path("runs/demo/adapter"), seed=1, **ADAPTERS["one"])
    return {}


GIVEN: Mapping[str, Callable[[], Names]] = {
    "README.md": lambda: {"model": tiny_llama()},
    "adapters.md": adapters,
    "core.md": adapted,
    "evaluation.md": pope,
    "serving.md": photo,
}
"""Page -> what makes the names and files that it speaks of as the reader's own."""
PACKAGES = {"your_videos.md": ("av",), "serving.md": ("fastapi", "uvicorn", "openai")}


@contextmanager
def served(code: str) -> Iterator[str]:
    """The code with the address of a server that runs, as the page has just started one."""
    from dora_vl.serving.model import open_served
    from tests.serving.tiny_served import running

    with running(open_served(None, {"shapes": Path("runs/demo/adapter")})) as address:
        yield code.replace("http://127.0.0.1:8000", address)


@pytest.mark.parametrize("page", CODE)
def test_every_block_of_the_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in PACKAGES.get(page, ()):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{page} needs {package}")
    monkeypatch.chdir(tmp_path)
    names = dict(GIVEN.get(page, dict)())
    for number, code in enumerate(CODE[page], 1):
        needs_server = re.search(r"http://127\.0\.0\.1", code) is not None
        with served(code) if needs_server else nullcontext(code) as runnable:
            exec(compile(runnable, f"{page}, block {number}", "exec"), deepcopy(names))
