"""Whole commands killed (-9), or told to stop, at random moments: what stands is whole, and the same command again leaves what
an undisturbed one does, and nothing else.

    python -m tests.command_kills KILLS [SEED [COMMAND ...]]

Commands run in forks of a process that has imported everything and begun nothing, so that a kill costs a few seconds. Moments
are of their processor time, which a busy machine does not change. Of a sweep rows and layers are compared, less times and
memory; of a model the digest of every file; of reports all bytes.
"""

import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from qjax.checkpoints.packed import DESCRIPTION, _digest
from qjax.cli import app as cli
from qjax.folders import standing
from qjax.sweep.store import ROWS, read_rows
from qjax.untrusted import digest_of, read_json

from .sweep_torture import figures

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 8
IMPORTED = (  # before the forks
    *("checkpoints.load", "checkpoints.export", "driver.decoder", "sweep.runner", "report.reports", "report.figures"),
    *("train.run", "train.merge"),
)
GOES_ON = "the same command goes on from there"
STOPPING = (signal.SIGTERM, signal.SIGHUP)
STOPPED_AT = 1.1  # of the time of an undisturbed command: the last moment at which it may be killed


def checkpoint(folder: Path) -> None:
    """A tiny Hugging Face folder, whose kernels are all of one shape: there is little to compile."""
    from qjax.checkpoints.huggingface import save_huggingface

    from .conftest import byte_tokenizer, random_model, tiny_config

    save_huggingface(folder, random_model(tiny_config(layers=1, mlp_size=32, kv_heads=4), byte_tokenizer()))


def adapter(folder: Path) -> None:
    """A small adapter of that model's layout."""
    import jax.numpy as jnp

    from qjax.checkpoints.load import load
    from qjax.checkpoints.peft import save_adapter
    from qjax.linear import LowRank

    one = LowRank(jnp.full((32, 2), 0.1), jnp.ones((2, 32)), scaling=1.0)
    save_adapter(folder, load("tiny").config, {"block_0/mlp/up/kernel": one})


def fork(work, killed_after: float | None = None, by: int = signal.SIGKILL) -> tuple[int, float]:
    """Runs work() in a fork: its exit code (-9 where it was killed) and the seconds of processor that it took."""
    child = os.fork()
    if child == 0:
        for number in STOPPING:  # which whoever started this may have ignored
            signal.signal(number, signal.SIG_DFL)
        said = os.open("said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        code = 1
        try:
            work()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        finally:
            sys.stdout.flush()
            os._exit(code)
    while killed_after is not None and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.clock_gettime((~child << 3) | 2) > killed_after:  # Linux's clock of a process
            os.kill(child, by)
            break
        time.sleep(0.002)
    _, status, spent = os.wait4(child, 0)
    return os.waitstatus_to_exitcode(status), spent.ru_utime + spent.ru_stime


def command(*words: object, killed_after: float | None = None, by: int = signal.SIGKILL) -> tuple[int, float]:
    """`fork` of a command; one that is not killed must succeed, one that is told to stop say that it was."""
    code, seconds = fork(lambda: cli.main([str(word) for word in words]), killed_after, by)
    said = Path("said.txt").read_text()
    assert code in ((0,) if killed_after is None else (0, -by, 128 + by)), said
    if code == 128 + by:
        assert said.endswith(f"stopped by {signal.Signals(by).name}; what was finished is kept, {GOES_ON}\n"), said
    return code, seconds


def names(folder: Path) -> list[str]:
    """All that is in a folder and its folders."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


class Swept:
    """`qjax sweep` into an empty folder."""

    def __init__(self):
        self._expected = None

    def run(self, number: int, **options) -> tuple[int, float]:
        """The command."""
        asked = (
            "--recipes",
            "rtn:int4-channel,rtn:int3-channel,rtn:int2-channel",
            "--data",
            "text:text.txt",
            "--max-windows=4",
        )
        return command("sweep", "tiny", *asked, "--convention", "windows-32", "--out=out", **options)

    def begin(self, number: int) -> None:
        """What a round begins with."""
        shutil.rmtree("out", ignore_errors=True)

    def check(self, number: int) -> None:
        """After a kill."""
        rows = read_rows(Path("out", ROWS))
        assert not rows or self._expected is None or {row["key"] for row in rows} <= self._expected[0].keys()

    def check_end(self, number: int) -> None:
        """After the next run."""
        found = (*figures(Path("out")), names(Path("out")))
        self._expected = self._expected or found
        assert found[:2] == self._expected[:2], "other rows than of an undisturbed run"
        assert found[2] == self._expected[2], f"left: {set(found[2]) ^ set(self._expected[2])}"


class Written:
    """A command that writes a folder over one of another version, or where none was (every third round)."""

    changing = ()  # names of files that hold times

    def __init__(self):
        self._expected: dict[int, dict[str, str]] = {}

    def words(self, version: int) -> tuple[object, ...]:
        """The command that writes one of two versions, less where to."""
        raise NotImplementedError

    def run(self, number: int, **options) -> tuple[int, float]:
        """The command."""
        return command(*self.words(number % 2), "--overwrite", "--out=out", **options)

    def begin(self, number: int) -> None:
        """What a round begins with."""
        if number % 3 == 2:
            shutil.rmtree("out", ignore_errors=True)

    def check(self, number: int) -> None:
        """After a kill."""
        if standing(Path("out")).exists():
            assert self.held(standing(Path("out"))) in self._expected.values()

    def check_end(self, number: int) -> None:
        """After the next run."""
        held = self.held(Path("out"))
        assert self._expected.setdefault(number % 2, held) == held
        assert not Path(".out.qjax-old").exists()

    def held(self, folder: Path) -> dict[str, str]:
        """Digests of all files; of those that hold times the name."""
        files = [path for path in folder.rglob("*") if path.is_file()]
        return {str(path.relative_to(folder)): "" if path.name in self.changing else digest_of(path) for path in files}


class Quantized(Written):
    """`qjax quantize`, whose files must be those that the description tells."""

    changing = ("layers.jsonl", DESCRIPTION)

    def words(self, version):
        """The command."""
        return "quantize", "tiny", "--recipe", ("rtn:int4-channel", "rtn:int3-channel")[version]

    def held(self, folder):
        """Digests of files."""
        told = read_json(folder / DESCRIPTION)
        assert told["digest"] == _digest(told)
        assert {name: digest_of(folder / name) for name in told["digests"]} == told["digests"]
        return super().held(folder)


class Converted(Written):
    """`qjax convert`."""

    def begin(self, number):
        """What a round begins with."""
        if number == 0:
            command("quantize", "tiny", "--recipe", "rtn:int4-g32-sym", "--out=packed")
        super().begin(number)

    def words(self, version):
        """The command."""
        return "convert", "packed", "--to", ("gptq", "compressed-tensors")[version]


class Merged(Written):
    """`qjax merge`."""

    def begin(self, number):
        """What a round begins with."""
        if number == 0:
            assert fork(lambda: adapter(Path("adapter")))[0] == 0
        super().begin(number)

    def words(self, version):
        """The command."""
        return "merge", "tiny", "adapter", "--dtype", ("fp32", "bf16")[version]


class Trained(Written):
    """`qjax train qlora`, which goes on to the bits of one that was not killed."""

    changing = ("training.jsonl",)

    def words(self, version):
        """The command."""
        sizes = ("--rank=2", "--steps=3", "--save-every=1", "--window=16", "--batch=1")
        base = ("--recipe", ("rtn:int4-channel", "rtn:int3-channel")[version])
        return "train", "qlora", "tiny", "--data", "text:text.txt", *base, *sizes


class Reported:
    """`qjax report` over the reports of other rows."""

    def __init__(self):
        self._expected: dict[int, dict[str, bytes]] = {}
        rows = read_rows(Path("rows.jsonl"))
        better = [{**row, "nll": row["nll"] - 0.01, "perplexity": row["perplexity"] * 0.99} for row in rows]
        self._rows = ["".join(json.dumps(row) + "\n" for row in version) for version in (rows, better)]

    def run(self, number: int, **options) -> tuple[int, float]:
        """The command."""
        return command("report", "out", **options)

    def begin(self, number: int) -> None:
        """What a round begins with."""
        Path("out").mkdir(exist_ok=True)
        Path("out", ROWS).write_text(self._rows[number % 2])

    def check(self, number: int) -> None:
        """After a kill."""
        for path in Path("out").glob("[!.]*"):
            if self._expected and path.name != ROWS:
                assert path.read_bytes() in [version[path.name] for version in self._expected.values()], path

    def check_end(self, number: int) -> None:
        """After the next run."""
        found = {path.name: path.read_bytes() for path in Path("out").iterdir()}
        expected = self._expected.setdefault(number % 2, found)
        assert found.keys() == expected.keys(), f"left: {found.keys() ^ expected.keys()}"
        assert [name for name in found if found[name] != expected[name]] == []


def kills(kind: type, count: int, draw: random.Random) -> dict[str, int]:
    """So many kills of a command, in this folder; counts of what happened."""
    torn, lasts, counts = kind(), 0.0, {"killed": 0, "ended before": 0, "rounds": 0}
    for number in (0, 1):  # undisturbed: cold, and warm
        torn.begin(number)
        _, lasts = torn.run(number)
        torn.check_end(number)
    here, number = names(Path()), 2
    while counts["killed"] < count:
        torn.begin(number)
        for _ in range(draw.choice((1, 2, 3))):  # the second in what the first one left
            by = draw.choice((signal.SIGKILL, signal.SIGKILL, *STOPPING))
            code, _ = torn.run(number, killed_after=draw.uniform(0, STOPPED_AT * lasts), by=by)
            counts["killed" if code else "ended before"] += 1
            torn.check(number)
        torn.run(number)
        torn.check_end(number)
        said = Path("said.txt").read_text()
        assert "warning" not in said, said
        outside = [name for name in set(names(Path())) ^ set(here) if not name.startswith("out/")]
        assert not outside, f"left: {outside}"
        counts["rounds"] += 1
        number += 1
        print(f"{kind.__name__}: {counts}, undisturbed {lasts:.1f} s", flush=True)
    return counts


KINDS = {Swept: 0.3, Quantized: 0.2, Reported: 0.1, Converted: 0.1, Merged: 0.1, Trained: 0.2}  # with shares of the kills


def torture(count: int, seed: int, folder: Path, only: tuple[str, ...] = ()) -> dict[str, dict[str, int]]:
    """So many kills in all, dealt out over the commands; or so many of each that is named."""
    for name in IMPORTED:
        importlib.import_module(f"qjax.{name}")
    before, draw, found = Path.cwd(), random.Random(seed), {}
    for kind, part in KINDS.items():
        if only and kind.__name__ not in only:
            continue
        place = folder / kind.__name__
        (place / "tmp").mkdir(parents=True)
        os.chdir(place)
        tempfile.tempdir = os.environ["TMPDIR"] = str(place / "tmp")
        try:
            Path("text.txt").write_text(TEXT)
            code, _ = fork(lambda: checkpoint(Path("tiny")))
            assert code == 0, Path("said.txt").read_text()
            if kind is Reported:
                Swept().run(0)
                shutil.copy(Path("out", ROWS), ROWS)
            found[kind.__name__] = kills(kind, count if only else max(1, round(count * part)), draw)
        finally:
            os.chdir(before)
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        count, seed, *only = *sys.argv[1:], *["0"][len(sys.argv) - 2 :]
        print(torture(int(count), int(seed), Path(scratch), tuple(only)))
