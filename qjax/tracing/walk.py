"""What a traced function does with its parameters: a walk over its jaxpr that computes nothing.

Every value is known by a key; equal keys are the same array, also where it was cast or reshaped in the same way twice, so that
contractions that read one input are seen.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from jax.extend.core import Jaxpr, JaxprEqn, Literal

from qjax.tracing.interpreter import NESTED, scan_sizes, unchanged
from qjax.tracing.layout import Layout, View, rearranged, view_of, whole
from qjax.tracing.product import Product, product_of
from qjax.tracing.trace import Traced

SAME = ("convert_element_type", "transpose", "reshape", "squeeze", "broadcast_in_dim", "copy")
CALLS = NESTED.keys() - {"cond", "while", "scan"}


class Use(NamedTuple):
    """One contraction with a parameter. read: key of its input and the axes it sums. indices: of w[i]."""

    path: str
    view: View
    read: object
    equation: int  # of the function's own, in which it is
    indices: tuple[int, ...] = ()
    ragged: bool = False


@dataclasses.dataclass
class Uses:
    """All contractions, in their order, and by path what else is done with parameters. calls: the function's own equations that
    are compiled calls with contractions inside.
    """

    products: list[Use] = dataclasses.field(default_factory=list)
    others: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    calls: set[int] = dataclasses.field(default_factory=set)
    equation: int = -1

    def other(self, seen: "_Seen", what: str) -> None:
        """Something that is no contraction with a parameter."""
        told = self.others.setdefault(seen.path, [])
        if what not in told:
            told.append(what)


class _Seen(NamedTuple):
    key: object
    path: str | None = None
    layout: Layout | None = None
    shape: tuple[int, ...] = ()
    indices: tuple[int, ...] = ()


def uses_of(traced: Traced) -> Uses:
    """What the function does with each of its parameters."""
    log = Uses()
    shapes = traced.shapes()
    seen = [_Seen(path, path, whole(shapes[path].shape), shapes[path].shape) for path in traced.paths]
    jaxpr = traced.jaxpr.jaxpr
    seen += [_Seen(("argument", i)) for i in range(len(jaxpr.invars) - len(seen))]
    _kept(_walk(jaxpr, seen, log, top=True), log, "returned")
    return log


def _walk(jaxpr: Jaxpr, seen: Sequence[_Seen], log: Uses, *, top: bool = False) -> list[_Seen]:
    known = dict(zip(jaxpr.invars, seen, strict=True)) | {v: _Seen(("const", id(v))) for v in jaxpr.constvars}
    read = lambda v: _Seen(("literal", str(v))) if isinstance(v, Literal) else known[v]  # noqa: E731
    for number, eqn in enumerate(jaxpr.eqns):
        if top:
            log.equation = number
        before = len(log.products)
        known |= zip(eqn.outvars, _step(eqn, [read(v) for v in eqn.invars], log), strict=True)
        if top and eqn.primitive.name in ("jit", "pjit") and len(log.products) > before:
            log.calls.add(number)
    return [read(v) for v in jaxpr.outvars]


def _step(eqn: JaxprEqn, given: list[_Seen], log: Uses) -> list[_Seen]:
    name, params = eqn.primitive.name, eqn.params
    new = [_Seen(object()) for _ in eqn.outvars]
    weights = [seen for seen in given if seen.path is not None]
    if not weights:
        if name in SAME and len(given) == 1:
            return [_Seen((name, str(sorted(params.items(), key=str)), given[0].key))]
        return _nested(eqn, given, log) if name in CALLS else new
    if name in NESTED:
        return _nested(eqn, given, log)
    if len(given) == 1 and (found := rearranged(name, params, eqn.invars[0].aval.shape, weights[0].layout)) is not None:
        layout, indices = found
        return [weights[0]._replace(key=object(), layout=layout, indices=(*weights[0].indices, *indices))]
    avals = [v.aval for v in eqn.invars]
    product = product_of(name, params, avals, [seen.layout for seen in given])
    if isinstance(product, Product):
        (weight,), x = weights, next(seen for seen in given if seen.path is None)
        view = view_of(weight.shape, product.layout, product.batch, product.summed)
        read = (x.key, _axes_read(product), product.window, product.ragged and given[2].key)
        log.products.append(Use(weight.path, view, read, log.equation, weight.indices, product.ragged))
        return new
    for weight in weights:
        log.other(weight, product or NAMES.get(name, f"used by {name}"))
    return new


def _axes_read(product: Product) -> tuple:
    """What each axis of the input is to the contraction: inputs in the matrix' order, a batch, or rows."""
    role = {fine: ("in", number) for number, fine in enumerate(product.summed)}
    role |= {fine: ("batch", number) for number, fine in enumerate(product.batch)}
    sizes = product.layout.shape
    return tuple(tuple((*role[label], sizes[label]) for label in axis if label >= 0) for axis in product.x)


NAMES = {
    "gather": "looked up",
    "dynamic_slice": "read at an index that is computed",
    "slice": "cut",
    "split": "cut",
    "mul": "multiplied elementwise",
    "add": "added elementwise",
    "add_any": "added elementwise",
    "sub": "subtracted elementwise",
    "concatenate": "joined with other values",
    "shard_map": "used inside shard_map",
    "pallas_call": "used by a kernel of Pallas",
    "reshape": "reshaped across its axes",
    "broadcast_in_dim": "repeated",
}


def _nested(eqn: JaxprEqn, given: list[_Seen], log: Uses) -> list[_Seen]:
    name, p = eqn.primitive.name, eqn.params
    new = [_Seen(object()) for _ in eqn.outvars]
    if name in CALLS:
        inner = p.get("jaxpr", p.get("call_jaxpr"))
        return _walk(getattr(inner, "jaxpr", inner), given, log)
    if name == "cond":
        for branch in p["branches"]:
            _kept(_walk(branch.jaxpr, given[1:], log), log, "returned by a branch")
        return new
    if name == "while":
        tests, ends = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
        carry = _carried(given[ends:], log)
        _walk(p["cond_jaxpr"].jaxpr, [*given[:tests], *carry], log)
        _kept(_walk(p["body_jaxpr"].jaxpr, [*given[tests:ends], *carry], log), log, "returned by a loop")
        return new
    first, split = scan_sizes(p)
    second = first + split
    sliced = []
    for seen in given[second:]:
        layout = None if seen.path is None else seen.layout.taken(0)
        if seen.path is not None and layout is None:
            log.other(seen, "scanned along an axis that is not one of its own")
        sliced.append(_Seen(object()) if layout is None else seen._replace(key=object(), layout=layout))
    inner = [*given[:first], *_carried(given[first:second], log), *sliced]
    outputs = _walk(p["jaxpr"].jaxpr, inner, log)
    back = unchanged(eqn, outputs[split:], sliced)
    _kept([out for i, out in enumerate(outputs) if i - split not in back], log, "returned by a scan")
    return [given[second + back[i - split]] if i - split in back else each for i, each in enumerate(new)]


def _carried(seen: Sequence[_Seen], log: Uses) -> list[_Seen]:
    _kept(seen, log, "carried by a loop")
    return [_Seen(object()) for _ in seen]


def _kept(seen: Sequence[_Seen], log: Uses, what: str) -> None:
    for each in seen:
        if each.path is not None:
            log.other(each, what)


class Site(NamedTuple):
    """A parameter that contractions alone consume, all by one view. reads: keys of their inputs, in order. equation, last: of
    the function's own, where the first and the last of them are. ragged: rows are of one expert of the stack each.
    """

    path: str
    view: View
    reads: tuple[object, ...]
    equation: int
    last: int
    uses: int
    ragged: bool


def sites_of(uses: Uses) -> tuple[dict[str, Site], dict[str, str]]:
    """Parameters that can be quantized, in the order of their first use, and why others that are used cannot be."""
    sites, refused = {}, {path: ", ".join(told) for path, told in uses.others.items()}
    by_path: dict[str, list[Use]] = {}
    for use in uses.products:
        by_path.setdefault(use.path, []).append(use)
    for path, found in by_path.items():
        views = dict.fromkeys(use.view for use in found)
        if path in refused:
            refused[path] = f"contracted, and {refused[path]}"
        elif len(views) > 1:
            refused[path] = f"contracted in {len(views)} ways: {'; '.join(map(told_of, views))}"
        else:
            reads = tuple((use.read, use.indices) for use in found)
            sites[path] = Site(path, found[0].view, reads, found[0].equation, found[-1].equation, len(found), found[0].ragged)
    return sites, refused


def told_of(view: View) -> str:
    """A view in words: sizes of its axes by role."""
    sizes = lambda axes: " ".join(str(view.parts[axis]) for axis in axes)  # noqa: E731
    stack = f"{sizes(view.stack)} x " if view.stack else ""
    return f"{stack}({sizes(view.in_axes)}) -> ({sizes(view.out_axes)})"
