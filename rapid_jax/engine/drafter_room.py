# SPDX-License-Identifier: Apache-2.0
"""The memory of a drafter's own devices: each request that drafts takes some before its prompt is read there."""

from rapid_jax.engine.host_prefixes import bytes_left, head_bytes
from rapid_jax.engine.job import Job
from rapid_jax.model.decoder import Decoder
from rapid_jax.runtime.agreement import all_told
from rapid_jax.speculative.prefill import PrefillSettings, windows_of
from rapid_jax.speculative.prefix_heads import Place

_GROWN = 2  # times what was read: a row is copied while its lane gets others


class DrafterRoom:
    """Bytes of the drafter's devices, of all processes together, that requests have taken until they end."""

    def __init__(self, decoder: Decoder, most: int | None = None):
        """`most` bytes, None: what the devices have left now."""
        self._decoder, self._taken = decoder, dict[int, int]()  # by the job's id
        self.most = sum(all_told(bytes_left(decoder))) if most is None else most

    @property
    def taken(self) -> int:
        """Bytes that requests have now."""
        return sum(self._taken.values())

    def bytes_for(self, tokens: int, settings: PrefillSettings) -> int:
        """That a request takes whose prompt for the drafter has so many tokens."""
        place = Place(tokens, settings.layout(self._decoder, tokens), *windows_of(self._decoder.config))
        return _GROWN * head_bytes(self._decoder, place, everywhere=True, filling=True)

    def take(self, job: Job, size: int) -> bool:
        """Whether the request has its room from now on until it ends; one that has some asks for no more."""
        if id(job) in self._taken:
            return True
        if self.taken + size > self.most:
            return False
        self._taken[id(job)] = size
        job.at_end.append(lambda: self._taken.pop(id(job), None))
        return True
