"""The report's plots, drawn by matplotlib and coloured by the page's style sheet."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from ultramem.report.run import Array, LayerSeries, Series

# Stand-ins that `svg` turns into the style sheet's --plot-… variables, so that one drawing suits light and
# dark screens. The last two digits number the variable: 0 to 7 are the curves.
CURVES = tuple(f"#fe0d{index:02d}" for index in range(8))
FAINT = "#fe0d08"
INK = "#fe0d09"
GRID = "#fe0d10"
LINE_STYLES = ("solid", "dashed", "dotted")

P = ParamSpec("P")

_STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": GRID,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "figure.figsize": (6.0, 3.3),
    "font.size": 9,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "svg.fonttype": "none",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": GRID,
    "xtick.labelcolor": INK,
    "ytick.color": GRID,
    "ytick.labelcolor": INK,
}
_PIXELS_PER_INCH = 200


def svg(draw: Callable[Concatenate[Axes, P], None], description: str, *arguments: P.args, **named: P.kwargs) -> Markup:
    """Draw on fresh axes and return an SVG element to stand in a page, with a description for screen readers."""
    buffer = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": description}):
        figure = Figure()
        draw(figure.subplots(), *arguments, **named)
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, dpi=_PIXELS_PER_INCH, metadata=no_metadata)
    _, _, drawing = page_color(buffer.getvalue()).partition("<svg")
    drawing = re.sub(r'<g id="[^"]*"', "<g", drawing)  # "axes_1" and the like would repeat within the page
    drawing = re.sub(r' (width|height)="[^"]*"', "", drawing, count=2)  # of the whole drawing, which come first
    return Markup('<svg role="img" aria-label="{}"').format(description) + Markup(drawing)


def page_color(text: str) -> str:
    """Replace every placeholder colour in `text` with the page's variable."""
    return re.sub(r"#fe0d(\d\d)", lambda match: f"var(--plot-{int(match[1])})", text)


def smooth(values: Array, share: float = 0.02) -> Array:
    """Centred moving average of (n,) values over `share` of all points: (n,).

    Values that are not finite are left out; where no averaged value is finite, the average is NaN.
    """
    half = max(1, round(len(values) * share / 2))
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    start = np.maximum(np.arange(len(values)) - half, 0)
    end = np.minimum(np.arange(len(values)) + half + 1, len(values))
    with np.errstate(invalid="ignore"):
        return (sums[end] - sums[start]) / (counts[end] - counts[start])


def label_axes(axes: Axes, y: str, x: str = "step") -> None:
    """Name both axes and write large steps or token counts with a prefix: 20k, 1.5M."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
    axes.margins(x=0.01)


def draw_noisy(axes: Axes, series: Series, name: str) -> None:
    """Draw every report faintly, and the smoothed curve over it."""
    axes.plot(series.steps, series.values, color=FAINT, linewidth=0.7, label=f"{name}, each report")
    axes.plot(series.steps, smooth(series.values), color=CURVES[0], label=f"{name}, smoothed")


def draw_loss(axes: Axes, train: Series, held_out: Series) -> None:
    """Draw the training loss, each step and smoothed, and the held-out loss where it was measured."""
    draw_noisy(axes, train, "training")
    if held_out:
        marker = "o" if len(held_out) <= 100 else None
        axes.plot(held_out.steps, held_out.values, color=CURVES[1], marker=marker, markersize=3.5, label="held-out")
    axes.legend()
    label_axes(axes, "loss (nats per token)")


def draw_learning_rates(axes: Axes, rates: dict[str, Series]) -> None:
    """Draw a curve for each parameter group."""
    for (group, rate), color in zip(rates.items(), CURVES, strict=False):
        axes.plot(rate.steps, rate.values, color=color, label=group)
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", scilimits=(-2, 3))
    axes.legend()
    label_axes(axes, "learning rate")


def draw_gradient_norm(axes: Axes, norm: Series) -> None:
    """Draw the gradient norm before clipping, on a logarithmic axis."""
    draw_noisy(axes, norm, "gradient norm")
    label_axes(axes, "gradient norm")
    make_logarithmic(axes)


def draw_throughput(axes: Axes, throughput: Series) -> None:
    """Draw tokens per second, from zero."""
    draw_noisy(axes, throughput, "throughput")
    label_axes(axes, "tokens per second")
    start_at_zero(axes)


def draw_heat_map(axes: Axes, metric: LayerSeries, unit: str) -> None:
    """Draw layers upwards, steps to the right, and values as colours; blank where a layer did not report."""
    rows = np.arange(len(metric.layers), dtype=np.float64)
    values = np.ma.masked_invalid(metric.values)
    mesh = axes.pcolormesh(_cell_edges(metric.steps), _cell_edges(rows), values, rasterized=True)
    axes.grid(visible=False)
    label_axes(axes, metric.axis)
    axes.margins(x=0)
    ticks = range(0, len(rows), -(-len(rows) // 12))
    axes.set_yticks(ticks, [str(metric.layers[row]) for row in ticks])
    bar = axes.figure.colorbar(mesh, ax=axes, label=unit, pad=0.02)
    bar.outline.set_visible(False)  # type: ignore[operator]


def _cell_edges(centres: Array) -> Array:
    """Borders (n + 1,) halfway between neighbours; a single cell is one wide."""
    widths = np.diff(centres) if len(centres) > 1 else np.ones(1)
    return np.array([centres[0] - widths[0] / 2, *(centres[:-1] + centres[1:]) / 2, centres[-1] + widths[-1] / 2])


def draw_comparison(
    axes: Axes,
    curves: list[Series],
    x: str,
    y: str,
    marker: str | None = None,
    adjust: Callable[[Axes], None] | None = None,
) -> None:
    """Draw a curve per run, in its `curve_style`; nothing for an empty series."""
    for index, curve in enumerate(curves):
        color, line_style = curve_style(index)
        axes.plot(curve.steps, curve.values, color=color, linestyle=line_style, marker=marker, markersize=3.5)
    label_axes(axes, y, x)
    if adjust is not None:
        adjust(axes)


def make_logarithmic(axes: Axes) -> None:
    """Make the vertical axis logarithmic, with ticks that read 0.2, 0.5, 1, 2."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def start_at_zero(axes: Axes) -> None:
    """Start the vertical axis at zero and write its numbers with a prefix: 5k."""
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))


def curve_style(index: int) -> tuple[str, str]:
    """Colour and line style of run number `index`, different for the first 24."""
    return CURVES[index % len(CURVES)], LINE_STYLES[index // len(CURVES) % len(LINE_STYLES)]
