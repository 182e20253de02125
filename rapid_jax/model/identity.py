# SPDX-License-Identifier: Apache-2.0
"""What a model is known by, for which nothing of it is loaded: digests of its weights, tokenizer and chat template.

The weights' digest is over every byte: weights of two processes may differ in one value, which no sample of them finds.
Of a large model it takes as long as its disk needs, the first time; it is kept beside the cache (files.py).
"""

from pathlib import Path

from rapid_jax.model.load import arithmetic, open_checkpoint
from rapid_jax.runtime.files import default_cache_dir, digest, digests_of


def identity_of(source: str, dtype: str, *, name: str = "model", cache: Path | None = None) -> dict[str, str]:
    """NAME.weights, NAME.tokenizer, NAME.template, and of a `dtype` that is "auto" what it comes to, NAME.dtype."""
    checkpoint, tokenizer = open_checkpoint(source)
    # The files that the template is in, not what it renders: some templates write the day's date.
    rest = [item for item in sorted(tokenizer.files.items()) if item[0] != "tokenizer.json"]
    weights = digests_of(list(checkpoint.weight_files), (cache or default_cache_dir()) / "digests")
    return {
        f"{name}.dtype": arithmetic(dtype).name,
        f"{name}.weights": digest(*weights, repr(checkpoint.config)),
        f"{name}.tokenizer": tokenizer.fingerprint,
        f"{name}.template": digest(*(part for item in rest for part in item), repr(tokenizer.stop_ids)),
    }
