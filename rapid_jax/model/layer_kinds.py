# SPDX-License-Identifier: Apache-2.0
"""What layers may have otherwise than their neighbours, as a config.json states it: read, and written back."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from rapid_jax.model.families import Traits
from rapid_jax.model.rope_config import Rope, read_local_rope
from rapid_jax.runtime.json_input import Fields

SLIDING: Final = "sliding_attention"


@dataclass(frozen=True)
class LayerKind:
    """What a layer may have otherwise than its neighbours."""

    rotated: bool = True  # q and k are turned by their positions; else attention sees their order alone
    # A query at position p sees p - window + 1 to p, in a bidirectional encoder to p + window - 1; None: no bound.
    window: int | None = None
    rope: Rope | None = None  # how q and k are turned; None: as the config says
    experts: bool = False  # in the place of its MLP


def read_pattern(
    config: Fields, traits: Traits, layers: int, context: int, bidirectional: bool = False
) -> tuple[LayerKind, ...]:
    """The shortest pattern that the layers repeat; a window as long as the `context` never closes, and is none."""
    rotated = _rotated(config, traits, layers)
    sliding = _sliding(config, traits, rotated)
    # transformers' values where the keys are absent; where sliding_window is null no window closes.
    window = traits.window if "sliding_window" not in config else config.whole("sliding_window", None, least=1)
    if window is not None and bidirectional:
        window = window // 2 + 1  # there sliding_window is how far a token sees on both sides together
    local = window if window is not None and window < context else None
    rope = read_local_rope(config, traits)
    sparse = (False,) * layers if traits.mixture is None else traits.mixture.layers(config, layers)
    kinds = [
        LayerKind(turned, local, rope, experts) if slides else LayerKind(turned, experts=experts)
        for turned, slides, experts in zip(rotated, sliding, sparse, strict=True)
    ]
    size = next(size for size in range(1, layers + 1) if all(a == b for a, b in zip(kinds, kinds[size:], strict=False)))
    return tuple(kinds[:size])


def layer_keys(kinds: Sequence[LayerKind], traits: Traits, context: int) -> dict[str, Any]:
    """What a config.json says for the kinds of all layers, whatever the original said about a window never closed."""
    stated: dict[str, Any] = {}
    if traits.unrotated:
        stated["no_rope_layers"] = [int(kind.rotated) for kind in kinds]
    if traits.windows == "none":
        return stated
    windows = [kind.window for kind in kinds]
    some = next((window for window in windows if window is not None), None)
    stated["sliding_window"] = some
    if traits.local_theta is not None:
        rope = next((kind.rope for kind in kinds if kind.rope is not None), Rope(traits.local_theta))
        types = ["full_attention" if kind.rope is None else SLIDING for kind in kinds]
        return {"sliding_window": some or context, "layer_types": types, "rope_local_base_freq": rope.theta}
    if traits.windows != "all":
        stated["use_sliding_window"] = some is not None
    if traits.windows == "last":
        first = next((layer for layer, window in enumerate(windows) if window is not None), len(windows))
        stated["max_window_layers"] = first
    if traits.windows in ("last", "unrotated") and some is not None:
        stated["layer_types"] = ["full_attention" if window is None else SLIDING for window in windows]
    return stated


def _rotated(config: Fields, traits: Traits, layers: int) -> list[bool]:
    if not traits.unrotated:
        return [True] * layers
    rotated = config.wholes("no_rope_layers", None, most=1)
    if rotated is None:
        every = config.whole("no_rope_layer_interval", 4, least=1)
        rotated = [int((layer + 1) % every != 0) for layer in range(layers)]
    if len(rotated) < layers:
        raise config.error("no_rope_layers", f"a list of as many as num_hidden_layers, {layers}")
    return [bool(one) for one in rotated[:layers]]


def _sliding(config: Fields, traits: Traits, rotated: list[bool]) -> list[bool]:
    """Which layers a sliding window is of."""
    layers = len(rotated)
    types = config.texts("layer_types", None)
    if types is not None and set(types) - {"full_attention", SLIDING}:
        raise config.error("layer_types", f"a list of full_attention and {SLIDING}: others are not supported")
    if types is not None and len(types) != layers:
        raise config.error("layer_types", f"a list of as many as num_hidden_layers, {layers}")
    last, every = config.whole("max_window_layers", 28), config.whole("sliding_window_pattern", 6, least=1)
    implied = {
        "none": [False] * layers,
        "all": [True] * layers,
        "last": [layer >= last for layer in range(layers)],
        "unrotated": [not one for one in rotated],
        "switched": [True] * layers,
        "local": [(layer + 1) % every != 0 for layer in range(layers)],
    }[traits.windows]
    if types is not None and traits.windows in ("last", "unrotated", "local"):
        implied = [kind == SLIDING for kind in types]
    if traits.windows in ("last", "unrotated", "switched") and not config.truth("use_sliding_window", False):
        return [False] * layers
    return implied
