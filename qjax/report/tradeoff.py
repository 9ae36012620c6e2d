"""The trade-off table: what a recipe costs in perplexity and accuracy, and what it buys in bytes and speed; from rows alone."""

from collections.abc import Sequence

from qjax.errors import QjaxError
from qjax.report.accuracy import mean_change
from qjax.report.rendering import Row, Table, TableColumn, byte_unit, columns_of, decimals, fixed, number
from qjax.report.tables import (
    baseline_name,
    change_of_perplexity,
    distinctions,
    is_baseline,
    lines_of,
    model_of,
    noise_note,
    over_units,
)

HELD = ("dense", "packed")  # how the weights are held while running


def has_speed(rows: Sequence[Row]) -> bool:
    """Whether the rows were timed."""
    return any(f"decode_tokens_per_second:{HELD[0]}" in row for row in rows)


def tradeoff_table(rows: Sequence[Row]) -> Table:
    """Bits, bytes, changes, and speed and memory with dense and packed weights, of every recipe.

    Raises QjaxError for rows without speeds, and for rows of more than one model, text or convention.
    """
    rows = lines_of(rows)
    if not has_speed(rows):
        raise QjaxError("these rows hold no speeds; `qjax sweep --speed` measures them")
    unquantized = next((number(row, "size_bytes") for row in rows if is_baseline(row)), None)
    if unquantized is not None:
        rows = [{**row, "times_smaller": unquantized / number(row, "size_bytes")} for row in rows]
    unit, unit_bytes = byte_unit([number(row, "size_bytes") for row in rows])

    def size(row: Row, key: str) -> str:
        return fixed(number(row, key) / unit_bytes, 2)

    columns = [
        TableColumn("recipe", "recipe", text=True),
        *distinctions(rows),
        TableColumn("bits_per_weight", "bits per\nweight", decimals(3)),
        TableColumn("size_bytes", f"size\n({unit})", size),
        TableColumn("times_smaller", "times\nsmaller", decimals(2)),
        TableColumn("perplexity_ratio", "perplexity\nchange (%)", change_of_perplexity, error="perplexity_ratio_stderr"),
        TableColumn("accuracy_mean_delta", "accuracy change\n(points)", mean_change, error="accuracy_mean_delta_stderr"),
    ]
    for rank, held in enumerate(HELD, start=1):
        columns += [
            TableColumn(f"running_bytes:{held}", f"weights\n{held} ({unit})", size, rank=rank + 4),
            TableColumn(f"peak_bytes:{held}", f"peak\n{held} ({unit})", size, rank=rank + 2),
            TableColumn(f"prefill_tokens_per_second:{held}", f"prefill {held}\n(tokens/s)", decimals(0), rank=rank + 6),
            TableColumn(f"decode_tokens_per_second:{held}", f"decode {held}\n(tokens/s)", decimals(0)),
            TableColumn(f"first_token_seconds:{held}", f"first token\n{held} (ms)", _milliseconds, rank=rank + 8),
        ]
    first, baseline = rows[0], baseline_name(rows[0])
    timed = next(row for row in rows if "speed_prompt_tokens" in row)
    notes = [
        "Dense: kernels decoded to the compute type before running; packed: decoded at each use. "
        "Peak: weights, cache and working memory as planned by XLA.",
        f"Times smaller: than {baseline} as it is stored.",
        f"±: standard error of the difference from {baseline}, over {over_units(rows)}, of accuracy over questions.",
        noise_note(rows),
        f"Timed on {timed.get('device')}, batch 1, prompt of {timed['speed_prompt_tokens']} tokens.",
    ]
    title = f"Trade-off of {model_of(first)}, perplexity on {first['corpus']} ({first['convention']})"
    return Table(title, columns_of(rows, columns), tuple(rows), tuple(notes))


def _milliseconds(row: Row, key: str) -> str:
    return fixed(1000 * number(row, key), 1)
