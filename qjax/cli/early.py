"""Mistakes in words, found before JAX is imported and a model is loaded. Only the commands import it.

What passes here may still be wrong (what a layer can have, what is in files); the commands check all of it later.
"""

from collections.abc import Iterable

from qjax.cli.options import split_names
from qjax.errors import QjaxError
from qjax.files import expand, looks_like_a_path
from qjax.folders import standing
from qjax.untrusted import status


def check_names(
    *,
    recipes: str | None = None,
    methods: str | None = None,
    order: str | None = None,
    rules: Iterable[str] | None = None,
    convention: str | None = None,
    tasks: str | None = None,
    measure: str | None = None,
    texts: Iterable[str | None] = (),
    models: Iterable[str | None] = (),
) -> None:
    """Raises QjaxError for an unknown method, option, format, order, convention, task, measurement or text, for a
    rule whose pattern is none, and for a model's path that does not exist.

    None: not said. recipes, methods, tasks, measure: names between commas.
    """
    from qjax.formats import ALIASES, GRIDS, UNQUANTIZED
    from qjax.grammar import require_method, require_order, require_words, split_rule

    for recipe in split_names(recipes, "recipe"):
        require_words(recipe)
    for method in split_names(methods, "--methods"):
        if method.lower().partition("-")[0] not in (*GRIDS, *ALIASES, UNQUANTIZED):
            require_method(method)
    if order is not None:
        require_order(f"order {order!r}", order)
    for rule in rules or ():
        require_words(split_rule(rule)[1])
    _check_evaluation(convention, [text for text in texts if text is not None], tasks, measure)
    for model in models:
        if model is not None and looks_like_a_path(model) and not status(standing(expand(model))):
            raise QjaxError(f"{expand(model)}: no such folder")


def _check_evaluation(convention: str | None, specs: Iterable[str], tasks: str | None, measure: str | None) -> None:
    from qjax.evaluate.corpora import require_spec
    from qjax.evaluate.tasks import require_tasks
    from qjax.evaluate.windows import parse_convention
    from qjax.sweep.columns import require_measurements

    if convention is not None:
        parse_convention(convention)
    for spec in specs:
        require_spec(spec)
    require_tasks(split_names(tasks, "--tasks"))
    require_measurements(split_names(measure, "--measure"))
