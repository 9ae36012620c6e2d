"""What is registered from outside the package, for as long as a scope lasts: the tables it stands in, the caches that depend on
them.
"""

import contextlib
from collections.abc import Callable, Iterator

_caches: list[Callable] = []
_tables: list[tuple[dict, dict]] = []  # a table, and what it held when it joined


def forgotten_on_change(cached: Callable) -> Callable:
    """Marks a functools cache whose values depend on what is registered."""
    _caches.append(cached)
    return cached


def forgotten_in_scope(table: dict) -> dict:
    """Marks a table of what is registered, complete as far as it is the package's."""
    _tables.append((table, _copy(table)))
    return table


def forget() -> None:
    """Empties the caches; to be called when something was registered."""
    for cached in _caches:
        cached.cache_clear()


@contextlib.contextmanager
def scoped() -> Iterator[None]:
    """Context after which what was registered inside is forgotten."""
    kept = [_copy(table) for table, _ in _tables]
    try:
        yield
    finally:
        kept += [first for _, first in _tables[len(kept) :]]
        for (table, _), before in zip(_tables, kept, strict=True):
            table.clear()
            table.update(before)
        forget()


def _copy(table: dict) -> dict:
    return {name: dict(value) if isinstance(value, dict) else value for name, value in table.items()}
