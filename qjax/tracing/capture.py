"""Capture: a traced function runs on batches, and what goes into its contractions feeds statistics of their parameters.

Statistics are updated where the contraction is, inside scans, conditions and compiled calls, so that inputs never leave it. A
function that is made of compiled calls keeps them as programs of their own; any other is compiled as a whole.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal
from jaxtyping import Array, Float

from qjax.calibrate import experts
from qjax.calibrate.capture import KEPT_BYTES, Batch, Captured, check_statistics, token_weights
from qjax.calibrate.statistics import COUNT, STATISTICS, Statistic, first_through, through_maps
from qjax.errors import QjaxError
from qjax.maps import InputMap
from qjax.tracing.coverage import known_uses
from qjax.tracing.interpreter import (
    KEEP,
    KNOWN,
    WEIGHTS,
    Lanes,
    LocalError,
    Record,
    Tracked,
    advance,
    applied,
    as_program,
    at,
    begun,
    finish,
    input_of,
    put,
    tracked,
)
from qjax.tracing.kernel import experts_of
from qjax.tracing.product import Product
from qjax.tracing.trace import Leaves, Traced, trace
from qjax.tracing.walk import Site, sites_of


@dataclasses.dataclass(frozen=True)
class Capturing:
    """The mode that also updates the statistics of parameters in the record. everyone: rows count for all experts, not only for
    theirs.
    """

    statistics: tuple[tuple[str, Statistic], ...]
    everyone: bool = False

    def of_everyone(self) -> "Capturing":
        """The same, for rows of all experts."""
        return dataclasses.replace(self, everyone=True)

    def contract(self, product: Product, lanes: Lanes, equation, record: Record):
        """Outputs, and the record with the first lane's input seen; the last lane's is what it is compared with."""
        weight = next(value for value in lanes[0] if isinstance(value, Tracked))
        if weight.path in record:
            rows = [product.to_rows(product.spread(input_of(values))) for values in (lanes[0], lanes[-1])]
            sizes = [values[2] for values in (lanes[0], lanes[-1])] if product.ragged else None
            try:
                states = at(record[weight.path], weight.indices)
                states = self._updated(product, states, rows, record.get(WEIGHTS), sizes)
            except QjaxError as error:
                raise LocalError(weight.path, str(error)) from None
            record = record | {weight.path: put(record[weight.path], weight.indices, states)}
        known, keep = f"{KNOWN}{weight.path}", f"{KEEP}{weight.path}"
        if known in record:
            return record[known], {path: states for path, states in record.items() if path != known}
        outputs = [applied(product, values, equation) for values in lanes]
        return outputs, record | {keep: outputs} if keep in record else record

    def _updated(self, product, states, rows, weights, sizes):
        depth = 0 if product.ragged else len(product.batch)
        shape = rows[0].shape
        counts = token_weights("PATH", weights, shape[depth:-1])
        flat, exact = (each.reshape(*shape[:depth], -1, shape[-1]).astype(jnp.float32) for each in rows)
        if product.ragged:
            owner, experts = experts_of(sizes[0], len(flat)), jnp.arange(sizes[0].shape[0])
            own = lambda expert: counts if self.everyone else jnp.where(owner == expert, counts, 0)  # noqa: E731
            return jax.vmap(lambda state, expert: self._update(state, flat, exact, own(expert)))(states, experts)
        update = functools.partial(self._update, counts=counts)
        for _ in range(depth):
            update = jax.vmap(update)
        return update(states, flat, exact)

    def _update(self, state: Mapping, x: Array, exact: Array, counts: Float[Array, " tokens"]) -> dict:
        return {name: each.update(state[name], x, exact, counts) for name, each in self.statistics}


def initial(statistics: Mapping[str, Statistic], site: Site, maps: tuple[InputMap, ...] | None) -> dict:
    """Statistics of a site before any token, for each matrix of its stack; of its inputs through maps, where there are any."""
    size, stack = site.view.matrix_shape[0], site.view.stack_shape
    states = {
        name: jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (*stack, *leaf.shape)), each.init(size))
        for name, each in statistics.items()
    }
    return states if maps is None else first_through(maps, states)


def members(site: Site) -> dict[str, tuple[int, ...]]:
    """The matrices of a site by name, "layers/kernel[2]" as the parameter is indexed: their places in its stack."""
    if not site.view.stack:
        return {site.path: ()}
    index = lambda place: ",".join(str(i) for _, i in sorted(zip(site.view.stack, place, strict=True)))  # noqa: E731
    return {f"{site.path}[{index(place)}]": place for place in np.ndindex(site.view.stack_shape)}


class Lane(NamedTuple):
    """Parameters of one run of the function: by path, and as the interpreter takes them."""

    arrays: Mapping[str, object]
    values: list[object]


class Result(NamedTuple):
    """What a contraction gave in a run, and the parameter that it was made with, of each lane."""

    outputs: list[Array]
    leaves: list[object]


class Halted(NamedTuple):
    """A run of a function on a batch that stopped before an equation. arrays: of its arguments. sites: as the batch is traced.
    known: by variable, and read: parameters as the run had them, of each lane; none before the first run. results: of
    contractions after it, by path.
    """

    args: tuple
    traced: Traced
    arrays: list[Array]
    sites: Mapping[str, Site]
    equation: int = 0
    known: Sequence[dict] = ()
    read: Sequence[Mapping[str, object]] = ()
    results: Mapping[str, Result] = MappingProxyType({})


class Runs:
    """A traced function on batches, for captures one after the other.

    Where it is made of compiled calls, a capture goes on from where the one before stopped, if nothing has changed before that;
    so layer after layer is quantized without running all.
    """

    def __init__(self, fn: Callable, sites: Mapping[str, Site]):
        self.fn, self.sites = fn, sites
        self.holders = {name: site for site in sites.values() for name in members(site)}
        self.halted: dict[int, Halted] = {}

    def capture(
        self,
        leaves: Leaves,
        batches: Sequence[Batch],
        needed: Mapping[str, int],
        names: Iterable[str],
        exact: Leaves | None = None,
        keep: Sequence[str] = (),
        through: Mapping[str, tuple[InputMap, ...]] = MappingProxyType({}),
    ) -> dict[str, dict[str, Array]]:
        """Statistics `names` of the inputs of matrices in `needed` (name -> in), over all batches.

        leaves: of the function's parameters, arrays or Kernels; exact: those of the run without quantization, for statistics
        that compare with it. keep: matrices that stay as they are; of a function made of compiled calls, the products of those
        that are no part of a stack and contracted once are not made again by later captures, until one begins behind them, and
        as long as KEPT_BYTES has room. Experts that hardly any row is of have statistics of all rows (`calibrate/experts.py`).
        through: maps of all the inputs, which the statistics are of, by parameter; arrays of a stack's have its leading axes.
        Raises QjaxError that names matrices whose input is not finite or was not seen, and parameters whose input token weights
        do not fit.
        """
        lanes = [
            Lane(each.arrays, tracked(list(each.arrays), list(each.arrays.values()), self.sites))
            for each in (leaves, exact)
            if each is not None
        ]
        known = {name: STATISTICS[name] for name in dict.fromkeys([*names, COUNT])}
        capturing = Capturing(tuple((name, through_maps(each) if through else each) for name, each in known.items()))
        chosen = list({site.path: site for name, site in self.holders.items() if name in needed}.values())
        first = {site.path: initial(known, site, through.get(site.path)) for site in chosen}
        record = self._record(leaves, lanes, batches, capturing, first, keep)
        finish = lambda state: {name: each.finalize(state[name]) for name, each in capturing.statistics}  # noqa: E731
        values = {}
        for site in chosen:
            places = {name: place for name, place in members(site).items() if name in needed}
            values |= {name: finish(at(record[site.path], place)) for name, place in places.items()}
            if site.ragged:
                hardly = set(experts.hardly_reached(record[site.path]))
                own = {site.path: first[site.path]}
                of_all = self._record(leaves, lanes, batches, capturing.of_everyone(), own) if hardly else {}
                for number, name in enumerate(members(site)):
                    if name in places:
                        routed = {experts.ROUTED: values[name][COUNT]}
                        values[name] |= (finish(at(of_all[site.path], places[name])) if number in hardly else {}) | routed
        check_statistics(values, needed, "", lambda few: Captured(self.capture(leaves, batches, few, ["abs_max"]), []))
        return values

    def _record(self, leaves: Leaves, lanes: Sequence[Lane], batches: Sequence[Batch], capturing, first, keep=()) -> Record:
        """States of sites after all batches, from their first ones, by path."""
        record, chosen = dict(first), [self.sites[path] for path in first]
        for number, batch in enumerate(batches):
            given = record | ({} if batch.weights is None else {WEIGHTS: batch.weights})
            halted = self.halted.get(number)
            if halted is None or halted.args is not batch.args:
                traced, arrays = trace(self.fn, leaves, batch.args, {})
                halted = Halted(batch.args, traced, arrays, sites_of(known_uses(traced))[0])
            try:
                seen, self.halted[number] = self._run(halted, lanes, capturing, given, chosen, keep)
            except LocalError as error:
                raise QjaxError(error.message.replace("PATH", str(error.path))) from None
            record = {path: seen[path] for path in record}
        return record

    def _run(self, halted: Halted, lanes: Sequence[Lane], capturing, record: Record, chosen, keep) -> tuple[Record, Halted]:
        """The record with what a batch adds, and where its run stopped; it goes on from where it did before, if it can."""
        traced, here, values = halted.traced, halted.sites, [[*lane.values, *halted.arrays] for lane in lanes]
        if not known_uses(traced).calls:
            return as_program(capturing, traced.jaxpr, values, record, keep=False)[1], halted
        reached = [here[site.path] for site in chosen if site.path in here]  # another batch may be traced otherwise
        if not reached:
            return record, halted
        first, last = min(site.equation for site in reached), max(site.last for site in reached)
        jaxpr, begin, known = traced.jaxpr.jaxpr, 0, begun(traced.jaxpr.jaxpr, traced.jaxpr.consts, values)
        results = {}
        if halted.equation <= first and _goes_on(halted, lanes):
            begin, own = halted.equation, set(jaxpr.invars[: len(traced.paths)])
            known = [
                {v: now.get(v, value) if v in own else value for v, value in then.items()}
                for now, then in zip(known, halted.known, strict=True)
            ]
            results = {path: each for path, each in halted.results.items() if _same(each.leaves, path, lanes)}
        made = {KNOWN + path: each.outputs for path, each in results.items()}
        advance(capturing, jaxpr, known, made, range(begin, first))
        stopped = [dict(values) for values in known]
        asked = [site.path for site in self._to_keep(keep, here) if site.path not in results and site.equation >= first]
        record = advance(capturing, jaxpr, known, record | made | {KEEP + path: () for path in asked}, range(first, last))
        record = finish(capturing, jaxpr, known, record, last)
        results |= {path: Result(record[KEEP + path], [lane.arrays[path] for lane in lanes]) for path in asked}
        left = {path: each for path, each in results.items() if each.outputs and here[path].equation >= first}
        return record, halted._replace(equation=first, known=stopped, read=[lane.arrays for lane in lanes], results=left)

    def _to_keep(self, paths: Iterable[str], here: Mapping[str, Site]) -> list[Site]:
        """The sites of those parameters that one contraction reads, as a batch is traced. None where there is no more room, and
        where the batch reads parameters in another order than that in which they are settled.
        """
        kept = (array for each in self.halted.values() for result in each.results.values() for array in result.outputs)
        if list(here) != [path for path in self.sites if path in here] or sum(array.nbytes for array in kept) >= KEPT_BYTES:
            return []
        return [here[path] for path in paths if path in here and here[path].uses == 1]


def _same(leaves: Sequence[object], path: str, lanes: Sequence[Lane]) -> bool:
    """Whether the parameter is that of every lane."""
    return len(leaves) == len(lanes) and all(leaf is lane.arrays[path] for leaf, lane in zip(leaves, lanes, strict=True))


def _goes_on(halted: Halted, lanes: Sequence[Lane]) -> bool:
    """Whether all parameters that were read before the run stopped are still the same."""
    jaxpr, traced = halted.traced.jaxpr.jaxpr, halted.traced
    read = {v for eqn in jaxpr.eqns[: halted.equation] for v in eqn.invars if not isinstance(v, Literal)}
    paths = [path for v, path in zip(jaxpr.invars, traced.paths, strict=False) if v in read]
    same = lambda then, now: all(then[path] is now.arrays[path] for path in paths)  # noqa: E731
    return len(halted.read) == len(lanes) and all(map(same, halted.read, lanes))
