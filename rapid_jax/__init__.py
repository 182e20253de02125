# SPDX-License-Identifier: Apache-2.0
"""RAPID: long-context answers by retrieval-augmented speculative decoding (arXiv 2502.20330), in JAX."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rapid_jax.config import RapidConfig as RapidConfig
    from rapid_jax.engine.request import Question as Question
    from rapid_jax.rapid import Rapid as Rapid

__version__ = "0.1.0"

_PLACES = {
    "Question": "rapid_jax.engine.request",
    "Rapid": "rapid_jax.rapid",
    "RapidConfig": "rapid_jax.config",
}


def __getattr__(name: str) -> Any:
    """The facade's names, imported when they are first asked for: `import rapid_jax` alone imports no jax."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)
