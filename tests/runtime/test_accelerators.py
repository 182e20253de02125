# SPDX-License-Identifier: Apache-2.0
"""Whether a host has a TPU, and what is said to jax where it has none."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rapid_jax.runtime import accelerators
from rapid_jax.runtime.accelerators import has_tpu, without_tpu

ON_CPU = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}


def host(root: Path, *nodes: str, pci: tuple[tuple[str, str], ...] = ()) -> Path:
    """A file system with device nodes and PCI cards of (vendor, device)."""
    for node in nodes:
        (root / "dev" / node).parent.mkdir(parents=True, exist_ok=True)
        (root / "dev" / node).touch()
    for number, (vendor, device) in enumerate(pci):
        card = root / f"sys/bus/pci/devices/0000:00:0{number}.0"
        card.mkdir(parents=True)
        (card / "vendor").write_text(f"{vendor}\n")
        (card / "device").write_text(f"{device}\n")
    return root


@pytest.fixture
def installed(monkeypatch) -> set[str]:
    found = {"libtpu"}
    monkeypatch.setattr(accelerators, "_installed", found.__contains__)
    return found


@pytest.mark.parametrize(
    ("nodes", "pci", "there"),
    [
        ((), (), False),
        (("accel0",), (), True),
        (("vfio/0", "vfio/vfio"), (), True),
        (("vfio/vfio",), (), False),
        ((), (("0x8086", "0x1237"), ("0x1ae0", "0x0042")), False),
        ((), (("0x1ae0", "0x0042"), ("0x1ae0", "0x0063")), True),
        ((), (("0x1ae0", "0x0099"),), True),
    ],
)
def test_a_tpu_is_known_by_its_nodes_or_its_card(tmp_path, installed, nodes, pci, there):
    root = host(tmp_path, *nodes, pci=pci)
    assert has_tpu(root) is there
    assert without_tpu({}, root) == ({} if there else ON_CPU)


def test_gpus_stay_in_use(tmp_path, installed):
    root = host(tmp_path, "nvidia0")
    assert without_tpu({}, root) == ON_CPU
    installed.add("jax_cuda13_plugin")
    assert without_tpu({}, root) == ON_CPU | {"JAX_PLATFORMS": "cuda,cpu"}
    assert without_tpu({}, host(tmp_path / "amd", "kfd")) == {}


def test_what_the_environment_says_stands(tmp_path, installed):
    for name in ("JAX_PLATFORMS", "TPU_SKIP_MDS_QUERY", "TPU_WORKER_ID", "CLOUD_TPU_TASK_ID"):
        assert without_tpu({name: ""}, tmp_path) == {}
    installed.clear()
    assert without_tpu({}, tmp_path) == {}


@pytest.mark.skipif(has_tpu() or importlib.util.find_spec("libtpu") is None, reason="needs libtpu and no TPU")
def test_libtpu_says_nothing_on_a_host_without_one():
    program = (
        "from rapid_jax.runtime.command_line import prepare_jax\n"
        "prepare_jax(programs=False)\n"
        "import jax\n"
        "print(jax.devices()[0].platform)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS" and "TPU" not in name}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert (done.stdout.split(), done.stderr) == (["cpu"], "")
