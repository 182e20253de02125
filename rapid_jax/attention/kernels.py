# SPDX-License-Identifier: Apache-2.0
"""Kernels by name: what computes a block of attention on one device. All of them give the same numbers.

xla     plain XLA, blockwise (`xla.py`): every platform, and the reference of the others
splash  JAX's block-sparse flash attention for TPUs (`splash.py`)
cudnn   flash attention of cuDNN for NVIDIA GPUs (`cudnn.py`)
auto    splash on TPUs, cudnn on GPUs, else xla
"""

from dataclasses import dataclass
from typing import Protocol, TypeAlias, get_args

import jax
from jax.sharding import AbstractMesh, Mesh

from rapid_jax.attention.config import KernelName
from rapid_jax.attention.online_softmax import Rows, Slots, SoftmaxState
from rapid_jax.runtime.errors import InputError

Gradients: TypeAlias = tuple[jax.Array, jax.Array, jax.Array]  # of q_BKRH, k_BKSH, v_BKSH, float32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cotangent:
    """What the backward pass of a block needs to know of the attention over all blocks."""

    out_BKRH: jax.Array  # the finished output over every key that the row sees, in the queries' dtype
    d_out_BKRH: jax.Array  # its gradient, in the queries' dtype
    delta_BKR: jax.Array  # float32, sum over H of d_out * out
    log_sum_BKR: jax.Array  # float32, log of the softmax sum over every key that the row sees; -inf if it sees none


class Kernel(Protocol):
    """One device's attention of rows over slots; what sees what is told by positions and branch tags alone.

    `runs` promises how positions lie: rows and slots are that many equal runs of ascending positions, the later run
    behind the earlier (the zigzag order has 2), and no empty slot comes before a filled one. 0 promises nothing.
    """

    def forward(
        self, rows: Rows, slots: Slots, *, scale: float, runs: int = 0, used: jax.Array | None = None
    ) -> SoftmaxState:
        """Attention of the rows over the slots; slots from `used` on, where given, are empty."""
        ...

    def backward(self, rows: Rows, slots: Slots, cotangent: Cotangent, *, scale: float, runs: int = 0) -> Gradients:
        """What these slots contribute to the gradients of q, and the gradients of their k and v."""
        ...


def platform_of(mesh: Mesh | AbstractMesh | None) -> str:
    """cpu, gpu or tpu: what the mesh's devices are, or the default device."""
    platform = mesh.devices.flat[0].platform if isinstance(mesh, Mesh) else jax.default_backend()
    return "gpu" if platform in ("cuda", "rocm") else platform


def kernel_of(name: KernelName, platform: str, block: int) -> Kernel:
    """The kernel of that name for a platform; `block` is the number of slots that xla attends at once.

    splash on a CPU is interpreted: slow, and the same numbers (tests).
    """
    if name not in get_args(KernelName):
        raise InputError(f"kernel must be one of {', '.join(get_args(KernelName))}, got {name!r}")
    if name == "auto":
        name = {"tpu": "splash", "gpu": "cudnn"}.get(platform, "xla")  # type: ignore[assignment]
    if name == "splash":
        from rapid_jax.attention.splash import Splash

        if platform == "gpu":
            raise InputError("kernel splash is for TPUs, got a GPU: use cudnn or auto")
        return Splash(block=block, interpret=platform == "cpu")
    if name == "cudnn":
        from rapid_jax.attention.cudnn import Cudnn

        if platform != "gpu":
            raise InputError(f"kernel cudnn is for NVIDIA GPUs, got platform {platform}: use xla or auto")
        return Cudnn(block=block)
    from rapid_jax.attention.xla import Xla

    return Xla(block=block)
