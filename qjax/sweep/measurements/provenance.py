"""Where a row comes from: versions, code, machine, time. The code is the source less what no figure depends on."""

import datetime
import functools
import hashlib
import importlib.metadata
import platform
import resource
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import qjax
from qjax.sweep.columns import Cell, Column, Measurement, asked_measurements, measurement_sources
from qjax.sweep.machine import device
from qjax.sweep.record import digest

PACKAGE = Path(__file__).parents[2]
WHO_AND_WHEN = ("sweep/claims.py", "sweep/launch.py", "sweep/request.py", "sweep/rerun.py")
UNMEASURED = ("cli", "report", "train", *WHO_AND_WHEN)  # parts that no measured figure depends on
LIBRARIES = ("jax", "jaxlib", "flax", "numpy", "tokenizers")
COLUMNS = (
    Column("versions", str, "", "of qjax, Python and libraries", "made"),
    Column("code", str, "", "hash of the source, and of all that is used from outside the package", "made"),
    Column("device", str, "", "machine kind: processor, instruction sets that change arithmetic, cores in use", "machine"),
    Column("compute_dtype", str, "", "type the model runs in (`qjax/models/compute.py`)", "machine"),
    Column("time", str, "", "when (UTC)", "made"),
    Column("peak_rss_bytes", int, "bytes", "largest resident memory of the process so far", "spent"),
)


def asks(cell: Cell) -> dict[str, object]:
    """Provenance of this process, with the sources of what does not belong to the package."""
    names = [each.name for each in asked_measurements(cell.sweep)]
    return provenance({**cell.treatment.sources(), **measurement_sources(names)}, cell.sweep.compute or cell.subject.compute)


def measure(cell: Cell) -> dict[str, object]:
    """When the row was made, and the memory it took."""
    return {"time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "peak_rss_bytes": peak_rss_bytes()}


@functools.cache
def code_fingerprint() -> str:
    """Digest of the package's source, less what no figure depends on."""
    total = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE)
        if not {relative.parts[0], relative.as_posix()} & set(UNMEASURED):
            total.update(str(relative).encode() + path.read_bytes())
    return total.hexdigest()[:16]


def provenance(added: Mapping[str, str] = MappingProxyType({}), compute: str | None = None) -> dict[str, object]:
    """Versions, code and device of this process. added: sources of what does not belong to the package. compute: what was asked
    to run in.
    """
    from qjax.models.compute import compute_name

    versions = [f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES]
    return {
        "versions": ", ".join([f"qjax {qjax.__version__}", f"python {platform.python_version()}", *versions]),
        "code": digest(code_fingerprint(), dict(added)) if added else code_fingerprint(),
        "device": device(),
        "compute_dtype": compute_name(compute),
    }


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far, bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux: what getrusage says there starts at the peak of the process that started this one
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


MEASUREMENT = Measurement("provenance", "Provenance", COLUMNS, asks, measure, when=lambda sweep: True)
