# SPDX-License-Identifier: Apache-2.0
"""`longpo round` in a bucket, killed at random moments and gone on with:

    python -m tests.benchmarks.bucket_kills [KILLS] [PROCESSES] [SEED]

PROCESSES is 2 or 4, each with a working folder and one device of its own; without kills one round is made. The bucket
is the tests' emulator with the proxy before it. A moment is a request, which happens or does not, and whose
reply nobody hears; killed (SIGKILL, every fifth time SIGTERM) are all processes or one of them. What a round leaves in
the end must be what one process made on a local folder that was never killed, byte for byte; of the metrics the losses.
"""

import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import tests.conftest  # noqa: F401  # programs are compiled once for all processes, quickly
from tests.bucket_server import BucketServer
from tests.longpo.tiny_round import KillAt, ended, in_bucket, on_disk, prepared, started

MESHES = {2: (), 4: ("mesh.context=2", "generation.mesh.data=2")}  # of so many devices; the local run has the same
MOST = 900  # requests of a start that is not killed are some 1,700 of two processes, most of them while training


def main(kills: int, count: int, seed: int) -> int:
    """Prints a line a start; the number of rounds that are not as they must be."""
    chance, server, wrong, done, number = random.Random(seed), BucketServer(), 0, 0, 0
    os.environ["STORAGE_EMULATOR_HOST"] = server.url
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = server.put_folder(prepared(folder), "in")
        clock = time.monotonic()
        codes, said = ended(started(1, source, str(folder / "run"), folder, *MESHES[count]))
        print(f"1 process, local folder: {codes}, {time.monotonic() - clock:.0f} s", flush=True)
        assert codes == [0], said
        expected = on_disk(folder / "run")
        while done < kills or not number:
            number += 1
            run, codes = f"run-{number}", [1]
            while codes != [0] * len(codes):
                clock = time.monotonic()
                processes = started(count, source, f"gs://models/{run}", folder, *MESHES[count])
                kind = signal.SIGTERM if done % 5 == 4 else signal.SIGKILL
                some = processes if chance.random() < 0.5 else [chance.choice(processes)]
                what = chance.choice(["hang up", "lost"]) if kind == signal.SIGKILL else None
                server.heal()
                server.fault = fault = KillAt(chance.randint(5, MOST) if done < kills else 0, some, kind, what)
                codes, said = ended(processes)
                done += bool(fault.at)
                killed = f"{kind.name} of {len(some)} at {fault.at[:110]!r}, {what}" if fault.at else "not killed"
                print(f"{run}: {codes}, {time.monotonic() - clock:.0f} s, {killed}", flush=True)
                if not fault.at and codes != [0] * count:
                    print(said, flush=True)
                    return 1
            server.heal()
            got = in_bucket(server, run)
            differing = sorted(name for name in {*got, *expected} if got.get(name) != expected.get(name))
            wrong += bool(differing)
            print(
                f"{run}: {'other than expected: ' + ', '.join(differing) if differing else 'as expected'}", flush=True
            )
    print(f"{done} kills, {number} rounds of {count} processes, {wrong} of them wrong")
    server.close()
    return wrong


if __name__ == "__main__":
    given = [int(word) for word in sys.argv[1:]]
    sys.exit(main(*(given + [20, 2, 0][len(given) :])))
