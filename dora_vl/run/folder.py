"""The folder a run writes to: whether a run may start there, and the results of earlier ones.

`watched/` in it holds the questions that are asked while it trains, their pictures and answers.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import fcntl
import io
import json
import logging
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import psutil
from PIL import Image, ImageOps

from dora_vl.adapters.files import (
    LAST,
    checkpoint_to_resume,
    complete_checkpoints,
    refuse_to_replace_adapter,
    rename_later_checkpoints,
    step_of,
)
from dora_vl.errors import UNWRITABLE, BadSample, SettingError, UserError
from dora_vl.files import METRICS, NOT_YET, SETS, clear_leftovers, json_or_nothing, write_json, write_json_lines
from dora_vl.run.settings import RunConfig, settings_of

logger = logging.getLogger(__name__)

ADAPTER = "adapter"
LOSS_LOG = "log.jsonl"
SKIPPED = "skipped.jsonl"
FAULTS = "faults.jsonl"
DRAWN = "drawn.jsonl"
"""Holds a question of each step that learned from rewards, with the answers that were drawn to it."""
REPLAY = "replay.jsonl"
"""Holds the base's own chats that a run learned from (`data.replay`)."""
PROJECTOR_START = "projector_start.safetensors"
SETTINGS = "settings.json"
PLAN = "plan.json"
PROBE = "probe.json"
"""Holds the answers of a linear probe of the base's picture features to the test questions, by `dora-vl init`."""
WATCHED = "watched"
PREDICTED = ("predictions.jsonl", "scores.jsonl")
SAVED = (ADAPTER, METRICS, *PREDICTED)
"""These took work to make; a run that left none of them, nor a checkpoint, failed before its first save."""
RESULTS = (
    *(ADAPTER, LOSS_LOG, METRICS, SKIPPED, FAULTS, DRAWN, REPLAY, *PREDICTED, "predictions.settings.json", WATCHED),
    *(PROJECTOR_START, "loss_curve.png", "contact_sheet.png"),
)
IF_STOPPED = "if_stopped"
_OVERWRITE_HINT = "--overwrite true removes it, --training.output_dir names another folder"
START_SETTINGS = frozenset({"resume", "overwrite", "test_only"})
"""These settings are of one start, not of the run: `settings.json` as --config must not repeat an overwrite."""
UNRECORDED_SETTINGS = frozenset({"watch", "try_largest_batch"})
"""These settings change nothing of what a run leaves."""
TRAINING_METRICS = (
    *("train_seconds", "samples_per_second", "train_samples", "train_steps"),
    *("padding_share", "skipped_samples", "shrunk_samples", "steps_left_out", "steps_alike"),
)
"""These keys of `metrics.json` are about the training."""


def run_folder_of(training: Mapping[str, Any]) -> Path:
    """Returns the folder that a run writes to, `training.output_dir`."""
    if "output_dir" not in training:
        raise SettingError("training.output_dir", " is missing: name the folder for checkpoints, adapter and logs")
    return Path(training["output_dir"])


def path_in_run(path_in_settings: object, folder: Path, settings: Mapping[str, Any]) -> Path:
    """Resolves a path of a run's settings against the folder that the run was started in, else against this one.

    That folder is known where `training.output_dir` is relative and the run's folder still ends with it.
    """
    path, output = Path(str(path_in_settings)), Path(str((settings.get("training") or {}).get("output_dir", "")))
    resolved = folder.resolve()
    if path.is_absolute() or output.is_absolute() or resolved.parts[-len(output.parts) :] != output.parts:
        return path
    started_in = Path(*resolved.parts[: -len(output.parts)])
    return started_in / path if (started_in / path).exists() else path


def results_in(folder: Path) -> list[Path]:
    """Lists the results and complete checkpoints that an earlier run left."""
    return [folder / name for name in RESULTS if (folder / name).exists()] + complete_checkpoints(folder)


def _saved_results(folder: Path) -> list[Path]:
    return [path for path in results_in(folder) if path.name not in RESULTS or path.name in SAVED]


def checkpoint_of(config: RunConfig) -> Path | None:
    """Returns the checkpoint that a run resumes from; None where it starts anew."""
    folder = run_folder_of(config.training)
    checkpoints = complete_checkpoints(folder)
    if config.resume == LAST and not checkpoints:
        results = _saved_results(folder)
        way_out = f"{results[0].name} is there: {_OVERWRITE_HINT}" if results else "start without resume"
        raise SettingError("resume", f": no complete checkpoint in {folder}; {way_out}")
    if config.resume != IF_STOPPED:
        return checkpoint_to_resume(config.resume, folder)
    return checkpoints[-1] if checkpoints and not _is_finished(folder, config) else None


def is_finished_run(config: RunConfig) -> bool:
    """Returns True where `resume: if_stopped` finds a finished run; refuses one with other settings."""
    folder = run_folder_of(config.training)
    if config.resume != IF_STOPPED or config.overwrite or not _is_finished(folder, config):
        return False
    if changed := _changed_settings(folder, config):
        raise SettingError(
            changed[0],
            f": {folder} holds a finished run with other settings (in {', '.join(changed)}); {_OVERWRITE_HINT}",
        )
    return True


def is_trained_run(config: RunConfig) -> bool:
    """Returns True where `resume: if_stopped` finds a run with the same settings that is trained, tested or not."""
    folder = run_folder_of(config.training)
    if config.resume != IF_STOPPED or config.overwrite or not _is_trained(folder):
        return False
    return not _changed_settings(folder, config)


def _changed_settings(folder: Path, config: RunConfig) -> list[str]:
    """Names the sections in which a run's settings differ from those in its folder."""
    then, now = json_or_nothing(folder / SETTINGS), settings_of(config)
    names = sorted((now.keys() | then.keys()) - START_SETTINGS - UNRECORDED_SETTINGS)
    return [name for name in names if now.get(name) != then.get(name)]


def _is_trained(folder: Path) -> bool:
    """Returns True once a run has its adapter and the numbers of its training."""
    metrics, checkpoints = json_or_nothing(folder / METRICS), complete_checkpoints(folder)
    if checkpoints and step_of(checkpoints[-1]) > metrics.get("train_steps", 0):
        return False  # the numbers are of an earlier end; a resume was stopped later
    return (folder / ADAPTER).is_dir() and bool(metrics)


def _is_finished(folder: Path, config: RunConfig) -> bool:
    """Returns True once a run is trained and, where it is tested, has the scores of every set."""
    return _is_trained(folder) and (config.evaluation.tested is None or is_tested(folder))


def is_tested(folder: Path) -> bool:
    """Returns True once a run has the scores of every set of its test."""
    metrics = json_or_nothing(folder / METRICS)
    return SETS in metrics and NOT_YET not in metrics


def check_run_folder(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuses a folder that a run may not write to, before anything is written."""
    if resume and overwrite:
        raise SettingError("overwrite", " and resume exclude each other: one goes on, the other starts anew")
    results = _saved_results(folder)
    if results and not resume and not overwrite:
        resumes = "--resume last resumes it, " if complete_checkpoints(folder) else ""
        raise UserError(f"{folder} holds an earlier run's {results[0].name}; {resumes}{_OVERWRITE_HINT}")
    refuse_to_replace_adapter(folder / ADAPTER)  # not at the end, after hours of training


def prepare_run_folder(folder: Path, *, checkpoint: Path | None, overwrite: bool) -> None:
    """Creates the folder; removes half-written checkpoints of a crash, and an earlier run's results if `overwrite`.

    The log of a run that failed before its first save is removed too. Checkpoints that the run does not resume from are
    renamed: otherwise they would push out its own as the oldest, and `--resume last` would pick them.
    """
    check_run_folder(folder, resume=checkpoint is not None, overwrite=overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    clear_leftovers(folder)
    for path in results_in(folder) if checkpoint is None else ():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    if checkpoint is None:
        return
    for name in (ADAPTER, METRICS):  # results of the steps still to come would look as if they were this run's
        if (folder / name).exists():
            logger.info("%s is of the run before this resume; it is replaced at the end", folder / name)
    for was, now in rename_later_checkpoints(folder, checkpoint):
        logger.info("%s does not belong to the run resumed from %s; renamed to %s", was, checkpoint, now.name)


def write_settings(folder: Path, config: RunConfig) -> None:
    """Writes a run's settings, defaults and the variant included, as a file that --config takes."""
    settings = settings_of(config)
    write_json(folder / SETTINGS, {name: settings[name] for name in sorted(settings.keys() - START_SETTINGS)})


def add_metrics(path: Path, numbers: Mapping[str, Any]) -> None:
    """Adds numbers to a metrics file, or makes it."""
    metrics = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    write_json(path, {**metrics, **numbers})


def read_log(path: Path) -> list[dict[str, Any]]:
    """Reads the lines of a loss log; a last line cut short by a crash is left out."""
    lines: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:
            logger.warning("%s: line %d is incomplete; left out", path, len(lines) + 1)
            break
    return lines


LOCK = ".writing.lock"
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
"""File systems without locks answer with these, such as a Lustre that is mounted without `flock`."""


@contextlib.contextmanager
def lock_run_folder(folder: Path) -> Iterator[None]:
    """Holds a lock in the folder, which is created if missing and removed again if it stays empty.

    The lock is fcntl's, not a file that is there: the kernel lets it go with the process, forked data workers do not
    inherit it, and network file systems keep it on the server.
    """
    path, is_new = folder / LOCK, not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(path)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())  # tells others who holds it
    except OSError as error:
        raise UserError(f"{folder} cannot be written to: {error.strerror or error}; name another folder") from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)
        if is_new:
            with contextlib.suppress(OSError):  # not empty: it has the files that it was made for
                folder.rmdir()


def locking_process(folder: Path) -> int | None:
    """Returns the id of the process on this machine that holds the folder's lock; None if there is none.

    A killed process leaves its lock file. Its id may belong to another process by now, which is recognised by its later
    start.
    """
    path = folder / LOCK
    try:
        _, number, _, host = path.read_text(encoding="utf-8").split()
        process = psutil.Process(int(number))
        is_alive = process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= path.stat().st_mtime + 1
    except (OSError, ValueError, psutil.Error):
        return None
    return process.pid if is_alive and host == socket.gethostname() else None


def _locked(path: Path) -> int:
    """Opens the lock file and takes its lock; returns the descriptor."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.read(descriptor, 1000).decode(errors="replace") or "another process"
            if error.errno in (errno.EACCES, errno.EAGAIN):
                os.close(descriptor)
                raise UserError(
                    f"{path.parent}: {owner} writes to it; wait for its end, stop it, or name another folder"
                ) from error
            if error.errno not in NO_LOCKS:
                raise
            logger.warning("%s: no locks on this file system; see that nothing else writes there", path.parent)
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
        os.close(descriptor)  # the one before has just removed it, so the next has made, or will make, another


TOO_LITTLE_BYTES = 1 << 20
"""With less room than this a failed write counts as the disk's fault, whatever the library says."""


def last_checkpoint(folder: Path) -> str | None:
    """Names the last whole checkpoint of a run folder."""
    checkpoints = complete_checkpoints(folder)
    return checkpoints[-1].name if checkpoints else None


@contextlib.contextmanager
def full_disk_reported(folder: Path, what: str) -> Iterator[None]:
    """Turns a library's write errors into one `UserError` if the disk is full or read-only, or a file size limited.

    torch.save raises a RuntimeError without the word, safetensors an error of its own class with it. `what` is being
    written to the run folder.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        free = shutil.disk_usage(next(path for path in (folder, *folder.resolve().parents) if path.exists())).free
        # By the system's number or, from libraries with errors of their own, by its words.
        code = getattr(error, "errno", None)
        reasons = [number for number in UNWRITABLE if number == code or os.strerror(number) in str(error)]
        if not reasons and free >= TOO_LITTLE_BYTES:
            raise
        cause, remedy = UNWRITABLE[reasons[0] if reasons else errno.ENOSPC]
        last = last_checkpoint(folder)
        then = (
            f"{last} is the last whole checkpoint: {remedy}, then --resume last" if last else f"{remedy}, start again"
        )
        raise UserError(f"{folder}: {cause} ({free:,} bytes are free), {what} could not be written; {then}") from error


QUESTIONS, ANSWERS = "questions.json", "answers.jsonl"
SMALL_PX = 224
EXACT_PX = 128
"""Pictures up to this side are kept to the pixel, as PNG; larger ones are taken for photographs and become JPEG."""
JPEG_QUALITY = 82
SIDE, GAP_PX, PAPER = 2, 2, (255, 255, 255)
Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class WatchedQuestion:
    """Holds one question; `picture` names its small picture in the folder, "" where there is none."""

    id: str
    question: str
    truth: str
    picture: str = ""
    why_no_picture: str = ""


@dataclass(frozen=True, kw_only=True)
class Watch:
    """Holds the questions that a pipeline answers while it trains.

    Attributes:
        questions: in the order in which they are shown.
        pictures: by question's id, what opens its picture; raises BadSample where it cannot be read.
        ask: answers by id with the current weights, without what cannot be asked; every rank must call it.
        source: where the questions are from, for messages.
    """

    questions: tuple[WatchedQuestion, ...]
    pictures: Mapping[str, Callable[[], Image.Image]]
    ask: Callable[[], Mapping[str, str]]
    source: str


@dataclass(frozen=True, kw_only=True)
class Watched:
    """Holds the questions of a run's folder, and by step the answers by id."""

    folder: Path
    questions: tuple[WatchedQuestion, ...] = ()
    answers: Mapping[int, Mapping[str, str]] = field(default_factory=dict)


def evenly(items: Sequence[Item], count: int) -> list[Item]:
    """Returns `count` evenly spaced items from the first on; all if there are fewer."""
    count = min(count, len(items))
    return [items[number * len(items) // count] for number in range(count)]


def begin(run_folder: Path, watch: Watch, *, step: int) -> None:
    """Writes the questions and their pictures; of a resumed run the answers up to `step` stay."""
    folder = run_folder / WATCHED
    folder.mkdir(parents=True, exist_ok=True)
    earlier = [line for line in read_log(folder / ANSWERS) if line["step"] <= step] if step else []
    questions = []
    for number, question in enumerate(watch.questions):
        if question.id in watch.pictures:
            try:
                picture = small_picture(watch.pictures[question.id]().convert("RGB"))
            except BadSample as error:
                question = replace(question, why_no_picture=error.reason)
            else:
                name = f"{number}.{'png' if max(picture.size) <= EXACT_PX else 'jpg'}"
                picture.save(folder / name, quality=JPEG_QUALITY)
                question = replace(question, picture=name)
        questions.append(asdict(question))
    write_json(folder / QUESTIONS, {"source": watch.source, "questions": questions})
    write_json_lines(folder / ANSWERS, earlier)


def read_watched(run_folder: Path) -> Watched | None:
    """Reads `watched/` of a run; None where nothing was asked, or its files cannot be read."""
    folder = run_folder / WATCHED
    try:
        content = json.loads((folder / QUESTIONS).read_text(encoding="utf-8"))
        questions = tuple(WatchedQuestion(**row) for row in content["questions"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
    lines = read_log(folder / ANSWERS)
    answers = {
        line["step"]: line["answers"] for line in lines if isinstance(line.get("answers"), dict) and "step" in line
    }
    return Watched(folder=folder, questions=questions, answers=answers)


def small_picture(picture: Image.Image, max_size: int = SMALL_PX) -> Image.Image:
    """Shrinks a picture until its longer side has at most this many pixels."""
    return picture if max(picture.size) <= max_size else ImageOps.contain(picture, (max_size, max_size))


def data_url(picture: Image.Image, max_size: int = SMALL_PX) -> str:
    """Returns the picture, made small, as text inside a page: PNG to the pixel where it is tiny, else JPEG."""
    small = small_picture(picture.convert("RGB"), max_size)
    kind = "png" if max(small.size) <= EXACT_PX else "jpeg"
    file = io.BytesIO()
    small.save(file, format=kind, quality=JPEG_QUALITY, optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def tiled(pictures: Sequence[Image.Image]) -> Image.Image:
    """Joins up to four pictures, two by two, each in the size of the first; a single one stays as it is."""
    first, *others = pictures[: SIDE**2]
    if not others:
        return first
    width, height = first.size
    rows = -(-(1 + len(others)) // SIDE)
    tile = Image.new("RGB", (SIDE * width + GAP_PX, rows * height + (rows - 1) * GAP_PX), PAPER)
    for number, picture in enumerate([first, *others]):
        row, column = divmod(number, SIDE)
        fitted = picture if picture.size == first.size else ImageOps.pad(picture, first.size, color=PAPER)
        tile.paste(fitted, (column * (width + GAP_PX), row * (height + GAP_PX)))
    return tile
