# SPDX-License-Identifier: Apache-2.0
"""`longpo round` on a tiny model as a process, on a disk or in a bucket: settings, documents, and what came of it."""

import json
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from typing import Any

from longpo_jax.metrics import FILE
from rapid_jax.runtime.storage import files_below
from tests.bucket_server import BucketServer
from tests.test_processes import ROOT, WAIT_S, environment, free_port
from tests.tiny_models import save_decoder, words

CONFIG = ROOT / "configs" / "longpo" / "smollm2_cpu.yaml"
DOCUMENTS = 4
# The command itself; what random weights say has no question in it, so one is made of their words.
COMMAND = """
import sys
import longpo_jax.instruct
from longpo_jax.cli import main
longpo_jax.instruct.parsed = lambda text, config: [f"what of w{sum(map(ord, text)) % 97}?"]
sys.exit(main(sys.argv[1:]))
"""
SETTINGS = (
    "model.dtype=float32",
    "corpus.min_tokens=100",
    "corpus.max_tokens=400",
    "excerpts.min_tokens=48",
    "excerpts.max_tokens=80",
    "excerpts.per_document=1",
    "instruct.temperature=1.0",
    "instruct.at_least=1",
    "instruct.max_new_tokens=8",
    "pairs.temperature=1.0",
    "pairs.max_new_tokens=12",
    "pairs.max_context=1024",
    "pairs.batch=4",
    "pairs.documents=4",
    "pairs.min_words=0",
    "pairs.repeats_chosen=1",
    "pairs.repeats_rejected=1",
    "pairs.shard_pairs=3",
    "generation.prefill_chunk=64",
    "generation.attention_block=512",
    "generation.mesh.model=2",
    "mesh.data=2",
    "train.lengths=[512]",
    "train.tail=128",
    "train.rows_per_step=2",
    "train.epochs=2",
    "train.max_steps=4",
    "train.save_every=1",
    "train.keep=2",
    "train.attention_block=64",
    "train.logits_chunk=64",
    "optimizer.learning_rate=1e-3",
    "compute.programs=false",
)


def prepared(folder: Path) -> Path:
    """A model and documents for it in a folder."""
    save_decoder(folder / "model")
    (folder / "books").mkdir()
    for index in range(DOCUMENTS):
        (folder / "books" / f"{index}.txt").write_text(words(50, seed=index))
    return folder


def started(count: int, source: str, run: str, folder: Path, *more: str, stage: str = "round") -> list[Popen[str]]:
    """The command in `count` processes, each with a working folder of its own; model and documents lie at `source`."""
    given = (f"model.source={source}/model", f"corpus.sources=[book={source}/books]", f"run={run}", *SETTINGS, *more)
    settings = [word for setting in (*given, "rounds=[]") for word in ("--set", setting)]
    command = [sys.executable, "-c", COMMAND, stage, "--config", str(CONFIG), *settings]
    port, processes = free_port(), []
    for index in range(count):
        names = environment(8, None) if count == 1 else environment(1, (port, count, index))
        here = Path(tempfile.mkdtemp(dir=folder))
        names |= {"PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
        processes.append(Popen(command, env=names, cwd=here, text=True, stdout=DEVNULL, stderr=PIPE))
    return processes


def ended(processes: Sequence[Popen[str]]) -> tuple[list[int], str]:
    """(the exit statuses, what the first process said)."""
    said = [process.communicate(timeout=WAIT_S)[1] for process in processes]
    return [process.returncode for process in processes], said[0]


class KillAt:
    """A fault of the server: at its request number `moment` some processes are sent a signal, and that request fails.

    `what` is the fault, "hang up" (the request does not happen), "lost" (it does) or none.
    """

    def __init__(self, moment: int, processes: Sequence[Popen[str]], number: int, what: str | None):
        self._left, self._processes, self._number, self._what = moment, processes, number, what
        self._lock, self.at = threading.Lock(), ""

    def __call__(self, asked: str) -> str | None:
        with self._lock:
            self._left -= 1
            if self._left != 0:
                return None
            self.at = asked
            for process in self._processes:
                process.send_signal(self._number)
        return self._what


def contents(read: Callable[[str], bytes], names: Iterable[str]) -> dict[str, Any]:
    """What a round has made, but for what depends on the clock: files by name, of the metrics the losses.

    Training's done.json has the last line of the metrics in it, and the export's a digest of that.
    """
    kept = ("pairs/", "reference/", "export/", f"train/{FILE}")
    found: dict[str, Any] = {name: read(name) for name in names if name.startswith(kept)}
    del found["export/done.json"]
    lines = [json.loads(line) for line in found.pop(f"train/{FILE}").splitlines()]
    return found | {"metrics": [(line["step"], line["loss"], line["grad_norm"]) for line in lines]}


def on_disk(run: Path) -> dict[str, Any]:
    """`contents` of a run in a folder."""
    return contents(lambda name: (run / name).read_bytes(), files_below(run))


def in_bucket(server: BucketServer, run: str) -> dict[str, Any]:
    """`contents` of a run in the bucket."""
    names = [name.removeprefix(f"{run}/") for name in server.names(f"{run}/")]
    return contents(lambda name: server.get(f"{run}/{name}"), names)
