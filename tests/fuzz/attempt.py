"""One input: made, read, and judged."""

import random
import shutil
import threading
import time
import warnings
from pathlib import Path
from typing import NamedTuple

from qjax.errors import QjaxError
from tests.fuzz.readers import READERS

SECONDS = 10.0  # of the processor; of the clock four times as many, for a machine that has more to do
MEMORY = 2**30  # bytes above those of the input's files
TICK = 0.1  # seconds
STATUS, FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Outcome(NamedTuple):
    """Whether an input was read, what is wrong with what came of it, seconds of the processor, bytes beyond its files' own."""

    read: bool
    fault: str | None
    seconds: float
    memory: int


class Clock(threading.Thread):
    """A clock that stands still while this process is stopped."""

    seconds = 0.0

    def run(self) -> None:
        """Until the process ends."""
        while True:
            time.sleep(TICK)
            self.seconds += TICK


CLOCK = Clock(daemon=True)
CLOCK.start()


def attempt(reader: str, seed: int, index: int, folder: Path) -> Outcome:
    """What came of an input. The folder, emptied first, keeps it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    READERS[reader].make(random.Random(f"{seed}/{reader}/{index}"), folder)
    size = sum(path.lstat().st_size for path in folder.rglob("*"))
    before, started, spent = _forget_peak(), CLOCK.seconds, time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            READERS[reader].read(folder)
        read, fault = True, None
    except QjaxError as error:
        read, fault = False, _judge(str(error))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic is no Exception
        read, fault = False, f"{type(error).__name__}: {str(error)[:300]!r}"
    seconds, spent = CLOCK.seconds - started, time.process_time() - spent
    memory = (_kib("VmHWM") - before) * 1024 - size
    if spent > SECONDS or seconds > 4 * SECONDS:
        fault = fault or f"{spent:.0f} s of the processor, {seconds:.0f} s"
    if memory > MEMORY:
        fault = fault or f"{memory >> 20} MiB"
    return Outcome(read, fault, spent, max(0, memory))


def _judge(message: str) -> str | None:
    if not message.isprintable():
        return f"not one printable line: {message!r}"
    if not 5 < len(message) <= 1_000:
        return f"a message of {len(message)} characters: {message[:300]}"
    return None


def _forget_peak() -> int:
    """Resident memory now, KiB, from which the peak is counted anew; 0 where the system does not tell."""
    if not FORGET.exists():
        return 0
    FORGET.write_text("5")
    return _kib("VmRSS")


def _kib(name: str) -> int:
    if not STATUS.exists():
        return 0
    return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
