"""NLVR (Suhr et al., 2017): is the sentence true of the picture of three boxes? Six orders of the boxes each.

Files, from github.com/lil-lab/nlvr (folder `nlvr`): `{train,dev,test}/{split}.json`, JSON lines of {sentence,
label, identifier, directory, evals, structured_rep} (12,409 / 989 / 989 rows), pictures
`{split}/images/<directory>/<split>-<identifier>-<order>.png`, order 0 to 5. Licence: CC BY 4.0. Each row becomes
six examples, id "<identifier>-<order>".

Quirks:
- the last line has no line break, so `wc -l` counts one less;
- one sentence stands with up to four different pictures ("1572-0" ... "1572-3"), and sentences repeat under other
  numbers. So `shares` divides by the sentence's words: the six orders, the four pictures and the repeated sentences
  stay together, and a test set never holds a sentence that was trained on;
- labels are "true" and "false"; `evals` are the votes of validators, not all of whom agree.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from data_prep.fields import filled, identifier, if_text, text
from data_prep.published import Progress, Raw, Split, json_rows, some_present
from dora_vl.data.examples import Answer, Example
from dora_vl.errors import BadSample, UserError, shown, shown_text

ORDERS = 6
SIZES = {"train": 12_409, "dev": 989, "test": 989}
SPLITS = {"train": "train", "dev": "validation", "test": "test"}


def splits(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """The publisher's splits, or with `shares` the rows of all files divided anew by sentence."""
    names = [place for part in SIZES for place in (f"{part}/{part}.json", f"{part}.json")]
    found = {Path(name).stem: (name, path) for name, path in some_present(folder, names).items()}
    nested = {part: "/" in name for part, (name, _) in found.items()}
    files = {part: path for part, (_, path) in found.items()}
    if "shares" not in options:
        for part, path in files.items():
            rows = partial(_rows, {part: path}, nested)
            yield _split(SPLITS[part], {part: path}, rows, published_rows=SIZES[part])
        return
    shares, seed = read_shares(options["shares"]), options.get("seed", "0")
    for name in shares:
        rows = partial(_shared_rows, files, nested, name, shares, seed)
        yield _split(name, files, rows, settings={"shares": dict(shares), "seed": seed})


def _split(
    name: str,
    files: Mapping[str, Path],
    rows: Callable[[Progress], Iterator[Raw]],
    *,
    published_rows: int | None = None,
    settings: Mapping[str, object] | None = None,
) -> Split:
    return Split(
        task="nlvr",
        name=name,
        inputs=tuple(files.values()),
        rows=rows,
        convert=convert,
        published_rows=published_rows,
        settings=settings or {},
        notes={"records": f"{ORDERS} a row, one for each order of the boxes"},
    )


def read_shares(wanted: str) -> dict[str, float]:
    """`train:0.8,test:0.2` as numbers that make 1.

    Raises:
        UserError: not of that form, or they do not make 1.
    """
    shares: dict[str, float] = {}
    for part in wanted.split(","):
        name, _, value = part.partition(":")
        try:
            shares[name] = float(value)
        except ValueError:
            shares[name] = math.nan
    if not all(name.isidentifier() and 0 < share <= 1 for name, share in shares.items()):
        raise UserError(f"--set shares={shown_text(wanted, 100)}: must be like train:0.8,validation:0.1,test:0.1")
    if not math.isclose(sum(shares.values()), 1.0, abs_tol=1e-6):
        raise UserError(f"--set shares={shown_text(wanted, 100)}: the shares make {sum(shares.values()):g}, not 1")
    return shares


def share_of(sentence: str, shares: Mapping[str, float], seed: str) -> str:
    """The share that a sentence falls to: by its words alone, so wherever it stands again it falls to the same."""
    place = int.from_bytes(hashlib.sha256(f"{seed}\0{words_of(sentence)}".encode()).digest()[:8], "big") / 2**64
    names = list(shares)
    for name in names[:-1]:
        place -= shares[name]
        if place < 0:
            return name
    return names[-1]


def words_of(sentence: str) -> str:
    """What makes two sentences the same: letter case and white space do not count."""
    return " ".join(sentence.lower().split())


def _shared_rows(
    files: Mapping[str, Path],
    nested: Mapping[str, bool],
    name: str,
    shares: Mapping[str, float],
    seed: str,
    progress: Progress,
) -> Iterator[Raw]:
    """The rows of one share; one without a sentence is in each, to be named there as unusable."""
    sentences, caught = set[str](), False
    for row in _rows(files, nested, progress):
        sentence = if_text(row, "sentence")
        if sentence is not None:
            sentences.add(words_of(sentence))
        if sentence is None or share_of(sentence, shares, seed) == name:
            caught = True
            yield row
    if sentences and not caught:
        raise UserError(
            f"--set shares: the share {name} ({shares[name]:g}) catches none of the {len(sentences)} sentences of "
            f"{', '.join(map(str, files.values()))}; make it larger, or take another --set seed=... than {seed}"
        )


def _rows(files: Mapping[str, Path], nested: Mapping[str, bool], progress: Progress) -> Iterator[Raw]:
    for part, path in files.items():
        for row in json_rows(path, progress):
            yield {**row, "part": part, "pictures": f"{part}/images" if nested[part] else "images"}


def convert(raw: Raw) -> list[Example]:
    """The six examples of one row."""
    name = identifier(raw, "identifier")
    label = filled(raw, "label", name)
    if label not in {"true", "false"}:
        raise BadSample(name, f"its label is {shown(label)}, which is neither 'true' nor 'false'")
    sentence, directory = filled(raw, "sentence", name), identifier(raw, "directory", name)
    part, pictures = text(raw, "part", name), text(raw, "pictures", name)
    return [
        Example(
            id=f"{name}-{order}",
            images=(f"{pictures}/{directory}/{part}-{name}-{order}.png",),
            question=sentence,
            answers=(Answer(text=label),),
            extra={"identifier": name, "order": order, "part": part},
        )
        for order in range(ORDERS)
    ]
