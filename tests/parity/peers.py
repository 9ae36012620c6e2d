"""The peer libraries' own GPTQ and AWQ behind a few functions in our terms: weights (in, out), codes from 0, zero points.

Each calls the library's code: its range observer, its accumulation of the Hessian, its GPTQ. Nothing is imported before it is
used, so a machine that has one library can compare with that one.
"""

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # or torch's threads spin and starve whatever else runs
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # on two cores GPTQModel's pool of threads is one too small without

import numpy as np
import pytest

IGNORED = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "FutureWarning", "UserWarning")]


class Layer(NamedTuple):
    """One quantized linear layer.

    codes (in, out); scales, zeros (groups, out), values (in, out) = (codes - zeros) * scales; hessian (in, in): the library's
    own, float32, before damping; seconds: of the quantization, the Hessian aside.
    """

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    values: np.ndarray
    hessian: np.ndarray
    seconds: float


def llm_compressor(
    weight: np.ndarray,
    inputs: np.ndarray | None = None,
    *,
    bits: int,
    group: int = 128,
    symmetric: bool = False,
    damp: float = 0.01,
    block: int = 128,
    act_order: bool = False,
    hessian: np.ndarray | None = None,
) -> Layer:
    """llm-compressor's GPTQ of weight (in, out) for inputs (tokens, in) or a given Hessian; groups are static."""
    import torch
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
    from llmcompressor.modifiers.gptq.helpers import accumulate_hessian, make_empty_hessian
    from llmcompressor.observers import Observer

    linear = _linear(weight)
    order = "static" if act_order else None
    arguments = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="group", group_size=group, actorder=order)
    with torch.no_grad():
        if hessian is None:
            total, samples = accumulate_hessian(_tensor(inputs), linear, make_empty_hessian(linear), torch.zeros(()))
            hessian = (total / samples).numpy()
        start = time.perf_counter()
        observer = Observer.load_from_registry("memoryless_minmax", base_name="weight", args=arguments)
        grid = observer(linear.weight).get_qparams()
        scale, zero = grid["scale"], grid["zero_point"]
        values, _, fallback = quantize_weight(
            weights=linear.weight.detach().clone()[None],
            hessians=_tensor(hessian)[None].clone(),  # it works in place
            scale=scale[None],
            zero_point=zero[None],
            global_scale=None,
            quant_args=arguments,
            blocksize=block,
            percdamp=damp,
        )
        seconds = time.perf_counter() - start
    assert not fallback.any(), "llm-compressor fell back to nearest rounding"
    return _layer(values[0], (scale, zero.float() + 2 ** (bits - 1)), group, hessian, seconds)


def gptqmodel(
    weight: np.ndarray,
    inputs: np.ndarray | None = None,
    *,
    bits: int,
    group: int = 128,
    symmetric: bool = False,
    damp: float = 0.01,
    block: int = 128,
    act_order: bool = False,
    group_aware: bool = False,
    static: bool = True,
    hessian: np.ndarray | None = None,
) -> Layer:
    """GPTQModel's GPTQ of the same, but for act_order with dynamic groups, whose scales are not those of runs of inputs.

    Its defaults, which are not the ones here, are group_aware, not static, symmetric, damp 0.05.
    """
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    linear = _linear(weight)
    config = QuantizeConfig(
        bits=bits,
        group_size=group,
        sym=symmetric,
        desc_act=act_order,
        act_group_aware=group_aware,
        static_groups=static,
        damp_percent=damp,
        offload_to_disk=False,
    )
    task = GPTQ(linear, config)
    task.quantizer.configure(perchannel=True)
    if hessian is None:
        task.add_batch(_tensor(inputs), None)
        hessian = task.finalize_hessian().numpy().copy()
    else:
        task.H, task.nsamples = _tensor(hessian).clone(), len(hessian)
    start = time.perf_counter()
    values, scale, zero, *_ = task.quantize(blocksize=block)
    seconds = time.perf_counter() - start
    return _layer(values, (scale, zero), group, hessian, seconds)


def awq_llm_compressor(folder, tokens: np.ndarray, *, bits: int, group: int, duo_scaling=True, batch: int = 8) -> dict:
    """llm-compressor's AWQ and nearest rounding (affine integers) of a Llama's blocks: path -> effective weight (in, out).

    Effective: with the scales that were folded into a neighbour undone, so that it stands in for the original weight of the
    original model, diag(1/s_in) Q(diag(s_in) W diag(1/s_out)) diag(s_out). tokens (windows, time).
    """
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache

    model = load_transformers(folder)
    scales_in, scales_out = {}, {}
    search = AWQModifier._compute_best_scale

    def record(self, mapping, *arguments):
        scales = search(self, mapping, *arguments)
        scales_in.update((name, scales.numpy()) for name in mapping.balance_names)
        scales_out[mapping.smooth_name] = scales.numpy()
        return scales

    recipe = [
        AWQModifier(duo_scaling=duo_scaling),
        QuantizationModifier(**_scheme(bits, group)),
    ]
    with (
        mock.patch.object(AWQModifier, "_compute_best_scale", record),
        mock.patch.object(IntermediatesCache, "pin_memory", return_value=None),  # it asks for an accelerator
    ):
        oneshot(folder, model, tokens, recipe, batch)
    found = {}
    for name, module in model.named_modules():
        if name in scales_in:
            value = fake_quantized(module)
            last = value.shape[1] - len(scales_out.get(name, []))
            value[:, last:] *= scales_out.get(name, 1)
            found[name] = value / scales_in[name][:, None]
    return found


def gptq_model_llm_compressor(
    folder, tokens: np.ndarray, *, bits: int = 4, group: int = 128, batch: int = 8, dtype: str = "float32"
) -> float:
    """Seconds of llm-compressor's GPTQ of a whole model, calibration included, loading and saving not."""
    from llmcompressor.modifiers.gptq import GPTQModifier

    model = load_transformers(folder, dtype)
    recipe = [GPTQModifier(**_scheme(bits, group))]
    start = time.perf_counter()
    oneshot(folder, model, tokens, recipe, batch)
    return time.perf_counter() - start


def gptq_model_gptqmodel(
    folder, tokens: np.ndarray, *, bits: int = 4, group: int = 128, batch: int = 8, dtype: str = "float32"
) -> float:
    """Seconds of GPTQModel's GPTQ of a whole model, calibration and packing included, loading and saving not."""
    import torch
    from gptqmodel import GPTQModel
    from gptqmodel.quantization import QuantizeConfig

    config = QuantizeConfig(bits=bits, group_size=group, sym=False, offload_to_disk=False)
    model = GPTQModel.load(str(folder), config, device="cpu", dtype=getattr(torch, dtype))
    windows = [{"input_ids": window.tolist(), "attention_mask": [1] * len(window)} for window in tokens]
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):  # it writes logs/
        start = time.perf_counter()
        model.quantize(windows, batch_size=batch)
        return time.perf_counter() - start


def save_random_llama(folder, *, hidden: int, mlp: int, layers: int, heads: int, vocabulary: int = 4096, context: int = 256):
    """A random Llama with an untied head and a byte-level tokenizer, as a checkpoint folder that every library loads."""
    import tokenizers
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=vocabulary,
        max_position_embeddings=context,
        bos_token_id=None,
        eos_token_id=256,
        tie_word_embeddings=False,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({letter: code for code, letter in enumerate(letters)}, []))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    options = {"eos_token": "</s>", "pad_token": "</s>"}  # GPTQModel wants a padding token
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **options).save_pretrained(folder)


def oneshot(folder, model, tokens: np.ndarray, recipe: list, batch: int) -> None:
    import torch
    import transformers
    from llmcompressor import oneshot

    windows = torch.from_numpy(tokens.astype(np.int64))
    rows = [{"input_ids": piece, "attention_mask": torch.ones_like(piece)} for piece in windows.split(batch)]
    loader = torch.utils.data.DataLoader(rows, batch_size=None)
    with _quiet():
        oneshot(
            model=model,
            processor=transformers.AutoTokenizer.from_pretrained(folder),
            dataset=loader,
            recipe=recipe,
            num_calibration_samples=len(tokens),
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No log lines of every layer, and no files of logs."""
    from loguru import logger

    logger.disable("llmcompressor")
    yield
    logger.enable("llmcompressor")


def load_transformers(folder, dtype: str = "float32"):
    """transformers' model of a checkpoint folder."""
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()


def losses_transformers(model, tokens: np.ndarray, batch_tokens: int = 2048) -> np.ndarray:
    """-ln p of every token but a window's first, float32: (windows, time) -> (windows, time - 1), by transformers' model."""
    import torch

    rows = []
    with torch.inference_mode():
        for piece in torch.from_numpy(tokens.astype(np.int64)).split(max(1, batch_tokens // tokens.shape[1])):
            logits = model(piece).logits[:, :-1].float()
            rows.append(torch.nn.functional.cross_entropy(logits.transpose(1, 2), piece[:, 1:], reduction="none"))
    return torch.cat(rows).numpy()


def _scheme(bits: int, group: int) -> dict:
    weights = {"num_bits": bits, "type": "int", "symmetric": False, "strategy": "group", "group_size": group}
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}


def fake_quantized(module) -> np.ndarray:
    """The (in, out) weight of a module as its scales and zero points round it."""
    import torch
    from compressed_tensors.quantization import forward_quantize

    with torch.no_grad():
        return forward_quantize(module, module.weight, "weight", module.quantization_scheme.weights).numpy().T.copy()


def _layer(values, grid, group: int, hessian: np.ndarray, seconds: float) -> Layer:
    values = values.detach().float().numpy().T
    scales, zeros = (np.ascontiguousarray(part.detach().float().numpy().T) for part in grid)
    by_row = np.arange(len(values)) // group
    codes = np.rint(values / scales[by_row] + zeros[by_row]).astype(int)
    return Layer(codes, scales, zeros.astype(int), values, np.asarray(hessian), seconds)


def _linear(weight: np.ndarray):
    import torch

    linear = torch.nn.Linear(*weight.shape, bias=False)
    linear.weight.data = _tensor(weight.T)
    return linear.requires_grad_(False)


def _tensor(array: np.ndarray):
    import torch

    return torch.from_numpy(np.array(array, np.float32, order="C"))
