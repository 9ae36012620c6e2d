"""Recipes: what is done to a layer, as a string and as a value.

    rtn:int4-g128                       rounding : format
    rtn(clip=mse):int3-g128             options in parentheses
    awq+gptq(damp=0.05):int3-g128       transforms + rounding : format
    awq:int4-g128                       a transform alone is followed by the rounding that belongs to it, here rtn(clip=hessian)
    gptq+descend(sweeps=4):int2-g64     rounding + refiners
    gptq:int3-g128@sequential           @ order of calibration: whose inputs statistics are from (`calibrate/order.py`)
    rtn:int8-channel-sym/int8-token     / format of the layer's input (`activations.py`)
    llm_int8:int8-channel               int8-token, but inputs with outliers in 16 bits; rounding + refiners + llm_int8
    gptq:int4-g128 kv:int4-g32          kv: format of the cache of keys and values (`cache_format.py`); or alone, kv:int8-token
    nf4, int4                           a format alone is rounded to nearest, a grid alone has the usual group (`formats.py`)
    bf16                                storage in another floating-point type, of the whole model
    none                                the model as it is

`str(recipe)` is canonical: options that are the default are dropped, so equal recipes have equal names. The methods are in
`methods.py`.
"""

import dataclasses
import functools
from collections.abc import Sequence

from qjax.activations import Activation, parse_activation
from qjax.cache_format import CacheFormat
from qjax.errors import QjaxError
from qjax.formats import Format, not_rounded_to
from qjax.grammar import FIRST, answered, read_stages, split_recipe, split_stage, split_stages
from qjax.methods import (
    FOLLOWED_BY,
    UNQUANTIZED,
    Stage,
    captures_of,
    kind_of,
    names,
    options_of,
    sources,
)
from qjax.registry import forgotten_on_change

DEFAULT_ORDER = "qep"


@dataclasses.dataclass(frozen=True, eq=False)
class Recipe:
    """Transforms, a rounding to a weight format, refiners, and what happens to the layer's input and to keys and values; build
    it with `parse_recipe`. format: None for weights that stay as they are.

    Equal are recipes that do the same: one without an order and the same in the default order, which `in_order` alone tells
    apart.
    """

    transforms: tuple[Stage, ...]
    rounding: Stage
    format: Format | None
    order: Stage | None = None
    refiners: tuple[Stage, ...] = ()
    block_refiners: tuple[Stage, ...] = ()
    activation: Activation | None = None
    cache: CacheFormat | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self._done() == other._done()

    def __hash__(self) -> int:
        return hash(self._done())

    def _done(self) -> tuple:
        return tuple((vars(self) | {"order": self.order or Stage(DEFAULT_ORDER)}).values())

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Every method, in the order they are applied."""
        return (*self.transforms, self.rounding, *self.refiners, *self.block_refiners)

    @property
    def statistics(self) -> tuple[str, ...]:
        """Names of the statistics of layer inputs that its methods and a static activation format are made from."""
        scale = self.activation.statistics if self.activation else ()
        return tuple(dict.fromkeys([*captures_of(self.stages), *scale]))

    @property
    def reads_data(self) -> bool:
        """Whether it needs calibration data."""
        return bool(self.statistics or self.block_refiners)

    def in_order(self, order: "str | Stage | None") -> "Recipe":
        """This recipe in the given order of calibration, if it names none itself and reads calibration data."""
        order = parse_order(order) if isinstance(order, str) else order
        if order is None or self.order is not None or not self.reads_data:
            return self
        return dataclasses.replace(self, order=order)

    def sources(self) -> dict[str, str]:
        """Source of what it is made of from outside the package, see `methods.sources`."""
        return sources(self.stages, [each for each in (self.format, self.activation and self.activation.format) if each])

    @property
    def is_cast(self) -> bool:
        """True for fp32, bf16 and fp16: a change of storage type, not a quantization."""
        return self.format is not None and self.format.is_float

    @property
    def of_weights(self) -> "Recipe | None":
        """The recipe without its cache, of which kernels know nothing; None where that is all."""
        return None if self.format is None else dataclasses.replace(self, cache=None)

    def __str__(self) -> str:
        if self.cache is not None:
            return f"{self.of_weights or ''} kv:{self.cache}".strip()
        if self.is_cast:
            return str(self.format)
        method = (self.activation,) if self.activation and self.activation.is_method else ()
        hidden = (self.transforms or method) and self.rounding == implied_rounding(self.transforms)
        rounding = () if hidden else (self.rounding,)
        stages = "+".join(map(str, (*self.transforms, *rounding, *self.refiners, *self.block_refiners, *method)))
        activation = f"/{self.activation}" if self.activation and not method else ""
        order = f"@{self.order}" if self.order and self.order != Stage(DEFAULT_ORDER) else ""
        return f"{stages}:{self.format}{activation}{order}"


@forgotten_on_change
@functools.cache
def implied_rounding(transforms: tuple[Stage, ...]) -> Stage:
    """The rounding of a recipe that names none."""
    text = FOLLOWED_BY.get(transforms[-1].name, "rtn") if transforms else "rtn"
    return _stages(text, split_stages(text, text))[0]


def parse_order(text: str) -> Stage:
    """The order of calibration named `text`, for example "qep(alpha=1)"; raises QjaxError that lists what is allowed."""
    return _parse_order(f"order {text!r}", text)


def _parse_order(where: str, text: str) -> Stage:
    (stage,) = _stages(where, [split_stage(where, text, names("order"), "order of calibration")])
    stage()  # raises for options out of range
    return stage


@forgotten_on_change
@functools.lru_cache(maxsize=1024)
def parse_recipe(text: str) -> Recipe | None:
    """The recipe named `text`; None for "none", the unquantized model. Capitals are as good as small letters.

    Raises QjaxError that names the wrong part and what is allowed in its place, or the recipe that was probably meant.
    """
    text = text.strip()
    if text.lower() == UNQUANTIZED:
        return None
    return answered(text, _parse_recipe)


def _parse_recipe(text: str) -> Recipe:
    where = f"recipe {text!r}"
    words = split_recipe(text)
    stages = _stages(where, words.stages)
    try:
        methods = [stage() for stage in stages if kind_of(stage.name) == "activation"]  # raises for options out of range
        given = [] if words.activation is None else [parse_activation(words.activation)]
    except QjaxError as error:
        raise QjaxError(f"{where}: {error}") from None
    if len([*methods, *given]) > 1 or any(each.is_method for each in given):
        raise QjaxError(
            f"{where}: several things are said of the layers' inputs; give one, FORMAT/int8-token or llm_int8:FORMAT"
        )
    activation = next(iter([*methods, *given]), None)
    recipe = Recipe(**_by_kind(where, stages), format=words.format, activation=activation, cache=words.cache)
    if words.format is None:
        return recipe
    if recipe.format.is_read_only:
        raise QjaxError(f"{where}: {not_rounded_to(recipe.format)}")
    if recipe.is_cast and (recipe.stages != (Stage("rtn"),) or activation):
        raise QjaxError(f"{where}: {recipe.format} is a cast and takes no method; write {str(recipe.format)!r}")
    if words.order is not None and not recipe.reads_data:
        raise QjaxError(f"{where}: its methods read no calibration data, which an order (@{words.order}) is about")
    return recipe if words.order is None else recipe.in_order(_parse_order(where, words.order))


def _by_kind(where: str, stages: Sequence[Stage]) -> dict[str, object]:
    """The stages as fields of a Recipe; raises QjaxError for a stage in the wrong place."""
    places = [FIRST[kind_of(stage.name)] for stage in stages]
    for stage, place, before in zip(stages[1:], places[1:], places[:-1], strict=True):
        if place < before or place == before == FIRST["rounding"]:
            raise QjaxError(
                f"{where}: {stage.name!r} is a {kind_of(stage.name)} and cannot follow a {list(FIRST)[before]}; a recipe is "
                "transforms, one rounding, which must come last of these, and refiners: awq+gptq+descend; llm_int8 ends it"
            )
    found = [tuple(stage for stage in stages if kind_of(stage.name) == kind) for kind in FIRST]
    transforms, rounding, refiners, block_refiners, _ = found
    rounding = rounding[0] if rounding else implied_rounding(transforms)
    return {"transforms": transforms, "rounding": rounding, "refiners": refiners, "block_refiners": block_refiners}


def _stages(where: str, written: Sequence[tuple[str, dict[str, str]]]) -> list[Stage]:
    return [Stage(*each) for each in read_stages(where, written, options_of)]


def method_name(recipe: Recipe | None) -> str:
    """The method a figure draws a line for: stages without options; the grid for nearest rounding to a codebook."""
    if recipe is None:
        return UNQUANTIZED
    if recipe.cache is not None:
        named = "" if recipe.format is None else method_name(recipe.of_weights)
        return f"{named} kv:{recipe.cache}".strip()
    if recipe.is_cast:
        return str(recipe.format)
    hidden = recipe.transforms and recipe.rounding.name == "rtn"
    method = [str(recipe.activation).partition("(")[0]] if recipe.activation and recipe.activation.is_method else []
    hidden = hidden or (method and recipe.rounding.name == "rtn")
    named = [stage.name for stage in recipe.stages if not (hidden and stage is recipe.rounding)] + method
    codebook = not recipe.format.grid.startswith("int")
    return recipe.format.grid_name if named == ["rtn"] and codebook else "+".join(named)
