"""The commands that list what there is: formats, recipes, columns."""

from qjax.cli.terminal import console


def formats() -> None:
    """Every number format, with exact bits per weight."""
    from qjax.report.lists import formats_table
    from qjax.report.rendering import to_rich

    console().print(to_rich(formats_table()))


def recipes() -> None:
    """Every method, with its options."""
    from qjax.report.lists import recipes_table
    from qjax.report.rendering import to_rich

    console().print(to_rich(recipes_table()))


def columns() -> None:
    """Every column of rows.jsonl, with type, unit and meaning, by the measurement that it belongs to."""
    from qjax.report.lists import columns_table
    from qjax.report.rendering import to_rich

    console().print(to_rich(columns_table()))
