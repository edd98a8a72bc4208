"""LLaVA-1.5's projector pretraining captions (LAION, CC, SBU; by BLIP), 558,128 of them, to LLaVA's JSON lines.

Files: `blip_laion_cc_sbu_558k.json` (about 180 MB) and `images.zip` (about 27 GB, unpacks to `00000/000000010.jpg`
and the like) from the Hugging Face data set `liuhaotian/LLaVA-Pretrain`. Licence: that of the pictures' sets
(CC-3M, LAION, SBU), captions BLIP's; for research.

Quirks: the request varies ("Render a clear and concise summary of the photo.\\n<image>", with `<image>` before or
after), but the `plain` template drops it; one turn each. `blip_laion_cc_sbu_558k_meta.json` beside it is not
needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from dora_vl.sources.llava_json import llava_split
from dora_vl.sources.published import Split, some_present

FILE = "blip_laion_cc_sbu_558k.json"


def splits(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """The captions, as training split."""
    file = some_present(folder, [FILE])[FILE]
    yield llava_split(file, task="llava_pretrain", name="train", published_rows=558_128)
