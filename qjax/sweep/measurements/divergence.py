"""Divergence of the next token's distribution from the baseline's (`qjax/evaluate/divergence.py`)."""

import functools

from qjax.sweep.columns import BASELINE, Cell, Column, Measurement

PER, MEAN, DIFFERENCE = "fraction", "standard error of that, over documents", {"given": BASELINE}
KL = "mean KL divergence from the baseline over scored tokens"
DP = "root mean square change of the true token's probability"
TOP = {"header": "same top\ntoken (%)", "percent": True} | DIFFERENCE
COLUMNS = (
    Column("kl", float | None, "nats", KL, header="KL mean\n(nats)", **DIFFERENCE),
    Column("kl_stderr", float | None, "nats", MEAN, **DIFFERENCE),
    Column("kl_median", float | None, "nats", "its median", header="KL median\n(nats)", rank=2, **DIFFERENCE),
    Column("kl_p99", float | None, "nats", "its 99th percentile", header="KL 99 %\n(nats)", rank=1, **DIFFERENCE),
    Column("top1_agreement", float, PER, "scored tokens with the same likeliest next token", **TOP),
    Column("top1_agreement_stderr", float | None, PER, MEAN, **DIFFERENCE),
    Column("rms_dp", float, PER, DP, header="RMS Δp\n(points)", percent=True, **DIFFERENCE),
    Column("rms_dp_stderr", float | None, PER, MEAN, **DIFFERENCE),
)


def measure(cell: Cell) -> dict[str, object]:
    """On the windows that perplexity measures, of the hidden states that it found."""
    from qjax.evaluate.divergence import measure_divergence

    through, through_baseline = (functools.partial(cell.states.through, each) for each in (cell.of_states, cell.of_baseline))
    found = measure_divergence(
        cell.model, cell.baseline, cell.windows, on_batch=cell.on_batch, through=through, through_baseline=through_baseline
    )
    kept = ("kl", "kl_stderr", "kl_median", "kl_p99", "rms_dp", "rms_dp_stderr")
    agreement = {"top1_agreement": found.top1, "top1_agreement_stderr": found.top1_stderr}
    return {name: getattr(found, name) for name in kept} | agreement


MEASUREMENT = Measurement(
    "divergence",
    "Divergence from {baseline}",
    COLUMNS,
    measure=measure,
    notes=(
        "KL: divergence of the next token's distribution from {baseline}'s, per scored token.",
        "RMS Δp: root mean square change of the true token's probability. ±: standard error over documents.",
    ),
)
