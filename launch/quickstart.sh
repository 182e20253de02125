#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# One question about a long document, on any machine:  bash launch/quickstart.sh [--set key=value ...]
#
# Makes the environment (once), writes Python's own language reference to a file (it comes with every Python), and
# answers a question about it with SmolLM2-135M and MiniLM retrieval, against plain decoding. RAPID_EXTRAS=cuda13 adds a GPU.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
DOCUMENT=$ROOT/.venv/quickstart/python-language-reference.txt

bash "$ROOT/launch/setup_environment.sh" demo

"$ROOT/.venv/bin/python" - "$DOCUMENT" <<'PY'
import sys
from pathlib import Path
from pydoc_data.topics import topics
from rapid_jax.runtime.files import replace_file

path = Path(sys.argv[1])
if not path.exists():
    with replace_file(path) as temporary:
        temporary.write_text("\n\n".join(topics[name].strip() for name in sorted(topics)) + "\n", encoding="utf-8")
PY

exec "$ROOT/.venv/bin/rapid" answer --config "$ROOT/configs/rapid/quickstart.yaml" --document "$DOCUMENT" \
    --question "Which statement is used to wrap the execution of a block with methods defined by a context manager?" \
    --compare "$@"
