"""What a run's folder holds, read as far as it can be; what is damaged is named, not fatal."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from PIL import Image

from dora_vl.adapters.folder import RECIPE_FILE
from dora_vl.data.example import Clip
from dora_vl.data.pictures import open_image
from dora_vl.data.video import Uniform, VideoReader
from dora_vl.errors import BadSample, UserError
from dora_vl.training.run_folder import ADAPTER, LOSS_LOG, METRICS, PLAN, SETTINGS, SKIPPED
from dora_vl.training.watching import EXACT_PX, JPEG_QUALITY, SIDE, Watched, read_watched, small_picture, tiled

EVALUATION = "evaluation"
NAMED = 8
Line = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run.

    Attributes:
        log: the lines of `log.jsonl` that are whole.
        damaged: what cannot be read, a sentence each.
        benchmarks: what `dora-vl evaluate` left in the folder `evaluation`.
        skipped: (id, reason) of unusable samples, and whether they are of the validation data.
    """

    label: str
    folder: Path
    settings: Line
    log: tuple[Line, ...]
    damaged: tuple[str, ...] = ()
    metrics: Line = field(default_factory=dict)
    plan: Line = field(default_factory=dict)
    recipe: Line = field(default_factory=dict)
    benchmarks: Line = field(default_factory=dict)
    skipped: tuple[tuple[str, str, bool], ...] = ()
    watched: Watched | None = None

    def section(self, name: str) -> Line:
        """A section of the settings; empty where there is none."""
        found = self.settings.get(name)
        return found if isinstance(found, Mapping) else {}

    def path(self, stated: object) -> Path:
        """Where a path of the settings is: from the folder that the run was started in, else from here.

        That folder is known where `training.output_dir` is relative and the run's folder still ends with it.
        """
        path = Path(str(stated))
        output = Path(str(self.section("training").get("output_dir", "")))
        whole = self.folder.resolve()
        if path.is_absolute() or output.is_absolute() or whole.parts[-len(output.parts) :] != output.parts:
            return path
        started_in = Path(*whole.parts[: -len(output.parts)])
        return started_in / path if (started_in / path).exists() else path

    @property
    def last_step(self) -> int:
        """The last step that the log knows."""
        return max((int(line["step"]) for line in self.log), default=0)


def read_run(folder: Path, label: str) -> RunRecord:
    """One run's folder.

    Raises:
        UserError: it is none, or training has not begun in it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name the training.output_dir of a run")
    if not (folder / LOSS_LOG).is_file():
        raise UserError(f"{folder} holds no {LOSS_LOG}: it is no run's folder, or its training has not begun")
    damaged: list[str] = []
    log = read_lines(folder / LOSS_LOG, damaged, usable=lambda line: _is_step(line.get("step")))
    if not log:
        raise UserError(f"{folder / LOSS_LOG}: not one whole line; the run has logged nothing yet, or it is damaged")
    skipped = read_lines(folder / SKIPPED, damaged) if (folder / SKIPPED).is_file() else []
    found = {name: _object(folder / name, damaged) for name in (SETTINGS, METRICS, PLAN)}
    return RunRecord(
        label=label,
        folder=folder,
        settings=found[SETTINGS],
        log=tuple(log),
        metrics=found[METRICS],
        plan=found[PLAN],
        recipe=_object(folder / ADAPTER / RECIPE_FILE, damaged),
        benchmarks=_object(folder / EVALUATION / METRICS, damaged),
        skipped=tuple((str(one.get("id")), str(one.get("reason")), one.get("of") == "validation") for one in skipped),
        watched=read_watched(folder),
        damaged=tuple(damaged),
    )


def read_lines(
    path: Path, damaged: list[str], *, usable: Callable[[Line], bool] = lambda line: True
) -> list[dict[str, Any]]:
    """The lines of a file that are usable objects; the numbers of the others become one sentence in `damaged`."""
    lines: list[dict[str, Any]] = []
    bad: list[int] = []
    for number, raw in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            value = json.loads(raw)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict) and usable(value):
            lines.append(value)
        elif raw.strip():
            bad.append(number)
    if bad:
        named = ", ".join(map(str, bad[:NAMED])) + (f" and {len(bad) - NAMED} more" if len(bad) > NAMED else "")
        damaged.append(f"{path.name}: {len(bad)} of {len(lines) + len(bad)} lines cannot be read (line {named})")
    return lines


def labels_of(folders: Sequence[Path]) -> list[str]:
    """What runs are called: their folders' names, or whole paths where two have one name."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _object(path: Path, damaged: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        damaged.append(f"{path.name}: not one whole JSON object")
        return {}
    return value


def _is_step(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


# Small pictures as text inside a page, each once and up to a budget, so that a page stays a few megabytes.


MOST_BYTES = 2_500_000
TOO_MANY = "left out, so that the page stays small"


class InlinePictures:
    """Pictures as data URLs; use it as a context manager.

    Args:
        most_bytes: of all of them together; later ones are left out.
    """

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._left = most_bytes
        self._urls: dict[str, str] = {}
        self._reader = VideoReader()

    def __enter__(self) -> InlinePictures:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reader.close()

    def file(self, path: Path) -> tuple[str, str]:
        """A picture file as a data URL, and why there is none."""
        return self._add(lambda: open_image(path.parent, path.name))

    def shown(self, root: Path | None, pictures: Sequence[str], clip: Clip | None) -> tuple[str, str]:
        """What a question shows as one small picture, and why there is none."""
        if not pictures and clip is None:
            return "", ""
        if root is None:
            return "", "the settings name no folder of its pictures"
        if clip is not None:
            return self._add(lambda: tiled(self._reader.read(root, clip, Uniform(SIDE**2)).pictures))
        return self._add(lambda: tiled([open_image(root, path) for path in pictures]))

    def _add(self, opened: Callable[[], Image.Image]) -> tuple[str, str]:
        if self._left <= 0:
            return "", TOO_MANY
        try:
            data, kind = encoded(opened())
        except BadSample as error:
            return "", error.reason
        name = hashlib.sha256(data).hexdigest()
        if name not in self._urls:
            if len(data) > self._left:
                return "", TOO_MANY
            self._left -= len(data)
            self._urls[name] = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
        return self._urls[name], ""


def data_url(picture: Image.Image) -> str:
    """The picture, made small, as text inside a page."""
    data, kind = encoded(picture)
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def encoded(picture: Image.Image) -> tuple[bytes, str]:
    """The picture, made small, as a file's bytes, and its kind: PNG to the pixel where it is tiny, else JPEG."""
    small = small_picture(picture.convert("RGB"))
    kind = "png" if max(small.size) <= EXACT_PX else "jpeg"
    file = io.BytesIO()
    small.save(file, format=kind, quality=JPEG_QUALITY, optimize=True)
    return file.getvalue(), kind
