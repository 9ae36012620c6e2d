"""What stands below a figure: what it shows, of which model and text, what its bars are, how much was measured.

Figures have no titles; NAME.caption.txt beside NAME.pdf holds these sentences.
"""

from collections.abc import Sequence

from qjax.printable import printable
from qjax.report.accuracy import tasks_of
from qjax.report.draws import merge_draws
from qjax.report.figures import further_values, with_share
from qjax.report.rendering import Row, number
from qjax.report.sensitivity import placed_alone
from qjax.report.series import line_panels
from qjax.report.tables import baseline_name, describe, distinctions, over_units

FURTHER = {
    "share": "that increase as a share of nearest rounding's in the same format (bars: of the numerator alone)",
    "divergence": "the KL divergence",
    "accuracy": "the change of accuracy on {tasks}",
}
BITS = "exact bits per weight (codes, scales and zero points)"
MARKS = "▼ or ◀ at an edge: no increase, or one below the axis; ∞: it diverged"


def lines_caption(rows: Sequence[Row]) -> str:
    """Of `lines_figure`."""
    rows = with_share(merge_draws(rows))
    panels = line_panels(rows)
    further = further_values(rows) if len(panels) == 1 else []
    tasks = ", ".join(f"{task} ({number(rows[0], f'questions:{task}'):,.0f} questions)" for task in tasks_of(rows))
    shown = " and ".join(["", *(FURTHER[value].format(tasks=tasks) for value in further)])
    each = f", a panel for each {'width' if 'bits' in panels[0][0] else 'method'}" if len(panels) > 1 else ""
    doubly = any(len({line.label for line in lines}) < len(lines) for _, lines in panels)
    pairs = "; of two lines of one look the left one has doubly quantized scales" * doubly
    return _caption(rows, f"Increase of perplexity{shown} against {BITS}{each}{pairs}")


def dots_caption(rows: Sequence[Row]) -> str:
    """Of `dots_figure`."""
    rows = merge_draws(rows)
    what = "Recipes by the increase of perplexity, each width on its own scale, with bits per weight"
    if placed_alone(rows):
        what = "Increase of perplexity where one place of the model alone is quantized"
    elif distinctions(rows, seed=False):
        what = "Increase of perplexity by what the recipe was calibrated on"
    return _caption(rows, what)


def tradeoff_caption(rows: Sequence[Row]) -> str:
    """Of `tradeoff_figure`."""
    rows = merge_draws(rows)
    timed = next(row for row in rows if "speed_prompt_tokens" in row)
    speed = f"batch 1, prompt of {timed['speed_prompt_tokens']} tokens, {timed.get('device')}; dashed: the model as it is"
    return _caption(rows, f"Increase of perplexity against the bytes of the stored model and the speed of decoding ({speed})")


def kernels_caption(rows: Sequence[Row]) -> str:
    """Of `kernels_figure`."""
    row = next(row for row in rows if row.get("kind") == "kernels")
    return (
        "Time of the product of M rows with a packed weight (inputs x outputs) over that of the dense product in "
        f"{row['dtype']}, medians of turns of one run, on {row['device']}; below 1 the packed one is faster. "
        "Grey: other libraries.\n"
    )


def _caption(rows: Sequence[Row], what: str) -> str:
    """rows: draws merged."""
    first = rows[0]
    counts = ", ".join(f"{number(first, key):,.0f} {key}" for key in ("windows", "tokens") if key in first)
    text = (
        f"{what}. {describe(first)}, {counts}. Bars: 95 % intervals of the difference from {baseline_name(first)}, paired "
        f"window by window, over {over_units(rows)}. {MARKS}."
    )
    return f"{printable(text)}\n"
