"""y = x W with a quantized W: the public multiply, and its choice of implementation.

`reference` decodes the weight and multiplies; it serves every format, device and shape, and is the oracle for the others. `xla`
decodes a part of the weight at a time; `pallas_tpu` and `pallas_gpu` are kernels. `auto` takes the first of the device's
implementations (`PREFERRED`) that serves the weight; one that is asked for by name serves it or says why not.

The derivative with respect to x multiplies with the packed weight, transposed. With respect to scales it goes through the
decoded weight; compiled programs leave that out where nobody asks for it. Forward-mode derivatives (jvp) are for `reference`.

The device is JAX's default backend, not where an array lies: on a machine with an accelerator a product on its CPU needs
implementation="xla".
"""

import dataclasses
import functools
import importlib
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import PrecisionLike
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8

from qjax.errors import QjaxError
from qjax.kernels import layout, xla
from qjax.kernels.layout import KernelWeight
from qjax.qtensor import QTensor, dequantize, unpack_codes, unpack_parameters

IMPLEMENTATIONS = ("auto", "reference", "xla", "pallas_tpu", "pallas_gpu")
PREFERRED = {"cpu": ("xla",), "tpu": ("pallas_tpu", "xla"), "gpu": ("pallas_gpu", "xla")}
KERNELS = {"pallas_tpu": "tpu", "pallas_gpu": "gpu"}  # the device that each runs on, and its module
ACTIVATIONS = "int8-token"


class _Choice(NamedTuple):
    """What a product is computed by; static. activations: None, or "int8-token"."""

    implementation: str
    precision: PrecisionLike
    activations: str | None


def matmul(
    x: Float[Array, "*batch in"],
    q: QTensor | KernelWeight,
    *,
    implementation: str = "auto",
    precision: PrecisionLike = None,
    activations: str | None = None,
) -> Float[Array, "*batch out"]:
    """x (..., in), float32 or bfloat16, times a quantized (in, out) weight, in x's type; sums are float32.

    implementation: "auto", "reference", "xla", "pallas_tpu" or "pallas_gpu". precision: as in jnp.matmul, for the two that
    use it. activations: "int8-token" rounds every row of x to int8 by its largest value and multiplies with the int8 codes
    of an int8-channel-sym weight, in integers (W8A8); its derivative is that of the product without the rounding
    (straight-through). A stack of weights (..., in, out) is decoded and multiplied as jnp.matmul does; under vmap or scan its
    weights come one by one. Sums are taken before their scale: x of magnitudes above 1e33 may overflow. On CPUs with fast
    products of int8 some rows of x may be rounded to 16 bits a group, and rows of bfloat16 meet weights rounded to it (`xla`),
    unless precision is "highest".

    Kernels read a layout of their own (KernelWeight), which a QTensor is brought into in every call: `qjax.prepare(q)` does it
    once, outside the hot loop.

    Raises QjaxError for an unknown implementation, one that cannot serve this weight or device, with the reason, for x that
    is not floating point, and when x's last axis is not the weight's input axis.
    """
    if implementation not in IMPLEMENTATIONS:
        raise QjaxError(f"matmul: unknown implementation {implementation!r}; allowed: {', '.join(IMPLEMENTATIONS)}")
    if not isinstance(q, QTensor | KernelWeight):
        raise QjaxError(
            f"matmul: the weight is a {type(q).__name__}; expected a QTensor or KernelWeight (a Linear: qjax.apply_linear)"
        )
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise QjaxError(f"matmul: x is {x.dtype}, expected floating point; cast it first")
    if not x.ndim or x.shape[-1] != q.in_features:
        raise QjaxError(f"matmul: x has shape {x.shape}, the weight {q.shape} expects (..., {q.in_features})")
    if activations not in (None, ACTIVATIONS):
        raise QjaxError(f"matmul: unknown activations {activations!r}; allowed: {ACTIVATIONS}")
    if q.shape[:-2]:
        if implementation not in ("auto", "reference") or activations:
            asked = f"activations={activations}" if activations else implementation
            raise QjaxError(f"matmul: {asked} is for one weight, got a stack of shape {q.shape}; use jax.vmap")
        return jnp.matmul(x, _decoded(q, x.dtype), precision=precision)
    chosen = choose(implementation, x.dtype, q, activations=activations)
    if chosen == "reference":
        if activations:
            return _reference_int8(x, *tokens_int8(jax.lax.stop_gradient(x)), q)
        return jnp.matmul(x, _decoded(q, x.dtype), precision=precision)
    if chosen in KERNELS and isinstance(q, QTensor):
        q = layout.prepare(q)
    y = _multiply(x.reshape(-1, x.shape[-1]), q, _Choice(chosen, precision, activations))
    return y.reshape(*x.shape[:-1], y.shape[-1])


def matmul_codes(
    x: Float[Array, "*batch in"],
    codes: Int8[Array, "*batch in"],
    scale: Float[Array, "*batch 1"],
    q: QTensor | KernelWeight,
    *,
    implementation: str = "auto",
) -> Float[Array, "*batch out"]:
    """(codes * scale) W in x's type, in integers (int8 x int8, sums in int32), for an int8-channel-sym weight.

    x is what the codes stand for: the derivative is that of x W. Raises QjaxError as `matmul` does.
    """
    chosen = choose(implementation, x.dtype, q, activations=ACTIVATIONS)
    if chosen == "reference":
        return _reference_int8(x, codes, scale, q)
    if chosen in KERNELS and isinstance(q, QTensor):
        q = layout.prepare(q)
    rows = (x.reshape(-1, x.shape[-1]), codes.reshape(-1, x.shape[-1]), scale.reshape(-1, 1))
    return _multiply_codes(*rows, q, chosen).reshape(*x.shape[:-1], q.shape[-1])


def choose(implementation: str, dtype: DTypeLike, q: QTensor | KernelWeight, *, activations: str | None = None) -> str:
    """What `implementation` stands for with x of this type, this weight and JAX's default device.

    Raises QjaxError, with the reason, where the one that was asked for cannot serve.
    """
    if implementation != "auto":
        if reason := _refusal(implementation, dtype, q, activations):
            raise QjaxError(f"matmul: {implementation} cannot serve this product: {reason}")
        return implementation
    for name in (*PREFERRED.get(jax.default_backend(), ("xla",)), "reference"):
        if not (reason := _refusal(name, dtype, q, activations)):
            return name
    raise QjaxError(f"matmul: nothing serves this product: {reason}")


def _refusal(name: str, dtype: DTypeLike, q: QTensor | KernelWeight, activations: str | None) -> str | None:
    """Why an implementation cannot serve, or None."""
    if activations and (reason := refusal_of_int8(q)):
        return reason
    if name == "reference":
        return None
    if name == "xla":
        return "a weight laid out for a kernel; give the QTensor" if isinstance(q, KernelWeight) else xla.refusal(q)
    device = KERNELS[name]
    if jax.default_backend() != device:
        return f"it needs a {device.upper()}, JAX's default device is a {jax.default_backend().upper()}"
    if isinstance(q, QTensor):
        if reason := layout.refusal(q):
            return reason
        q = jax.eval_shape(layout.prepare, q)
    return _kernels(name).refusal(dtype, q)


def refusal_of_int8(q: QTensor | KernelWeight) -> str | None:
    """Why a weight cannot be multiplied with int8 activations in integers, or None."""
    fmt = q.format
    fits = fmt.grid == "int8" and fmt.symmetric and fmt.granularity == "channel"
    return None if fits else f"activations={ACTIVATIONS} needs a weight in int8-channel-sym, got {fmt}"


def _kernels(name: str) -> ModuleType:
    return importlib.import_module(f"qjax.kernels.{KERNELS[name]}")  # Pallas takes a while to import


def _decoded(q: QTensor | KernelWeight, dtype: DTypeLike = jnp.float32) -> Float[Array, "*batch in out"]:
    return (layout.dequantize if isinstance(q, KernelWeight) else dequantize)(q, dtype)


def tokens_int8(x: Float[Array, "*rows in"]) -> tuple[Int8[Array, "*rows in"], Float[Array, "*rows 1"]]:
    """Rows rounded to int8, and the float32 scale of each."""
    scale = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=-1, keepdims=True) / 127
    scale = jnp.where(scale == 0, 1.0, scale)
    return jnp.clip(jnp.round(x / scale), -127, 127).astype(jnp.int8), scale


def _reference_int8(x, rounded, scale, q: QTensor | KernelWeight) -> Float[Array, "*batch out"]:
    """W8A8 by XLA's product of integers, straight-through in x: the oracle."""
    if isinstance(q, KernelWeight):
        codes, scales = layout.dequantize(dataclasses.replace(q, scales=jnp.ones_like(q.scales))), q.scales
    else:
        codes, scales = unpack_codes(q).astype(jnp.int32) - 128, unpack_parameters(q)[0]
    total = jnp.matmul(rounded, codes.astype(jnp.int8), preferred_element_type=jnp.int32)
    exact = total * scale * scales.reshape(-1).astype(jnp.float32)
    through = jnp.matmul(x, _decoded(q, x.dtype))
    return jax.lax.stop_gradient(exact.astype(x.dtype)) + (through - jax.lax.stop_gradient(through))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _multiply(x: Float[Array, "rows in"], q: QTensor | KernelWeight, choice: _Choice) -> Float[Array, "rows out"]:
    module = _kernels(choice.implementation) if choice.implementation in KERNELS else xla
    if not len(x):
        return jnp.zeros((0, q.shape[-1]), x.dtype)
    if choice.activations:
        return module.multiply_int8(*tokens_int8(x), q).astype(x.dtype)
    return xla.multiply(x, q, precision=choice.precision) if module is xla else module.multiply(x, q)


def _forward(x, q, choice):
    return _multiply(x, q, choice), (x, q)


def _backward(choice, saved, dy):
    x, q = saved
    if not len(x):
        dx = jnp.zeros_like(x)
    elif choice.implementation in KERNELS:
        dx = _kernels(choice.implementation).multiply_transposed(dy, q)
    else:
        dx = xla.multiply_transposed(dy, q, precision=choice.precision)
    decoded, to_weight = jax.vjp(_decoded, q)
    weight = jnp.matmul(x.astype(jnp.float32).T, dy.astype(jnp.float32), precision=choice.precision)
    return _summed_like(dx, x), *to_weight(_summed_like(weight, decoded))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _multiply_codes(x, codes, scale, q: QTensor | KernelWeight, implementation: str) -> Float[Array, "rows out"]:
    if not len(x):
        return jnp.zeros((0, q.shape[-1]), x.dtype)
    module = _kernels(implementation) if implementation in KERNELS else xla
    return module.multiply_int8(codes, scale, q).astype(x.dtype)


def _forward_codes(x, codes, scale, q, implementation):
    return _multiply_codes(x, codes, scale, q, implementation), (x, q)


def _backward_codes(implementation, saved, dy):
    dx, dq = _backward(_Choice(implementation, None, ACTIVATIONS), saved, dy)
    return dx, None, None, dq


_multiply_codes.defvjp(_forward_codes, _backward_codes)


def _summed_like(cotangent: Array, primal: Array) -> Array:
    """Under shard_map: the sum over the mesh axes along which the primal value is the same."""
    axes = layout.varying_axes(cotangent) - layout.varying_axes(primal)
    return jax.lax.psum(cotangent, tuple(axes)) if axes else cotangent


_multiply.defvjp(_forward, _backward)
