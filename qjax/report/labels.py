"""Where to write the names of lines in a figure, so that no name covers another, a line or a marker.

Lines that begin side by side get a column of names in the order of their points, moved apart as little as possible (`spread`):

    minimise sum_i (y_i - wanted_i)^2  subject to  y_i - y_(i+1) >= gap,

which is isotonic regression of wanted_i + i gap. Any other name takes, of many places around its point, the one of least cost:
near is better than far, and covering what is drawn costs more than being a little farther away. Lengths are points (1/72 inch).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

DISTANCES = (4, 7, 10, 15, 21, 28, 36, 46, 58, 72)
# Preferred directions first: the free part of a falling curve is above and to the right of it.
ANGLES = np.radians((0, 30, 60, 90, -30, 15, 45, 75, -60, 120, 150, 180, -90, -120, -150))
MARGIN = 1.5
MARKER = 4.0  # a leader line begins that far from its point
COVER_COST = 6.0  # of each covered point of the drawing
CROSSING_COST = 1.5  # of each point of the drawing that the leader line passes
CONFUSED_COST = 40.0  # of a place that is nearer to another name's point than to its own
OUTSIDE_COST = OVERLAP_COST = 1e4


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> np.ndarray:
    """Heights nearest to the wanted ones (descending), at least `gap` apart, within [low, high] where there is room."""
    steps = gap * np.arange(len(wanted))
    pools: list[tuple[float, int]] = []  # mean, count; non-increasing
    for value in np.asarray(wanted) + steps:
        mean, count = float(value), 1
        while pools and pools[-1][0] < mean:
            before, many = pools.pop()
            mean, count = (before * many + mean * count) / (many + count), many + count
        pools.append((mean, count))
    flat = np.array([mean for mean, count in pools for _ in range(count)])
    lowest = low + gap * (len(wanted) - 1)
    return np.clip(flat, min(lowest, high), high) - steps


class Label(NamedTuple):
    """The point a name belongs to, and the width and height of its text."""

    point: tuple[float, float]
    size: tuple[float, float]


def place_labels(labels: Sequence[Label], drawn: np.ndarray, area: tuple[float, float, float, float]) -> np.ndarray:
    """Centres of the names: (labels, 2), the highest point's first placed.

    drawn: (points, 2) samples of everything drawn, about 2 points apart. area: left, bottom, right, top that names stay in.
    """
    centres = np.zeros((len(labels), 2))
    placed: list[tuple[np.ndarray, np.ndarray]] = []  # centre, half size
    for index in sorted(range(len(labels)), key=lambda i: (-labels[i].point[1], labels[i].point[0])):
        point, half = np.array(labels[index].point), np.array(labels[index].size) / 2 + MARGIN
        candidates = _candidates(point, half)
        costs = _place_costs(candidates, half, drawn=drawn, placed=placed, area=area)
        points = np.array([label.point for label in labels])
        costs += CONFUSED_COST * _is_confusing(candidates, half, np.delete(points, index, axis=0), point)
        best = np.inf
        for order in np.argsort(costs, kind="stable"):  # crossings are counted only where they can decide
            if costs[order] >= best:
                break
            cost = costs[order] + _leader_cost(point, leader_line(point, candidates[order], half), drawn, placed)
            if cost < best:
                best, centres[index] = cost, candidates[order]
        placed.append((centres[index], half))
        drawn = np.concatenate([drawn, leader_line(point, centres[index], half)])
    return centres


def _candidates(point: np.ndarray, half: np.ndarray) -> np.ndarray:
    """Centres around a point, (distances * angles, 2): the name's nearest edge or corner is at the distance."""
    directions = np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1)
    return np.concatenate([point + directions * distance + np.clip(1.5 * directions, -1, 1) * half for distance in DISTANCES])


def _place_costs(centres, half, *, drawn, placed, area) -> np.ndarray:
    """Of each place: its distance, what it covers, and whether it is outside or on another name."""
    low, high = centres - half, centres + half
    costs = np.repeat(np.array(DISTANCES, float), len(ANGLES))
    costs += 0.02 * np.arange(len(costs))  # preferred directions decide between equals
    costs += OUTSIDE_COST * np.any((low < area[:2]) | (high > area[2:]), axis=1)
    costs += COVER_COST * np.all(np.abs(drawn - centres[:, None]) < half, axis=2).sum(axis=1)
    for other, other_half in placed:
        costs += OVERLAP_COST * np.all(np.abs(other - centres) < half + other_half, axis=1)
    return costs


def _is_confusing(centres, half, others, point) -> np.ndarray:
    """Of each place: whether another name's point, apart from this one's, is as near to it as its own."""
    others = others[np.linalg.norm(others - point, axis=1) > 2 * MARGIN]

    def distance(to: np.ndarray) -> np.ndarray:
        return np.linalg.norm(np.maximum(np.abs(centres[:, None] - to) - half, 0), axis=2)

    return np.any(distance(others) < distance(point[None]) + MARGIN, axis=1)


def _leader_cost(point, leader, drawn, placed) -> float:
    """What the line from a point to its name passes: other names, and what is drawn away from the point itself."""
    cost = sum(COVER_COST * int(np.all(np.abs(leader - other) < half, axis=1).sum()) for other, half in placed)
    away = leader[np.linalg.norm(leader - point, axis=1) > 2 * MARGIN]
    if len(away) and len(drawn):
        cost += CROSSING_COST * int((np.linalg.norm(drawn - away[:, None], axis=2).min(axis=1) < MARGIN).sum())
    return cost


def leader_line(point: np.ndarray, centre: np.ndarray, half: np.ndarray) -> np.ndarray:
    """Samples of the line from a point to its name."""
    end = np.clip(point, centre - half, centre + half)
    start = min(0.2, MARKER / max(float(np.linalg.norm(end - point)), 1e-9))
    return point + np.linspace(start, 1, 12)[:, None] * (end - point)
