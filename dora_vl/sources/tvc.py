"""TVC (Lei et al., 2020): descriptions of moments in television clips, with subtitles.

Files: `tvc_train_release.jsonl`, `tvc_val_release.jsonl` (github.com/jayleicn/TVCaption; 86,603 clips with about
two descriptions each, 10,895 with four) and `tvc_test_public_release.jsonl` (VALUE's `tvc_test_release.jsonl`;
about 10,840, descriptions kept back). Subtitles as for TVQA. Licence: MIT (annotations); the clips are the
broadcasters'.

Quirks: one record a clip, with all its descriptions: official scoring groups references by `clip_id`, and the
reference code, which treats each description as an item of its own, generates for every validation clip four times.
`ts` is a list here, text in TVQA; VL-BART's prompt shows it as Python does, "([16.48, 33.87])". VALUE's table gives
15,253 test clips, copied from TVQA.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from dora_vl.sources.published import Split, some_present
from dora_vl.sources.subtitles import Subtitles
from dora_vl.sources.tvqa import SUBTITLES
from dora_vl.sources.video_captions import caption_split

FILES = {
    "tvc_train_release.jsonl": ("train", 86_603),
    "tvc_val_release.jsonl": ("validation", 10_895),
    "tvc_test_public_release.jsonl": ("test_public", None),
    "tvc_test_release.jsonl": ("test", None),
}


def splits(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """The splits that are there."""
    subtitles = Subtitles(folder, SUBTITLES)
    for file, path in some_present(folder, list(FILES)).items():
        name, size = FILES[file]
        yield caption_split("tvc", name, path, subtitles, size)
