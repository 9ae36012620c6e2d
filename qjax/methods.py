"""The registry of methods, and the one table of what a method may ask for.

    kind            a function of                             returns
    transform       (weights that share an input, fmt, *)     an exact map of the input (`maps.InputMap`), or None
    rounding        (weight, fmt, *)                          (QTensor, Info)
    refiner         (weight, start, *), start a QTensor       (QTensor, Info): one layer, looked at again
    block refiner   (block, start, *), see `refining.block`   (QTensors by path, BlockInfo): all layers of a block at once
    activation      (*)                                       what happens to the layer's input (`activations.py`)
    order           (*)                                       whose inputs statistics are of (`calibrate/order.py`)

Keyword-only arguments are a method's options, of the annotated type: bool, int, float, str or a Literal of choices, or one of
these `| None`. One named in `GIVENS` is no option but is made for it: a statistic of the layer's input, or what is computed
from statistics, weights and the module they are in. A given without default is always made; one with a default where an
option's value is its name (clip=hessian) or what it is made from is at hand anyway.

To add a method to the package write the function in a file of its own and a line in `grammar.py`; `register` and
`register_statistic` add one from outside.
"""

import dataclasses
import functools
import importlib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from jaxtyping import Array, Float

from qjax.calibrate.statistics import STATISTICS, Statistic
from qjax.codebooks import Codebook, codebooks
from qjax.errors import QjaxError
from qjax.formats import ALIASES, GRIDS, UNQUANTIZED, Format, from_outside, parse_format
from qjax.grammar import METHODS, is_readable, kind_of, names, show
from qjax.maps import MAPS, InputMap
from qjax.registry import forget, forgotten_in_scope, forgotten_on_change
from qjax.rounding.parts.feedback import factorize
from qjax.scales import SCALES, Floats

FOLLOWED_BY = {"awq": "rtn(clip=hessian)"}  # the rounding of a recipe that ends in this transform; others end in rtn


class Memo:
    """What the kernels and plans of a part share: factors of Hessians, mapped statistics, tr(W^T H W)."""

    def __init__(self):
        self._known = {}

    def get(self, compute: Callable, *arrays: object, **options: object) -> object:
        """compute(*arrays, **options), once for the same objects and options."""
        key = (compute, *map(id, arrays), *sorted(options.items()))
        if key not in self._known:
            self._known[key] = (compute(*arrays, **options), arrays)  # the arrays are held, so that no id is used again
        return self._known[key][0]


@dataclasses.dataclass(frozen=True)
class Site:
    """Where a method is at work: kernels that share an input, and all that a given can be made of.

    weights: (in, out_k) float32, those of a transform together, else one. parent_error(weights): squared error of the output of
    the module they are in, with these in their place. rounded(map): what the weights become by the recipe's rounding, as they
    are (None) or mapped by a map before it, which is undone. trial(map): squared error of the module's output with the weights
    mapped and rounded to nearest, and the mapped input rounded as the recipe says. stream: their input
    is the residual stream of a model that is rotated (`models/rotation.py`).
    """

    weights: Sequence[Float[Array, "in out"]]
    statistics: Mapping[str, Array]
    memo: Memo
    parent_error: Callable[[Sequence[Array]], Array] | None = None
    rounded: Callable[[InputMap | None], Sequence[Array]] | None = None
    trial: Callable[[InputMap], Array] | None = None
    stream: bool = False


class Given(NamedTuple):
    """captures: statistics it is made from. make(site, options): options are the method's, by name, defaults included. kinds:
    of methods that it can be made for.
    """

    captures: tuple[str, ...]
    make: Callable[[Site, Mapping[str, object]], object]
    kinds: tuple[str, ...] = ("transform", "rounding", "refiner", "block refiner")


def _statistic(name: str) -> Given:
    return Given((name,), lambda site, options: site.statistics[name])


def _factor(site: Site, options: Mapping[str, object]) -> object:
    """By the method's damp and act_order where it has them, else by factorize's own defaults: said in full, so that methods
    that mean the same share a factor.
    """
    parameters = inspect.signature(factorize).parameters
    chosen = {name: options.get(name, parameters[name].default) for name in ("damp", "act_order")}
    return site.memo.get(factorize, site.statistics["hessian"], **chosen)


GIVENS: dict[str, Given] = {
    **{name: _statistic(name) for name in ("hessian", "abs_mean", "abs_max")},
    "factor": Given(("hessian",), _factor),  # of the damped Hessian (`rounding/parts/feedback.py`)
    "module": Given(("hessian",), lambda site, options: site.parent_error, ("transform",)),
    "rounded": Given((), lambda site, options: site.rounded, ("transform",)),
    "trial": Given((), lambda site, options: site.trial, ("transform",)),
    "stream": Given((), lambda site, options: site.stream, ("transform",)),
    "once": Given((), lambda site, options: site.memo.get, ("transform",)),
}


_added_statistics: dict[str, Statistic] = {}
for _table in (METHODS, GIVENS, STATISTICS, GRIDS, codebooks(), SCALES, MAPS, _added_statistics):
    forgotten_in_scope(_table)
forgotten_on_change(parse_format)


@dataclasses.dataclass(frozen=True)
class Stage:
    """A method with the options that differ from its defaults, sorted by name."""

    name: str
    options: tuple[tuple[str, object], ...] = ()

    def __str__(self) -> str:
        inner = ",".join(f"{name}={show(value)}" for name, value in self.options)
        return f"{self.name}({inner})" if inner else self.name

    @property
    def chosen(self) -> dict[str, object]:
        """Every option's value, by name."""
        return {**{name: option.default for name, option in options_of(self.name).items()}, **dict(self.options)}

    def __call__(self, *arguments: object, site: Site | Mapping[str, Site] | None = None) -> object:
        """The method's result, with its options and what it asks of the site; of sites by path each given is by path."""

        def make(name: str) -> object:
            if isinstance(site, Mapping):
                return {path: GIVENS[name].make(each, self.chosen) for path, each in site.items()}
            return GIVENS[name].make(site, self.chosen)

        taken = {name: make(name) for name in givens_of(self)}
        return method(self.name)(*arguments, **taken, **dict(self.options))


@forgotten_on_change
@functools.cache
def method(name: str) -> Callable:
    """The function of a registered method."""
    found = METHODS[kind_of(name)][name]
    if callable(found):
        return found
    module, function = found.split(":")
    return getattr(importlib.import_module(module), function)


def options_of(name: str) -> dict[str, inspect.Parameter]:
    """Options of a method: its keyword-only arguments that are not given."""
    parameters = inspect.signature(method(name), eval_str=True).parameters.values()
    return {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in GIVENS}


@forgotten_on_change
@functools.lru_cache(maxsize=1024)
def givens_of(stage: Stage) -> tuple[str, ...]:
    """What is made for a method with these options, see the module's beginning."""
    parameters = inspect.signature(method(stage.name)).parameters
    taken = {name: parameters[name].default is inspect.Parameter.empty for name in GIVENS if name in parameters}
    values = [value for value in stage.chosen.values() if isinstance(value, str)]
    needed = {name for name, required in taken.items() if required or name in values}
    at_hand = {statistic for name in needed for statistic in GIVENS[name].captures}
    return tuple(name for name in taken if name in needed or at_hand.issuperset(GIVENS[name].captures))


def captures_of(stages: Sequence[Stage]) -> tuple[str, ...]:
    """The statistics that calibration must take for these stages, in the table's order."""
    needed = {statistic for stage in stages for name in givens_of(stage) for statistic in GIVENS[name].captures}
    return tuple(name for name in STATISTICS if name in needed)


def register(function: Callable, *, kind: str = "rounding", transform: bool = False) -> Callable:
    """Makes a function a method of a kind ("transform", "rounding", "refiner", "block refiner") under its own name, in recipes
    and all that takes them; returns it. transform=True is kind="transform".

    Registering a name of one's own again replaces the function. Raises QjaxError for names of qjax's own methods and formats,
    names that no recipe can spell, an unknown kind, and options without the type that a recipe reads them as.
    """
    name, kind = getattr(function, "__name__", ""), "transform" if transform else kind
    kinds = [known for known in METHODS if known not in ("activation", "order")]
    if kind not in kinds:
        raise QjaxError(f"register: {name} as a {kind!r}; kinds are {', '.join(kinds)}")
    _check_name(name, [*names(*METHODS), *GRIDS, *ALIASES, UNQUANTIZED], added_methods())
    _check_signature(name, kind, function)
    for methods in METHODS.values():
        methods.pop(name, None)
    METHODS[kind][name] = function
    forget()
    return function


def _check_signature(name: str, kind: str, function: Callable) -> None:
    """Raises QjaxError for a function that is no method of its kind."""
    try:
        parameters = inspect.signature(function, eval_str=True).parameters.values()
    except NameError:  # an annotation that is not defined where the function is
        parameters = inspect.signature(function).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty]
    options = [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in GIVENS]
    wrong = [p.name for p in options if p.default is p.empty or not is_readable(p.annotation)]
    if len(positional) != 2 or wrong or set(positional) & set(GIVENS):
        first = {"refiner": "weight, start", "block refiner": "block, start", "transform": "weights, fmt"}.get(
            kind, "weight, fmt"
        )
        raise QjaxError(
            f"register: {name}{inspect.signature(function)} is no {kind}: expected ({first}, *, options), and every option "
            "with a default and its type (bool, int, float, str, a Literal, or one of these | None), as `sigmas: float = 3.0`; "
            f"what is given instead is {', '.join(GIVENS)}, and what `register_statistic` adds before"
        )
    if unfit := [p.name for p in parameters if p.name in GIVENS and kind not in GIVENS[p.name].kinds]:
        raise QjaxError(f"register: {name}: {', '.join(unfit)} cannot be given to a {kind}, only to a transform")


def register_statistic(name: str, statistic: Statistic) -> Statistic:
    """Lets methods ask for a statistic of their layer's input, as a keyword-only argument of this name; returns it.

    Registering a name of one's own again replaces it. Raises QjaxError for names of qjax's own.
    """
    if not isinstance(statistic, Statistic):
        raise QjaxError(f"register_statistic: {name} is a {type(statistic).__name__}, expected a qjax.Statistic")
    arguments = {argument for known in names(*METHODS) for argument in inspect.signature(method(known)).parameters}
    _check_name(name, [*STATISTICS, *GIVENS, *arguments], _added_statistics)
    _added_statistics[name] = statistic
    STATISTICS[name] = statistic
    GIVENS[name] = _statistic(name)
    forget()
    return statistic


def _check_name(name: str, taken: Sequence[str], own: object) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise QjaxError(f"register: {name!r} is no name; a recipe spells it with a-z, 0-9 and _, a letter first")
    if name in taken and name not in own:
        raise QjaxError(
            f"register: {name} is a method, statistic, argument, order or format of qjax already; give another name"
        )


def added_methods() -> dict[str, Callable]:
    """Methods from outside the package, see `register`."""
    return {name: function for methods in METHODS.values() for name, function in methods.items() if callable(function)}


def sources(stages: Sequence[Stage], formats: Sequence[Format] = ()) -> dict[str, str]:
    """Source of everything from outside the package that stages and formats are made of: methods, statistics, codebooks, codecs
    of scales, and with a transform from outside all maps, as it may return any; functions that these call are not seen.

    Raises QjaxError where there is none to read.
    """
    methods = added_methods()
    used: dict[str, object] = {stage.name: methods[stage.name] for stage in stages if stage.name in methods}
    if any(kind_of(name) == "transform" for name in used):
        used |= {f"map {name}": each for name, each in MAPS.items() if each.__module__ != InputMap.__module__}
    used |= {f"statistic {name}": STATISTICS[name] for name in captures_of(stages) if name in _added_statistics}
    used |= {name: each for fmt in formats for name, each in from_outside(fmt).items()}
    try:
        return {name: _source(each) for name, each in used.items()}
    except (OSError, TypeError):
        raise QjaxError(
            f"the source of {', '.join(used)} cannot be read, and rows are told apart by it; define it in a file or a notebook"
        ) from None


def _source(thing: object) -> str:
    if isinstance(thing, Codebook):
        return str(thing)
    if isinstance(thing, Floats):  # a codec: its class, with what this one is made of
        return f"{_text(type(thing))}{thing}"
    if isinstance(thing, Statistic):
        said = f"{thing.axes}{' takes bfloat16' if thing.takes_bfloat16 else ''}"
        return "".join([*map(_text, (thing.init, thing.update, thing.finalize)), said])
    return _text(thing)


def _text(thing: Callable) -> str:
    if inspect.getfile(thing) == "<string>":  # of exec; Python 3.13 takes the command line's text (-c) for it
        raise OSError("no file holds it")
    return inspect.getsource(thing)


def method_table() -> list[dict[str, str]]:
    """One record per registered method: name, kind, options with defaults, statistics, what it does."""
    return [
        {
            "method": f"@{name}" if kind == "order" else name,
            "kind": kind,
            "options": ", ".join(f"{o.name}={show(o.default)}" for o in options_of(name).values()),
            "needs": "" if kind == "order" else ", ".join(captures_of([Stage(name)])) or "no data",
            "what": _first_line(name, of_function=kind in ("activation", "order") or callable(methods[name])),
        }
        for kind, methods in METHODS.items()
        for name in methods
    ]


def _first_line(name: str, *, of_function: bool) -> str:
    """What a method says that it does: the function, or the file that is all its own."""
    described = method(name) if of_function else inspect.getmodule(method(name))
    return (inspect.getdoc(described) or "").partition("\n")[0]
