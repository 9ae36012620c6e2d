"""An adapter merged into its base: W' + s A B in float32, cast, a plain model again.

By default W' is what the codes of the base stand for, which the adapter was trained on; another base may be given, as the model
before it was quantized. Nothing is quantized again unless a recipe is named.
"""

import json
import re
import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from qjax.calibrate.tokens import Calibration
from qjax.checkpoints.huggingface import save_huggingface
from qjax.checkpoints.load import load
from qjax.checkpoints.packed import save
from qjax.checkpoints.peft import base_name, load_adapter
from qjax.checkpoints.shards import SHARD_BYTES
from qjax.driver.decoder import quantize
from qjax.errors import QjaxError, QjaxWarning
from qjax.files import listing, write_atomically
from qjax.folders import standing
from qjax.grammar import names
from qjax.lazy import materialised
from qjax.linear import dequantize, dequantize_tree, is_quantized, without_activations
from qjax.models.adapters import attach
from qjax.models.fingerprint import model_fingerprint
from qjax.models.model import Model
from qjax.models.parameters import flatten
from qjax.models.walk import TABLE
from qjax.untrusted import read_json, status

TRAINED_ON = "adapter_base.json"  # beside an adapter that qjax trained: name, recipe and fingerprint of its base, its start
CAST = 0.02  # relative distance of norms from which one is more than the other in another type
OTHER = 0.5  # relative distance of embeddings from which two models are not one before and after quantization


def write_base(folder: Path, base: Model, start: str) -> None:
    """Writes beside an adapter what it was trained on, and how it began."""
    told = {"name": base.name, "recipe": base.recipe, "fingerprint": model_fingerprint(base), "start": start}
    write_atomically(folder / TRAINED_ON, json.dumps(told, indent=1) + "\n")


def load_merge(base: Model, adapter: Path, target: Model | None = None) -> tuple[Model, Model]:
    """(the base with its adapter, what is to be written: that, or `target` with the adapter). Both may be lazy.

    Warns (QjaxWarning) where an adapter of PEFT's, which has no fingerprint, names another base. Raises QjaxError for one of
    another base, and for a target that the adapter does not belong to: of an adapter that makes up for its base (loftq, qera,
    pissa) any, of a base that a transform changed one without it, and one of another residual stream (a rotation's).
    """
    adapter = standing(adapter)
    adapters = load_adapter(adapter, base.config)
    if status(adapter / TRAINED_ON):
        told = read_json(adapter / TRAINED_ON)
        if told.get("fingerprint") != model_fingerprint(base):
            raise QjaxError(
                f"{adapter} was trained on {told.get('name')} ({told.get('recipe')}), not on {base.name} ({base.recipe}); give "
                "that base, and another model to merge into with --base"
            )
        if target is not None and told.get("start") in ("loftq", "qera", "pissa"):
            raise QjaxError(
                f"{adapter} began as {told['start']}, as part of what {base.name} lacks; added to {target.name} it would count "
                "twice: leave --base out"
            )
    elif (name := base_name(adapter)) and not _is_named(base, name):
        warnings.warn(
            f"{adapter} names {name} as its base, and is put on {base.name}; make sure that it is that model",
            QjaxWarning,
            stacklevel=2,
        )
    if target is not None and not _same_stream(base, target):
        raise QjaxError(
            f"the embeddings of {target.name} are others than those of {base.name} ({base.recipe}), which a rotation may have "
            "changed; merge into the base itself: leave --base out"
        )
    if target is not None and (name := _transform_of(base, target)):
        raise QjaxError(
            f"{base.name} ({base.recipe}) differs from {target.name} by {name}, which may have changed what its layers are "
            "given; merge into the base itself: leave --base out"
        )
    adapted = attach(base, adapters)
    return adapted, adapted if target is None else attach(target, adapters)


def _is_named(model: Model, name: str) -> bool:
    """Whether a model's name, a hub's or that of a folder or GGUF file, is this one, but for the type of a file's weights."""
    return bool(re.fullmatch(rf"{re.escape(name)}([.-](i?q\d\w*|b?f16|f32|mxfp4))?", Path(model.name).name, re.IGNORECASE))


def _transform_of(base: Model, target: Model) -> str:
    """The transform that a base's recipe names, or its norm that is another than the target's; "" for neither."""
    named = re.search(rf"\b({'|'.join(map(re.escape, names('transform')))})\b", base.recipe)
    ours, theirs = flatten(base.params), flatten(target.params)
    norms = (path for path in ours if path.endswith("norm/scale") and path in theirs)
    return named[1] if named else next((path for path in norms if not _near(ours[path], theirs[path])), "")


def _near(ours: object, theirs: object) -> bool:
    """Whether one array is the other, but for casts."""
    a, b = (np.asarray(materialised(each), np.float32) for each in (ours, theirs))
    return a.shape == b.shape and bool(np.linalg.norm(a - b) <= CAST * np.linalg.norm(b))


def _same_stream(base: Model, target: Model) -> bool:
    """Whether hidden states of one are those of the other, but for rounding: whether tokens are embedded alike."""
    ours, theirs = (materialised(flatten(model.params)[TABLE]) for model in (base, target))
    ours, theirs = (np.asarray(dequantize(each) if is_quantized(each) else each, np.float32) for each in (ours, theirs))
    return ours.shape == theirs.shape and bool(np.linalg.norm(ours - theirs) <= OTHER * np.linalg.norm(theirs))


def save_merged(
    folder: Path,
    merged: Model,
    *,
    dtype: str = "bfloat16",
    recipe: str | None = None,
    calibration: Calibration | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    beside: Path | None = None,
) -> Model:
    """Writes a plain folder of a model with adapters, in which they are added to its weights; with a recipe a packed one of
    that quantized anew. Returns the model in the folder.

    Warns (QjaxWarning) of activation formats, which a plain folder cannot say. Raises what `save_huggingface` and `quantize`
    raise.
    """
    activations = {str(leaf.activation) for leaf in flatten(merged.params).values() if getattr(leaf, "activation", None)}
    if activations:
        text = f"left out: layers round their inputs ({listing(sorted(activations))}), which a plain folder cannot say"
        warnings.warn(text, QjaxWarning, stacklevel=2)
        merged = merged._replace(params=without_activations(merged.params))
    if recipe is None:
        options = {"overwrite": overwrite, "shard_bytes": shard_bytes, "beside": beside}
        save_huggingface(folder, merged, dtype=dtype, **options)
        return load(folder, lazy=True)
    plain = merged._replace(params=dequantize_tree(materialised(merged.params), jnp.dtype(dtype)), recipe="none")
    save(folder, quantize(plain, recipe, calibration=calibration)[0], overwrite=overwrite, beside=beside)
    return load(folder, lazy=True)
