"""The range of every number of a model's configuration: what any model might have, and a mistake has not."""

import dataclasses

from qjax.errors import QjaxError

SIZE = 2**31 - 1  # what int32 positions and tokens can count
RANGES = {  # of every number of a configuration, both ends included: what any model might have, and a mistake has not
    "vocabulary_size": (1, 2**24),
    "hidden_size": (1, 2**20),
    "mlp_size": (1, 2**22),
    "layers": (1, 2**10),
    "heads": (1, 2**14),
    "kv_heads": (1, 2**14),
    "head_dim": (1, 2**16),
    "experts": (0, 2**12),
    "experts_per_token": (0, 2**12),
    "context": (2, 2**27),
    "norm_epsilon": (1e-20, 0.1),
    "rope_theta": (1.0, 1e15),
    "sliding_window": (1, SIZE),
    "bos_id": (0, SIZE),
    "eos_id": (0, SIZE),
    "rotary_fraction": (1e-3, 1.0),
    "position_offset": (0, 2**16),
    "factor": (1e-3, 1e6),
    "low_frequency_factor": (1e-3, 1e6),
    "high_frequency_factor": (1e-3, 1e6),
    "original_context": (2, 2**27),
    "attention_scale": (1e-6, 1e3),
    "attention_softcap": (1e-3, 1e9),
    "logit_softcap": (1e-3, 1e9),
    "embedding_scale": (1e-9, 1e9),
    "residual_scale": (1e-9, 1e9),
    "logit_scale": (1e-9, 1e9),
    "fast_turns": (1e-3, 1e6),
    "slow_turns": (1e-3, 1e6),
    "amplitude": (1e-3, 1e3),
    "mscale": (0.0, 1e3),
    "mscale_all_dim": (0.0, 1e3),
}


def check_ranges(values: object) -> None:
    """Raises QjaxError that lists every number of a dataclass, by `RANGES`, that is out of its range or of another type."""
    problems = []
    for field in dataclasses.fields(values):
        value = getattr(values, field.name)
        if field.name not in RANGES or (value is None and field.default is None):
            continue
        low, high = RANGES[field.name]
        if type(value) not in ((int,) if isinstance(low, int) else (int, float)) or not low <= value <= high:
            problems.append(f"{field.name} is {value!r}, expected {low} to {high}")
    if problems:
        raise QjaxError(f"model configuration: {'; '.join(problems)}")
