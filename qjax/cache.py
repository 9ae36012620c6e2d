"""JAX's persistent compilation cache, on for the command line and the experiments: a program compiles once per machine."""

import os
from pathlib import Path


def enable_compilation_cache() -> None:
    """Keeps compiled programs under $XDG_CACHE_HOME/qjax (~/.cache/qjax), unless JAX is already told where to keep them.

    Does nothing where that folder cannot be written. `import qjax` alone never calls this: JAX's settings are the user's.
    """
    import jax

    if jax.config.jax_compilation_cache_dir:
        return
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qjax" / "xla"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if not os.access(folder, os.W_OK):
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
