# SPDX-License-Identifier: Apache-2.0
"""How a host makes shares of a stage: the one that it is asked for, or one after the other that no other host makes."""

import contextlib
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from longpo_jax.shares import Shares
from longpo_jax.stages import has_ended
from rapid_jax.runtime.command_line import say
from rapid_jax.runtime.mesh import agreed
from rapid_jax.runtime.share import Share
from rapid_jax.runtime.storage import AnyPlace

_LOOK_S: Final = 5.0  # between two looks at shares that others make


def make_shares(
    shares: Shares,
    asked: Sequence[Share],
    inputs: Mapping[str, Any],
    stage: AnyPlace,
    make: Callable[[Share], None],
    *,
    leads: bool,
    quiet: bool,
) -> bool:
    """Makes the share that is asked for or, of several, one after the other that no other run makes or has made, until
    all are done: those of runs that end meanwhile, too. Whether all shares are now done, to be joined in `stage`.

    `inputs` is what all are made with. Every process of a run calls `make`, the one that `leads` looks at the folder.
    Raises Busy if another run makes the one that is asked for.
    """
    start, waiting = int(agreed(secrets.randbelow(len(asked)))), ""
    while True:
        made = False
        for share in (*asked[start:], *asked[:start]):
            with contextlib.ExitStack() as stack:
                if agreed(leads and shares.take(stack, share, inputs, stage, alone=len(asked) == 1)):
                    make(share)
                    made = True
        missing = shares.missing(asked[0].count) if leads else []
        missing = [] if leads and has_ended(stage) else missing  # in this order: what is joined is taken away
        some = bool(agreed(leads and bool(missing)))
        if not some or len(asked) == 1:
            return not some
        if not made:  # else a share whose run has ended since may be taken
            waiting = _wait_for(missing, stage.name, waiting, quiet=quiet or not leads)


def _wait_for(missing: Sequence[Share], stage: str, said: str, *, quiet: bool) -> str:
    """Waits a while for shares that other runs make. Says which, if that was not `said`; what was."""
    names = ", ".join(f"{share.index}/{share.count}" for share in missing)
    if names != said and not quiet:
        say(f"{stage}: waiting for {names}, which other runs make: a share whose run ends is taken over")
    time.sleep(_LOOK_S)
    return names
