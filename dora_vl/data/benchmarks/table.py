"""The published sources that `dora-vl prepare` reads, a row each, written by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dora_vl.data.benchmarks import commonsense, images, llava, videos
from dora_vl.data.benchmarks.fields import Split


@dataclass(frozen=True)
class Source:
    """One published source: `splits` yields a `Split` for each of its files in a folder.

    It gets the folder, the options that `--set NAME=VALUE` chose and the folder of records; its docstring says where
    the files are published, under what licence, and their quirks. `options` explains each option.
    """

    splits: Callable[[Path, Mapping[str, str], Path], Iterator[Split]]
    summary: str
    options: Mapping[str, str] = field(default_factory=dict)


SOURCES: dict[str, Source] = {
    "llava-mix665k": Source(llava.llava_mix665k, "LLaVA-1.5's 665,298 instruction conversations"),
    "llava-pretrain": Source(llava.llava_pretrain, "LLaVA-1.5's 558,128 pretraining captions"),
    "llava-json": Source(llava.llava_json, "your own file in LLaVA's form, checked"),
    "vqav2": Source(images.vqav2, "VQA v2, official splits"),
    "vqav2-karpathy": Source(images.vqav2_karpathy, "VQA v2 in Karpathy's split, as in VL-BART"),
    "gqa": Source(images.gqa, "GQA, balanced and all"),
    "vizwiz": Source(llava.vizwiz, "VizWiz-VQA"),
    "textvqa": Source(llava.textvqa, "TextVQA 0.5.1 with OCR tokens"),
    "scienceqa": Source(llava.scienceqa, "ScienceQA, with and without pictures"),
    "pope": Source(llava.pope, "POPE: is there such an object? either label version"),
    "mmbench": Source(llava.mmbench, "MMBench and MMBench-CN, all rotations"),
    "mme": Source(llava.mme, "MME, two yes/no questions per picture"),
    "seed": Source(llava.seed_bench, "SEED-Bench, pictures and videos"),
    "llava-bench": Source(llava.llava_bench, "LLaVA-Bench in the wild, for a judge"),
    "mmvet": Source(llava.mmvet, "MM-Vet, for a judge"),
    "nlvr": Source(
        images.nlvr,
        "NLVR, six orders of the boxes for each sentence",
        {
            "shares": "divide by sentence, such as train:0.8,validation:0.1,test:0.1",
            "seed": "of that division; default 0",
            "orders": "of the boxes, 1 to 6; all are one sentence, so 1 for a test with an interval",
        },
    ),
    "nlvr2": Source(images.nlvr2, "NLVR2, two photographs a sentence"),
    "coco-caption": Source(images.coco_caption, "COCO captions in Karpathy's split"),
    "tvqa": Source(videos.tvqa, "TVQA with subtitles"),
    "how2qa": Source(videos.how2qa, "How2QA with subtitles; VALUE's files or the authors' CSV"),
    "tvc": Source(videos.tvc, "TVC with subtitles"),
    "yc2c": Source(videos.yc2c, "YC2C with subtitles; VALUE's files or YouCook2's"),
    "commonsense": Source(commonsense.commonsense, "the eight commonsense sets and commonsense_170k"),
    "cloze": Source(commonsense.cloze, "the same eight sets in lm-eval's cloze form"),
}
