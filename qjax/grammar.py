"""The words of a recipe, and which of them are known: all that can be said of one without the methods themselves, or JAX.

`recipe.py` makes a Recipe of them, `methods.py` says what a method is. Commands ask here first, so that a mistake in a name is
answered at once.
"""

import difflib
import re
from collections.abc import Callable, Collection
from typing import NamedTuple, TypeVar

from qjax.errors import QjaxError
from qjax.formats import UNQUANTIZED, Format, parse_format, suggestion

T = TypeVar("T")

METHODS: dict[str, dict[str, str | Callable]] = {
    "transform": {"awq": "qjax.transforms.awq:awq_scale"},
    "rounding": {"rtn": "qjax.rounding.nearest:rtn", "gptq": "qjax.rounding.gptq:gptq", "hqq": "qjax.rounding.hqq:hqq"},
    "refiner": {"descend": "qjax.refining.descend:descend"},
    "block refiner": {},
    "order": {name: f"qjax.calibrate.order:{name}" for name in ("parallel", "block", "sequential", "qep")},
}
FIRST = {"transform": 0, "rounding": 1, "refiner": 2, "block refiner": 3}  # the order of kinds in a recipe


class Words(NamedTuple):
    """A recipe taken apart. stages: names with options as they are written; activation, order: None where there is none."""

    stages: list[tuple[str, dict[str, str]]]
    format: Format
    activation: str | None
    order: str | None

    def __str__(self) -> str:
        if self.format.is_float:
            return str(self.format)
        activation = "" if self.activation is None else f"/{self.activation}"
        return f"{'+'.join(name for name, _ in self.stages)}:{self.format}{activation}"


def kind_of(name: str) -> str | None:
    """The kind of a registered method; None for a name that is none."""
    return next((kind for kind, methods in METHODS.items() if name in methods), None)


def names(*kinds: str) -> tuple[str, ...]:
    """Registered methods of these kinds, in the table's order."""
    return tuple(name for kind in kinds for name in METHODS[kind])


def split_recipe(text: str) -> Words:
    """The words of a recipe but "none". Raises QjaxError for unknown ones and for a format that is none."""
    text = text.strip()
    where = f"recipe {text!r}"
    body, at, order = text.partition("@")
    *head, formats = re.split(r":(?![^(]*\))", body)
    if len(head) > 1:
        raise QjaxError(f"{where}: expected METHODS:FORMAT, got {len(head)} colons")
    if not head and kind_of(_known(re.split(r"[(\-+:/]", formats)[0], names(*FIRST))) in FIRST:
        raise QjaxError(f"{where}: a method needs a format, for example {formats}:int4-g128")
    stages = split_stages(where, head[0]) if head else [("rtn", {})]
    weights, slash, activation = formats.partition("/")
    try:
        fmt = parse_format(weights)
    except QjaxError as error:
        raise QjaxError(f"{where}: {error}") from None
    return Words(stages, fmt, activation if slash else None, order if at else None)


def split_stages(where: str, text: str) -> list[tuple[str, dict[str, str]]]:
    """Methods between plus signs, with their options."""
    return [split_stage(where, part, names(*FIRST), "method") for part in re.split(r"\+(?![^(]*\))", text)]


def _known(name: str, known: Collection[str]) -> str:
    """A name as it is, or in small letters where it is known so alone."""
    return name.lower() if name not in known and name.lower() in known else name


def split_stage(where: str, text: str, known: Collection[str], what: str) -> tuple[str, dict[str, str]]:
    """A stage's name, which must be known, and its options as they are written."""
    match = re.fullmatch(r"\s*([A-Za-z_]\w*)\s*(?:\((.*)\))?\s*", text)
    name = _known(match.group(1), known) if match else text
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise QjaxError(f"{where}: unknown {what} {name!r}; {hint}allowed: {', '.join(known)}")
    options = {}
    for item in filter(None, (match.group(2) or "").split(",")):
        key, equals, value = (part.strip() for part in item.partition("="))
        if key in options:
            raise QjaxError(f"{where}: {name}({key}=...) is given twice; give it once")
        options[key if equals else item] = value if equals else ""
    return name, options


def split_rule(text: str) -> tuple[str, str]:
    """Pattern and recipe of a rule; raises QjaxError for a missing part and a bad pattern."""
    pattern, equals, recipe = text.partition("=")
    if not equals or not pattern or not recipe:
        raise QjaxError(f"rule {text!r}: expected PATTERN=RECIPE, for example 'mlp/down=rtn:int8-g128'")
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        hint = ", in which any text is '.*'" if "*" in pattern else ""
        raise QjaxError(f"rule {text!r}: {pattern!r} is not a regular expression{hint}: {error}") from None
    return pattern, recipe


def answered(text: str, parse: Callable[[str], T]) -> T:
    """parse(text). Raises what it raises, or QjaxError with the recipe that was probably meant."""
    try:
        return parse(text)
    except QjaxError:
        if found := suggestion(text, parse, names(*FIRST)):
            raise QjaxError(f"recipe {text!r}: {found}") from None
        raise


def require_words(recipe: str) -> None:
    """Raises QjaxError for a recipe of unknown words."""
    if recipe.strip().lower() != UNQUANTIZED:
        answered(recipe.strip(), split_recipe)
