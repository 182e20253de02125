# SPDX-License-Identifier: Apache-2.0
"""Which accelerators this host has, known from its files alone: jax is not imported and no driver is started."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path

_GOOGLE, _ETHERNET = "0x1ae0", "0x0042"  # PCI: the vendor of TPUs, and its network card, which is none
_CUDA = ("jax_cuda12_plugin", "jax_cuda13_plugin")


def has_tpu(root: Path = Path("/")) -> bool:
    """Whether a TPU is attached: as a device node (accel, or vfio from v5e on) or on the PCI bus."""
    if any((root / "dev").glob("accel*")) or any((root / "dev" / "vfio").glob("[0-9]*")):
        return True
    for vendor in (root / "sys/bus/pci/devices").glob("*/vendor"):
        device = vendor.with_name("device")
        if vendor.read_text().strip() == _GOOGLE and device.is_file() and device.read_text().strip() != _ETHERNET:
            return True
    return False


def without_tpu(environment: Mapping[str, str], root: Path = Path("/")) -> dict[str, str]:
    """What keeps an installed libtpu quiet where there is no TPU: it looks for one, and prints alarming lines.

    Nothing where a TPU is attached, where the environment says anything about TPUs or platforms, where libtpu is not
    installed, or where an accelerator is attached that is neither NVIDIA's nor a TPU.
    """
    said = any(name == "JAX_PLATFORMS" or name.startswith(("TPU_", "CLOUD_TPU_", "MEGASCALE_")) for name in environment)
    if said or not _installed("libtpu") or has_tpu(root) or (root / "dev/kfd").exists():
        return {}
    nvidia = any((root / "dev" / name).exists() for name in ("nvidia0", "nvidiactl", "dxg"))
    cuda = nvidia and any(map(_installed, _CUDA))
    return {"JAX_PLATFORMS": "cuda,cpu" if cuda else "cpu", "TPU_SKIP_MDS_QUERY": "1"}


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
