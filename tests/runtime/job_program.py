# SPDX-License-Identifier: Apache-2.0
"""A command for tests of jobs: `write FILE`, `sleep FILE`, `fail`, `again`."""

import os
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "write":
        Path(rest[0]).write_text(os.environ.get("SHARE", "none"))
    elif what == "sleep":
        Path(rest[0]).write_text(str(os.getpid()))
        time.sleep(60)
    elif what == "fail":
        print("first\nthe reason")
        sys.exit(2)
    elif what == "again":
        sys.exit(75)
