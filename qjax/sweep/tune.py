"""Accuracy-driven tuning: recipes from the cheapest to the dearest, until one costs no more than a bound.

    accept the first recipe whose loss L against the model as it is has an interval that ends within the bound:  L_high <= bound

which a loss that only seems small never has. What Intel Neural Compressor's `autotune` does with point values and in the
user's order; here the order is by exact bytes, then by bits of the inputs, then as recipes are given.

    of           loss                                   bound
    perplexity   perplexity / that of the model - 1     1 %, or a number: of perplexity itself
    kl           mean KL divergence from the model      a number of nats
    TASK         accuracy lost / accuracy of the model  1 %, or a number: a share of the questions
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from qjax.errors import QjaxError
from qjax.evaluate.statistics import interval
from qjax.sweep.columns import Row

if TYPE_CHECKING:
    from qjax.models.model import Model

INT8 = "int8-channel-sym-max"
HUGE = 700.0  # nats, of which `expm1` is a number still
LISTS = {
    "int8": (  # static, dynamic, smoothed, mixed, weights alone: what Neural Compressor tries for INT8
        f"rtn:{INT8}/int8-tensor@parallel",
        f"rtn:{INT8}/int8-token",
        f"smoothquant+rtn:{INT8}/int8-tensor@parallel",
        f"smoothquant+rtn:{INT8}/int8-token@parallel",
        f"smoothquant(search=true)+rtn:{INT8}/int8-token@parallel",
        f"llm_int8:{INT8}",
        f"rtn:{INT8}",
    ),
    "int4": ("rtn:int4-g128", "gptq:int4-g128", "awq+gptq:int4-g128", "gptq:int4-g32", f"rtn:{INT8}"),
}


class Bound(NamedTuple):
    """The largest loss; relative: a share of what the model as it is has."""

    value: float
    relative: bool

    def __str__(self) -> str:
        return f"{100 * self.value:g}%" if self.relative else f"{self.value:g}"


class Loss(NamedTuple):
    """A loss with the ends of its 95 % interval; nan where nothing is known of them."""

    value: float
    low: float
    high: float


class Trial(NamedTuple):
    """A recipe that was measured."""

    recipe: str
    loss: Loss
    accepted: bool


class Tuned(NamedTuple):
    """What was tried, in order; the recipe that was accepted, or None, and the one that came nearest."""

    trials: tuple[Trial, ...]
    accepted: str | None
    nearest: str


def parse_bound(text: str, of: str) -> Bound:
    """The bound named "1%" or "0.02"; raises QjaxError for what is none above 0, and a share of a divergence."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?(?:[eE]-?\d+)?)\s*(%?)\s*", text)
    if not found or not 0 < float(found[1]) < math.inf:
        raise QjaxError(f"--within {text!r}: expected a share as 1%, or a number as 0.02, above 0")
    if found[2] and of == "kl":
        raise QjaxError(f"--within {text} --of kl: a divergence is 0 for the model as it is; give a number of nats, as 0.01")
    return Bound(float(found[1]) / (100 if found[2] else 1), bool(found[2]))


def named_recipes(names: Sequence[str]) -> list[str]:
    """The recipes of ready-made lists (`LISTS`) and those named one by one, each once."""
    return list(dict.fromkeys(recipe for name in names for recipe in LISTS.get(name, (name,))))


def holds(loss: Loss, bound: Bound) -> bool:
    """Whether the whole interval of a loss is within the bound."""
    return math.isfinite(loss.high) and max(loss.value, loss.high) <= bound.value


def tune(recipes: Sequence[str], measure: Callable[[str], Loss], bound: Bound) -> Tuned:
    """Measures recipes, the cheapest first, until the loss of one holds."""
    if not recipes:
        raise QjaxError("tune: no recipes; name some, or a list of " + ", ".join(LISTS))
    trials: list[Trial] = []
    for recipe in recipes:
        loss = measure(recipe)
        trials.append(Trial(recipe, loss, holds(loss, bound)))
        if trials[-1].accepted:
            break
    nearest = min(trials, key=lambda trial: _rank(trial.loss)).recipe
    return Tuned(tuple(trials), trials[-1].recipe if trials[-1].accepted else None, nearest)


def _rank(loss: Loss) -> tuple[float, float]:
    return tuple(math.inf if math.isnan(value) else value for value in (loss.high, loss.value))


def loss_of(row: Row, before: Row, of: str, bound: Bound) -> Loss:
    """The loss that a row tells of, nan where it does not, in the bound's terms. before: the row of the model as it is."""
    if of == "perplexity":
        whole = 1.0 if bound.relative else _figure(before, "perplexity")
        return Loss(*(whole * math.expm1(min(_figure(row, f"nll_delta{end}"), HUGE)) for end in ("", "_low", "_high")))
    if of == "kl":
        documents = _figure(row, "documents")
        found = interval(_figure(row, "kl"), _figure(row, "kl_stderr"), max(documents - 1, 1))
        return Loss(found.value, found.low, found.high)
    whole = _figure(before, f"accuracy:{of}") if bound.relative else 1.0
    value, low, high = (-_figure(row, f"accuracy_delta{end}:{of}") for end in ("", "_high", "_low"))
    if not whole:
        raise QjaxError(f"tune: the model as it is answers no question of {of}; there is no share of that to lose")
    return Loss(value / whole, low / whole, high / whole)


def _figure(row: Row, name: str) -> float:
    value = row.get(name)
    return math.nan if value is None else float(value)


def by_cost(model: "Model", recipes: Sequence[str], rules: Sequence[str] = ()) -> list[str]:
    """Recipes from the cheapest to the dearest: exact bytes of what a recipe can change, of formats or as it is, then bits of
    inputs, then those of a token in the cache.
    """
    from flax.traverse_util import flatten_dict

    from qjax.driver.placement import placement, with_cache
    from qjax.models.walk import matrix_shape
    from qjax.recipe import parse_recipe

    leaves = flatten_dict(model.params, sep="/")

    def cost(recipe: str) -> tuple[float, ...]:
        size = inputs = 0
        for path, placed in placement(model, recipe, rules).items():
            shape, size_as_it_is = leaves[path].shape, leaves[path].nbytes
            in_format = placed and math.prod(shape[:-2]) * placed.format.nbytes(*matrix_shape(path, shape))
            size += size_as_it_is if in_format is None else in_format
            inputs += math.prod(shape) * (placed.activation.format.bits if placed and placed.activation else 16)
        return size, inputs, with_cache(model, parse_recipe(recipe)).cache_bytes[0]

    return sorted(recipes, key=cost)
