"""What is quantized at once: a module with its parameters, seen as linear layers."""

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from qjax.interception.contraction import KernelView
from qjax.methods import Memo
from qjax.models.folding import Fold


@dataclasses.dataclass(frozen=True)
class Piece:
    """A module to quantize: a decoder's block, a half of it, or a whole Flax model.

    prefix: of its kernels' paths in the whole model. shared: for every linear layer, in the order of the calls, the first with
    the same input (`calibrate.capture.sharing`); may be empty where nothing is calibrated. folds: which layers' input scale
    goes where. stream: paths of kernels that read the residual stream of a model that is rotated.
    """

    module: nn.Module
    prefix: str
    params: PyTree
    views: Mapping[str, KernelView]
    shared: Mapping[str, str]
    folds: tuple[Fold, ...] = ()
    stream: frozenset[str] = frozenset()

    def matrix(self, path: str, kernel: Array, memo: Memo | None = None) -> Float[Array, "in out"]:
        """A kernel as a float32 matrix; memo: once for the same kernel."""
        view = self.views[path]
        return _float_matrix(kernel, view=view) if memo is None else memo.get(_float_matrix, kernel, view=view)


def _float_matrix(kernel: Array, *, view: KernelView) -> Float[Array, "in out"]:
    return view.to_matrix(kernel).astype(jnp.float32)
