"""The page's door Train in a headless browser, over the real command: from dropped pictures to an answer."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dora_vl.cli import main
from dora_vl.run.folder import LOSS_LOG, one_writer, writer_of
from tests.serving.browser import Trainer, browser, demo
from tests.training.tiny_run import COLOURS, json_of, write_tiny_data, write_tiny_llava

ROWS = 40


def write_pictures(folder: Path) -> list[Path]:
    records = json_of(write_tiny_data(folder, samples=ROWS))
    (folder / "train.json").unlink()
    rows = [f"{row['image']},what colour?,{list(COLOURS)[number % 4]}" for number, row in enumerate(records)]
    (folder / "table.csv").write_text("\n".join(["image,question,answer", *rows]))
    return sorted(folder.iterdir())


def until(true: Callable[[], object], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as opened:
        yield opened


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder to start the page in, with a tiny base; no run of it is left."""
    write_tiny_llava(tmp_path / "runs" / "tiny" / "base")
    yield tmp_path
    for run in (tmp_path / "runs").iterdir():
        if (process := writer_of(run)) is not None:
            os.kill(process, signal.SIGKILL)


def start_one(one: Trainer, files: list[Path], run: Path) -> int:
    """Takes dropped pictures to a run with settings of its own; its process, which stands still after a few steps."""
    assert one.drop(files) == "data/dropped"
    one.look("runs/tiny/base")
    assert one.page.locator("#dv-rows img").count() == 6
    for title in ("The first batch", "What training will take", "run.yaml"):
        one.page.locator("button.label-wrap", has_text=title).click()
    for part, text in {"seen-data": "40 usable", "estimate": "min on this machine"}.items():
        assert text in one.page.locator(f"#dv-{part}").text_content()
    assert one.page.locator("#dv-batch span", has_text="ASSISTANT").count() > 1  # in colours
    for name, value in {"rank": 8, "epochs": 40}.items():
        one.page.locator(f"#dv-{name} input[type=number]").fill(str(value))
        one.page.keyboard.press("Enter")
        one.page.locator(f"#dv-{name} input[type=range]").dispatch_event("pointerup")
    until(lambda: "num_train_epochs: 40" in (run / "run.yaml").read_text())
    settings = yaml.safe_load((run / "run.yaml").read_text())
    assert (settings["adapter"]["rank"], settings["adapter"]["alpha"]) == (8, 16.0)
    one.state("min on this machine")
    (run / "run.yaml").write_text((run / "run.yaml").read_text().replace("replay: 0.1", "replay: 0.0"))  # takes minutes
    one.page.click("#dv-start")
    until(lambda: (run / LOSS_LOG).is_file() and (run / LOSS_LOG).stat().st_size)
    process = writer_of(run)
    assert process is not None
    os.kill(process, signal.SIGSTOP)
    return process


@pytest.mark.slow
def test_from_dropped_pictures_to_an_answer_though_page_and_run_are_ended(chromium: Any, place: Path) -> None:
    files, run = write_pictures(place / "mine"), place / "runs" / "dropped"
    with demo(place) as (address, page):
        one, two = (Trainer(chromium.new_context(), address) for _ in range(2))
        trains = start_one(one, files, run)
        (other := place / "runs" / "mine").mkdir()
        (other / "run.yaml").write_text((run / "run.yaml").read_text().replace("runs/dropped", "runs/mine"))
        two.page.reload()
        two.state("Training.")
        two.choose_run("runs/mine")
        two.state("Ready to train.")
        two.page.click("#dv-start")
        two.state("runs/dropped is at work")
        assert not (place / "runs" / "mine" / "output.txt").exists()
        page.kill()
    assert writer_of(run) == trains
    with demo(place) as (address, _):
        again = Trainer(chromium.new_context(), address)
        again.state("Training.")
        again.page.click("#dv-halt")
        os.kill(trains, signal.SIGCONT)
        again.state("Stopped.")
        stopped = json_of(sorted(run.glob("checkpoint-*"))[-1] / "trainer_state.json")
        assert 0 < stopped["global_step"] < stopped["max_steps"]
        again.page.click("#dv-start")
        again.state("Trained and tested.")
        assert json_of(run / "metrics.json")["train_steps"] == stopped["max_steps"]
        assert "with pictures exchanged" in again.page.inner_text("#dv-test")
        assert again.page.locator("#dv-watched img").count() == 4
        again.page.click("#dv-ask-it")
        again.page.wait_for_selector("#dv-ask:not([disabled])")
        again.show(files[0])
        again.see(1)
        answers = again.ask("what colour?")
        again.page.reload()
        assert again.both(1) == answers
        again.see(1)


@pytest.mark.parametrize("options", [["--allow-host", "gpu.example.org"], ["--host", "0.0.0.0"], ["--no-train"]])
def test_where_others_may_come_nobody_trains_unless_a_flag_says_so(options: list[str]) -> None:
    """So without an adapter there is no page."""
    with pytest.raises(SystemExit) as end:
        main(["demo", "--port", "0", *options])
    assert end.value.code == 2


def test_a_writer_is_known_by_the_lock_and_lives(tmp_path: Path) -> None:
    assert writer_of(tmp_path) is None
    with one_writer(tmp_path):
        assert writer_of(tmp_path) == os.getpid()
        lock = tmp_path / ".writing.lock"
        os.utime(lock, (1, 1))  # of a process that was there before this one began, and had its number
        assert writer_of(tmp_path) is None
    (tmp_path / ".writing.lock").write_text(f"process {os.getpid()} on elsewhere")
    assert writer_of(tmp_path) is None
