"""DoRA adapters unmerged in vLLM: its tokens beside those of PEFT and transformers, on tiny random models, on CPU.

    python -m benchmarks.vllm_dora --vllm-python vllm/bin/python --json benchmarks/results.jsonl

`language`: two DoRA adapters, a LoRA and the base in one batch, against PEFT's unmerged answers, with biases and
without; then with one slot for all of them; then with the gains left at 1, which must not agree. `llava`: a LLaVA that
this project composes, trains and exports (`dora-vl export --for vllm`), with pictures, against itself unmerged in
transformers, and merged (`dora-vl merge`). `server`: the same through vLLM's OpenAI-compatible server. vLLM may live in
an environment of its own (docs/export.md); dora_vl must be installed there, for its plugin.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from benchmarks.report import write_json
from benchmarks.vllm_llava import llava_figures
from benchmarks.vllm_models import (
    ADAPTERS,
    ENGINE,
    PROMPTS,
    agreement,
    ask,
    by_peft,
    in_vllm,
    shown,
    unlike_the_base,
    write_adapter,
    write_language_model,
)
from dora_vl.errors import UserError, exit_on_user_error

PARTS = ("language", "llava", "server")


@exit_on_user_error
def main() -> None:
    """Runs the parts, prints the tables and writes the JSON; exit status 1 where something does not agree."""
    options = read_options()
    disable_progress_bar()
    figures: dict[str, Any] = {"vllm": version_of(options.vllm_python)}
    with tempfile.TemporaryDirectory() as folder:
        if "language" in options.parts:
            figures["language"] = language_figures(Path(folder), options)
        if {"llava", "server"} & set(options.parts):
            figures["llava"] = llava_figures(Path(folder), options)
    if options.json is not None:
        write_json(options.json, figures)
    if not all(agrees(case) for part in ("language", "llava") for case in figures.get(part, {}).values()):
        sys.exit(1)


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", type=Path, default=Path(sys.executable), help="default: this one")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--tokens", type=int, default=24, help="of each answer")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def version_of(python: Path) -> str:
    """vLLM's version there.

    Raises:
        UserError: there is none, or no dora_vl beside it.
    """
    if not python.is_file():
        raise UserError(f"--vllm-python {python}: there is no such file")
    code = "import dora_vl.serving.vllm.plugin, vllm; print(vllm.__version__)"
    found = in_vllm(python, ["-c", code], check=False)
    if found.returncode:
        reason = found.stderr.strip().splitlines()[-1:]
        raise UserError(f"{python}: {' '.join(reason)}; --vllm-python names an interpreter with vllm and dora_vl")
    return found.stdout.split()[-1]


def agrees(case: Mapping[str, Any]) -> bool:
    """Whether every token is the same and no adapter's are the base's; with gains left at 1, DoRA's must be others."""
    whole = {name: min(one["same_tokens"]) == one["of"] for name, one in case["answers"].items()}
    if not all(case["unlike_the_base"].values()):
        return False
    if case["gains"]:
        return all(whole.values())
    return not any(same for name, same in whole.items() if name.startswith("dora"))


# -- language models -----------------------------------------------------------------------------------------


def language_figures(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The cases, by name."""
    figures = {}
    for base in ("plain", "biased"):
        path = folder / base
        write_language_model(path, biases=base == "biased")
        adapters = {
            name: write_adapter(path, folder / f"{base} {name}", 10 + seed, **config)
            for seed, (name, config) in enumerate(ADAPTERS.items())
        }
        expected = {name: by_peft(path, one, options.tokens) for name, one in (("base", None), *adapters.items())}
        cases: dict[str, dict[str, Any]] = {f"{base}, one batch": {"max_loras": len(adapters)}}
        if base == "biased":
            cases["biased, one slot for all"] = {"max_loras": 1}
            cases["biased, gains left at 1"] = {"max_loras": len(adapters), "gains": False}
        for title, case in cases.items():
            figures[title] = language_case(path, adapters, expected, case, options)
            shown(title, figures[title])
    return figures


def language_case(
    base: Path,
    adapters: Mapping[str, Path],
    expected: Mapping[str, Sequence[Mapping[str, Any]]],
    case: Mapping[str, Any],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Every prompt with the base and each adapter, one after another, so that a batch mixes them."""
    asked = [(name, number) for number in range(len(PROMPTS)) for name in expected]
    requests = [{"adapter": name, "ids": PROMPTS[number]} for name, number in asked]
    gains = case.get("gains", True)
    engine = {**ENGINE, "skip_tokenizer_init": True, "max_loras": case["max_loras"]}
    job = {
        "model": str(base),
        "engine": engine,
        "adapters": {name: str(path) for name, path in adapters.items()},
        "requests": requests,
        "gains": gains,
    }
    found = dict(zip(asked, ask(base.parent, job, options), strict=True))
    answers = {
        name: agreement([found[name, number] for number in range(len(PROMPTS))], wanted)
        for name, wanted in expected.items()
    }
    return {
        "gains": gains,
        "max_loras": case["max_loras"],
        "unlike_the_base": unlike_the_base(expected),
        "answers": answers,
    }


if __name__ == "__main__":
    main()
