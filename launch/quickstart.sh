#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# One question about a long document, on any machine:  bash launch/quickstart.sh [--set key=value ...]
#
# Makes the environment (once), writes Python's own language reference to a file (it comes with every Python), and asks
# SmolLM2-135M about its first 8K tokens: by RAPID, from those tokens alone, and from what MiniLM retrieves of them alone.
# Ends with a table of the three. A second run takes seconds: prefill, embeddings and compiled programs are kept in
# ~/.cache/rapid_jax. RAPID_EXTRAS=cuda13 adds a GPU.
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
    --question "What are assert statements for? Answer in one sentence." \
    --compare "$@"
