# SPDX-License-Identifier: Apache-2.0
"""Two processes on this machine as one run: the same answer as one process, and no process outlives the other."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rapid_jax.runtime.distributed import LOST_PEER
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.meeting import Seat
from rapid_jax.runtime.storage import working_place
from tests.bucket_server import BUCKET
from tests.engine.prefix_cases import MESHES, cache_of, check_head, decoder_on, tokens
from tests.retrieval import encoders
from tests.tiny_models import save_decoder, words

ROOT = Path(__file__).resolve().parents[1]
OWN_MESH = ("data=1", "fsdp=1", "context=2", "model=2", "replicate_kv=false")
WAIT_S = 240  # a busy machine compiles slowly


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(devices: int, seat: tuple[int, int, int] | None = None) -> dict[str, str]:
    names = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONUNBUFFERED": "1"}
    if seat is not None:
        port, count, index = map(str, seat)
        names |= {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": count,
            "JAX_PROCESS_ID": index,
        }
    return names


def spawn(command: list[str], names: dict[str, str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *command], env=names, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.fixture(scope="module")
def question(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("processes")
    (folder / "book.txt").write_text(words(400))
    target, encoder = save_decoder(folder / "model"), encoders.save(folder / "encoder", "bert")
    settings = {
        "models.target": target,
        "models.encoder": encoder,
        "retrieval.chunk_tokens": 64,
        "retrieval.min_tokens": 128,
        "compute.prefill_chunk": 128,
        "sampling.temperature": 0.8,
        "sampling.seed": 3,
        "cache.folder": folder / "cache",
        "cache.programs": "false",
        "cache.prefixes": "false",  # else who comes second prefills nothing
    }
    command = ["-m", "rapid_jax", "answer", "--document", str(folder / "book.txt"), "--question", "w12 w34?"]
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    return command


def meshed(question: list[str], *settings: str) -> list[str]:
    return question + [word for setting in settings for word in ("--set", setting)]


def finished(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=WAIT_S)
    return process.returncode, out, err


@pytest.mark.parametrize(
    ("mesh", "more"),
    [
        # gamma goes by the clock, which two processes must agree on; only greedy answers are the same again
        (
            ["mesh.context=4", "mesh.model=2"],
            [
                "speculation.gamma=auto",
                "speculation.mode=lossless",
                "sampling.temperature=0.0",
                "compute.kv=int8",
                "models.drafter_weights=int8",
            ],
        ),
        # the drafter's devices are others of both processes
        (
            ["mesh.context=4", *(f"drafter_mesh.{key}" for key in OWN_MESH)],
            ["speculation.gamma=3", "models.drafter=TARGET"],
        ),
    ],
    ids=["one mesh, rounded", "the drafter apart"],
)
def test_two_processes_answer_as_one_does(question, mesh, more, tmp_path):
    target = question[question.index("--set") + 1].partition("=")[2]
    more = [setting.replace("TARGET", target) for setting in (*more, "sampling.max_new_tokens=24")]
    code, answer, err = finished(spawn(meshed(question, *more), environment(1)))
    assert code == 0 and len(answer) > 20, err
    port = free_port()
    cache = ("cache.prefixes=true", f"cache.folder={tmp_path}")
    pair = [spawn(meshed(question, *mesh, *more, *cache), environment(4, (port, 2, index))) for index in (0, 1)]
    results = [finished(process) for process in pair]
    assert [code for code, _, _ in results] == [0, 0], results[0][2][-3000:]
    assert results[0][1] == answer
    assert results[1][1] == "" and "retrieved" not in results[1][2]
    assert list((tmp_path / "prefixes").glob("*/manifest.json")), "stored by both"


def test_two_processes_evaluate_as_one_does(question, tmp_path):
    """Both compute every answer; one of them writes them, once."""
    lines = [
        {"document": words(300, seed=seed), "question": "w12 w34?", "answers": ["w5"], "max_new_tokens": 6}
        for seed in (1, 2, 3)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = [*question[question.index("--set") :], "--set", "sampling.temperature=0.0"]
    command = ["-m", "rapid_jax", "evaluate", "--suite", "qa", "--data", str(data), "--modes", "target", *settings]

    def answers(name: str) -> list[dict]:
        folder = tmp_path / name
        assert {path.name for path in folder.glob("report.*")} == {"report.md", "report.html"}
        return [json.loads(line) for line in (folder / "answers-target.jsonl").read_text().splitlines()]

    code, _, err = finished(spawn([*command, "--out", str(tmp_path / "one")], environment(1)))
    assert code == 0, err
    port, both = free_port(), [*command, "--set", "mesh.context=8", "--out", str(tmp_path / "two")]
    pair = [spawn(both, environment(4, (port, 2, index))) for index in (0, 1)]
    results = [finished(process) for process in pair]
    assert [code for code, _, _ in results] == [0, 0], results[0][2][-3000:]
    assert "report:" in results[0][1] and "report:" not in results[1][1]
    kept = ("id", "answer", "prompt_hash", "score")
    one, two = ([[line[name] for name in kept] for line in answers(name)] for name in ("one", "two"))
    assert len(one) == 3 and one == two


def test_a_killed_process_takes_the_other_with_it(question):
    """The one that all others have reached; of another one: below."""
    port = free_port()
    command = meshed(question, "mesh.context=8", "sampling.max_new_tokens=500")
    pair = [spawn(command, environment(4, (port, 2, index))) for index in (0, 1)]
    assert pair[0].stderr is not None
    for line in pair[0].stderr:  # models are loaded, and the run is in its prefill or beyond
        if "retrieved" in line:
            break
    ends_with_its_peer(pair, 0)


def test_processes_that_read_different_documents_say_so(question, tmp_path):
    """Only once the prompts are made: before, nothing here needs the other."""
    (tmp_path / "other.txt").write_text(words(400, seed=9))
    other = [str(tmp_path / "other.txt") if word.endswith("book.txt") else word for word in question]
    port = free_port()
    pair = [
        spawn(meshed(command, "mesh.context=8"), environment(4, (port, 2, index)))
        for index, command in enumerate((question, other))
    ]
    for code, out, err in map(finished, pair):
        assert (code, out) == (2, "")
        assert "rapid: expected the same prompts on all 2 processes, got [" in err


def test_weights_that_differ_in_one_value_are_found_before_a_model_is_loaded(question, tmp_path):
    """They lie in other folders, too, which alone is no difference."""
    folder = Path(question[question.index("--set") + 1].partition("=")[2])
    shutil.copytree(folder, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    other = [word.replace(str(folder), str(tmp_path / "model")) for word in question]
    port = free_port()
    pair = [
        spawn(meshed(command, "mesh.context=8"), environment(4, (port, 2, index)))
        for index, command in enumerate((question, other))
    ]
    for code, out, err in map(finished, pair):
        assert (code, out) == (2, "") and len(err.splitlines()) == 1, err
        assert err.startswith("rapid: expected the same target.weights on all 2 processes, got ")


STORING = """
import sys
from rapid_jax.runtime.distributed import meet
with meet() as run:
    run.start_jax()
    import jax, numpy as np
    from rapid_jax.engine import heads
    from rapid_jax.runtime.mesh_config import MeshConfig
    from rapid_jax.runtime.storage import working_place
    from tests.engine.prefix_cases import cache_of, decoder_on, prefix_of, tokens
    heads._LOOKING_S = 0.3
    decoder, head = decoder_on(MeshConfig(context=2, model=2)), tokens(35)
    want = prefix_of(decoder, head)

    def check(found):
        for one, other in zip(*map(jax.tree.leaves, (found, want)), strict=found is not None):
            assert one.sharding == other.sharding
            for mine, its in zip(one.addressable_shards, other.addressable_shards, strict=True):
                np.testing.assert_array_equal(mine.data, its.data)

    place = working_place(sys.argv[1], "cache.folder")
    each = cache_of(decoder, place).bytes_for(35)
    cache = cache_of(decoder, place, device_gib=1.9 * each / 2**30, host_gib=2.5 * each / 2**30)
    first = cache.put(cache.name(head), prefix_of(decoder, head))
    cache.put(cache.name(other := tokens(35, 1)), prefix_of(decoder, other))
    there = cache.bytes()
    print(cache.tier(first.key), there["device"] == each, 0 < there["host"] <= each, end=" ")
    found = cache.find(cache.name(head))
    check(found.prefix)
    print(found.tier, cache.tier(cache.name(other).key), cache.bytes() == there, end=" ")
    cache.remove(first.key)
    longer = cache.find(cache.name([*other[:20], *tokens(10, 2)]))
    print(longer.tier, longer.tokens, cache.bytes()["host"])
    for place in (working_place(text, "cache.folder") for text in sys.argv[1:]):
        cache = cache_of(decoder, place, disk_gib=1.0)
        cache.put(cache.name(head), prefix_of(decoder, head))
        cache.save()
        found = cache_of(decoder, place, disk_gib=1.0).find(cache.name(head))
        print(found.tier, cache_of(decoder, place, disk_gib=1.0).find(cache.name([*head[:20], *tokens(30)])).tokens)
        check(found.prefix)
"""


def test_each_of_two_processes_stores_and_reads_what_its_devices_hold_where_both_see_the_place(tmp_path, bucket):
    decoder, head, port = decoder_on(MESHES["one device"]), tokens(35), free_port()
    shared = [str(tmp_path / "shared"), f"gs://{BUCKET}/two-processes"]
    pair = [
        spawn(["-c", STORING, *shared, str(tmp_path / f"own-{index}")], environment(2, (port, 2, index)))
        for index in (0, 1)
    ]
    for index, (code, out, err) in enumerate(map(finished, pair)):
        in_memory = "host True True host host True host 16 0\n"
        assert (code, out) == (0, in_memory + "disk 16\ndisk 16\nNone 0\n"), err[-3000:]
        assert ("keys and values of documents are not stored: cache.folder: expected one folder" in err) == (not index)
    for place in shared:
        cache = cache_of(decoder, working_place(place, "cache.folder"), disk_gib=1.0)
        check_head(cache.find(cache.name(head)).prefix, decoder, head, len(head))


MEETING = """
import sys, time
from rapid_jax.runtime import distributed
from rapid_jax.runtime.errors import InputError
patience, what = sys.argv[1:]
try:
    with distributed.meet(patience=float(patience)) as run:
        print("met", flush=True)
        if "jax" in what:
            run.start_jax()
            import jax
            print(jax.process_count(), jax.device_count(), flush=True)
        if "bad" in what:
            raise InputError("no such file")
        if "broken" in what:
            raise RuntimeError("a fault")
        if "interrupted" in what:
            raise KeyboardInterrupt  # no signal: a shell has its background jobs ignore SIGINT
        if "waits" in what:
            time.sleep(200)
except InputError as error:
    sys.exit(f"{error}")
"""


def meeting(port: int, *seats: tuple[int, str], count: int, patience: float = 60, host: str = "127.0.0.1"):
    names = [environment(2, (port, count, index)) for index, _ in seats]
    for name in names:
        name["JAX_COORDINATOR_ADDRESS"] = f"{host}:{port}"
    return [spawn(["-c", MEETING, str(patience), what], name) for name, (_, what) in zip(names, seats, strict=True)]


def ends_with_its_peer(pair: list[subprocess.Popen], killed: int) -> None:
    pair[killed].send_signal(signal.SIGKILL)
    start = time.monotonic()
    code, _, err = finished(pair[1 - killed])
    assert time.monotonic() - start < 60
    assert code == LOST_PEER and f"rapid: process {killed} of 2 has ended without a word" in err
    finished(pair[killed])


def test_a_killed_process_that_leads_nobody_takes_the_other_with_it():
    pair = meeting(free_port(), (0, "jax waits"), (1, "jax waits"), count=2)
    for process in pair:  # what is said once JAX has met, too
        assert process.stdout and [process.stdout.readline() for _ in range(2)] == ["met\n", "2 4\n"]
    ends_with_its_peer(pair, 1)


@pytest.mark.parametrize(
    ("what", "own", "theirs", "said"),
    [
        ("bad", 2, 2, "process 2 of 3 has ended: no such file"),
        ("broken", 1, LOST_PEER, "process 2 of 3 has failed"),
        ("interrupted", 130, LOST_PEER, "process 2 of 3 was interrupted"),
    ],
)
def test_the_reason_of_one_reaches_all_at_once(what, own, theirs, said):
    """Process 2 is known to process 0 alone, which tells process 1."""
    start = time.monotonic()
    every = meeting(free_port(), (0, "waits"), (1, "waits"), (2, what), count=3)
    *others, (code, _, err) = map(finished, every)
    assert time.monotonic() - start < 60
    assert code == own and {"bad": "rapid: no such file", "broken": "RuntimeError: a fault"}.get(what, "rapid: ") in err
    assert [(code, err.strip()) for code, _, err in others] == [(theirs, f"rapid: {said}")] * 2


def test_an_address_of_the_newer_kind():
    pair = meeting(free_port(), (0, "jax"), (1, "jax"), count=2, host="[::1]")
    assert [finished(process)[:2] for process in pair] == [(0, "met\n2 4\n")] * 2


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "together, JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID not set"),
        ({"address": "8476"}, "JAX_COORDINATOR_ADDRESS: expected HOST:PORT, got '8476'"),
        ({"index": "2"}, "JAX_PROCESS_ID: expected a number below JAX_NUM_PROCESSES = 2, got '2'"),
        ({"TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2"}, "one of 2 of a TPU slice"),
    ],
)
def test_an_environment_that_makes_no_sense_is_one_line(names, message):
    if {"address", "index"} & names.keys():
        names = {
            "JAX_COORDINATOR_ADDRESS": names.get("address", "10.0.0.1:8476"),
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": names.get("index", "0"),
        }
    with pytest.raises(InputError, match=message):
        Seat.of(names)


def test_the_environment_of_one_process_is_none_and_of_more_is_a_seat():
    assert Seat.of({}) is None and Seat.of({"TPU_WORKER_HOSTNAMES": "localhost"}) is None
    names = {"JAX_COORDINATOR_ADDRESS": "[::1]:8476", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    assert Seat.of(names) == Seat("::1", 8476, 2, 1)
