"""Leaves of a parameter tree as JSON says them, and back as templates: their structure, with shapes and types for arrays.

    a QTensor      {"format": "int4-g128", "in_features": 4096}
    a Table        the same, of the (columns, rows) weight, and "table": true
    a Linear       the same, or {"weight": "bfloat16[4096, 1024]"} where its weight is an array, and what else it does,
                   "linear": {"inputs": [{"map": "Scale", "arrays": {"scale": "float16[4096]"}}], "activation": "int8-token"}

A part of a Linear (a map, the outliers, the adapter) is a dataclass: "arrays" and "static" hold its fields.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np

from qjax import grid
from qjax.activations import parse_activation
from qjax.errors import QjaxError
from qjax.formats import Format, parse_format
from qjax.lazy import Lazy, is_array
from qjax.linear import Linear, LowRank, Outliers, Table, apply_linear
from qjax.maps import MAPS
from qjax.qtensor import FLOAT_DTYPES, QTensor, from_codes
from qjax.untrusted import quoted

TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint8": "U8", "int32": "I32"}  # safetensors' names


def describe(leaf: Linear | QTensor | Table) -> dict:
    """The record of a leaf, of a stack that of its members. Raises QjaxError for what no folder can hold."""
    if len(leaf.shape) == 3:
        return describe(jax.tree.map(lambda array: Lazy(array.shape[1:], np.dtype(array.dtype), None), leaf))
    if isinstance(leaf, Table):
        return {**describe(leaf.weight), "table": True}
    if isinstance(leaf, Linear):
        weight = {"weight": _spell(leaf.weight)} if is_array(leaf.weight) else describe(leaf.weight)
        return {**weight, "linear": _describe_layer(leaf)}
    if not isinstance(leaf, QTensor) or leaf.codes.ndim != 2:
        raise QjaxError(f"a {type(leaf).__name__} {leaf.shape} has no place in a file; save the model as qjax.quantize made it")
    return {"format": str(leaf.format), "in_features": leaf.in_features}


def _describe_layer(leaf: Linear) -> dict:
    for each in leaf.inputs:
        if MAPS.get(type(each).__name__) is not type(each):
            name = type(each).__name__
            raise QjaxError(f"its input map {name} is not known to folders; decorate the class with qjax.register_map")
    found = {
        "inputs": [{"map": type(each).__name__, **_describe_part(each)} for each in leaf.inputs],
        "activation": leaf.activation and str(leaf.activation),
        "activation_scale": None if leaf.activation_scale is None else _spell(leaf.activation_scale),
        "outliers": leaf.outliers and _describe_part(leaf.outliers),
        "adapter": leaf.adapter and _describe_part(leaf.adapter),
    }
    return {name: value for name, value in found.items() if value}


def _describe_part(part: object) -> dict:
    values = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
    arrays = {name: _spell(value) for name, value in values.items() if is_array(value)}
    static = {name: value for name, value in values.items() if name not in arrays}
    if wrong := [name for name, value in static.items() if not isinstance(value, str | bool | int | float | tuple | None)]:
        raise QjaxError(
            f"{type(part).__name__} holds {', '.join(wrong)}, which JSON cannot say; give it arrays, numbers or text"
        )
    return {"arrays": arrays, "static": static} if static else {"arrays": arrays}


def template(record: object, shape: tuple[int, ...]) -> Linear | QTensor | Table:
    """The leaf that a record of an (in, out) kernel, a stack of them, or a table describes, with ShapeDtypeStructs for arrays;
    nothing is computed.

    Raises QjaxError for a malformed record, and parts that do not fit each other.
    """
    if isinstance(record, dict) and record.get("table") is True:
        if len(shape) != 2 or not record.keys() <= {"table", "format", "in_features"}:
            raise QjaxError(f"a table has a format and in_features, got {quoted(record)} for {list(shape)}")
        return Table(_described_qtensor(record, shape[::-1]))
    if len(shape) == 3:
        stacked = lambda array: jax.ShapeDtypeStruct((shape[0], *array.shape), array.dtype)  # noqa: E731
        return jax.tree.map(stacked, template(record, shape[1:]))
    if not isinstance(record, dict) or "weight" not in record:
        weight = _described_qtensor(record, shape)
    elif (weight := _array(record["weight"])).shape != shape:
        raise QjaxError(f"'weight' is {quoted(record['weight'])}, expected {list(shape)}")
    if "linear" not in record:
        return weight
    leaf = _layer(weight, entry(record, "linear", dict))
    try:
        run = functools.partial(apply_linear, implementation="reference")
        found = jax.eval_shape(run, jax.ShapeDtypeStruct((1, shape[0]), jnp.float32), leaf)
    except QjaxError:
        raise
    except Exception as error:  # whatever JAX, or a map of the user's own, raises for shapes that do not fit
        raise QjaxError(f"the parts of 'linear' do not fit a kernel {shape}: {str(error).splitlines()[0]}") from None
    if found.shape != (1, shape[1]):
        raise QjaxError(f"the parts of 'linear' make {found.shape[1:]} outputs of a kernel {shape}")
    return leaf


def _described_qtensor(record: object, shape: tuple[int, int]) -> QTensor:
    fmt, in_features = parse_format(entry(record, "format", str)), entry(record, "in_features", int)
    if in_features != shape[0]:
        raise QjaxError(f"in_features is {in_features}, expected {shape[0]}")
    return blank(fmt, *shape)


@functools.lru_cache(maxsize=64)
def blank(fmt: Format, in_features: int, out_features: int) -> QTensor:
    """A QTensor of this format with ShapeDtypeStructs for arrays; nothing is computed."""
    if fmt.is_float:
        codes = jax.ShapeDtypeStruct((in_features, out_features), FLOAT_DTYPES[fmt.grid])
        return QTensor(codes, None, None, fmt, in_features)

    def quantize(codes):
        shape = fmt.parameter_shape(in_features, out_features)
        scale, zero = jnp.ones(shape), jnp.zeros(shape) if fmt.is_affine else None
        stored = grid.store_scales(scale, fmt, fmt.scale_codec.common(scale, fmt.largest_value))
        return from_codes(codes, grid.Parameters(scale, scale, zero, stored), fmt)

    return jax.eval_shape(quantize, jax.ShapeDtypeStruct((in_features, out_features), jnp.uint8))


def _layer(weight: QTensor | jax.ShapeDtypeStruct, record: dict) -> Linear:
    if unknown := record.keys() - {"inputs", "activation", "activation_scale", "outliers", "adapter"}:
        raise QjaxError(f"unknown entries {', '.join(sorted(unknown))} of 'linear'; use the qjax that wrote it")
    return Linear(
        weight,
        tuple(_map(each) for each in entry({"inputs": []} | record, "inputs", list)),
        parse_activation(entry(record, "activation", str)) if "activation" in record else None,
        _array(record["activation_scale"]) if "activation_scale" in record else None,
        _part(Outliers, record["outliers"]) if "outliers" in record else None,
        _part(LowRank, record["adapter"]) if "adapter" in record else None,
    )


def _map(record: object) -> object:
    name = entry(record, "map", str)
    if name not in MAPS:
        raise QjaxError(f"unknown map {quoted(name)}; known are {', '.join(MAPS)}, qjax.register_map adds one")
    return _part(MAPS[name], record)


def _part(cls: type, record: object) -> object:
    arrays = {name: _array(text) for name, text in entry(record, "arrays", dict).items()}
    static = {
        name: tuple(v) if isinstance(v, list) else v for name, v in entry({"static": {}} | record, "static", dict).items()
    }
    try:
        return cls(**arrays, **static)
    except Exception as error:  # whatever a map of the user's own raises
        raise QjaxError(f"{cls.__name__}: {error}") from None


def _spell(array: jax.Array) -> str:
    if str(array.dtype) not in TYPES:
        raise QjaxError(f"an array is {array.dtype}, folders hold {', '.join(TYPES)}")
    return f"{array.dtype}{list(array.shape)}"


def _array(text: object) -> jax.ShapeDtypeStruct:
    found = re.fullmatch(
        rf"({'|'.join(TYPES)})\[((?:[0-9]{{1,18}}(?:, ?|(?=\]))){{0,8}})\]", text if isinstance(text, str) else ""
    )
    if not found:
        raise QjaxError(f"an array is {quoted(text)}, expected a type and a shape, for example 'float16[4096]'")
    return jax.ShapeDtypeStruct(tuple(map(int, filter(None, re.split("[, ]+", found[2])))), found[1])


def entry(values: object, key: str, kind: type) -> object:
    """values[key]. Raises QjaxError unless it is there and of that type."""
    value = values.get(key) if isinstance(values, dict) else None
    if not isinstance(value, kind):
        raise QjaxError(f"{key!r} must be {kind.__name__}, got {'nothing' if value is None else quoted(value)}")
    return value
