"""What every extension goes through: a sweep of a tiny model, rows, tables and figures."""

import functools

import numpy as np

import qjax
from tests.conftest import byte_tokenizer, random_model, tiny_config

TEXT = "".join(chr(97 + (i * i + i // 7) % 26) for i in range(600))


@functools.cache
def tiny_model():
    """A random Llama of two blocks with a byte-level tokenizer."""
    return random_model(tiny_config(), byte_tokenizer())


def sweep(folder, *recipes, model=None, **options) -> dict[str, dict]:
    """Rows by recipe as asked for, after their tables and figures are written; every figure is finite."""
    model = model or tiny_model()
    (folder / "letters.txt").parent.mkdir(parents=True, exist_ok=True)
    (folder / "letters.txt").write_text(TEXT)
    corpus = qjax.load_corpus(f"text:{folder / 'letters.txt'}")
    tokens = np.random.default_rng(0).integers(0, 256, (6, 32)).astype(np.int32)
    asked = qjax.Sweep(recipes, (corpus,), qjax.parse_convention("windows-32"), calibration=qjax.Calibration(tokens), **options)
    rows = qjax.run_sweep(model, asked, folder)
    written = {path.suffix for path in qjax.write_reports(folder, rows)}
    assert {".md", ".csv", ".png"} <= written
    assert all(np.isfinite(row["perplexity"]) for row in rows)
    return {recipe: next(row for row in rows if row["recipe"] == str(qjax.parse_recipe(recipe))) for recipe in recipes}
