"""What is kept between runs: JAX's persistent compilation cache, on for the command line and the experiments, so that a program
compiles once per machine, and small verdicts (`models/tokenizer_trial.py`).
"""

import os
from pathlib import Path


def cache_folder() -> Path | None:
    """$XDG_CACHE_HOME/qjax or ~/.cache/qjax, which need not exist; None for a user without a home."""
    home = os.path.expanduser("~")  # noqa: PTH111 - Path.home raises
    base = os.environ.get("XDG_CACHE_HOME") or (os.path.join(home, ".cache") if home != "~" else None)  # noqa: PTH118
    return Path(base) / "qjax" if base else None


def enable_compilation_cache() -> None:
    """Keeps compiled programs under $XDG_CACHE_HOME/qjax (~/.cache/qjax), unless JAX is already told where to keep them.

    Does nothing where that folder cannot be written. `import qjax` alone never calls this: JAX's settings are the user's.
    """
    import jax

    if jax.config.jax_compilation_cache_dir:
        return
    if (base := cache_folder()) is None:
        return
    folder = base / "xla"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if not os.access(folder, os.W_OK):
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
