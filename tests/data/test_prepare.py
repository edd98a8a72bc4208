"""A split is made once, in the publisher's order; each source's rows become the records written out by hand."""

import base64
import errno
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dora_vl.cli import main
from dora_vl.data import prepare as prepare_module
from dora_vl.data.benchmarks.fields import Raw, Row, Split
from dora_vl.data.benchmarks.images import coco_caption_row, read_shares, share_of
from dora_vl.data.benchmarks.table import SOURCES
from dora_vl.data.benchmarks.videos import Subtitles, parse_srt, span, subtitles_of
from dora_vl.data.example import Answer, Example, iterate_examples
from dora_vl.errors import BadSample, UserError
from dora_vl.files import locked
from tests.data.published import EXPECTED, FIXTURE_NAMES, FIXTURES, SOURCE_OF, copied, manifest, prepared
from tests.shared_data import shared


def row(number: int, **changes: object) -> dict[str, object]:
    conversations = [{"from": "human", "value": f"Question {number}?"}, {"from": "gpt", "value": f"Answer {number}."}]
    return {"id": f"r{number}", "conversations": conversations, **changes}


def published(path: Path, count: int, **changed: dict[str, object]) -> Path:
    rows = [row(number, **changed.get(f"r{number}", {})) for number in range(count)]
    path.write_text(json.dumps(rows))
    return path


def prepare_llava(file: Path, to: Path, *options: str) -> list[str]:
    return prepared("llava-json", file, to, *options)


def ids(path: Path) -> list[str]:
    return [json.loads(line)["id"] for line in path.read_text().splitlines()]


def left_over(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".prepare.lock")


def test_the_manifest_accounts_for_every_row(tmp_path: Path) -> None:
    no_answer = {"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": " "}]}
    file = published(tmp_path / "a.json", 9, r3=no_answer, r5={"id": "r1"}, r7=no_answer)
    lines = prepare_llava(file, tmp_path / "records")
    content = manifest(tmp_path / "records" / "llava", "a")
    assert ids(tmp_path / "records" / "llava" / "a.jsonl") == ["r0", "r1", "r2", "r4", "r1#2", "r6", "r8"]
    assert (content["rows"], content["written"], content["renamed_ids"], content["dropped"]) == (9, 7, 1, 2)
    ((reason, count),) = content["reasons"].items()
    dropped = [{"row": row, "id": name, "reason": reason} for row, name in ((4, "r3"), (8, "r7"))]
    assert (count, content["dropped_rows"]) == (2, dropped)
    assert content["inputs"][0]["file"] == "a.json"
    assert content["inputs"][0]["bytes"] == file.stat().st_size
    assert lines[0].endswith("7 records of 9 rows, written")


def test_a_finished_split_is_left_alone_until_something_changes(tmp_path: Path) -> None:
    file = published(tmp_path / "a.json", 5)
    records = tmp_path / "records"
    prepare_llava(file, records)
    path = records / "llava" / "a.jsonl"
    before = path.stat().st_mtime_ns
    assert prepare_llava(file, records) == [f"{path}: 5 records of 5 rows, already there"]
    os.utime(file)  # another time, the same content
    assert "already there" in prepare_llava(file, records)[0]
    assert path.stat().st_mtime_ns == before
    path.write_text(path.read_text()[:-10])
    assert prepare_llava(file, records)[0].endswith("written")
    assert prepare_llava(file, records, "--limit", "3")[0].endswith("3 records of 3 rows, written")
    published(file, 6)
    assert prepare_llava(file, records)[0].endswith("6 records of 6 rows, written")


def test_what_stops_a_split_leaves_nothing_that_looks_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = published(tmp_path / "a.json", 2000)
    add, calls = prepare_module.Records.add, itertools.count()

    def full(records: prepare_module.Records, row: Raw) -> None:
        if next(calls) == 1500:
            raise OSError(errno.ENOSPC, "No space left on device")
        add(records, row)

    monkeypatch.setattr(prepare_module.Records, "add", full)
    with pytest.raises(UserError):
        prepare_llava(file, tmp_path / "records")
    assert left_over(tmp_path / "records" / "llava") == []
    monkeypatch.undo()
    assert prepare_llava(file, tmp_path / "records")[0].endswith("2,000 records of 2,000 rows, written")
    assert left_over(tmp_path / "records" / "llava") == ["a.jsonl", "manifest.json"]


@pytest.mark.parametrize(
    "words",
    [
        ["popee", "--from", "."],
        ["pope", "--from", ".", "--set", "seed=1"],
        ["nlvr", "--from", str(FIXTURES / "nlvr"), "--set", "orders=12"],
        ["pope", "--from", ".", "--limit", "0"],
        ["llava-json", "--from", "a.json", "--splits", "a,test"],
        ["llava-json", "--from", "a.json", "--to", "a.json"],
    ],
)
def test_the_command_exits_with_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    published(Path("a.json"), 2)
    with pytest.raises(SystemExit) as left:
        main(["prepare", *words])
    assert left.value.code == 2


def split_of(rows: Callable[[], Iterator[Raw]], convert: Callable[[Raw], Any]) -> Split:
    return Split(task="t", name="s", inputs=(), rows=rows, convert=convert)


def numbers() -> Iterator[Raw]:
    yield from ({"n": number} for number in range(3))


def run(split: Split, folder: Path) -> prepare_module.Prepared:
    return prepare_module.prepare_split(split, folder, source="own", limit=None)


def test_ids_that_a_publisher_repeats_are_refused(tmp_path: Path) -> None:
    split = split_of(numbers, lambda raw: Example(id=str(raw["n"] % 2), question="q", answers=(Answer(text="a"),)))
    with pytest.raises(UserError):
        run(split, tmp_path)
    assert left_over(tmp_path) == []


def test_a_row_that_json_cannot_hold_is_dropped_with_its_reason(tmp_path: Path) -> None:
    split = split_of(numbers, lambda raw: Example(id=str(raw["n"]), question="half \ud83d" if raw["n"] == 1 else "q"))
    prepared = run(split, tmp_path)
    assert [example.id for example in iterate_examples(prepared.path)] == ["0", "2"]
    assert prepared.entry["dropped_rows"][0]["id"] == "1"
    assert "surrogates not allowed" in prepared.entry["dropped_rows"][0]["reason"]


def test_a_file_of_other_rows_is_refused_long_before_its_end(tmp_path: Path) -> None:
    read = 0

    def endless() -> Iterator[Raw]:
        nonlocal read
        while True:
            read += 1
            yield {"n": read}

    def unusable(raw: Raw) -> Example:
        raise BadSample(str(raw["n"]), "it is no question")

    with pytest.raises(UserError):
        run(split_of(endless, unusable), tmp_path)
    assert read < 3000


def test_two_commands_do_not_write_one_folder(tmp_path: Path) -> None:
    folder = tmp_path / "records" / "llava"
    folder.mkdir(parents=True)
    with locked(folder / ".prepare.lock"), pytest.raises(UserError):
        prepare_llava(published(tmp_path / "a.json", 2), tmp_path / "records")


@pytest.fixture(autouse=True)
def no_flushing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole files are waited for on disk, which takes longer than all else here."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.mark.parametrize("fixture", FIXTURE_NAMES)
def test_rows_become_the_expected_records(tmp_path: Path, fixture: str) -> None:
    entries = [entry for entry in EXPECTED if entry["fixture"] == fixture]
    prepared(SOURCE_OF[fixture], FIXTURES / fixture, tmp_path)
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("*/*.jsonl"))
    assert files == sorted(f"{entry['task']}/{entry['split']}.jsonl" for entry in entries)
    for entry in entries:
        path = tmp_path / entry["task"] / f"{entry['split']}.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines()
        assert json.loads(lines[1]) == entry["second"]
        made_of = manifest(path.parent, entry["split"])
        counts = (made_of["rows"], made_of["written"], made_of["dropped"], len(lines))
        assert counts == (entry["rows"], entry["records"], entry["dropped"], entry["records"])
        assert len(made_of["dropped_rows"]) == entry["dropped"] == sum(made_of["reasons"].values())


def test_sources_are_read_without_transformers_and_datasets() -> None:
    code = "import sys\nfor name in ('transformers', 'datasets'):\n    sys.modules[name] = None\n"
    subprocess.run([sys.executable, "-c", code + "import dora_vl.data.prepare"], check=True)


@pytest.mark.parametrize("source", sorted(SOURCES))
def test_an_empty_folder_is_refused(tmp_path: Path, source: str) -> None:
    with pytest.raises(UserError):
        prepared(source, tmp_path, tmp_path / "records")


def test_a_row_that_stands_twice_under_two_ids_is_counted(tmp_path: Path) -> None:
    folder = copied("how2qa-csv", tmp_path)
    path = folder / "how2QA_val_release.csv"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.rstrip("\n") + "\n" + text.split("\n", 1)[0] + "\n")
    prepared("how2qa", folder, tmp_path / "records")
    assert manifest(tmp_path / "records" / "how2qa", "validation")["repeated_records"] == 1


MMBENCH = "mmbench_dev_20230712.tsv"
BEGINS_AS_PNG = "iVBORw0KGgo"


def cut_picture(text: str) -> str:
    """A table that ends inside a picture, whose row goes on: base64 that ends well."""
    position = text.rindex(BEGINS_AS_PNG) + 40
    return text[:position] + text[text.index("\tsynthetic") :].partition("\n")[0]


def damaged_picture(text: str) -> str:
    encoded = next(cell for cell in text.split("\t") if cell.startswith(BEGINS_AS_PNG))
    data = bytearray(base64.b64decode(encoded))
    data[45:49] = b"\xff\xff\xff\xff"
    return text.replace(encoded, base64.b64encode(data).decode(), 1)


@pytest.mark.parametrize(
    "damage", [cut_picture, damaged_picture, lambda text: text.replace("\tA\tattribute", "\tAB\tattribute", 1)]
)
def test_a_damaged_row_of_mmbench_is_dropped_and_a_damaged_table_refused(tmp_path, damage) -> None:
    folder = copied("mmbench", tmp_path)
    path = folder / MMBENCH
    path.write_text(damage(path.read_text(encoding="utf-8")), encoding="utf-8")
    prepared("mmbench", folder, tmp_path / "records")
    assert manifest(tmp_path / "records" / "mmbench", "validation")["dropped"] == 1
    for picture in (tmp_path / "records").glob("*/media/*"):
        assert picture.read_bytes().endswith(b"IEND\xaeB`\x82")
    whole = (FIXTURES / "mmbench" / MMBENCH).read_text(encoding="utf-8")
    for refused in (whole[: whole.rindex(BEGINS_AS_PNG) + 40], whole.replace("\tanswer\t", "\tcomments\t", 1)):
        path.write_text(refused, encoding="utf-8")
        with pytest.raises(UserError):
            prepared("mmbench", folder, tmp_path / "none")
    assert not list((tmp_path / "none").rglob("validation.jsonl"))


ANNOTATIONS = "v2_mscoco_val2014_annotations.json"


@pytest.mark.parametrize(
    ("fixture", "file", "rows_of", "answers"),
    [
        ("vqav2", ANNOTATIONS, "annotations", [{"answer": " "}] * 10),
        ("vizwiz", "Annotations/val.json", None, [{"answer": "yes"}] * 9),
        ("textvqa", "TextVQA_0.5.1_val.json", "data", [""] * 10),
        ("vqav2-karpathy", ANNOTATIONS, "annotations", []),
    ],
)
def test_a_row_without_answers_is_dropped(tmp_path, fixture, file, rows_of, answers) -> None:
    before = dropped(FIXTURES / fixture, tmp_path / "whole")
    folder = copied(fixture, tmp_path)
    content = json.loads((folder / file).read_text(encoding="utf-8"))
    (content if rows_of is None else content[rows_of])[1]["answers"] = answers
    (folder / file).write_text(json.dumps(content))
    assert dropped(folder, tmp_path / "records", fixture) == before + 1


def dropped(folder: Path, records: Path, fixture: str = "") -> int:
    """How many rows of a fixture's files are not used."""
    prepared(SOURCE_OF[fixture or folder.name], folder, records)
    splits = (json.loads(path.read_text())["splits"] for path in records.glob("*/manifest.json"))
    return sum(split["dropped"] for of_task in splits for split in of_task.values())


def test_a_question_without_an_annotation_and_one_without_a_picture_are_dropped(tmp_path: Path) -> None:
    folder = copied("vqav2", tmp_path)
    path = folder / "v2_mscoco_val2014_annotations.json"
    content = json.loads(path.read_text())
    lost = content["annotations"].pop(2)
    path.write_text(json.dumps(content))
    prepared("vqav2", folder, tmp_path / "records")
    (row,) = manifest(tmp_path / "records" / "vqav2", "validation")["dropped_rows"]
    assert row["id"] == str(lost["question_id"])
    folder = copied("vqav2-karpathy", tmp_path / "karpathy")
    path = folder / "dataset_coco.json"
    content = json.loads(path.read_text())
    content["images"].pop()
    path.write_text(json.dumps(content))
    prepared("vqav2-karpathy", folder, tmp_path / "records")
    assert manifest(tmp_path / "records" / "vqav2_karpathy", "validation")["dropped"] > 0


def test_karpathys_split_of_the_official_files_is_by_picture_and_limited_to_the_known_answers(tmp_path: Path) -> None:
    prepared("vqav2-karpathy", FIXTURES / "vqav2-karpathy", tmp_path)
    of_split = {path.stem: list(iterate_examples(path)) for path in (tmp_path / "vqav2_karpathy").glob("*.jsonl")}
    ids = {name: [example.extra["image_id"] for example in examples] for name, examples in of_split.items()}
    assert ids == {"train": [*range(100, 110), *range(600, 605)], "validation": [605, 606, 607], "test": [608, 609]}
    train = {answer.text for example in of_split["train"] for answer in example.answers}
    assert not train & {"teal", "no idea"}  # not in trainval_ans2label.json


def test_published_ids_that_repeat_are_numbered_and_turns_stay_as_they_are(tmp_path: Path) -> None:
    prepared("llava-mix665k", FIXTURES / "llava-mix665k", tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "llava_mix665k" / "train.jsonl").read_text().splitlines()]
    ids = ["000000033471", "000000033471#2", "wNBG8Gp_0", "2373417", "ocr/0001", "gpt_first", "text/0009"]
    assert [row["id"] for row in rows] == [*ids, "000000033471#3"]
    published = json.loads((FIXTURES / "llava-mix665k" / "llava_v1_5_mix665k.json").read_text(encoding="utf-8"))
    kept = [row for row in published if row["id"] not in {"empty_answer", "two_images_one_named"}]
    assert [row["conversations"] for row in rows] == [row["conversations"] for row in kept]
    rows = manifest(tmp_path / "llava_mix665k", "train")["dropped_rows"]
    assert [(row["row"], row["id"]) for row in rows] == [(7, "empty_answer"), (8, "two_images_one_named")]


def test_the_versions_of_popes_labels_are_told_apart(tmp_path: Path) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    row = {"image": "COCO_val2014_000000310196.jpg", "text": "Is there a dog in the imange?", "label": "no"}
    for category, count in (("random", 2910), ("popular", 3000), ("adversarial", 3000)):
        lines = (json.dumps({"question_id": number, **row}) for number in range(1, count + 1))
        (folder / f"coco_pope_{category}.json").write_text("\n".join(lines))
    prepared("pope", folder, tmp_path)
    split = manifest(tmp_path / "pope", "test")
    assert (split["written"], split["notes"]["label_version"]) == (8910, "e3e3926 (LLaVA-1.5's)")


def test_the_documented_folder_of_llm_adapters_becomes_cloze_records(tmp_path, caplog) -> None:
    """Its BoolQ has no passage, and one with passages may lie beside it."""

    def write(name: str, row: dict[str, object]) -> Path:
        path = tmp_path / "commonsense" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([row]))
        return path

    without = "Please answer the question with true or false, question: is it?\n\nAnswer format: true/false"
    left_out = write("boolq/test.json", {"instruction": without, "input": "", "output": "x", "answer": "true"})
    arc = "Please choose the correct answer: Which?\n\nAnswer1: ice Answer2: fire\n\nAnswer format: answer1/answer2"
    for task in ("ARC-Easy", "piqa"):
        write(f"{task}/test.json", {"instruction": arc, "input": "", "output": "x", "answer": "answer2"})
    lines = prepared("cloze", tmp_path / "commonsense", tmp_path / "cloze")
    assert len(lines) == 2
    assert str(left_out) in caplog.text
    (example,) = iterate_examples(tmp_path / "cloze" / "ARC-Easy" / "test.jsonl")
    assert (example.question, example.extra["endings"]) == ("Question: Which?\nAnswer:", ["ice", "fire"])
    write("boolq/test.jsonl", {"question": "is it", "passage": "It is.", "answer": True})
    prepared("cloze", tmp_path / "commonsense", tmp_path / "cloze")
    (example,) = iterate_examples(tmp_path / "cloze" / "boolq" / "test.jsonl")
    assert (example.question, example.answers[0].text) == ("It is.\nQuestion: is it?\nAnswer:", "yes")


@pytest.mark.parametrize(
    ("content", "cue"),
    [
        ("1\n00:00:01,500 --> 00:00:02,000\nTwo\n lines.\n", ("Two lines.", 1.5, 2.0)),
        ("01:00:00.250 --> 99:59:59,999\r\nHello.\r\n\r\n", ("Hello.", 3600.25, 359_999.999)),
        ("7\nsoon --> later\nHello.", ("soon --> later Hello.", None, None)),
    ],
)
def test_cues_are_read_in_any_spelling(content: str, cue: tuple[str, float | None, float | None]) -> None:
    assert [tuple(entry.values()) for entry in parse_srt(content)] == [cue]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("20.16-25.12", (20.16, 25.12)),
        ([0, 2.29], (0.0, 2.29)),
        ("nan-nan", (None, None)),
        ("NaN-NaN", (None, None)),
        (None, (None, None)),
        ("5-5", (5.0, 5.0)),
    ],
)
def test_spans(value: object, expected: tuple[float | None, float | None]) -> None:
    assert span(value) == expected


@pytest.mark.parametrize("value", ["5", "x-7", "7-5", [1, "x"], [1, 2, 3], [2, 1], {"0": 1, "1": 2}, 7, True, "nan-1"])
def test_a_span_that_cannot_be_read_is_no_question_about_the_whole_video(value: object) -> None:
    with pytest.raises(BadSample):
        span(value)


def test_subtitles_of_no_words_are_kept_and_entries_without_text_are_not() -> None:
    """VL-Adapter joins all of the file's texts by spaces, so an empty one is a second space in its prompt."""
    cues = [{"text": "well", "start": 1, "end": 2}, {"text": " "}, {"start": 3}, {"text": None}, {"text": " no "}]
    lines = subtitles_of(Row({"sub": cues}))
    assert [(line.text, line.start_seconds) for line in lines] == [("well", 1.0), ("", None), ("no", None)]


def test_a_caption_keeps_what_is_inside_it() -> None:
    sentences = [{"raw": "\nA dog  runs.\nFast. "}, {"raw": " \n"}, {"raw": "A\tdog"}]
    row = {"cocoid": 7, "split": "test", "filepath": "val2014", "filename": "7.jpg", "sentences": sentences}
    assert [answer.text for answer in coco_caption_row(row).answers] == ["A dog  runs.\nFast.", "A\tdog"]


def test_subtitles_of_a_folder_of_files(tmp_path: Path) -> None:
    (tmp_path / "tvqa_subtitles").mkdir()
    (tmp_path / "tvqa_subtitles" / "a.srt").write_bytes("1\n00:00:01,000 --> 00:00:02,000\ncaf\xe9\n".encode("latin-1"))
    subtitles = Subtitles(tmp_path, ["tv_subtitles.jsonl", "tvqa_subtitles"])
    rows = list(subtitles.joined([{"vid_name": "a"}, {"vid_name": "b"}]))
    assert [[subtitle.text for subtitle in subtitles_of(Row(row))] for row in rows] == [["caf\xe9"], []]


SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}


def test_shares_are_about_as_large_as_asked_and_spacing_and_case_do_not_count() -> None:
    assert len({share_of(sentence, SHARES, "0") for sentence in ("A  b c", " a B C\n")}) == 1
    names = [share_of(f"There are {number} yellow boxes", SHARES, "0") for number in range(4000)]
    assert {name: names.count(name) / 4000 for name in SHARES} == pytest.approx(SHARES, abs=0.02)
    assert names != [share_of(f"There are {number} yellow boxes", SHARES, "1") for number in range(4000)]


@pytest.mark.parametrize(
    "text", ["train", "train:0.8", "train:0.8,test:0.3", "train:x,test:1", "a b:1", "train:-1,test:2"]
)
def test_shares_that_make_no_sense(text: str) -> None:
    with pytest.raises(UserError):
        read_shares(text)


def test_a_share_without_a_sentence_is_refused(tmp_path: Path) -> None:
    rows = [
        {"sentence": f"There are {number // 2} boxes", "label": "true", "identifier": f"{number}-0", "directory": "0"}
        for number in range(6)
    ]
    (tmp_path / "dev.json").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError):
        prepared("nlvr", tmp_path, tmp_path / "records", "--set", "shares=train:0.999,validation:0.001")
    assert [path.name for path in (tmp_path / "records" / "nlvr").glob("*.jsonl")] == ["train.jsonl"]
    prepared("nlvr", tmp_path, tmp_path / "records", "--set", "shares=train:0.5,validation:0.5", "--limit", "1")


# Real published files convert without one unexplained row: their counts in full, of the others samples of 40.


COUNTS = {
    ("commonsense", "commonsense"): {
        "ARC-Challenge/test": 1172,
        "ARC-Challenge/train": 1119,
        "ARC-Easy/test": 2376,
        "ARC-Easy/train": 2251,
        "openbookqa/test": 500,
        "openbookqa/train": 4957,
        "boolq/test": 40,
        "boolq/train": 40,
        "piqa/test": 40,
        "social_i_qa/test": 40,
        "winogrande/test": 40,
    },
    ("nlvr", "nlvr"): {"nlvr/validation": 5934},
    ("nlvr2", "nlvr2"): {"nlvr2/validation": 6982},
    ("pope", "pope"): {"pope/test": 9000},
    ("how2qa", "value"): {"how2qa/validation": 3115},
    ("yc2c", "value"): {"yc2c/validation": 3492},
}


@pytest.mark.slow
@pytest.mark.parametrize(("source", "folder"), sorted(COUNTS))
def test_counts_are_those_of_the_files(tmp_path: Path, source: str, folder: str) -> None:
    prepared(source, shared(folder), tmp_path)
    counts: dict[str, int] = {}
    for path in tmp_path.glob("*/manifest.json"):
        for name, split in json.loads(path.read_text(encoding="utf-8"))["splits"].items():
            counts[f"{path.parent.name}/{name}"] = split["written"]
            assert split["dropped"] == 0, split["dropped_rows"][:3]
            assert split["published_rows"] in {None, split["rows"]}
            assert sum(1 for _ in iterate_examples(path.parent / split["file"])) == split["written"]
    assert counts == COUNTS[source, folder]
