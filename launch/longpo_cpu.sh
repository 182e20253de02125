#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# LongPO from documents to a trained model in two rounds, on any machine:  bash launch/longpo_cpu.sh [--set key=value ...]
#
# Makes the environment (once), writes Python's own language reference to files (it comes with every Python), and has
# SmolLM2-135M teach itself on them: what configs/longpo/smollm2_cpu.yaml says. Started again it goes on where it
# stopped. The trained model is in runs/smollm2_cpu/round-2/export, as a Hugging Face folder.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT"

bash launch/setup_environment.sh demo longpo

.venv/bin/python - .venv/longpo-corpus <<'PY'
import sys
from pathlib import Path
from pydoc_data.topics import topics
from rapid_jax.runtime.files import replace_folder

folder = Path(sys.argv[1])
if not folder.exists():
    with replace_folder(folder) as temporary:
        for name, text in topics.items():
            (temporary / f"{name}.txt").write_text(text.strip() + "\n", encoding="utf-8")
PY

exec .venv/bin/longpo rounds --config configs/longpo/smollm2_cpu.yaml "$@"
