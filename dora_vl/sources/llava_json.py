"""Any file in LLaVA's form (JSON list or JSON lines), checked row by row and written as JSON lines with unique ids.

A record holds `id`, `image` (a path or a list of paths, relative to one picture folder; absent for text alone) and
`conversations`, a list of {"from": "human" | "gpt", "value": text} with `<image>` where a picture goes. `dora_vl`
trains on such a file as it is; preparing it once finds the unusable rows beforehand. Rows stay as they are, except
that ids become text and a repeated one gets a number ("x#2"): published files repeat them freely.

`--from` takes the file, or a folder of `*.json` and `*.jsonl`; each file becomes `llava/<its name>.jsonl`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from dora_vl.data.examples import JSON
from dora_vl.data.readers.columns import USUAL
from dora_vl.data.turns import read_conversation
from dora_vl.errors import UserError
from dora_vl.sources.fields import UNKNOWN_ID, identifier, optional
from dora_vl.sources.published import Raw, Split, json_rows


def splits(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """One split for each file."""
    files = [folder] if folder.is_file() else sorted([*folder.glob("*.json"), *folder.glob("*.jsonl")])
    if not files:
        raise UserError(f"{folder}: no .json or .jsonl file is in it; --from takes LLaVA's file or its folder")
    names = [file.stem for file in files]
    for file in files:
        if names.count(file.stem) > 1:
            raise UserError(f"{folder}: two files are called {file.stem}; give one of them as --from")
        yield llava_split(file, task="llava", name=file.stem)


def llava_split(file: Path, *, task: str, name: str, published_rows: int | None = None) -> Split:
    """A file of LLaVA's form as one split."""
    return Split(
        task=task,
        name=name,
        inputs=(file,),
        rows=partial(json_rows, file),
        convert=convert,
        published_rows=published_rows,
        repeated_ids="number",
    )


def convert(raw: Raw) -> dict[str, JSON]:
    """The record itself, its id as text, if it can be trained on.

    Raises:
        BadSample: see `turns.read_conversation`; or its id is neither text nor a number.
    """
    sample_id = optional(raw, "id", identifier, UNKNOWN_ID)
    fields = USUAL.resolve(raw, strict=False).fields  # the record keeps all of its columns
    conversation = read_conversation({**fields, "id": sample_id})
    return {"id": conversation.id, **{name: value for name, value in raw.items() if name != "id"}}
