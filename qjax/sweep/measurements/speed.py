"""How fast the model runs and what memory it needs, with its weights held dense (decoded first) and packed."""

from qjax.sweep.columns import Cell, Column, Measurement

FIGURES = (
    Column("prefill_tokens_per_second:HELD", float | None, "1/s", "speed of the prompt; medians without compilation", "spent"),
    Column("decode_tokens_per_second:HELD", float | None, "1/s", "speed of the tokens after the first", "spent"),
    Column("first_token_seconds:HELD", float | None, "s", "time to the first token", "spent"),
    Column("running_bytes:HELD", int, "bytes", "weights while running, HELD `dense` (decoded first) or `packed`", "spent"),
    Column("peak_bytes:HELD", int, "bytes", "with cache and XLA's planned working memory", "spent"),
)
COLUMNS = (
    Column("speed_prompt_tokens", int, "", "tokens of the prompt that was timed"),
    Column("speed_new_tokens", int, "", "tokens that were decoded"),
    Column("speed_batch", int, "", "prompts at a time"),
    *FIGURES,
)


def measure(cell: Cell) -> dict[str, object]:
    """Both ways of holding the weights."""
    from qjax.evaluate.speed import measure_speed

    dense, packed = measure_speed(cell.model), measure_speed(cell.quantized, packed=True, compute=cell.model.compute)
    timed = {"speed_prompt_tokens": dense.prompt_tokens, "speed_new_tokens": dense.new_tokens, "speed_batch": dense.batch}
    names = [column.name.partition(":")[0] for column in FIGURES]
    return timed | {
        f"{name}:{held}": getattr(found, name) for held, found in (("dense", dense), ("packed", packed)) for name in names
    }


MEASUREMENT = Measurement("speed", "Speed", COLUMNS, measure=measure, on_every_text=False)
