"""Rows that came, went or moved under the same path are told from those that a checkpoint's run was trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dora_vl.data.samples import BadSampleLedger
from dora_vl.errors import UserError
from dora_vl.training.progress import BatchStatistics, Progress, account_of

MEDIA = {"a.png": "1", "b.png": "2", "missing.png": "", "broken.png": "3"}


def progress_over(*ids: str, **media: str) -> Progress:
    statistics = BatchStatistics(BadSampleLedger(max_bad_share=1.0, total_samples=3, source="train.json"))
    statistics.carry_over({"c": "picture broken.png in . cannot be decoded"})
    found = Progress(statistics, None)
    found.trains_on(lambda: ids, "train.json", lambda: {**MEDIA, **{f"{name}.png": key for name, key in media.items()}})
    return found


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (folder := tmp_path / "checkpoint-40").mkdir()
    progress_over("a", "b", "c").write(folder, torch.device("cpu"), writes=True)
    return folder


def test_an_account_is_of_ids_in_order() -> None:
    account = account_of(["a", "b", "\ud800"])
    assert account["samples"] == 3
    assert account == account_of(iter(["a", "b", "\ud800"]))
    others = (["b", "a", "\ud800"], ["ab", "", "\ud800"], ["a", "b"])
    assert account["ids_sha256"] not in [account_of(ids)["ids_sha256"] for ids in others]


@pytest.mark.parametrize("ids", ["abcd", "ac", "acb"])
def test_other_samples_are_refused(checkpoint: Path, ids: str) -> None:
    progress_over("a", "b", "c").check_samples(checkpoint)
    with pytest.raises(UserError):
        progress_over(*ids).check_samples(checkpoint)


def test_a_replaced_file_is_refused_and_a_mended_one_goes_on(checkpoint: Path) -> None:
    progress_over("a", "b", "c", missing="5", broken="6").check_samples(checkpoint)
    for key in ("7", ""):  # another picture, none
        with pytest.raises(UserError):
            progress_over("a", "b", "c", b=key).check_samples(checkpoint)


def test_a_stream_has_no_account(checkpoint: Path) -> None:
    stream = Progress(BatchStatistics(), None)
    stream.check_samples(checkpoint)
    stream.write(checkpoint, torch.device("cpu"), writes=True)
    assert json.loads((checkpoint / "progress.json").read_text())["training_samples"] is None
    progress_over("a").check_samples(checkpoint)
