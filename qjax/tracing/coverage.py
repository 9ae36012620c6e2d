"""Coverage: what a function does with each of its parameters, and which of them can be quantized; nothing is computed."""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from jaxtyping import PyTree

from qjax.errors import QjaxError
from qjax.tracing.layout import View
from qjax.tracing.trace import Leaves, Traced, leaves_of, trace
from qjax.tracing.walk import Site, Uses, sites_of, told_of, uses_of

NEVER = "never used"


class Parameter(NamedTuple):
    """One parameter. view: how its contraction sees it, a stack of (in, out) matrices; None where it cannot be quantized, and
    `why`. uses: contractions with it. same_input: the first parameter whose contraction reads the same input.
    """

    path: str
    shape: tuple[int, ...]
    view: View | None = None
    why: str | None = None
    uses: int = 0
    same_input: str | None = None


class Coverage(NamedTuple):
    """Every parameter with two or more axes, those that can be quantized first, in the order of their use."""

    parameters: tuple[Parameter, ...]

    def __str__(self) -> str:
        """A table: parameter, shape, its matrices as stack x (in) -> (out), or why it cannot be quantized."""
        rows = [("parameter", "shape", "contraction")]
        for each in self.parameters:
            told = f"no: {each.why}" if each.view is None else told_of(each.view)
            told += f", {each.uses} times" if each.uses > 1 and each.view is not None else ""
            told += f", input of {each.same_input}" if each.same_input not in (None, each.path) else ""
            rows.append((each.path, " ".join(map(str, each.shape)), told))
        widths = [max(len(row[column]) for row in rows) for column in range(2)]
        return "\n".join(f"{path:<{widths[0]}}  {shape:<{widths[1]}}  {told}" for path, shape, told in rows)


class Found(NamedTuple):
    """What several calls of a function do with its parameters together. shared: for every site the first with its input."""

    sites: dict[str, Site]
    refused: dict[str, str]
    shared: dict[str, str]


def coverage(fn: Callable, params: PyTree, *args: object, **kwargs: object) -> Coverage:
    """What fn(params, *args, **kwargs) does with every parameter that has two or more axes; print it for a table.

    A parameter can be quantized where contractions alone consume it (matmul, einsum, ragged_dot, convolutions without groups),
    all of them in the same way; it may be transposed, reshaped, cast, scanned over or indexed w[i] before. Nothing is computed.
    """
    leaves = leaves_of(params)
    found = found_in(leaves, [trace(fn, leaves, args, kwargs)[0]])
    return described(leaves, found)


def described(leaves: Leaves, found: Found) -> Coverage:
    """A finding as a report."""
    listed = [
        Parameter(path, site.view.shape, site.view, None, site.uses, found.shared[path]) for path, site in found.sites.items()
    ]
    listed += [Parameter(path, tuple(leaves.arrays[path].shape), None, why) for path, why in found.refused.items()]
    return Coverage(tuple(listed))


def found_in(leaves: Leaves, traces: Iterable[Traced]) -> Found:
    """Sites of all traces, and why other parameters of two or more axes have none. A parameter that only some of them use is a
    site where all that do agree.
    """
    sites: dict[str, Site] = {}
    refused: dict[str, str] = {}
    for traced in traces:
        found, why = sites_of(known_uses(traced))
        refused |= why
        for path, site in found.items():
            before = sites.setdefault(path, site._replace(reads=()))
            if before.view != site.view:
                refused[path] = f"contracted in 2 ways: {told_of(before.view)}; {told_of(site.view)}"
            sites[path] = before._replace(reads=(*before.reads, (id(traced), site.reads)))
    wide = {path for path, leaf in leaves.arrays.items() if len(leaf.shape) > 1}
    sites = {path: site for path, site in sites.items() if path in wide and path not in refused}
    refused = {path: why for path, why in refused.items() if path in wide}
    refused |= {path: NEVER for path in leaves.arrays if path in wide - sites.keys() - refused.keys()}
    return Found(sites, refused, _shared(sites))


def _shared(sites: Mapping[str, Site]) -> dict[str, str]:
    first: dict[tuple, str] = {}
    return {path: first.setdefault((site.reads, site.view.stack_shape), path) for path, site in sites.items()}


_uses: dict[int, tuple[Traced, Uses]] = {}


def known_uses(traced: Traced) -> Uses:
    """`uses_of`, once for each trace."""
    key = id(traced.jaxpr)
    if key not in _uses:
        if len(_uses) > 256:
            _uses.clear()
        _uses[key] = (traced, uses_of(traced))  # the trace is held, so that its id is not used again
    return _uses[key][1]


def refuse(found: Mapping[str, str]) -> QjaxError:
    """The error for parameters that cannot be quantized and that no rule leaves out."""
    told = "; ".join(f"{path} is {why}" for path, why in found.items())
    return QjaxError(f"cannot be quantized: {told}. A rule 'PATTERN=none' leaves such a parameter as it is")
