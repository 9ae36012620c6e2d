"""The words of a recipe, and which of them are known: all that can be said of one without the methods themselves, or JAX.

`recipe.py` makes a Recipe of them, `methods.py` says what a method is. Commands ask here first, so that a mistake in a name or
an option is answered at once.
"""

import ast
import difflib
import functools
import importlib.util
import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple, TypeVar

from qjax.cache_format import CacheFormat, parse_cache_format
from qjax.errors import QjaxError
from qjax.formats import UNQUANTIZED, Format, parse_format, suggestion

T = TypeVar("T")

METHODS: dict[str, dict[str, str | Callable]] = {
    "transform": {
        "awq": "qjax.transforms.awq:awq_scale",
        "smoothquant": "qjax.transforms.smoothquant:smoothquant",
        "hadamard": "qjax.transforms.hadamard:hadamard",
    },
    "rounding": {"rtn": "qjax.rounding.nearest:rtn", "gptq": "qjax.rounding.gptq:gptq", "hqq": "qjax.rounding.hqq:hqq"},
    "refiner": {"descend": "qjax.refining.descend:descend"},
    "block refiner": {"block_ap": "qjax.refining.block_ap:block_ap"},
    "activation": {"llm_int8": "qjax.activations:llm_int8"},
    "order": {name: f"qjax.calibrate.order:{name}" for name in ("parallel", "block", "sequential", "qep")},
}
SPELLED = {kind.__name__: kind for kind in (bool, int, float, str)}  # types of options
FIRST = {"transform": 0, "rounding": 1, "refiner": 2, "block refiner": 3, "activation": 4}  # the order of kinds in a recipe


class Words(NamedTuple):
    """A recipe taken apart. stages: names with options as they are written; format: None for weights as they are; activation,
    order, cache: None where there is none.
    """

    stages: list[tuple[str, dict[str, str]]]
    format: Format | None
    activation: str | None
    order: str | None
    cache: CacheFormat | None = None

    def __str__(self) -> str:
        cache = "" if self.cache is None else f"kv:{self.cache}"
        if self.format is None:
            return cache
        activation = "" if self.activation is None else f"/{self.activation}"
        stages = "" if self.format.is_float else f"{'+'.join(name for name, _ in self.stages)}:"
        return f"{stages}{self.format}{activation} {cache}".strip()


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
    text, cache = split_cache(text)
    if cache is not None and text.lower() in ("", UNQUANTIZED):
        return Words([("rtn", {})], None, None, None, cache)
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
    return Words(stages, fmt, activation if slash else None, order if at else None, cache)


def split_cache(text: str) -> tuple[str, CacheFormat | None]:
    """A recipe without its last part, kv:FORMAT behind a blank or alone, and that format; None where there is none."""
    found = re.search(r"(?:^|\s)\s*kv:(.*)$", text, re.IGNORECASE | re.DOTALL)
    if found is None:
        return text, None
    try:
        return text[: found.start()].strip(), parse_cache_format(found[1])
    except QjaxError as error:
        raise QjaxError(f"recipe {text!r}: {error}") from None


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


def read_stages(
    where: str, written: Sequence[tuple[str, dict[str, str]]], options_of: Callable[[str], Mapping[str, inspect.Parameter]]
) -> list[tuple[str, tuple[tuple[str, object], ...]]]:
    """Names of stages with the options that differ from their defaults, sorted by name.

    options_of: a method's options. Raises QjaxError for unknown ones and values of another type.
    """
    stages = []
    for name, given in written:
        options = dict(given)
        if name == "gptq" and "block" in options:  # as it was once called
            options["panel"] = options.pop("block")
        sweeps = options.pop("refine", "0") if name == "gptq" else "0"
        if not sweeps.isdecimal():
            raise QjaxError(f"{where}: gptq(refine=...) expects a number of sweeps, 0 for none, got {sweeps!r}")
        stages.append((name, _read_options(where, name, options, options_of(name))))
        if int(sweeps):  # as gptq(refine=4) was once spelled
            shared = {option: options[option] for option in ("damp", "panel") if option in options}
            stages.append(("descend", _read_options(where, "descend", {"sweeps": sweeps, **shared}, options_of("descend"))))
    return stages


def _read_options(
    where: str, name: str, given: Mapping[str, str], allowed: Mapping[str, inspect.Parameter]
) -> tuple[tuple[str, object], ...]:
    options = {}
    for key, value in given.items():
        if key not in allowed:
            defaults = ", ".join(f"{option}={show(allowed[option].default)}" for option in allowed) or "none"
            item = f"{key}={value}" if value else key
            raise QjaxError(f"{where}: {name} has no option {item.strip()!r}; allowed, with defaults: {defaults}")
        options[key] = _convert(where, name, allowed[key], value)
    return tuple(sorted((key, value) for key, value in options.items() if value != allowed[key].default))


def _convert(where: str, name: str, option: inspect.Parameter, text: str) -> object:
    kind, optional = option.annotation, types.NoneType in typing.get_args(option.annotation)
    if optional:
        (kind,) = (part for part in typing.get_args(kind) if part is not types.NoneType)
        if text.lower() == "none":
            return None
    choices = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()
    kind = type(choices[0]) if choices else kind
    try:
        value = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
        if kind is float and not math.isfinite(value):
            raise ValueError
    except (ValueError, KeyError):
        expected = f"{'a finite ' if kind is float else ''}{kind.__name__}{' or none' if optional else ''}"
        raise QjaxError(f"{where}: {name}({option.name}=...) expects {expected}, got {text!r}") from None
    if choices and value not in choices:
        raise QjaxError(f"{where}: {name}({option.name}=...) is one of {', '.join(map(str, choices))}, got {text!r}")
    return value


def show(value: object) -> str:
    """An option's value as a recipe spells it."""
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


@functools.cache
def options_in_source(name: str) -> dict[str, inspect.Parameter]:
    """A method's options as its source spells them, nothing of which is run: the keyword-only arguments of a type that a recipe
    can spell.
    """
    module, function = METHODS[kind_of(name)][name].split(":")
    (found,) = (node.args for node in _source(module) if isinstance(node, ast.FunctionDef) and node.name == function)
    options = {}
    for argument, written in zip(found.kwonlyargs, found.kw_defaults, strict=True):
        kind, default = ast.unparse(argument.annotation), written and ast.literal_eval(written)
        of = SPELLED.get(kind.removesuffix(" | None")) or (_choices(module, kind) if isinstance(default, str) else None)
        if of is not None and written is not None:
            kind = of | None if kind.endswith(" | None") else of
            options[argument.arg] = inspect.Parameter(
                argument.arg, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind
            )
    return options


def _source(module: str) -> list[ast.stmt]:
    return ast.parse(importlib.util.find_spec(module).loader.get_source(module)).body


def _choices(module: str, name: str) -> object:
    """The Literal that is written out, or has a name that a module assigns to or imports; str for what is none."""
    if isinstance(written := ast.parse(name, mode="eval").body, ast.Subscript):
        return typing.Literal[ast.literal_eval(written.slice)]
    for node in _source(module):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name and isinstance(node.value, ast.Subscript):
            return typing.Literal[ast.literal_eval(node.value.slice)]
        if isinstance(node, ast.ImportFrom) and name in (each.name for each in node.names):
            return _choices(node.module, name)
    return str


def _options(name: str) -> Mapping[str, inspect.Parameter]:
    """Of a method from outside the package, those of the function."""
    function = METHODS[kind_of(name)][name]
    if isinstance(function, str):
        return options_in_source(name)
    parameters = inspect.signature(function, eval_str=True).parameters.values()
    return {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY and is_readable(p.annotation)}


def is_readable(annotation: object) -> bool:
    """Whether a recipe can spell values of a type."""
    parts = [part for part in typing.get_args(annotation) if part is not types.NoneType]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return len(parts) == 1 and is_readable(parts[0])
    return annotation in (bool, int, float, str) or typing.get_origin(annotation) is typing.Literal


def split_rule(text: str) -> tuple[str, str]:
    """Pattern and recipe of a rule; raises QjaxError for a missing part and a bad pattern."""
    pattern, equals, recipe = text.partition("=")
    if not equals or not pattern or not recipe:
        raise QjaxError(f"rule {text!r}: expected PATTERN=RECIPE, for example 'mlp/down=rtn:int8-g128'")
    require_pattern(f"rule {text!r}", pattern)
    return pattern, recipe


def require_pattern(where: str, pattern: str) -> None:
    """Raises QjaxError, which begins with `where`, for what is no regular expression, or may take long to match."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        hint = ", in which any text is '.*'" if "*" in pattern else ""
        raise QjaxError(f"{where}: {pattern!r} is not a regular expression{hint}: {error}") from None
    if _repeats_repeats(pattern):
        raise QjaxError(f"{where}: {pattern!r} repeats what has repeats in it, which may take long; write it without")


def _repeats_repeats(pattern: str) -> bool:
    """Whether a group that holds a repeat is itself repeated: matching may then take time that doubles with every letter."""
    bare, holds = re.sub(r"\\.|\[[^]]*]", "x", pattern), [False]  # of each open group
    for number, letter in enumerate(bare):
        if letter == "(":
            holds.append(False)
        elif letter == ")" and len(holds) > 1:
            repeated, inside = bare[number + 1 : number + 2] in ("*", "+", "{"), holds.pop()
            if repeated and inside:
                return True
            holds[-1] |= inside
        elif letter in "*+{":
            holds[-1] = True
    return False


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
        answered(recipe.strip(), _check_recipe)


def _check_recipe(text: str) -> str:
    where, words = f"recipe {text!r}", split_recipe(text)
    read_stages(where, words.stages, _options)
    if words.order is not None:
        require_order(where, words.order)
    return text


def require_method(text: str) -> None:
    """Raises QjaxError for a recipe without its format that has unknown words, or the recipe that was probably meant."""
    where, (stages, at, order) = f"method {text!r}", text.partition("@")
    if re.search(r":(?![^(]*\))", stages):
        raise QjaxError(f"{where}: a method has no format, a recipe (--recipes) has; give {stages.partition(':')[0]!r}")
    try:
        read_stages(where, split_stages(where, stages), _options)
    except QjaxError:
        if found := suggestion(stages, _check_recipe, names(*FIRST)):
            raise QjaxError(f"{where}: a method has no format, a recipe (--recipes) has; {found}") from None
        raise
    if at:
        require_order(where, order)


def require_order(where: str, text: str) -> None:
    """Raises QjaxError, which begins with `where`, for an order of unknown words."""
    read_stages(where, [split_stage(where, text, names("order"), "order of calibration")], _options)
