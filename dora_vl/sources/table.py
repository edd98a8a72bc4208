"""What `dora-vl prepare` knows: one line for each source, written by hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Source:
    """One published source.

    Its module is imported when it is asked for. It holds `splits(folder, options, records)`, which yields a `Split` for
    each published file that it finds; its docstring says where the files are published and under what licence.

    Attributes:
        options: what `--set NAME=VALUE` may choose, each with its explanation.
    """

    module: str
    summary: str
    options: Mapping[str, str] = field(default_factory=dict)


SOURCES: dict[str, Source] = {
    "llava-mix665k": Source(
        module="dora_vl.sources.llava_mix665k", summary="LLaVA-1.5's 665,298 instruction conversations"
    ),
    "llava-pretrain": Source(
        module="dora_vl.sources.llava_pretrain", summary="LLaVA-1.5's 558,128 pretraining captions"
    ),
    "llava-json": Source(module="dora_vl.sources.llava_json", summary="your own file in LLaVA's form, checked"),
    "vqav2": Source(module="dora_vl.sources.vqav2", summary="VQA v2, official splits"),
    "vqav2-karpathy": Source(
        module="dora_vl.sources.vqav2_karpathy", summary="VQA v2 in Karpathy's split, as in VL-BART"
    ),
    "gqa": Source(module="dora_vl.sources.gqa", summary="GQA, balanced and all; also VL-T5's files"),
    "vizwiz": Source(module="dora_vl.sources.vizwiz", summary="VizWiz-VQA"),
    "textvqa": Source(module="dora_vl.sources.textvqa", summary="TextVQA 0.5.1 with OCR tokens"),
    "scienceqa": Source(module="dora_vl.sources.scienceqa", summary="ScienceQA, with and without pictures"),
    "pope": Source(module="dora_vl.sources.pope", summary="POPE: is there such an object? either label version"),
    "mmbench": Source(module="dora_vl.sources.mmbench", summary="MMBench and MMBench-CN, all rotations"),
    "mme": Source(module="dora_vl.sources.mme", summary="MME, two yes/no questions a picture"),
    "seed": Source(module="dora_vl.sources.seed_bench", summary="SEED-Bench, pictures and videos"),
    "llava-bench": Source(module="dora_vl.sources.llava_bench", summary="LLaVA-Bench in the wild, for a judge"),
    "mmvet": Source(module="dora_vl.sources.mmvet", summary="MM-Vet, for a judge"),
    "nlvr": Source(
        module="dora_vl.sources.nlvr",
        summary="NLVR, six orders of the boxes for each sentence",
        options={
            "shares": "divide by sentence, such as train:0.8,validation:0.1,test:0.1",
            "seed": "of that division; default 0",
        },
    ),
    "nlvr2": Source(module="dora_vl.sources.nlvr2", summary="NLVR2, two photographs a sentence; also VL-T5's files"),
    "coco-caption": Source(module="dora_vl.sources.coco_caption", summary="COCO captions in Karpathy's split"),
    "tvqa": Source(module="dora_vl.sources.tvqa", summary="TVQA with subtitles"),
    "how2qa": Source(
        module="dora_vl.sources.how2qa", summary="How2QA with subtitles; VALUE's files or the authors' CSV"
    ),
    "tvc": Source(module="dora_vl.sources.tvc", summary="TVC with subtitles"),
    "yc2c": Source(module="dora_vl.sources.yc2c", summary="YC2C with subtitles; VALUE's files or YouCook2's"),
    "commonsense": Source(
        module="dora_vl.sources.commonsense", summary="the eight commonsense sets and commonsense_170k"
    ),
    "hugging-face": Source(
        module="dora_vl.sources.hugging_face",
        summary="any data set of the hub, or parquet, arrow or webdataset shards",
        options={
            "hub": "OWNER/NAME on the hub; without it the shards in --from are read",
            "config": "the set's configuration",
            "revision": "commit or tag of the set",
            "split": "which split, of the hub or by the shards' names; default train",
            "columns": "what is what, such as question:query,answers:label,images:img,extra:a+b",
            "task": "folder under records; default the set's name",
        },
    ),
}
