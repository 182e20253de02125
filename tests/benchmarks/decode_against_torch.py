# SPDX-License-Identifier: Apache-2.0
"""Greedy decoding and prefill of transformers on a GPU, for `rapid bench --with`: the same shape, random weights.

    python -m tests.benchmarks.decode_against_torch --contexts 8192 131072 --prefill 131072 --json torch.jsonl

A decoding step's keys and values are random, as those of `rapid bench`; a prompt is prefilled where --prefill says so.
"""

import argparse
import json
import time
from pathlib import Path

from rapid_jax.plan.architectures import SHAPES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.1-8b", choices=sorted(SHAPES))
    parser.add_argument("--contexts", type=int, nargs="*", default=[131072])
    parser.add_argument("--prefill", type=int, nargs="*", default=[])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

    name = f"transformers {transformers.__version__}"
    config = AutoConfig.for_model(**SHAPES[arguments.shape])
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    heads, width = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    rows = []

    @torch.no_grad()
    def decoded(cache: DynamicCache, token: torch.Tensor) -> float:
        for step in range(arguments.tokens + 4):
            if step == 4:
                torch.cuda.synchronize()
                start = time.perf_counter()
            out = model(token, past_key_values=cache, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / arguments.tokens

    for context in arguments.contexts:
        cache = DynamicCache()
        for layer in range(config.num_hidden_layers):
            key, value = (torch.randn(1, heads, context, width, device="cuda") for _ in range(2))
            cache.update(key, value, layer)
        ms = 1e3 * decoded(cache, torch.ones(1, 1, dtype=torch.long, device="cuda"))
        case = {"context": context, "batch": 1, "quoting": None}
        rows.append({"part": "decoding", "name": name, "case": case, "ms_per_token": ms, "floor_ms": None})
        print(f"{name}: {ms:.2f} ms a token at {context}", flush=True)
        del cache, key, value
        torch.cuda.empty_cache()
    for context in arguments.prefill:
        seconds = []
        for _ in range(2):
            tokens = torch.randint(config.vocab_size, (1, context), device="cuda")
            torch.cuda.synchronize()
            start = time.perf_counter()
            with torch.no_grad():
                model(tokens, use_cache=True, logits_to_keep=1)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
            torch.cuda.empty_cache()
        rows.append({"part": "prefill", "name": name, "context": context, "seconds": min(seconds)})
        print(f"{name}: prefill of {context} in {min(seconds):.2f} s", flush=True)
    if arguments.json:
        arguments.json.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
