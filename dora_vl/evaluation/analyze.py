"""`dora-vl analyze`: how training changed the weights, in magnitude and in direction (the DoRA paper, section 3).

A panel for each model, a point for each layer and checkpoint. A tuned model is a plain model folder, an adapter folder,
or a run's checkpoints of either. Nothing is merged on disk: a layer's weight after training comes in
blocks of outputs, each beside the base's.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from torch import Tensor
from tqdm import tqdm

from dora_vl.adapters.adapter import Factors, read_adapter, refuse_other_base
from dora_vl.adapters.base_weights import WEIGHTS, BaseWeights, holds_weights
from dora_vl.adapters.files import CONFIG_FILE, complete_checkpoints, step_of
from dora_vl.adapters.folder import INNER
from dora_vl.adapters.merge import factors_for_base
from dora_vl.backbones import register_towers
from dora_vl.core import functional
from dora_vl.core.analysis import FittedLine, VectorAxis, WeightChange, change_of_blocks, fit_line
from dora_vl.errors import UserError
from dora_vl.evaluation.plots import INK, PLAIN_TEXT, VALIDATION, new_figure, plain_axes, plain_text, save_png
from dora_vl.files import write_json
from dora_vl.shapes import Float

PAPER: Mapping[str, float] = {"full": -0.62, "model": -0.62, "lora": 0.83, "dora": -0.31}
"""Maps a method to the correlation of dM and dD over VL-BART's query weights (figure 2); the sign is the claim."""
MARKERS = "oDs^vP*X<>"
PANEL_WIDTH, HEIGHT = 4.2, 4.6  # inches
LEGEND_ENTRIES = 8
DRAWS, LEAST_LAYERS = 1000, 5
Blocks = Iterator[tuple[Float[Tensor, "outputs in_"], Float[Tensor, "outputs in_"]]]


@dataclass(frozen=True)
class Saved:
    """Weights given by a path, or one checkpoint of the run there."""

    folder: Path
    step: int | None = None
    """The checkpoint was saved after this optimizer step; None for a folder that is not a run."""

    @property
    def is_adapter(self) -> bool:
        """Tells whether the folder holds an adapter, not a model."""
        return (self.folder / CONFIG_FILE).is_file()

    def check_base(self, base: BaseWeights) -> None:
        """Refuses an adapter that records another content hash of its base."""
        if self.is_adapter:
            refuse_other_base(read_adapter(self.folder).recipe, base.folder, str(self.folder))


def saved_in(path: Path) -> tuple[Saved, ...]:
    """Lists every complete checkpoint of a run, oldest first; for other folders only the folder."""
    checkpoints = complete_checkpoints(path)
    if checkpoints:
        return tuple(Saved(_weights_folder(checkpoint), step_of(checkpoint)) for checkpoint in checkpoints)
    return (Saved(_weights_folder(path)),)


def _weights_folder(folder: Path) -> Path:
    for candidate in (folder, folder / INNER):
        if (candidate / CONFIG_FILE).is_file():
            return candidate
    if holds_weights(folder):
        return folder
    files = sorted(p.name for p in folder.iterdir())[:8] if folder.is_dir() else "no such folder"
    raise UserError(
        f"{folder} is not a model ({WEIGHTS}), adapter ({CONFIG_FILE}) or run with complete checkpoints: {files}"
    )


@dataclass(frozen=True)
class TunedWeights:
    """A tuned model and its base, layer by layer."""

    source: str
    base: BaseWeights
    method: str
    """Names an adapter's method (`dora`, `lora`, ...); `model` means a folder of whole weights."""
    stored_layers: frozenset[str]
    """These layers are stored as a whole weight, not as factors."""
    read: Callable[[str], Tensor]
    factors: Mapping[str, Factors] = field(default_factory=dict)

    def blocks(self, layer: str) -> Blocks:
        """Yields a weight before and after training as [out, in], in blocks of outputs; computed ones in float64."""
        weight = self.base.weight_of(layer)
        if (factors := self.factors.get(layer)) is not None:
            matrix = factors.as_matrix(weight)
            for start in range(0, len(matrix), functional.NORM_CHUNK_ROWS):  # each output's norm is its own
                part = slice(start, start + functional.NORM_CHUNK_ROWS)
                before = matrix[part].double()
                b, m = (None if tensor is None else tensor[part] for tensor in (factors.lora_B, factors.magnitude))
                yield before, functional.merged_weight(before, factors.lora_A, b, m, factors.scale)
            return
        after = self.read(layer)
        if after.shape != weight.shape:
            raise UserError(
                f"{self.source}: {layer} is {list(after.shape)}, the base's {list(weight.shape)}; is it the right base?"
            )
        transposed = layer in self.base.transposed_layers
        plain = Factors(lora_A=None, lora_B=None, magnitude=None, scale=1.0, transposed=transposed)
        both = (plain.as_matrix(matrix).split(functional.NORM_CHUNK_ROWS) for matrix in (weight, after))
        yield from zip(*both, strict=True)


@contextmanager
def opened(saved: Saved, base: BaseWeights) -> Iterator[TunedWeights]:
    """Opens a tuned model and its base."""
    if saved.is_adapter:
        adapter = read_adapter(saved.folder)
        factors = factors_for_base(base, adapter)
        extras = {name.removesuffix(".weight") for name in adapter.extras if name.endswith(".weight")}
        stored_layers = frozenset(name for name in matrices_of(base) if name in extras)
        read: Callable[[str], Tensor] = lambda layer: adapter.extras[f"{layer}.weight"]  # noqa: E731
        yield TunedWeights(adapter.source, base, adapter.method, stored_layers, read, factors)
        return
    with BaseWeights(saved.folder) as model:
        stored_layers = frozenset(name for name in matrices_of(model) if f"{name}.weight" in base.tensors)
        if not stored_layers:
            raise UserError(
                f"{saved.folder} has no matrix of {base.folder}, but {sorted(model.tensors)[:2]}; wrong base?"
            )
        yield TunedWeights(str(saved.folder), base, "model", stored_layers, model.weight_of)


def matrices_of(weights: BaseWeights) -> list[str]:
    """Lists layers whose weight has two axes or more and a dtype that training uses."""
    return [
        name.removesuffix(".weight")
        for name, stored in weights.tensors.items()
        if name.endswith(".weight") and len(stored.shape) >= 2 and stored.dtype in {"F64", "F32", "F16", "BF16"}
    ]


@dataclass(frozen=True)
class Point:
    """One layer at one checkpoint: how far it moved."""

    layer: str
    step: int | None
    change: WeightChange


@dataclass(frozen=True)
class Panel:
    """The points of a tuned model."""

    label: str
    source: str
    method: str
    points: tuple[Point, ...]
    unchanged: int
    """Counts matrices, over all checkpoints, that equal the base's bit by bit; they are frozen and give no points."""

    @property
    def line(self) -> FittedLine | None:
        """Fits dM over dD through all points."""
        return fit_line([p.change.direction for p in self.points], [p.change.magnitude for p in self.points])

    def numbers(self) -> str:
        """Returns slope and correlation with its interval, beside the paper's correlation."""
        line, limits, paper = self.line, self.interval, PAPER.get(self.method)
        if line is None:
            return "no line: the points lie in one place"
        between = "" if limits is None else f" ({limits[0]:.2f} to {limits[1]:.2f})"
        beside = "" if paper is None else f", the paper's {paper:.2f}"
        return f"slope {line.slope:.3g}, correlation {line.correlation:.2f}{between}{beside}"

    @cached_property
    def interval(self) -> tuple[float, float] | None:
        """Returns the correlation's 95 % interval from a bootstrap over layers, each with all its checkpoints."""
        by_layer: dict[str, list[Point]] = {}
        for point in self.points:
            by_layer.setdefault(point.layer, []).append(point)
        rng, drawn = Random(0), list[float]()
        for _ in range(DRAWS):
            points = [point for name in rng.choices(list(by_layer), k=len(by_layer)) for point in by_layer[name]]
            line = replace(self, points=tuple(points)).line
            drawn += [] if line is None else [line.correlation]
        if len(by_layer) < LEAST_LAYERS or len(drawn) < DRAWS // 2:
            return None
        drawn.sort()
        return drawn[round(0.025 * (len(drawn) - 1))], drawn[round(0.975 * (len(drawn) - 1))]

    @property
    def steps(self) -> tuple[int | None, ...]:
        """Returns the checkpoints' steps, oldest first."""
        return tuple(dict.fromkeys(point.step for point in self.points))


@dataclass(frozen=True)
class Request:
    """A model to decompose."""

    label: str
    path: Path
    saved: tuple[Saved, ...]


def layers_to_compare(requests: Sequence[Request], base: BaseWeights, globs: Sequence[str]) -> list[str]:
    """Lists the layers that all panels share, in the model's order: those of `globs`, else all adapted ones or all."""
    adapted: set[str] = set()
    matrices: set[str] = set()
    for request in requests:
        with opened(request.saved[0], base) as tuned:
            adapted |= set(tuned.factors)
            matrices |= set(tuned.factors) | tuned.stored_layers
    chosen = adapted or matrices
    if globs:
        for glob in globs:
            if not any(fnmatchcase(layer, glob) for layer in matrices):
                raise UserError(f"--layers {glob!r} matches none of {len(matrices)} matrices, such as {min(matrices)}")
        chosen = {layer for layer in matrices if any(fnmatchcase(layer, glob) for glob in globs)}
    # Layer 2 before layer 10.
    return sorted(chosen, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])


def measured(
    request: Request, base: BaseWeights, layers: Sequence[str], *, axis: VectorAxis, done: Callable[[], object]
) -> Panel:
    """Measures one model, layer by layer and checkpoint by checkpoint; calls `done` after each."""
    points: list[Point] = []
    unchanged, method = 0, ""
    for saved in request.saved:
        with opened(saved, base) as tuned:
            method = tuned.method
            for layer in layers:
                if layer in tuned.factors or layer in tuned.stored_layers:
                    change = change_of_blocks(tuned.blocks(layer), axis=axis)
                    if not math.isfinite(change.magnitude) or not math.isfinite(change.direction):
                        raise UserError(f"{layer} holds NaN or infinity in {tuned.source} or in {base.folder}")
                    if layer in tuned.factors or change.magnitude or change.direction:
                        points.append(Point(layer, saved.step, change))
                    else:
                        unchanged += 1
                done()
    if not points:
        raise UserError(f"{request.path} changes none of the {len(layers)} layers that are compared; see --layers")
    return Panel(request.label, str(request.path), method, tuple(points), unchanged)


def as_json(panels: Sequence[Panel], base: Path, axis: VectorAxis) -> dict[str, Any]:
    """Converts all panels to plain JSON values."""
    entries = [
        {
            "label": panel.label,
            "source": panel.source,
            "method": panel.method,
            "regression": None if panel.line is None else asdict(panel.line),
            "correlation_interval_95": panel.interval,
            "correlation_in_the_paper": PAPER.get(panel.method),
            "unchanged_matrices": panel.unchanged,
            "points": [
                {
                    "layer": point.layer,
                    "step": point.step,
                    "magnitude_change": point.change.magnitude,
                    "direction_change": point.change.direction,
                    "vectors": point.change.vectors,
                    "vectors_without_direction": point.change.without_direction,
                }
                for point in panel.points
            ],
        }
        for panel in panels
    ]
    return {"base": str(base), "axis": axis, "panels": entries}


def draw_panels(panels: Sequence[Panel], layers: Sequence[str], to: Path) -> None:
    """Draws every panel side by side, each with its own scales: colour is a layer's depth, marker a checkpoint."""
    figure = new_figure(PANEL_WIDTH * len(panels) + 1.2, HEIGHT)
    figure.set_layout_engine("constrained")
    depth = {layer: index for index, layer in enumerate(layers)}
    all_axes = [figure.add_subplot(1, len(panels), number + 1) for number in range(len(panels))]
    for axes, panel in zip(all_axes, panels, strict=True):
        _draw_panel(axes, panel, depth)
    all_axes[0].set_ylabel("magnitude change ΔM", color=INK)
    colours = ScalarMappable(Normalize(0, max(len(layers) - 1, 1)), "viridis")
    bar = figure.colorbar(colours, ax=all_axes, pad=0.02, aspect=30)
    bar.set_label("layer, in the model's order", color=INK)
    bar.ax.tick_params(colors=INK, length=0)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue] - matplotlib types it as a patch's spine
    save_png(figure, to)


def _draw_panel(axes: Axes, panel: Panel, depth: Mapping[str, int]) -> None:
    spacing = -(-len(panel.steps) // LEGEND_ENTRIES)  # of many checkpoints the legend has a few that are evenly spread
    for number, step in enumerate(panel.steps):
        points = [point for point in panel.points if point.step == step]
        axes.scatter(
            [point.change.direction for point in points],
            [point.change.magnitude for point in points],
            c=[depth[point.layer] for point in points],
            vmin=0,
            vmax=max(len(depth) - 1, 1),
            marker=MARKERS[number % len(MARKERS)],
            s=26,
            alpha=0.8,
            linewidths=0,
            label=str(step) if number % spacing == 0 else None,
        )
    plain_axes(axes, "direction change ΔD", "")
    axes.margins(0.06)
    axes.set_axisbelow(True)
    axes.ticklabel_format(scilimits=(-3, 3))
    line = panel.line
    if line is not None:
        directions = [point.change.direction for point in panel.points]
        ends = [min(directions), max(directions)]
        heights = [line.intercept + line.slope * end for end in ends]
        axes.plot(ends, heights, color=VALIDATION, linewidth=2)
    title = plain_text(f"{panel.label}\n" + panel.numbers().replace(", ", ",\n"))
    axes.set_title(title, color=INK, fontsize=11, linespacing=1.4, **PLAIN_TEXT)
    if len(panel.steps) > 1:
        axes.legend(frameon=False, fontsize=8, labelcolor=INK, title="step", title_fontsize=8)


def analyze(arguments: argparse.Namespace) -> Iterator[str]:
    """Measures, draws and writes; yields the lines to print."""
    register_towers()
    paths, labels = arguments.tuned, arguments.label
    if labels is not None and len(labels) != len(paths):
        raise UserError(f"{len(paths)} times TUNED and {len(labels)} times --label; give one for each")
    named = zip(labels or [str(path) for path in paths], paths, strict=True)
    requests = [Request(label, path, saved_in(path)) for label, path in named]
    if not arguments.to.resolve().parent.is_dir():
        raise UserError(f"--to {arguments.to}: there is no folder {arguments.to.resolve().parent}")
    with BaseWeights(arguments.base) as base:
        if not arguments.any_base:
            for request in requests:
                request.saved[-1].check_base(base)
        layers = layers_to_compare(requests, base, arguments.layers)
        yield f"{len(layers)} layers, {layers[0]} to {layers[-1]}"
        total = len(layers) * sum(len(request.saved) for request in requests)
        with tqdm(total=total, desc="comparing", unit="layer") as bar:
            panels = [measured(request, base, layers, axis=arguments.axis, done=bar.update) for request in requests]
    for panel in panels:
        unchanged = f", {panel.unchanged} unchanged" if panel.unchanged else ""
        yield f"{panel.label} ({panel.method}): {panel.numbers()} over {len(panel.points)} points{unchanged}"
    picture, numbers_file = (arguments.to.with_name(f"{arguments.to.name}{suffix}") for suffix in (".png", ".json"))
    draw_panels(panels, layers, picture)
    write_json(numbers_file, as_json(panels, arguments.base, arguments.axis))
    yield f"{picture}, {numbers_file}"
