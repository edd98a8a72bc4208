"""The same little pictures and questions as people write them: a file for each format and container."""

import csv
import io
import json
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import datasets
from PIL import Image

from tests.training.tiny_run import COLOURS


@dataclass(frozen=True)
class Item:
    """One question about one picture."""

    id: str
    picture: str
    content: bytes
    question: str
    answer: str


def items(count: int = 16) -> list[Item]:
    """Pictures of four colours, each with a question and an answer of its own length."""
    names = list(COLOURS)
    samples = []
    for index in range(count):
        colour = names[index % len(names)]
        file = io.BytesIO()
        shade = tuple(min(255, part + index) for part in COLOURS[colour])
        Image.new("RGB", (10 + index % 3, 12), shade).save(file, "PNG")
        question = "Say the colour," + " it" * (index % 5) + '\nplease "now".'
        samples.append(Item(f"n{index}", f"{index}.png", file.getvalue(), question, colour + " it" * (index % 3)))
    return samples


def lines(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_pictures(folder: Path, samples: list[Item]) -> None:
    for item in samples:
        (folder / item.picture).write_bytes(item.content)


def write_llava(folder: Path, samples: list[Item]) -> Path:
    """LLaVA's own JSON, what the others are held to."""
    rows = []
    for item in samples:
        turns = (("human", f"<image>\n{item.question}"), ("gpt", item.answer))
        conversation = [{"from": who, "value": text} for who, text in turns]
        rows.append({"id": item.id, "image": item.picture, "conversations": conversation})
    (folder / "llava.json").write_text(json.dumps(rows))
    return folder / "llava.json"


def write_messages(folder: Path, samples: list[Item]) -> Path:
    rows: list[dict[str, object]] = []
    for item in samples:
        parts = [{"type": "image", "image": item.picture}, {"type": "text", "text": item.question}]
        answer = [{"type": "text", "text": item.answer}]
        messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
        rows.append({"id": item.id, "messages": messages})
    return lines(folder / "messages.jsonl", rows)


def write_sharegpt(folder: Path, samples: list[Item]) -> Path:
    """ShareGPT with `images`, the place of the picture not said."""
    rows: list[dict[str, object]] = []
    for item in samples:
        conversation = [{"from": "human", "value": item.question}, {"from": "gpt", "value": item.answer}]
        rows.append({"id": item.id, "images": [item.picture], "conversations": conversation})
    return lines(folder / "sharegpt.jsonl", rows)


def write_csv(folder: Path, samples: list[Item], *, delimiter: str = ",") -> Path:
    path = folder / ("table.csv" if delimiter == "," else "table.tsv")
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, delimiter=delimiter)
        table.writerow(["id", "image", "question", "answer"])
        table.writerows([item.id, item.picture, item.question, item.answer] for item in samples)
    return path


def write_tsv(folder: Path, samples: list[Item]) -> Path:
    return write_csv(folder, samples, delimiter="\t")


def as_dataset(samples: list[Item]) -> datasets.Dataset:
    """Hugging Face's form: images of bytes in an `Image` column."""
    columns = {
        "id": [item.id for item in samples],
        "image": [{"bytes": item.content, "path": None} for item in samples],
        "question": [item.question for item in samples],
        "answer": [item.answer for item in samples],
    }
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


def write_parquet(folder: Path, samples: list[Item]) -> Path:
    as_dataset(samples).to_parquet(folder / "table.parquet")
    return folder / "table.parquet"


def write_saved(folder: Path, samples: list[Item]) -> Path:
    """A folder that `datasets` saved, in two shards."""
    as_dataset(samples).save_to_disk(str(folder / "saved"), num_shards=2)
    return folder / "saved"


def write_webdataset(folder: Path, samples: list[Item]) -> Path:
    with tarfile.open(folder / "shard.tar", "w") as archive:
        for item in samples:
            metadata = json.dumps({"id": item.id, "question": item.question, "answer": item.answer}).encode()
            for ending, content in (("png", item.content), ("json", metadata)):
                member = tarfile.TarInfo(f"train/{item.id}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return folder / "shard.tar"


WRITERS: Mapping[str, Callable[[Path, list[Item]], Path]] = {
    "llava": write_llava,
    "messages": write_messages,
    "sharegpt": write_sharegpt,
    "csv": write_csv,
    "tsv": write_tsv,
    "parquet": write_parquet,
    "saved": write_saved,
    "webdataset": write_webdataset,
}
HOLD_PICTURES = ("parquet", "saved", "webdataset")
