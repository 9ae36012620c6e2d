"""The cells of a sweep: from methods x bits x groups to recipe strings, and from recipe strings to canonical recipes."""

import re
from collections.abc import Iterable, Sequence

from qjax.errors import QjaxError
from qjax.formats import ALIASES, FLOATS, GRIDS, INTEGERS
from qjax.recipe import DEFAULT_ORDER, UNQUANTIZED, Recipe, Stage, parse_order, parse_recipe

BITS = (8, 4, 3, 2)
ZEROS = {"hqq": "z16"}  # how zero points are stored for roundings that take real ones alone


def expand(methods: Iterable[str], bits: Sequence[int] = BITS, group: str | None = None, order: str | None = None) -> list[str]:
    """Canonical recipes of every method at every number of bits.

    A method is a recipe without its format ("rtn", "rtn(clip=mse)", "awq+gptq@qep") and becomes METHOD:intB-gGROUP@ORDER for
    each B (hqq, which takes real zero points alone, intB-gGROUP-z16); or a codebook grid ("nf4", "nf4-dq", "fp8_e4m3"), which
    appears once and must be among the bits; or a cast ("bf16") or "none", which appear always. group: a size, "channel" (or
    "-1") or "tensor"; None is 128 for integers and the codebook's own default, and formats that say theirs ("mxfp4") keep it.
    """
    unknown = [b for b in bits if b not in INTEGERS.values()]
    if unknown:
        raise QjaxError(f"bits {', '.join(map(str, unknown))}: allowed are {', '.join(map(str, INTEGERS.values()))}")
    sharing = _sharing(group)
    recipes = []
    for method in methods:
        head, *parts = method.lower().split("-")
        grid, *implied = ALIASES.get(head, head).split("-")
        if grid in FLOATS or grid == UNQUANTIZED:
            recipes.append(method)
        elif grid in GRIDS:
            if GRIDS[grid] not in bits:
                asked = ",".join(map(str, bits))
                raise QjaxError(f"method {method!r} has {GRIDS[grid]} bits, but the bits asked for are {asked}; leave it out")
            recipes.append(method if implied else "-".join([grid, *([sharing] if sharing else []), *parts]))
        else:
            stages, at, own_order = method.partition("@")
            zeros = [
                f"-{ZEROS[name]}" for name in (part.partition("(")[0].lower() for part in stages.split("+")) if name in ZEROS
            ]
            recipes += [f"{stages}:int{b}-{sharing or 'g128'}{''.join(zeros)}{at}{own_order}" for b in bits]
    return canonical(recipes, order)


def _sharing(group: str | None) -> str | None:
    """Who shares a scale, as formats say it; -1 is a whole channel, as in GPTQ's and AWQ's configurations."""
    if group is None:
        return None
    word = group.strip().lower()
    found = "channel" if word == "-1" else f"g{word}" if word.isdecimal() else word
    if not re.fullmatch(r"channel|tensor|[gb][1-9]\d*", found):
        raise QjaxError(f"group {group!r}: expected a number of weights, channel (or -1) or tensor")
    return found


def canonical(recipes: Iterable[str], order: str | None = None) -> list[str]:
    """Canonical names in order, each once; every recipe is checked before anything is computed.

    order: of calibration, for recipes that read data and name none. Its names, given with the same order, are the same again.
    """
    names = [name_in_order(parse_recipe(recipe), order) for recipe in recipes]
    if not names:
        raise QjaxError("no recipes given; name at least one, for example rtn:int4-g128")
    return list(dict.fromkeys(names))


def name_in_order(recipe: Recipe | None, order: str | None) -> str:
    """The recipe's name in an order of calibration, for recipes that read data and name none; the default order is left out
    only where another would not be read in its place.
    """
    if recipe is None:
        return UNQUANTIZED
    if recipe.cache is not None:
        weights = "" if recipe.of_weights is None else name_in_order(recipe.of_weights, order)
        return f"{weights} kv:{recipe.cache}".strip()
    default, order = Stage(DEFAULT_ORDER), None if order is None else parse_order(order)
    kept = f"@{default}" if recipe.order == default and order not in (None, default) else ""
    return f"{recipe.in_order(order)}{kept}"
