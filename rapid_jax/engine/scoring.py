# SPDX-License-Identifier: Apache-2.0
"""How probable a given text is: the log-probability of each token of a prompt."""

from collections.abc import Generator, Sequence
from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rapid_jax.answer import TokenLogprobs
from rapid_jax.config import RapidConfig
from rapid_jax.engine.rooms import room_of_short
from rapid_jax.model.decoder import Decoder
from rapid_jax.model.load import LoadedModel
from rapid_jax.prompts import check_ids
from rapid_jax.runtime.mesh import replicate
from rapid_jax.speculative.prefill import Prefill, PrefillSettings
from rapid_jax.speculative.state import MOST_LOGPROBS
from rapid_jax.speculative.vocabulary import at, largest

_PIECE = 64  # tokens whose logits are there at once
Scores: TypeAlias = list[TokenLogprobs | None]


def scores(model: LoadedModel, config: RapidConfig, ids: Sequence[int], top: int) -> Generator[None, None, Scores]:
    """Of each token its log-probability behind those before it, with the `top` most probable; None for the first.

    A chunk of the prompt at a time, for others to do something between them; the generator returns them all. Natural
    logarithms, before temperature and filters. Raises InputError, at the first chunk, for ids that are none of the
    model's, or too many.
    """
    check_ids(model, config, ids, new=0)
    work = _prefill(model, config, ids)
    found: dict[int, TokenLogprobs] = {}
    while work.left:
        positions, (own, best, best_ids) = _score_chunk(work, model.decoder, ids)
        for place, position in enumerate(positions[0].tolist()):
            if 0 <= position < len(ids) - 1:
                pairs = zip(best_ids[place, :top].tolist(), best[place, :top].tolist(), strict=True)
                found[position + 1] = TokenLogprobs(ids[position + 1], float(own[place]), tuple(pairs))
        yield
    return [None, *(found[at] for at in range(1, len(ids)))]


def compile_scores(model: LoadedModel, config: RapidConfig, ids: Sequence[int]) -> None:
    """Makes all programs of the scores of so many tokens, by their first chunk alone."""
    _score_chunk(_prefill(model, config, ids), model.decoder, ids)


def _prefill(model: LoadedModel, config: RapidConfig, ids: Sequence[int]) -> Prefill:
    """Of sizes so few that prompts of many lengths share programs."""
    decoder, compute = model.decoder, config.compute
    room = room_of_short(len(ids), compute.prefill_chunk)
    settings = PrefillSettings(compute.prefill_chunk, compute.kernel, compute.context, coarse=True, room=room)
    return Prefill(decoder, [ids], settings, dtype=decoder.embed_VD[...].dtype)


def _score_chunk(work: Prefill, decoder: Decoder, ids: Sequence[int]) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """(positions [1, T] of the next chunk, -1 where there is none; what `_scored` gives of it)."""
    hidden_BTD, positions = work.step()
    following = np.asarray([*ids, 0], np.int32)[np.clip(positions + 1, 0, len(ids))]
    next_BT = replicate(decoder.mesh, following)
    return positions, jax.device_get(_scored(decoder, hidden_BTD, next_BT, most=MOST_LOGPROBS))


@partial(jax.jit, static_argnames="most")
def _scored(decoder: Decoder, hidden_BTD: jax.Array, next_BT: jax.Array, *, most: int):
    """([T] of the next token of the first row, [T, most] of the most probable ones and their ids)."""
    time, size = hidden_BTD.shape[1:]
    piece = min(_PIECE, time)
    padding = -time % piece
    hidden = jnp.pad(hidden_BTD[0], ((0, padding), (0, 0))).reshape(-1, 1, piece, size)
    following = jnp.pad(next_BT[0], (0, padding)).reshape(-1, piece)

    def of_piece(item):
        hidden_BTD, next_T = item
        log_p_TV = jax.nn.log_softmax(decoder.logits(hidden_BTD)[0], axis=-1)
        return at(log_p_TV, next_T), *largest(log_p_TV, min(most, log_p_TV.shape[-1]))

    parts = lax.map(of_piece, (hidden, following))
    return tuple(part.reshape(-1, *part.shape[2:])[:time] for part in parts)
