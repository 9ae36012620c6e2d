"""Where a process is, among all that see the same files: who wrote a temporary file or a claim, and whether it still may."""

import contextlib
import functools
import os
import platform
import zlib
from pathlib import Path


@functools.cache
def this_place() -> str:
    """This machine since it was started, and the space of process numbers (containers have their own)."""
    parts = [platform.node()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)


def place_mark() -> str:
    """`this_place` for names of files: 8 hexadecimal digits."""
    return f"{zlib.crc32(this_place().encode()):08x}"


def is_gone(process: int) -> bool:
    """Whether a process of this place has ended; False where that cannot be asked."""
    if os.name != "posix":
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:  # of another user
        return False
    return False
