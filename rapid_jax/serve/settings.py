# SPDX-License-Identifier: Apache-2.0
"""What the server itself can be told; all that concerns answers is in RapidConfig."""

import ipaddress
import math
from dataclasses import dataclass

from rapid_jax.runtime.errors import InputError

_NAMES = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class ServeSettings:
    """Where the server listens and what it takes in at most."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free one
    drain_seconds: float = 30.0  # after SIGTERM, for what runs to end and what was read to be stored
    body_mib: int = 64  # of a JSON body
    upload_mib: int = 256  # of a file
    upload_files: int = 4  # whose text is read at once; each may need several times its size
    body_seconds: float = 30.0  # that a client may be silent while it sends
    first_seconds: float = 10.0  # until a stream begins even if the answer has not
    hosts: tuple[str, ...] = ()  # further names under which browsers may reach a server on this machine without a key

    def __post_init__(self):
        if not self.host or not self.host.isprintable() or " " in self.host:
            raise InputError(f"host: expected an address to listen on, got {self.host!a}")
        if not 0 <= self.port < 1 << 16:
            raise InputError(f"port: expected 0 to 65535, got {self.port}")
        for name, most in (("body_mib", 1024), ("upload_mib", 4096), ("upload_files", 64)):
            if not 1 <= getattr(self, name) <= most:
                raise InputError(f"{name}: expected 1 to {most}, got {getattr(self, name)}")
        for name, most in (("drain_seconds", 86_400.0), ("body_seconds", 3600.0), ("first_seconds", 3600.0)):
            value = getattr(self, name)
            if not (math.isfinite(value) and 0 <= value <= most):
                raise InputError(f"{name}: expected 0 to {most:g}, got {value}")

    @property
    def local(self) -> bool:
        """Whether only programs of this machine reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def names(self) -> frozenset[str]:
        """The names that a request may call a local server by."""
        return frozenset({*_NAMES, self.host, *self.hosts})
