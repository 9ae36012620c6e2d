"""Figure of recipes, or of places quantized alone, one under the other: the increase of perplexity of each with its interval.

For what lines over bits per weight do not show: many methods at each width, orders and amounts of calibration, one block at a
time. Facets are widths (or the recipes of places and calibrations), each on its own scale, so that differences within a width
are seen: side by side where they have the same lines, else one under the other.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from qjax.errors import QjaxError
from qjax.formats import INTEGERS, UNQUANTIZED
from qjax.report.drawing import (
    BARS,
    POINT,
    WIDTHS,
    ink,
    lay_out,
    look,
    new_page,
    plain,
    scale_values,
    text_size,
    wrap,
)
from qjax.report.draws import DRAWS, merge_draws
from qjax.report.figures import VALUES, interval_of
from qjax.report.rendering import Row, number
from qjax.report.sensitivity import placed_alone
from qjax.report.series import base_method, increase, is_cast, line_panels, parts_of
from qjax.report.tables import distinctions, is_baseline, require_one_group

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CROWDED = 6  # lines over bits in one panel; where there are more, dots are shown too
WIDEST_NAMES = 0.4  # of the page
MOST_FACETS = {"single": 2, "double": 5}  # side by side
SHARED = 0.6  # of all lines in all facets: what must be there for facets side by side
GAP = 12  # points between facets side by side
UNROUNDED = "weights as they are"  # a facet of caches
BOLD = 1.12  # how much wider than other letters those of titles are
LINE_HEIGHT, MARGINS = 0.135, 0.42  # inches; margins of a facet
CALIBRATED = {"calibration", "calibration_windows", "calibration_window_tokens", "calibration_compute"}
Facets = dict[str, dict[str, Row]]  # title -> name -> row


def has_dots(rows: Sequence[Row]) -> bool:
    """Whether the rows are better shown one under the other than as lines over bits, or as well where these are crowded."""
    rows = merge_draws(rows)
    lines, shown = line_panels(rows), _shown(rows)
    crowded = not lines or (len(lines) == 1 and len(lines[0][1]) > CROWDED)
    return crowded and bool(shown)


def _shown(rows: Sequence[Row]) -> list[Row]:
    """Places where there are any, else all other models than the baseline; casts alone only."""
    found = placed_alone(rows) or [row for row in rows if not is_baseline(row)]
    return [row for row in found if not is_cast(row)] or found


def dots_figure(rows: Sequence[Row], width: str = "single") -> "Figure":
    """The figure of one model, text and convention. width: "single" | "double" column; "double" too where names need it.

    Recipes stand in the order of their increase, of facets side by side in that of the first; places and calibrations in the
    order of the rows. Raises QjaxError for rows of more than one model, text or convention, and where there is nothing to show.
    """
    require_one_group(rows)
    shown = _shown(merge_draws(rows))
    if not shown:
        raise QjaxError("a figure of recipes needs rows of quantized models, got none")
    facets = facets_of(shown)
    names = list(dict.fromkeys(name for facet in facets.values() for name in facet))
    together = sum(map(len, facets.values())) >= SHARED * len(facets) * len(names)
    lines = [names] * len(facets) if together else [list(facet) for facet in facets.values()]
    with new_page(width) as figure:
        grid = _axes(figure, list(facets), lines, width, together)
        for axes, facet, here in zip(grid, facets.values(), lines, strict=True):
            scale_values(axes.xaxis, np.array([interval_of(row) for row in facet.values()]))
            for height, name in enumerate(here):
                if name in facet:
                    _draw(axes, height, facet[name])
            for label, name in zip(axes.get_yticklabels(), here, strict=True):
                colours = {_look(each[name]).colour for each in facets.values() if name in each}
                label.set_color(ink(colours.pop()) if len(colours) == 1 else "black")
    return figure


def _axes(figure: "Figure", titles: Sequence[str], lines: Sequence[Sequence[str]], width: str, together: bool) -> list["Axes"]:
    """The axes of the facets, with their titles and the names of their lines, in their places.

    together: side by side with the same names.
    """
    longest = max(text_size(figure, name)[0] for names in lines for name in names)
    fits = longest < WIDEST_NAMES * WIDTHS[width] * POINT and (not together or len(lines) <= MOST_FACETS[width])
    page = WIDTHS[width if fits else "double"]
    broken = {name: wrap(figure, name, WIDEST_NAMES * page * POINT) for names in lines for name in names}
    counts = [len(names) for names in (lines[:1] if together else lines)]
    tall = LINE_HEIGHT * max(map(len, broken.values()))
    figure.set_size_inches(page, sum(MARGINS + tall * count for count in counts) + 0.2)
    ratios = None if together else [count * tall + 0.05 for count in counts]
    shape = (1, len(lines)) if together else (len(lines), 1)
    grid = list(figure.subplots(*shape, squeeze=False, height_ratios=ratios).ravel())
    space = (page * POINT - min(longest, WIDEST_NAMES * page * POINT)) / shape[1] - GAP
    for axes, title, names in zip(grid, titles, lines, strict=True):
        parts = [title] if text_size(figure, title)[0] < space / BOLD else title.replace(":", ":\n", 1).split("\n")
        axes.set_title(
            plain("\n".join(line for part in parts for line in wrap(figure, part.strip(), space / BOLD))), loc="left"
        )
        axes.set_ylim(len(names) - 0.5, -0.5)  # the first line on top
        shown = axes is grid[0] or not together
        axes.set_yticks(range(len(names)), [plain("\n".join(broken[name])) * shown for name in names])
        axes.tick_params(axis="y", length=0, pad=4)
        axes.grid(axis="x")
    figure.supxlabel(VALUES["increase"])
    lay_out(figure)
    return grid


def facets_of(shown: Sequence[Row]) -> Facets:
    """The facets by ascending bits; those of places and calibrations as they come."""
    keys = {column.key for column in distinctions(shown)} - {DRAWS}
    placed, calibrated = "place" in shown[0], bool(keys) and keys <= CALIBRATED
    groupings = {
        (parts_of(row).grouping, parts_of(row).others) for row in shown if not placed and parts_of(row).grid in INTEGERS
    }
    facets: Facets = {}
    for row in shown if placed or calibrated else sorted(shown, key=increase):
        recipe, told = str(row["recipe"]), _told(row, keys)
        if placed:
            title, name = str(row["place_recipe"]), [str(row["place"]), *told]
        elif calibrated:
            title, name = recipe, told or [recipe]
        else:
            short = len(groupings) == 1 and parts_of(row).grid in INTEGERS
            title, name = str(row.get("bits") or ""), [recipe.replace(f":{row['format']}", "") if short else recipe, *told]
        facets.setdefault(title, {})[", ".join(name)] = row
    if placed or calibrated:
        return facets
    ordered = sorted(facets.items(), key=lambda item: int(item[0] or 99))
    return {_title(bits, facet, len(facets) > 1): facet for bits, facet in ordered}


def _told(row: Row, keys: set[str]) -> list[str]:
    """What tells the row from others beside its recipe: of calibration text and amount, of anything else the value."""
    told = [f"seed {row['seed']}"] if "seed" in keys and "seed" in row else []
    told += [
        str(row[key])
        for key in ("calibration", *sorted(keys - CALIBRATED - {"seed"}))
        if key in keys and row.get(key) not in (None, UNQUANTIZED)
    ]
    if keys & {"calibration_windows", "calibration_window_tokens"} and row.get("calibration_windows"):
        told.append(f"{row['calibration_windows']} x {row['calibration_window_tokens']} tokens")
    if "calibration_compute" in keys and row.get("calibration_compute"):
        told.append(f"calibrated in {row['calibration_compute']}")
    return told


def _title(bits: str, facet: dict[str, Row], several: bool) -> str:
    """3 bits (3.15 to 3.59 bits per weight): 3 bits: 3.15 to 3.59. several: there are other facets."""
    exact = sorted({f"{number(row, 'bits_per_weight'):.2f}" for row in facet.values()})
    return f"{bits} bits: {' to '.join(dict.fromkeys((exact[0], exact[-1])))}" if bits else UNROUNDED * several


def _look(row: Row):
    if "place_recipe" not in row:
        return look(base_method(row))
    from qjax.recipe import method_name, parse_recipe

    return look(method_name(parse_recipe(row["place_recipe"])))


def _draw(axes: "Axes", height: int, row: Row) -> None:
    """One line. What is below the axis is at its left edge, infinity at the right."""
    left, right = axes.get_xlim()
    value, low, high = interval_of(row)
    colour, marker, face = _look(row)
    if not left < value < right:
        mark = {"marker": "$\\infty$", "markersize": 8} if value > left else {"marker": "<"}
        axes.plot([right if value > left else left], [height], color=colour, clip_on=False, zorder=5, **mark)
        return
    low = max(low, left / 2) if axes.get_xscale() == "log" else low
    bar = np.nan_to_num(np.maximum(0, [[value - low], [high - value]]))
    axes.errorbar([value], [height], xerr=bar, fmt=marker, color=colour, markerfacecolor=face, zorder=4, **BARS)
