"""Programs in float64: what a function computes in float32, again with float64 in every float32's place.

The decoder's norms, softmax and sums are in float32 by design, so no argument makes it compute in float64; its program can.
"""

from collections.abc import Callable, Sequence

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np

HALVES = (jnp.bfloat16, jnp.float16)
INNER = ("jaxpr", "call_jaxpr")  # parameters of primitives that call a program: what is compiled or differentiated apart
TYPES = ("dtype", "new_dtype", "preferred_element_type")  # parameters that name an element type


def in_float64(function: Callable, *arguments: object) -> np.ndarray:
    """function(*arguments), an array; traced with float32 in the place of float64, computed with float64 in that of float32."""
    program, leaves = jax.make_jaxpr(function)(*jax.tree.map(_single, arguments)), jax.tree.leaves(arguments)
    with jax.enable_x64(True):
        (result,) = _evaluated(program, [_double(leaf) for leaf in leaves])
        assert result.dtype == jnp.float64
        return np.asarray(result)


def _single(x: object) -> np.ndarray:
    x = np.asarray(x)
    return x.astype(np.float32) if x.dtype == np.float64 else x


def _double(x: object) -> object:
    dtype = getattr(x, "dtype", None)
    assert dtype not in HALVES, "a rounding in between"
    return jnp.asarray(x, jnp.float64) if dtype == np.float32 or isinstance(x, float) else x


def _evaluated(program: jax.extend.core.ClosedJaxpr, arguments: Sequence[object]) -> list:
    jaxpr = program.jaxpr
    values = dict(zip(jaxpr.constvars, map(_double, program.consts), strict=True))
    values.update(zip(jaxpr.invars, arguments, strict=True))
    for equation in jaxpr.eqns:
        given = [_double(each.val) if hasattr(each, "val") else values[each] for each in equation.invars]
        found = _applied(equation, given)
        assert all(each.dtype not in HALVES for each in found if hasattr(each, "dtype")), "a rounding in between"
        values.update(zip(equation.outvars, found, strict=True))
    return [_double(each.val) if hasattr(each, "val") else values[each] for each in jaxpr.outvars]


def _applied(equation: jax.extend.core.JaxprEqn, given: list) -> list:
    for name in INNER:
        if (inner := equation.params.get(name)) is not None:
            assert equation.primitive.name in ("jit", "pjit", "custom_jvp_call", "closed_call"), equation.primitive.name
            return _evaluated(inner, given)
    params = {k: np.dtype(np.float64) if k in TYPES and v == np.float32 else v for k, v in equation.params.items()}
    found = equation.primitive.bind(*given, **params)
    return found if equation.primitive.multiple_results else [found]
