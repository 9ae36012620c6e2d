"""Layers as AWQ, bitsandbytes, compressed-tensors, DeepSeek, ModelOpt, OpenAI store them, for `foreign.write`: random codes."""

import json
import math

import ml_dtypes
import numpy as np

from qjax.codebooks import NF4_VALUES
from qjax.scales import dynamic_map
from tests.foreign import Maker, words

FP4_BNB = np.float32([0, 0.0625, 8, 12, 4, 6, 2, 3, -0.0, -0.0625, -8, -12, -4, -6, -2, -3]) / np.float32(12)
E2M1 = np.float32([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of AWQ's columns in a word


class F8:
    """Marks bytes that a file calls E4M3 (or another type), which safetensors' NumPy half cannot write."""

    def __init__(self, stored: np.ndarray, name: str = "F8_E4M3") -> None:
        self.stored, self.name = stored, name


def _grid(generator, rows: int, columns: int, group: int, bits: int, dtype=np.float16):
    groups = 1 if group == -1 else math.ceil(rows / group)
    codes = generator.integers(0, 2**bits, (rows, columns))
    zeros = generator.integers(0, 2**bits, (groups, columns))
    scales = (generator.uniform(0.5, 1, (groups, columns)) * 0.05).astype(dtype)
    index = np.arange(rows) // (rows if group == -1 else group)
    value = scales.astype(np.float32)[index] * (codes - zeros[index]).astype(np.float32)
    return codes, zeros, scales, value


def awq(seed: int = 0, *, group: int = 16, version: str = "gemm") -> Maker:
    """AutoAWQ's packing, word by word."""
    generator = np.random.default_rng(seed)

    def packed(columns: np.ndarray) -> np.ndarray:
        found = np.zeros((len(columns), columns.shape[1] // 8), np.uint32)
        for place, column in enumerate(ORDER):
            found |= columns[:, column::8].astype(np.uint32) << np.uint32(4 * place)
        return found.view(np.int32)

    def make(module, weight):
        columns, rows = weight.shape
        codes, zeros, scales, value = _grid(generator, rows, columns, group, 4)
        if version == "gemm":
            return {"qweight": packed(codes), "qzeros": packed(zeros), "scales": scales}, value.T
        size = rows if group == -1 else group
        multiple = {64: 2, 32: 4}.get(size, 1)
        width = math.ceil(math.ceil(rows // size / 8) / multiple) * multiple
        padded = np.zeros((columns, width * 8), np.float16)
        padded[:, : len(scales)] = scales.T
        whole = np.zeros((width * 8, columns), int)
        whole[: len(zeros)] = zeros
        return {"qweight": words(codes, 4).T, "qzeros": words(whole, 4).T, "scales": padded}, value.T

    return make


def bitsandbytes(seed: int = 0, *, kind: str = "nf4", block: int = 64, nested: bool = False, storage=np.uint8) -> Maker:
    """Four bits: blocks of the flattened weight."""
    generator = np.random.default_rng(seed)
    table = np.float32(NF4_VALUES) if kind == "nf4" else FP4_BNB

    def make(module, weight):
        codes = generator.integers(0, 16, weight.size).astype(np.uint8)
        blocks = math.ceil(weight.size / block)
        absmax = generator.uniform(0.05, 0.2, blocks).astype(np.float32)
        state = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": list(weight.shape)}
        tensors = {
            "weight": (codes[::2] << 4 | codes[1::2]).view(storage)[:, None],
            "weight.absmax": absmax,
            "weight.quant_map": table,
        }
        if nested:
            inner = generator.integers(0, 256, blocks).astype(np.uint8)
            largest = generator.uniform(0.01, 0.1, math.ceil(blocks / 256)).astype(np.float32)
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.1250001}
            tensors |= {"weight.absmax": inner, "weight.nested_absmax": largest, "weight.nested_quant_map": dynamic_map()}
            absmax = dynamic_map()[inner] * largest.repeat(256)[:blocks] + np.float32(0.1250001)
        content = np.frombuffer(json.dumps(state).encode(), np.uint8)
        tensors[f"weight.quant_state.bitsandbytes__{kind}"] = content
        value = (table[codes] * absmax.repeat(block)[: weight.size]).reshape(weight.shape)
        return tensors, value

    return make


def int8(seed: int = 0) -> Maker:
    """bitsandbytes' int8."""
    generator = np.random.default_rng(seed)

    def make(module, weight):
        codes = generator.integers(-127, 128, weight.shape).astype(np.int8)
        scb = generator.uniform(1, 2, len(weight)).astype(np.float32)
        value = codes * (scb * np.float32(7.874015718698502e-3))[:, None]
        return {"weight": codes, "SCB": scb, "weight_format": np.zeros((), np.uint8)}, value

    return make


def integers(
    seed: int = 0, *, bits=4, group=16, symmetric=True, packed=True, padded=False, dtype=ml_dtypes.bfloat16, ordered=False
) -> Maker:
    """compressed-tensors' integers; padded: words of whole codes, as before June 2026; group -1 channels, 0 a tensor."""
    generator = np.random.default_rng(seed)

    def pack(codes: np.ndarray) -> np.ndarray:
        """(n, m) -> (m, words)."""
        if not padded:
            return words(codes, bits).T
        each = 32 // bits
        whole = np.pad(codes, ((0, -len(codes) % each), (0, 0))).reshape(-1, each, codes.shape[1]).astype(np.uint32)
        return sum(whole[:, i] << np.uint32(i * bits) for i in range(each)).astype(np.uint32).view(np.int32).T

    def make(module, weight):
        columns, rows = weight.shape
        codes, zeros, scales, _ = _grid(generator, rows, columns, group or -1, bits, dtype)
        middle = 2 ** (bits - 1)
        zeros[:] = middle if symmetric else zeros
        scales = scales if group else scales[:, :1]
        index = np.arange(rows) // (rows if group < 1 else group)
        index = generator.permutation(index) if ordered else index
        value = scales.astype(np.float32)[index] * (codes - zeros[index]).astype(np.float32)
        tensors = {"weight_scale": scales.T if group else scales.reshape(1)}
        if packed:
            tensors |= {"weight_packed": pack(codes), "weight_shape": np.array([columns, rows])}
        else:
            tensors["weight"] = (codes - middle).astype(np.int8).T
        if not symmetric:
            tensors["weight_zero_point"] = pack(zeros.T).T if packed else (zeros - middle).astype(np.int8).T
        return tensors | ({"weight_g_idx": index.astype(np.int32)} if ordered else {}), value.T

    return make


def fp8(seed: int = 0, *, kind: str = "channel", name: str = "weight_scale", dtype=np.float32, static=False) -> Maker:
    """E4M3 with a scale for the tensor, a channel ("row": without an axis for groups), or a tile of 128 x 128."""
    generator = np.random.default_rng(seed)

    def make(module, weight):
        stored = generator.integers(0, 256, weight.shape).astype(np.uint8)
        stored[(stored & 127) == 127] = 0
        columns, tiles = len(weight), tuple(math.ceil(n / 128) for n in weight.shape)
        shape = {"channel": (columns, 1), "row": (columns,), "tensor": (1,), "block": tiles}[kind]
        scales = generator.uniform(1e-3, 2e-3, shape).astype(dtype)
        values = stored.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        every = scales.astype(np.float32).reshape(columns, 1) if kind == "row" else scales.astype(np.float32)
        if kind == "block":
            every = every.repeat(128, 0).repeat(128, 1)[: weight.shape[0], : weight.shape[1]]
        tensors = {"weight": F8(stored), name: scales}
        return tensors | ({"input_scale": np.float32([0.05])} if static else {}), values * every

    return make


def fp4(
    seed: int = 0,
    *,
    kind: str = "nvfp4",
    whole: str = "weight_global_scale",
    packed: str = "weight_packed",
    more: dict[str, np.ndarray] | None = None,
) -> Maker:
    """E2M1 pairs with E4M3 scales, divided by one number or (weight_scale_2) times one, or with E8M0 scales; more tensors."""
    generator = np.random.default_rng(seed)

    def make(module, weight):
        codes = generator.integers(0, 16, weight.shape).astype(np.uint8)
        tensors = {packed: codes[:, ::2] | codes[:, 1::2] << 4}
        if kind == "mxfp4":
            stored = generator.integers(118, 124, (len(weight), weight.shape[1] // 32)).astype(np.uint8)
            scales = np.exp2(stored.astype(np.float32) - 127)
            return tensors | {"weight_scale": stored}, E2M1[codes] * scales.repeat(32, 1)
        stored = generator.integers(40, 127, (len(weight), weight.shape[1] // 16)).astype(np.uint8)
        number = np.float32(3000.7 if whole == "weight_global_scale" else 3.3e-4)
        scales = stored.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        scales = scales / number if whole == "weight_global_scale" else scales * number
        tensors |= {"weight_scale": F8(stored), whole: number.reshape(1) if whole == "weight_global_scale" else number}
        return tensors | (more or {}), E2M1[codes] * scales.repeat(16, 1)

    return make


def experts(seed: int = 0, *, least: int = 121, most: int = 125) -> Maker:
    """gpt-oss' experts in MXFP4, pair by pair, with scales of 2^(least - 127) to 2^(most - 128); other layers are plain."""
    generator = np.random.default_rng(seed)

    def make(module, weight):
        if weight.ndim < 3:
            return None
        *outer, rows = weight.shape
        codes = generator.integers(0, 16, weight.shape)
        scales = generator.integers(least, most, (*outer, rows // 32))
        blocks = np.zeros((*outer, rows // 32, 16), np.uint8)
        for place in range(rows):
            group, within = divmod(place, 32)
            blocks[..., group, within // 2] += (codes[..., place] * 16 ** (within % 2)).astype(np.uint8)
        values = E2M1[codes] * np.exp2(scales.repeat(32, axis=-1) - 127.0).astype(np.float32)
        return {"blocks": blocks, "scales": scales.astype(np.uint8)}, values

    return make
