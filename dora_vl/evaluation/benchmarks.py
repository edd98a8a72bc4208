"""Benchmarks by name: the table, those of installed packages, and one's own as a YAML file of a few lines.

What a benchmark is stands in its scorer's file. A package offers benchmarks, each a `Benchmark`, as entry points of the
group `dora_vl.benchmarks`, such as `receipts = "my_package.receipts:RECEIPTS"`. A file holds `name` and `scoring`, and
may say `file` (records, looked for from where the YAML is), `prompt`, `max_new_tokens` and `frames`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from dora_vl.errors import UserError, shown
from dora_vl.evaluation.scores import caption, commonsense, exact, llava, prompts, video, vqa
from dora_vl.evaluation.scores.benchmark import FRAMES, SHORT_ANSWER_TOKENS, Benchmark
from dora_vl.evaluation.scores.exact import SCORINGS
from dora_vl.evaluation.scores.prompts import Prompt
from dora_vl.files import read_yaml

BENCHMARKS: Mapping[str, Benchmark] = {
    "exact_match": exact.BENCHMARK,
    "vqav2": vqa.VQA,
    "vqav2_karpathy": vqa.KARPATHY,
    "gqa": vqa.GQA,
    "vizwiz": vqa.VIZWIZ,
    "textvqa": vqa.TEXTVQA,
    "scienceqa": llava.SCIENCEQA,
    "pope": llava.POPE,
    "mmbench": llava.MMBENCH,
    "mmbench_cn": llava.CHINESE,
    "mme": llava.MME,
    "seed": llava.SEED,
    "llava_bench": llava.LLAVA_BENCH,
    "mmvet": llava.MMVET,
    "nlvr": vqa.NLVR,
    "nlvr2": vqa.NLVR2,
    "coco_caption": caption.COCO,
    "tvqa": video.TVQA,
    "how2qa": video.HOW2QA,
    "tvc": caption.TVC,
    "yc2c": caption.YC2C,
    **dict.fromkeys(commonsense.PATTERNS, commonsense.BENCHMARK),
}
"""Every benchmark that `dora-vl evaluate` knows, a row each, written by hand."""

GROUP = "dora_vl.benchmarks"
NAME = re.compile(r"[A-Za-z0-9][\w\-]*")
PROMPTS: Mapping[str, Prompt] = {
    "as_is": prompts.as_is,
    "short": prompts.short,
    "letter": prompts.letter,
    "true_or_false": prompts.true_or_false,
    "caption": prompts.caption,
    "video": prompts.about_video,
}
"""What `prompt:` may say."""


@dataclass(frozen=True, kw_only=True)
class NamedBenchmark:
    """A benchmark as it was asked for.

    Attributes:
        split: asked for by name, else "".
        file: its own records; None looks in the folder of records.
    """

    name: str
    benchmark: Benchmark
    split: str = ""
    file: Path | None = None


def find_benchmark(request: str) -> NamedBenchmark:
    """The benchmark of `NAME`, `NAME:SPLIT` or `FILE.yaml`."""
    if request.endswith((".yaml", ".yml")):
        return read_own(Path(request))
    name, _, split = request.partition(":")
    if name in BENCHMARKS:
        return NamedBenchmark(name=name, benchmark=BENCHMARKS[name], split=split)
    installed = {point.name: point for point in entry_points(group=GROUP)}
    if name not in installed:
        names = [*BENCHMARKS, *installed]
        nearest = get_close_matches(name, names, n=1, cutoff=0.0)[0]
        raise UserError(
            f"no benchmark {shown(name)}; did you mean {nearest!r}? There are {', '.join(names)}; your own is a "
            "FILE.yaml"
        )
    target = installed[name].value
    try:
        benchmark = installed[name].load()
    except (ImportError, AttributeError) as error:
        raise UserError(f"benchmark {name}: {target} of an installed package fails: {error}") from error
    if not isinstance(benchmark, Benchmark):
        raise UserError(f"benchmark {name}: {target} is a {type(benchmark).__name__}, it must be a Benchmark")
    if not NAME.fullmatch(name):
        raise UserError(f"benchmark {shown(name)}: a name is letters, digits, _ and -, as folders have it")
    return NamedBenchmark(name=name, benchmark=benchmark, split=split)


OWN: Mapping[str, tuple[type, Any]] = {
    "name": (str, None),
    "scoring": (str, None),
    "file": (str, None),
    "prompt": (str, None),
    "max_new_tokens": (int, SHORT_ANSWER_TOKENS),
    "frames": (int, FRAMES),
}
"""What a benchmark's YAML may say: its type, and what it is without."""


def read_own(path: Path) -> NamedBenchmark:
    """The benchmark of a YAML file."""
    content = read_yaml(path)
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: must hold settings such as `name: receipts`, found {shown(content)}")
    for key, value in content.items():
        if key not in OWN:
            raise UserError(f"{path}: unknown setting {shown(key)}; there are {', '.join(OWN)}")
        kind = OWN[key][0]
        if value is None and key in ("file", "prompt"):
            continue
        if not isinstance(value, kind) or isinstance(value, bool) or (isinstance(value, int) and value < 1):
            needed = "a whole number from 1" if kind is int else "text"
            raise UserError(f"{path}: {key} must be {needed}, it is {shown(value)}")
        names = {"scoring": SCORINGS, "prompt": PROMPTS}.get(key)
        if names is not None and value not in names:
            raise UserError(f"{path}: {key} is {shown(value)}; there are {', '.join(names)}")
    if missing := [key for key in ("name", "scoring") if key not in content]:
        raise UserError(f"{path}: {missing[0]} is missing; a benchmark has at least name and scoring")
    settings = {key: content.get(key, default) for key, (_, default) in OWN.items()}
    if not NAME.fullmatch(settings["name"]) or settings["name"] in BENCHMARKS:
        raise UserError(f"{path}: name {shown(settings['name'])} is taken, or not of letters, digits, _ and - alone")
    scoring = settings["scoring"]
    benchmark = Benchmark(
        modes={"": SCORINGS[scoring]},
        prompt=PROMPTS[settings["prompt"] or {"choice": "letter", "caption": "caption"}.get(scoring, "short")],
        max_new_tokens=settings["max_new_tokens"],
        chooses=scoring == "choice",
        together=caption.clip_of if scoring == "caption" else None,
        shares_answers=scoring == "caption",
        frames=settings["frames"],
    )
    return NamedBenchmark(
        name=settings["name"], benchmark=benchmark, file=settings["file"] and path.parent / settings["file"]
    )
