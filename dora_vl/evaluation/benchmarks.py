"""Every benchmark that `dora-vl evaluate` knows: its records, its question, its score and its server's file.

A table by hand. `modes` holds the official versions where there is more than one; the first is taken unless asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from dora_vl.data.examples import Example
from dora_vl.evaluation import prompts, submission
from dora_vl.evaluation.prompts import Prompt
from dora_vl.evaluation.submission import Submission
from dora_vl.scores import (
    caption,
    commonsense,
    exact_match,
    gqa,
    mmbench,
    mme,
    nlvr2,
    pope,
    scienceqa,
    seed,
    textvqa,
    video_qa,
    vizwiz,
    vqa,
)
from dora_vl.scores.known_truth import Group
from dora_vl.scores.scored import Scored

Scorer = Callable[[Sequence[Example], Mapping[str, str]], Scored]

SHORT_ANSWER_TOKENS, LONG_ANSWER_TOKENS = 128, 1024  # LLaVA-1.5's own
FRAMES = 4  # 2,304 of LLaVA-1.5's 4,096 positions


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
        together: examples with equal values are scored as one, so that one without its right answer leaves out all.
        shares_answers: one right answer serves all of them.
        frames: how many frames of a video a LLaVA is shown.
    """

    modes: Mapping[str, Scorer]
    prompt: Prompt = prompts.as_is
    max_new_tokens: int = SHORT_ANSWER_TOKENS
    splits: tuple[str, ...] = ("test", "validation")
    submission: Submission | None = None
    chooses: bool = False
    together: Group | None = None
    shares_answers: bool = False
    frames: int = FRAMES


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
        modes=_one(scienceqa.score), prompt=prompts.letter_with_context, max_new_tokens=LONG_ANSWER_TOKENS, chooses=True
    ),
    "pope": Benchmark(modes=_one(pope.score), prompt=prompts.short),
    "mmbench": Benchmark(
        modes={matcher: partial(mmbench.score, matcher=matcher) for matcher in ("2025", "opencompass_2023")},
        prompt=prompts.letter,
        max_new_tokens=LONG_ANSWER_TOKENS,
        splits=("validation", "test"),
        submission=submission.mmbench,
        chooses=True,
        together=mmbench.question_of,
    ),
    "mmbench_cn": Benchmark(
        modes={matcher: partial(mmbench.score, matcher=matcher) for matcher in ("2025", "opencompass_2023")},
        prompt=prompts.letter_cn,
        max_new_tokens=LONG_ANSWER_TOKENS,
        splits=("validation", "test"),
        submission=submission.mmbench,
        chooses=True,
        together=mmbench.question_of,
    ),
    "mme": Benchmark(modes=_one(mme.score), prompt=prompts.short_mme, together=mme.picture_of),
    "seed": Benchmark(modes=_one(seed.score), prompt=prompts.letter, chooses=True),
    "llava_bench": Benchmark(modes={}, max_new_tokens=LONG_ANSWER_TOKENS, submission=submission.llava_bench_requests),
    "mmvet": Benchmark(modes={}, max_new_tokens=LONG_ANSWER_TOKENS, submission=submission.mmvet_answers),
    "nlvr": Benchmark(
        modes=_one(nlvr2.score_nlvr),
        prompt=prompts.true_or_false,
        together=lambda example: nlvr2.sentence_of_nlvr(example.id),
    ),
    "nlvr2": Benchmark(
        modes=_one(nlvr2.score),
        prompt=prompts.true_or_false,
        submission=submission.nlvr2,
        together=lambda example: nlvr2.sentence_of_nlvr2(example.id),
    ),
    "coco_caption": Benchmark(
        modes={style: partial(caption.score, style=style) for style in ("coco", "value")},
        prompt=prompts.caption,
        submission=submission.coco_caption,
        together=caption.clip_of,
        shares_answers=True,
    ),
    "tvqa": Benchmark(
        modes=_one(video_qa.score),
        prompt=prompts.about_video,
        splits=("validation", "test"),
        submission=submission.tvqa,
        chooses=True,
    ),
    "how2qa": Benchmark(
        modes=_one(video_qa.score_how2qa),
        prompt=prompts.about_video,
        splits=("validation", "test"),
        submission=submission.how2qa,
        chooses=True,
    ),
    "tvc": Benchmark(
        modes={style: partial(caption.score, style=style) for style in ("value", "coco")},
        prompt=prompts.caption_of_video,
        splits=("validation", "test"),
        submission=submission.tvc,
        together=caption.clip_of,
        shares_answers=True,
    ),
    "yc2c": Benchmark(
        modes={style: partial(caption.score, style=style) for style in ("value", "coco")},
        prompt=prompts.caption_of_video,
        splits=("validation", "test"),
        submission=submission.yc2c,
        together=caption.clip_of,
        shares_answers=True,
    ),
    **{task: Benchmark(modes=_COMMONSENSE) for task in commonsense.PATTERNS},
}
