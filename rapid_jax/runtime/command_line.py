# SPDX-License-Identifier: Apache-2.0
"""What the command lines share: errors as one line and an exit status, and what JAX is told before it is imported.

Exit status: 2 input that cannot be used, 130 interrupted, 141 nobody reads the output; 75 (to be started again:
another process of the run has ended, a store failed) and 3 (a plan that does not fit) come from elsewhere.
"""

import argparse
import contextlib
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rapid_jax.runtime.accelerators import without_tpu
from rapid_jax.runtime.distributed import INTERRUPTED
from rapid_jax.runtime.errors import AGAIN, Again, InputError, legible
from rapid_jax.runtime.files import default_cache_dir
from rapid_jax.runtime.storage import local_path, place_of, working_place

UNREAD = 141


class Place(argparse.Action):
    """An option or argument that is a file or folder, kept as text or, with `as_path`, as a Path.

    With `reads` it may be in a bucket, too (storage.place_of), and with `writes` (storage.working_place); raises
    InputError for any other place with a scheme.
    argparse's own `type` could not: it would print the usage, too. Several values make a list, and so does an option
    that is given `many` times.
    """

    def __init__(
        self,
        option_strings: Sequence[str],
        dest: str,
        *,
        as_path: bool = True,
        many: bool = False,
        reads: bool = False,
        writes: bool = False,
        **rest: Any,
    ):
        super().__init__(option_strings, dest, **rest)
        self._as_path, self._many = as_path, many
        self._found = working_place if writes else place_of if reads else local_path

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Keeps what was given."""
        del parser
        what = option_string or str(self.metavar or self.dest)
        each = values if isinstance(values, list) else [values]
        paths = [self._found(value, what) for value in each]
        found = paths if self._as_path else [value and str(path) for path, value in zip(paths, each, strict=True)]
        if self._many:
            found = [*getattr(namespace, self.dest), *found]
        setattr(namespace, self.dest, found if self._many or isinstance(values, list) else found[0])


def status_of(work: Callable[[], int | None], name: str, *, out_of_memory: str) -> int:
    """Does the work of the command `name`; the exit status, after one line on standard error if it is not 0.

    `out_of_memory` says what may help when memory ran out. Errors that are the program's own are raised.
    """
    logging.basicConfig(level=logging.WARNING, format=f"{name}: %(message)s")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that lacks a character shows its number
    try:
        with _heard_interrupts():
            status = work()
        sys.stdout.flush()
        return status or 0
    except InputError as error:
        return _fail(name, str(error))
    except Again as error:
        say(f"{name}: {legible(error.reason)}")
        return AGAIN
    except KeyboardInterrupt:
        say(f"{name}: interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # Python flushes once more when it ends, and would complain about the closed pipe then.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNREAD
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        return _fail(name, f"{place}{error.strerror or error}")
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):  # XLA's word for it
            raise
        return _fail(name, f"out of memory: {out_of_memory}")


def prepare_jax(*, programs: bool, cache: Path | None = None) -> None:
    """What must be set before jax is imported; what the user's environment says already stands.

    The backends log errors only, and with `programs` compiled programs are kept between runs, in `cache` or the default
    cache folder.
    """
    os.environ.update(without_tpu(os.environ))
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "2")
    if programs:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str((cache or default_cache_dir()) / "programs"))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


def say(text: str) -> None:
    """A line on standard error."""
    print(text, file=sys.stderr)


@contextlib.contextmanager
def _heard_interrupts() -> Iterator[None]:
    """Ctrl-C is not lost where nothing can be raised: in what the garbage collector calls, JAX's callback above all."""
    main, before = threading.main_thread(), sys.unraisablehook

    def heard(unraisable: Any) -> None:
        if unraisable.exc_type is not KeyboardInterrupt or main.ident is None:
            before(unraisable)
            return
        # To the main thread itself: only then does a call of the system that it waits in end.
        again = threading.Timer(0.05, signal.pthread_kill, [main.ident, signal.SIGINT])
        again.daemon = True
        again.start()

    sys.unraisablehook = heard
    try:
        yield
    finally:
        if sys.unraisablehook is heard:  # else it is part of another's by now
            sys.unraisablehook = before


def _fail(name: str, message: str) -> int:
    say(f"{name}: {legible(message)}")
    return 2
