"""Tests of plotting.py: what is imported, who looks how, and what is drawn."""

import ast
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from msam_optax import plotting
from msam_optax.plotting import (
    Estimates,
    _draw,
    _figures,
    _looks,
    _spectrum,
    looks,
)

MAIN = ["sgd", "nag", "adam", "sam", "msam", "ae_sam", "looksam"]


def curve(**changes: Any) -> Estimates:
    return Estimates([0.1, 1.0, 10.0], [1.0, 3.0, 2.0], [0.1] * 3)._replace(**changes)


def legend(ax: Axes) -> list[str]:
    found = ax.get_legend()
    return [] if found is None else [text.get_text() for text in found.get_texts()]


FIGURES: dict[str, Callable[[Any], Any]] = {
    "estimates": lambda ax: plotting.plot_estimates(
        {"sgd": curve()}, xlabel="ρ (unit)", ylabel="accuracy (%)", ax=ax
    ),
    "line": lambda ax: plotting.plot_line({"sgd": curve()}, ax=ax),
    "plane": lambda ax: plotting.plot_plane([0, 1], [0, 1], [[0, 1], [2, 3]], ax=ax),
    "policy": lambda ax: plotting.plot_policy([2, 1], [2, 1], [1, 2], [1, 0], ax=ax),
    "cost": lambda ax: plotting.plot_cost({"sgd": Estimates(1, 90, 1)}, ax=ax),
    "eigenvalues": lambda ax: plotting.plot_eigenvalues({"sgd": curve()}, ax=ax),
    "spectrum": lambda ax: plotting.plot_spectrum({"sgd": curve()}, ax=ax),
}


@pytest.mark.parametrize("module", [plotting, _draw, _figures, _looks, _spectrum])
def test_numpy_and_matplotlib_are_all_it_takes(module):
    """Plotting computes nothing: arrays from anywhere can be drawn, without JAX."""
    files = ("_draw", "_figures", "_looks", "_spectrum")
    own = {f"msam_optax.plotting.{name}" for name in files}
    own.add("msam_optax._base.versions")
    names: list[str] = []
    for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
    assert {"matplotlib.pyplot", "msam_optax"}.isdisjoint(names)
    known = {*sys.stdlib_module_names, "numpy", "matplotlib"}
    assert {name.partition(".")[0] for name in {*names} - own} <= known


# Looks.


def test_no_two_methods_look_the_same():
    found = looks(_looks.METHODS).values()
    assert len({(look.color, look.style) for look in found}) == len(_looks.METHODS)
    assert len({(look.color, look.marker) for look in found}) == len(_looks.METHODS)


@pytest.mark.parametrize("part", ["color", "style", "marker"])
def test_the_main_methods_differ_in_colour_and_in_grey(part):
    found = looks(MAIN).values()
    assert len({getattr(look, part) for look in found}) == len(MAIN)


def test_all_methods_of_the_benchmarks_have_a_look():
    names = Path(__file__).parents[2] / "benchmarks" / "tasks" / "optimizers.py"
    for node in ast.walk(ast.parse(names.read_text())):
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "METHODS":
            assert isinstance(node.value, ast.Dict)
            found = [ast.literal_eval(key) for key in node.value.keys if key]
    assert set(found) == set(_looks.METHODS)


def test_a_method_looks_the_same_in_all_figures():
    alone = {name: looks([name])[name] for name in _looks.METHODS}
    for order in (_looks.METHODS, _looks.METHODS[::-1]):
        assert looks(["gradient", "msam ρ=9", *order])["sam"] == alone["sam"]
        assert looks(order) == alone
    assert looks(["gradient", "msam"])["msam"] == alone["msam"]
    assert looks(["msam ρ=1"])["msam ρ=1"] == alone["msam"]


def test_variants_of_a_method_share_its_colour():
    rhos = [f"msam ρ={rho}" for rho in range(8)]
    found = looks(["sgd", *rhos])
    assert {found[name].color for name in rhos} == {looks(["msam"])["msam"].color}
    assert len(set(found.values())) == 9


def test_other_names_keep_away_from_those_in_the_figure():
    found = list(looks(["sgd", "msam", "gradient", "momentum", "random"]).values())
    for one, other in itertools.combinations(found, 2):
        assert one.color != other.color and one.style != other.style


def test_looks_are_told_apart_up_to_56_and_never_run_out():
    names = [f"curve {i}" for i in range(60)]
    assert len(set(looks(names[:56]).values())) == 56
    assert set(looks(names)) == set(names)


# Figures.


@pytest.mark.parametrize("name", FIGURES)
def test_figures_take_and_return_axes(name):
    ax = Figure().add_subplot()
    assert FIGURES[name](ax) is ax
    own: Any = FIGURES[name](None)
    assert isinstance(own, Axes) and own.figure is not ax.figure
    assert own.get_xlabel() and own.get_ylabel()
    figure: Any = own.figure
    figure.draw_without_rendering()


def test_estimates_are_drawn_in_the_method_s_look():
    ax = FIGURES["estimates"](None)
    (line,), (band,) = ax.lines, ax.collections
    np.testing.assert_array_equal(line.get_ydata(), [1.0, 3.0, 2.0])
    assert to_hex(line.get_color()).upper() == looks(["sgd"])["sgd"].color
    edges = {(round(x, 6), round(y, 6)) for x, y in band.get_paths()[0].vertices}
    assert {(0.1, 0.9), (0.1, 1.1), (10.0, 1.9), (10.0, 2.1)} <= edges
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("ρ (unit)", "accuracy (%)")
    assert legend(ax) == ["sgd"] and ax.get_xscale() == "linear"


def test_references_are_level_lines_with_bands():
    ax: Any = plotting.plot_estimates(
        {"msam": curve()},
        references={"sgd": Estimates(0, 1.5, 0.2), "nag": Estimates(0, 1.0)},
        xlabel="x",
        ylabel="y",
    )
    sgd, nag, _ = ax.lines
    np.testing.assert_array_equal(sgd.get_ydata(), [1.5, 1.5])
    np.testing.assert_array_equal(nag.get_ydata(), [1.0, 1.0])
    (band,) = ax.patches
    assert (band.get_y(), band.get_height()) == pytest.approx((1.3, 0.4))
    assert legend(ax) == ["sgd", "nag", "msam"]


def test_bars_in_the_place_of_bands():
    ax: Any = plotting.plot_estimates({"sam": curve()}, xlabel="", ylabel="", bars=True)
    (container,) = ax.containers
    (bars,) = container.lines[2]
    first = bars.get_segments()[0]
    np.testing.assert_allclose(first, [[0.1, 0.9], [0.1, 1.1]])
    assert container.lines[0].get_marker() == looks(["sam"])["sam"].marker


def test_single_runs_have_no_interval():
    for interval in (None, [np.nan] * 3):
        single = {"sgd": curve(interval=interval)}
        for bars in (False, True):
            ax: Any = plotting.plot_estimates(single, xlabel="", ylabel="", bars=bars)
            assert np.isfinite(ax.dataLim.extents).all()
            ax.figure.draw_without_rendering()


@pytest.mark.parametrize(
    ("x", "scale"),
    [([0.1, 1, 10], "log"), ([-1, 0.1, 1], "symlog"), ([0, 0.1, 1], "symlog")],
)
def test_logarithmic_axis_shows_both_signs(x, scale):
    ax: Any = plotting.plot_estimates(
        {"msam": curve(x=x)}, xlabel="", ylabel="", log_x=True
    )
    assert ax.get_xscale() == scale and ax.get_yscale() == "linear"
    if scale == "symlog":
        assert ax.xaxis.get_transform().linthresh == 0.1
    positions = ax.transData.transform([(value, 1.0) for value in x])[:, 0]
    assert (np.diff(positions) > 10).all()


def test_logarithmic_ticks_are_plain_numbers():
    ax: Any = plotting.plot_estimates(
        {"msam": curve(x=[0.02, 0.1, 5.0])}, xlabel="", ylabel="", log_x=True
    )
    ax.figure.draw_without_rendering()
    labels = [label.get_text() for label in ax.get_xticklabels(which="both")]
    assert {"0.1", "1"} <= set(labels) and "$" not in "".join(labels)


def test_logarithmic_y_axis_takes_references_in():
    levels = {"sgd": Estimates(0, -1.0)}
    options: dict[str, Any] = {"xlabel": "", "ylabel": "", "log_y": True}
    ax: Any = plotting.plot_estimates({"msam": curve()}, references=levels, **options)
    assert (ax.get_xscale(), ax.get_yscale()) == ("linear", "symlog")


def test_line_marks_where_the_weights_are():
    ax = FIGURES["line"](None)
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), [0, 0])
    assert "‖ε‖" in ax.get_xlabel() and "loss" in ax.get_ylabel()


def test_plane_has_rows_of_y_and_a_labelled_bar():
    xs, ys = np.linspace(0, 1, 5), np.linspace(0, 3, 4)
    losses = np.broadcast_to(ys[:, None], (4, 5))
    points = {"w": (0.5, 1.0)}
    ax: Any = plotting.plot_plane(xs, ys, losses, points=points, levels=[0, 1, 2])
    _, bar = ax.figure.axes
    assert "loss" in bar.get_ylabel()
    filled = ax.collections[0]
    assert list(filled.levels) == [0, 1, 2] and filled.extend == "max"
    # The lowest loss is at the lowest y, for all x.
    lowest = filled.get_paths()[0].get_extents()
    np.testing.assert_allclose(lowest.extents, [0, 0, 1, 1])
    assert [text.get_text() for text in ax.texts] == ["w"]
    assert ax.lines[0].get_xdata() == [0.5] and ax.lines[0].get_ydata() == [1.0]
    with pytest.raises(
        ValueError, match=r"shape \(5, 4\), but their shape is \(4, 5\)"
    ):
        plotting.plot_plane(ys, xs, losses)


def test_plane_leaves_out_what_is_not_finite():
    losses = np.add.outer(np.arange(4.0), np.arange(5.0))
    losses[0, 0], losses[3, 4] = np.nan, np.inf
    ax: Any = plotting.plot_plane(range(5), range(4), losses)
    assert ax.collections[0].get_clim()[1] <= 7
    ax.figure.draw_without_rendering()


def test_policy_marks_the_employed_steps():
    norms, employed = np.array([4.0, 1.0, 3.0]), [True, False, True]
    ax: Any = plotting.plot_policy(norms, [2, 2, 2], [3, 3, -1], employed)
    drawn = dict(zip(legend(ax), ax.lines, strict=True))
    marked = drawn["SAM employed"]
    np.testing.assert_array_equal(marked.get_xdata(), [0, 2])
    np.testing.assert_array_equal(marked.get_ydata(), [4.0, 3.0])
    np.testing.assert_array_equal(drawn["threshold"].get_ydata(), [3, 3, -1])
    assert ax.get_yscale() == "log" and ax.get_ylim()[0] > 0
    assert len({line.get_linestyle() for line in ax.lines[-2:]}) == 2


def test_cost_names_every_point_and_no_name_covers_another():
    names = ["sgd", "nag", "adam", "msam", "adamw"]
    points = {name: Estimates(1, 90 + i / 100, 0.3) for i, name in enumerate(names)}
    points["sam"] = Estimates(2, 90, 0.3)
    ax: Any = plotting.plot_cost(points)
    ax.figure.draw_without_rendering()
    assert {text.get_text() for text in ax.texts} == set(points)
    boxes = [text.get_window_extent() for text in ax.texts]
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
    frame = ax.get_window_extent()
    assert all(frame.x0 < box.x0 and box.x1 < frame.x1 for box in boxes)
    assert "gradients" in ax.get_xlabel() and "%" in ax.get_ylabel()


def test_eigenvalues_stand_side_by_side():
    methods = {name: curve(x=[1, 2, 3]) for name in ("sgd", "msam", "sam")}
    ax: Any = plotting.plot_eigenvalues(methods)
    shifts = [container.lines[0].get_xdata()[0] for container in ax.containers]
    assert np.diff(shifts) == pytest.approx(0.12) and shifts[1] == 1
    assert ax.get_xticks().tolist() == [1, 2, 3]
    assert legend(ax) == ["sgd", "msam", "sam"]
    ax.figure.draw_without_rendering()
    names = ax.get_legend().get_window_extent()
    highest = ax.transData.transform((1, 3.1))[1]  # mean and interval
    assert names.y0 > highest
