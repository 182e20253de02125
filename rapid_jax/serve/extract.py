# SPDX-License-Identifier: Apache-2.0
"""The text of an uploaded file, read in a process of its own that the kernel bounds: files are somebody else's.

Run as a program it reads a file from standard input and writes its text, in UTF-8, to standard output; status 2 and a
line on standard error where there is none to be had.
"""

import asyncio
import os
import resource
import subprocess
import sys
from typing import Any, Final

from rapid_jax.documents import text_of
from rapid_jax.runtime.errors import InputError, legible

MEMORY: Final = 4 << 30
SECONDS: Final = 120
_NAME: Final = "the file"
_SUFFIXES: Final = (".pdf", ".html", ".htm", ".xhtml")


async def extract_text(file: Any, filename: str) -> str:
    """The text of an open file; of its name only the ending is used. Raises InputError where there is no text."""
    suffix = next((one for one in _SUFFIXES if filename.lower().endswith(one)), ".txt")
    paths = os.pathsep.join(path for path in sys.path if path)
    # By subprocess and not by the loop: uvloop forks, which a process in which JAX has threads must not do.
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", __name__, suffix],
        stdin=file.fileno(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"PYTHONPATH": paths},
    )
    try:
        text, words = await asyncio.to_thread(process.communicate, timeout=SECONDS + 10)
    except subprocess.TimeoutExpired as error:
        raise InputError(f"{_NAME}: reading it takes longer than {SECONDS} s") from error
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    if process.returncode == 2:
        raise InputError(words.decode("utf-8", "replace").splitlines()[-1])
    if process.returncode != 0:
        raise InputError(f"{_NAME}: reading it takes more than {SECONDS} s or {MEMORY >> 30} GiB")
    return text.decode("utf-8")


def main(suffix: str) -> int:
    """Reads standard input, writes the text."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        text = text_of(sys.stdin.buffer.read(), _NAME, suffix)
    except InputError as error:
        sys.stderr.write(f"{legible(str(error))}\n")
        return 2
    sys.stdout.buffer.write(text.encode("utf-8", "replace"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
