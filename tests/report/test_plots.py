"""Plots: smoothing, drawn data, and the SVG's fitness for a page."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ultramem.report import plots
from ultramem.report.run import LayerSeries, Series


@pytest.fixture
def axes() -> Axes:
    return Figure().subplots()


def series(values: list[float]) -> Series:
    return Series(np.arange(1.0, len(values) + 1), np.array(values))


@pytest.mark.parametrize(("count", "share"), [(1, 0.02), (7, 0.02), (100, 0.1), (501, 0.05)])
def test_smooth_is_the_mean_of_the_finite_neighbours(count: int, share: float) -> None:
    values = np.random.default_rng(count).normal(size=count)
    values[::7] = np.nan
    values[3::11] = np.inf
    half = max(1, round(count * share / 2))
    for index, smoothed in enumerate(plots.smooth(values, share)):
        window = values[max(0, index - half) : index + half + 1]
        finite = window[np.isfinite(window)]
        assert smoothed == pytest.approx(finite.mean()) if len(finite) else np.isnan(smoothed)


def test_loss_shows_raw_smoothed_and_held_out(axes: Axes) -> None:
    train, held_out = series([4.0, 3.0, 2.0, 3.0]), Series(np.array([2.0, 4.0]), np.array([3.5, 2.5]))
    plots.draw_loss(axes, train, held_out)
    raw, smoothed, points = axes.lines
    np.testing.assert_array_equal(raw.get_xydata(), [[1, 4], [2, 3], [3, 2], [4, 3]])
    np.testing.assert_allclose(smoothed.get_ydata(), [3.5, 3, 8 / 3, 2.5])
    np.testing.assert_array_equal(points.get_xydata(), [[2, 3.5], [4, 2.5]])


def test_heat_map_cells_lie_around_their_step_and_layer(axes: Axes) -> None:
    values = np.array([[0.1, np.nan, 0.3], [0.4, 0.5, 0.6]])
    metric = LayerSeries("memory", "layer", "rows read", [4, 9], np.array([10.0, 20.0, 40.0]), values)
    plots.draw_heat_map(axes, metric, "share of rows")
    (mesh,) = axes.collections
    np.testing.assert_array_equal(mesh.get_coordinates()[0, :, 0], [5, 15, 30, 50])
    np.testing.assert_array_equal(mesh.get_coordinates()[:, 0, 1], [-0.5, 0.5, 1.5])
    np.testing.assert_array_equal(np.ma.filled(mesh.get_array(), np.nan).reshape(2, 3), values)
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["4", "9"]
    assert [other.get_ylabel() for other in axes.figure.axes] == ["layer", "share of rows"]


def test_heat_map_of_one_layer_and_one_step_has_an_area(axes: Axes) -> None:
    metric = LayerSeries("moe", "block", "load", [0], np.array([10.0]), np.array([[1.0]]))
    plots.draw_heat_map(axes, metric, "load")
    (mesh,) = axes.collections
    assert mesh.get_datalim(axes.transData).size == pytest.approx([1, 1])


def test_heat_map_of_many_layers_labels_some(axes: Axes) -> None:
    metric = LayerSeries("memory", "layer", "x", list(range(40)), np.arange(2.0), np.ones((40, 2)))
    plots.draw_heat_map(axes, metric, "x")
    labels = [int(tick.get_text()) for tick in axes.get_yticklabels()]
    assert len(labels) <= 12
    assert labels == list(axes.get_yticks())


def test_svg_takes_its_colours_from_the_page_and_scales() -> None:
    drawing = plots.svg(lambda axes: plots.draw_loss(axes, series([3, 2, 1]), series([])), 'Loss & "more"')
    root = ElementTree.fromstring(drawing)
    assert root.get("aria-label") == 'Loss & "more"'
    assert root.get("viewBox")
    assert root.get("width") is None
    assert root.get("height") is None
    used = set(re.findall(r"var\(--plot-(\d+)\)", drawing))
    assert used == {"0", "8", "9", "10"}  # first curve, faint curve, ink and grid, as the style sheet numbers them
    assert "#fe0d" not in drawing


def test_same_drawing_same_bytes() -> None:
    def draw(axes: Axes) -> None:
        plots.draw_throughput(axes, series([3, 2, 1]))

    assert plots.svg(draw, "Throughput") == plots.svg(draw, "Throughput")


def test_curves_without_any_finite_value_are_drawn_empty() -> None:
    nothing = series([float("nan")] * 3)
    plots.svg(lambda axes: plots.draw_loss(axes, nothing, nothing), "Loss")
    plots.svg(lambda axes: plots.draw_gradient_norm(axes, nothing), "Gradient norm")


def test_first_24_runs_look_different() -> None:
    assert len({plots.curve_style(index) for index in range(24)}) == 24
