"""`dora-vl analyze`: how training changed the weights, in magnitude and in direction (the DoRA paper, section 3)."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dora_vl.errors import UserError
from dora_vl.evaluation.plots import INK, PLAIN_TEXT, VALIDATION, new_figure, plain_axes, plain_text, save_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from dora_vl.adapters.decomposition import Panel

MARKERS = "oDs^vP*X<>"
PANEL_WIDTH, HEIGHT = 4.2, 4.6  # inches
LEGEND_ENTRIES = 8


def draw_panels(panels: Sequence[Panel], layers: Sequence[str], to: Path) -> None:
    """Draws every panel side by side, each with its own scales: colour is a layer's depth, marker a checkpoint."""
    figure = new_figure(PANEL_WIDTH * len(panels) + 1.2, HEIGHT)
    figure.set_layout_engine("constrained")
    depth = {layer: index for index, layer in enumerate(layers)}
    all_axes = [figure.add_subplot(1, len(panels), number + 1) for number in range(len(panels))]
    for axes, panel in zip(all_axes, panels, strict=True):
        _draw_panel(axes, panel, depth)
    all_axes[0].set_ylabel("magnitude change ΔM", color=INK)
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

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


DESCRIPTION = """\
Measures, for every layer and every checkpoint, the mean change of the weight's magnitudes (dM) and of its directions
(dD, 1 - cosine), fits dM over dD, and draws the models side by side: section 3 of the DoRA paper. There the query
weights of VL-BART had a slope below 0 with full fine-tuning and with DoRA, above 0 with LoRA.

  dora-vl analyze llava-base/ runs/full runs/lora runs/dora --to decomposition
  dora-vl analyze llama/ llama-tuned/ adapter/ --label "full tuning" --label DoRA --layers '*.q_proj'

A TUNED is a model folder in safetensors, an adapter folder (PEFT's or ours, any method), or a run: each of its
checkpoints is one point a layer. Weights are read one tensor at a time. Writes NAME.png and NAME.json.
"""
OPENS_BASES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `dora-vl analyze`."""
    add = parser.add_argument
    add("base", type=Path, metavar="BASE", help="the model folder that training started from")
    add("tuned", type=Path, nargs="+", metavar="TUNED", help="what came of it; one panel each")
    add("--label", action="append", metavar="TEXT", help="one for each TUNED; default: its path")
    add("--layers", action="append", default=[], metavar="GLOB", help="full names; default: what the adapters adapt")
    add("--axis", choices=("output", "input"), default="output", help="one vector for each output (default) or input")
    add("--to", type=Path, default=Path("decomposition"), metavar="NAME", help="of the files")
    add("--any-base", action="store_true", help="accept a base whose content hash differs")


def run(arguments: argparse.Namespace) -> Iterator[str]:
    """Measures, draws and writes; yields the lines to print."""
    from tqdm import tqdm

    from dora_vl.adapters.base_weights import BaseWeights  # seconds, so not for --help
    from dora_vl.adapters.decomposition import Request, as_json, layers_to_compare, measured, saved_in
    from dora_vl.files import write_json

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
