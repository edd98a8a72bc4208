"""The page's Train tab: from dropped pictures to a tested adapter. Each click runs a command, which the page shows.

`page_runs.py` starts those commands and reads what they leave; nothing of a run is kept here.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, no_type_check

import gradio as gr  # pyright: ignore[reportMissingImports] - of the extra `web`
import torch
import yaml
from gradio.blocks import Block  # pyright: ignore[reportMissingImports]

from dora_vl.data.check import add_columns
from dora_vl.errors import UserError, short_repr
from dora_vl.evaluation.baselines import READABLE
from dora_vl.evaluation.forgetting import MUCH_FORGOTTEN
from dora_vl.evaluation.plots import series, smoothed
from dora_vl.report.run_record import Results, RunRecord, blind, read_record, read_tests, score_rows
from dora_vl.report.views import InlinePictures, watched_tables
from dora_vl.run.folder import ADAPTER, evenly
from dora_vl.run.settings import RunConfig
from dora_vl.serving.access import Uploads
from dora_vl.serving.page_parts import printed_view, state_view, table_view
from dora_vl.serving.page_runs import DATA, RUN_FILE, RUNS, Runs, command, free_folder, printed

FOLLOW_SECONDS = 2.0
PREVIEWED, WATCHED_STEPS = 6, 4
RANK, EPOCHS = 16, 10
RANKS, MOST_EPOCHS = (4, 128), 40
NOT_TRAINED = ("ready", "failed")
"""A run in one of these states starts from its YAML, so rank and epochs may still be chosen."""
STATES = {
    "ready": "Ready to train.",
    "starting": "Starting: the base is read, each picture is looked at.",
    "training": "Training.",
    "testing": "Trained; answering the test.",
    "stopped": "Stopped. Resume goes on from the last checkpoint.",
    "failed": "Failed before anything was saved. Its last line:",
    "finished": "Trained and tested. To train with other settings, look at the data again.",
}
"""Maps a run's state to what the page says about it."""
LOOK_FIRST = "Look at the data. Runs of before are under Run, also one that goes on."
NO_BASE = "There is no model to adapt here yet: type “dora-vl quickstart” in this folder first, or choose a base."
DAMAGED = (LookupError, TypeError, ValueError, AttributeError)
"""Reading a run's files may raise these if another version wrote them, or somebody has changed them."""
Update = dict[Any, Any]
"""Maps parts of the page to new values; other parts keep theirs."""


class TrainTab:
    """The Train tab's parts, and what happens there.

    Args:
        uploads: what visitors have dropped; it is moved below `data/`.
        make_room: lets go of the model that answers, before a run takes the GPU.
        key_of: maps people who have the page open to the keys of their browsers' tabs.
    """

    def __init__(self, uploads: Uploads, make_room: Callable[[], object], key_of: Mapping[str, str]) -> None:
        self.uploads, self.runs, self._make_room, self._key_of = uploads, Runs(), make_room, key_of
        self._made: dict[str, Path] = {}
        """These folders hold dropped files, and more may be added to them."""
        self._unseen: set[Path] = set()
        """Something was dropped into these after the last look at them."""

    def lay_out(self) -> None:
        """Lays the tab out where Gradio is building, and connects its clicks, except the one to the Ask tab."""
        self.mark = gr.State("")
        with gr.Row(equal_height=False, elem_id="dv-train"):
            with gr.Column(scale=4, min_width=300):
                self._lay_out_choices()
            with gr.Column(scale=7, min_width=320):
                self._lay_out_views()
        self._of_data = [self.rows, self.seen, self.batch, self.estimate, self.yaml]
        self.parts = [part for part in vars(self).values() if isinstance(part, Block)]
        quick = {"outputs": self.parts, "show_progress": "hidden", "queue": False, "api_visibility": "private"}
        queued = {**quick, "queue": True, "concurrency_limit": 4}
        self.files.upload(self.take_files, [self.files, self.folder], **quick)
        self.other_data.click(self.forget_data, [], **quick)
        seen = [self.folder, self.question, self.columns, self.base]
        self.look.click(self.look_at_data, seen, **queued)
        gr.on([part.input for part in seen], self.not_looked_at, [], **quick)
        self.run.input(self.show_run, [self.run], **quick)
        for slider in (self.rank, self.epochs):
            chosen = [self.run, self.rank, self.epochs, self.commands]
            slider.release(self.choose, chosen, **queued, trigger_mode="always_last")
        self.start.click(self.begin, [self.run, self.rank, self.epochs, self.commands], **quick)
        self.stop.click(self.stop_run, [self.run], **quick)
        gr.Timer(FOLLOW_SECONDS).tick(self.follow, [self.run, self.mark], **quick)

    def _lay_out_choices(self) -> None:
        gr.Markdown("### 1 · Your pictures and questions\nPictures, and a table: image, question, answer.")
        self.files = gr.File(show_label=False, file_count="multiple", height=124, elem_id="dv-drop")
        self.data_state = gr.HTML(padding=False, elem_id="dv-data-state")
        self.folder = gr.Textbox(label="or a folder on this machine", placeholder="my_pictures", elem_id="dv-folder",
                                 info="with such a table, or with a folder for each answer")  # fmt: skip
        self.question = gr.Textbox(label="One question for all pictures", placeholder="such as: what is it?",
                                   info="needed for a folder for each answer, or where the table has none",
                                   elem_id="dv-one")  # fmt: skip
        self.columns = gr.Textbox(label="Your table's headings", placeholder="Foto=image, Frage=question, Remark",
                                  info="only where they are not understood; a heading without a role is left out",
                                  elem_id="dv-columns")  # fmt: skip
        self.base = gr.Dropdown([], label="Base", allow_custom_value=True, elem_id="dv-base",
                                info="the model to adapt: a folder, or OWNER/NAME of the hub")  # fmt: skip
        with gr.Row():
            self.look = gr.Button("Look at the data", variant="primary", elem_id="dv-look")
            self.other_data = gr.Button("Other data", elem_id="dv-other-data")
        gr.Markdown("### 2 · Training")
        self.run = gr.Dropdown([], label="Run", elem_id="dv-run",
                               info="its folder; choose an earlier one to see, resume or ask it")  # fmt: skip
        self.rank = gr.Slider(*RANKS, RANK, step=4, label="Rank", elem_id="dv-rank",
                              info="16 is enough for most; more for long answers or much data")  # fmt: skip
        self.epochs = gr.Slider(1, MOST_EPOCHS, EPOCHS, step=1, label="Epochs", elem_id="dv-epochs",
                                info="how often each row is seen; more for few rows")  # fmt: skip
        with gr.Row():
            self.start = gr.Button("Start", variant="primary", interactive=False, elem_id="dv-start")
            self.stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="dv-halt")

    def _lay_out_views(self) -> None:
        html = partial(gr.HTML, padding=False)
        self.state = html(state_view("", "Drop pictures, or name a folder; then look at the data."), elem_id="dv-state")
        self.ask = gr.Button("Ask it", variant="primary", visible=False, elem_id="dv-ask-it")
        self.test = html(elem_id="dv-test")
        self.curve = gr.LinePlot(x="step", y="loss", color="of", title="Loss", color_title=" ", height=240,
                                 visible=False, elem_id="dv-curve")  # fmt: skip
        self.watched, self.rows, self.seen = (html(elem_id=f"dv-{name}") for name in ("watched", "rows", "seen-data"))
        self.commands = gr.Code(language="shell", label="Commands that the clicks run", lines=1,
                                interactive=False, wrap_lines=True, elem_id="dv-commands")  # fmt: skip
        with gr.Accordion("The first batch, as the model sees it", open=False):
            self.batch = html(elem_id="dv-batch")
        with gr.Accordion("What training will take", open=False):
            self.estimate = html(elem_id="dv-estimate")
        with gr.Accordion(f"{RUN_FILE}, the settings", open=False):
            self.yaml = gr.Code(language="yaml", show_label=False, interactive=False, elem_id="dv-yaml")

    def opened(self, key: str) -> Update:
        """Returns what a newly opened page shows: the files dropped before, and the current or last run."""
        bases = sorted(str(path.parent) for path in RUNS.glob("*/*/config.json"))
        choices = [("the demo's, else a small SmolVLM", ""), *zip(bases, bases, strict=True)]
        folders, made = self.runs.folders(), self._made.get(key)
        folder = self.runs.running() or next(iter(folders), None)
        shown: Update = {} if made is None else {self.folder: str(made)}
        if made in self._unseen:
            runs = gr.update(choices=[str(path) for path in folders], value=None)
            shown |= {**self.not_looked_at(), self.run: runs}
        elif folder is not None:
            shown |= self.show_run(str(folder))
        elif not bases:
            shown |= {self.data_state: state_view("", NO_BASE)}
        return {**shown, self.base: gr.update(choices=choices, value=shown.get(self.base, ""))}

    def take_files(self, paths: list[str], folder: str, request: gr.Request) -> Update:
        """Moves dropped files into a folder of their own, or to those that the same tab dropped before."""
        files, key = [Path(path) for path in paths], self._key_of.get(str(request.session_hash), "")
        try:
            if not all(self.uploads.holds(path) for path in paths):
                raise UserError("an uploaded file is gone; drop it again")
            to = Path(folder) if Path(folder) in self._made.values() else free_folder(DATA / "dropped")
            names = [file.name for file in files]
            if twice := [name for name in names if names.count(name) > 1]:
                raise UserError(f"two files are called {twice[0]}; rename one")
            to.mkdir(parents=True, exist_ok=True)
            self._made[key] = to
            self._unseen.add(to)
            replaced = [name for name in names if (to / name).exists()]
            for file in files:
                shutil.move(file, to / file.name)
        except UserError as error:
            return {self.files: None, self.data_state: state_view("failed", str(error))}
        finally:
            for file in files:
                self.uploads.delete(file)
        message = f"{sum(1 for _ in to.iterdir()):,} files are in {to}. Look at the data once all are there."
        message += f" Replaced: {', '.join(replaced)}." if replaced else ""
        shown = {self.files: None, self.folder: str(to), self.data_state: state_view("", message)}
        return {**self.not_looked_at(), **shown}

    def not_looked_at(self) -> Update:
        """Returns a page without a run: what Start would train is not what is on the left."""
        return {
            **dict.fromkeys([self.start, self.stop], gr.update(interactive=False)),
            **{self.run: None, self.mark: "", self.state: state_view("", LOOK_FIRST), self.commands: ""},
            **{self.ask: gr.update(visible=False), self.curve: gr.update(visible=False)},
            **dict.fromkeys([*self._of_data, self.watched, self.test], ""),
        }

    def forget_data(self, request: gr.Request) -> Update:
        """Starts over with other data; dropped files stay in their folder."""
        self._made.pop(self._key_of.get(str(request.session_hash), ""), None)
        return {**self.not_looked_at(), self.folder: "", self.columns: "", self.data_state: ""}

    @no_type_check  # a wrapper that checks types hides from Gradio that this is a generator
    def look_at_data(self, folder: str, question: str, columns: str, base: str) -> Iterator[Update]:
        """Yields what init says of the data, the first rows, the first batch, and what training takes."""
        yield {**self.not_looked_at(), self.look: gr.update(interactive=False),
               self.data_state: state_view("", "Looking at each picture …"), self.state: ""}  # fmt: skip
        try:
            if not folder.strip():
                raise UserError("drop pictures and a table, or name a folder")
            if "\0" in "".join((folder, question, columns, base or "")):
                raise UserError("a field holds a NUL character, which no name has; type it anew")
            self._unseen.discard(Path(folder.strip()))
            data = folder.strip() if not folder.strip().startswith("-") else f"./{folder.strip()}"
            to = self.runs.new_folder(Path(data).resolve().name)
            options = {"--ask": question.strip(), **column_options(columns)}
            options |= {"--model": (base or "").strip(), "--to": str(to)}
            arguments = ["init", data, *(f"{name}={value}" for name, value in options.items() if value)]
            arguments += ["--overwrite"] if to.exists() else []
            output = "\n".join(printed(arguments)).partition("\nnext:")[0].strip()
            yield {**self.show_run(str(to)), self.seen: printed_view([output]), self.commands: command(arguments),
                   self.data_state: left_out_view(output),
                   self.state: state_view("", "Making the first batch …")}  # fmt: skip
            show_batch = ["show", "batch", str(to / RUN_FILE)]
            commands = f"{command(arguments)}\n{command(show_batch)}"
            yield {self.batch: printed_view(printed(show_batch)), self.commands: commands}
            yield from self._count(to, commands)
        except UserError as error:
            yield {self.data_state: state_view("failed", str(error))}
        yield {self.look: gr.update(interactive=True)}

    @no_type_check  # as above
    def choose(self, run: str | None, rank: int, epochs: int, commands: str) -> Iterator[Update]:
        """Writes what was chosen into the YAML of a run that has not trained yet, and estimates again what it takes."""
        if not run or not self._write(folder := self.folder_of(run), rank, epochs):
            yield gr.skip()
            return
        try:
            yield from self._count(folder, commands)
        except UserError as error:
            yield {self.state: state_view("failed", str(error))}

    def _count(self, folder: Path, commands: str) -> Iterator[Update]:
        """Yields what training takes, by the YAML as it is now."""
        arguments = ["estimate", str(folder / RUN_FILE)]
        yield {self.yaml: _read(folder / RUN_FILE), self.state: state_view("", "Counting what training takes …")}
        lines = printed(arguments)
        if command(arguments) not in commands:
            commands = f"{commands}\n{command(arguments)}".strip()
        yield {self.estimate: printed_view(lines), self.commands: commands,
               self.state: state_view("ready", STATES["ready"], lines[-1])}  # fmt: skip

    def begin(self, run: str | None, rank: int, epochs: int, commands: str) -> Update:
        """Starts a run with the rank and epochs that are seen, or resumes it."""
        try:
            if not run:
                raise UserError("look at the data first")
            self._write(self.folder_of(run), rank, epochs)
            if torch.cuda.is_available() and self.runs.running() is None:
                self._make_room()
            arguments = self.runs.start(self.folder_of(run))
        except UserError as error:
            return {self.state: state_view("failed", str(error))}
        shown = commands if command(arguments) in commands else f"{commands}\n{command(arguments)}"
        return {**self.follow(run, ""), self.yaml: _read(self.folder_of(run) / RUN_FILE), self.commands: shown}

    def stop_run(self, run: str | None) -> Update:
        """Stops a run, which saves a checkpoint first."""
        if run:
            self.runs.stop(self.folder_of(run))
        return {self.stop: gr.update(interactive=False)}

    def show_run(self, run: str) -> Update:
        """Returns all that is seen of a run."""
        folder = self.folder_of(run)
        text = _read(folder / RUN_FILE)
        followed = self.follow(run, "")
        for slider, value in zip((self.rank, self.epochs), _rank_and_epochs(text), strict=True):
            followed[slider] = {**followed[slider], "value": value}
        return {
            **followed,
            self.run: gr.update(choices=[str(path) for path in self.runs.folders()], value=run),
            self.rows: rows_view(folder),
            self.yaml: text,
            self.commands: command(self.runs.train_arguments(folder)),
            **dict.fromkeys([self.data_state, self.seen, self.batch, self.estimate], ""),
            **dict(zip((self.folder, self.question, self.columns, self.base), looked_at(text), strict=True)),
        }

    def follow(self, run: str | None, mark: str) -> Any:
        """Returns how far a run is, if that has changed."""
        if not run or (status := self.runs.status(folder := self.folder_of(run))).mark == mark:
            return gr.skip()
        goes_on = status.state in ("starting", "training", "testing")
        update = {
            self.mark: status.mark,
            self.state: state_view(status.state, STATES[status.state], status.line),
            self.start: gr.update(
                value="Resume" if status.state == "stopped" else "Start",
                interactive=status.state in (*NOT_TRAINED, "stopped"),
            ),
            self.stop: gr.update(interactive=goes_on),
            **dict.fromkeys([self.rank, self.epochs], gr.update(interactive=status.state in NOT_TRAINED)),
            self.ask: gr.update(visible=(folder / ADAPTER).is_dir() and not goes_on),
            self.curve: gr.update(visible=False),
            **dict.fromkeys([self.watched, self.test], ""),
        }
        try:
            record = read_record(folder, folder.name)
            views = {self.curve: _curve(record), self.watched: watched_view(record), self.test: test_view(record)}
        except UserError:  # nothing is logged yet
            return update
        except DAMAGED as error:
            return {**update, self.state: state_view("failed", f"{folder} has files that cannot be read: {error!r}")}
        return {**update, **views}

    def _write(self, folder: Path, rank: int, epochs: int) -> bool:
        """Writes rank and epochs into the YAML of a run that has not trained, and returns False for any other run.

        What the page shows of the YAML as it is stays as it is there.
        """
        if self.runs.status(folder).state not in NOT_TRAINED:
            return False
        text = _read(folder / RUN_FILE)
        before = _rank_and_epochs(text)
        chosen = {"rank": int(rank), "alpha": 2.0 * rank} if rank != before[0] else {}
        chosen |= {"num_train_epochs": int(epochs)} if epochs != before[1] else {}
        for key, value in chosen.items():
            text = _setting(key).sub(rf"\g<1>{value}", text, count=1)
        if chosen:
            (folder / RUN_FILE).write_text(text, encoding="utf-8")
        return True

    def folder_of(self, run: str) -> Path:
        """Returns a run's folder by its name."""
        if Path(run).parent != RUNS or Path(run).name == "..":
            raise UserError(f"{run} is not a run's folder")
        return Path(run)


def column_options(text: str) -> dict[str, str]:
    """Returns init's options for headings as a user writes them: `Foto=image, Remark`, or pasted with the options."""
    try:
        words = shlex.split(text) if "--" in text else [text]
    except ValueError as error:  # a quotation mark without its second
        raise UserError(f"your table's headings {short_repr(text)}: {error}; write Foto=image, Remark") from error
    names = [name.strip() for word in words if not word.startswith("--") for name in word.split(",")]
    with_role = [name for name in names if "=" in name]
    return {"--columns": ",".join(with_role), "--ignore": ",".join(name for name in names if "=" not in name)}


def looked_at(text: str) -> tuple[str, str, str, str]:
    """Returns folder, question, headings and base that init was given for a YAML; empty where another wrote it."""
    match = re.search(r"(?m)^#   .*? init (.+)", text)
    parser = argparse.ArgumentParser(exit_on_error=False, add_help=False)
    parser.add_argument("folder")
    add_columns(parser)
    for option in ("--model", "--to", "--questions", "--test-share", "--seed"):
        parser.add_argument(option, default="")
    try:
        given, _ = parser.parse_known_args(shlex.split(match[1] if match else "''"))
    except (argparse.ArgumentError, ValueError, SystemExit):  # somebody has changed the line
        return "", "", "", ""
    headings = ", ".join(filter(None, [*given.columns.split(","), *given.ignore.split(",")]))
    return given.folder, given.ask, headings, given.model


def left_out_view(output: str) -> str:
    """Warns where init could not use some of the rows; empty if it could use all."""
    match = re.search(r"([\d,]+) rows, ([\d,]+) usable", output)
    if match is None or match[1] == match[2]:
        return ""
    message = f"Only {match[2]} of {match[1]} rows can be used; what init says of the data names why."
    return state_view("failed", message)


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _setting(key: str) -> re.Pattern[str]:
    return re.compile(rf"(?m)^( +{key}: +)(\d+(?:\.\d*)?)")


def _rank_and_epochs(text: str) -> tuple[int, int]:
    """Returns rank and epochs as the sliders can show those of a run's YAML."""
    values = []
    for key, otherwise, (least, most) in (("rank", RANK, RANKS), ("num_train_epochs", EPOCHS, (1, MOST_EPOCHS))):
        match = _setting(key).search(text)
        values.append(min(max(round(float(match[2])), least), most) if match else otherwise)
    return values[0], values[1]


def rows_view(folder: Path) -> str:
    """Returns a few training rows as init wrote them."""
    try:
        rows = [json.loads(line) for line in _read(folder / "train.jsonl").splitlines()]
        root = yaml.safe_load(_read(folder / RUN_FILE) or "data: {}")["data"].get("image_folder")
    except (*DAMAGED, yaml.YAMLError) as error:
        return printed_view([f"its rows cannot be shown: {error!r}"])
    if not rows or root is None:
        return ""
    roots = (Path(root), folder.resolve().parents[1] / root)  # `runs` may be a link from where the page was started
    root = next((path for path in roots if path.is_dir()), roots[0])
    pictures, shown = InlinePictures(), []
    for row in evenly(rows, PREVIEWED):
        images = row.get("image", [])
        picture = pictures.shown(root, [images] if isinstance(images, str) else images, None)
        texts = [re.sub("<(image|video)>\n?", "", turn["value"]) for turn in row["conversations"][:2]]
        shown.append((picture, texts))
    return table_view(f"{len(shown)} of {len(rows):,} rows to train on", ["", "question", "answer"], shown)


def watched_view(record: RunRecord) -> str:
    """Returns the questions that a run answers again and again while it trains."""
    tables, _ = watched_tables([record], InlinePictures())
    if not tables:
        return ""
    rows = []
    steps, at = tables[0]["steps"], evenly(range(len(tables[0]["steps"]) - 1), WATCHED_STEPS - 1)
    at = [*at, len(steps) - 1]
    for row in tables[0]["rows"]:
        shown = [row["answers"][number] for number in at]
        answers = [f"✓\N{NO-BREAK SPACE}{text}" if right else text or "–" for text, right in shown]
        rows.append((row["picture"], [row["question"], row["truth"], *answers]))
    head = ["", "question", "right answer", *(f"step {steps[number]:,}" for number in at)]
    return table_view("Asked while it trains", head, rows)


def test_view(record: RunRecord) -> str:
    """Returns the scores of a run's test beside its baselines, and what it forgot."""
    results, _ = read_tests(record)
    rows = []
    for row in score_rows([results])[0]:
        (cell,) = row.cells
        if cell is not None:
            interval = "" if cell.interval is None else "{:.1f} to {:.1f}".format(*cell.interval)
            rows.append((("", row.metric), [f"{cell.value:.1f}", interval, f"{cell.n:,}"]))
    if not rows:
        return ""
    rows += [(("", name), [value, "", ""]) for name, value in learned_and_kept(results, record).items()]
    head = ["", "value", "95 % interval", "questions"]
    warnings = [without_settings(note) for note in blind(record.label, results)]
    return table_view("The test, beside its baselines", head, rows, warnings)


def learned_and_kept(results: Results, record: RunRecord) -> dict[str, str]:
    """Tells by question how many answers are right, and of other questions how many are answered as before."""
    facts: dict[str, str] = {}
    for result in results.values():
        probe = (result.entry.get("baselines") or {}).get(READABLE) or {}
        for name, kind in (probe.get("questions") or {}).items():
            told = f"; {kind[READABLE]:g} can be told from the pictures" if READABLE in kind else ""
            facts[name] = f"{kind['learned']:g} of {kind['n']:g} right{told}"
    if answers := (record.metrics.get("forgetting") or {}).get("answers"):
        facts["other questions"] = f"{answers['kept']} of {answers['n']} are answered as before training"
        if answers["nats"]["adapted"] > MUCH_FORGOTTEN * answers["nats"]["base"]:
            facts["other questions"] += "; much is forgotten: train fewer epochs"
    return facts


def without_settings(advice: str) -> str:
    """Returns advice for somebody who sees no YAML: names of settings are words, or left out where words say it."""
    key = rf"\b(?:{'|'.join(field.name for field in fields(RunConfig))})\.(\w+)"
    advice = re.sub(rf" \([^()]*{key}[^()]*\)", "", advice)
    return re.sub(key, lambda match: match[1].replace("_", " "), advice)


def _curve(record: RunRecord) -> Any:
    steps, losses = series(record.log, "loss")
    lines = {"training, smoothed": (steps, smoothed(losses)), "validation": series(record.log, "eval_loss")}
    points = [[*point, name] for name, line in lines.items() for point in zip(*line, strict=True)]
    kinds = {"step": "quantitative", "loss": "quantitative", "of": "nominal"}
    value = {"columns": [*kinds], "data": points, "datatypes": kinds, "mark": "line"}
    return gr.update(value=value, visible=bool(points))
