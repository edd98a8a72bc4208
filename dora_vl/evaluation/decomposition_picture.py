"""The scatter of the paper's figure 2: direction change across, magnitude change up, one panel a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dora_vl.adapters.decomposition import Panel
from dora_vl.evaluation.pictures import AS_IT_STANDS, INK, VALIDATION, new_figure, plain_axes, plain_text, save_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKERS = "oDs^vP*X<>"
PANEL_WIDTH, HEIGHT = 4.2, 4.6  # inches
LEGEND_ENTRIES = 8


def draw_panels(panels: Sequence[Panel], layers: Sequence[str], to: Path) -> None:
    """Draws every panel side by side: colour is the layer's place in the model, the marker is the checkpoint.

    Each panel has its own scales: full fine-tuning moves a weight by orders of magnitude more than an adapter does.
    """
    figure = new_figure(PANEL_WIDTH * len(panels) + 1.2, HEIGHT)
    figure.set_layout_engine("constrained")
    place = {layer: index for index, layer in enumerate(layers)}
    several = [figure.add_subplot(1, len(panels), number + 1) for number in range(len(panels))]
    for axes, panel in zip(several, panels, strict=True):
        _draw_panel(axes, panel, place)
    several[0].set_ylabel("magnitude change ΔM", color=INK)
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    colours = ScalarMappable(Normalize(0, max(len(layers) - 1, 1)), "viridis")
    bar = figure.colorbar(colours, ax=several, pad=0.02, aspect=30)
    bar.set_label("layer, in the model's order", color=INK)
    bar.ax.tick_params(colors=INK, length=0)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue] - matplotlib types it as a patch's spine
    save_png(figure, to)


def _draw_panel(axes: Axes, panel: Panel, place: Mapping[str, int]) -> None:
    for number, step in enumerate(panel.steps):
        points = [point for point in panel.points if point.step == step]
        axes.scatter(
            [point.change.direction for point in points],
            [point.change.magnitude for point in points],
            c=[place[point.layer] for point in points],
            vmin=0,
            vmax=max(len(place) - 1, 1),
            marker=MARKERS[number % len(MARKERS)],
            s=26,
            alpha=0.8,
            linewidths=0,
            label=_legend(panel, number),
        )
    plain_axes(axes, "direction change ΔD", "")
    axes.margins(0.06)
    axes.set_axisbelow(True)
    axes.ticklabel_format(scilimits=(-3, 3))
    numbers = "no line: the points lie in one place"
    line = panel.line
    if line is not None:
        directions = [point.change.direction for point in panel.points]
        ends = [min(directions), max(directions)]
        heights = [line.intercept + line.slope * end for end in ends]
        axes.plot(ends, heights, color=VALIDATION, linewidth=2)
        numbers = f"slope {line.slope:.3g}, correlation {line.correlation:.2f}"
    title = plain_text(f"{panel.label}\n{numbers}")
    axes.set_title(title, color=INK, fontsize=11, linespacing=1.4, **AS_IT_STANDS)
    if len(panel.steps) > 1:
        axes.legend(frameon=False, fontsize=8, labelcolor=INK, title="step", title_fontsize=8)


def _legend(panel: Panel, number: int) -> str | None:
    """A checkpoint's entry; of many checkpoints, a few that are evenly spread."""
    every = -(-len(panel.steps) // LEGEND_ENTRIES)
    return str(panel.steps[number]) if number % every == 0 else None
