# SPDX-License-Identifier: Apache-2.0
"""How fast a checkpoint is read from a bucket and from a file:  python -m tests.benchmarks.storage [MiB]

The bucket is the tests' emulator with the proxy before it, in a process of their own on this machine. Both are Python
on one core, and the emulator copies the whole object for each range: the time from the bucket is theirs, and says
nothing of a network or of the service. What says something of the client is its processor time. The file is in the
page cache, so its rate is that of copying memory. `tensors` reads one tensor of 16 MiB after the other, `pieces` the
whole file into one buffer, which is there already. Of three times the least counts.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from rapid_jax.model import safetensors_file
from rapid_jax.runtime import storage

TIMES = 3
SERVER = """
import sys
from pathlib import Path
from tests.bucket_server import BucketServer
server = BucketServer()
server.put("model.safetensors", Path(sys.argv[1]).read_bytes())
print(server.url, flush=True)
sys.stdin.read()
"""


def least(work: Callable[[], object]) -> tuple[float, float]:
    """(seconds, seconds of this process's processor time), of the fastest."""
    found = []
    for _ in range(TIMES):
        start, used = time.perf_counter(), time.process_time()
        work()
        found.append((time.perf_counter() - start, time.process_time() - used))
    return min(found)


def main(mebibytes: int) -> None:
    """Prints a line for each way."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        rows = 16 << 20  # bytes of a tensor
        shapes = {f"t{index}": (2048, rows // 2048 // 4) for index in range(mebibytes >> 4)}
        random = np.random.default_rng(0)
        arrays = (random.random(shape, np.float32) for shape in shapes.values())
        safetensors_file.write(path, shapes, np.dtype(np.float32), arrays)
        command = [sys.executable, "-c", SERVER, str(path)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdin is not None and server.stdout is not None
            os.environ["STORAGE_EMULATOR_HOST"] = server.stdout.readline().strip()
            size = path.stat().st_size
            buffer = memoryview(bytearray(size))
            for name, text in (("file", str(path)), ("bucket", "gs://models/model.safetensors")):
                place = storage.place_of(text, "place")

                def tensors(place: storage.AnyPlace = place) -> None:
                    for tensor in safetensors_file.tensors_in(place).values():
                        safetensors_file.read(tensor)

                def pieces(place: storage.AnyPlace = place) -> None:
                    storage.read_into(place, 0, buffer)

                for what, work in (("tensors", tensors), ("pieces", pieces)):
                    seconds, used = least(work)
                    rate = f"{size / seconds / 1e6:6.0f} MB/s, processor {used:.3f} s"
                    print(f"{name:6} {what:7} {size / 1e6:5.0f} MB {seconds:6.3f} s {rate}")
            server.stdin.close()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
