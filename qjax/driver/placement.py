"""Placement: which kernels get which recipe, by path, strictly.

A rule is "PATTERN=RECIPE": a regular expression searched in a kernel's path ("block_3/mlp/down/kernel",
"head/output/kernel") and a recipe, or "none" to leave the kernel as it is. Hugging Face's names of modules ("down_proj") mean
the kernels that are stored there (`patterns.py`). The first rule that matches decides; where
none does, the default decides. A rule that matches nothing is an error, and so is one that matches only leaves that
cannot be quantized: nothing is skipped silently.

A decoder's table of embeddings is no kernel, and stays as it is unless a pattern names it, with "embed" in it or as Hugging
Face does: "embed=rtn:int8-g64", by a rounding that reads no data. A tied head multiplies with what its codes stand for, unless
a rotation gives it weights of its own.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from flax.traverse_util import flatten_dict

from qjax.cache_format import require_fit
from qjax.driver import patterns
from qjax.errors import QjaxError
from qjax.grammar import split_rule
from qjax.linear import is_quantized
from qjax.methods import UNQUANTIZED, Stage
from qjax.models import walk
from qjax.models.config import DecoderConfig
from qjax.models.families import module_names
from qjax.models.model import Model
from qjax.models.rotation import rotated_config
from qjax.recipe import DEFAULT_ORDER, Recipe, parse_order, parse_recipe

Plan = Mapping[str, Recipe | None]  # what each kernel, and the table where a rule names it, gets, by path


class Rule(NamedTuple):
    """A path pattern and what its kernels get; recipe None leaves them as they are."""

    pattern: str
    recipe: Recipe | None

    def __str__(self) -> str:
        return f"{self.pattern}={self.recipe or UNQUANTIZED}"


def parse_rule(text: str) -> Rule:
    """The rule "PATTERN=RECIPE"; raises QjaxError for a missing part, a bad pattern or a bad recipe."""
    pattern, recipe = split_rule(text)
    return Rule(pattern, parse_recipe(recipe))


def place(
    kernels: Sequence[str],
    default: Recipe | None,
    rules: Iterable[Rule] = (),
    scope: Sequence[str] | None = None,
    theirs: Mapping[str, str] = patterns.NO_NAMES,
) -> dict[str, Recipe | None]:
    """What each kernel path gets: the first matching rule's recipe, else `default` for paths in `scope` (None: all).

    theirs: Hugging Face's name of each path's module. Raises QjaxError listing every rule that matches no kernel, and for a
    cache format, which is no kernel's.
    """
    if default is not None and default.cache is not None:
        raise QjaxError(f"{default}: a module or function of your own has no cache that is known here; leave kv: out")
    rules = [rule._replace(pattern=patterns.meant(rule.pattern, kernels, theirs)) for rule in rules]
    idle = [rule for rule in rules if not any(re.search(rule.pattern, path) for path in kernels)]
    if idle:
        many = len(idle) > 1
        raise QjaxError(
            f"{'rules' if many else 'rule'} {', '.join(repr(str(rule)) for rule in idle)} {'match' if many else 'matches'} no "
            f"kernel{patterns.nothing_found([rule.pattern for rule in idle], kernels, theirs)}; the kernels are "
            f"{abridge(kernels)}"
        )
    placed = {}
    for path in kernels:
        default_here = default if scope is None or path in scope else None
        placed[path] = next((rule.recipe for rule in rules if re.search(rule.pattern, path)), default_here)
    return placed


def abridge(paths: Sequence[str], most: int = 10) -> str:
    """Some of many paths, for messages."""
    shown = ", ".join(paths[:most])
    return shown if len(paths) <= most else f"{shown}, ... ({len(paths)} in all)"


def parsed(
    recipe: str | Recipe | None, rules: Iterable[str | Rule], order: str | None
) -> tuple[Recipe | None, tuple[Rule, ...]]:
    """A recipe and rules, given as strings or values, in an order of calibration where they name none."""
    order = parse_order(order) if isinstance(order, str) else order
    recipe = parse_recipe(recipe) if isinstance(recipe, str) else recipe
    rules = (rules,) if isinstance(rules, str) else rules
    rules = [parse_rule(rule) if isinstance(rule, str) else rule for rule in rules]
    if kept := [str(rule) for rule in rules if rule.recipe is not None and rule.recipe.cache is not None]:
        raise QjaxError(
            f"rule {kept[0]!r}: a rule is about kernels, and kv: about the cache of the whole model; say it in the recipe, "
            "which may be kv:FORMAT alone"
        )
    return recipe and recipe.in_order(order), tuple(
        rule._replace(recipe=rule.recipe and rule.recipe.in_order(order)) for rule in rules
    )


def kernels_of(model: Model) -> list[str]:
    """Paths of a model's linear kernels."""
    return [path for path in flatten_dict(model.params, sep="/") if path.endswith("/kernel")]


def in_our_words(model: Model, rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """The rules with the pattern that they are known by: Hugging Face's names by our paths (`patterns.meant`), and the table of
    embeddings, where a pattern names it, as "embed".
    """
    kernels, family = kernels_of(model), model.config.family
    theirs, table = module_names(family, kernels), module_names(family, [walk.TABLE]).get(walk.TABLE)
    return tuple(rule._replace(pattern=patterns.meant_with_table(rule.pattern, kernels, theirs, table)) for rule in rules)


def _of_table(rules: Sequence[Rule]) -> Rule | None:
    """The first of the rules, in our words, that names the table. Raises QjaxError for a recipe that it cannot have."""
    naming = [rule for rule in rules if patterns.names_table(rule.pattern)]
    for recipe in (rule.recipe for rule in naming if rule.recipe):
        if recipe.reads_data or recipe.transforms or recipe.activation:
            raise QjaxError(
                f"{recipe}: a table of embeddings is looked up, so that it has no inputs to calibrate on, to map or to round; "
                f"take a rounding that reads no data, as embed=rtn:{recipe.format}"
            )
    return naming[0] if naming else None


def placement(model: Model, recipe: str | Recipe | None, rules: Iterable[str | Rule] = ()) -> dict[str, Recipe | None]:
    """What `quantize` would do to every linear kernel, and to the table of embeddings where a rule names it, by path; None
    leaves it. Reads shapes alone. Raises what `quantize`
    raises.
    """
    recipe, rules = parsed(recipe, rules, None)
    with_cache(model, recipe)
    if rotation_of(recipe, rules) is not None:
        rotated_config(model.config)
    recipe = recipe and recipe.of_weights
    flat = flatten_dict(model.params, sep="/")
    kernels = kernels_of(model)
    rules = in_our_words(model, rules)
    of_table = _of_table(rules)
    rules = [rule for rule in rules if rule.pattern != patterns.EMBED]  # which no kernel's path holds
    everywhere = recipe is not None and recipe.is_cast
    scope = kernels if everywhere else list(filter(walk.in_blocks, kernels))
    placed = place(kernels, recipe, rules, scope, module_names(model.config.family, kernels))
    if of_table:
        placed = {walk.TABLE: of_table.recipe, **placed}
    again = [path for path, chosen in placed.items() if chosen is not None and is_quantized(flat[path])]
    if again:
        raise QjaxError(
            f"{model.name} is quantized already ({model.recipe}): {abridge(again)}; start from the unquantized model "
            "(`qjax dequantize` writes one of the values that this stands for), or leave "
            "these kernels as they are with a rule 'PATTERN=none'"
        )
    fixed = [path for path, chosen in placed.items() if chosen and chosen.activation and chosen.activation.fixed]
    if fixed := [path for path in fixed if len(flat[path].shape) > 2]:
        raise QjaxError(
            f"llm_int8(outliers=calibration): {abridge(fixed)} hold experts, each with outliers of its own, whose rows do not "
            "stack; take llm_int8, which finds them in every call, or another recipe for these kernels with a rule"
        )
    return placed


def with_cache(model: Model, recipe: Recipe | None) -> DecoderConfig:
    """The model's configuration with the recipe's cache format, where it names one: of rotated keys where the recipe rotates
    the model. Raises QjaxError for one that does not fit, and a model that has one.
    """
    config = model.config
    if recipe is None or recipe.cache is None:
        return config
    cache = recipe.cache
    if rotation_of(recipe) is not None and cache.keys == "after":
        cache = dataclasses.replace(cache, hadamard=True)
    require_fit(cache, config.head_dim)
    if config.cache_format is not None:
        raise QjaxError(
            f"{model.name} keeps its cache in kv:{config.cache_format} already; start from the model without, or leave kv: out"
        )
    return dataclasses.replace(config, cache_format=str(cache))


def rotation_of(recipe: Recipe | None, rules: Iterable[Rule] = ()) -> int | None:
    """The seed of the residual stream's rotation, where recipe or rules ask for one. Raises QjaxError for several."""
    stages = [stage for each in (recipe, *(rule.recipe for rule in rules)) if each for stage in each.transforms]
    chosen = [stage.chosen for stage in stages if stage.name == "hadamard"]
    seeds = {options["seed"] for options in chosen if not options["block"] and not options["online"]}
    if len(seeds) > 1:
        raise QjaxError(f"hadamard: recipe and rules have the seeds {', '.join(map(str, sorted(seeds)))}; one model has one")
    return seeds.pop() if seeds else None


def without_cache(config: DecoderConfig) -> DecoderConfig:
    """The configuration as calibration has it, which sees keys and values as they are."""
    return config if config.cache_format is None else dataclasses.replace(config, cache_format=None)


def one_order(plan: Plan) -> Stage | None:
    """The order in which a plan reads calibration data; None where it reads none. Raises QjaxError for several."""
    orders = {recipe.order or Stage(DEFAULT_ORDER) for recipe in plan.values() if recipe and recipe.reads_data}
    if len(orders) > 1:
        raise QjaxError(f"rules and recipe ask for the orders {', '.join(sorted(map(str, orders)))}; one run has one order")
    return orders.pop() if orders else None


def calibration_order(model: Model, recipe: str | Recipe | None, rules: Iterable[str | Rule] = ()) -> Stage | None:
    """The order in which `quantize` would read calibration data; None when it would read none. Raises what `quantize`
    raises.
    """
    return one_order(placement(model, recipe, rules))
