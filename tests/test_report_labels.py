"""Names in figures: moved apart as little as possible, off what is drawn."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.path import Path
from matplotlib.text import Text

from qjax.report.drawing import Name, lay_out, name_column, name_points, new_figure, spread


def test_names_far_apart_stay():
    np.testing.assert_allclose(spread([90, 50, 10], 10, 0, 100), [90, 50, 10])


def test_close_names_move_symmetrically():
    np.testing.assert_allclose(spread([51, 50, 49], 10, 0, 100), [60, 50, 40])


def test_the_border_pushes_names_in():
    np.testing.assert_allclose(spread([100, 99], 10, 0, 100), [100, 90])
    np.testing.assert_allclose(spread([1, 0], 10, 0, 100), [10, 0])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 100), min_size=1, max_size=8))
def test_spread_is_the_least_change(heights):
    wanted = np.sort(heights)[::-1]
    gap, low, high = 10.0, 0.0, 100.0
    found = spread(wanted, gap, low, high)
    assert np.all(found[:-1] - found[1:] >= gap - 1e-9)
    assert found[0] <= high + 1e-9
    assert found[-1] >= low - 1e-9
    # Dykstra's alternating projections onto the same constraints reach the same point.
    x, corrections = wanted.copy(), [np.zeros(len(wanted)) for _ in range(len(wanted) + 1)]
    for _ in range(3000):
        before = x.copy()
        for i in range(len(wanted) - 1):
            y = x + corrections[i]
            x = y.copy()
            shift = max(0.0, gap - (y[i] - y[i + 1])) / 2
            x[i] += shift
            x[i + 1] -= shift
            corrections[i] = y - x
        y = x + corrections[-1]
        x = np.clip(y, low, high)
        corrections[-1] = y - x
        if np.abs(x - before).max() < 1e-9:
            break
    np.testing.assert_allclose(found, x, atol=1e-3)


NAMED = Name("a name", (0.3, 0.5), "black")


def place(names, lines, *, left=0.0, panels=1):
    """The texts and leaders of names on an axis from 0 to 1, where lines are drawn."""
    with new_figure("single", panels) as (figure, grid):
        grid[0].set(xlim=(0, 1), ylim=(0, 1))
        lay_out(figure)
        name_points(grid[0], names, [np.array([name.point]) for name in names] + lines, left=left)
        return grid[0], [text.get_window_extent() for text in grid[0].texts], grid[0].lines


def apart(boxes):
    return not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


@pytest.mark.parametrize("panels", [1, 3])
def test_names_of_one_point_do_not_overlap_and_have_leaders(panels):
    axes, boxes, leaders = place([NAMED] * 6, [], panels=panels)
    assert len(boxes) == 6 and apart(boxes) and len(leaders) >= 4
    assert all(axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 for box in boxes)
    assert all(axes.bbox.y0 <= box.y0 and box.y1 <= axes.bbox.y1 for box in boxes)


def test_a_name_avoids_what_is_drawn():
    """It goes to the upper right, where nothing is drawn; else off the lines and points, and never left of its area."""
    axes, (free,), _ = place([NAMED], [])
    assert free.x0 > axes.transData.transform(NAMED.point)[0]
    bar = np.array([(0.31, 0.5), (0.9, 0.9)])
    axes, (box,), _ = place([NAMED], [bar], left=0.29)
    path = Path(axes.transData.transform(bar))
    assert path.intersects_bbox(free) and not path.intersects_bbox(box)
    assert box.x0 >= axes.transData.transform((0.29, 0))[0]


def test_a_name_is_nearest_to_its_own_point():
    """To the right, where a name goes first, stands another line's point: the name goes elsewhere."""
    names = [NAMED, Name("other", (0.34, 0.5), "black")]
    axes, boxes, _ = place(names, [])
    found = {text.get_text(): box for text, box in zip(axes.texts, boxes, strict=True)}
    for mine, other in (names, names[::-1]):
        near, far = (distance(found[mine.text], axes.transData.transform(name.point)) for name in (mine, other))
        assert near < far


def distance(box, point):
    return np.linalg.norm(np.maximum(0, np.maximum(box.min - point, point - box.max)))


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_column_of_names(side):
    """In the order of their points, apart, on one side of all of them; those moved from their points are led to."""
    names = [Name(text, point, "black") for text, point in (("a", (0.5, 0.8)), ("bb", (0.4, 0.4)), ("ccc", (0.6, 0.41)))]
    with new_figure("single") as (figure, (axes,)):
        axes.set(xlim=(0, 1), ylim=(0, 1))
        lay_out(figure)
        leaders = name_column(axes, names, side=side)
        for text in axes.texts:
            text.update_positions(figure.canvas.get_renderer())
        boxes = [Text.get_window_extent(text) for text in axes.texts]
    heights = {text.get_text(): box.y0 for text, box in zip(axes.texts, boxes, strict=True)}
    assert heights["a"] > heights["ccc"] > heights["bb"] and apart(boxes)
    edges = {round(box.x1 if side == "left" else box.x0, 3) for box in boxes}
    outer = axes.transData.transform((0.4 if side == "left" else 0.6, 0))[0]
    assert len(edges) == 1 and (edges.pop() < outer) == (side == "left")
    assert all(text.arrow_patch for text in axes.texts if text.get_text() != "a")
    assert sorted(tuple(leader[0].round(9)) for leader in leaders) == sorted(name.point for name in names)
