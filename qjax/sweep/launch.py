"""Starts the workers of a sweep: processes here, jobs of SLURM, tasks of Ray. Each runs one command on one folder, and all
share the cells by claims (`claims.py`); any other scheduler can start that command too.

SLURM is reached by submitit, Ray by ray: the extras `slurm` and `ray`. A launcher takes the options of its engine in
parentheses, `slurm(timeout_min=60,slurm_partition=gpu)` as submitit's `update_parameters`, `ray(num_gpus=1)` as `ray.remote`.
"""

import contextlib
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from qjax.errors import KEPT, QjaxError

LOGS = ".workers"  # of SLURM's jobs, in the sweep's folder; they stay where one fails
SAID = 4000  # bytes of the end of what a worker said that are kept
GRACE = 30.0  # seconds in which a worker that is told to stop gives its claims back


class Ended(NamedTuple):
    """A worker's end. said: the end of what it wrote to stderr."""

    code: int
    said: str = ""


class Launched(NamedTuple):
    """A worker that was started. poll() -> its end, None while it runs. stop() tells it to end, at once; end(seconds) waits so
    long for that, then ends it.
    """

    poll: Callable[[], Ended | None]
    stop: Callable[[], None]
    end: Callable[[float], None] = lambda seconds: None


class WorkerError(QjaxError):
    """A worker failed; `code` is its exit code."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


def parse_launcher(text: str) -> tuple[str, dict[str, object]]:
    """Name and options of a launcher, as NAME or NAME(OPTION=VALUE,...)."""
    found = re.fullmatch(r"(\w+)(?:\((.*)\))?", text.strip())
    items = [item.partition("=") for item in found[2].split(",")] if found and found[2] else []
    if not found or found[1] not in ("none", *LAUNCHERS) or not all(equals for _, equals, _ in items):
        allowed = ", ".join((*LAUNCHERS, "none"))
        raise QjaxError(f"launcher {text!r}: expected {allowed}, with options as slurm(timeout_min=60,slurm_partition=gpu)")
    if known := [name for name, _, _ in items if name.strip() in ("command", "workers", "folder")]:
        raise QjaxError(f"launcher {text!r}: {known[0]} is no option of {found[1]}; workers are given by --workers")
    if items and found[1] in ("local", "none"):
        raise QjaxError(f"launcher {text!r}: {found[1]} takes no options")
    return found[1], {name.strip(): _value(value.strip()) for name, _, value in items}


def _value(text: str) -> object:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return {"true": True, "false": False}.get(text.lower(), text)


def run_workers(
    command: Sequence[str], workers: int, folder: Path, launcher: str = "local", *, on_wait: Callable[[], None] = lambda: None
) -> None:
    """Runs a command so many times at once and waits for the end of all; on_wait is called now and then.

    Raises WorkerError for the first that failed, when the others have ended, which go on; stops all when it is interrupted.
    """
    name, options = parse_launcher(launcher)
    launched = LAUNCHERS[name](command, workers, folder, **options)
    ended: dict[int, Ended] = {}
    try:
        while len(ended) < len(launched):
            for at, worker in enumerate(launched):
                if at not in ended and (end := worker.poll()) is not None:
                    ended[at] = end
            on_wait()
            time.sleep(0.2)
    finally:
        _stop([worker for at, worker in enumerate(launched) if at not in ended])
    failed = [(at, end) for at, end in ended.items() if end.code]
    if failed:
        at, end = failed[0]
        said = [line for line in end.said.splitlines() if line.strip()]
        last = next((line for line in reversed(said) if line.startswith("error: ")), said[-1] if said else "it said nothing")
        what = f"worker {at + 1} of {workers} {_how(end.code)}: {last.removeprefix('error: ').partition(f'; {KEPT}')[0]}"
        raise WorkerError(what, end.code if end.code > 0 else 128 - end.code)  # as a shell tells it
    if (folder / LOGS).exists():
        shutil.rmtree(folder / LOGS)


def _stop(workers: Sequence[Launched]) -> None:
    """Ends workers, all together."""
    for worker in workers:
        worker.stop()
    until = time.monotonic() + GRACE
    for worker in workers:
        worker.end(max(0.0, until - time.monotonic()))


def _how(code: int) -> str:
    return f"ended with exit code {code}" if code > 0 else f"was ended by signal {-code}"


def _local(command: Sequence[str], workers: int, folder: Path) -> list[Launched]:
    """Processes of this machine, in sessions of their own: Ctrl-C reaches them through this process alone."""

    def start() -> Launched:
        said = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the worker
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said, start_new_session=True)

        def poll() -> Ended | None:
            if process.poll() is None:
                return None
            with said:
                return Ended(process.returncode, _end(said))

        def end(seconds: float) -> None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
            process.kill()
            process.wait()
            said.close()

        return Launched(poll, process.terminate, end)

    return [start() for _ in range(workers)]


def _end(file) -> str:
    file.seek(max(0, file.seek(0, 2) - SAID))
    return file.read().decode(errors="replace")


def run_command(command: Sequence[str], folder: str) -> Ended:
    """Runs a worker on another machine, in a folder, and returns its end."""
    with tempfile.TemporaryFile() as said:
        code = subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=said, check=False).returncode
        return Ended(code, _end(said))


def _slurm(command: Sequence[str], workers: int, folder: Path, *, cluster: str = "slurm", **options: object) -> list[Launched]:
    """Jobs of SLURM. cluster: another of submitit's executors."""
    try:
        import submitit
    except ImportError:
        raise QjaxError("launcher slurm needs submitit; install qjax[slurm]") from None
    try:
        executor = submitit.AutoExecutor(folder=folder / LOGS, cluster=cluster)
        executor.update_parameters(**{"name": "qjax", **options})
        with executor.batch():
            jobs = [executor.submit(run_command, list(command), str(Path.cwd())) for _ in range(workers)]
    except (RuntimeError, NameError, TypeError, ValueError, AssertionError, OSError) as error:
        raise QjaxError(f"launcher slurm: {error}; see submitit's update_parameters, and whether sbatch is here") from error

    def poll(job) -> Ended | None:
        if not job.done():
            return None
        try:
            return job.result()
        except Exception as error:  # of submitit: whatever ended the job
            return Ended(1, f"{error}".strip())

    return [Launched(lambda job=job: poll(job), lambda job=job: job.cancel(check=False)) for job in jobs]


def _ray(command: Sequence[str], workers: int, folder: Path, **options: object) -> list[Launched]:
    """Tasks of the Ray cluster that RAY_ADDRESS names, or of one on this machine."""
    try:
        import ray
    except ImportError:
        raise QjaxError("launcher ray needs ray; install qjax[ray]") from None
    ray.init(ignore_reinit_error=True, log_to_driver=False)
    try:
        task = ray.remote(**{"max_retries": 0, **options})(run_command)
    except (TypeError, ValueError) as error:
        raise QjaxError(f"launcher ray: {error}; see the options of ray.remote") from error
    tasks = [task.remote(list(command), str(Path.cwd())) for _ in range(workers)]

    def poll(one) -> Ended | None:
        if not ray.wait([one], timeout=0)[0]:
            return None
        try:
            return Ended(*ray.get(one))
        except ray.exceptions.RayError as error:
            return Ended(1, f"{error}".strip())

    return [Launched(lambda one=one: poll(one), lambda one=one: ray.cancel(one, force=True)) for one in tasks]


LAUNCHERS: dict[str, Callable[..., list[Launched]]] = {"local": _local, "slurm": _slurm, "ray": _ray}
