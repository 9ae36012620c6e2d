"""Methods x bits x groups as recipes: names alone, so that a mistake in one is told before JAX is imported."""

import re
from collections.abc import Iterable, Sequence

from qjax.errors import QjaxError
from qjax.formats import ALIASES, FLOATS, GRIDS, INTEGERS, UNQUANTIZED

BITS = (8, 4, 3, 2)
ZEROS = {"hqq": "z16"}  # how zero points are stored for roundings that take real ones alone


def crossed(methods: Iterable[str], bits: Sequence[int] = BITS, group: str | None = None) -> list[str]:
    """Recipes of every method at every number of bits.

    A method is a recipe without its format ("rtn", "rtn(clip=mse)", "awq+gptq@qep") and becomes METHOD:intB-gGROUP for each
    B (hqq, which takes real zero points alone, intB-gGROUP-z16); or a codebook grid ("nf4", "nf4-dq", "fp8_e4m3"), which
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
    return recipes


def _sharing(group: str | None) -> str | None:
    """Who shares a scale, as formats say it; -1 is a whole channel, as in GPTQ's and AWQ's configurations."""
    if group is None:
        return None
    word = group.strip().lower()
    found = "channel" if word == "-1" else f"g{word}" if word.isdecimal() else word
    if not re.fullmatch(r"channel|tensor|[gb][1-9]\d*", found):
        raise QjaxError(f"group {group!r}: expected a number of weights, channel (or -1) or tensor")
    return found
