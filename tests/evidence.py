"""What the rows of results/ say, for the expressions in documents (`documents.py`).

Changes are in percent of the unquantized model's perplexity, accuracies and flips in percent and points.
"""

import csv
import functools
import math
import re
from collections.abc import Iterable, Sequence

import numpy as np
from scipy.stats import spearmanr

from qjax.evaluate.statistics import Difference, aggregate_draws, paired_difference
from qjax.formats import parse_format
from qjax.report.estimates import Estimate, cell_estimates
from qjax.report.rendering import decimals, documents_of, loss_change, with_error
from qjax.report.scaling import latest, scaling_table
from qjax.report.tables import change_of_perplexity
from qjax.sweep.store import ROWS, read_rows
from tests.paths import REPOSITORY

RESULTS = REPOSITORY / "results"
BUNDLED, BASELINE = "bundled", "none"
OTHERS = ("parallel", "block", "sequential")  # orders of calibration, beside qep


@functools.cache
def cells(folder: str, model: str = BUNDLED, text: str = "") -> dict[str, Estimate]:
    """What rows of a model and a text say, by recipe and what else tells them apart. model: its name, or how names begin, if
    none is the very one; text: a part of its name.
    """
    return _named(read_rows(RESULTS / folder / ROWS), model, text)


def _named(rows: list[dict], model: str, text: str) -> dict[str, Estimate]:
    found = cell_estimates(rows)
    same = str.__eq__ if model in {key[0] for key in found} else str.startswith
    return {" ".join(key[2:]): cell for key, cell in found.items() if same(key[0], model) and text in key[1]}


def cell(folder: str, recipe: str, **where: str) -> Estimate:
    """One of them."""
    return cells(folder, **where)[recipe]


def change(folder: str, recipe: str, **where: str) -> float:
    """Change of perplexity, %."""
    return cell(folder, recipe, **where).change


def spread(folder: str, recipe: str, values: Sequence[str], **where: str) -> tuple[float, float]:
    """The least and the largest change of the recipes that have each of the values in place of {}."""
    return span(change(folder, recipe.format(each), **where) for each in values)


def error(folder: str, recipe: str, **where: str) -> float:
    """Its standard error."""
    return cell(folder, recipe, **where).change_stderr


def both(folder: str, recipe: str, **where: str) -> tuple[float, float]:
    """Change of perplexity and its standard error, %."""
    return change(folder, recipe, **where), error(folder, recipe, **where)


def bits(folder: str, recipe: str, **where: str) -> float:
    """Exact bits per weight."""
    return cell(folder, recipe, **where).bits_per_weight


def calibration_tokens(folder: str, recipe: str, **where: str) -> int:
    """Tokens of calibration text of a draw."""
    row = cell(folder, recipe, **where).row
    return row["calibration_windows"] * row["calibration_window_tokens"]


def logged(name: str = "bitwidth_sweep") -> float:
    """Minutes of the last run of the log whose last experiment this was, and of which none failed."""
    pattern = rf"^{name}: \d+ s\nall: (\d+) min, 0 failed$"
    return float(re.findall(pattern, (RESULTS / "all.log").read_text("utf-8"), re.MULTILINE)[-1])


@functools.cache
def _of_draw(folder: str, seed: int, model: str, text: str) -> dict[str, Estimate]:
    """As `cells`, of one draw; what draws nothing is in each."""
    rows = [row for row in read_rows(RESULTS / folder / ROWS) if row.get("seed") in (seed, None) or not row.get("order")]
    return _named(rows, model, text)


def against(folder: str, recipe: str, other: str, model: str = BUNDLED, text: str = "") -> Difference:
    """A recipe's mean loss less another's, in nats a token, paired by window and draw."""
    draws = [_of_draw(folder, seed, model, text) for seed in range(cell(folder, recipe, model=model, text=text).draws or 1)]
    rows = [(found[recipe].row, found[other].row) for found in draws]
    changes = np.array([loss_change(*pair) for pair in rows])
    return aggregate_draws(changes, np.array(rows[0][0]["window_tokens"]), documents_of(rows[0][0])).change


def fewer(folder: str, recipe: str, other: str, **where: str) -> bool:
    """Whether a recipe's loss is less than another's, with the 95 % interval of their paired difference below zero."""
    return against(folder, recipe, other, **where).high < 0


def alike(folder: str, recipe: str, other: str, **where: str) -> bool:
    """Whether the 95 % interval of the paired difference holds zero."""
    found = against(folder, recipe, other, **where)
    return found.low <= 0 <= found.high


def is_noise(found: Estimate) -> bool:
    """Whether the 95 % interval of its change holds zero."""
    return found.change_low <= 0 <= found.change_high


def resolved(folder: str, bits: int, **where: str) -> list[bool]:
    """Of every recipe of so many bits whether its change is told from zero."""
    return [not is_noise(found) for found in cells(folder, **where).values() if found.row["bits"] == bits]


def share(folder: str, recipe: str, of: str, **where: str) -> float:
    """A recipe's change as a share of another's."""
    return change(folder, recipe, **where) / change(folder, of, **where)


def accuracy_noise(folder: str, recipe: str, task: str = "cloze", **where: str) -> bool:
    """Whether the 95 % interval of a change of accuracy holds zero."""
    row = cell(folder, recipe, **where).row
    return row[f"accuracy_delta_low:{task}"] <= 0 <= row[f"accuracy_delta_high:{task}"]


def flips(folder: str, recipe: str, task: str = "cloze", **where: str) -> tuple[float, float]:
    """The share of answers that go from right to wrong or back, and its standard error, %."""
    found = cell(folder, recipe, **where)
    return found.flips[task], found.flips_stderr[task]


def answers_told(better: str, worse: str, task: str = "cloze") -> bool:
    """Whether of two recipes of accuracy/ one answers more questions right, told apart, paired by question and draw."""
    rows = [[_of_draw("accuracy", seed, BUNDLED, "")[name].row for name in (better, worse)] for seed in range(3)]
    right = [[np.equal(row[f"answers:{task}"], row[f"gold:{task}"]).astype(float) for row in pair] for pair in rows]
    changes = np.array([ours - theirs for ours, theirs in right])
    return aggregate_draws(-changes, np.ones(changes.shape[1]), np.array(rows[0][0][f"documents:{task}"])).change.high < 0


def leads(folder: str, grid: str) -> tuple[int, int]:
    """Of how many cases NF4's lead over integers in 4 bits of a grid is told from zero, and of how many in all."""
    found = [fewer(folder, f"{m}:nf4-g{g}-dq", f"{m}:int4-g{g}{grid}-dq") for m in ("rtn", "gptq") for g in (64, 128)]
    return sum(found), len(found)


# --- widths ---------------------------------------------------------------------------------------------------------------

WIDE = ("rtn", "gptq(clip=mse)", "awq", "awq+gptq(clip=mse)")
PLACES = {  # model and text -> its groups, the smallest first
    ("bundled", "python"): ("g32", "g128", "channel"),
    ("stories260K-hf", "tinystories"): ("g32", "g64", "channel"),
    ("stories260K-hf", "wiki"): ("g32", "g64", "channel"),
    ("babyllama-hf", "tinystories"): ("g32", "g128", "channel"),
}
OWN = [place for place in PLACES if place[1] != "wiki"]  # text of the kind that the model was trained on


def wide(method: str, bits: int, group: int, place: tuple[str, str]) -> tuple[str, dict[str, str]]:
    """(recipe, where) of a method at a width in the smallest (0) to the largest (2) group of a place."""
    return f"{method}:int{bits}-{PLACES[place][group]}", {"model": place[0], "text": place[1]}


def costs(method: str, bits: int, place: tuple[str, str]) -> list[float]:
    """Changes of perplexity from the smallest group to the largest, %."""
    return [change("bitwidth_sweep", recipe, **where) for recipe, where in (wide(method, bits, g, place) for g in range(3))]


def beats(ours: tuple[str, int, int], theirs: tuple[str, int, int], place: tuple[str, str]) -> bool:
    """Whether one (method, bits, group) loses less than another, told apart."""
    (recipe, where), (other, _) = wide(*ours, place), wide(*theirs, place)
    return fewer("bitwidth_sweep", recipe, other, **where)


def every_bit(place: tuple[str, str]) -> list[bool]:
    """Of every method, group and step from 8 to 4 to 3 to 2 bits whether more bits lose less, told apart."""
    steps = ((8, 4), (4, 3), (3, 2))
    return [beats((m, more, g), (m, less, g), place) for m in WIDE for g in range(3) for more, less in steps]


def smaller_groups(place: tuple[str, str], *, worse: bool = False) -> list[bool]:
    """Of every method, width and step to the next smaller group whether that loses less, told apart; worse: more."""
    found = [((m, b, g), (m, b, g + 1)) for m in WIDE for b in (8, 4, 3, 2) for g in range(2)]
    return [beats(*(pair[::-1] if worse else pair), place) for pair in found]


def calibrated(bits: int, place: tuple[str, str]) -> list[bool]:
    """Of every calibrated method and group whether it loses less than nearest rounding, told apart."""
    return [beats((m, bits, g), ("rtn", bits, g), place) for m in WIDE[1:] for g in range(3)]


def ranks(place: tuple[str, str], figure: str) -> float:
    """Spearman's correlation of the increase of perplexity with another figure over all recipes."""
    found = [cell.row for recipe, cell in cells("bitwidth_sweep", *place).items() if recipe != BASELINE]
    return abs(spearmanr([row["perplexity_ratio"] for row in found], [row[figure] for row in found]).statistic)


# --- findings of papers ---------------------------------------------------------------------------------------------------

SMALL = ("bundled", "stories260K-hf", "babyllama-hf")


def millions(model: str, folder: str = "paper_shapes") -> float:
    """Parameters of a model, in millions."""
    row = cell(folder, BASELINE, model=model).row
    return 8e-6 * row["size_bytes"] / row["model_bits_per_weight"]


@functools.cache
def findings() -> list[dict[str, str]]:
    """The table of findings, which a test makes again from the rows."""
    with (RESULTS / "paper_shapes" / "paper_shapes.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def verdicts(*said: str) -> int:
    """How many of all verdicts are one of these."""
    return sum(row[f"holds:{model}"] in said for row in findings() for model in SMALL)


def everywhere() -> list[str]:
    """Findings that hold on every model, each by itself."""
    return [row["finding"] for row in findings() if all(row[f"holds:{model}"].startswith("yes") for model in SMALL)]


def ours(beginning: str, paper: str = "") -> list[float]:
    """What the three models give for the finding whose name, and paper, begin so."""
    (row,) = [row for row in findings() if row["finding"].startswith(beginning) and row["source"].startswith(paper)]
    return [float(row[f"ours:{model}"]) for model in SMALL]


# --- trade-off ------------------------------------------------------------------------------------------------------------


def speed(task: str, way: str, recipe: str) -> float:
    """Tokens a second: of a prompt ("prefill") or of decoding ("decode"), with weights "dense" or "packed"."""
    return cell("tradeoff", recipe).row[f"{task}_tokens_per_second:{way}"]


# --- formats at 4 bits ----------------------------------------------------------------------------------------------------

GRIDS = ("nf4-g{}", "fp4_e2m1-g{}", "fp4_bnb-g{}", "int4-g{}-sym-max", "int4-g{}-sym", "int4-g{}")


def best_of(group: int, scales: str) -> str:
    """The format of 4 bits that costs least by nearest rounding in these groups."""
    formats = [grid.format(group) + scales for grid in GRIDS]
    return min(formats, key=lambda fmt: change("formats_at_4_bits", f"rtn:{fmt}"))


def halved(folder: str) -> tuple[float, float]:
    """The least and the largest share of nearest rounding's cost that is left by GPTQ, over all formats."""
    formats = [grid.format(group) + scales for grid in GRIDS for group in (64, 128) for scales in ("", "-dq")]
    return span(share(folder, f"gptq:{fmt}", f"rtn:{fmt}") for fmt in formats)


# --- sensitivity ----------------------------------------------------------------------------------------------------------

THREE = {"rtn": "rtn:int3-g128", "gptq": "gptq(clip=mse):int3-g128"}
SIZES = {  # shares of the bundled model's linear weights
    **{f"attention/{kind}/": size / 24 for kind, size in (("q", 2), ("k", 1), ("v", 1), ("o", 2))},
    **{f"mlp/{kind}/": 6 / 24 for kind in ("gate", "up", "down")},
}


def placed(place: str, method: str) -> str:
    """The name of the cell where one place alone is rounded."""
    return f"none; {place}={THREE[method]}"


def alone(place: str, method: str) -> float:
    """Change of perplexity where one place alone is rounded, %."""
    return change("sensitivity", placed(place, method))


BLOCKS = [f"^block_{number}/" for number in range(6)]


def compounded(places: Iterable[str], method: str) -> float:
    """The change of perplexity that those of the places alone make one after the other, %."""
    return 100 * (math.exp(sum(math.log1p(alone(place, method) / 100) for place in places)) - 1)


def adds_up_to_less(places: Iterable[str], method: str) -> bool:
    """Whether the losses of the places alone are together less than that of all, with the interval below zero."""
    rows = []
    for seed in range(cell("sensitivity", THREE[method]).draws or 1):
        found = _of_draw("sensitivity", seed, BUNDLED, "")
        parts = [loss_change(found[placed(place, method)].row, found[BASELINE].row) for place in places]
        rows.append(np.sum(parts, axis=0) - loss_change(found[THREE[method]].row, found[BASELINE].row))
    base = found[BASELINE].row
    return aggregate_draws(np.array(rows), np.array(base["window_tokens"]), documents_of(base)).change.high < 0


def a_weight(kind: str, method: str) -> float:
    """The change for each weight of a kind, as if all weights were as those."""
    return alone(kind, method) / SIZES[kind]


def span(values: Iterable[float]) -> tuple[float, float]:
    """The least and the largest."""
    found = list(values)
    return min(found), max(found)


# --- calibration ----------------------------------------------------------------------------------------------------------

GPTQ, AWQ = "gptq(clip=mse):int3-g128@parallel", "awq:int3-g128@parallel"
AMOUNTS = ((32, 256), (2, 256), (8, 256), (128, 256), (128, 64))  # windows, and tokens of one
C4, SHAKESPEARE = "text:c4.utf8.gz", "text:tinyshakespeare.txt"


def reading(recipe: str, windows: int, tokens: int = 256, text: str = "python-docs") -> str:
    """The name of a recipe's cell with so much of a calibration text."""
    return f"{recipe} {text} {windows} {tokens}"


def read(recipe: str, windows: int, tokens: int = 256, text: str = "python-docs") -> float:
    """Its change of perplexity, %."""
    return change("calibration", reading(recipe, windows, tokens, text))


# --- composition ----------------------------------------------------------------------------------------------------------

FEEDBACK = ("gptq", "gptq(clip=mse)", "gptq(clip=hessian)", "gptq(clip=mse)+descend")
BEFORE_GPTQ = [(f"awq+{method}:int{bits}-g128", f"{method}:int{bits}-g128") for method in FEEDBACK for bits in (4, 3, 2)]


def taken_off(method: str, bits: int) -> float:
    """How much less than nearest rounding a method loses, in nats a token."""
    return -against("composition", f"{method}:int{bits}-g128", f"rtn:int{bits}-g128").value


# --- activations ----------------------------------------------------------------------------------------------------------

OUTLIERS = "bundled-outliers"
W8A8, W4A4 = "rtn:int8-channel-sym-max/int8-token", "rtn:int4-channel/int4-token"
STATIC = "rtn:int8-channel-sym-max/int8-tensor@parallel"


def acts(recipe: str, model: str = BUNDLED, text: str = "") -> tuple[float, float]:
    """Change of perplexity and its standard error, %."""
    return both("activations", recipe, model=model, text=text)


def times_less(recipe: str, than: str = W8A8, model: str = OUTLIERS) -> float:
    """How many times a recipe's cost is in another's."""
    return acts(than, model)[0] / acts(recipe, model)[0]


def tallest(model: str) -> float:
    """How far the largest channel of an input stands above the median one, of all inputs of a model."""
    rows = [row for row in read_rows(RESULTS / "activations" / ROWS) if row.get("kind") == "inputs" and row["model"] == model]
    return max(row["times_median"] for row in rows)


def taken_back(recipe: str, of: str = W4A4, model: str = BUNDLED) -> float:
    """What a recipe takes back of what another costs, %."""
    return 100 * (1 - acts(recipe, model)[0] / acts(of, model)[0])


# --- real models ----------------------------------------------------------------------------------------------------------

SMOLLM2, GEMMA = "SmolLM2-135M-Instruct.Q4_1", "gemma-3-270m.Q4_K_M"
GROUPS = {SMOLLM2: "g64", GEMMA: "g128"}


def real(model: str, method: str, bits: int) -> str:
    """A recipe as a real model has it: in its own groups, in those of 64 at 2 bits."""
    return method_in(method, f"int{bits}-{'g64' if bits == 2 else GROUPS[model]}", "@parallel")


def costs_of(model: str, bits: int, *methods: str) -> list[float]:
    """Changes of perplexity and their standard errors, one after the other."""
    return [figure for method in methods for figure in both("real_models", real(model, method, bits), model=model)]


def lost(model: str, bits: int, *methods: str) -> list[float]:
    """Points of the mean accuracy that are lost."""
    rows = [cell("real_models", real(model, method, bits), model=model).row for method in methods]
    return [-100 * row["accuracy_mean_delta"] for row in rows]


def told(model: str, bits: int, method: str) -> bool:
    """Whether the change of perplexity is told from zero."""
    return not is_noise(cell("real_models", real(model, method, bits), model=model))


def less(model: str, bits: int, method: str, *others: str) -> bool:
    """Whether a method loses less than each of the others, told apart."""
    return all(fewer("real_models", real(model, method, bits), real(model, other, bits), model=model) for other in others)


def best_at_2(model: str) -> tuple[float, str]:
    """The least perplexity at 2 bits, and its recipe."""
    found = {
        recipe: cell.row["perplexity"] for recipe, cell in cells("real_models", model=model).items() if cell.row["bits"] == 2
    }
    return min((value, recipe) for recipe, value in found.items())


def seen_by_tasks(model: str, bits: int) -> dict[str, int]:
    """Of the methods how many change the accuracy of a task, told from zero, by task."""
    recipes = [real(model, method, bits) for method in METHODS]
    noise = functools.partial(accuracy_noise, "real_models", model=model)
    return {task: sum(not noise(recipe, task) for recipe in recipes) for task in ("arc_easy", "piqa", "hellaswag")}


# --- embeddings -----------------------------------------------------------------------------------------------------------


def table_in(bits: int, kernels: str = BASELINE) -> str:
    """The name of the cell with the table in so many bits."""
    return f"{kernels}; embed=rtn:int{bits}-g64"


def four(model: str = BUNDLED) -> str:
    """The recipe of linear layers that the table is measured beside."""
    return f"rtn:int4-{GROUPS.get(model, 'g128')}"


def added(bits: int, model: str = BUNDLED, *, beside: bool = False) -> Difference:
    """What the table in so many bits adds to the loss, in nats a token; beside: linear layers of 4 bits."""
    kernels = four(model) if beside else BASELINE
    return against("embeddings", table_in(bits, kernels), kernels, model)


def held_by_table(model: str = BUNDLED) -> float:
    """Its share of the weights, %, from what 8 bits and 2 make of the model's size."""
    sizes, codes = [
        [cell("embeddings", table_in(bits), model=model).row["model_bits_per_weight"] for bits in (8, 2)],
        [8 * parse_format(f"int{bits}-g64").nbytes(64, 1) / 64 for bits in (8, 2)],
    ]
    return 100 * (sizes[0] - sizes[1]) / (codes[0] - codes[1])


def embeddings_table() -> str:
    """What the table's bits add to perplexity, %, alone and beside linear layers of 4 bits."""
    lines = []
    for name, model in {"bundled": BUNDLED, "SmolLM2 135M": SMOLLM2, "Gemma 3 270M": GEMMA}.items():
        for beside in (False, True):
            found = [added(bits, model, beside=beside) for bits in (8, 4, 3, 2)]
            told = [with_error(100 * math.expm1(d.value), 100 * math.exp(d.value) * d.stderr, sign="+") for d in found]
            marks = ["≈ " * (d.low <= 0 <= d.high) for d in found]
            lines.append(
                (f"{name}, {f'beside `{four(model)}`' if beside else 'alone'}", *map("".join, zip(marks, told, strict=True)))
            )
    return _markdown(("table in", "8 bits", "4", "3", "2"), lines)


# --- tables of the README -------------------------------------------------------------------------------------------------

METHODS = {  # of the README's table, in words
    "rtn": "nearest rounding, `rtn`",
    "awq": "AWQ with its range search, `awq`",
    "gptq": "GPTQ, `gptq`",
    "awq+gptq(clip=mse)": "both, with range search, `awq+gptq(clip=mse)`",
    "gptq(clip=mse)+descend": "GPTQ, searched and refined, `gptq(clip=mse)+descend`",
}
ACCURACY = tuple(f"{method}:int{bits}-g128" for bits in (4, 3, 2) for method in ("rtn", "gptq(clip=mse)"))


def cost_table() -> str:
    """Changes of perplexity by method and width, on the bundled model, SmolLM2 and Gemma 3."""
    places = [("quickstart", "bundled", {}, f"int{bits}-g128", "") for bits in (4, 3, 2)]
    real = [("SmolLM2", SMOLLM2, f"int{bits}-g64") for bits in (4, 3)] + [
        ("Gemma 3", GEMMA, f"int{bits}-g128") for bits in (4, 3)
    ]
    places += [("real_models", name, {"model": model}, fmt, "@parallel") for name, model, fmt in real]
    headers = ("", *(f"{name}, `{fmt}`" for _, name, _, fmt, _ in places))
    sizes = [cell(folder, f"rtn:{fmt}", **where).row for folder, _, where, fmt, _ in places]
    lines = [("bits per weight (AWQ: up to 0.01 more)", *(decimals(2)(row, "bits_per_weight") for row in sizes))]
    for method, words in METHODS.items():
        cells = (cell(folder, method_in(method, fmt, order), **where) for folder, _, where, fmt, order in places)
        lines.append((words, *(change_of_perplexity(found.row, "perplexity_ratio") for found in cells)))
    return _markdown(headers, lines)


def method_in(method: str, fmt: str, order: str) -> str:
    """A recipe, in an order where the method reads data."""
    return f"{method}:{fmt}{order if method != 'rtn' else ''}"


def accuracy_table() -> str:
    """Accuracy of `cloze`, its change, flips, and KL divergence."""
    base = cell("accuracy", BASELINE)
    lines = [("none (stored in bfloat16)", with_error(base.accuracy["cloze"], _stderr(base.row)), "", "", "")]
    for recipe in ACCURACY:
        found = cell("accuracy", recipe)
        change = with_error(found.accuracy_change["cloze"], 100 * found.row["accuracy_delta_stderr:cloze"], sign="+")
        lines.append(
            (
                *(f"`{recipe}`", with_error(found.accuracy["cloze"], _stderr(found.row))),
                f"{'≈ ' * accuracy_noise('accuracy', recipe)}{change}",
                with_error(*flips("accuracy", recipe)),
                with_error(found.kl, found.row["kl_stderr"]),
            )
        )
    return _markdown(("recipe", "accuracy (%)", "change (points)", "flips (%)", "KL (nats a token)"), lines)


def _stderr(row: dict) -> float:
    return 100 * row["accuracy_stderr:cloze"]


def _markdown(headers: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    rows = [headers, ("---", *["---:"] * (len(headers) - 1)), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows).replace("  ", " ")


# --- speed ----------------------------------------------------------------------------------------------------------------

BF16, F32 = "losses in bfloat16", "losses in float32"
PARALLEL, QEP, REFINED = "gptq:int4-g64@parallel", "gptq:int4-g64@qep", "gptq(refine=4):int4-g64@qep"
LOW = " in bfloat16"  # behind a recipe: what calibration ran the model in
COLD, OURS, DENSE = f"{PARALLEL}{LOW}, cold", "qjax float32", "dense float32"
PEERS = ("llm-compressor", "GPTQModel")
LOW_PEERS = tuple(f"{peer} bfloat16" for peer in PEERS)
TIMED = ("random-1M", "random-15M", SMOLLM2)


def faster(model: str, task: str, peer: str) -> tuple[float, float, float]:
    """How many times as fast as a library we are: the median of the rounds, the least and the largest."""
    asked = {"model": model, "task": task, "peer": peer}
    ratios = [row["ratio"] for row in read_rows(RESULTS / "speed" / ROWS) if asked.items() <= row.items()]
    return float(np.median(ratios)), min(ratios), max(ratios)


def per_rows(product: str, peer: str = DENSE, rows: tuple[int, ...] = (1, 8, 64, 512)) -> tuple[float, ...]:
    """How many times as fast a product is, by the rows of its input."""
    return tuple(faster("4096 x 4096", f"{product}, {each} rows", peer)[0] for each in rows)


def ours_seconds(model: str, task: str) -> float:
    """The median of our seconds."""
    rows = read_rows(RESULTS / "speed" / ROWS)
    return float(np.median([row["seconds"] for row in rows if (row["model"], row["task"]) == (model, task)]))


def longer(model: str, task: str, other: str) -> float:
    """How much longer our task takes than another in the same round, the median over rounds, %."""
    rows = [row for row in read_rows(RESULTS / "speed" / ROWS) if row["model"] == model]
    seconds = {name: {row["round"]: row["seconds"] for row in rows if row["task"] == name} for name in (task, other)}
    return 100 * (float(np.median([seconds[task][each] / seconds[other][each] for each in seconds[task]])) - 1)


# --- types to run in ------------------------------------------------------------------------------------------------------


def of_bfloat16(figure: str) -> list[float]:
    """A figure in bfloat16 less that in float32, of every recipe, model and text that has both."""
    rows = [row for row in read_rows(RESULTS / "compute_types" / ROWS) if row.get("calibration_compute") is None]
    held = {(row["model"], row["corpus"], row["recipe"], row["compute_dtype"]): row[figure] for row in rows}
    exact = {cell[:3]: value for cell, value in held.items() if cell[3] == "float32"}
    both = {cell: value for cell, value in exact.items() if value is not None and (*cell, "bfloat16") in held}
    return [held[*cell, "bfloat16"] - value for cell, value in both.items()]


def calibrated_in_bfloat16(model: str) -> list[Difference]:
    """Loss of recipes calibrated in bfloat16 and measured in float32, less that of the same calibrated in float32."""
    rows = [row for row in read_rows(RESULTS / "compute_types" / ROWS) if row["compute_dtype"] == "float32"]
    cells = {(row["corpus"], row["recipe"], row.get("calibration_compute")): row for row in rows if row["model"] == model}
    found = []
    for (text, recipe, name), row in cells.items():
        if name == "bfloat16":
            losses = (np.asarray(each["window_nll"]) for each in (row, cells[text, recipe, None]))
            found.append(paired_difference(*losses, np.asarray(row["window_tokens"]), np.asarray(row["window_documents"])))
    return found


# --- how cost grows -------------------------------------------------------------------------------------------------------


def grown(axis: str) -> set[int]:
    """The sizes along an axis, or the numbers of parameters."""
    return {row[axis] for row in latest(read_rows(RESULTS / "scaling" / ROWS))}


def grows(work: str, axis: str) -> tuple[float, float]:
    """The exponent of time and its standard error."""
    table = scaling_table(read_rows(RESULTS / "scaling" / ROWS))
    (found,) = (row["seconds"] for row in table.rows if (row["work"], row["axis"]) == (work, axis))
    exponent, _, stderr = found.split()[:3]
    return float(exponent), float(stderr)


# --- kernels --------------------------------------------------------------------------------------------------------------


def kernel(fmt: str, implementation: str, rows: int) -> list[float]:
    """Times of a product of so many rows over the dense product's, one for every shape."""
    asked = {"format": fmt, "implementation": implementation, "rows": rows}
    return [1 / row["speedup"] for row in read_rows(RESULTS / "kernels" / ROWS) if asked.items() <= row.items()]


# --- trainings ------------------------------------------------------------------------------------------------------------


def trained(treatment: str, bits: int | None = None, corpus: str = "python-docs", model: str = BUNDLED) -> dict:
    """A row of a model that was rounded to so many bits, or not, and trained."""
    found = [
        row
        for row in read_rows(RESULTS / "training" / ROWS)
        if (row["treatment"], row["corpus"], row["model"]) == (treatment, corpus, model)
        and (bits is None or f":int{bits}-" in row["model_recipe"])
    ]
    assert len(found) == 1, f"{len(found)} rows of {treatment}, {bits} bits, {corpus}, {model}"
    return found[0]


WIDER = "QLoRA, rank 64"  # and without the Q, of what SmolLM2 is trained with once more


def tuned(treatment: str, model: str = BUNDLED) -> float:
    """Perplexity of a model on Shakespeare."""
    return trained(treatment, corpus="tinyshakespeare", model=model)["perplexity"]


def apart(treatment: str, other: str, model: str) -> tuple[float, float, bool]:
    """How much larger the perplexity on Shakespeare is after one training than another, %, its standard error, and whether
    the 95 % interval holds zero.
    """
    ours, theirs = (trained(each, corpus="tinyshakespeare", model=model) for each in (treatment, other))
    found = aggregate_draws(np.array([loss_change(ours, theirs)]), np.array(ours["window_tokens"]), documents_of(ours)).change
    return 100 * math.expm1(found.value), 100 * math.exp(found.value) * found.stderr, found.low <= 0 <= found.high


def recovered(treatment: str, bits: int) -> float:
    """What training took back of what rounding added to the perplexity, %."""
    before, rounded, after = (trained(*which)["perplexity"] for which in (("none",), ("rounded", bits), (treatment, bits)))
    return 100 * (rounded - after) / (rounded - before)
