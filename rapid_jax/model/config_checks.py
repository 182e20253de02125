# SPDX-License-Identifier: Apache-2.0
"""Which config.json can be read at all: its family, what of it is a decoder of text, and what is refused by name."""

from typing import Any, Final

from rapid_jax.model.families import TEXT_PARTS, TRAITS, Family, Traits, lacking
from rapid_jax.runtime.json_input import Fields

_MOST_ID: Final = 2**31 - 1  # of a token: an int32
# Keys that change what the weights mean, or which files they are in.
_WHOLLY_REFUSED: Final = {
    "quantization_config": "a checkpoint of quantised weights",
    "per_layer_config": "a layer with a configuration of its own",
    "transformers_weights": "a file of weights by another name",
}
# Keys that are refused where they are true; a bias where the family may have one.
_SWITCHED: Final = {
    "use_mrope": "multimodal rotary embedding",
    "attention_bias": "biases on all four attention projections",
    "mlp_bias": "biases in the MLP",
}
_OUTER: Final = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")  # of all parts of a model


def text_part(config: Fields) -> Fields:
    """The config of a decoder of text: of a model of text and images its text_config, with the ids of its tokens."""
    family = TEXT_PARTS.get(config.text("model_type"))
    if family is None:
        return config
    _refuse_wholly(config)
    part: Fields = config.fields("text_config")
    outer = {key: config[key] for key in _OUTER if config.get(key) is not None}
    return Fields({"model_type": family, **part, **outer}, config.source, "text_config.")


def family_of(config: Fields, *, encodes: bool = False) -> Family:
    """By model_type and architectures; an InputError says what keeps another one from being read.

    Of a model that `encodes`, the architecture may be the one without a head, too.
    """
    family: Any = config.text("model_type")
    if family not in TRAITS:
        expected = f"one of {', '.join(TRAITS)}: "
        reason = lacking(family)
        raise config.error("model_type", expected + (f"{reason} is not supported" if reason else "others are not"))
    known = (TRAITS[family].architecture, *(TRAITS[family].without_head if encodes else ()))
    if any(name not in known for name in config.texts("architectures", [])):
        raise config.error("architectures", f"[{' or '.join(map(repr, known))}]: others are not supported")
    return family


def refuse_unsupported(traits: Traits, config: Fields) -> None:
    """Raises InputError for a key that would change a number and is not implemented."""
    key, activation = traits.activation
    if key in config and config.text(key) != activation:
        raise config.error(key, f"{activation!r}: others are not supported")
    for key in traits.refused:
        if config.get(key):
            raise config.error(key, "null or false: others are not supported")
    _refuse_wholly(config)
    for key, meaning in _SWITCHED.items():
        if (key in traits.biases or key == "use_mrope") and config.truth(key, False):
            raise config.error(key, f"false: {meaning} is not supported")


def sees_both_ways(traits: Traits, config: Fields, *, encodes: bool) -> bool:
    """Whether tokens see those behind them. Raises InputError where they would and the model is none that encodes."""
    key = "use_bidirectional_attention"
    if not config.get(key) or not (traits.bidirectional or encodes):
        return False
    if not (traits.bidirectional and encodes):
        raise config.error(key, "null or false: others are not supported")
    return config.truth(key)


def check_token_ids(config: Fields) -> None:
    """Refuses ids that are no ids. They are carried, not used here; -1 is what old checkpoints write for no padding."""
    for key in ("bos_token_id", "pad_token_id"):
        config.whole(key, None, least=-1)
    if isinstance(config.get("eos_token_id"), list):
        config.wholes("eos_token_id", most=_MOST_ID)
    else:
        config.whole("eos_token_id", None, most=_MOST_ID)


def _refuse_wholly(config: Fields) -> None:
    for key, meaning in _WHOLLY_REFUSED.items():
        if config.get(key) is not None:
            raise config.error(key, f"null: {meaning} is not supported")
