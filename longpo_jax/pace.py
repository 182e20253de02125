# SPDX-License-Identifier: Apache-2.0
"""How fast training goes: tokens and operations an update, and the time they took."""

import time

import jax


class Clock:
    """Tokens and operations since the last look, and the time they took."""

    def __init__(self, steps: int, peak: float):
        self._steps, self._peak = steps, peak
        self._counts: list[tuple[jax.Array, jax.Array]] = []
        self._start = self._last = time.perf_counter()
        self._begun: int | None = None  # updates made when the first, which compiles, was over

    def add(self, tokens: jax.Array, flops: jax.Array) -> None:
        """Of one microbatch; what is still being computed is not waited for."""
        self._counts.append((tokens, flops))

    def skip(self) -> None:
        """What was done since the last look was not an update."""
        self._last = time.perf_counter()

    def read(self, step: int) -> dict[str, float | None]:
        """tokens, seconds, tokens_per_second, mfu, seconds_left after update `step`.

        The first update compiles: it has a time and no rate.
        """
        now = time.perf_counter()
        seconds = now - self._last
        tokens, flops = (sum(map(float, counts)) for counts in zip(*self._counts, strict=True))
        self._last, self._counts = now, []
        found: dict[str, float | None] = {"tokens": tokens, "seconds": seconds}
        if self._begun is None:
            self._begun, self._start = step, now
            return found | {"tokens_per_second": None, "mfu": None, "seconds_left": None}
        left = (now - self._start) / (step - self._begun) * (self._steps - step)
        mfu = flops / seconds / self._peak if self._peak else None
        return found | {"tokens_per_second": tokens / seconds, "mfu": mfu, "seconds_left": left}
