"""MM-Vet (Yu et al., 2023): 218 open questions about 200 pictures, graded by a language model.

Files, from github.com/yuweihao/MM-Vet (release `mm-vet.zip`): `mm-vet.json`, one object, "v1_0" -> question, and
`images/v1_0.png` and so on. Licence: Apache-2.0.

Quirks: an answer may hold several, all needed ("<AND>") or any ("<OR>"): it stays as it is, because the grader's
prompt shows it so. The server takes {id: answer text}.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from dora_vl.data.examples import Answer, Example
from dora_vl.data.records import stream_members
from dora_vl.sources.fields import filled, identifier, kept, texts
from dora_vl.sources.published import Progress, Raw, Split, only_test_split, some_present

FILE = "mm-vet.json"


def splits(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """The one test split."""
    file = some_present(folder, [FILE])[FILE]
    yield only_test_split(file, task="mmvet", rows=_rows, convert=convert, published_rows=218)


def _rows(file: Path, progress: Progress) -> Iterator[Raw]:
    for sample_id, row in stream_members(file, progress=progress):
        yield {**row, "id": sample_id}


def convert(raw: Raw) -> Example:
    """One question."""
    sample_id = identifier(raw, "id")
    return Example(
        id=sample_id,
        images=(f"images/{filled(raw, 'imagename', sample_id)}",),
        question=filled(raw, "question", sample_id),
        answers=(Answer(text=filled(raw, "answer", sample_id)),),
        extra={"capability": list(texts(raw, "capability", sample_id))} | kept(raw, "imagesource", sample_id=sample_id),
    )
