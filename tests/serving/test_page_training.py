"""What the clicks of the page's door Train write and keep, without a browser; `test_page.py` drives the whole of it."""

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml
from PIL import Image

from dora_vl.errors import UserError
from dora_vl.evaluation.baselines import advice
from dora_vl.serving.access import Uploads
from dora_vl.serving.model import ServedModel
from dora_vl.serving.options import ServerSettings
from dora_vl.serving.side_by_side import OpenModels

gradio: Any = pytest.importorskip("gradio", reason="pip install '.[web]'")
RUN = Path("runs/my")
TABS = {"somebody": "a tab", "another": "another tab", "the same tab, loaded again": "a tab"}


@pytest.fixture
def door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    from dora_vl.serving.page_training import TrainTab

    monkeypatch.chdir(tmp_path)
    door = TrainTab(Uploads(tmp_path / "uploads", 10_000), lambda: None, TABS)
    monkeypatch.setattr(door.runs, "start", door.runs.train_arguments)
    with gradio.Blocks():
        door.lay_out()
    return door


def write_run(epochs: float, rank: int = 16, alpha: float = 32.0) -> None:
    RUN.mkdir(parents=True, exist_ok=True)
    run = {"adapter": {"rank": rank, "alpha": alpha}, "training": {"num_train_epochs": epochs}}
    (RUN / "run.yaml").write_text(yaml.safe_dump({"data": {"train": "train.jsonl"}, **run}))


def written() -> tuple[float, ...]:
    run = yaml.safe_load((RUN / "run.yaml").read_text())
    return run["adapter"]["rank"], run["adapter"]["alpha"], run["training"]["num_train_epochs"]


def drop(door: Any, person: str, files: Mapping[str, str], folder: str) -> dict[Any, Any]:
    """Drops files as Gradio hands them over; returns what the page shows by its parts."""
    paths = []
    for name, text in files.items():
        path = door.uploads.folder / name.replace(".", "-") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        paths.append(str(path))
    return door.take_files(paths, folder, cast(Any, SimpleNamespace(session_hash=person)))


@pytest.mark.parametrize(("epochs", "shown"), [(0.5, 1), (3.0, 3), (400, 40)])
def test_epochs_that_the_slider_lacks_are_shown_as_near_as_can_be_and_stay(door, epochs, shown) -> None:
    write_run(epochs)
    assert door.opened("")[door.epochs]["value"] == shown
    door.begin(str(RUN), 16, shown, "")
    assert written() == (16, 32.0, epochs)


def test_a_run_starts_with_the_rank_and_epochs_that_are_seen(door: Any) -> None:
    write_run(10, rank=12, alpha=12.0)
    door.begin(str(RUN), 12, 5, "")
    assert written() == (12, 12.0, 5)  # an alpha of one's own stays with its rank
    door.begin(str(RUN), 8, 5, "")
    assert written() == (8, 16.0, 5)


def test_rank_and_epochs_may_be_chosen_until_a_run_has_trained(door: Any) -> None:
    write_run(10)
    (RUN / "output.txt").write_text("CUDA out of memory\n")
    assert door.show_run(str(RUN))[door.rank]["interactive"]  # it has failed
    door.begin(str(RUN), 4, 10, "")
    assert written() == (4, 8.0, 10)
    (RUN / "checkpoint-3").mkdir()
    (RUN / "checkpoint-3" / "trainer_state.json").write_text("{}")
    assert not door.show_run(str(RUN))[door.rank]["interactive"]  # it goes on from there
    assert door.runs.train_arguments(RUN) == ["train", "runs/my/settings.json", "--resume", "last"]
    door.begin(str(RUN), 64, 40, "")
    assert written() == (4, 8.0, 10)


def test_a_finished_run_shows_the_command_that_trained_it(door: Any) -> None:
    write_run(10)
    for name, text in {
        "checkpoint-3/trainer_state.json": "{}",
        "metrics.json": '{"sets": {}}',
        "adapter/a": "",
    }.items():
        (RUN / name).parent.mkdir(exist_ok=True)
        (RUN / name).write_text(text)
    assert door.runs.train_arguments(RUN) == ["train", "runs/my/run.yaml"]


def test_dropped_files_are_corrected_and_found_again_by_their_tab(door: Any) -> None:
    folder = drop(door, "somebody", {"table.csv": "wrong", "a.png": "a"}, "")[door.folder]
    update = drop(door, "somebody", {"table.csv": "right", "b.png": "b"}, folder)
    assert "Replaced: table.csv" in update[door.data_state]
    assert {path.name: path.read_text() for path in Path(folder).iterdir()} == {
        "table.csv": "right", "a.png": "a", "b.png": "b",
    }  # fmt: skip
    assert door.opened("a tab")[door.folder] == folder
    assert door.folder not in door.opened("another tab")
    assert drop(door, "another", {"a.png": "c"}, "")[door.folder] != folder


def is_off(door: Any, update: dict[Any, Any]) -> bool:
    """Start is off, no run stands under Run, and nothing of one is seen."""
    assert update[door.rows] == update[door.yaml] == update[door.commands] == ""
    return not update[door.start]["interactive"] and door.run in update and door.begin(None, 16, 10, "").keys() == {
        door.state
    }  # fmt: skip


@pytest.fixture
def looked(door: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Looks at a folder as the page does, by an init that writes its run's YAML alone."""
    from dora_vl.serving import page_training

    def printed(words: list[str]) -> list[str]:
        if words[0] == "init":
            to = Path(next(word for word in words if word.startswith("--to=")).removeprefix("--to="))
            to.mkdir(parents=True, exist_ok=True)
            (to / "run.yaml").write_text(f"#   dora-vl {shlex.join(words)}\ndata: {{train: {to}/train.jsonl}}\n")
        return ["2 min"]

    monkeypatch.setattr(page_training, "printed", printed)

    def look(*fields: str) -> dict[Any, Any]:
        page: dict[Any, Any] = {}
        for update in door.look_at_data(*fields):
            page |= update
        return page

    return look


def test_what_start_trains_is_what_was_dropped_last(door: Any, looked: Any) -> None:
    first = drop(door, "somebody", {"table.csv": "one"}, "")
    assert is_off(door, first)
    page = looked(first[door.folder], "what is it?", "Foto=image, Remark", "a/base")
    assert page[door.run]["value"] == "runs/dropped"
    assert page[door.start]["interactive"]
    assert is_off(door, door.forget_data(cast(Any, SimpleNamespace(session_hash="somebody"))))
    second = drop(door, "somebody", {"table.csv": "two"}, "")
    assert second[door.folder] == "data/dropped-2"
    assert is_off(door, second)
    again = door.opened("a tab")  # loaded again before the second look
    assert again[door.folder] == "data/dropped-2"
    assert again[door.run]["value"] is None
    assert is_off(door, again)
    page = looked(second[door.folder], "", "", "")
    assert page[door.run]["value"] == "runs/dropped-2"
    assert door.opened("a tab")[door.run]["value"] == "runs/dropped-2"
    assert is_off(door, drop(door, "somebody", {"table.csv": "corrected"}, second[door.folder]))
    assert is_off(door, door.not_looked_at())  # as when a field is changed by hand


def test_a_run_fills_the_fields_that_it_came_from(door: Any, looked: Any) -> None:
    looked("signs", "what's it?", "Foto=image, Remark", "a/base")
    fields = (door.folder, door.question, door.columns, door.base)
    page = door.opened("of a later session")
    assert [page[field]["value"] if field is door.base else page[field] for field in fields] == [
        "signs", "what's it?", "Foto=image, Remark", "a/base",
    ]  # fmt: skip
    for text in ("data: {}\n", "#   dora-vl init 'signs\n", "#   dora-vl init --ask\n"):
        (Path("runs/signs") / "run.yaml").write_text(text)
        assert door.show_run("runs/signs")[door.folder] == ""


def test_the_rows_of_linked_runs_show_their_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dora_vl.serving.page_training import rows_view

    (tmp_path / "first" / "runs" / "my").mkdir(parents=True)
    (tmp_path / "first" / "signs" / "img").mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "first" / "signs" / "img" / "a.png")
    row = {
        "id": "a",
        "image": "a.png",
        "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
    }
    (tmp_path / "first" / "runs" / "my" / "train.jsonl").write_text(json.dumps(row))
    (tmp_path / "first" / "runs" / "my" / "run.yaml").write_text("data: {image_folder: signs/img}")
    (tmp_path / "later").mkdir()
    (tmp_path / "later" / "runs").symlink_to(tmp_path / "first" / "runs")
    for folder in ("first", "later"):
        monkeypatch.chdir(tmp_path / folder)
        assert "<img" in rows_view(RUN)


def test_what_a_test_says_names_no_setting(tmp_path: Path) -> None:
    from dora_vl.serving.page_training import learned_and_kept, without_settings

    probe = {"n": 13, "questions": {"how many?": {"n": 13, "readable": 12, "learned": 9}}}
    rising = [{"step": 5, "eval_loss": 0.1}, {"step": 9, "eval_loss": 0.4}]
    unlikely = [{"step": 9, "log_probs/chosen": -80.0}]
    for log in ([], rising, unlikely, [{"step": 9, "loss": 0.01}]):
        text = advice({"readable": probe}, log, score=0.7)
        assert text is not None
        assert not re.search(r"[a-z]+\.[a-z]", without_settings(text)), text
    assert without_settings("a higher adapter.rank (or data.replay: 0.1), at 0.21") == "a higher rank, at 0.21"
    results = {"test": SimpleNamespace(entry={"baselines": {"readable": probe}})}
    forgetting = {"answers": {"kept": 2, "n": 16, "nats": {"base": 0.3, "adapted": 3.0}}}
    facts = learned_and_kept(cast(Any, results), cast(Any, SimpleNamespace(metrics={"forgetting": forgetting})))
    assert facts["how many?"] == "9 of 13 right; 12 can be told from the pictures"
    assert "2 of 16" in facts["other questions"]
    assert "fewer epochs" in facts["other questions"]


@pytest.mark.parametrize(("steps", "shown"), [(1, [1]), (3, [1, 2, 3]), (8, [1, 3, 5, 8])])
def test_the_table_of_watched_questions_has_few_columns(steps: int, shown: list[int], monkeypatch: Any) -> None:
    """So that it fits beside the fields of a screen of 1,280 pixels."""
    from dora_vl.serving import page_training

    row = {
        "question": "q",
        "truth": "a",
        "picture": ("", ""),
        "answers": [(f"a{at}", False) for at in range(1, steps + 1)],
    }
    table = {"rows": [row], "steps": list(range(1, steps + 1))}
    monkeypatch.setattr(page_training, "watched_tables", lambda *_: ([table], []))
    view = page_training.watched_view(cast(Any, None))
    assert [int(number) for number in re.findall(r"<th>step (\d+)</th>", view)] == shown
    assert [int(number) for number in re.findall(r">a(\d+)</td>", view)] == shown


def test_headings_become_options_of_init() -> None:
    from dora_vl.serving.page_training import column_options

    expected = {"--columns": "Foto=image,Richtige Antwort=answer", "--ignore": "Bemerkung"}
    assert column_options("Foto=image, Richtige Antwort=answer, Bemerkung") == expected
    assert column_options("--columns 'Foto=image,Richtige Antwort=answer' --ignore Bemerkung") == expected
    assert column_options("") == {"--columns": "", "--ignore": ""}
    with pytest.raises(UserError, match="quotation"):
        column_options("--columns Image de l'objet=image")


def test_rows_that_cannot_be_used_are_told_of_as_a_fault() -> None:
    from dora_vl.serving.page_training import left_out_view

    assert "54 of 160" in left_out_view("my/questions.csv: question/answer, 160 rows, 54 usable\n")
    assert left_out_view("my/questions.csv: question/answer, 160 rows, 160 usable\n") == ""


def test_a_run_shows_its_steps_and_no_other_line(door: Any) -> None:
    write_run(10)
    (RUN / "output.txt").write_text("step 3 of 60  loss 0.5\nat the fullest moment 2.68 GiB\n")
    (RUN / "log.jsonl").write_text("{}\n")
    door.runs.running = lambda: RUN
    assert door.runs.status(RUN).line == "step 3 of 60  loss 0.5"


def test_a_model_that_cannot_be_read_leaves_those_that_answer(model: ServedModel) -> None:
    def read(base: str | None, adapters: Mapping[str, Path]) -> ServedModel:
        if "broken" in adapters:
            raise UserError("it has no weights")
        return model

    models = OpenModels(read, ServerSettings())
    models.open({"one": Path("one")})
    engine = models.side.engine
    with pytest.raises(UserError):
        models.open({"broken": Path("broken")})
    assert models.names == model.names
    assert models.side.engine is not engine  # it was closed: a GPU may not hold both
    models.close()
