"""What is quantized at once: a module with its parameters, seen as linear layers."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import flax.linen as nn
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, PyTree

from qjax.calibrate.capture import Batch, Captured, capture_statistics, outputs_of
from qjax.interception.contraction import KernelView
from qjax.interception.linen import quantized_kernels
from qjax.maps import InputMap
from qjax.methods import Memo
from qjax.models.decoder import products_of
from qjax.models.folding import Fold
from qjax.models.stacks import apart, spread, stack_of, together

NO_MAPS: Mapping[str, tuple[InputMap, ...]] = MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class Piece:
    """A module to quantize: a decoder's block, a half of it, or a whole Flax model.

    prefix: of its kernels' paths in the whole model. shared: for every linear layer, in the order of the calls, the first with
    the same input (`calibrate.capture.sharing`); may be empty where nothing is calibrated. folds: which layers' input scale
    goes where. stacks: kernels that hold several layers, and how many: each of them is a layer of its own here, with a path
    (`models/stacks.py`), a view and a leaf. stream: paths of kernels that read the residual stream of a model that is
    rotated.
    """

    module: nn.Module
    prefix: str
    params: PyTree
    views: Mapping[str, KernelView]
    shared: Mapping[str, str]
    folds: tuple[Fold, ...] = ()
    stacks: Mapping[str, int] = dataclasses.field(default_factory=dict)
    stream: frozenset[str] = frozenset()

    def leaves(self) -> dict[str, Array]:
        """The parameters by path, layers of stacks one by one."""
        return apart(flatten_dict(self.params, sep="/"), self.stacks)

    def tree(self, leaves: Mapping[str, object]) -> PyTree:
        """The module's parameters, of leaves by path."""
        return unflatten_dict(together(leaves, self.stacks), sep="/")

    def kernel_of(self, path: str) -> str:
        """The path of the kernel that holds a layer."""
        whole = stack_of(path)
        return whole if whole in self.stacks else path

    def matrix(self, path: str, kernel: Array, memo: Memo | None = None) -> Float[Array, "in out"]:
        """A kernel as a float32 matrix; memo: once for the same kernel."""
        view = self.views[path]
        return _float_matrix(kernel, view=view) if memo is None else memo.get(_float_matrix, kernel, view=view)

    def capture(
        self,
        params: PyTree,
        batches: Sequence[Batch],
        needed: Mapping[str, int],
        names: Iterable[str],
        exact: tuple[PyTree, Iterable[Batch]] | None = None,
        *,
        keep_outputs: bool = False,
        keep_results: Sequence[str] = (),
        keep_exact: Sequence[str] = (),
        through: Mapping[str, tuple[InputMap, ...]] = NO_MAPS,
    ) -> Captured:
        """`capture_statistics` of the piece with these parameters. through: maps of all layers in `needed`, by the layer."""
        how = {"prefix": self.prefix, "stacks": self.stacks}
        how |= {"keep_outputs": keep_outputs, "keep_results": keep_results, "keep_exact": keep_exact}
        if through:  # members of a stack that have none stand out, and `together` says so
            stacks = {path: count for path, count in self.stacks.items() if path in needed}
            how["through"] = together(spread(dict.fromkeys(stacks, ()), stacks) | through, stacks)
        return capture_statistics(self.module, params, batches, needed, names, exact, **how)

    def apply(self, params: PyTree, *args: object) -> object:
        """What the piece makes of the arguments with these parameters."""
        with quantized_kernels(products_of(self.module)):
            return self.module.apply({"params": params}, *args)

    def outputs(self, batches: Iterable[Batch]) -> list[Array]:
        """The unquantized piece's outputs, the first array of each."""
        return outputs_of(self.module, self.params, batches)


def _float_matrix(kernel: Array, *, view: KernelView) -> Float[Array, "in out"]:
    return view.to_matrix(kernel).astype(jnp.float32)
