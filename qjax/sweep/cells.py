"""The cells of a sweep: from recipe strings to canonical recipes."""

from collections.abc import Iterable, Sequence

from qjax.errors import QjaxError
from qjax.recipe import DEFAULT_ORDER, UNQUANTIZED, Recipe, Stage, parse_order, parse_recipe
from qjax.sweep.crossed import BITS, crossed


def expand(methods: Iterable[str], bits: Sequence[int] = BITS, group: str | None = None, order: str | None = None) -> list[str]:
    """Canonical recipes of every method at every number of bits, see `crossed`, in an order of calibration, see `canonical`."""
    return canonical(crossed(methods, bits, group), order)


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
