"""Every benchmark that `dora-vl evaluate` knows: its records, its question, its score and its server's file.

A table by hand. `modes` holds the official versions where there is more than one; the first is taken unless asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from dora_vl.data.examples import Example
from dora_vl.evaluation import (
    caption,
    commonsense,
    exact_match,
    gqa,
    mmbench,
    mme,
    nlvr2,
    pope,
    prompts,
    scienceqa,
    seed,
    submission,
    textvqa,
    video_qa,
    vizwiz,
    vqa,
)
from dora_vl.evaluation.prompts import Prompt
from dora_vl.evaluation.scored import Scored
from dora_vl.evaluation.submission import Submission

Scorer = Callable[[Sequence[Example], Mapping[str, str]], Scored]

SHORT_ANSWER_TOKENS, LONG_ANSWER_TOKENS = 128, 1024  # LLaVA-1.5's own
WITHOUT_JUDGE = "judged elsewhere"


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One benchmark.

    Attributes:
        modes: version -> scorer, the usual one first; empty where an external judge scores.
        prompt: what a LLaVA is asked.
        max_new_tokens: longest answer.
        splits: names of the split to look for in `records/<task>/`, the first that is there.
        submission: the server's file.
        chooses: every question has choices, and `extra["correct"]` is what is scored.
    """

    modes: Mapping[str, Scorer]
    prompt: Prompt = prompts.as_is
    max_new_tokens: int = SHORT_ANSWER_TOKENS
    splits: tuple[str, ...] = ("test", "validation")
    submission: Submission | None = None
    chooses: bool = False


def _one(scorer: Scorer) -> Mapping[str, Scorer]:
    return {"": scorer}


_COMMONSENSE = {rule: partial(commonsense.score, rule=rule) for rule in ("nvlabs", "llm_adapters")}

BENCHMARKS: Mapping[str, Benchmark] = {
    "exact_match": Benchmark(modes=_one(exact_match.score)),
    "vqav2": Benchmark(
        modes={version: partial(vqa.score, version=version) for version in ("after_2021", "before_2021")},
        prompt=prompts.short,
        splits=("test_dev", "test", "validation"),
        submission=submission.vqav2,
    ),
    "vqav2_karpathy": Benchmark(
        modes={version: partial(vqa.score, version=version) for version in ("before_2021", "after_2021")},
        prompt=prompts.short,
    ),
    "gqa": Benchmark(
        modes={style: partial(gqa.score, conversion=style) for style in ("llava", "vl_t5")},
        prompt=prompts.short,
        splits=("testdev", "test", "validation"),
        submission=submission.gqa_predictions,
    ),
    "vizwiz": Benchmark(
        modes=_one(vizwiz.score),
        prompt=prompts.short_vizwiz,
        submission=submission.vizwiz,
    ),
    "textvqa": Benchmark(modes=_one(textvqa.score), prompt=prompts.short_textvqa, splits=("validation",)),
    "scienceqa": Benchmark(
        modes=_one(scienceqa.score), prompt=prompts.letter, max_new_tokens=LONG_ANSWER_TOKENS, chooses=True
    ),
    "pope": Benchmark(modes=_one(pope.score), prompt=prompts.short),
    "mmbench": Benchmark(
        modes={matcher: partial(mmbench.score, matcher=matcher) for matcher in ("2025", "2023-11")},
        prompt=prompts.letter,
        max_new_tokens=LONG_ANSWER_TOKENS,
        splits=("validation", "test"),
        submission=submission.mmbench,
        chooses=True,
    ),
    "mmbench_cn": Benchmark(
        modes={matcher: partial(mmbench.score, matcher=matcher) for matcher in ("2025", "2023-11")},
        prompt=prompts.letter_cn,
        max_new_tokens=LONG_ANSWER_TOKENS,
        splits=("validation", "test"),
        submission=submission.mmbench,
        chooses=True,
    ),
    "mme": Benchmark(modes=_one(mme.score), prompt=prompts.short_mme),
    "seed": Benchmark(modes=_one(seed.score), prompt=prompts.letter, chooses=True),
    "llava_bench": Benchmark(modes={}, max_new_tokens=LONG_ANSWER_TOKENS, submission=submission.llava_bench_requests),
    "mmvet": Benchmark(modes={}, max_new_tokens=LONG_ANSWER_TOKENS, submission=submission.mmvet_answers),
    "nlvr": Benchmark(modes=_one(nlvr2.score_nlvr), prompt=prompts.true_or_false),
    "nlvr2": Benchmark(modes=_one(nlvr2.score), prompt=prompts.true_or_false, submission=submission.nlvr2),
    "coco_caption": Benchmark(
        modes={style: partial(caption.score, style=style) for style in ("coco", "value")},
        prompt=prompts.caption,
        submission=submission.coco_caption,
    ),
    "tvqa": Benchmark(
        modes=_one(video_qa.score), splits=("validation", "test"), submission=submission.tvqa, chooses=True
    ),
    "how2qa": Benchmark(
        modes=_one(video_qa.score_how2qa), splits=("validation", "test"), submission=submission.how2qa, chooses=True
    ),
    "tvc": Benchmark(
        modes={style: partial(caption.score, style=style) for style in ("value", "coco")},
        splits=("validation", "test"),
        submission=submission.tvc,
    ),
    "yc2c": Benchmark(
        modes={style: partial(caption.score, style=style) for style in ("value", "coco")},
        splits=("validation", "test"),
        submission=submission.yc2c,
    ),
    **{task: Benchmark(modes=_COMMONSENSE) for task in commonsense.PATTERNS},
}
