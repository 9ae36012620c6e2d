"""What there is, as tables: number formats, methods, columns of rows. The first needs neither JAX nor NumPy."""

from qjax.format_table import format_table
from qjax.report.rendering import Table, TableColumn, decimals


def formats_table() -> Table:
    """Every documented number format, with exact bits per weight of a 4096 x 4096 matrix."""
    columns = (
        TableColumn("format", "format", text=True),
        TableColumn("bits_per_weight", "bits per\nweight", decimals(3)),
        TableColumn("ratio_to_fp16", "times smaller\nthan FP16", decimals(2)),
        TableColumn("what", "what", text=True),
    )
    notes = ("Bits per weight count the codes, scales and zero points of a 4096 x 4096 matrix.",)
    return Table("Number formats", columns, tuple(format_table()), notes)


def recipes_table() -> Table:
    """Every registered transform, rounding, refiner and order of calibration, with its options and the statistics it needs."""
    from qjax.methods import method_table

    columns = tuple(TableColumn(key, key, text=True) for key in ("method", "kind", "options", "needs", "what"))
    notes = (
        "A recipe is METHOD[+METHOD...]:FORMAT[/INPUT][@ORDER], options in parentheses: awq+gptq(clip=mse):int3-g128@qep, "
        "gptq+descend:int2-g64, rtn:int8-channel-sym-max/int8-token. The order says whose inputs calibration sees.",
    )
    return Table("Methods", columns, tuple(method_table()), notes)


def columns_table() -> Table:
    """Every column of rows, by measurement: the data dictionary."""
    from qjax.sweep.columns import data_dictionary

    columns = (
        TableColumn("measurement", "measurement", text=True, rank=1),
        *(TableColumn(key, key, text=True) for key in ("column", "type", "unit", "meaning")),
    )
    notes = (
        "A column NAME:PART stands for one of every PART. `qjax sweep --measure` takes the measurements that are not implied.",
    )
    return Table("Columns of rows", columns, tuple(data_dictionary()), notes)
