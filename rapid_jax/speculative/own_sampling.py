# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's own sampling settings, from its generation_config.json by transformers' rules for that file."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.json_input import Fields
from rapid_jax.speculative.config import SamplingConfig, SamplingSettings

_TOP_K = 50  # transformers' own where a checkpoint samples and states none
# Settings that would change tokens and that nothing here implements, with the values that turn them off.
_OFF: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        **dict.fromkeys(("num_beams", "num_beam_groups", "encoder_repetition_penalty", "guidance_scale"), (1,)),
        **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens"), (0,)),
        **dict.fromkeys(("penalty_alpha", "diversity_penalty"), (0,)),
        **dict.fromkeys(("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "stop_strings"), ([],)),
        **dict.fromkeys(("sequence_bias", "constraints", "force_words_ids", "watermarking_config"), ([], {})),
        **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "dola_layers"), ()),
        "exponential_decay_length_penalty": (),
    }
)
_OFF_SAMPLED = MappingProxyType({"typical_p": (1,), "epsilon_cutoff": (0,), "eta_cutoff": (0,), "top_h": (1,)})


@dataclass(frozen=True)
class ResolvedSampling:
    """Sampling with nothing left open, and where each of its values comes from."""

    config: SamplingConfig
    origins: Mapping[str, str]  # name of a value -> settings, generation_config.json, ...
    ignored: tuple[str, ...]  # what the checkpoint asks for besides, and nobody does

    def to_json(self) -> dict[str, Any]:
        """Every value with its origin."""
        return {name: {"value": getattr(self.config, name), "from": origin} for name, origin in self.origins.items()}

    def __str__(self) -> str:
        """What differs from plain sampling, the temperature always."""
        plain = SamplingConfig()
        shown = [
            f"{name} {getattr(self.config, name):g} ({origin})"
            for name, origin in self.origins.items()
            if name == "temperature" or (name != "penalize" and getattr(self.config, name) != getattr(plain, name))
        ]
        return ", ".join(shown)


def resolve(settings: SamplingSettings, own: Fields | None) -> ResolvedSampling:
    """`settings` with what they leave open as `own`, a generation_config.json, has it; None: a checkpoint has none.

    A checkpoint that does not say `do_sample` is greedy; its other values count once a temperature is set. Its penalty
    is of the prompt too. Raises InputError, naming the file and the key, for a value that is none.
    """
    own = own or Fields({}, "")
    file = own.source.rpartition("/")[2] or "no generation_config.json"
    samples = own.truth("do_sample", False)
    stated: dict[str, Any] = {name: own.number(name, None) for name in ("temperature", "top_p", "min_p")}
    if stated["top_p"] == 0:
        stated["top_p"] = 1e-9  # the most probable token alone
    stated |= {"top_k": own.whole("top_k", None), "repetition_penalty": own.number("repetition_penalty", None)}
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}

    def take(name: str, *choices: tuple[Any, str]) -> None:
        values[name], origins[name] = next(
            (value, origin) for value, origin in ((getattr(settings, name), "settings"), *choices) if value is not None
        )

    greedy = f"{file}: do_sample is not true"
    take("temperature", *(((stated["temperature"], file), (1.0, "transformers")) if samples else ((0.0, greedy),)))
    plain = SamplingConfig()
    for name in ("top_k", "top_p", "min_p"):
        own_value = stated[name] if values["temperature"] > 0 else None
        standard = _TOP_K if name == "top_k" and samples and values["temperature"] > 0 else None
        take(name, (own_value, file), (standard, "transformers"), (getattr(plain, name), "off"))
    take("repetition_penalty", (stated["repetition_penalty"], file), (1.0, "off"))
    take("penalize", ("all" if origins["repetition_penalty"] == file else "generated", "follows the penalty"))
    given = {field.name: getattr(settings, field.name) for field in fields(SamplingSettings)}
    try:
        config = SamplingConfig(**given | values)
    except InputError as error:
        raise InputError(f"{own.source}: {error}") from error
    return ResolvedSampling(config, origins, _ignored(own, sampled=config.temperature > 0))


def _ignored(own: Fields, *, sampled: bool) -> tuple[str, ...]:
    off = {**_OFF, **(_OFF_SAMPLED if sampled else {})}
    return tuple(f"{name} {own[name]}" for name in off if own.get(name) not in (None, *off[name]))
