"""Where to write the names of lines in a figure, so that no name covers another, a line or a marker.

Each name has a point it belongs to. Of many places around that point the one of least cost is taken: near is better than far, and
a place that covers what is drawn costs more than one a little farther away. Names are placed one after the other, the highest point first.
All lengths are in points (1/72 inch).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

DISTANCES = (6, 10, 15, 21, 28, 36, 46, 58, 72)
# Preferred directions first: the free part of a falling curve is above and to the right of it.
ANGLES = np.radians((0, 30, 60, 90, -30, 15, 45, 75, -60, 120, 150, 180, -90, -120, -150))
MARGIN = 1.5
COVER_COST = 6.0  # of each covered point of the drawing
CROSSING_COST = 1.5  # of each point of the drawing that the leader line passes
OUTSIDE_COST = OVERLAP_COST = 1e4


class Label(NamedTuple):
    """The point a name belongs to, and the width and height of its text."""

    point: tuple[float, float]
    size: tuple[float, float]


def place_labels(labels: Sequence[Label], drawn: np.ndarray, area: tuple[float, float, float, float]) -> np.ndarray:
    """Centres of the names: (labels, 2).

    drawn: (points, 2) samples of everything drawn, about 2 points apart. area: left, bottom, right, top that names stay in.
    """
    centres = np.zeros((len(labels), 2))
    placed: list[tuple[np.ndarray, np.ndarray]] = []  # centre, half size
    for index in sorted(range(len(labels)), key=lambda i: (-labels[i].point[1], labels[i].point[0])):
        point, half = np.array(labels[index].point), np.array(labels[index].size) / 2 + MARGIN
        candidates = _candidates(point, half)
        costs = [_cost(point, centre, half, drawn, placed, area) + 0.02 * order for order, centre in enumerate(candidates)]
        centres[index] = candidates[int(np.argmin(costs))]
        placed.append((centres[index], half))
    return centres


def _candidates(point: np.ndarray, half: np.ndarray) -> np.ndarray:
    """Centres around a point, (distances * angles, 2): the text's edge, not its centre, is at the distance."""
    directions = np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1)
    return np.concatenate([point + directions * (distance + half) for distance in DISTANCES])


def _cost(point, centre, half, drawn, placed, area) -> float:
    left, bottom, right, top = area
    low, high = centre - half, centre + half
    cost = float(np.linalg.norm(np.clip(point, low, high) - point))
    cost += OUTSIDE_COST * bool(low[0] < left or low[1] < bottom or high[0] > right or high[1] > top)
    cost += COVER_COST * int(np.all(np.abs(drawn - centre) < half, axis=1).sum())
    end = np.clip(point, low, high)
    steps = np.linspace(0, 1, 12)[2:, None]
    leader = point + steps * (end - point)
    far = np.linalg.norm(leader - point, axis=1) > MARGIN * 2
    for other, other_half in placed:
        cost += OVERLAP_COST * bool(np.all(np.abs(other - centre) < half + other_half))
        cost += COVER_COST * int(np.all(np.abs(leader - other) < other_half, axis=1).sum())
    if far.any() and len(drawn):
        near = np.linalg.norm(drawn[None] - leader[far][:, None], axis=2).min(axis=1)
        cost += CROSSING_COST * int((near < MARGIN).sum())
    return cost
