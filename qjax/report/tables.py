"""The tables qjax prints and writes, as functions of rows (flat dicts, one per measured cell; `sweep/columns.py` says what
they hold).

Rows of different baselines, texts, conventions or devices are never put in one table: `split_tables` groups them. A table has
a line for every cell, whose draws of calibration data are together (`draws.py`).
"""

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from qjax.errors import QjaxError
from qjax.evaluate.statistics import FEWEST, interval, is_noise
from qjax.formats import UNQUANTIZED
from qjax.report.draws import DRAWS, merge_draws
from qjax.report.rendering import (
    MISSING,
    Row,
    Table,
    TableColumn,
    byte_unit,
    columns_of,
    decimals,
    digits,
    fixed,
    number,
    to_csv,
    to_latex,
    to_markdown,
    to_rich,
    with_error,
)
from qjax.sweep.columns import BASELINE
from qjax.sweep.rows import cell_columns, is_baseline, named_model, with_baseline

__all__ = [
    "Row",
    "Table",
    "TableColumn",
    "layers_table",
    "perplexity_table",
    "split_tables",
    "to_csv",
    "to_latex",
    "to_markdown",
    "to_rich",
]  # fmt: skip

GROUP_KEYS = (  # rows of one table have these in common; the model is that which differences are from
    *("baseline", "baseline_fingerprint", "corpus", "corpus_fingerprint", "convention", "windows", "tasks"),
    *("compute_dtype", "device"),
)
OWN = "the unquantized model"  # the name of a baseline that is the row's own model, as it was loaded
NOISE = "≈: the 95 % interval of the change holds zero, each change by itself."


def within_noise(row: Row) -> bool:
    """Whether the difference of a model's loss from the baseline's is noise."""
    return not is_baseline(row) and is_noise(number(row, "nll_delta_low"), number(row, "nll_delta_high"))


def noise_note(rows: Sequence[Row]) -> str:
    """What ≈ means, and how wide intervals are where draws are few."""
    draws = min((int(row[DRAWS]) for row in rows if DRAWS in row), default=0)
    wide = f" Of {draws} draws it reaches up to {interval(0.0, 1.0, draws - 1).high:.1f} standard errors." if draws else ""
    return f"{NOISE}{wide}"


def over_units(rows: Sequence[Row], of: str = "documents") -> str:
    """What errors are over, for notes: how many documents, or blocks of windows where a text has few, or windows where rows of
    earlier versions do not know their documents; and how many draws of calibration data. of: where rows have no windows.
    """
    texts = {str(row.get("window_documents")): row for row in rows if "window_nll" in row}
    parts = list(dict.fromkeys(map(_units_of_text, texts.values()))) or [of]
    draws = {int(row.get(DRAWS, 1)) for row in rows if DRAWS in row or row.get("order") is not None}
    many = " to ".join(str(each) for each in sorted({min(draws), max(draws)})) if draws else ""
    drawn = (
        f" and {many} draws of calibration data"
        if many not in ("", "1")
        else " of one draw of calibration data"
        if many
        else ""
    )
    return " or ".join(parts) + drawn


def _units_of_text(row: Row) -> str:
    if row.get("window_documents") is None:
        return "windows taken as independent, which they are not (rows of an earlier version)"
    tokens = np.bincount(np.unique(row["window_documents"], return_inverse=True)[1], row.get("window_tokens"))
    if len(tokens) < FEWEST:
        return f"blocks of windows of {len(tokens)} document{'s' * (len(tokens) > 1)}"
    return f"{len(tokens):,} documents (the largest has {100 * tokens.max() / tokens.sum():.0f} % of the tokens)"


def cells_of(rows: Iterable[Row]) -> list[Row]:
    """The rows that are cells of a sweep: those without a `kind`."""
    return [row for row in rows if "kind" not in row]


def split_tables(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows that may stand in one table, in order of first appearance; rows that are no cells of a sweep (`kind`) are left out.

    Of rows that measured the same thing (again, with another version of the code) the last one counts.
    """
    groups: dict[tuple, dict[str, Row]] = {}
    for row in cells_of(rows):
        groups.setdefault(_group(row), {})[cell_columns(row)] = row
    return [list(group.values()) for group in groups.values()]


def require_one_group(rows: Sequence[Row]) -> None:
    """Raises QjaxError for no rows, and for rows of different models, texts or conventions; the message lists the values."""
    if not rows:
        raise QjaxError("a table or figure needs rows, got none; `qjax sweep` measures some")
    mixed = {key: list(dict.fromkeys(values)) for key, *values in zip(GROUP_KEYS, *map(_group, rows), strict=True)}
    mixed = [f"{key} {', '.join(values)}" for key, values in mixed.items() if len(values) > 1]
    if mixed:
        raise QjaxError(f"rows that cannot be compared in one table: {'; '.join(mixed)}; group them with split_tables")


def lines_of(rows: Sequence[Row]) -> list[Row]:
    """The lines of a table: a row for every cell, in order. Raises QjaxError as `require_one_group`."""
    require_one_group(rows)
    return in_order(merge_draws(rows))


def in_order(rows: Iterable[Row]) -> list[Row]:
    """The baseline first, then by descending bits per weight, recipe and seed."""
    return sorted(
        rows,
        key=lambda row: (
            not is_baseline(row),
            -number(row, "bits_per_weight"),
            row["recipe"],
            *(str(row.get(column.key)).rjust(8) for column in DISTINCTIONS),
        ),
    )


def name_orders(rows: Sequence[Row]) -> list[Row]:
    """The rows, the default order of calibration named too (gptq:int3-g128@qep) where others of the same recipe are."""
    orders: dict[str, set[object]] = {}
    for row in rows:
        orders.setdefault(_named(row, None), set()).add(row.get("order"))
    return [{**row, "recipe": _named(row, row.get("order"))} if len(orders[_named(row, None)]) > 1 else row for row in rows]


def _named(row: Row, order: object) -> str:
    """The recipe and its rules with an order, or none; a row of a method that is not known here keeps its name."""
    if "recipe_alone" not in row:
        return str(row["recipe"])
    return "; ".join([f"{row['recipe_alone']}@{order}" if order else row["recipe_alone"], *row["rules"]])


DISTINCTIONS = (  # columns beside the recipe that are shown where they tell rows apart
    TableColumn("model", "model", text=True),
    TableColumn("model_recipe", "model's\nrecipe", text=True),
    TableColumn("fingerprint", "model's\nfingerprint", text=True),  # of models of one name
    TableColumn("calibration", "calibration\ntext", text=True),
    TableColumn("calibration_windows", "calibration\nwindows"),
    TableColumn("calibration_window_tokens", "tokens\na window"),
    TableColumn("calibration_compute", "calibrated\nin", text=True),
    TableColumn("seed", "seed"),  # of rows that are not merged
    TableColumn(DRAWS, "draws", lambda row, key: str(row.get(key, MISSING if row.get("order") is None else 1))),
)


def distinctions(rows: Sequence[Row], *, seed: bool = True) -> list[TableColumn]:
    """The columns beside the recipe that tell the rows apart. seed: whether seeds, and how many were drawn, are among them."""
    count = {column.key: len({row[column.key] for row in rows if row.get(column.key) is not None}) for column in DISTINCTIONS}
    count["seed"] = max(Counter(cell_columns(row, any_draw=True) for row in rows).values(), default=0)
    fewest = {"fingerprint": max(2, len({named_model(row) for row in rows}) + 1), DRAWS: 1, "calibration_compute": 1}
    shown = [each for each in DISTINCTIONS if seed or each.key not in ("seed", DRAWS)]
    return [each for each in shown if count[each.key] >= fewest.get(each.key, 2)]


def describe(row: Row) -> str:
    """Model, text and convention of a row, as a title."""
    return f"{model_of(row)} on {row['corpus']} ({row['convention']})"


def model_of(row: Row) -> object:
    """The model that a table is about: the one that differences are from."""
    row = with_baseline(row)
    return named_model(row) if row[BASELINE] == row.get("fingerprint") else row["baseline"]


def baseline_name(row: Row) -> str:
    """What a row's differences are from, in words."""
    row = with_baseline(row)
    own = row[BASELINE] == row.get("fingerprint") and row["model_recipe"] == UNQUANTIZED
    return OWN if own else str(row["baseline"])


def perplexity_table(rows: Sequence[Row]) -> Table:
    """Perplexity, size and speed of every recipe on one model, text and convention.

    Raises QjaxError when there are no rows or rows of more than one model, text or convention.
    """
    rows = lines_of(rows)
    unit, unit_bytes = byte_unit([number(row, "size_bytes") for row in rows])
    columns = [
        TableColumn("recipe", "recipe", text=True),
        *distinctions(rows),
        TableColumn("bits_per_weight", "bits per\nweight", decimals(3)),
        TableColumn("model_bits_per_weight", "model bits\nper weight", decimals(3), rank=1),
        TableColumn("size_bytes", f"size\n({unit})", lambda row, key: fixed(number(row, key) / unit_bytes, 2)),
        TableColumn("perplexity", "perplexity", perplexity_text, error="perplexity_stderr"),
        TableColumn("perplexity_ratio", "change\n(%)", change_of_perplexity, error="perplexity_ratio_stderr"),
        TableColumn("weight_error", "weight\nerror", digits(2), rank=2),
        TableColumn("output_error", "output\nerror", digits(2), rank=2),
        TableColumn("seconds_quantize", "quantize\n(s)", digits(2), rank=4),
        TableColumn("tokens_per_second", "tokens\nper s", decimals(0), rank=3),
    ]
    first = rows[0]
    counts = [f"{first[key]:,} {key}" for key in ("windows", "tokens") if key in first]
    baseline = baseline_name(first)
    notes = [f"±: standard error over {over_units(rows)}; of the change, of the difference from {baseline} window by window."]
    if any(within_noise(row) for row in rows):
        notes.append(noise_note(rows))
    devices = sorted({str(row["device"]) for row in rows if "device" in row})
    notes += [f"Measured on {' and '.join(devices)}."] if devices else []
    title = ", ".join([f"Perplexity of {describe(first)}", *counts])
    return Table(title, columns_of(rows, columns), tuple(rows), tuple(notes))


def layers_table(layers: Iterable[tuple]) -> Table:
    """One line of each kernel, and of the table of embeddings where a rule named it. layers: the driver's `LayerRecord`s."""
    rows = tuple({**layer._asdict(), "path": layer.path.removesuffix("/kernel")} for layer in layers)
    recipes = list(dict.fromkeys(row["recipe"] for row in rows if row["recipe"] != UNQUANTIZED))
    columns = (
        TableColumn("path", "kernel", text=True),
        *([TableColumn("recipe", "recipe", text=True)] if len(recipes) > 1 else []),
        TableColumn("in_features", "inputs", rank=6),
        TableColumn("out_features", "outputs", rank=5),
        TableColumn("bits_per_weight", "bits per\nweight", decimals(3)),
        TableColumn("weight_error", "weight\nerror", digits(2)),
        TableColumn("proxy_loss", "proxy\nloss", digits(2), rank=1),
        TableColumn("output_error", "output\nerror", digits(2)),
        TableColumn("damp", "damp", digits(2), rank=2),
        TableColumn("clipped", "clipped", digits(2), rank=3),
        TableColumn("tokens", "tokens", decimals(0), rank=5),
        TableColumn("seconds", "seconds", digits(2), rank=4),
    )
    notes = (
        "Weight error: squared error over squared weights, input scales undone. "
        "Proxy loss: tr(dW' H dW); output error: that over tr(W' H W). "
        "Clipped: fraction of weights outside their group's grid. Tokens: of calibration.",
    )
    title = f"Layers, {recipes[0]}" if len(recipes) == 1 else "Layers"
    return Table(title, columns_of(rows, columns), rows, notes)


def perplexity_text(row: Row, key: str) -> str:
    """A column's format: perplexity with its standard error."""
    return with_error(number(row, key), number(row, "perplexity_stderr"))


def change_of_perplexity(row: Row, key: str) -> str:
    """A column's format: change from the baseline, percent, with its paired standard error; ≈ within noise."""
    return MISSING if is_baseline(row) else ratio_text(row, key)


def ratio_text(row: Row, key: str) -> str:
    """A column's format: the same of a row that is not the baseline's."""
    change, error = 100 * (number(row, key) - 1), 100 * number(row, "perplexity_ratio_stderr")
    noise = is_noise(number(row, "nll_delta_low"), number(row, "nll_delta_high"))
    return ("≈ " if noise else "") + with_error(change, error, sign="+")


def _group(row: Row) -> tuple[str, ...]:
    row = with_baseline(row)
    return tuple(str(row.get(key)) for key in GROUP_KEYS)
