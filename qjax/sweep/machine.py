"""Which kind of machine a figure is from: rows of equal keys hold equal figures only where the same instructions ran.

XLA chooses code by the instruction sets and splits sums over the cores that a process may use. So the kind names
the processor (with family, model and stepping, which the names of virtual machines hide), the instruction sets that change
arithmetic, and the number of cores.
"""

import os
import platform
from collections.abc import Mapping
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
SETS = (  # of vector arithmetic, as Linux names them
    *("avx", "avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni", "amx_tile", "amx_int8"),
    *("amx_bf16", "asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve", "sve2"),
)


def device() -> str:
    """The machine kind of JAX's first device: "gpu: NVIDIA H100", "cpu: Xeon ... (6-143-8) avx2 ... x2"."""
    import jax

    found = jax.devices()[0]
    return f"{found.platform}: {processor() if found.platform == 'cpu' else found.device_kind}"


def processor() -> str:
    """The processor, its instruction sets and the number of cores that this process may use."""
    told = _first(CPUINFO.read_text()) if CPUINFO.exists() else {}
    name = told.get("model name") or platform.processor() or platform.machine()
    numbers = ("cpu family", "model", "stepping", "CPU implementer", "CPU part", "CPU revision")
    kind = "-".join(told[each] for each in numbers if each in told)
    held = f"{told.get('flags', '')} {told.get('Features', '')}".split()
    parts = [" ".join(name.split()), f"({kind})" if kind else "", *(each for each in SETS if each in held), f"x{cores()}"]
    return " ".join(filter(None, parts))


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _first(text: str) -> Mapping[str, str]:
    """What /proc/cpuinfo says of the first processor."""
    lines = (line.partition(":") for line in text.split("\n\n", maxsplit=1)[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in lines}
