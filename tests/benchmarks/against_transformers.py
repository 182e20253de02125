# SPDX-License-Identifier: Apache-2.0
"""Prefill and greedy decoding side by side with transformers: same weights, same prompts, same threads, float32.

    python -m tests.benchmarks.against_transformers [--lengths 1024 4096 8000] [--new-tokens 32] [--repeats 3]

Prints a line a length: seconds of either (best of the repeats, taken in turn) and the ratio (above 1: ours is faster).
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 8000])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"

    import jax
    import torch
    from transformers import AutoModelForCausalLM

    from rapid_jax.model.convert import convert
    from rapid_jax.model.load import load_model
    from rapid_jax.speculative.config import SamplingConfig, SpeculationConfig
    from rapid_jax.speculative.generate import Prompted, generate
    from rapid_jax.speculative.prefill import prefill

    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    ours = load_model("smollm2", layout="unrolled", dtype="float32", decodes=True, quiet=True)
    with tempfile.TemporaryDirectory() as scratch:
        convert("smollm2", Path(scratch) / "model", "float32", quiet=True)
        theirs = AutoModelForCausalLM.from_pretrained(Path(scratch) / "model", dtype=torch.float32).eval()
    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = ours.tokenizer.encode(text[: max(arguments.lengths) * 8])
    plain = SpeculationConfig(mode="target", gamma=0, lookup="off", rounds_per_read=arguments.new_tokens)
    sampling = SamplingConfig(temperature=0, max_new_tokens=arguments.new_tokens)

    def run_ours(prompt: list[int]) -> tuple[float, float, list[int]]:
        start = time.perf_counter()
        prefix = prefill(ours.decoder, [prompt[:-1]], chunk=512, dtype=jax.numpy.dtype("float32"))
        jax.block_until_ready(prefix)
        read = time.perf_counter() - start
        prompted = Prompted(ours.decoder, [prompt], prefix, [len(prompt) - 1])
        made = generate(prompted, None, speculation=plain, sampling=sampling, stops=[])
        return read, made.decode_seconds / len(made.tokens[0]), made.tokens[0]

    @torch.no_grad()
    def run_theirs(prompt: list[int]) -> tuple[float, float, list[int]]:
        start = time.perf_counter()
        out = theirs(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
        read = time.perf_counter() - start
        tokens = [int(out.logits[0, -1].argmax())]
        start = time.perf_counter()
        while len(tokens) < arguments.new_tokens:
            out = theirs(torch.tensor([tokens[-1:]]), past_key_values=out.past_key_values, use_cache=True)
            tokens.append(int(out.logits[0, -1].argmax()))
        return read, (time.perf_counter() - start) / (len(tokens) - 1), tokens

    print(f"{threads} threads, float32, {arguments.new_tokens} greedy tokens, best of {arguments.repeats}")
    for length in arguments.lengths:
        prompt = ids[:length]
        run_ours(prompt)  # compiles
        both = [(run_ours(prompt), run_theirs(prompt)) for _ in range(arguments.repeats)]
        same = all(mine[2] == other[2] for mine, other in both)
        read_ours, read_theirs = min(mine[0] for mine, _ in both), min(other[0] for _, other in both)
        step_ours, step_theirs = min(mine[1] for mine, _ in both), min(other[1] for _, other in both)
        print(
            f"{length:6d} tokens: prefill {length / read_ours:7.0f} against {length / read_theirs:7.0f} tokens/s "
            f"({read_theirs / read_ours:.2f}x), decode {1 / step_ours:5.1f} against {1 / step_theirs:5.1f} tokens/s "
            f"({step_theirs / step_ours:.2f}x), same tokens: {same}",
            flush=True,
        )


if __name__ == "__main__":
    main()
