"""Names in figures: moved apart as little as possible, off what is drawn."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.report.labels import Label, place_labels, spread

AREA = (0.0, 0.0, 200.0, 150.0)


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


def boxes(labels, centres):
    return [
        (centre - np.array(label.size) / 2, centre + np.array(label.size) / 2)
        for label, centre in zip(labels, centres, strict=True)
    ]


def test_names_of_one_point_do_not_overlap():
    labels = [Label((100.0, 70.0), (30.0, 8.0))] * 6
    placed = boxes(labels, place_labels(labels, np.zeros((0, 2)), AREA))
    for i, (low, high) in enumerate(placed):
        assert np.all(low >= 0)
        assert np.all(high <= AREA[2:])
        for other_low, other_high in placed[:i]:
            assert np.any(low >= other_high) or np.any(high <= other_low)


def test_a_name_avoids_what_is_drawn():
    # A thick horizontal bar right of the point: the preferred place is taken.
    drawn = np.stack(np.meshgrid(np.linspace(100, 200, 51), np.linspace(66, 74, 5)), axis=-1).reshape(-1, 2)
    label = Label((100.0, 70.0), (30.0, 8.0))
    ((low, high),) = boxes([label], place_labels([label], drawn, AREA))
    assert not np.any(np.all((drawn > low) & (drawn < high), axis=1))
    ((free_low, free_high),) = boxes([label], place_labels([label], np.zeros((0, 2)), AREA))
    assert np.any(np.all((drawn > free_low) & (drawn < free_high), axis=1))


def test_a_name_is_nearest_to_its_own_point():
    """To the right, where a name goes first, stands another line's point: the name goes elsewhere."""
    own, other = np.array([100.0, 100.0]), np.array([116.0, 100.0])
    labels = [Label(tuple(own), (24.0, 8.0)), Label(tuple(other), (24.0, 8.0))]
    centres = place_labels(labels, np.zeros((0, 2)), (0.0, 0.0, 300.0, 200.0))
    half = np.array([12.0, 4.0])
    for centre, mine, others in zip(centres, (own, other), (other, own), strict=True):
        near, far = (np.linalg.norm(np.maximum(np.abs(centre - point) - half, 0)) for point in (mine, others))
        assert near <= far
