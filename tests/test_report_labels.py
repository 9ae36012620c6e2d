"""Names in figures: moved apart as little as possible."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.text import Text

from qjax.report.drawing import Name, lay_out, name_column, new_page, spread


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


def test_a_column_of_names():
    """Right of the axes in the order of their points, apart; those moved from their points are led to."""
    names = [Name(text, point, "black") for text, point in (("a", (1, 0.8)), ("bb", (1, 0.4)), ("ccc", (0.9, 0.41)))]
    with new_page("single") as figure:
        axes = figure.subplots()
        axes.set(xlim=(0, 1), ylim=(0, 1))
        lay_out(figure)
        name_column(axes, names)
        for text in axes.texts:
            text.update_positions(figure.canvas.get_renderer())
        boxes = [Text.get_window_extent(text) for text in axes.texts]
    heights = {text.get_text(): box.y0 for text, box in zip(axes.texts, boxes, strict=True)}
    assert heights["a"] > heights["ccc"] > heights["bb"]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    (edge,) = {round(box.x0, 3) for box in boxes}
    assert edge > axes.bbox.x1
    assert all(text.arrow_patch for text in axes.texts if text.get_text() != "a")
