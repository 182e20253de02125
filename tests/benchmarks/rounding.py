# SPDX-License-Identifier: Apache-2.0
"""What quantising costs on a real model: drafts lost by quantised weights, logits moved by a quantised prefix.

    python -m tests.benchmarks.rounding [--model smollm2] [--tokens 2048]

Reads Python's own documentation. Weights: over the whole text, sum over ids of min(p, q), which is how often a draft
from q is accepted at temperature 1, and how often the best ids agree. Keys and values: the last quarter of the text is
read over a prefix of the rest, full and rounded; the logits' difference, relative, and the same agreement.
"""

import argparse
from functools import partial
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp

from rapid_jax.attention.attend import attend_self
from rapid_jax.attention.quantized_kv import quantize_kv
from rapid_jax.attention.strategy import Strategy
from rapid_jax.model.load import load_model
from rapid_jax.speculative.draft import read
from rapid_jax.speculative.prefill import new_tail, prefill
from rapid_jax.speculative.state import Plan, Side


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=2048)
    arguments = parser.parse_args()
    model = load_model(arguments.model, layout="unrolled", quiet=True)
    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = model.tokenizer.encode(text[: arguments.tokens * 8])[: arguments.tokens]
    tokens_BT, pos_BT = jnp.asarray([ids]), jnp.arange(len(ids))[None]

    @jax.jit
    def whole(decoder) -> jax.Array:
        hidden_BTD, _ = decoder.hidden(tokens_BT, pos_BT, attend_self(pos_BT, Strategy(block=512)))
        return jax.nn.log_softmax(decoder.logits(hidden_BTD)[0])

    full_TV = whole(model.decoder)
    for weights in ("int8", "int4"):
        told(f"weights {weights}", full_TV, whole(model.with_weights(weights).decoder))

    cached = len(ids) * 3 // 4
    plan = Plan(0, 0, 1, 512, model.config.vocab_size)
    rest_BT = tokens_BT[:, cached:]
    logits = []
    for change in (lambda prefix: prefix, quantize_kv):
        dtype = model.decoder.embed_VD[...].dtype
        prefix = change(prefill(model.decoder, [ids[:cached]], chunk=512, dtype=dtype))
        tail = new_tail(model.decoder, [cached], rest_BT.shape[1], dtype)
        side = Side(model.decoder, prefix, rest_BT[:, :1], jnp.zeros(1, jnp.int32))
        call = jax.jit(partial(read, plan=plan, rows=rest_BT.shape[1]))
        logits.append(call(side, tail, rest_BT)[0][0])
    one, other = logits
    error = jnp.linalg.norm(other - one) / jnp.linalg.norm(one - one.mean(axis=-1, keepdims=True))
    told("prefix int8", jax.nn.log_softmax(one), jax.nn.log_softmax(other), f", logits differ by {error:.2%}")


def told(name: str, log_p_TV: jax.Array, log_q_TV: jax.Array, more: str = "") -> None:
    accepted = jnp.minimum(jnp.exp(log_p_TV), jnp.exp(log_q_TV)).sum(axis=-1).mean()
    same = (log_p_TV.argmax(axis=-1) == log_q_TV.argmax(axis=-1)).mean()
    print(f"{name}: {accepted:.4f} accepted at temperature 1, {same:.4f} of the best ids the same{more}", flush=True)


if __name__ == "__main__":
    main()
