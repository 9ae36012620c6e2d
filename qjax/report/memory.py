"""The memory table: exact bytes of a model's weights in every precision.

    bytes = sum over linear kernels of Format.nbytes(in, out) + bytes of everything else (embeddings, norms, head, biases)

Quantized formats hold the linear kernels, everything else stays as it is stored. The rows FP32 and FP16 are the whole model
in that type. Activations and the key-value cache are not weights and are not counted.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from fractions import Fraction

from qjax.errors import QjaxError
from qjax.formats import Format, parse_format
from qjax.report.rendering import Row, Table, TableColumn, byte_unit, decimals, fixed, number

MEMORY_FORMATS = ("int8-channel", "int4-g128", "int3-g128", "int2-g64", "nf4-g64", "nf4-g64-dq")
REFERENCE_SHAPE = (4096, 4096)  # of a weight whose shape is not known: that of the 7-billion-parameter Llama's attention
BASELINES = (("fp32", "FP32", 4), ("fp16", "FP16 / BF16", 2))


def memory_table(
    shapes: Sequence[tuple[int, int]],
    others: Iterable[tuple[int, float]] = (),
    *,
    title: str = "",
    formats: Sequence[str] = MEMORY_FORMATS,
) -> Table:
    """Memory of a model in every precision.

    shapes: (in_features, out_features) of the linear kernels. others: (elements, bytes of one) of all other parameters.
    title: the model's name. Raises QjaxError for an unknown format or a model without linear kernels.
    """
    if not shapes:
        raise QjaxError(f"memory of {title or 'a model'}: it has no linear kernels to quantize")
    weights = sum(rows * columns for rows, columns in shapes)
    others = tuple(others)
    rest, rest_bytes = sum(count for count, _ in others), round(sum(count * each for count, each in others))
    measured = [_row(name, precision, each * (weights + rest), weights + rest, 8 * each) for name, precision, each in BASELINES]
    for fmt in map(parse_format, formats):
        kernels = sum(fmt.nbytes(*shape) for shape in shapes)
        measured.append(_row(str(fmt), _precision(fmt), kernels + rest_bytes, weights + rest, 8 * kernels / weights))
    heading = ": ".join(filter(None, ("Memory of weights", title)))
    counted = f"{_count(weights)} weights in linear layers, {_count(rest)} other parameters"
    notes = ("Quantized rows hold the linear layers; the other parameters stay as stored.",) if rest else ()
    return _table(f"{heading} ({counted})", measured, notes)


def parameters_table(parameters: float, *, formats: Sequence[str] = MEMORY_FORMATS) -> Table:
    """Memory of a model of which only the number of parameters is known: all of them counted at the format's bits per weight.

    Raises QjaxError for an unknown format or a number below 1.
    """
    if not parameters >= 1 or parameters == float("inf"):
        raise QjaxError(f"parameters {parameters:g}: expected a number of at least 1, for example 7e9")
    count = round(parameters)
    measured = [_row(name, precision, each * count, count, 8 * each) for name, precision, each in BASELINES]
    for fmt in map(parse_format, formats):
        rows, columns = REFERENCE_SHAPE
        size = round(Fraction(count * fmt.nbytes(rows, columns), rows * columns))
        measured.append(_row(str(fmt), _precision(fmt), size, count, fmt.bits_per_weight(rows, columns)))
    title = f"Memory of {_count(count)} parameters, every one quantized"
    shape = " x ".join(map(str, REFERENCE_SHAPE))
    return _table(title, measured, (f"Bits per weight are those of a {shape} matrix; real models keep embeddings at 16 bits.",))


def memory_row(model: str, shapes: Iterable[tuple[int, int]], others: Iterable[tuple[int, float]] = ()) -> dict[str, object]:
    """What a folder of results keeps of a model that is not measured: a row of the kind "memory", see `memory_table`."""
    return {
        "key": f"memory: {model}",
        "kind": "memory",
        "model": model,
        "shapes": [[*shape, count] for shape, count in Counter(map(tuple, shapes)).items()],
        "others": [list(each) for each in others],
    }


def memory_rows_table(rows: Sequence[Row]) -> Table:
    """The memory table of the row of kind "memory" among the rows; raises QjaxError unless there is exactly one."""
    found = [row for row in rows if row.get("kind") == "memory"]
    if len(found) != 1:
        raise QjaxError(f"a memory table is of one model, got rows of {len(found)}; a folder holds one of them")
    missing = [name for name in ("model", "shapes", "others") if name not in found[0]]
    if missing:
        raise QjaxError(f"row {found[0]['key']} of the kind 'memory' lacks {', '.join(missing)}; mend or remove it")
    shapes = [(inputs, outputs) for inputs, outputs, count in found[0]["shapes"] for _ in range(count)]
    return memory_table(shapes, map(tuple, found[0]["others"]), title=str(found[0]["model"]))


def _row(name: str, precision: str, size: int, parameters: int, bits: float) -> Row:
    return {
        "precision": precision,
        "format": name,
        "bits_per_weight": bits,
        "bytes": size,
        "ratio_to_fp32": size / (4 * parameters),
        "ratio_to_fp16": size / (2 * parameters),
    }


def _table(title: str, rows: Sequence[Row], notes: tuple[str, ...]) -> Table:
    unit, unit_bytes = byte_unit([number(row, "bytes") for row in rows])
    columns = (
        TableColumn("precision", "precision", text=True),
        TableColumn("format", "format", text=True),
        TableColumn("bits_per_weight", "bits per\nweight", decimals(3)),
        TableColumn("bytes", f"memory\n({unit})", lambda row, key: fixed(number(row, key) / unit_bytes, 2)),
        TableColumn("bytes", "bytes", lambda row, key: f"{row[key]:,}", rank=1),
        TableColumn("ratio_to_fp32", "of FP32\n(%)", _percent),
        TableColumn("ratio_to_fp16", "of FP16\n(%)", _percent),
    )
    codecs = dict.fromkeys(parse_format(row["format"]).scale_codec.note for row in rows)
    explained = [f"1 {unit} = {unit_bytes:,} bytes.", *filter(None, codecs)]
    return Table(title, columns, tuple(rows), (*explained, *notes))


def _percent(row: Row, key: str) -> str:
    return fixed(100 * number(row, key), 1)


def _precision(fmt: Format) -> str:
    label = fmt.scale_codec.label
    return fmt.grid.upper().replace("_", " ") + (f" + {label}" if label else "")


def _count(number_of: int) -> str:
    """1234567890 as 1.235 billion."""
    for size, word in ((10**9, "billion"), (10**6, "million")):
        if number_of >= size:
            return f"{number_of / size:.4g} {word}"
    return f"{number_of:,}"
