# SPDX-License-Identifier: Apache-2.0
"""How fast a document's keys and values go to the host and come back: python -m tests.benchmarks.tiers --tokens 131072

The shape is Llama-3.1-8B's. Beside what the engine does: the same arrays by memory that is pinned, where JAX has it.
With --folder also to disk and back, from what the system keeps of the files and, where it drops that, from the disk; in
turns as the product does it and with sums that cost nothing, stored as zeros and not looked at.
"""

import argparse
import contextlib
import os
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from rapid_jax.attention.cache import Prefix, empty_layers
from rapid_jax.engine.host_prefixes import HostMoves, device_bytes
from rapid_jax.speculative import prefix_arrays, prefix_reader
from rapid_jax.speculative.prefix_heads import Place
from rapid_jax.speculative.prefix_store import PrefixStore
from rapid_jax.speculative.prefix_sums import Slots
from tests.engine.prefix_cases import MESHES, decoder_on


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    done = jax.block_until_ready(work())
    return time.perf_counter() - start, done


@contextlib.contextmanager
def free_sums() -> Iterator[None]:
    """What writes sums of values writes zeros, what compares them finds them right."""

    def zeros(fields: Mapping[str, Any], slots: Slots) -> np.ndarray:
        return np.zeros(fields["k_BKSH"].shape[:3], np.uint32)

    patch = mock.patch.object
    with patch(prefix_arrays, "slot_sums", zeros), patch(prefix_reader, "are_same", lambda *fields: np.True_):
        yield


def on_disk(folder: Path, prefix: Prefix, repeats: int) -> None:
    """Each turn under another name: what is there is not written again."""
    tokens = int(prefix.used)
    store, place = PrefixStore(folder / "prefixes", 1 << 50, quiet=True), Place.of(tokens, tokens, 16384, 1)
    for turn in range(2 * repeats):
        with free_sums() if turn % 2 else contextlib.nullcontext():
            said = to_disk_and_back(store, folder, place, prefix, f"{turn:064x}")
        print(f"  {'sums for nothing' if turn % 2 else 'as it is'}: {said}", flush=True)


def to_disk_and_back(store: PrefixStore, folder: Path, place: Place, prefix: Prefix, key: str) -> str:
    size, before = device_bytes(prefix), processor_s()
    written, _ = timed(lambda: store.save(key, prefix))
    between = processor_s()
    warm, _ = timed(lambda: store.load(key, layout="unrolled", place=place))
    after = processor_s()
    for path in (folder / "prefixes" / key).rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    cold, back = timed(lambda: store.load(key, layout="unrolled", place=place))
    assert back is not None and bool(jnp.all(back.layers[0].k_BKSH == prefix.layers[0].k_BKSH))
    store.remove(key)
    down, up, again = (f"{size / seconds / 1e9:.2f} GB/s" for seconds in (written, warm, cold))
    spent = [f"{seconds / size * 1e9:.2f} s of processor a GB" for seconds in (between - before, after - between)]
    return f"to disk {down} ({spent[0]}), back {up} ({spent[1]}), cold {again}"


def processor_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="one on the disk that is meant; what is written is removed again")
    options = parser.parse_args()
    shape = {"num_layers": options.layers, "batch": 1, "kv_heads": 8, "slots": options.tokens, "head_dim": 128}
    layers = empty_layers(**shape, dtype=jnp.dtype("bfloat16"), stacked=False)
    layers = jax.tree.map(lambda x: x + jnp.arange(x.shape[-2], dtype=x.dtype)[:, None], layers)
    pos_BS = jnp.arange(options.tokens, dtype=jnp.int32)[None]
    prefix = jax.block_until_ready(Prefix(layers, pos_BS, jnp.asarray(np.int32(options.tokens))))
    size, moves = device_bytes(prefix), HostMoves(decoder_on(MESHES["one device"]))
    print(f"{options.tokens} tokens, {size / 1e9:.2f} GB on {jax.devices()[0].device_kind}")
    for _ in range(options.repeats):
        # An array keeps what was once read of it: each turn takes new ones.
        fresh = jax.block_until_ready(jax.tree.map(jnp.copy, prefix))
        down, kept = timed(lambda fresh=fresh: moves.to_host(fresh))
        up, _ = timed(lambda kept=kept: moves.to_devices(kept))
        print(f"  to the host {size / down / 1e9:.1f} GB/s, to the device {size / up / 1e9:.1f} GB/s")
    if options.folder is not None:
        on_disk(options.folder, prefix, options.repeats)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    try:
        pinned = here.with_memory_kind("pinned_host")
        for _ in range(options.repeats):
            down, kept = timed(lambda: jax.device_put(prefix, pinned))
            up, _ = timed(lambda kept=kept: jax.device_put(kept, here))
            print(f"  pinned: to the host {size / down / 1e9:.1f} GB/s, to the device {size / up / 1e9:.1f} GB/s")
    except (ValueError, RuntimeError) as error:
        print(f"  no pinned memory here: {error}")


if __name__ == "__main__":
    main()
