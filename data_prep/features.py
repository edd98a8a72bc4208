"""Computes features of pictures and videos with a frozen vision tower and writes them as safetensors shards.

What a VL-BART reads, for example VL-Adapter's picture features (CLIP RN101's 7x7 grid, pictures squashed to 224 x 224):

  python -m data_prep.features --root coco/train2014 --to features/coco --library open_clip --name RN101 \\
      --weights openai

and VALUE's video features (CLIP ViT-B/32's embedding, one frame every 1.5 s, 512 numbers, not normalised):

  python -m data_prep.features --root videos --records records/tvqa/train.jsonl --to features/tv --library open_clip \\
      --name ViT-B-32-quickgelu --weights openai --kept pooled --aspect square --every-seconds 1.5

Without --records all pictures and videos under --root are taken. A feature's id is its file's name without the suffix,
or the name that a record gives to its part of a file.
Started again it goes on where it stopped; what was computed is written also when it is interrupted (Ctrl-C, SIGTERM).
Several processes share the work when they are started with RANK and WORLD_SIZE set, as `deepspeed` and `torchrun` do,
or with --part. Files that cannot be read are named in `skipped-<part>.jsonl`.
"""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dora_vl.backbones.feature_encoder import FeatureEncoder, FeatureSettings, MediaDataset, Medium, computed
from dora_vl.backbones.shards import HASH
from dora_vl.backbones.specs import TowerSpec
from dora_vl.backbones.vision_store import FeatureWriter, OwnFeatures, clip_of_features, describe_part
from dora_vl.data.example import Clip, iterate_examples
from dora_vl.data.pictures import PICTURE_ENDINGS, VIDEO_ENDINGS, VIDEO_SECONDS, MediaFolder
from dora_vl.data.samples import BadSampleLedger, write_skipped
from dora_vl.data.video import VideoReader
from dora_vl.errors import (
    BadSample,
    UserError,
    ended_by_signals,
    exit_on_user_error,
    number_between,
    one_line,
    positive_int,
    short_text,
)

PICTURES, VIDEOS = ({f".{ending}" for ending in endings} for endings in (PICTURE_ENDINGS, VIDEO_ENDINGS))


def media_in_records(files: Iterable[Path]) -> list[Medium]:
    """Lists every picture and clip that the records name, each once."""
    media: list[Medium] = []
    for file in files:
        for example in iterate_examples(file):
            media += [Medium(Path(path).stem, path) for path in example.images]
            if (clip := clip_of_features(example)) is not None:
                media.append(Medium(Path(clip[0]).stem, clip[1].path, clip[1]))
    return _unique(media)


def media_under(root: Path) -> list[Medium]:
    """Lists every picture and video below a folder."""
    media: list[Medium] = []
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        relative = path.relative_to(root).as_posix()
        if path.suffix.lower() in PICTURES:
            media.append(Medium(path.stem, relative))
        elif path.suffix.lower() in VIDEOS:
            media.append(Medium(path.stem, relative, Clip(path=relative)))
    if not media:
        raise UserError(f"{root} holds no picture and no video")
    return _unique(media)


def _unique(media: Iterable[Medium]) -> list[Medium]:
    by_name: dict[str, Medium] = {}
    for medium in media:
        before = by_name.setdefault(medium.name, medium)
        if before != medium:
            paths = f"{before.clip or before.path} and {medium.clip or medium.path}"
            raise UserError(f"{paths} would have one name, {medium.name!r}; rename one of them")
    return list(by_name.values())


def missing(media: Sequence[Medium], to: Path) -> list[Medium]:
    """Keeps the media whose features the folder lacks."""
    done = OwnFeatures(to)
    for medium in media:
        stored = done.part(medium.name) if medium.name in done.places else None
        if stored is not None and stored != medium.part:
            parts = f"{describe_part(stored)}, not of {describe_part(medium.part)}"
            raise UserError(f"{to} holds features of {medium.name!r} of {parts}; name another folder")
    return [medium for medium in media if medium.name not in done.places]


def compute(media: Sequence[Medium], encoder: FeatureEncoder, options: argparse.Namespace) -> BadSampleLedger:
    """Computes the features this part lacks; returns what could not be read."""
    (part, parts), to = options.part, options.to
    total = max(1, len(media[part::parts]))
    ledger = BadSampleLedger(max_bad_share=options.max_bad_share, total_samples=total, source=str(options.root))

    def encode(frames: Tensor) -> Tensor:
        return encoder.sequence(torch.cat([encoder.encode(pixels) for pixels in frames.split(options.batch_size)]))

    # Closed also when it is interrupted: what is computed need not be computed again.
    with (
        FeatureWriter(to, {**asdict(encoder.settings), HASH: encoder.fingerprint()}) as writer,
        VideoReader(limit_seconds=options.limit_seconds) as reader,
    ):
        todo = missing(media[part::parts], to)
        files = MediaDataset(
            media=todo,
            root=MediaFolder(options.root, options.follow_links),
            preparation=encoder.preparation,
            sampling=encoder.settings.sampling,
            reader=reader,
        )
        features = computed(files, encode, workers=options.workers, progress=part == 0)
        try:
            for medium, made in zip(todo, features, strict=True):
                broken = [(medium.path, made.reason)] if isinstance(made, BadSample) else []
                ledger.record(samples=1 - len(broken), skipped=broken)
                ledger.judge()
                if not isinstance(made, BadSample):
                    writer.add(made)
        finally:
            write_skipped(to / f"skipped-{part}.jsonl", ledger.reasons)
    return ledger


def which_part(text: str) -> tuple[int, int]:
    """Parses `3/8` as the fourth of eight parts."""
    number, _, parts = text.partition("/")
    if not (number.isdecimal() and parts.isdecimal() and int(number) < int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a part; 0/4 is the first of four")
    return int(number), int(parts)


def parser() -> argparse.ArgumentParser:
    """Builds the command line."""
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add: Any = command.add_argument
    add("--root", type=Path, required=True, help="folder of the pictures and videos")
    add("--follow-links", action="store_true", help="read files that are links out of the folder")
    add("--records", type=Path, nargs="+", default=[], help="take what these files of records name")
    add("--to", type=Path, required=True, help="folder that gets the shards")
    add("--library", choices=("timm", "open_clip", "transformers"), required=True)
    add("--name", required=True, help="the network's name in that library")
    add("--weights", default="pretrained", help="pretrained, random, an open_clip tag, or a file")
    add("--weights-in-order", action="store_true", help="match a weights file by position instead of by name")
    add("--layer", type=int, help="hidden state, counted from the end")
    add("--grid-pool", type=positive_int, help="rows and columns that the grid is averaged to")
    add("--image-size", type=positive_int, help="pixels along a side")
    add("--kept", choices=("grid", "pooled"), default="grid", help="what is kept of a picture or frame")
    add("--merge", type=positive_int, default=1, help="side of the blocks of cells that become one token each")
    add("--changes", action="store_true", help="each token also holds its change since the frame before")
    add("--aspect", choices=("squash", "square", "pad"), default="squash", help="how a picture becomes a square")
    add("--every-seconds", type=float, help="time between a video's frames; 1.5 if nothing is said")
    add("--frames", type=positive_int, help="number of frames of a video, evenly spread")
    add("--batch-size", type=positive_int, default=64, help="pictures or frames a forward pass at most")
    add("--workers", type=number_between(int, 0), default=1, help="processes that read files")
    add("--limit-seconds", type=float, default=VIDEO_SECONDS, help="longest time for one video")
    add("--max-bad-share", type=float, default=0.05, help="more unreadable files than this share end the run")
    environment = f"{os.environ.get('RANK', '0')}/{os.environ.get('WORLD_SIZE', '1')}"
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher's; LOCAL_RANK says the same
    add("--part", type=which_part, default=environment, help="N/M: the N-th of M processes that share the work")
    return command


@exit_on_user_error
def main(arguments: list[str] | None = None) -> None:
    """Finds the files, computes what is missing and reports what was left out."""
    options = parser().parse_args(arguments)
    media = media_in_records(options.records) if options.records else media_under(options.root)
    gpu = int(os.environ.get("LOCAL_RANK", "0")) % max(1, torch.cuda.device_count())
    device = torch.device("cuda", gpu) if torch.cuda.is_available() else torch.device("cpu")
    if Path(options.weights).is_file():
        options.weights = str(Path(options.weights))
    tower = ("library", "name", "weights", "weights_in_order", "layer", "grid_pool", "image_size")
    of_features = ("kept", "merge", "changes", "aspect", "every_seconds", "frames")
    settings = FeatureSettings(
        tower=TowerSpec(**{name: getattr(options, name) for name in tower}),
        **{name: getattr(options, name) for name in of_features},
    )
    encoder = FeatureEncoder(settings, device=device)
    with ended_by_signals(signal.SIGTERM):  # of launchers and queues
        ledger = compute(media, encoder, options)
    counts = ledger.counts
    print(f"{options.to}: features of {counts.seen - counts.bad:,} more files, {counts.bad:,} left out")
    for name, reason in list(ledger.reasons.items())[:5]:
        print(f"  {short_text(name, 120)}: {one_line(reason)}")


if __name__ == "__main__":
    main()
