"""What a reader is, and how its input is written."""

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Reader(NamedTuple):
    """make(rng, folder) writes an input; read(folder) reads it."""

    make: Callable[[random.Random, Path], None]
    read: Callable[[Path], object]


def write(rng: random.Random, folder: Path, files: dict[str, bytes]) -> None:
    """Writes the files; one in a hundred is something else than a file of this content."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        match rng.randrange(1_000):
            case 0:
                os.mkfifo(path)
            case 1:
                path.mkdir()
            case 2:
                path.symlink_to("/dev/zero")
            case 3:
                path.symlink_to(path)
            case 4:
                path.write_bytes(b"")
            case 5:
                pass
            case _:
                path.write_bytes(content)
