"""Rows, texts, questions, and what people type."""

import bz2
import gzip
import io
import json
import math
import random
import re
import zipfile
from pathlib import Path

from qjax.checkpoints.huggingface import load_huggingface
from qjax.driver.placement import parse_rule, place
from qjax.evaluate.corpora import load_corpus
from qjax.evaluate.tasks import load_task
from qjax.recipe import parse_recipe
from qjax.report.rendering import to_csv
from qjax.report.reports import tables
from qjax.report.tuning import tuning_table
from qjax.sweep import store
from qjax.sweep.tune import holds, loss_of, parse_bound
from tests.fuzz import mutations, seeds
from tests.fuzz.reader import Reader, write

KERNELS = [f"block_{i}/{name}/kernel" for i in range(3) for name in ("attention/q", "attention/o", "mlp/up", "mlp/down")]
RECIPES = (
    *("rtn:int4-g128", "rtn(clip=mse):int3-g128", "awq+gptq(damp=0.05):int3-g128", "gptq+descend(sweeps=4):int2-g64", "nf4-dq"),
    *("gptq:int3-g128@sequential", "rtn:int8-channel-sym/int8-token", "bf16", "none", "mxfp4", "nvfp4", "int4-g64-z16"),
    *("gptq:int4-g128 kv:int4-g32", "kv:int2-g32(residual=32,keys=before)", "kv:int4-token(hadamard=true)"),
    *("smoothquant(search=true)+rtn:int8-channel-sym-max/int8-token@parallel", "quarot+rtn:int4-g128", "block_ap:int2-g128"),
)
NAMES = (
    "rtn gptq awq hqq descend smoothquant block_ap int 4 nf4 fp8_e4m3 -g -dq -sym -channel channel token int8-token none qep"
)
SIGNS = "( ) = , : @ / + - ; . clip=mse damp= sweeps= alpha=0.5 ^ $ * {9} {4294967296} (a+)+ \\d [ ] | ? residual= keys=before"
WORDS = (*NAMES.split(), *SIGNS.split(), " kv:", "int2-g32", "hadamard=true", "(" * 3_000)


def _rows(rng: random.Random, folder: Path) -> None:
    held = [dict(row) for row in rng.sample(seeds.rows(), rng.randint(1, 4))]
    lines = [json.dumps(row).encode() for row in held]
    if rng.random() < 0.9:
        at = rng.randrange(len(lines))
        lines[at] = mutations.json_bytes(rng, held[at]).replace(b"\n", b" ")
    content = b"".join(line + b"\n" for line in lines)
    write(rng, folder, {"rows.jsonl": content if rng.random() < 0.9 else mutations.binary(rng, content)})


def _read_rows(folder: Path) -> None:
    list(store.Reader(folder / "rows.jsonl").objects())
    rows = store.read_rows(folder / "rows.jsonl")
    for _, table in tables(rows):
        to_csv(table)


def _tuned(rng: random.Random, folder: Path) -> None:
    """The row of a model as it is and that of a recipe, one of which is changed, what it measured more than other things."""
    pair = [dict(row) for row in seeds.tuned_rows()]
    row = rng.choice(pair)
    names = [name for name in row if re.match("nll|kl|accuracy|perplexity|documents", name)]
    for name in rng.sample(names, rng.choice((0, 1, 1, 3))):
        row[name] = rng.choice((None, 0, 0.0, -1.0, 1e300, "inf", 2**62, 0.5, -3))
        if rng.random() < 0.3:
            del row[name]
    lines = [json.dumps(each).encode() for each in pair]
    if rng.random() < 0.3:
        lines[1] = mutations.json_bytes(rng, pair[1]).replace(b"\n", b" ")
    write(rng, folder, {"rows.jsonl": b"\n".join(lines) + b"\n"})


def _read_tuned(folder: Path) -> None:
    rows = store.read_rows(folder / "rows.jsonl")
    if len(rows) < 2:
        return
    for of, within in (("perplexity", "1%"), ("perplexity", "0.1"), ("kl", "0.1"), ("piqa", "1%"), ("piqa", "0.1")):
        bound = parse_bound(within, of)
        loss = loss_of(rows[1], rows[0], of, bound)
        holds(loss, bound)
        told = {"recipe": rows[1]["recipe"], "bits_per_weight": rows[1].get("bits_per_weight", math.nan)}
        told |= loss._asdict() | {"loss": loss.value, "accepted": False}
        to_csv(tuning_table([told], model=str(rows[1]["model"]), of=of, bound=str(bound)))


QUESTIONS = (
    {"query": "Question: why?", "choices": ["because", "for no reason"], "gold": 1},
    {"context_options": ["The cup fell so the cup", "The cup fell so the table"], "continuation": "broke.", "gold": 0},
    {"context": "Once upon a", "continuation": "time"},
)
CSV = "".join(f"Example {i}?,w,x,y,z,{'ABCDAB'[i]}\n" for i in range(6)).encode()


def _compressed(rng: random.Random, name: str, content: bytes) -> tuple[str, bytes]:
    suffix = rng.choice(("", "", ".gz", ".bz2"))
    packed = {"": bytes, ".gz": lambda c: gzip.compress(c, 1), ".bz2": lambda c: bz2.compress(c, 1)}[suffix](content)
    return name + suffix, mutations.binary(rng, packed) if rng.random() < 0.3 else packed


def _lines(rng: random.Random, entries: list[dict]) -> bytes:
    lines = [json.dumps(entry).encode() for entry in entries]
    lines[rng.randrange(len(lines))] = mutations.json_bytes(rng, rng.choice(entries)).replace(b"\n", b" ")
    return b"\n".join(lines)


def _task(rng: random.Random, folder: Path) -> None:
    match rng.randrange(4):
        case 0 | 1:
            name, content = _compressed(rng, "t.jsonl", _lines(rng, [rng.choice(QUESTIONS)] * 3))
        case 2:
            text = "Cooking: A man\n2\nruns.\nsits.\ncooks.\nsleeps.\n" * 2
            name, content = _compressed(rng, "t.txt", mutations.binary(rng, text.encode()))
        case _:
            files = {"data/dev/art_dev.csv": CSV, "data/test/art_test.csv": CSV, "data/test/law_test.csv": CSV}
            changed = rng.choice(list(files))
            files[changed] = mutations.binary(rng, CSV)
            if rng.random() < 0.3:
                write(rng, folder / "task.folder", files)
                return
            buffer = io.BytesIO()
            with zipfile.ZipFile(buffer, "w", rng.choice((0, 8, 12, 14))) as archive:
                for path, rows in files.items():
                    archive.writestr(path, rows)
            content = buffer.getvalue()
            name, content = "t.zip", mutations.binary(rng, content) if rng.random() < 0.7 else content
    write(rng, folder, {f"task.{name}": content})


def _read_task(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        load_task(f"mmlu:{path}")


def _text(rng: random.Random, folder: Path) -> None:
    if rng.random() < 0.5:
        name, content = _compressed(rng, "t.jsonl", _lines(rng, [{"text": "Once upon a time"}] * 3))
    else:
        name, content = _compressed(rng, "t.txt", mutations.binary(rng, ("Once upon a time.\n" * 5).encode()))
    write(rng, folder, {name: content})


def _read_text(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        load_corpus(f"{'jsonl' if '.jsonl' in path.name else 'text'}:{path}")


def _changed_recipe(rng: random.Random, words: str) -> str:
    """The words with other signs anywhere, or with one word of another recipe in the place of one."""
    if rng.random() < 0.6:
        return mutations.text(rng, words, WORDS)
    parts, others = (re.split(r"([^\w.]+)", each) for each in (words, rng.choice(RECIPES)))
    parts[2 * rng.randrange((len(parts) + 1) // 2)] = rng.choice(others[::2])
    return "".join(parts)


def _recipe(rng: random.Random, folder: Path) -> None:
    words = _changed_recipe(rng, rng.choice(RECIPES))
    (folder / "recipe").write_bytes(words.encode("utf-8", "surrogatepass"))


def _rule(rng: random.Random, folder: Path) -> None:
    words = _changed_recipe(rng, f"{rng.choice(('mlp/down', '^block_1/', 'attention/(q|k)', '.*'))}={rng.choice(RECIPES)}")
    (folder / "recipe").write_bytes(words.encode("utf-8", "surrogatepass"))


def _words(folder: Path) -> str:
    return (folder / "recipe").read_bytes().decode("utf-8", "surrogatepass")


def _read_recipe(folder: Path) -> None:
    recipe = parse_recipe(_words(folder))
    assert recipe is None or parse_recipe(str(recipe)) == recipe


def _read_rule(folder: Path) -> None:
    rule = parse_rule(_words(folder))
    if not re.search(r"[*+}].*[*+}]", rule.pattern):  # patterns are the user's own: how long they search is theirs, too
        place(KERNELS, None, [rule])


def _path(rng: random.Random, folder: Path) -> None:
    words = mutations.text(
        rng, rng.choice(("models/a", "~/texts/b.txt", "./c", "d.jsonl.gz")), ("/", "~", "..", "x" * 250, "\0")
    )
    (folder / "recipe").write_bytes(words.encode("utf-8", "surrogatepass"))


def _read_path(folder: Path) -> None:
    path = _words(folder)
    readers = (
        load_huggingface,
        lambda p: load_corpus(f"text:{p}"),
        lambda p: load_task(f"piqa:{p}"),
        lambda p: store.read_rows(Path(p)),
    )
    readers[len(path) % len(readers)](path)


READERS = {
    "rows": Reader(_rows, _read_rows),
    "tuned": Reader(_tuned, _read_tuned),
    "task": Reader(_task, _read_task),
    "text": Reader(_text, _read_text),
    "recipe": Reader(_recipe, _read_recipe),
    "rule": Reader(_rule, _read_rule),
    "path": Reader(_path, _read_path),
}
