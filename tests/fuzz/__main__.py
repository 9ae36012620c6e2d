"""`python -m tests.fuzz`, see the package. Exit code 1 where an input was read in a way it must not be, or where fewer than
--inputs were tried within --seconds.

A worker goes over the readers in turn, half a second of the processor each, and writes where it is before every input; whoever
started it ends it where that does not change for long, and starts another behind that input.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HANG = 60.0  # seconds on one input
START = 300.0  # until the first, which comes after imports and small models
SLICE = 0.5  # seconds of the processor in a reader's turn


def main() -> int:
    arguments = _arguments()
    folder = Path(tempfile.mkdtemp(prefix="qjax-fuzz-"))
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    print(f"seed {arguments.seed}, inputs at fault are kept in {folder}", flush=True)
    state, faults = {}, 0
    ends = time.monotonic() + arguments.seconds
    while (left := ends - time.monotonic()) > 0 and (arguments.inputs is None or _tried(state) < arguments.inputs):
        faults += _watch(arguments, folder, state, left)
        if arguments.at is not None:
            break
    read, most, tried = state.get("read", {}), state.get("most", {}), state.get("next", {})
    print("reader        inputs    read refused  share read  most seconds    most MiB")
    for reader in sorted(tried):
        count, well, (seconds, memory) = tried[reader], read.get(reader, 0), most.get(reader, (0, 0))
        share = f"{well / max(1, count):.0%}"
        print(f"{reader:12} {count:7} {well:7} {count - well:7} {share:>11} {seconds:13.1f} {memory:11}")
    print(f"{_tried(state)} inputs, {faults} at fault", flush=True)
    return 1 if faults or _tried(state) < (arguments.inputs or 0) else 0


def _tried(state: dict) -> int:
    return sum(state.get("next", {}).values())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--inputs", type=int, metavar="N", help="end when N inputs were tried")
    parser.add_argument("--only", nargs="+", default=[], metavar="READER")
    parser.add_argument("--at", type=int, help="one input of the reader in --only, as a fault names it")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        sys.exit(_work(arguments))
    return arguments


def _watch(arguments: argparse.Namespace, folder: Path, state: dict, seconds: float) -> int:
    """Runs one worker to its end, or ends it; updates the state, and returns the number of faults."""
    state.pop("at", None)
    (folder / "state").write_text(json.dumps(state))
    command = [sys.executable, "-m", "tests.fuzz", "--seconds", str(seconds), "--seed", str(arguments.seed)]
    command += ["--only", *arguments.only] if arguments.only else []
    command += ["--inputs", str(arguments.inputs)] if arguments.inputs is not None else []
    command += ["--at", str(arguments.at)] if arguments.at is not None else []
    with subprocess.Popen([*command, "--worker", str(folder)], stderr=subprocess.DEVNULL) as worker:
        seen, still, limit = json.dumps(state).encode(), 0.0, START
        while worker.poll() is None:
            time.sleep(0.1)
            now = (folder / "state").read_bytes()
            if now != seen:
                seen, still, limit = now, 0.0, HANG
            still += 0.0 if _is_stopped(worker.pid) else 0.1  # nor does it go on while this process itself is stopped
            if still > limit:
                worker.kill()
        code = worker.wait()
    state.update(json.loads((folder / "state").read_text() or "{}"))
    faults = state.pop("faults", 0)
    if code and (at := state.get("at")):
        reader, index = at
        what = "a hang" if code == -9 else f"the end of the process, exit {code}"
        _keep(folder, reader, index, what)
        state["next"][reader] = index + 1
        faults += 1
    elif code:
        raise SystemExit(f"the worker does not start: exit {code}")
    return faults


def _is_stopped(process: int) -> bool:
    """Whether a process stands still by a signal, where the system tells."""
    told = Path(f"/proc/{process}/stat")
    return told.exists() and told.read_text().rpartition(")")[2].split()[0] == "T"


def _work(arguments: argparse.Namespace) -> int:
    from tests.fuzz import seeds
    from tests.fuzz.attempt import attempt
    from tests.fuzz.readers import READERS

    seeds.models()
    folder = Path(arguments.worker)
    state = {"next": {}, "read": {}, "most": {}, "faults": 0} | json.loads((folder / "state").read_text())
    names, ends = arguments.only or list(READERS), time.monotonic() + arguments.seconds
    descriptor = os.open(folder / "state", os.O_RDWR)

    def goes_on() -> bool:
        return time.monotonic() < ends and (arguments.inputs is None or _tried(state) < arguments.inputs)

    while goes_on():
        for reader in names:
            turn = time.process_time() + SLICE
            while time.process_time() < turn and goes_on():
                index = state["next"].get(reader, 0) if arguments.at is None else arguments.at
                state["at"] = [reader, index]
                _tell(descriptor, state)
                found = attempt(reader, arguments.seed, index, folder / "input")
                state["next"][reader] = index + 1
                state["read"][reader] = state["read"].get(reader, 0) + found.read
                most = zip(state["most"].get(reader, (0, 0)), (round(found.seconds, 1), found.memory >> 20), strict=True)
                state["most"][reader] = [max(pair) for pair in most]
                if found.fault:
                    state["faults"] += 1
                    _keep(folder, reader, index, found.fault)
                if arguments.at is not None:
                    print(f"{reader} {index}: {found.fault or ('read' if found.read else 'refused')}", flush=True)
                    _tell(descriptor, state)
                    return 0
    _tell(descriptor, state)
    return 0


def _tell(descriptor: int, state: dict) -> None:
    content = json.dumps(state).encode()
    os.pwrite(descriptor, content.ljust(4_000), 0)


def _keep(folder: Path, reader: str, index: int, what: str) -> None:
    kept = folder / f"{reader}-{index}"
    if not kept.exists():
        shutil.copytree(folder / "input", kept, symlinks=True, ignore=_no_pipes)
    print(f"FAULT --only {reader} --at {index}: {what}", flush=True)


def _no_pipes(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if not (Path(folder, name).is_file() or Path(folder, name).is_dir())]


if __name__ == "__main__":
    sys.exit(main())
