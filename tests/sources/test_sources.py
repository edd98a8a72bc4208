"""Each source reads ten rows in its publisher's exact form, and each row becomes the record written out by hand.

The fixtures are invented; `expected_records.jsonl` holds, for each split of each, the counts and the second record.
"""

from __future__ import annotations

import argparse
import ast
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from dora_vl.data import prepare as prepare_command
from dora_vl.data.benchmarks.table import SOURCES
from dora_vl.data.example import iterate_examples
from dora_vl.errors import UserError

HERE = Path(__file__).parent
FIXTURES = HERE / "fixtures"
ROOT = HERE.parents[1]
EXPECTED = [json.loads(line) for line in (HERE / "expected_records.jsonl").read_text(encoding="utf-8").splitlines()]
LLAVA = {"llava_mix665k", "llava_pretrain", "llava"}


def prepare(source: str, folder: Path, to: Path, *options: str) -> list[str]:
    parser = argparse.ArgumentParser()
    prepare_command.add_arguments(parser)
    return list(prepare_command.run(parser.parse_args([source, "--from", str(folder), "--to", str(to), *options])))


@pytest.mark.parametrize("fixture", sorted({entry["fixture"] for entry in EXPECTED}))
def test_rows_become_the_expected_records(tmp_path: Path, fixture: str) -> None:
    entries = [entry for entry in EXPECTED if entry["fixture"] == fixture]
    prepare(entries[0]["source"], FIXTURES / fixture, tmp_path)
    made = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("*/*.jsonl"))
    assert made == sorted(f"{entry['task']}/{entry['split']}.jsonl" for entry in entries)
    for entry in entries:
        folder = tmp_path / entry["task"]
        lines = (folder / f"{entry['split']}.jsonl").read_text(encoding="utf-8").splitlines()
        assert json.loads(lines[1]) == entry["second"]
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["splits"][entry["split"]]
        counts = (manifest["rows"], manifest["written"], manifest["dropped"], len(lines))
        assert counts == (entry["rows"], entry["records"], entry["dropped"], entry["records"])
        assert len(manifest["dropped_rows"]) == entry["dropped"] == sum(manifest["reasons"].values())


@pytest.mark.parametrize("fixture", sorted({entry["fixture"] for entry in EXPECTED if entry["task"] not in LLAVA}))
def test_every_record_is_an_example_with_an_answer_where_the_publisher_gives_one(tmp_path: Path, fixture: str) -> None:
    entries = [entry for entry in EXPECTED if entry["fixture"] == fixture]
    prepare(entries[0]["source"], FIXTURES / fixture, tmp_path)
    kept_back = {"vqav2/test_dev", "gqa/test", "vizwiz/test", "textvqa/test", "tvqa/test_public", "tvc/test_public"}
    for path in tmp_path.glob("*/*.jsonl"):
        answered = f"{path.parent.name}/{path.stem}" not in kept_back
        for example in iterate_examples(path):
            assert bool(example.answers) == answered
            assert all(answer.text.strip() and 0 < answer.weight <= 1 for answer in example.answers)
            if answered and "correct" in example.extra and "labels" not in example.extra:
                assert example.choices[example.extra["correct"]] == example.answers[0].text
            assert not any(path.startswith("/") or ".." in path for path in example.images)


def test_a_source_in_the_table_has_a_fixture_and_says_where_its_files_are_published() -> None:
    tested = {entry["source"] for entry in EXPECTED} | {"llava-json", "hugging-face"}
    assert tested == set(SOURCES)
    for source in SOURCES.values():
        documentation = import_module(source.module).__doc__ or ""
        assert "Licence" in documentation or "MIT" in documentation or source.module == "dora_vl.data.benchmarks.llava"
        assert "Quirks" in documentation or source.module == "dora_vl.data.benchmarks.llava"


def test_ids_of_the_mix_are_numbered_and_turns_stay_as_they_are(tmp_path: Path) -> None:
    said = prepare("llava-mix665k", FIXTURES / "llava-mix665k", tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "llava_mix665k" / "train.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [
        "000000033471",
        "000000033471#2",
        "wNBG8Gp_0",
        "2373417",
        "ocr/0001",
        "gpt_first",
        "text/0009",
        "000000033471#3",
    ]
    published = json.loads((FIXTURES / "llava-mix665k" / "llava_v1_5_mix665k.json").read_text(encoding="utf-8"))
    kept = [row for row in published if row["id"] not in {"empty_answer", "two_images_one_named"}]
    assert [row["conversations"] for row in rows] == [row["conversations"] for row in kept]
    assert "  2 repeated ids were numbered" in said
    manifest = json.loads((tmp_path / "llava_mix665k" / "manifest.json").read_text())["splits"]["train"]
    assert [(row["row"], row["id"]) for row in manifest["dropped_rows"]] == [
        (7, "empty_answer"),
        (8, "two_images_one_named"),
    ]


def test_karpathys_split_of_the_official_files_is_by_picture_and_limited_to_the_known_answers(tmp_path: Path) -> None:
    prepare("vqav2-karpathy", FIXTURES / "vqav2-karpathy", tmp_path)
    ids = {
        path.stem: [example.extra["image_id"] for example in iterate_examples(path)]
        for path in (tmp_path / "vqav2_karpathy").glob("*.jsonl")
    }
    assert ids == {"train": [*range(100, 110), *range(600, 605)], "validation": [605, 606, 607], "test": [608, 609]}
    train = {
        answer.text
        for example in iterate_examples(tmp_path / "vqav2_karpathy" / "train.jsonl")
        for answer in example.answers
    }
    assert "teal" not in train  # not in trainval_ans2label.json
    assert "no idea" not in train


def test_pictures_of_mmbench_are_written_once_and_rotations_share_them(tmp_path: Path) -> None:
    prepare("mmbench", FIXTURES / "mmbench", tmp_path)
    examples = list(iterate_examples(tmp_path / "mmbench" / "validation.jsonl"))
    assert len(list((tmp_path / "mmbench" / "media").iterdir())) == 5
    for example in examples:
        index = example.extra["index"]
        twin = next(other for other in examples if other.extra["index"] % 1_000_000 == index % 1_000_000)
        assert example.images == twin.images
        assert example.answers == twin.answers
        assert set(example.choices) == set(twin.choices)
        assert (tmp_path / "mmbench" / example.images[0]).read_bytes().startswith(b"\x89PNG")
    assert examples[1].extra.get("hint") is None  # "nan"
    assert examples[2].extra["hint"] == "A hint."


def test_the_versions_of_popes_labels_are_told_apart(tmp_path: Path) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    row = {
        "question_id": 0,
        "image": "COCO_val2014_000000310196.jpg",
        "text": "Is there a dog in the imange?",
        "label": "no",
    }
    for category, count in (("random", 2910), ("popular", 3000), ("adversarial", 3000)):
        lines = (json.dumps({**row, "question_id": number}) for number in range(1, count + 1))
        (folder / f"coco_pope_{category}.json").write_text("\n".join(lines))
    prepare("pope", folder, tmp_path)
    manifest = json.loads((tmp_path / "pope" / "manifest.json").read_text())["splits"]["test"]
    assert manifest["written"] == 8910
    assert manifest["notes"]["label_version"] == "e3e3926 (LLaVA-1.5's)"


def test_nothing_but_the_standard_library_tables_and_our_records_is_imported() -> None:
    allowed = {"dora_vl.data.example", "dora_vl.data.turns", "dora_vl.data.readers", "dora_vl.errors"}
    allowed |= {"dora_vl.data.text_file", "dora_vl.data.containers", "dora_vl.data.readers"}
    allowed |= {"dora_vl.data.containers", "dora_vl.data.pictures"}
    allowed |= {"dora_vl.files", "dora_vl.data.pictures", "dora_vl.data.video_containers"}
    allowed |= {"dora_vl.evaluation.scores.llava"}  # which label version a file has
    allowed |= {"dora_vl.evaluation.scores.vqa"}  # how many people a metric needs
    allowed |= {"dora_vl.data.pictures", "dora_vl.data.columns", "dora_vl.data.example"}
    commands = {"dora_vl.data.prepare", "dora_vl.data.check"}
    modules = {source.module for source in SOURCES.values()} | commands
    seen: set[str] = set()
    while modules - seen:
        module = sorted(modules - seen)[0]
        seen.add(module)
        tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
        found = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        found |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        found |= {
            f"dora_vl.sources.{alias.name}"
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module == "dora_vl.sources"
            for alias in node.names
        } - {"dora_vl.sources"}
        ours = {name for name in found if name.startswith("dora_vl.") and not name.startswith("dora_vl.sources")}
        assert ours <= allowed, module
        assert not {name.partition(".")[0] for name in found} & {"torch", "transformers"}, module
        modules |= {name for name in found if name.startswith("dora_vl.sources.")}


def test_sources_are_read_without_torch_and_transformers() -> None:
    modules = sorted({source.module for source in SOURCES.values()} | {"dora_vl.data.prepare"})
    code = "import sys\nfor name in ('torch', 'transformers', 'datasets'):\n    sys.modules[name] = None\n"
    code += "".join(f"import {module}\n" for module in modules)
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("source", sorted(set(SOURCES) - {"hugging-face"}))
def test_an_empty_folder_is_one_line_that_says_what_belongs_there(tmp_path: Path, source: str) -> None:
    with pytest.raises(UserError) as caught:
        prepare(source, tmp_path, tmp_path / "records")
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fixture", sorted({entry["fixture"] for entry in EXPECTED}))
def test_a_file_that_was_cut_or_holds_something_else_is_one_line(tmp_path: Path, fixture: str) -> None:
    source = next(entry["source"] for entry in EXPECTED if entry["fixture"] == fixture)
    inputs = [
        path for path in (FIXTURES / fixture).rglob("*") if path.suffix in {".json", ".jsonl", ".tsv", ".csv", ".txt"}
    ]
    for damage in (b'{"a": [1, 2', b"\xff\xfe\x00", b'[{"other": "column"}]\n'):
        folder, records = tmp_path / f"{len(damage)}", tmp_path / f"records{len(damage)}"
        for path in inputs:
            target = folder / path.relative_to(FIXTURES / fixture)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(damage)
        with pytest.raises(UserError) as caught:
            prepare(source, folder, records)
        assert "\n" not in str(caught.value)
        assert list(records.glob("*/*.jsonl")) == []
        assert list(records.glob("*/.*.partial")) == []
