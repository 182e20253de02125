# SPDX-License-Identifier: Apache-2.0
"""How busy an NVIDIA GPU is while a command runs.

python -m tests.benchmarks.busy -- longpo pairs --config configs/longpo/smollm2_h200.yaml --set pairs.documents=8

Ends with one JSON line: the command's seconds and exit status, and the share of the time in which a kernel ran, in all
and in each tenth of it, as nvidia-smi tells it five times a second. That is no share of what the GPU could compute.
"""

import itertools
import json
import statistics
import subprocess
import sys
import time

SMI = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--id=0", "-lms", "200"]


def tenths(shares: list[int]) -> list[float]:
    """The mean of each tenth of the values."""
    ends = [round(len(shares) * tenth / 10) for tenth in range(11)]
    parts = [shares[start:end] for start, end in itertools.pairwise(ends)]
    return [round(statistics.fmean(part), 1) for part in parts if part]


def main() -> int:
    """Runs what is behind `--`; its status."""
    command = sys.argv[1:]
    if command[:1] != ["--"] or len(command) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    with subprocess.Popen(SMI, stdout=subprocess.PIPE, text=True) as smi:
        start = time.monotonic()
        try:
            status = subprocess.run(command[1:]).returncode
        finally:
            smi.terminate()
        seconds = time.monotonic() - start
        shares = [int(line) for line in smi.communicate()[0].split() if line.isdigit()]
    busy = round(statistics.fmean(shares), 1) if shares else None
    print(json.dumps({"seconds": round(seconds, 1), "status": status, "busy": busy, "tenths": tenths(shares)}))
    return status


if __name__ == "__main__":
    sys.exit(main())
