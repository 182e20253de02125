# SPDX-License-Identifier: Apache-2.0
"""Commands as processes of their own: several at once, each on its devices, in an order; none outlives its starter."""

import contextlib
import fcntl
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rapid_jax.runtime.append_log import log_at
from rapid_jax.runtime.command_line import say
from rapid_jax.runtime.errors import AGAIN, InputError, legible
from rapid_jax.runtime.files import default_cache_dir, digest
from rapid_jax.runtime.lease import Lease
from rapid_jax.runtime.run_folder import LEASE, again_when_a_store_fails
from rapid_jax.runtime.storage import AnyPlace

_POLL_S, _GRACE_S = 0.05, 60.0


# Before it becomes the command, a process asks for SIGTERM (15) once its starter is gone (PR_SET_PDEATHSIG, 1), and
# ends if that has happened already.
_FOLLOW: Final = f"""
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 15)
os.getppid() == int(sys.argv[1]) or os._exit({AGAIN})
os.execv(sys.argv[2], sys.argv[2:])
"""


@dataclass(frozen=True)
class Job:
    """A command, `words` behind `python -m MODULE`; what it prints goes to `log`."""

    name: str
    words: tuple[str, ...]
    log: Path
    after: tuple[str, ...] = ()  # jobs that have to end well before
    keep: Callable[[], object] = lambda: None  # called when it has ended, for its log


@contextlib.contextmanager
def alone_in(folder: AnyPlace) -> Iterator[int]:
    """A lock on the folder, which is made; yields the descriptor of another, on its logs, for jobs to hold.

    In a bucket both are of a folder of this machine, and other machines are kept out by a lease; where its store stops
    answering Again is raised. Raises InputError if another starter is at work there. The jobs of one that was killed
    are ending: they are waited for, an update of training may take minutes.
    """
    logs = logs_here(folder)
    with contextlib.ExitStack() as stack:
        own, held = (stack.enter_context(_open(each)) for each in (logs.parent, logs))
        if not _lock(own):
            raise InputError(f"{folder}: expected no other sweep there, got one that is at work")
        if not _lock(held):
            say(f"waiting for what a sweep that was killed has left at work in {folder}")
        while not _lock(held):
            time.sleep(0.2)
        if not isinstance(folder, Path):
            stack.enter_context(Lease(folder / LEASE))
            stack.enter_context(again_when_a_store_fails())
        yield held


def logs_here(folder: AnyPlace) -> Path:
    """The folder of this machine that the jobs of `folder` write their logs to."""
    if isinstance(folder, Path):
        return folder / "logs"
    return default_cache_dir() / "sweeps" / digest(str(folder))[:16] / "logs"


def kept_log(folder: AnyPlace, name: str) -> AnyPlace:
    """Where the log of a job of `folder` is when it has ended."""
    return folder / "logs" / f"{name}.log"


def keep_log(folder: AnyPlace, name: str) -> None:
    """Puts what a job that has ended has printed behind what `folder`, if it is in a bucket, has of it already.

    What is put there is called NAME.log.SIZE here until it has come, by the size that the other log has before: where a
    kill or a store has ended that, the next call finds whether the bytes are there from SIZE on, and none come twice.
    """
    kept = kept_log(folder, name)
    here = logs_here(folder) / kept.name
    if here == kept or not here.parent.is_dir():
        return
    under_way = re.compile(re.escape(here.name) + r"\.([0-9]+)")
    begun = [(int(found[1]), path) for path in here.parent.iterdir() if (found := under_way.fullmatch(path.name))]
    if not begun and not here.exists():
        return
    log = log_at(kept)
    if here.exists() and not begun:
        begun = [(log.size, here.rename(f"{here}.{log.size}"))]
    for start, path in sorted(begun):
        data = path.read_bytes()
        if log.size <= start or log.read()[start : start + len(data)] != data:
            log.append(data)
        log.join()
        path.unlink()
    keep_log(folder, name)  # what was printed since


@contextlib.contextmanager
def _open(folder: Path) -> Iterator[int]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise InputError(f"{folder}: expected a folder to write to, got: {error.strerror}") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def run_jobs(
    jobs: Sequence[Job],
    module: str,
    shares: Sequence[Mapping[str, str]],
    held: int,
    tell: Callable[[Job, str], None],
) -> dict[str, str]:
    """Runs all of them, at most one a share, whose environment it gets; job -> why it failed, "" if it did not.

    A job whose predecessor failed is not run. When one asks to be started again (75) no further one starts, and the
    same is raised as SystemExit once the others have ended; a signal ends them all first.
    """
    known = {job.name for job in jobs}  # what is no job is done
    free, waiting, ended = list(range(len(shares))), list(jobs), dict[str, str]()
    running: dict[int, tuple[Job, subprocess.Popen, float]] = {}  # by share
    again, told = False, False
    with _ended_with_us() as started:
        while running or (waiting and not again):
            for job in list(waiting):
                before = [name for name in job.after if name in known]
                if lost := [name for name in before if ended.get(name)]:
                    waiting.remove(job)
                    ended[job.name] = f"not run, {lost[0]} failed"
                elif free and not again and all(name in ended for name in before):
                    waiting.remove(job)
                    process = _start(job, module, shares[free[0]], held)
                    started.append(process)
                    running[free.pop(0)] = job, process, time.monotonic()
                    tell(job, "begun")
            time.sleep(_POLL_S)
            for share, (job, process, since) in list(running.items()):
                if (status := process.poll()) is None:
                    continue
                del running[share]
                free.append(share)
                again = again or status == AGAIN
                ended[job.name] = "" if status == 0 else f"status {status}: {_last_line(job.log, module)}"
                tell(job, ended[job.name] or f"done in {time.monotonic() - since:.0f} s")
                try:
                    job.keep()
                except (InputError, OSError) as error:  # no reason to end the others
                    if not told:
                        say(f"logs that cannot be kept stay in {job.log.parent} for now: {legible(str(error))}")
                    told = True
    if again:
        raise SystemExit(AGAIN)
    return ended


def _start(job: Job, module: str, share: Mapping[str, str], held: int) -> subprocess.Popen:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with open(job.log, "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-c", _FOLLOW, str(os.getpid()), sys.executable, "-m", module, *job.words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ | share,
            pass_fds=(held,),
        )


@contextlib.contextmanager
def _ended_with_us() -> Iterator[list[subprocess.Popen]]:
    """The processes in the list get SIGTERM, and at last SIGKILL, when the context is left before they have ended."""
    started: list[subprocess.Popen] = []

    def end(*_: Any) -> None:
        raise SystemExit(AGAIN)

    here = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, end) if here else None
    try:
        yield started
    finally:
        if here:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for process in started:
            if process.poll() is None:
                process.terminate()
        until = time.monotonic() + _GRACE_S
        for process in started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))
            if process.poll() is None:
                process.kill()
                process.wait()
        if here:
            signal.signal(signal.SIGTERM, before)


def _last_line(log: Path, module: str) -> str:
    """Without the program's name, as `longpo: `, before it."""
    lines = log.read_bytes()[-4096:].decode(errors="replace").strip().splitlines()
    return legible(lines[-1].removeprefix(f"{module.removesuffix('_jax')}: ")) if lines else "it printed nothing"


def _lock(held: int) -> bool:
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system that knows no locks
        pass
    return True
