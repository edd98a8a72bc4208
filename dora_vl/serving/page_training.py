"""The page's door Train: from dropped pictures to a tested adapter. Each click is a command, which is shown beside it.

`page_runs.py` starts those commands and reads what they leave; nothing of a run is kept here.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from html import escape
from io import StringIO
from pathlib import Path
from typing import Any, no_type_check

import gradio as gr  # pyright: ignore[reportMissingImports] - of the extra `web`
import pandas
import psutil
import torch
import yaml
from rich.console import Console
from rich.text import Text

from dora_vl.errors import UserError
from dora_vl.evaluation.pictures import series, smoothed
from dora_vl.files import METRICS, json_or_nothing
from dora_vl.report.answers import blind, read_tests, score_rows
from dora_vl.report.report import forgotten
from dora_vl.report.run_record import read_run
from dora_vl.report.views import InlinePictures, watched_tables
from dora_vl.run.folder import ADAPTER, LOSS_LOG, SETTINGS, read_log
from dora_vl.run.watched import evenly
from dora_vl.serving.access import Uploads
from dora_vl.serving.page_parts import notice_view
from dora_vl.serving.page_runs import DATA, RUN_FILE, Runs, RunStatus, command, printed

FOLLOW_SECONDS = 2.0
PREVIEWED, BATCH_LINES, BATCH_CHARACTERS = 6, 12, 600
RANK, EPOCHS = 16, 10
SAYS = {
    "ready": "Ready to train.",
    "starting": "It starts: the base is read, the pictures are looked at.",
    "training": "It trains.",
    "testing": "It is trained, and answers the test.",
    "stopped": "It was stopped; Resume goes on from its last checkpoint.",
    "failed": "It ended before it had saved anything; what it said last stands below.",
    "finished": "Trained and tested.",
}
"""What a person reads of a run's state."""
_PICTURES = threading.Lock()
"""Pictures and charts are made by one visitor's request at a time."""
Update = dict[Any, Any]


class TrainDoor:
    """The door's parts, and what happens there.

    Args:
        uploads: what visitors have dropped; it is moved below `data/`.
    """

    def __init__(self, uploads: Uploads) -> None:
        self.uploads, self.runs = uploads, Runs()
        self._made: set[Path] = set()
        """Folders of dropped files, which more may be added to."""

    def lay_out(self) -> None:
        """Lays the door's parts out in the tab that is open."""
        self.mark, self.step_seconds = gr.State(""), gr.State(None)
        with gr.Row(equal_height=False, elem_id="dv-train"):
            with gr.Column(scale=4, min_width=300):
                gr.HTML('<h2 class="dv-step">1 · Your pictures and questions</h2>')
                self.files = gr.File(label="Drop pictures, and a table with the columns image, question, answer",
                                     file_count="multiple", height=150, elem_id="dv-drop")  # fmt: skip
                self.folder = gr.Textbox(label="or name a folder on this machine", placeholder="my_pictures",
                                         info="with the table in it, or with a folder for each answer",
                                         elem_id="dv-folder")  # fmt: skip
                self.question = gr.Textbox(label="One question for all pictures", placeholder="what is it?",
                                           info="only where there is none in the table", elem_id="dv-one")  # fmt: skip
                self.base = gr.Dropdown(self._bases(), value="", label="Base", allow_custom_value=True,
                                        info="a folder, or a model of the hub: OWNER/NAME", elem_id="dv-base")  # fmt: skip
                self.look = gr.Button("Look at the data", variant="primary", elem_id="dv-look")
                gr.HTML('<h2 class="dv-step">2 · Train</h2>')
                self.run = gr.Dropdown([], label="Run", elem_id="dv-run",
                                       info="its folder; choose an earlier one to see, resume or ask it")  # fmt: skip
                self.rank = gr.Slider(4, 128, RANK, step=4, label="Rank", elem_id="dv-rank",
                                      info="16 does for most; more for long answers and much data")  # fmt: skip
                self.epochs = gr.Slider(1, 40, EPOCHS, step=1, label="Epochs", elem_id="dv-epochs",
                                        info="how often each row is seen; more for few rows")  # fmt: skip
                with gr.Row():
                    self.start = gr.Button("Start", variant="primary", interactive=False, elem_id="dv-start")
                    self.stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="dv-halt")
            with gr.Column(scale=7, min_width=320):
                self.notice = gr.HTML("", elem_id="dv-train-notice")
                self.state = gr.HTML("", elem_id="dv-state")
                self.ask = gr.Button("Ask it", variant="primary", visible=False, elem_id="dv-ask-it")
                self.test = gr.HTML("", elem_id="dv-test")
                self.curve = gr.LinePlot(x="step", y="loss", color="of", title="Loss", height=240, visible=False,
                                         elem_id="dv-curve")  # fmt: skip
                self.watched = gr.HTML("", elem_id="dv-watched")
                self.seen = gr.HTML("", elem_id="dv-data")
                with gr.Accordion("The first batch, as the model sees it", open=False):
                    self.batch = gr.HTML("", elem_id="dv-batch")
                with gr.Accordion("What it will take", open=False):
                    self.estimate = gr.HTML("", elem_id="dv-estimate")
                with gr.Accordion("The commands and the YAML behind it", open=False):
                    self.commands = gr.Code("", language="shell", label="what the clicks stand for", lines=3,
                                            interactive=False, elem_id="dv-commands")  # fmt: skip
                    self.yaml = gr.Code("", language="yaml", label=RUN_FILE, interactive=False, elem_id="dv-yaml")
        self.timer = gr.Timer(FOLLOW_SECONDS)
        followed = [self.state, self.ask, self.test, self.curve, self.watched, self.start, self.stop, self.mark]
        self.followed = [*followed, self.notice]
        shown = [self.rank, self.epochs, self.yaml, self.commands, self.seen, self.batch, self.estimate]
        self.parts = [*self.followed, *shown, self.run, self.base, self.step_seconds, self.look]

    def connect(self) -> None:
        """Connects clicks with what they do, but for Ask."""
        quick = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
        self.files.upload(self.take_files, [self.files, self.folder], [self.files, self.folder, self.notice], **quick)
        self.look.click(
            self.look_at_data,
            [self.folder, self.question, self.base],
            self.parts,
            **{**quick, "queue": True, "concurrency_limit": 4},
        )
        self.run.input(self.show_run, [self.run], self.parts, **quick)
        for slider in (self.rank, self.epochs):
            slider.release(
                self.choose,
                [self.run, self.rank, self.epochs, self.step_seconds],
                [self.yaml, self.state, self.notice],
                **quick,
            )
        self.start.click(self.begin, [self.run, self.commands], self.parts, **quick)
        self.stop.click(self.halt, [self.run], self.followed, **quick)
        self.timer.tick(self.follow, [self.run, self.mark], self.followed, **quick)

    def opened(self) -> Update:
        """Returns what somebody sees who opens the page: the run that goes on, else the last one."""
        folders = self.runs.folders()
        running = self.runs.running()
        folder = running or next(iter(folders), None)
        chosen = None if folder is None else str(folder)
        shown = {} if folder is None or running is None else self.show_run(chosen)
        value = gr.update(choices=[str(path) for path in folders], value=chosen if running else None)
        return {self.run: value, self.base: gr.update(choices=self._bases()), **shown}

    # -- what a person does ------------------------------------------------------------------------------------

    def take_files(self, paths: list[str] | None, folder: str) -> Update:
        """Moves dropped files into a folder of their own, or to those that were dropped before."""
        files = [Path(path) for path in paths or []]
        try:
            if not all(self.uploads.holds(str(file)) for file in files):
                raise UserError("a file is here no longer; drop it again")
            to = Path(folder) if Path(folder) in self._made else self._new_data()
            names = [file.name for file in files]
            taken = [name for name in names if names.count(name) > 1 or (to / name).exists()]
            if taken:
                raise UserError(f"two files are called {taken[0]}; rename one of them")
            for file in files:
                shutil.move(file, to / file.name)
            count = sum(1 for _ in to.iterdir())
            said = f'<p class="dv-faint">{count:,} files are in {escape(str(to))}.</p>'
            return {self.files: None, self.folder: str(to), self.notice: said}
        except UserError as error:
            return {self.files: None, self.notice: notice_view(str(error))}
        finally:
            for file in files:
                self.uploads.delete(file)

    @no_type_check  # a wrapper that checks types hides from Gradio that this is a generator
    def look_at_data(self, folder: str, question: str, base: str) -> Iterator[Update]:
        """Yields what init says of the data, the first rows and the first batch, and what training them takes."""
        yield {self.look: gr.update(interactive=False), self.notice: _working("looking at every picture")}
        try:
            if not folder.strip():
                raise UserError("drop pictures and a table, or name a folder")
            to = self.runs.new_folder(_plain(Path(folder.strip()).resolve().name))
            asked = ["--ask", question.strip()] if question.strip() else []
            based = ["--model", base.strip()] if base and base.strip() else []
            again = ["--overwrite"] if to.exists() else []
            words = [["init", folder.strip(), *asked, *based, "--to", str(to), *again]]
            lines = [line for line in printed(words[0]) if line and not line.startswith("\nnext:")]
            lines = [line for line in lines if not line.startswith("next:")]
            self._choose(to, RANK, None)
            listed = gr.update(choices=[str(path) for path in self.runs.folders()], value=str(to))
            yield {**self.show_run(str(to)), self.run: listed, self.seen: self._seen(to, lines),
                   self.commands: _commands(words), self.notice: _working("making the first batch")}  # fmt: skip
            words.append(["show", "batch", str(to / RUN_FILE)])
            lines = list(printed(words[1]))
            yield {self.batch: batch_view(lines), self.commands: _commands(words),
                   self.notice: _working("counting what it will take")}  # fmt: skip
            speed = ["--tflops", f"{teraflops():.3g}", "--mfu", "1"]
            words.append(["estimate", str(to / RUN_FILE), "--gpus", "1", *tokens_in(lines[0]), *speed])
            lines = list(printed(words[2]))
            seconds = float(match[1]) if (match := re.search(r"to ([\d.]+) s together", lines[-1])) else None
            yield {self.estimate: _lines(lines), self.step_seconds: seconds, self.notice: "",
                   self.commands: _commands(words), self.state: self._ready(to, seconds)}  # fmt: skip
        except UserError as error:
            yield {self.notice: notice_view(str(error))}
        finally:
            yield {self.look: gr.update(interactive=True)}

    def choose(self, run: str | None, rank: int, epochs: int, seconds: float | None) -> Update:
        """Writes what was chosen into the run's YAML."""
        if not run:
            return {self.notice: ""}
        folder = self._folder(run)
        if self.runs.status(folder).state not in ("ready", "failed"):
            return {self.notice: notice_view(f"{folder} was started already; look at the data again for another run")}
        self._choose(folder, int(rank), int(epochs))
        return {self.yaml: _read(folder / RUN_FILE), self.state: self._ready(folder, seconds), self.notice: ""}

    def begin(self, run: str | None, commands: str) -> Update:
        """Starts or resumes a run."""
        if not run:
            return {self.notice: notice_view("look at the data first")}
        folder = self._folder(run)
        words = self.runs.words_to_train(folder)
        try:
            self.runs.start(folder)
        except UserError as error:
            return {self.notice: notice_view(str(error))}
        text = command(words)
        shown = commands if commands.endswith(text) else f"{commands}\n{text}".strip()
        return {**self.follow(run, ""), self.commands: shown, self.notice: ""}

    def halt(self, run: str | None) -> Update:
        """Stops a run, which saves a checkpoint first."""
        if not run:
            return {self.notice: ""}
        self.runs.stop(self._folder(run))
        return {self.notice: _working("it finishes the step and saves it"), self.stop: gr.update(interactive=False)}

    def show_run(self, run: str | None) -> Update:
        """Returns all that is seen of a run."""
        if not run:
            return {self.notice: ""}
        folder = self._folder(run)
        text = _read(folder / RUN_FILE) or _read(folder / SETTINGS)
        numbers = {key: int(match[1]) for key in ("rank", "num_train_epochs") if (match := _setting(key).search(text))}
        words = self.runs.words_to_train(folder)
        return {
            **self.follow(run, ""),
            self.rank: numbers.get("rank", RANK),
            self.epochs: numbers.get("num_train_epochs", EPOCHS),
            self.yaml: text,
            self.commands: command(words),
            self.seen: self._seen(folder, ()),
            self.batch: "",
            self.estimate: "",
            self.notice: "",
        }

    def follow(self, run: str | None, mark: str) -> Any:
        """Returns how far a run is, where that has changed."""
        if not run:
            return gr.skip()
        folder = self._folder(run)
        status = self.runs.status(folder)
        if status.mark == mark:
            return gr.skip()
        can_start = status.state in ("ready", "failed", "stopped")
        resumes = "Resume" if status.state == "stopped" else "Start"
        update = {
            self.mark: status.mark,
            self.state: state_view(status),
            self.start: gr.update(value=resumes, interactive=can_start),
            self.stop: gr.update(interactive=status.goes_on),
            self.ask: gr.update(visible=(folder / ADAPTER).is_dir() and not status.goes_on),
            self.curve: _curve(folder),
            self.watched: "",
            self.test: "",
        }
        with _PICTURES:
            return {**update, self.watched: watched_view(folder), self.test: test_view(folder)}

    # -- inside ------------------------------------------------------------------------------------------------

    def _folder(self, run: str) -> Path:
        """Returns a run's folder by its name. Raises UserError where the page does not show such a run."""
        folder = Path(run)
        if folder not in self.runs.folders():
            raise UserError(f"{run} is no run here")
        return folder

    def _new_data(self) -> Path:
        number = 1
        while (folder := DATA / ("dropped" if number == 1 else f"dropped-{number}")).exists():
            number += 1
        folder.mkdir(parents=True)
        self._made.add(folder)
        return folder

    def _bases(self) -> list[tuple[str, str]]:
        """Returns the bases that are here, and what init takes by itself."""
        found = sorted(path.parent for path in Path("runs").glob("*/*/config.json"))
        return [("as init chooses", ""), *((str(folder), str(folder)) for folder in found)]

    def _choose(self, folder: Path, rank: int, epochs: int | None) -> None:
        """Changes a run's YAML, line by line, so that its comments stay."""
        text = _read(folder / RUN_FILE)
        values = {"rank": str(rank), "alpha": f"{2.0 * rank}"}
        values |= {} if epochs is None else {"num_train_epochs": str(epochs)}
        for key, value in values.items():
            text = _setting(key).sub(lambda match, value=value: match[0].replace(match[1], value, 1), text, count=1)
        (folder / RUN_FILE).write_text(text, encoding="utf-8")

    def _seen(self, folder: Path, lines: Sequence[str]) -> str:
        with _PICTURES:
            return rows_view(folder) + _lines(lines)

    def _ready(self, folder: Path, seconds: float | None) -> str:
        status = self.runs.status(folder)
        if seconds is None or status.state != "ready":
            return state_view(status)
        section = yaml.safe_load(_read(folder / RUN_FILE))
        rows = sum(1 for line in _read(folder / "train.jsonl").splitlines() if line)
        each = section["training"]["per_device_train_batch_size"] * section["training"]["gradient_accumulation_steps"]
        steps = max(1, rows * int(section["training"]["num_train_epochs"]) // each)
        minutes = math.ceil(steps * seconds / 60)
        free = psutil.virtual_memory().available / 2**30
        return state_view(status, f"{steps:,} steps, about {minutes:,} min on this machine; {free:.1f} GiB are free.")


# -- how it looks: HTML whose text is escaped ----------------------------------------------------------------------


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _plain(name: str) -> str:
    return re.sub(r"[^\w.\-]+", "_", name).strip("._-") or "my"


def _setting(key: str) -> re.Pattern[str]:
    return re.compile(rf"(?m)^ +\"?{key}\"?: +([\d.]+)")


def _commands(several: Sequence[Sequence[str]]) -> str:
    return "\n".join(map(command, several))


def _working(text: str) -> str:
    return f'<p class="dv-working">{escape(text)} …</p>'


def _lines(lines: Sequence[str]) -> str:
    return f'<pre class="dv-lines">{escape(chr(10).join(lines))}</pre>' if lines else ""


def state_view(status: RunStatus, more: str = "") -> str:
    """Returns where a run stands, and what it said last."""
    said = f'<p class="dv-faint">{escape(more or status.line)}</p>' if more or status.line else ""
    return f'<div class="dv-run" data-state="{status.state}"><b>{escape(SAYS[status.state])}</b>{said}</div>'


def rows_view(folder: Path) -> str:
    """Returns a few training rows as they were read: picture, question, answer."""
    try:
        root = Path(yaml.safe_load(_read(folder / RUN_FILE))["data"]["image_folder"])
        rows = [json.loads(line) for line in _read(folder / "train.jsonl").splitlines()]
    except (KeyError, TypeError, ValueError):
        return ""
    pictures = InlinePictures()
    cells = []
    for row in evenly(rows, PREVIEWED):
        images = row.get("image", [])
        url, why = pictures.shown(root, [images] if isinstance(images, str) else images, None)
        picture = f'<img alt="" src="{url}">' if url else escape(why)
        turns = [re.sub("<(image|video)>\n?", "", turn["value"]) for turn in row["conversations"][:2]]
        cells.append(f"<tr><td>{picture}</td>{''.join(f'<td>{escape(text)}</td>' for text in turns)}</tr>")
    pictures.close()
    head = "<tr><th>picture</th><th>question</th><th>answer</th></tr>"
    return f'<table class="dv-rows"><caption>{len(cells)} of {len(rows):,} rows to train on</caption>{head}{"".join(cells)}</table>'


def batch_view(lines: Sequence[str]) -> str:
    """Returns the lines of `dora-vl show batch` in their colours; long ones and many are cut, which is said."""
    console = Console(record=True, file=StringIO(), width=100_000, color_system="256", force_terminal=True)
    for line in lines[:BATCH_LINES]:
        text = Text.from_ansi(line)
        cut = len(text) - BATCH_CHARACTERS
        console.print(text[:BATCH_CHARACTERS] + Text(f" … and {cut:,} characters more" if cut > 0 else ""))
    text = console.export_html(inline_styles=True, code_format='<pre class="dv-lines">{code}</pre>')
    more = len(lines) - BATCH_LINES
    return text + (f'<p class="dv-faint">and {more:,} lines more, which the command shows</p>' if more > 0 else "")


def watched_view(folder: Path) -> str:
    """Returns the questions that a run answers again and again while it trains."""
    try:
        tables, _ = watched_tables([read_run(folder, folder.name)], InlinePictures())
    except UserError:
        return ""
    if not tables:
        return ""
    steps = tables[0]["steps"]
    rows = []
    for row in tables[0]["rows"]:
        url, why = row["picture"]
        picture = f'<img alt="" src="{url}">' if url else escape(why)
        answers = "".join(
            f'<td class="{"dv-right" if right else "dv-other"}">{escape(text or "–")}</td>'
            for text, right in row["answers"]
        )
        rows.append(
            f"<tr><td>{picture}</td><td>{escape(row['question'])}</td><td>{escape(row['truth'])}</td>{answers}</tr>"
        )
    head = "".join(f"<th>step {step:,}</th>" for step in steps)
    return (
        '<div class="dv-wide"><table class="dv-rows"><caption>Asked while it trains</caption>'
        f"<tr><th></th><th>question</th><th>right</th>{head}</tr>{''.join(rows)}</table></div>"
    )


def test_view(folder: Path) -> str:
    """Returns the scores of a run's test beside its baselines, and what it forgot."""
    try:
        record = read_run(folder, folder.name)
    except UserError:
        return ""
    results, _ = read_tests(record)
    rows = []
    for row in score_rows([results])[0]:
        cell = row.cells[0]
        if cell is not None:
            interval = "" if cell.interval is None else f"{cell.interval[0]:.1f} to {cell.interval[1]:.1f}"
            rows.append(
                f"<tr><td>{escape(row.metric)}</td><td><b>{cell.value:.1f}</b></td><td>{interval}</td><td>{cell.n:,}</td></tr>"
            )
    if not rows:
        return ""
    facts = forgotten(json_or_nothing(folder / METRICS).get("forgetting"))
    kept = "".join(f"<p>{escape(name)}: {escape(value)}</p>" for name, value in facts.items())
    warned = "".join(f'<p class="dv-trouble">{escape(text)}</p>' for text in blind(folder.name, results))
    return (
        '<table class="dv-rows"><caption>The test, beside what needs no model and no pictures</caption>'
        f"<tr><th></th><th>value</th><th>95 % interval</th><th>questions</th></tr>{''.join(rows)}</table>{warned}{kept}"
    )


def _curve(folder: Path) -> Any:
    log = read_log(folder / LOSS_LOG)
    rows = []
    for key, name in (("loss", "training, smoothed"), ("eval_loss", "validation")):
        steps, losses = series(log, key)
        values = smoothed(losses) if key == "loss" else losses
        rows += [{"step": step, "loss": value, "of": name} for step, value in zip(steps, values, strict=True)]
    return gr.update(value=pandas.DataFrame(rows, columns=["step", "loss", "of"]), visible=bool(rows))


def tokens_in(line: str) -> list[str]:
    """Returns the options of `dora-vl estimate` that the first line of `dora-vl show batch` gives numbers for."""
    found = re.search(
        r"samples (\d+), positions (\d+) rows of (\d+).*trained on (\d+) tokens", Text.from_ansi(line).plain
    )
    if found is None:
        return []
    samples, rows, length, labelled = map(int, found.groups())
    return ["--tokens", str(math.ceil(rows * length / samples)), "--labelled", str(math.ceil(labelled / samples))]


def teraflops(size: int = 1024) -> float:
    """Measures products of matrices on this machine's device, in TFLOP a second."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    left = torch.ones(size, size, dtype=torch.bfloat16, device=device)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        (left @ left)[0, 0].item()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times) / 1e12
