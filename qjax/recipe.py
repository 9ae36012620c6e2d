"""Recipes: what is done to a weight, as a string and as a value, and the registry of methods.

    rtn:int4-g128                       rounding : format
    rtn(clip=mse):int3-g128             options in parentheses
    awq+gptq(damp=0.05):int3-g128       transforms + rounding : format
    awq:int4-g128                       a transform alone is followed by the rounding that belongs to it, here rtn(clip=hessian)
    gptq:int3-g128@sequential           @ order of calibration: whose inputs statistics are from (`calibrate/order.py`)
    nf4                                 a format alone is rounded to nearest
    bf16                                storage in another floating-point type, of the whole model
    none                                the model as it is

`str(recipe)` is canonical: options that are the default are dropped, so equal recipes have equal names.

A method is a function of a weight and a format; its keyword-only arguments are its options, of the annotated type: bool,
int, float, str or a Literal of choices, or one of these `| None`, where None is written none. Arguments named like a
statistic (`STATISTICS`) are filled from calibration instead; one with a default is asked for only by an option whose value is
its name, as clip=hessian. To add a method to the package write the function in a file of its own and a line in the registry
below; `register` adds one from outside.
"""

import dataclasses
import difflib
import functools
import importlib
import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Collection

from qjax.errors import QjaxError
from qjax.formats import ALIASES, GRIDS, Format, parse_format

STATISTICS = ("hessian", "abs_mean", "abs_max", "module")  # "module": the error of the parent module's output, a function
DERIVED = ("factor", "rounded")  # computed for methods that take it: from a statistic; what the rounding that follows gives
GIVEN = (*STATISTICS, *DERIVED)
ROUNDINGS: dict[str, str | Callable] = {
    "rtn": "qjax.rounding.nearest:rtn",
    "gptq": "qjax.rounding.gptq:gptq",
    "hqq": "qjax.rounding.hqq:hqq",
}
TRANSFORMS: dict[str, str | Callable] = {"awq": "qjax.transforms.awq:awq_scale"}
FOLLOWED_BY = {"awq": "rtn(clip=hessian)"}  # the rounding of a recipe that ends in this transform; others end in rtn
ORDERS = {name: f"qjax.calibrate.order:{name}" for name in ("parallel", "block", "sequential", "qep")}
DEFAULT_ORDER = "qep"
UNQUANTIZED = "none"


@dataclasses.dataclass(frozen=True)
class Stage:
    """A method with the options that differ from its defaults, sorted by name."""

    name: str
    options: tuple[tuple[str, object], ...] = ()

    def __str__(self) -> str:
        inner = ",".join(f"{name}={_show(value)}" for name, value in self.options)
        return f"{self.name}({inner})" if inner else self.name


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Transforms, then a rounding, to a weight format; build it with `parse_recipe`."""

    transforms: tuple[Stage, ...]
    rounding: Stage
    format: Format
    order: Stage | None = None

    @property
    def statistics(self) -> tuple[str, ...]:
        """Names of the calibration statistics its methods take."""
        needed = {name for stage in (*self.transforms, self.rounding) for name in statistics_of(stage)}
        return tuple(name for name in STATISTICS if name in needed)

    def in_order(self, order: "str | Stage | None") -> "Recipe":
        """This recipe in the given order of calibration, if it names none itself and takes calibration data."""
        order = parse_order(order) if isinstance(order, str) else order
        if order is None or self.order is not None or not self.statistics:
            return self
        return dataclasses.replace(self, order=order)

    @property
    def is_cast(self) -> bool:
        """True for fp32, bf16 and fp16: a change of storage type, not a quantization."""
        return self.format.is_float

    def __str__(self) -> str:
        if self.is_cast:
            return str(self.format)
        stages = [str(stage) for stage in self.transforms]
        if not stages or self.rounding != implied_rounding(self.transforms):
            stages.append(str(self.rounding))
        order = f"@{self.order}" if self.order and self.order != Stage(DEFAULT_ORDER) else ""
        return f"{'+'.join(stages)}:{self.format}{order}"


@functools.cache
def method(name: str) -> Callable:
    """The function of a registered rounding or transform."""
    found = {**ROUNDINGS, **TRANSFORMS, **ORDERS}[name]
    if callable(found):
        return found
    module, function = found.split(":")
    return getattr(importlib.import_module(module), function)


def register(function: Callable, *, transform: bool = False) -> Callable:
    """Makes a function a rounding (transform: a transform) under its own name, in recipes and all that takes them; returns it.

    Registering a name of one's own again replaces the function. Raises QjaxError for names of qjax's own methods, orders and
    formats, names that no recipe can spell, and options without the type that a recipe reads them as.
    """
    name = getattr(function, "__name__", "")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise QjaxError(f"register: {name!r} is no name for a method; a recipe spells it with a-z, 0-9 and _, a letter first")
    if name in (*ROUNDINGS, *TRANSFORMS, *ORDERS, *GRIDS, *ALIASES, UNQUANTIZED) and name not in added_methods():
        raise QjaxError(f"register: {name} is a method, order or format of qjax already; give the function another name")
    parameters = inspect.signature(function).parameters.values()
    untyped = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.annotation is p.empty and p.name not in GIVEN]
    if len([p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]) < 2 or untyped:
        raise QjaxError(
            f"register: {name}{inspect.signature(function)} is no method: expected (weight, fmt, *, options), and every option "
            "with a default and its type, as `sigmas: float = 3.0`"
        )
    for registry in (ROUNDINGS, TRANSFORMS):
        registry.pop(name, None)
    (TRANSFORMS if transform else ROUNDINGS)[name] = function
    for cached in (method, implied_rounding, parse_recipe):
        cached.cache_clear()
    return function


def added_methods() -> dict[str, Callable]:
    """Methods from outside the package, see `register`."""
    return {name: function for name, function in (ROUNDINGS | TRANSFORMS).items() if callable(function)}


def sources(recipe: Recipe | None) -> dict[str, str]:
    """Source of every method of a recipe that comes from outside the package; functions that it calls are not seen.

    Raises QjaxError where there is none to read.
    """
    stages = () if recipe is None else (*recipe.transforms, recipe.rounding)
    added = {name: function for name, function in added_methods().items() if name in {stage.name for stage in stages}}
    try:
        return {name: inspect.getsource(function) for name, function in added.items()}
    except (OSError, TypeError):
        raise QjaxError(
            f"the source of {', '.join(added)} cannot be read, and rows are told apart by it; define it in a file or a notebook"
        ) from None


def options_of(name: str) -> dict[str, inspect.Parameter]:
    """Options of a method: its keyword-only arguments that are not statistics."""
    parameters = inspect.signature(method(name), eval_str=True).parameters.values()
    return {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in GIVEN}


def statistics_of(stage: Stage) -> tuple[str, ...]:
    """The calibration statistics that a method takes with these options."""
    parameters = inspect.signature(method(stage.name)).parameters
    chosen = {**{name: option.default for name, option in options_of(stage.name).items()}, **dict(stage.options)}.values()
    return tuple(
        name
        for name in STATISTICS
        if name in parameters and (parameters[name].default is inspect.Parameter.empty or name in chosen)
    )


@functools.cache
def implied_rounding(transforms: tuple[Stage, ...]) -> Stage:
    """The rounding of a recipe that names none."""
    text = FOLLOWED_BY.get(transforms[-1].name, "rtn") if transforms else "rtn"
    return _parse_stage(text, text, (*ROUNDINGS,))


def parse_order(text: str) -> Stage:
    """The order of calibration named `text`, for example "qep(alpha=1)"; raises QjaxError that lists what is allowed."""
    return _parse_order(f"order {text!r}", text)


def _parse_order(where: str, text: str) -> Stage:
    stage = _parse_stage(where, text, (*ORDERS,), what="order of calibration")
    method(stage.name)(**dict(stage.options))  # raises for options out of range
    return stage


@functools.lru_cache(maxsize=1024)
def parse_recipe(text: str) -> Recipe | None:
    """The recipe named `text`; None for "none", the unquantized model.

    Raises QjaxError that names the wrong part and what is allowed in its place.
    """
    text = text.strip()
    if text == UNQUANTIZED:
        return None
    body, at, order_text = text.partition("@")
    *head, formats = re.split(r":(?![^(]*\))", body)
    if len(head) > 1:
        raise QjaxError(f"recipe {text!r}: expected METHODS:FORMAT, got {len(head)} colons")
    known, where = (*ROUNDINGS, *TRANSFORMS), f"recipe {text!r}"
    stages = [_parse_stage(where, part, known) for part in _split_stages(head[0])] if head else [Stage("rtn")]
    if stages[-1].name in TRANSFORMS:
        stages.append(implied_rounding(tuple(stages)))
    late = [stage.name for stage in stages[:-1] if stage.name in ROUNDINGS]
    if late:
        raise QjaxError(f"recipe {text!r}: {late[0]!r} is a rounding and must come last, after the transforms")
    if not head and re.split(r"[(\-:/]", formats)[0] in (*ROUNDINGS, *TRANSFORMS):
        raise QjaxError(f"recipe {text!r}: a method needs a format, for example {formats}:int4-g128")
    weights, slash, activation = formats.partition("/")
    if slash:
        raise QjaxError(f"recipe {text!r}: activation formats are not supported yet; leave out /{activation}")
    recipe = Recipe(tuple(stages[:-1]), stages[-1], _parse_format(text, weights))
    if recipe.is_cast and (recipe.transforms or recipe.rounding != Stage("rtn")):
        raise QjaxError(f"recipe {text!r}: {recipe.format} is a cast and takes no method; write {str(recipe.format)!r}")
    if at:
        if not recipe.statistics:
            raise QjaxError(f"recipe {text!r}: its methods read no calibration data, which an order (@{order_text}) is about")
        recipe = recipe.in_order(_parse_order(where, order_text))
    return recipe


def _parse_format(recipe: str, text: str) -> Format:
    try:
        return parse_format(text)
    except QjaxError as error:
        raise QjaxError(f"recipe {recipe!r}: {error}") from None


def _split_stages(text: str) -> list[str]:
    return re.split(r"\+(?![^(]*\))", text)


def _parse_stage(where: str, text: str, known: Collection[str], what: str = "method") -> Stage:
    match = re.fullmatch(r"\s*([A-Za-z_]\w*)\s*(?:\((.*)\))?\s*", text)
    name = match.group(1) if match else text
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise QjaxError(f"{where}: unknown {what} {name!r}; {hint}allowed: {', '.join(known)}")
    allowed = options_of(name)
    options = {}
    for item in filter(None, (match.group(2) or "").split(",")):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or key not in allowed:
            defaults = ", ".join(f"{option}={_show(allowed[option].default)}" for option in allowed) or "none"
            raise QjaxError(f"{where}: {name} has no option {item.strip()!r}; allowed, with defaults: {defaults}")
        if key in options:
            raise QjaxError(f"{where}: {name}({key}=...) is given twice; give it once")
        options[key] = _convert(where, name, allowed[key], value)
    changed = {key: value for key, value in options.items() if value != allowed[key].default}
    return Stage(name, tuple(sorted(changed.items())))


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


def _show(value: object) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def method_name(recipe: Recipe | None) -> str:
    """The method a figure draws a line for: stages without options; the grid for nearest rounding to a codebook."""
    if recipe is None:
        return "none"
    if recipe.is_cast:
        return str(recipe.format)
    stages = [stage.name for stage in recipe.transforms]
    codebook = not recipe.format.grid.startswith("int")
    if not stages and recipe.rounding.name == "rtn" and codebook:
        return recipe.format.grid_name
    return "+".join(stages if stages and recipe.rounding.name == "rtn" else [*stages, recipe.rounding.name])


def method_table() -> list[dict[str, str]]:
    """One record per registered method and order: name, kind, options with defaults, statistics, what it does."""
    kinds = {"rounding": ROUNDINGS, "transform": TRANSFORMS, "order": ORDERS}
    return [
        {
            "method": f"@{name}" if kind == "order" else name,
            "kind": kind,
            "options": ", ".join(f"{o.name}={_show(o.default)}" for o in options_of(name).values()),
            "needs": "" if kind == "order" else ", ".join(statistics_of(Stage(name))) or "no data",
            "what": inspect.getdoc(method(name) if kind == "order" else inspect.getmodule(method(name))).splitlines()[0],
        }
        for kind, registry in kinds.items()
        for name in registry
    ]
