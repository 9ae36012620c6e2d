"""Keys and values of a quantized cache in float64 numpy, token by token: what each query sees, by KIVI's code."""

import numpy as np


def rounded_group(x: np.ndarray, bits: int) -> np.ndarray:
    """A group by min and max, both parameters float16."""
    low, high = x.min(), x.max()
    scale, low = (float(np.float16(np.float32(each))) for each in ((high - low) / (2**bits - 1), low))
    return (np.clip(np.round((x - low) / scale), 0, 2**bits - 1) if scale else np.zeros_like(x)) * scale + low


def seen_by(t: int, keys: np.ndarray, values: np.ndarray, bits: int, group: int, residual: int) -> tuple:
    """Keys and values (tokens, dim) of one head as token t sees them, 0 ... t: a cache that grows by one token a step."""
    seen_keys, seen_values = (np.float16(x[: t + 1]).astype(np.float64) for x in (keys, values))
    flushed = 0
    for step in range(t):  # after the attention of each earlier token
        if step + 1 - flushed == residual:
            for start in range(flushed, step + 1, group):
                for channel in range(keys.shape[1]):
                    part = slice(start, start + group), channel
                    seen_keys[part] = rounded_group(seen_keys[part], bits)
            flushed = step + 1
        if step - residual >= 0:
            for start in range(0, values.shape[1], group):
                part = step - residual, slice(start, start + group)
                seen_values[part] = rounded_group(seen_values[part], bits)
    return seen_keys, seen_values
