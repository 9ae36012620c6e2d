"""The interpreter: a traced function is evaluated with something else in the place of its contractions with parameters.

Values that are rearranged parameters go through as `Tracked`; all else is bound as traced, custom derivatives included. Scans,
conditions, loops, checkpoints and calls that get a Tracked value are built anew around their interpreted bodies, so that the
result works under jit, grad and vmap as the function does. A nested jit stays one compiled program, shared by calls that look
alike: paths inside it are numbers.

What a run collects (statistics of inputs) is a mapping by path, the record, that is threaded through: sliced by a scan along
with the parameter, carried where it is not.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from jaxtyping import Array, PyTree

from qjax.tracing.kernel import Kernel, RefusedError, multiply
from qjax.tracing.layout import Layout, rearranged, view_of, whole
from qjax.tracing.product import Product, product_of

Record = dict[object, PyTree]
WEIGHTS = "\0weights"  # the record's entry for how much each token counts; no path
KEEP = "\0keep "  # before a path: its contraction's outputs of each lane are to be kept, () until they are
KNOWN = "\0known "  # and are known, so that it need not be made


@functools.partial(jax.tree_util.register_dataclass, data_fields=("value",), meta_fields=("path", "layout", "indices"))
@dataclasses.dataclass(frozen=True)
class Tracked:
    """A rearranged parameter: its array as rearranged, or the Kernel (a stack's slice) that stands for it.

    indices: taken of the record's stack by w[i], after what scans took.
    """

    value: Array | Kernel
    path: object
    layout: Layout
    indices: tuple[int, ...] = ()


Lanes = Sequence[list]  # values side by side: of one run of the function, or of two that differ in their parameters


class Mode(Protocol):
    """What happens at a contraction; hashable, as programs are compiled for it."""

    def contract(self, product: Product, lanes: Lanes, equation: JaxprEqn, record: Record) -> tuple[list[Array], Record]:
        """Each lane's output of the contraction, and the record with what was seen. lanes: operands, a weight among them."""


def run(mode: Mode, jaxpr: Jaxpr, consts: Sequence[Array], lanes: Lanes, record: Record) -> tuple[list[list], Record]:
    """Each lane's outputs of a jaxpr on values, some of them Tracked, and the record."""
    known = begun(jaxpr, consts, lanes)
    record = advance(mode, jaxpr, known, record, range(len(jaxpr.eqns)))
    return [[_read(values, v) for v in jaxpr.outvars] for values in known], record


def begun(jaxpr: Jaxpr, consts: Sequence[Array], lanes: Lanes) -> list[dict]:
    """What each lane knows by variable before the first equation."""
    return [dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *values), strict=True)) for values in lanes]


def advance(mode: Mode, jaxpr: Jaxpr, known: list[dict], record: Record, equations: range) -> Record:
    """The record after some equations; what each lane knows is brought up to there, and what nothing reads later is let go."""
    for number in equations:
        eqn = jaxpr.eqns[number]
        given = [[_read(values, v) for v in eqn.invars] for values in known]
        outputs, record = step(mode, eqn, given, record)
        for values, new in zip(known, outputs, strict=True):
            values.update(zip(eqn.outvars, new, strict=True))
            for v in last_uses(jaxpr)[number]:
                values.pop(v, None)
    return record


def finish(mode: Mode, jaxpr: Jaxpr, known: list[dict], record: Record, number: int) -> Record:
    """The record after one more equation, whose outputs nobody asks for."""
    eqn = jaxpr.eqns[number]
    given = [[_read(values, v) for v in eqn.invars] for values in known]
    if NESTED.get(eqn.primitive.name) is _jit:
        return as_program(mode, eqn.params["jaxpr"], given, record, keep=False)[1]
    return step(mode, eqn, given, record)[1]


def _read(values: dict, v: object) -> object:
    if not isinstance(v, Literal):
        return values[v]
    return v.val if isinstance(v.val, jax.Array | np.ndarray) else np.asarray(v.val, v.aval.dtype)


@functools.lru_cache(maxsize=1024)
def last_uses(jaxpr: Jaxpr) -> list[list]:
    """For each equation, the variables that nothing after it reads."""
    found, read = [], {v for v in jaxpr.outvars if not isinstance(v, Literal)}
    for eqn in reversed(jaxpr.eqns):
        mine = {v for v in (*eqn.invars, *eqn.outvars) if not isinstance(v, Literal)} - read
        found.append(list(mine))
        read |= mine
    return found[::-1]


def step(mode: Mode, eqn: JaxprEqn, lanes: Lanes, record: Record) -> tuple[list[list], Record]:
    """Each lane's outputs of one equation, and the record."""
    if not any(isinstance(value, Tracked) for values in lanes for value in values):
        return [_bind(eqn, values) for values in lanes], record
    name = eqn.primitive.name
    if name in BODIES:  # which return the record as it came: nothing of them is kept
        own = {path: states for path, states in record.items() if not str(path).startswith((KEEP, KNOWN))}
        outputs, seen = NESTED[name](mode, eqn, lanes, own)
        return outputs, record | seen
    if name in NESTED:
        return NESTED[name](mode, eqn, lanes, record)
    weight = next(value for value in lanes[0] if isinstance(value, Tracked))
    if len(lanes[0]) == 1 and (found := rearranged(name, eqn.params, eqn.invars[0].aval.shape, weight.layout)) is not None:
        return [[_moved(eqn, value, *found)] for (value,) in lanes], record
    layouts = [value.layout if isinstance(value, Tracked) else None for value in lanes[0]]
    product = product_of(name, eqn.params, [v.aval for v in eqn.invars], layouts)
    if isinstance(product, Product):
        outputs, record = mode.contract(product, lanes, eqn, record)
        return [[output] for output in outputs], record
    return [_bind(eqn, [plain(value, name) for value in values]) for values in lanes], record


def _moved(eqn: JaxprEqn, weight: Tracked, layout: Layout, indices: tuple[int, ...]) -> Tracked:
    """A parameter after an equation that rearranges it; indices: of the slice of a stack that it takes."""
    value = weight.value
    if not isinstance(value, Kernel):
        (value,) = _bind(eqn, [value])
    elif indices:
        value = jax.tree.map(lambda leaf: leaf[indices], value)
    return Tracked(value, weight.path, layout, (*weight.indices, *indices))


def plain(value: object, primitive: str) -> object:
    """The value itself; raises QjaxError for a parameter that is quantized."""
    if not isinstance(value, Tracked):
        return value
    if isinstance(value.value, Kernel):
        raise RefusedError(value.path, primitive)
    return value.value


def _bind(eqn: JaxprEqn, values: list) -> list:
    made = eqn.primitive.get_bind_params(eqn.params)  # JAX before 0.11 gives the functions apart
    functions, params = made if isinstance(made, tuple) else ((), made)
    with eqn.ctx.manager:
        outputs = eqn.primitive.bind(*functions, *values, **params)
    return list(outputs) if eqn.primitive.multiple_results else [outputs]


def at(states: PyTree, indices: tuple[int, ...]) -> PyTree:
    """What is recorded of one slice of a stack."""
    return jax.tree.map(lambda leaf: leaf[indices], states) if indices else states


def put(states: PyTree, indices: tuple[int, ...], new: PyTree) -> PyTree:
    """What is recorded of a stack with one slice's replaced."""
    return jax.tree.map(lambda leaf, part: leaf.at[indices].set(part), states, new) if indices else new


def _call(mode: Mode, eqn: JaxprEqn, lanes: Lanes, record: Record) -> tuple[list[list], Record]:
    """A function that is called: interpreted in its place. Where a parameter is in it, its own derivative rule is not used."""
    inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    return run(mode, inner.jaxpr, inner.consts, lanes, record)


def _jit(mode: Mode, eqn: JaxprEqn, lanes: Lanes, record: Record) -> tuple[list[list], Record]:
    if eqn.params["inline"]:
        return _call(mode, eqn, lanes, record)
    return as_program(mode, eqn.params["jaxpr"], lanes, record)


def as_program(
    mode: Mode, closed: ClosedJaxpr, lanes: Lanes, record: Record, *, keep: bool = True
) -> tuple[list[list], Record]:
    """The interpreted jaxpr as one compiled program, which calls with other parameters of the same kind share.

    keep: its outputs too.
    """
    paths = dict.fromkeys(value.path for value in lanes[0] if isinstance(value, Tracked))
    number = {WEIGHTS: WEIGHTS} | {start + path: f"{start}{i}" for i, path in enumerate(paths) for start in ("", KEEP, KNOWN)}
    path_of = {i: path for path, i in number.items()}
    local = [_renamed(values, number) for values in lanes]
    try:
        given = {i: record[path] for path, i in number.items() if path in record}
        outputs, seen = _program(mode, closed.jaxpr, keep)(closed.consts, local, given)
    except LocalError as error:
        raise LocalError(path_of[error.path], error.message) from None
    except RefusedError as error:
        raise RefusedError(path_of[error.path], error.primitive) from None
    return [_renamed(values, path_of) for values in outputs], record | {path_of[i]: states for i, states in seen.items()}


def _renamed(values: list, names: Mapping) -> list:
    return [dataclasses.replace(each, path=names[each.path]) if isinstance(each, Tracked) else each for each in values]


class LocalError(Exception):
    """What is wrong with a parameter, told inside a program that knows it by number."""

    def __init__(self, path: object, message: str):
        super().__init__(message)
        self.path, self.message = path, message


@functools.lru_cache(maxsize=256)
def _program(mode: Mode, jaxpr: Jaxpr, keep: bool):
    @jax.jit
    def program(consts, lanes, record):
        outputs, record = run(mode, jaxpr, consts, lanes, record)
        return outputs if keep else [[] for _ in lanes], record

    return program


def _remat(mode: Mode, eqn: JaxprEqn, lanes: Lanes, record: Record) -> tuple[list[list], Record]:
    body = lambda lanes, record: run(mode, eqn.params["jaxpr"], (), lanes, record)  # noqa: E731
    options = {"prevent_cse": eqn.params["prevent_cse"], "policy": eqn.params["policy"]}
    return jax.checkpoint(body, **options)(lanes, record)


def _one(lanes: Lanes, what: str) -> list:
    """The values of the only lane; raises LocalError for two, which may not take the same way."""
    if len(lanes) > 1:
        weight = next(value for value in lanes[0] if isinstance(value, Tracked))
        raise LocalError(weight.path, f"PATH: used inside {what}, which the order qep cannot follow; choose order='parallel'")
    return lanes[0]


def _cond(mode: Mode, eqn: JaxprEqn, lanes: Lanes, record: Record) -> tuple[list[list], Record]:
    def branch(closed: ClosedJaxpr):
        def run_branch(values, record):
            (outputs,), record = run(mode, closed.jaxpr, closed.consts, [values], record)
            return [plain(out, "cond") for out in outputs], record

        return run_branch

    index, *operands = _one(lanes, "cond")
    outputs, record = lax.switch(index, [branch(each) for each in eqn.params["branches"]], operands, record)
    return [outputs], record


def _while(mode: Mode, eqn: JaxprEqn, lanes: Lanes, record: Record) -> tuple[list[list], Record]:
    p, values = eqn.params, _one(lanes, "a while loop")
    ends = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
    tests, consts, carry = values[: ends[0]], values[ends[0] : ends[1]], [plain(v, "while") for v in values[ends[1] :]]
    test, body = p["cond_jaxpr"], p["body_jaxpr"]

    def go_on(state):
        return run(mode, test.jaxpr, test.consts, [[*tests, *state[0]]], state[1])[0][0][0]

    def iterate(state):
        (outputs,), record = run(mode, body.jaxpr, body.consts, [[*consts, *state[0]]], state[1])
        return [plain(out, "while") for out in outputs], record

    carry, record = lax.while_loop(go_on, iterate, (carry, record))
    return [carry], record


def _scan(mode: Mode, eqn: JaxprEqn, lanes: Lanes, record: Record) -> tuple[list[list], Record]:
    p = eqn.params
    first, split = scan_sizes(p)
    second = first + split
    kept: dict[int, int] = {}  # outputs that are parameters' slices as they came, as Flax NNX returns all its state
    consts = [values[:first] for values in lanes]
    carries = [[plain(value, "scan") for value in values[first:second]] for values in lanes]
    stacks = [[_stack_of(value) for value in values[second:]] for values in lanes]
    indices = {v.path: v.indices for v in stacks[0] if isinstance(v, Tracked) and v.path in record}
    if twice := [v for v in stacks[0] if isinstance(v, Tracked) and v.indices != indices.get(v.path, v.indices)]:
        raise LocalError(twice[0].path, "PATH: one scan takes several of its slices, which cannot be captured")
    sliced = {path: at(record[path], index) for path, index in indices.items()}
    held = {path: states for path, states in record.items() if path not in sliced}

    def body(state, one):
        carries, held = state
        parts, own = one
        inner = [
            [*fixed, *carry, *map(_slice_of, stack, part)]
            for fixed, carry, stack, part in zip(consts, carries, stacks, parts, strict=True)
        ]
        outputs, new = run(mode, p["jaxpr"].jaxpr, p["jaxpr"].consts, inner, held | own)
        kept.update(unchanged(eqn, outputs[0][split:], inner[0][second:]))
        carries = [[plain(out, "scan") for out in values[:split]] for values in outputs]
        collected = [[None if i in kept else plain(out, "scan") for i, out in enumerate(values[split:])] for values in outputs]
        return (carries, {path: new[path] for path in held}), (collected, {path: new[path] for path in own})

    parts = [[value.value if isinstance(value, Tracked) else value for value in values] for values in stacks]
    options = {"length": p["length"], "reverse": p["reverse"], "unroll": p["unroll"]}
    (carries, held), (collected, own) = lax.scan(body, (carries, held), (parts, sliced), **options)
    own = {path: put(record[path], index, own[path]) for path, index in indices.items()}
    collected = [
        [stack[kept[i]] if i in kept else y for i, y in enumerate(ys)] for stack, ys in zip(stacks, collected, strict=True)
    ]
    return [[*carry, *ys] for carry, ys in zip(carries, collected, strict=True)], record | held | own


def scan_sizes(params: Mapping) -> tuple[int, int]:
    """How many constants a scan's body takes, and how many values it carries."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = map(len, params["ft_in"].unpack())  # JAX from 0.12 on
    return consts, carry


def unchanged(eqn: JaxprEqn, outputs: Sequence[object], slices: Sequence[object]) -> dict[int, int]:
    """Outputs of a scan's body, by number, that are a slice it was given, and which."""

    def places(values, variables):
        paths = [getattr(value, "path", None) for value in values]
        kinds = [v.aval.dtype for v in variables[-len(values) :]]
        return [
            None if path is None else (path, value.layout, value.indices, kind)
            for path, value, kind in zip(paths, values, kinds, strict=False)
        ]

    given = places(slices, eqn.invars)
    return {i: given.index(place) for i, place in enumerate(places(outputs, eqn.outvars)) if place and place in given}


def _stack_of(value: object) -> object:
    """What a scan takes apart: a parameter along one of its own axes, else an array."""
    return value if isinstance(value, Tracked) and value.layout.taken(0) else plain(value, "scan")


def _slice_of(stack: object, part: object) -> object:
    return Tracked(part, stack.path, stack.layout.taken(0)) if isinstance(stack, Tracked) else part


BODIES = ("cond", "while", "scan")
NESTED = {
    "jit": _jit,
    "pjit": _jit,
    "closed_call": _call,
    "core_call": _call,
    "custom_jvp_call": _call,
    "custom_vjp_call": _call,
    "remat2": _remat,
    "checkpoint": _remat,
    "cond": _cond,
    "while": _while,
    "scan": _scan,
}


class Applied:
    """The mode that applies what stands in a parameter's place."""

    def contract(self, product, lanes, equation, record):
        """Products with Kernels."""
        return [applied(product, values, equation) for values in lanes], record


APPLIED = Applied()


def applied(product: Product, values: Sequence[object], eqn: JaxprEqn) -> Array:
    """A contraction's output, in its type: of a Kernel by what it does, of an array as traced."""
    weight = next(value for value in values if isinstance(value, Tracked))
    if not isinstance(weight.value, Kernel):
        return _bind(eqn, [plain(value, "") for value in values])[0]
    view = weight.value.view
    if weight.value.shape[-2:] != view.matrix_shape:
        raise RefusedError(weight.path, "a product with a part of it, as shard_map cuts it (in_specs=P() gives it whole)")
    if view_of(view.shape, product.layout, product.batch, product.summed) != view:
        raise RefusedError(weight.path, "a contraction other than the one it was quantized for")
    x = input_of(values)
    kind = eqn.outvars[0].aval.dtype
    wide = jnp.promote_types(x.dtype, kind)  # sums that are asked for in a wider type are not rounded before
    sizes = values[2] if product.ragged else None
    return multiply(product, x.astype(wide), weight.value, sizes, eqn.params["precision"]).astype(kind)


def input_of(values: Sequence[object]) -> Array:
    """What a contraction multiplies with its parameter."""
    return next(value for value in values if not isinstance(value, Tracked))


def tracked(paths: Sequence[str], leaves: Sequence[object], views: Mapping) -> list[object]:
    """Parameters as the interpreter takes them: Kernels, and arrays at the paths in `views`, are Tracked."""
    result = []
    for path, leaf in zip(paths, leaves, strict=True):
        if isinstance(leaf, Kernel):
            result.append(Tracked(leaf, path, whole(leaf.view.shape)))
        elif path in views:
            result.append(Tracked(leaf, path, whole(leaf.shape)))
        else:
            result.append(leaf)
    return result
