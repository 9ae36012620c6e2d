"""What loading, evaluating and quantizing a model would take: an estimate by constants that were fitted to measured rows.

    cost = sum over terms of constant x term,  constants >= 0, minimise  sum over points of (estimate / measured - 1)^2

for the seconds and the peak memory of every stage (rows of the kind "scaling", `experiments/scaling.py`). Terms are sizes of
the model and the tokens, as the algorithms have them (`terms`), so that constants of small models speak of large ones. The
file of constants names the machine kind; nothing is scaled to another.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from qjax.errors import QjaxError
from qjax.files import expand
from qjax.report.rendering import Row, Table, TableColumn, byte_unit, fixed, number, significant
from qjax.report.scaling import latest
from qjax.untrusted import read_json

CONSTANTS = Path(__file__).with_name("constants.json")
WINDOW = 256  # tokens, of the measured rows
MLP = 3  # times the hidden size, of the models measured
RECIPES = {"rtn": "rtn:int4-g64", "gptq": "gptq:int4-g64", "awq": "awq:int4-g64"}
STAGES = {"load": "load", "perplexity": "evaluate"} | {name: f"quantize, {recipe}" for name, recipe in RECIPES.items()}
CALIBRATED = ("once", "layers", "products", "feedback")
TERMS = {
    "seconds": {
        "load": ("once", "parameters"),
        "perplexity": ("once", "layers", "products", "logits"),
        "rtn": ("once", "layers", "weights"),
        "gptq": CALIBRATED,
        "awq": CALIBRATED,
    },
    "peak_bytes": {work: ("once", "parameters", "largest") + ("states",) * (work not in ("load", "rtn")) for work in STAGES},
}


def terms(shapes: Sequence[tuple[int, int]], parameters: int, vocabulary: int, width: int, tokens: int) -> dict[str, int]:
    """Sizes that cost grows with. shapes: (in, out) of the linear kernels; width: the hidden size."""
    weights = sum(inputs * outputs for inputs, outputs in shapes)
    return {
        "once": 1,
        "layers": len(shapes),
        "parameters": parameters,
        "weights": weights,
        "products": weights * tokens,
        "logits": vocabulary * width * tokens,
        "feedback": sum(inputs * inputs * outputs for inputs, outputs in shapes),  # of one input's error to all later ones
        "largest": max(inputs * max(inputs, outputs) for inputs, outputs in shapes),  # a kernel, or its Hessian
        "states": width * tokens,
    }


def llama_shapes(width: int, depth: int) -> list[tuple[int, int]]:
    """(in, out) of the linear kernels of a model that `experiments/scaling.py` measures."""
    return depth * [*4 * [(width, width)], *2 * [(width, MLP * width)], (MLP * width, width)]


def fit_constants(rows: Sequence[Row]) -> dict[str, object]:
    """What `plan_table` reads: constants of the last code, versions and device in the rows, what they are of, and the largest
    share by which a measured point is missed by constants that were fitted to the others (None: there is one alone).
    """
    rows = latest(rows)
    found = {name: rows[-1][name] for name in ("device", "versions", "code")}
    for name in ("parameters", "tokens"):
        found[name] = [min(row[name] for row in rows), max(row[name] for row in rows)]
    for cost, by_work in TERMS.items():
        found[cost], found[f"{cost}_miss"] = {}, {}
        for work, names in by_work.items():
            own = [row for row in rows if row["work"] == work]
            if own:
                found[cost][work], found[f"{cost}_miss"][work] = _fit(own, cost, names)
    return found


def _fit(rows: Sequence[Row], cost: str, names: Sequence[str]) -> tuple[dict[str, float], float | None]:
    measured = np.array([number(row, cost) for row in rows])
    sizes = [_terms_of(row) for row in rows]
    relative = np.array([[each[name] for name in names] for each in sizes]) / measured[:, None]
    constants = {name: float(f"{each:.4g}") for name, each in zip(names, _nonnegative(relative), strict=True)}
    others = [np.arange(len(rows)) != left_out for left_out in range(len(rows))]
    misses = [abs(float(relative[~kept][0] @ _nonnegative(relative[kept])) - 1) for kept in others if kept.any()]
    return constants, float(f"{max(misses):.2g}") if misses else None


def _nonnegative(relative: Float[np.ndarray, "points terms"]) -> Float[np.ndarray, " terms"]:
    """Constants >= 0 whose estimates are nearest to one."""
    from scipy.optimize import nnls

    scale = relative.max(axis=0)
    return nnls(relative / scale, np.ones(len(relative)))[0] / scale


def _terms_of(row: Row) -> dict[str, int]:
    shapes = llama_shapes(row["width"], row["depth"])
    return terms(shapes, row["parameters"], row["vocabulary"], row["width"], row["tokens"])


def read_constants(path: Path | None = None) -> dict[str, object]:
    """The file at `path`, or that of the package. Raises QjaxError where there is none, or it holds something else."""
    path = CONSTANTS if path is None else expand(path)
    if not path.is_file():
        raise QjaxError(
            f"a plan needs constants that were measured, and there is no {path}; `python experiments/scaling.py` makes it in "
            "12 minutes on a quiet machine, and --constants PATH names one that was made elsewhere"
        )
    try:
        found = read_json(path)
        for cost, by_work in TERMS.items():
            for work, constants in found[cost].items():
                values = [float(value) for value in (found[f"{cost}_miss"][work] or 0, *constants.values())]
                if not set(constants) <= set(by_work[work]) or not all(0 <= value < math.inf for value in values):
                    raise ValueError(work)
        (_, _), (_, _) = (map(int, found[name]) for name in ("parameters", "tokens"))
        if found["seconds"].keys() != found["peak_bytes"].keys() or not isinstance(found["device"], str):
            raise ValueError(path)
    except (OverflowError, ValueError, KeyError, TypeError, AttributeError):
        raise QjaxError(f"{path} holds no constants of a plan, as `python experiments/scaling.py` writes them") from None
    return found


def plan_table(constants: Row, sizes: Row, *, tokens: int, title: str, here: str) -> Table:
    """A line for every stage that has constants. sizes: `terms` of the model and so many tokens; here: this machine's kind."""
    lines = []
    for work, stage in STAGES.items():
        if work in constants["seconds"]:
            line = {"stage": stage}
            for cost in TERMS:
                line[cost] = sum(each * sizes[name] for name, each in constants[cost][work].items())
                miss = constants[f"{cost}_miss"][work]
                line[f"{cost}_miss"] = None if miss is None else 100 * miss
            lines.append(line)
    unit, unit_bytes = byte_unit([line["peak_bytes"] for line in lines])
    columns = (
        TableColumn("stage", "stage", text=True),
        TableColumn("seconds", "time", lambda row, key: duration(number(row, key))),
        TableColumn("seconds_miss", "worst miss\n(%)", lambda row, key: fixed(number(row, key), 0)),
        TableColumn("peak_bytes", f"peak memory\n({unit})", lambda row, key: significant(number(row, key) / unit_bytes, 2)),
        TableColumn("peak_bytes_miss", "worst miss\n(%)", lambda row, key: fixed(number(row, key), 0)),
    )
    (fewest, most), (least, longest) = constants["parameters"], constants["tokens"]
    beyond = (
        "" if fewest <= sizes["parameters"] <= most and least <= tokens <= longest else "; what is asked for is beyond that"
    )
    other = "" if here == constants["device"] else f" This machine is {here}, and its times differ."
    notes = (
        f"An estimate, by constants fitted to runs on {constants['device']}; nothing is scaled to another machine.{other}",
        f"Measured: float32 Llamas of {significant(fewest)} to {significant(most)} parameters, {least:,} to {longest:,} tokens "
        f"in windows of {WINDOW}{beyond}. Worst miss: of a measured point by constants fitted to the others.",
        "Time without compilation; a stage's memory is that of a process which loads the model and does it.",
    )
    return Table(f"Plan of {title}, {tokens:,} tokens scored or calibrated on", columns, tuple(lines), notes)


def duration(seconds: float) -> str:
    """0.35 s, 42 s, 12 min, 5.6 h."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{significant(seconds / size, 2)} {unit}"
    return f"{significant(seconds, 2)} s"
