"""Damage in a publisher's files is refused or counted, in one short line, whatever source reads them.

Each source's smallest valid files are damaged one value at a time: ids, and what rows of two files are joined by,
become what JSON can hold beside text and numbers.
"""

from __future__ import annotations

import argparse
import ast
import base64
import json
import os
import shutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from dora_vl.data import prepare as prepare_command
from dora_vl.data.benchmarks.table import SOURCES
from dora_vl.data.example import iterate_examples
from dora_vl.data.text_file import table_rows
from dora_vl.errors import UserError

HERE = Path(__file__).parent
FIXTURES = HERE / "fixtures"
ROOT = HERE.parents[1]
EXPECTED = [json.loads(line) for line in (HERE / "expected_records.jsonl").read_text(encoding="utf-8").splitlines()]
SOURCE_OF = {entry["fixture"]: entry["source"] for entry in EXPECTED}
LONGEST_LINE = 500

MISSING = object()
VALUES: dict[str, Any] = {
    "list": [1, "a"],
    "object": {"a": {"b": [1]}},
    "null": None,
    "number": 7.5,
    "huge number": 10**4000,
    "truth value": True,
    "huge text": "x\n" * 50_000,
    "surrogate": "\ud83d",
    "missing": MISSING,
}
IDS = {
    "answer_idx",
    "cocoid",
    "clip_id",
    "data_id",
    "data_type",
    "directory",
    "filename",
    "id",
    "identifier",
    "image",
    "image_id",
    "imageId",
    "imagename",
    "img0",
    "img1",
    "img_id",
    "label",
    "pid",
    "qid",
    "question_id",
    "question_type_id",
    "segment",
    "split",
    "subset",
    "text",
    "ts",
    "vid_name",
}


@pytest.fixture(autouse=True)
def no_flushing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole files are waited for on disk, which takes longer than all else here."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


def prepare(source: str, folder: Path, to: Path, *options: str) -> list[str]:
    parser = argparse.ArgumentParser()
    prepare_command.add_arguments(parser)
    words = [source, "--from", str(folder), "--to", str(to), "--workers", "0", *options]
    return list(prepare_command.run(parser.parse_args(words)))


def copied(fixture: str, to: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / fixture, to / "published"))


def manifest(folder: Path, split: str) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["splits"][split]


def objects(value: object) -> Iterator[dict[str, Any]]:
    """Every object inside, in order."""
    if isinstance(value, dict):
        yield value
    for inside in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from objects(inside)


def read(path: Path) -> tuple[Any, bool]:
    """The file's JSON, and whether it is a line an object."""
    content = path.read_text(encoding="utf-8")
    try:
        return json.loads(content), False
    except ValueError:
        return [json.loads(line) for line in content.splitlines()], True


def written(value: Any, lines: bool) -> str:
    return "\n".join(map(json.dumps, value)) if lines else json.dumps(value)


def places() -> list[tuple[str, str, str]]:
    """Every id-like field of every JSON file of every fixture: fixture, file, field."""
    found = []
    for fixture in sorted(SOURCE_OF):
        for path in sorted((FIXTURES / fixture).rglob("*.json*")):
            fields = {name for entry in objects(read(path)[0]) for name in entry} & IDS
            found += [(fixture, path.relative_to(FIXTURES / fixture).as_posix(), field) for field in sorted(fields)]
    return found


@pytest.mark.parametrize(("fixture", "file", "field"), places())
def test_any_value_in_an_ids_place_is_counted_or_refused_in_one_short_line(
    tmp_path: Path, fixture: str, file: str, field: str
) -> None:
    folder = copied(fixture, tmp_path)
    content, lines = read(folder / file)
    holding = [entry for entry in objects(content) if field in entry]
    usual = holding[-1][field]
    for name, value in VALUES.items():
        holding[-1][field] = value
        if value is MISSING:
            del holding[-1][field]
        (folder / file).write_text(written(content, lines), encoding="utf-8")
        holding[-1][field] = usual
        records = tmp_path / name
        try:
            said = prepare(SOURCE_OF[fixture], folder, records)
        except UserError as error:
            said = str(error).splitlines()
            assert len(said) == 1, (name, said)
        assert max(map(len, said)) <= LONGEST_LINE, (name, said)
        assert [path.name for path in records.rglob(".*") if path.name != ".prepare.lock"] == []
        for path in records.glob("*/*.jsonl"):
            if not path.parent.name.startswith("llava"):
                list(iterate_examples(path))


def test_sources_look_into_rows_through_fields_alone() -> None:
    rows = {"raw", "row", "entry", "step", "sentence"}
    for source in SOURCES.values():
        tree = ast.parse((ROOT / f"{source.module.replace('.', '/')}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            subscripted = isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id in rows
            got = (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id in rows
                and node.attr in {"get", "pop"}
            )
            allowed = source.module == "dora_vl.data.benchmarks.llava"  # passes a row on as it is
            assert allowed or not (subscripted or got), f"{source.module}, line {getattr(node, 'lineno', 0)}"
            assert not isinstance(node, ast.Call) or ast.unparse(node.func) not in {"json.loads", "json.load"}


def test_a_table_cut_inside_a_picture_keeps_no_half_of_it(tmp_path: Path) -> None:
    folder = copied("mmbench", tmp_path)
    path = folder / "mmbench_dev_20230712.tsv"
    whole = path.read_text(encoding="utf-8")
    place = whole.rindex("iVBORw0KGgo") + 40  # ten times four characters: base64 that ends well
    path.write_text(whole[:place], encoding="utf-8")
    with pytest.raises(UserError, match=r"20230712\.tsv, line \d+: 10 values for 14 columns; the file is cut"):
        prepare("mmbench", folder, tmp_path / "records")
    path.write_text(whole[:place] + whole[whole.index("\tsynthetic") :].partition("\n")[0], encoding="utf-8")
    said = prepare("mmbench", folder, tmp_path / "records")
    assert [line for line in said if line.startswith("  1 dropped: its picture is broken")]
    for picture in (tmp_path / "records").glob("*/media/*"):
        assert picture.read_bytes().endswith(b"IEND\xaeB`\x82")


def test_a_picture_damaged_between_a_good_beginning_and_a_good_end_is_dropped(tmp_path: Path) -> None:
    folder = copied("mmbench", tmp_path)
    path = folder / "mmbench_dev_20230712.tsv"
    whole = path.read_text(encoding="utf-8")
    encoded = next(cell for cell in whole.split("\t") if cell.startswith("iVBORw0KGgo"))
    data = bytearray(base64.b64decode(encoded))
    data[45:49] = b"\xff\xff\xff\xff"
    path.write_text(whole.replace(encoded, base64.b64encode(data).decode()), encoding="utf-8")
    said = prepare("mmbench", folder, tmp_path / "records")
    assert any("dropped: its picture is broken" in line or "its picture is truncated" in line for line in said)


def test_a_table_for_training_or_validation_needs_its_answers(tmp_path: Path) -> None:
    folder = copied("mmbench", tmp_path)
    path = folder / "mmbench_dev_20230712.tsv"
    path.write_text(path.read_text(encoding="utf-8").replace("\tanswer\t", "\tcomments\t", 1), encoding="utf-8")
    with pytest.raises(UserError, match=r"no column 'answer'; it has index, question, hint"):
        prepare("mmbench", folder, tmp_path / "records")
    assert not list((tmp_path / "records").rglob("validation.jsonl"))


@pytest.mark.parametrize(("answer", "said"), [("", "column 'answer' is empty"), ("AB", "its answer is 'AB', but its")])
def test_an_answer_that_is_no_letter_is_no_first_choice(tmp_path: Path, answer: str, said: str) -> None:
    folder = copied("mmbench", tmp_path)
    path = folder / "mmbench_dev_20230712.tsv"
    content = path.read_text(encoding="utf-8")
    path.write_text(content.replace("\tA\tattribute", f"\t{answer}\tattribute", 1), encoding="utf-8")
    prepare("mmbench", folder, tmp_path / "records")
    dropped = manifest(tmp_path / "records" / "mmbench", "validation")["dropped_rows"]
    assert len(dropped) == 1
    assert dropped[0]["reason"].startswith(said)


@pytest.mark.parametrize("picture", ["münchen" * 20, "a" * 101])
def test_a_picture_that_is_no_base64_is_dropped(tmp_path: Path, picture: str) -> None:
    folder = copied("mmbench", tmp_path)
    path = folder / "mmbench_dev_20230712.tsv"
    content = path.read_text(encoding="utf-8")
    encoded = next(cell for cell in content.split("\t") if cell.startswith("iVBORw0KGgo"))
    path.write_text(content.replace(encoded, picture, 1), encoding="utf-8")
    assert any("1 dropped: its picture is no base64" in line for line in prepare("mmbench", folder, tmp_path / "out"))


@pytest.mark.parametrize("fixture", sorted(SOURCE_OF))
def test_a_byte_order_mark_before_every_file_changes_nothing(tmp_path: Path, fixture: str) -> None:
    source = SOURCE_OF[fixture]
    prepare(source, FIXTURES / fixture, tmp_path / "plain")
    folder = copied(fixture, tmp_path)
    for path in folder.rglob("*"):
        if path.suffix in {".json", ".jsonl", ".tsv", ".csv", ".txt", ".srt"}:
            path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    prepare(source, folder, tmp_path / "marked")
    made = sorted(path.relative_to(tmp_path / "plain") for path in (tmp_path / "plain").glob("*/*.jsonl"))
    assert made
    for name in made:
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "marked" / name).read_bytes()


OF_MEMBERS = {"gqa", "scienceqa", "mmvet", "yc2c-youcook2"}
"""Sources whose rows are the members of one object."""


@pytest.mark.parametrize("fixture", sorted(OF_MEMBERS))
def test_members_of_one_name_are_refused(tmp_path: Path, fixture: str) -> None:
    folder = copied(fixture, tmp_path)
    for path in folder.glob("*.json"):
        content = path.read_text(encoding="utf-8").strip()
        path.write_text(f"{content[:-1]}, {content[1:]}", encoding="utf-8")
    with pytest.raises(UserError, match=r"must be unique|stands twice in one object"):
        prepare(SOURCE_OF[fixture], folder, tmp_path / "records")


@pytest.mark.parametrize("fixture", sorted(set(SOURCE_OF) - OF_MEMBERS - {"mme"}))
def test_rows_that_stand_twice_are_refused_or_counted(tmp_path: Path, fixture: str) -> None:
    source = SOURCE_OF[fixture]
    folder = copied(fixture, tmp_path)
    for path in sorted(folder.rglob("*")):
        if path.suffix in {".csv", ".tsv"}:
            head, rest = path.read_text(encoding="utf-8").split("\n", 1)
            once = f"{head}\n{rest}" if path.suffix == ".csv" else rest
            path.write_text(f"{head}\n{rest}{'' if rest.endswith(chr(10)) else chr(10)}{once}", encoding="utf-8")
        elif path.suffix in {".json", ".jsonl"}:
            content, lines = read(path)
            if isinstance(content, list):
                path.write_text(written([*content, *content], lines), encoding="utf-8")
            elif isinstance(content, dict) and any(isinstance(value, list) for value in content.values()):
                twice = {name: value * 2 if isinstance(value, list) else value for name, value in content.items()}
                path.write_text(json.dumps(twice), encoding="utf-8")
    if fixture in {"llava-mix665k", "llava-pretrain"}:
        assert any("were numbered" in line for line in prepare(source, folder, tmp_path / "records"))
    else:
        with pytest.raises(UserError, match=r"must be unique|in an earlier row|is doubled"):
            prepare(source, folder, tmp_path / "records")


def test_a_row_that_stands_twice_under_two_ids_is_counted(tmp_path: Path) -> None:
    folder = copied("how2qa-csv", tmp_path)
    path = folder / "how2QA_val_release.csv"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.rstrip("\n") + "\n" + text.split("\n", 1)[0] + "\n")
    prepare("how2qa", folder, tmp_path / "records")
    assert manifest(tmp_path / "records" / "how2qa", "validation")["repeated_records"] == 1


def test_line_ends_of_windows_make_the_same_records(tmp_path: Path) -> None:
    made = []
    for ends in ("\n", "\r\n"):
        path = tmp_path / f"table{len(made)}.tsv"
        path.write_bytes(ends.join(["a\tb", f'1\t"two{ends}lines"', "3\t4", ""]).encode())
        made.append(list(table_rows(path, "rows", delimiter="\t")))
    assert made[0] == made[1] == [(3, {"a": "1", "b": "two\nlines"}), (4, {"a": "3", "b": "4"})]


@pytest.mark.parametrize("damage", ['"', 'x,"y\n'])
def test_a_quotation_mark_that_is_never_closed_swallows_no_rows(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"a,b\n{damage}1,2\n3,4\n")
    with pytest.raises(UserError, match="quotation mark in it is never closed"):
        list(table_rows(path, "rows", delimiter=",", columns=["one", "two"]))


@pytest.mark.parametrize(
    ("fixture", "file", "rows_of", "damage", "reason"),
    [
        ("vqav2", "v2_mscoco_val2014_annotations.json", "annotations", MISSING, "no column 'answers'"),
        ("vqav2", "v2_mscoco_val2014_annotations.json", "annotations", [], "0 people answered"),
        ("vqav2", "v2_mscoco_val2014_annotations.json", "annotations", [{"answer": " "}] * 10, "none of its 10 answ"),
        ("vizwiz", "Annotations/val.json", None, [], "0 people answered"),
        ("vizwiz", "Annotations/val.json", None, [{"answer": ""}] * 10, "none of its 10 answers holds text"),
        ("vizwiz", "Annotations/val.json", None, [{"answer": "yes"}] * 9, "9 people answered"),
        ("textvqa", "TextVQA_0.5.1_val.json", "data", [""] * 10, "none of its 10 answers holds text"),
        ("vqav2-karpathy", "v2_mscoco_val2014_annotations.json", "annotations", [], "0 people answered"),
    ],
)
def test_a_row_without_answers_is_dropped_with_its_reason(
    tmp_path: Path, fixture: str, file: str, rows_of: str | None, damage: Any, reason: str
) -> None:
    folder = copied(fixture, tmp_path)
    content, _ = read(folder / file)
    row = (content if rows_of is None else content[rows_of])[1]
    row["answers"] = damage
    if damage is MISSING:
        del row["answers"]
    (folder / file).write_text(json.dumps(content))
    prepare(SOURCE_OF[fixture], folder, tmp_path / "records")
    reasons = [
        dropped["reason"]
        for path in (tmp_path / "records").glob("*/manifest.json")
        for split in json.loads(path.read_text())["splits"].values()
        for dropped in split["dropped_rows"]
    ]
    assert [found for found in reasons if found.startswith(reason)], reasons


def test_a_question_without_an_annotation_is_dropped_with_its_reason(tmp_path: Path) -> None:
    folder = copied("vqav2", tmp_path)
    path = folder / "v2_mscoco_val2014_annotations.json"
    content = json.loads(path.read_text())
    lost = content["annotations"].pop(2)
    path.write_text(json.dumps(content))
    prepare("vqav2", folder, tmp_path / "records")
    dropped = manifest(tmp_path / "records" / "vqav2", "validation")["dropped_rows"]
    assert [(row["id"], row["reason"][:19]) for row in dropped] == [(str(lost["question_id"]), "no column 'answers'")]


def test_a_picture_of_no_known_split_is_dropped_with_its_reason(tmp_path: Path) -> None:
    folder = copied("vqav2-karpathy", tmp_path)
    path = folder / "dataset_coco.json"
    content = json.loads(path.read_text())
    lost = content["images"].pop()
    path.write_text(json.dumps(content))
    prepare("vqav2-karpathy", folder, tmp_path / "records")
    dropped = manifest(tmp_path / "records" / "vqav2_karpathy", "validation")["dropped_rows"]
    assert dropped
    assert all(
        "is not in dataset_coco.json" in row["reason"] and str(lost["cocoid"]) in row["reason"] for row in dropped
    )


def test_records_without_answers_among_others_are_counted(tmp_path: Path) -> None:
    folder = copied("tvqa", tmp_path)
    path = folder / "tvqa_test_public.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["answer_idx"] = 1
    path.write_text("\n".join(map(json.dumps, rows)))
    said = prepare("tvqa", folder, tmp_path / "records", "--splits", "test_public")
    assert f"  {len(rows) - 1} records hold no answer" in said


def test_a_negative_number_of_workers_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--workers is -1; 0 converts in this process"):
        prepare("pope", FIXTURES / "pope", tmp_path, "--workers", "-1")


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "dev.json")

    monkeypatch.setattr("dora_vl.data.benchmarks.table.file_sha256", unreadable)
    with pytest.raises(UserError, match=r"dev\.json: cannot be read \(Permission denied\)"):
        prepare("nlvr2", FIXTURES / "nlvr2", tmp_path)
    assert [path.name for path in tmp_path.rglob(".*") if path.name != ".prepare.lock"] == []


def test_an_error_of_the_program_itself_leaves_no_partial_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(raw: object, **_: object) -> None:
        raise TypeError("unhashable type: 'list'")

    monkeypatch.setattr(import_module("dora_vl.data.benchmarks.llava"), "convert", broken)
    with pytest.raises(TypeError):
        prepare("pope", FIXTURES / "pope", tmp_path)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file() and path.name != ".prepare.lock"] == []
