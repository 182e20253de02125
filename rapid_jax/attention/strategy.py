# SPDX-License-Identifier: Apache-2.0
"""How attention is computed: by which kernel, over which devices. Changes speed and memory, results by rounding."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from rapid_jax.attention.config import KernelName, Over
from rapid_jax.attention.decoding import Decode, decode_of, takes_stack
from rapid_jax.attention.kernels import Kernel, kernel_of, platform_of
from rapid_jax.attention.ring import Hops
from rapid_jax.runtime.axes import ACT, spec_of
from rapid_jax.runtime.errors import InputError


@dataclass(frozen=True)
class Strategy:
    """Static. Without a mesh everything is on one device.

    On a mesh every array that goes in or comes out is a global one, split by its letters: `spec`.
    """

    block: int  # slots that plain XLA attends at once
    mesh: Mesh | None = None
    kernel: KernelName = "auto"
    over: Over = "ring"
    batch: tuple[str, ...] = ("data", "fsdp")  # mesh axes that the batch is split over; serving: data alone

    @property
    def hops(self) -> Hops:
        """Along the context axis, if there is one."""
        return Hops(None if self.mesh is None else "context", self.over)

    @property
    def context(self) -> int:
        """Devices that share a sequence."""
        return 1 if self.mesh is None else self.mesh.shape["context"]

    def chosen_kernel(self) -> Kernel:
        """The kernel for the mesh's devices."""
        return kernel_of(self.kernel, platform_of(self.mesh), self.block)

    def chosen_decode(self) -> Decode:
        """How a few new tokens attend to a prefix and a tail."""
        return decode_of(self.kernel, platform_of(self.mesh), self.block)

    @property
    def decodes_from_stack(self) -> bool:
        """Whether `chosen_decode` takes keys and values of all layers and the number of one."""
        return takes_stack(self.kernel, platform_of(self.mesh))

    def spec(self, name: str) -> PartitionSpec:
        """How an activation of this name lies on the mesh; a scalar's name is empty."""
        return PartitionSpec() if not name else spec_of(name, {**ACT, "B": self.batch})

    def per_device(self, function: Callable, names: tuple[str, ...], results: tuple[str, ...]) -> Callable:
        """`function` of each device's own parts; its arguments and results lie as their names say."""
        if self.mesh is None:
            return function
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=tuple(self.spec(name) for name in names),
            out_specs=tuple(self.spec(name) for name in results),
            check_vma=False,  # scans start from constants, which are not yet marked as varying
        )

    def kv_heads(self, heads: int) -> int:
        """How many kv heads a cache holds: with fewer than devices on the model axis, one copy for each device."""
        devices = 1 if self.mesh is None else self.mesh.shape["model"]
        if heads % devices and devices % heads:
            raise InputError(f"{heads} kv heads cannot be shared out over model = {devices}: neither divides the other")
        return max(heads, devices)

    def with_copies(self, x_BTKH: jax.Array) -> jax.Array:
        """The keys or values with as many heads as the cache holds."""
        copies = self.kv_heads(x_BTKH.shape[2]) // x_BTKH.shape[2]
        return x_BTKH if copies == 1 else jnp.repeat(x_BTKH, copies, axis=2)
