"""Names of tensors in files that other tools wrote: wrappers that are taken off, and what weights of a quantizer look like."""

import re
from collections.abc import Collection, Iterable, Mapping

from qjax.checkpoints.tensors import Header
from qjax.models.family import LM_HEAD, Family, StoredTensor, head_name

WRAPPERS = ("base_model.model.", "_orig_mod.", "module.", "language_model.")  # of PEFT, torch.compile, DDP, multimodal models
QUANTIZERS = (  # what ends the names of a quantizer's tensors, whose they are
    (r"\.(qweight|qzeros|g_idx)$", "GPTQ or AWQ"),
    (r"\.(SCB|weight_format)$", "bitsandbytes, 8 bits"),
    (r"\.(absmax|quant_map|quant_state\..*|nested_absmax)$", "bitsandbytes, 4 bits"),
    (r"\.(weight_packed|weight_scale|weight_scale_inv|weight_zero_point|input_scale)$", "compressed-tensors or FP8"),
    (r"\.lora_[AB]\.", "LoRA"),
    (r"_(blocks|scales)$", "MXFP4"),
)


def canonical(
    family: Family, tensors: Iterable[StoredTensor], headers: Mapping[str, Header], modules: Mapping[str, object]
) -> dict[str, Header]:
    """Headers under their full names, without constants: where a checkpoint leaves the family's prefix out, has the head's name
    in transformers, and where all names begin with wrappers that, taken off, leave names of the family. modules: those that
    may hold tensors of a quantizer.
    """
    known, head = {tensor.name for tensor in tensors}, head_name(family).removesuffix(".weight")

    def is_known(name: str) -> bool:
        return name in known or owner_of(name, modules) is not None

    def full(name: str, among: Iterable[str]) -> str:
        stored = re.sub(rf"^{LM_HEAD}\.", f"{head}.", name)
        name = name if stored in among else stored
        long = family.prefix + name
        return long if is_known(long) and long not in among else name

    def renamed(cut: int) -> dict[str, Header]:
        short = {name[cut:]: header for name, header in headers.items()}
        return {full(name, short): each for name, each in short.items() if not re.search(family.ignored, name)}

    found = renamed(0)
    cut = len(_shared_wrappers(headers))
    unwrapped = renamed(cut) if cut else {}
    return max(found, unwrapped, key=lambda names: sum(map(is_known, names)))


def _shared_wrappers(names: Iterable[str]) -> str:
    """The wrappers, one inside the other, that all names begin with."""
    names, shared = list(names), ""
    while found := next((each for each in WRAPPERS if names and all(n.startswith(shared + each) for n in names)), None):
        shared += found
    return shared


def owner_of(name: str, modules: Mapping[str, object]) -> str | None:
    """The module whose name a tensor's begins with; of experts that are stored as one tensor, the name without _blocks or
    _scales.
    """
    if (stack := re.sub(r"_(blocks|scales)$", "", name)) != name and stack in modules:
        return stack
    while "." in name:
        name = name.rpartition(".")[0]
        if name in modules:
            return name
    return None


def quantizer_of(names: Collection[str]) -> str:
    """Whose quantized weights (or adapters) the tensors are, with one of their names; "" for none."""
    for pattern, whose in QUANTIZERS:
        if name := next((name for name in names if re.search(pattern, name)), None):
            return f"{whose}: {name}"
    return ""
