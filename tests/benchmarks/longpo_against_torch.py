# SPDX-License-Identifier: Apache-2.0
"""One LongPO update, ours against transformers on PyTorch: the same model, pair and loss, on one device.

    python -m tests.benchmarks.longpo_against_torch --side ours --lengths 16384 32768 65536
    python -m tests.benchmarks.longpo_against_torch --side torch --longest [--logits chunked] [--attention cudnn]

The shape of Llama-3.2-1B with random weights, a document of L random tokens, a chosen and a rejected answer of 512, and
fixed log-probabilities of the reference. Every length runs in a process of its own and prints a line of JSON: seconds a
step (median of --repeats after one that is not counted), tokens of the document a second, bytes at the peak, losses.
Both sides start from the same weights, so their first losses agree. --longest doubles from the first of --lengths, then
bisects: the longest document in multiples of --multiple that fits, by two steps each.

Arithmetic is bfloat16 on both sides. --weights float32: weights and moments of AdamW in float32 (torch: as master
copies beside the bfloat16 weights, as DeepSpeed has them). bfloat16: weights and moments in bfloat16, as torch's AdamW
has them for such weights. Gradients are bfloat16 in torch; ours are summed in float32.

ours   `longpo_jax.step.Step`: one packed row, the document once; --remat, --offload
torch  LlamaForCausalLM on a batch of two, chosen and rejected, as TRL and the released code of LongPO have it; scaled
       dot product attention by flash or cuDNN kernels, every layer checkpointed. --logits whole: of both sequences at
       once, losses in float32; chunked: where a loss needs them, 1,024 tokens at a time, made again for the gradient
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np

from rapid_jax.model.config import ModelConfig, Rope, to_hf

BETA, PREFERENCE_WEIGHT, CLIP_NORM = 0.1, 0.01, 1.0
ADAM = {"b1": 0.9, "b2": 0.99, "eps": 1e-8}
LEARNING_RATE = 5e-7
REFERENCES = {"chosen": -6000.0, "rejected": -6010.0}  # near what random weights give 512 tokens
MEMORY = 0.95  # share of the device that either side may take
LOGITS_CHUNK = 1024


def config_of(given: argparse.Namespace) -> ModelConfig:
    return ModelConfig(
        family="llama",
        vocab_size=given.vocab,
        hidden_size=given.hidden,
        intermediate_size=given.ffn,
        num_layers=given.layers,
        num_heads=given.heads,
        num_kv_heads=given.kv_heads,
        head_dim=given.head_dim,
        norm_eps=1e-5,
        rope=Rope(5e5),
        max_positions=1 << 21,
        tie_embeddings=True,
    )


def weight(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """The array of this name on either side: a random block repeated, whose rows differ; norms are ones."""
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    block = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(1_000_003, np.float32)
    return np.resize(block * np.float32(shape[-1] ** -0.5), shape)


def tokens_of(given: argparse.Namespace, length: int) -> tuple[list[int], list[int], list[int]]:
    """(document, chosen answer, rejected answer)."""
    drawn = np.random.default_rng(1).integers(0, given.vocab, length + 2 * given.answer).tolist()
    return drawn[:length], drawn[length : length + given.answer], drawn[length + given.answer :]


def ours(given: argparse.Namespace, length: int) -> tuple[Callable[[], float], Callable[[], dict[str, Any]]]:
    """(makes an update and gives its loss, tells what memory it took)."""
    import jax
    import jax.numpy as jnp

    from longpo_jax.config import LongPOConfig, ObjectiveConfig, OptimizerConfig, PolicyConfig, TrainConfig
    from longpo_jax.dialogue import Branch
    from longpo_jax.optimizer import transform_of
    from longpo_jax.rows import packed
    from longpo_jax.step import Sample, Step
    from rapid_jax.model.hf_names import weights
    from rapid_jax.model.placement import build

    config = LongPOConfig(
        model=PolicyConfig(dtype=given.dtype),
        objective=ObjectiveConfig(beta=BETA, preference_weight=PREFERENCE_WEIGHT),
        optimizer=OptimizerConfig(
            learning_rate=LEARNING_RATE,
            schedule="constant",
            warmup_ratio=0,
            clip_norm=CLIP_NORM,
            **ADAM,
            moments_dtype=given.weights,
        ),
        train=TrainConfig(
            lengths=(length + given.answer,),
            tail=given.answer,
            rows_per_step=1,
            remat=given.remat,
            offload=given.offload,
            logits_chunk=LOGITS_CHUNK,
        ),
    )
    shapes = {each.key: each.stored_shape for each in weights(config_of(given))}
    dtype = jnp.dtype(given.weights)
    read: Callable[[str], np.ndarray] = lambda key: weight(key, shapes[key])  # noqa: E731
    decoder = build(config_of(given), read, layout="stacked", dtype=dtype, quiet=True)
    step = Step(config, decoder, transform_of(config.optimizer, 100))
    document, chosen, rejected = tokens_of(given, length)
    branches = (Branch(answer, [1] * len(answer)) for answer in (chosen, rejected))
    row = packed(document, *branches, trunk=length + given.answer, tail=given.answer)
    batch = step.place([Sample(id="0", row=row, short=None, references=REFERENCES)])
    state = step.start(decoder)
    del decoder

    def update() -> float:
        nonlocal state
        state, metrics = step.update(state, step.accumulate(state, None, batch))
        jax.block_until_ready(state)
        return float(metrics["loss"])

    def memory() -> dict[str, Any]:
        device = jax.devices()[0]
        return {"device": device.device_kind, "peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use")}

    return update, memory


def torch_side(given: argparse.Namespace, length: int) -> tuple[Callable[[], float], Callable[[], dict[str, Any]]]:
    """As `ours`."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from transformers import LlamaConfig, LlamaForCausalLM

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    if cuda:
        torch.cuda.set_per_process_memory_fraction(MEMORY)
    shape: dict[str, Any] = to_hf(config_of(given)) | {"attn_implementation": "sdpa"}
    torch.set_default_dtype(getattr(torch, given.dtype))
    with device:
        model: Any = LlamaForCausalLM(LlamaConfig(**shape))
    torch.set_default_dtype(torch.float32)
    names, parameters = zip(*model.named_parameters(), strict=True)
    masters = [parameter.detach() for parameter in parameters]
    if given.weights == "float32":
        masters = [torch.empty_like(parameter, dtype=torch.float32) for parameter in masters]
    for name, parameter, master in zip(names, parameters, masters, strict=True):
        master.copy_(torch.from_numpy(weight(name, tuple(parameter.shape))))
        parameter.data.copy_(master)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    betas = (ADAM["b1"], ADAM["b2"])
    settings = {"lr": LEARNING_RATE, "betas": betas, "eps": ADAM["eps"], "weight_decay": 0.0, "fused": cuda}
    optimizer = torch.optim.AdamW(masters, **settings)
    document, *answers = tokens_of(given, length)
    ids = torch.tensor([document + answer for answer in answers], device=device)
    # Never the kernel that writes out the scores: an error then, not a memory that grows with the square.
    kernel = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}[given.attention]

    def update() -> float:
        with sdpa_kernel(kernel) if cuda else nullcontext():
            loss = torch_loss(model, ids, given)
            loss.backward()
        with torch.no_grad():
            for parameter, master in zip(parameters, masters, strict=True):
                master.grad, parameter.grad = parameter.grad.to(master.dtype), None
            torch.nn.utils.clip_grad_norm_(masters, CLIP_NORM)
            optimizer.step()
            optimizer.zero_grad()
            for parameter, master in zip(parameters, masters, strict=True):
                parameter.copy_(master)
        return float(loss)  # waits for the device

    def memory() -> dict[str, Any]:
        if not cuda:
            return {"device": "cpu", "peak_bytes": None}
        reserved = torch.cuda.max_memory_reserved()
        device = {"device": torch.cuda.get_device_name(), "peak_bytes": torch.cuda.max_memory_allocated()}
        return device | {"peak_reserved_bytes": reserved}

    return update, memory


def torch_loss(model: Any, ids: Any, given: argparse.Namespace) -> Any:
    """The loss of a pair: `ids` [2, T], chosen and rejected, the last tokens of each its answer."""
    import torch
    from torch.nn import functional as F
    from torch.utils.checkpoint import checkpoint

    if given.logits == "whole":
        logits = model(input_ids=ids, use_cache=False).logits
        chosen, rejected = (
            -F.cross_entropy(logits[row, :-1].float(), ids[row, 1:], reduction="none") for row in range(2)
        )
        del logits
    else:
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state

        def log_probs(hidden, targets):
            return -F.cross_entropy(model.lm_head(hidden).float(), targets, reduction="none")

        def in_chunks(hidden, targets):
            pieces = zip(hidden.split(LOGITS_CHUNK), targets.split(LOGITS_CHUNK), strict=True)
            return torch.cat([checkpoint(log_probs, *piece, use_reentrant=False) for piece in pieces])

        chosen = in_chunks(hidden[0, :-1], ids[0, 1:])
        rejected = in_chunks(hidden[1, -given.answer - 1 : -1], ids[1, -given.answer :])
    sums = {"chosen": chosen[-given.answer :].sum(), "rejected": rejected[-given.answer :].sum()}
    rewards = {name: BETA * (sums[name] - REFERENCES[name]) for name in sums}
    return -chosen.mean() + PREFERENCE_WEIGHT * F.softplus(rewards["rejected"] - rewards["chosen"])


def one(given: argparse.Namespace, length: int) -> dict[str, Any]:
    """What is measured at one length, in this process."""
    seconds, losses = [], []
    try:
        update, memory = (ours if given.side == "ours" else torch_side)(given, length)
        for _ in range(given.repeats + 1):
            start = time.perf_counter()
            losses.append(update())
            seconds.append(time.perf_counter() - start)
    except Exception as error:  # both frameworks have several classes for it
        said = str(error).lower()
        if not any(words in said for words in ("resource_exhausted", "out of memory", "alloc_failed")):
            raise
        return {"ok": False, "why": "out of memory", "said": str(error)[:300]}
    median = statistics.median(seconds[1:])
    found = {"ok": True, "seconds": median, "tokens_per_second": length / median, "first_seconds": seconds[0]}
    return found | {"all_seconds": seconds[1:], "losses": losses, **memory()}


def apart(given: argparse.Namespace, length: int, repeats: int | None = None) -> dict[str, Any]:
    """`one` in a process of its own, whose line is printed. A failure other than of memory ends this process."""
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": str(MEMORY), "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    command = [sys.executable, "-m", "tests.benchmarks.longpo_against_torch", *sys.argv[1:], "--one", str(length)]
    command += ["--repeats", str(repeats or given.repeats)]
    done = subprocess.run(command, env=environment | os.environ, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not done.stdout.strip():
        sys.stderr.write(done.stderr[-4000:])
        raise SystemExit(f"{given.side} at {length} tokens ended with {done.returncode}")
    found = {"side": given.side, "length": length} | json.loads(done.stdout.splitlines()[-1])
    settings = ("layers", "weights", *(("remat", "offload") if given.side == "ours" else ("logits", "attention")))
    print(json.dumps(found | {name: getattr(given, name) for name in settings}), flush=True)
    return found


def longest(fits: Callable[[int], bool], first: int, multiple: int, most: int) -> tuple[int, int | None]:
    """(the longest that fits, the shortest that was found not to: None if none up to `most`)."""
    good, bad, length = 0, None, first
    while bad is None and length <= most:
        good, bad, length = (length, None, 2 * length) if fits(length) else (good, length, length)
    while bad is not None and bad - good > multiple:
        middle = (good + bad) // 2 // multiple * multiple
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good, bad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=["ours", "torch"], required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=[16384, 32768, 65536])
    sizes = {"layers": 16, "hidden": 2048, "ffn": 8192, "heads": 32, "kv-heads": 8, "head-dim": 64, "vocab": 128256}
    for name, size in ({"answer": 512, "repeats": 3, "multiple": 8192, "most": 1 << 20} | sizes).items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--longest", action="store_true")
    parser.add_argument("--weights", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--remat", choices=["none", "layer", "attention"], default="attention")
    parser.add_argument("--offload", action="store_true")
    parser.add_argument("--logits", choices=["whole", "chunked"], default="whole")
    parser.add_argument("--attention", choices=["flash", "cudnn"], default="flash")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one is not None:
        print(json.dumps(one(given, given.one)))
    elif given.longest:
        fits = partial(apart, given, repeats=1)
        good, bad = longest(lambda length: fits(length)["ok"], given.lengths[0], given.multiple, given.most)
        print(json.dumps({"side": given.side, "longest": good, "does_not_fit": bad}))
    else:
        for length in given.lengths:
            apart(given, length)


if __name__ == "__main__":
    main()
