"""`dora-vl quickstart`: fetches, trains and merges once; stopped it goes on, finished it stays as it is."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from dora_vl.cli import main
from dora_vl.evaluation import merge_command
from dora_vl.start import easy_vqa, names, quickstart
from dora_vl.training import train_command

ADAPTER = Path("runs/demo/adapter/adapter_model.safetensors")
TUNED = Path("runs/demo/tuned/model.safetensors")
NAMES_ADAPTER = Path("runs/demo-names/adapter/adapter_model.safetensors")


@pytest.fixture
def steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the verb does, one after the other, in an empty folder; each step leaves the file that it would."""
    monkeypatch.chdir(tmp_path)
    steps: list[str] = []

    def train(words: Sequence[str], **_: str) -> None:
        steps.append(f"train {' '.join(words)}")
        adapter = NAMES_ADAPTER if "--variant=names" in words else ADAPTER
        if not adapter.is_file():
            adapter.parent.mkdir(parents=True, exist_ok=True)
            adapter.touch()

    def merge(options: object) -> list[str]:
        steps.append(f"merge {options.adapter[0]} {options.to}")  # type: ignore[attr-defined]
        TUNED.parent.mkdir(parents=True, exist_ok=True)
        TUNED.touch()
        return []

    monkeypatch.setattr(quickstart, "fetch", lambda asset, to: bool(steps.append(f"fetch {asset.folder}")))
    monkeypatch.setattr(easy_vqa, "convert", lambda source, to: steps.append(f"convert {source} {to}"))
    monkeypatch.setattr(names, "convert", lambda source, to: steps.append(f"names {source} {to}"))
    monkeypatch.setattr(train_command, "train", train)
    monkeypatch.setattr(merge_command, "run", merge)
    return steps


FETCHED = ["fetch smollm2", "fetch efficientnet_lite0", "fetch easy_vqa"]
PREPARED = [*FETCHED, "convert runs/demo/assets/easy_vqa runs/demo/data"]
TRAINED = "train --config=llava/easyvqa_smollm2_dora --resume=if_stopped"


def test_it_merges_what_it_trained_once(steps: list[str]) -> None:
    main(["quickstart", "--training.max_steps", "7"])
    assert steps == [*PREPARED, f"{TRAINED} --training.max_steps 7", "merge runs/demo/adapter runs/demo/tuned"]
    steps.clear()
    os.utime(ADAPTER, (1, 1))
    main(["quickstart"])
    assert steps == [*PREPARED, TRAINED]  # it finds by itself that it is finished
    steps.clear()
    os.utime(TUNED, (0, 0))  # merged from an earlier adapter
    main(["quickstart"])
    assert steps[-1] == "merge runs/demo/adapter runs/demo/tuned"


def test_the_other_demo_takes_the_same_models_and_other_pictures(steps: list[str]) -> None:
    main(["quickstart", "--names", "--training.max_steps", "7"])
    artists = ["noto", "fluent_emoji_flat", "openmoji", "twemoji"]
    assert steps == [
        *[f"fetch {name}" for name in ("smollm2", "efficientnet_lite0", *artists)],
        "names runs/demo/assets runs/demo-names/data",
        "train --config=llava/easyvqa_smollm2_dora --variant=names --resume=if_stopped --training.max_steps 7",
        "merge runs/demo-names/adapter runs/demo-names/tuned",
    ]
    assert set(artists) == {*names.ARTISTS, names.UNSEEN}
    steps.clear()
    main(["quickstart", "--names", "--fetch-only"])
    assert [step.split()[0] for step in steps] == ["fetch"] * 6


def test_the_merge_is_of_the_folder_that_the_settings_name(steps: list[str]) -> None:
    other = Path("runs/other/adapter/adapter_model.safetensors")
    other.parent.mkdir(parents=True)
    other.touch()
    main(["quickstart", "--training.output_dir", "runs/other"])
    assert steps[-1] == "merge runs/other/adapter runs/other/tuned"


def test_a_wrong_setting_ends_it_before_anything_is_fetched(steps: list[str]) -> None:
    for word in ("--training.max_step", "--fetch-onyl"):
        with pytest.raises(SystemExit) as stopped:
            main(["quickstart", word, "7"])
        assert stopped.value.code == 2
    assert steps == []
