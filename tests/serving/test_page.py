"""The page as a person meets it, in a headless browser over tiny models: every answer is the model's own."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from dora_vl.cli import main
from dora_vl.data.turns import Clip, Turn
from dora_vl.data.video import Uniform
from dora_vl.evaluation.predictor import PromptMedia
from dora_vl.run.folder import LOSS_LOG, lock_run_folder, locking_process
from dora_vl.serving.access import AccessRules
from dora_vl.serving.engine import Engine
from dora_vl.serving.model import ServedModel
from dora_vl.serving.options import ServerSettings
from dora_vl.serving.side_by_side import SideBySide
from tests.data.video_files import read_frames, write_video
from tests.serving.browser import QUESTION_BOX, Trainer, Visitor, demo, page_of
from tests.serving.tiny_served import RED, WIDE, answers, batches_of
from tests.training.tiny_run import COLOURS, json_of, write_tiny_data, write_tiny_llava

TOKENS, FRAMES = 8, 4
QUESTION = "What colour is it?"
SETTINGS = ServerSettings(
    batch=16, window_ms=200, max_new_tokens=TOKENS, max_pictures=2, max_mpx=0.015, max_media_mib=0.1, frames=FRAMES
)


@pytest.fixture(scope="module")
def uploads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("uploads")


@pytest.fixture(scope="module")
def opened(chromium: Any, model: ServedModel, uploads: Path) -> Iterator[tuple[str, Engine]]:
    with page_of(model, uploads, SETTINGS) as page:
        yield page


@pytest.fixture
def visitor(chromium: Any, opened: tuple[str, Engine]) -> Iterator[Visitor]:
    context = chromium.new_context()
    yield Visitor(context, opened[0])
    context.close()


@pytest.fixture
def red(visitor: Visitor, pictures: dict[str, Path]) -> Visitor:
    visitor.show(pictures["red"])
    visitor.see(1)
    return visitor


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pictures")
    for name, picture in (("red", RED), ("wide", WIDE)):
        picture.save(folder / f"{name}.png")
    (folder / "broken.png").write_bytes((folder / "red.png").read_bytes()[:40])
    (folder / "broken.mp4").write_bytes(b"no video" * 9)
    Image.effect_noise((300, 300), 90).save(folder / "large.png")
    write_video(folder / "clip.mp4", [number / 25 for number in range(50)])
    return {path.stem if path.suffix == ".png" else path.name: path for path in folder.iterdir()}


def printable(text: str) -> str:
    return "".join(character for character in text if character.isascii() and character.isprintable()).strip()


def expected(engine: Engine, name: str, turns: list[Turn], seen: PromptMedia) -> str:
    return printable(answers(engine, [(name, turns, seen)], max_new_tokens=TOKENS)[0])


def first(question: str, media: str = "<image>\n") -> list[Turn]:
    return [Turn("user", f"{media}{question}")]


def check(texts: Sequence[str], engine: Engine, question: str, seen: PromptMedia, media: str = "<image>\n") -> None:
    assert [printable(text) for text in texts] == [
        expected(engine, name, first(question, media), seen) for name in ("one", "base")
    ]


def nothing_left(uploads: Path) -> bool:
    return not any(path.is_file() and path.stat().st_size for path in uploads.rglob("*"))


def test_a_picture_two_answers_and_a_second_turn(red: Visitor, opened: tuple[str, Engine], uploads: Path) -> None:
    _, engine = opened
    assert red.captions() == ["21 × 15"]
    seen, texts = PromptMedia(pictures=(RED,)), red.ask(QUESTION)
    check(texts, engine, QUESTION, seen)
    assert texts[0] != texts[1]
    assert "one · 8 tokens · " in red.tally("left")
    assert "tokens/s" in red.tally("right")
    again = red.ask("And the shape?")
    for number, name in enumerate(("one", "base")):
        (answer,) = answers(engine, [(name, first(QUESTION), seen)], max_new_tokens=TOKENS)
        turns = [*first(QUESTION), Turn("assistant", answer), Turn("user", "And the shape?")]
        assert printable(again[number]) == expected(engine, name, turns, seen)
    assert nothing_left(uploads)
    assert {url.split("/")[2] for url in red.asked_for if url.startswith("http")} == {opened[0].split("/")[2]}


@pytest.mark.slow
def test_two_pictures_and_a_video_with_the_times_of_its_frames(visitor, opened, pictures, uploads) -> None:
    visitor.show(pictures["wide"], pictures["red"])
    visitor.see(2)
    check(
        visitor.ask("Which is red?"),
        opened[1],
        "Which is red?",
        PromptMedia(pictures=(WIDE, RED)),
        "<image>\n<image>\n",
    )
    file = pictures["clip.mp4"]
    video = read_frames(file.parent, Clip(path=file.name), Uniform(FRAMES))
    visitor.show(file)
    visitor.see(FRAMES)
    assert visitor.captions() == [f"{seconds:.1f} s" for seconds in video.seconds]
    check(visitor.ask("What moves?"), opened[1], "What moves?", PromptMedia(videos=(video,)), "<video>\n")
    assert nothing_left(uploads)


def test_a_talk_is_copied_and_stays_over_a_reload_in_its_own_tab(red: Visitor, opened: tuple[str, Engine]) -> None:
    page, texts = red.page, red.ask(QUESTION)
    page.context.grant_permissions(["clipboard-read"])
    page.click("#dv-conversation-left .dv-copy")
    page.locator("#dv-conversation-left .dv-copy", has_text="copied").wait_for()
    assert printable(page.evaluate("navigator.clipboard.readText()")) == printable(texts[0])
    page.reload()
    assert red.both(1) == texts
    red.see(1)
    other = Visitor(page.context, opened[0])
    other.page.locator("#dv-conversation-left", has_text="one will answer here").wait_for()
    assert page.is_visible("#dv-strength-left")
    assert not page.is_visible("#dv-strength-right")  # the base has none
    page.set_viewport_size({"width": 390, "height": 844})
    tops = [page.locator(f"#dv-{part}").bounding_box()["y"] for part in ("shown", "answers", "more")]
    assert tops == sorted(tops)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_tables_of_a_run_fit_a_telephone(chromium: Any) -> None:
    """What a run shows at most: advice beside its scores, and four answers to a question with its picture."""
    from dora_vl.serving.page import STYLE
    from dora_vl.serving.page_parts import table_view

    told = "7 of 16 are answered as before training; much is forgotten: train fewer epochs"
    scores = [["what a linear probe reads from the base's pictures", "83.2", "63.2 to 100.0", "1,200"]]
    scores += [["what does the sign say?", told, "", ""]]
    test = table_view("", ["", "value", "95 % interval", "questions"], [(("", row[0]), row[1:]) for row in scores])
    picture = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"
    asked = ["what does the sign say?", "stop", "teal rectangle, so rectangle", *["✓\N{NO-BREAK SPACE}stop"] * 3]
    watched = table_view(
        "", ["", "question", "right answer", "step 0", "step 12", "step 36", "step 60"], [((picture, ""), asked)]
    )
    page = chromium.new_page(viewport={"width": 400, "height": 800})
    page.set_content(
        f"<style>{STYLE.read_text()}</style><body style='margin: 32px; font-family: sans-serif'>{test}{watched}"
    )
    hidden = "[...document.querySelectorAll('.dv-wide')].map(each => each.scrollWidth - each.clientWidth)"
    assert page.evaluate(hidden) == [0, 0]
    page.close()


def test_the_dial_from_the_base_to_the_adapter(red: Visitor, opened: tuple[str, Engine]) -> None:
    seen, texts = PromptMedia(pictures=(RED,)), {}
    red.ask(QUESTION)
    for strength in (0, 0.5, 1, 1.6):
        red.turn_dial("left", strength)
        label = "one" if strength == 1 else f"one at {strength:g}"
        red.page.locator("#dv-conversation-left .dv-tally", has_text=f"{label} · 8 tokens").wait_for()
        left, right = red.both(1)  # the same question once more
        texts[strength] = printable(left)
        (answer,) = answers(opened[1], [("one", first(QUESTION), seen)], [float(strength)], max_new_tokens=TOKENS)
        assert texts[strength] == printable(answer)
    assert texts[0] == printable(right)
    assert len(set(texts.values())) > 2


def test_a_page_with_a_key(chromium: Any, model: ServedModel, pictures: dict[str, Path], uploads: Path) -> None:
    with page_of(model, uploads, SETTINGS, rules=AccessRules(key="open-sesame")) as (at, _):
        context = chromium.new_context()
        assert context.request.get(at).status == 401
        context.close()
        context = chromium.new_context(http_credentials={"username": "me", "password": "open-sesame"})
        visitor = Visitor(context, at)
        visitor.show(pictures["red"])
        visitor.see(1)
        assert all(visitor.ask(QUESTION))
        context.close()


def test_what_cannot_be_shown_is_said_and_nothing_stays(red: Visitor, pictures: dict[str, Path], uploads: Path) -> None:
    for file, name in (
        (pictures["broken"], "broken.png"),
        (pictures["broken.mp4"], "broken.mp4"),
        (pictures["large"], "large.png"),
        ({"name": "many.png", "mimeType": "image/png", "buffer": b"0" * 200_000}, "many.png"),
    ):
        red.show(file)
        red.page.locator("#dv-notice .dv-notice", has_text=name).wait_for()
    red.show({"name": "huge.png", "mimeType": "image/png", "buffer": b"0" * 500_000})  # is not sent at all
    red.page.get_by_text("maximum allowed size of 409.6 Kb").wait_for()
    red.show(*[pictures["red"]] * 3)
    red.page.locator("#dv-notice", has_text="3 pictures, and 2 are allowed here").wait_for()
    red.see(1)  # what was shown before stays
    assert nothing_left(uploads)
    red.page.fill(QUESTION_BOX, "<image> what?")
    red.page.keyboard.press("Enter")
    red.page.locator("#dv-notice", has_text="the text holds <image>").wait_for()


@pytest.mark.slow
def test_two_answers_in_one_batch_and_a_new_talk(visitor, opened, pictures, monkeypatch) -> None:
    batches = batches_of(opened[1], monkeypatch)
    visitor.show(pictures["wide"])
    visitor.see(1)
    visitor.page.fill(QUESTION_BOX, QUESTION)
    assert visitor.captions() == ["60 × 17"]
    visitor.turn_dial("left", 0.5)  # nothing was asked yet, and nothing changes
    visitor.page.wait_for_timeout(500)
    assert [visitor.page.inner_text(f"#dv-{name}") for name in ("ask", "stop")] == ["Ask", "Stop"]
    visitor.page.click("#dv-ask")
    _, right = visitor.both(1)
    assert batches == [[("one", 0.5), None]]
    assert printable(right) == expected(opened[1], "base", first(QUESTION), PromptMedia(pictures=(WIDE,)))
    visitor.page.click("#dv-anew")
    visitor.page.locator("#dv-conversation-left", has_text="will answer here").wait_for()
    visitor.see(1)
    visitor.page.click("#dv-nothing")
    visitor.see(0)


@pytest.fixture
def long_answers(visitor: Visitor, opened: tuple[str, Engine], monkeypatch: Any) -> Visitor:
    """Somebody who asks for long answers, none of which ends before it is as long as it may be, and that takes long."""
    rows = opened[1]._decoder
    holding = rows._holding
    monkeypatch.setattr(opened[1].model.backbone.model.generation_config, "eos_token_id", None)
    monkeypatch.setattr(rows, "ends", frozenset())
    monkeypatch.setattr(rows, "_holding", lambda *args: (time.sleep(0.1), holding(*args))[1])
    visitor.page.get_by_text("Settings").click()
    visitor.page.get_by_label("number input for Longest answer").fill("1000")
    visitor.page.fill(QUESTION_BOX, QUESTION)
    return visitor


@pytest.mark.slow
def test_a_question_waits_for_the_picture_that_was_chosen(chromium, opened, pictures, monkeypatch) -> None:
    """On a slow machine, of a slow server: what was shown before stays until it has read the new picture."""
    look = SideBySide.look
    monkeypatch.setattr(SideBySide, "look", lambda *args: (time.sleep(1), look(*args))[1])
    context = chromium.new_context()
    slow = Visitor(context, opened[0], slower=8)
    for name, picture in (("red", RED), ("wide", WIDE)):
        slow.show(pictures[name])
        question = f"What colour is the {name} one?"
        slow.page.fill(QUESTION_BOX, question)
        slow.page.keyboard.press("Enter")
        slow.page.locator("#dv-conversation-left .dv-asked", has_text=question).wait_for()
        check(slow.both(1), opened[1], question, PromptMedia(pictures=(picture,)))
    context.close()


def test_stop_keeps_what_was_said_and_what_is_typed_meanwhile_stays_typed(long_answers: Visitor) -> None:
    """Enter takes it once the answer is over, not before; pressing Ask twice asks once."""
    page = long_answers.page
    page.dblclick("#dv-ask")
    page.locator("#dv-conversation-left .dv-said").wait_for()
    page.fill(QUESTION_BOX, "And then?")
    page.keyboard.press("Enter")
    page.wait_for_timeout(300)
    assert page.input_value(QUESTION_BOX) == "And then?"
    page.click("#dv-stop")
    left, _ = long_answers.both(1)
    assert left
    assert "stopped" in page.locator("#dv-conversation-left").inner_text()
    assert page.input_value(QUESTION_BOX) == "And then?"
    page.press(QUESTION_BOX, "Enter")
    page.locator("#dv-conversation-left .dv-asked", has_text="And then?").wait_for()
    page.click("#dv-stop")
    long_answers.both(2)


# The page's door Train, over the real command: from dropped pictures to an answer.


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


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    write_tiny_llava(tmp_path / "runs" / "tiny" / "base")
    yield tmp_path
    for run in (tmp_path / "runs").iterdir():
        if (process := locking_process(run)) is not None:
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
    (run / "run.yaml").write_text(
        (run / "run.yaml").read_text().replace("replay: 0.05", "replay: 0.0")
    )  # takes minutes
    one.page.click("#dv-start")
    until(lambda: (run / LOSS_LOG).is_file() and (run / LOSS_LOG).stat().st_size)
    process = locking_process(run)
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
        two.pick("#dv-run", "runs/mine")
        two.state("Ready to train.")
        two.page.click("#dv-start")
        two.state("runs/dropped is at work")
        assert not (place / "runs" / "mine" / "output.txt").exists()
        page.kill()
    assert locking_process(run) == trains
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
    assert locking_process(tmp_path) is None
    with lock_run_folder(tmp_path):
        assert locking_process(tmp_path) == os.getpid()
        lock = tmp_path / ".writing.lock"
        os.utime(lock, (1, 1))  # of a process that was there before this one began, and had its number
        assert locking_process(tmp_path) is None
    (tmp_path / ".writing.lock").write_text(f"process {os.getpid()} on elsewhere")
    assert locking_process(tmp_path) is None
