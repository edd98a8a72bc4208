"""COCO captions in Karpathy's split: one example a picture, its five (sometimes six or seven) captions as answers.

File: `dataset_coco.json` (see `karpathy`; about 150 MB). 113,287 pictures to train on (train + restval, 566,747
captions), 5,000 for validation, 5,000 for test. Licence: captions CC BY 4.0, pictures under Flickr's terms.
Pictures: COCO's, as `train2014/COCO_train2014_...jpg` and `val2014/...`; restval, val and test are all of val2014.

Quirks: captions are taken raw (`raw`), not the tokens beside them; some begin or end with white space or a line
break, which is taken off as VL-T5 does. What is inside stays; the metrics' tokenizer gets a space for a line break.
VL-BART trains on one item a caption: expand `answers`, do not sample, to have its number of steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from data_prep.fields import filled, integer, rows, text
from data_prep.karpathy import FILE, SPLITS, karpathy_rows
from data_prep.published import Raw, Split, some_present
from dora_vl.data.examples import Answer, Example
from dora_vl.errors import BadSample, shown

SIZES = {"train": 113_287, "validation": 5_000, "test": 5_000}


def splits(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """Training, validation and test."""
    file = some_present(folder, [FILE])[FILE]
    for name, size in SIZES.items():
        yield Split(
            task="coco_caption",
            name=name,
            inputs=(file,),
            rows=partial(karpathy_rows, file, name),
            convert=convert,
            published_rows=size,
        )


def convert(raw: Raw) -> Example:
    """One picture with its captions."""
    image_id = integer(raw, "cocoid")
    sample_id = str(image_id)
    part = text(raw, "split", sample_id)
    if part not in SPLITS:
        raise BadSample(sample_id, f"it is in the part {shown(part)}, which is not one of {', '.join(SPLITS)}")
    captions = [text(sentence, "raw", sample_id).strip() for sentence in rows(raw, "sentences", sample_id)]
    if not any(captions):
        raise BadSample(sample_id, "it has no caption")
    return Example(
        id=sample_id,
        images=(f"{filled(raw, 'filepath', sample_id)}/{filled(raw, 'filename', sample_id)}",),
        answers=tuple(Answer(text=caption) for caption in captions if caption),
        extra={"image_id": image_id, "split": part},
    )
