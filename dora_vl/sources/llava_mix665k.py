"""LLaVA-1.5's visual instruction mix (Liu et al., 2023), 665,298 conversations, to LLaVA's JSON lines.

Files: `llava_v1_5_mix665k.json` (about 1 GB) from the Hugging Face data set `liuhaotian/LLaVA-Instruct-150K`.
Licence: CC BY 4.0, bound to OpenAI's terms of use; each picture set under its own. Pictures, fetched from their
publishers, go into one folder: `coco/train2017`, `gqa/images`, `ocr_vqa/images`, `textvqa/train_images`,
`vg/VG_100K`, `vg/VG_100K_2`.

Quirks:
- ids repeat (one picture stands in several of the mixed sets) and some are numbers: they become text, repeated ones
  get a number ("000000033471#2");
- some 40 thousand conversations of ShareGPT have no picture and an extra key `model`;
- OCR-VQA's pictures are named .jpg throughout, but its publisher serves some as GIF or PNG: rename, do not convert;
- a few turns are empty or begin with "gpt"; an empty answer is dropped and named, a leading answer stays and is
  skipped at reading, as in LLaVA.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from dora_vl.sources.llava_json import llava_split
from dora_vl.sources.published import Split, some_present

FILE = "llava_v1_5_mix665k.json"


def splits(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """The mix, as training split."""
    file = some_present(folder, [FILE])[FILE]
    yield llava_split(file, task="llava_mix665k", name="train", published_rows=665_298)
