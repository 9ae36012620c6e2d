"""Placement: which kernels get which recipe, by path, strictly.

A rule is "PATTERN=RECIPE": a regular expression searched in a kernel's path ("block_3/mlp/down/kernel",
"head/output/kernel") and a recipe, or "none" to leave the kernel as it is. The first rule that matches decides; where
none does, the default decides. A rule that matches nothing is an error, and so is one that matches only leaves that
cannot be quantized: nothing is skipped silently.
"""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from qjax.errors import QjaxError
from qjax.recipe import UNQUANTIZED, Recipe, parse_recipe


class Rule(NamedTuple):
    """A path pattern and what its kernels get; recipe None leaves them as they are."""

    pattern: str
    recipe: Recipe | None

    def __str__(self) -> str:
        return f"{self.pattern}={self.recipe or UNQUANTIZED}"


def parse_rule(text: str) -> Rule:
    """The rule "PATTERN=RECIPE"; raises QjaxError for a missing part, a bad pattern or a bad recipe."""
    pattern, equals, recipe = text.partition("=")
    if not equals or not pattern or not recipe:
        raise QjaxError(f"rule {text!r}: expected PATTERN=RECIPE, for example 'mlp/down=rtn:int8-g128'")
    try:
        re.compile(pattern)
    except re.error as error:
        raise QjaxError(f"rule {text!r}: {pattern!r} is not a regular expression: {error}") from None
    return Rule(pattern, parse_recipe(recipe))


def place(
    kernels: Sequence[str], default: Recipe | None, rules: Iterable[Rule] = (), scope: Sequence[str] | None = None
) -> dict[str, Recipe | None]:
    """What each kernel path gets: the first matching rule's recipe, else `default` for paths in `scope` (None: all).

    Raises QjaxError listing every rule that matches no kernel.
    """
    rules = tuple(rules)
    idle = [str(rule) for rule in rules if not any(re.search(rule.pattern, path) for path in kernels)]
    if idle:
        raise QjaxError(
            f"{'rules' if len(idle) > 1 else 'rule'} {', '.join(map(repr, idle))} match no kernel; "
            f"the kernels are {_abridge(kernels)}"
        )
    placed = {}
    for path in kernels:
        default_here = default if scope is None or path in scope else None
        placed[path] = next((rule.recipe for rule in rules if re.search(rule.pattern, path)), default_here)
    return placed


def _abridge(paths: Sequence[str], most: int = 10) -> str:
    shown = ", ".join(paths[:most])
    return shown if len(paths) <= most else f"{shown}, ... ({len(paths)} in all)"
