# SPDX-License-Identifier: Apache-2.0
"""Checkpoint folders in and out: byte-equal round trips, shards, meshes, memory, and the ways a folder can be wrong."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from flax import nnx
from safetensors import safe_open

from rapid_jax.model import safetensors_file
from rapid_jax.model.hf_io import HfCheckpoint, load_hf, save_hf
from rapid_jax.model.hf_names import stored, weights
from rapid_jax.runtime.errors import InputError
from tests.model.conftest import FAMILIES, our_logits, tokens_at, torch_logits

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def raw_tensors(folder: Path) -> dict[str, tuple[str, bytes]]:
    """name -> (dtype, bytes), read by the safetensors package."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, spec in safetensors.deserialize(file.read_bytes()):
            found[name] = (spec["dtype"], bytes(spec["data"]))
    return found


@pytest.mark.parametrize("layout", ["stacked", "unrolled"])
@pytest.mark.parametrize("name", ["llama", "qwen2-tied"])
def test_a_round_trip_gives_the_same_bytes_and_the_same_logits(name, layout, checkpoint, tmp_path):
    model, folder = checkpoint(name)
    decoder = load_hf(folder, layout=layout, dtype=jnp.float32, quiet=True)
    save_hf(tmp_path / "out", decoder, dtype="float32", files={"generation_config.json": b'{"eos_token_id": 5}'})
    assert raw_tensors(tmp_path / "out") == raw_tensors(folder)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert back.generation_config.eos_token_id == 5
    tokens_BT, pos_BT = tokens_at(8100, 40)
    np.testing.assert_array_equal(torch_logits(back, tokens_BT, pos_BT), torch_logits(model, tokens_BT, pos_BT))


def test_bfloat16_round_trip_in_small_shards_is_byte_equal(checkpoint, tmp_path):
    model, _ = checkpoint("mistral")
    type(model)(model.config).to(torch.bfloat16).save_pretrained(tmp_path / "in")
    decoder = load_hf(tmp_path / "in", layout="stacked", dtype=jnp.bfloat16, quiet=True)
    save_hf(tmp_path / "out", decoder, dtype="bfloat16", files={}, shard_bytes=8000)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 3 and shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    # 8,000 bytes of tensors at most, or one tensor that is larger by itself.
    for shard in shards:
        tensors = safetensors_file.tensors_in(shard).values()
        assert len(tensors) == 1 or sum(tensor.size for tensor in tensors) <= 8000
    assert raw_tensors(tmp_path / "out") == raw_tensors(tmp_path / "in")
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(len(data) for _, data in raw_tensors(tmp_path / "in").values())
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "in", dtype="auto")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert again.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(reference.parameters(), again.parameters(), strict=True))
    decoder = load_hf(tmp_path / "out", layout="unrolled", dtype=jnp.bfloat16, quiet=True)
    tokens_BT, pos_BT = tokens_at(5, 10)
    assert np.isfinite(our_logits(decoder, tokens_BT, pos_BT)).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_names_are_a_bijection_with_the_checkpoint(name, checkpoint):
    _, folder = checkpoint(name)
    config = HfCheckpoint(folder).config
    every = weights(config)
    assert {array.key for array in stored(config)} == raw_tensors(folder).keys()
    assert [weight for array in stored(config) for weight in array.weights] == list(every)
    assert len({(weight.path("unrolled"), weight.expert) for weight in every}) == len(every)
    for weight in every:
        array = np.random.default_rng(0).normal(size=weight.stored_shape)
        ours = array.reshape(weight.unflattened_shape).transpose(weight.to_ours)
        assert ours.shape == weight.shape
        np.testing.assert_array_equal(ours.transpose(weight.to_stored).reshape(weight.stored_shape), array)


def test_layers_of_the_stack_are_the_unrolled_layers(checkpoint):
    _, folder = checkpoint("qwen2")
    stacked, unrolled = (
        load_hf(folder, layout=layout, dtype=jnp.float32, quiet=True) for layout in ("stacked", "unrolled")
    )
    for path, value in nnx.to_flat_state(nnx.split(stacked.blocks)[1]):
        for layer in range(2):
            one = dict(nnx.to_flat_state(nnx.split(unrolled.blocks)[1]))[layer, *path]
            np.testing.assert_array_equal(value[...][layer], one[...])


def damaged(folder: Path, target: Path, change) -> Path:
    shutil.copytree(folder, target)
    change(target)
    return target


def rewrite(change):
    """A change of the tensors of a single-file checkpoint."""

    def apply(folder):
        with safe_open(folder / SINGLE, framework="np") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        change(tensors)
        safetensors.numpy.save_file(tensors, folder / SINGLE)

    return apply


def cut(folder):
    data = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(data[:-10])


def pickled(folder):
    (folder / SINGLE).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


def without_index(folder):
    (folder / SINGLE).rename(folder / "model-00001-of-00002.safetensors")


def index_to(entries):
    def apply(folder):
        (folder / SINGLE).rename(folder / "part.safetensors")
        (folder / INDEX).write_text(json.dumps({"weight_map": entries}))

    return apply


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            rewrite(lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight")),
            "model.layers.1.mlp.up_proj.weight",
        ),
        (rewrite(lambda tensors: tensors.update(strange=np.zeros(2, np.float32))), "strange"),
        (
            rewrite(lambda tensors: tensors.update({"model.norm.weight": np.zeros(3, np.float32)})),
            r"\[3\], expected \[32\]",
        ),
        (rewrite(lambda tensors: tensors.update({"model.norm.weight": np.zeros(32, np.int8)})), "I8"),
        (cut, f"{SINGLE}: cut short"),
        (lambda folder: (folder / SINGLE).write_bytes(b"\x02\0\0\0\0\0\0\0[]"), "not a safetensors file"),
        (lambda folder: (folder / SINGLE).write_bytes(b"PK"), "not a safetensors file: it begins with b'PK'"),
        (lambda folder: (folder / SINGLE).unlink(), "expected model.safetensors"),
        (lambda folder: (folder / "config.json").unlink(), "config.json: no such file"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: not JSON"),
        (pickled, "pickled"),
        (without_index, "found model-00001-of-00002.safetensors"),
        (index_to({"model.norm.weight": "gone.safetensors"}), "'gone.safetensors', and there is no such file"),
        (index_to({"nothing": "part.safetensors"}), "no tensor 'nothing'"),
        (index_to({"model.norm.weight": "../elsewhere.safetensors"}), "not the name of a file"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line_that_says_where(change, words, checkpoint, tmp_path):
    _, folder = checkpoint("llama")
    with pytest.raises(InputError, match=words) as caught:
        load_hf(damaged(folder, tmp_path / "bad", change), layout="unrolled", dtype=jnp.float32, quiet=True)
    assert "\n" not in str(caught.value)


def test_a_tied_head_may_be_stored_if_it_is_the_embedding(checkpoint, tmp_path):
    _, folder = checkpoint("llama3")

    def add_head(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    same = damaged(folder, tmp_path / "same", rewrite(add_head))
    assert load_hf(same, layout="unrolled", dtype=jnp.float32, quiet=True).head_DV is None
    other = damaged(
        folder, tmp_path / "other", rewrite(lambda t: (add_head(t), t["lm_head.weight"].__setitem__((0, 0), 9)))
    )
    with pytest.raises(InputError, match="ties them"):
        load_hf(other, layout="unrolled", dtype=jnp.float32, quiet=True)


def test_saving_replaces_a_checkpoint_and_refuses_anything_else(checkpoint, tmp_path):
    _, folder = checkpoint("llama")
    decoder = load_hf(folder, layout="stacked", dtype=jnp.float32, quiet=True)
    for _ in range(2):
        save_hf(tmp_path / "out", decoder, dtype="bfloat16", files={})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match="mine"):
        save_hf(tmp_path / "mine", decoder, dtype="bfloat16", files={})
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "precious"


MEMORY = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp
from rapid_jax.model.hf_io import load_hf, save_hf
jax.jit(lambda x: x + 1)(jnp.ones(4)).block_until_ready()
def peak():  # ru_maxrss would include the process that started this one
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
before = peak()
decoder = load_hf(Path(sys.argv[1]), layout=sys.argv[2], dtype=jnp.float32, quiet=True)
loaded = peak()
save_hf(Path(sys.argv[3]), decoder, dtype="bfloat16", files={}, shard_bytes=100_000_000)
print(loaded - before, peak() - before)
"""


@pytest.fixture(scope="module")
def large_checkpoint(tmp_path_factory):
    """About 300 MB, its largest tensors 34 MB."""
    folder = tmp_path_factory.mktemp("large")
    sizes: dict[str, Any] = {"vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=True)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    ones = (np.ones(shape, np.float32) for shape in shapes.values())
    safetensors_file.write(folder / SINGLE, shapes, np.dtype(np.float32), ones)
    return folder


@pytest.mark.parametrize("layout", ["stacked", "unrolled"])
def test_peak_memory_is_the_model_and_a_few_of_its_tensors(layout, large_checkpoint, tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, str(large_checkpoint), layout, str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=True,
        # Blocks of tensors are given back at once: the peak is then of what is held, not of what malloc keeps (40 MB
        # more in one run than in another).
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"},
    )
    loading, saving = map(int, run.stdout.split())
    tensors = safetensors_file.tensors_in(large_checkpoint / SINGLE).values()
    model, largest = sum(tensor.size for tensor in tensors), max(tensor.size for tensor in tensors)
    # The tensor as read, its copy on the device and, in a stack, its turned form; compiled programs take 20 to 55 MB.
    assert model <= loading <= saving <= model + 3 * largest + 70e6


MESH = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from rapid_jax.model.hf_io import load_hf, save_hf
from rapid_jax.runtime.axes import PARAM
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.mesh import MeshConfig, make_mesh
from tests.model.conftest import our_logits, tokens_at
folder, out = Path(sys.argv[1]), Path(sys.argv[2])
mesh = make_mesh(MeshConfig(data=2, fsdp=2, model=2))
tokens, pos = tokens_at(8100, 20)
alone = our_logits(load_hf(folder, layout="unrolled", dtype=jnp.float32, quiet=True), tokens, pos)
for layout in ("stacked", "unrolled"):
    decoder = load_hf(folder, layout=layout, dtype=jnp.float32, mesh=mesh, quiet=True)
    q = decoder.blocks.q_DNH[...] if layout == "stacked" else decoder.blocks[0].q_DNH[...]
    part = q.addressable_shards[0].data.shape
    assert part == ((2, 16, 2, 8) if layout == "stacked" else (16, 2, 8)), (part, q.sharding)
    if layout == "stacked":
        np.testing.assert_allclose(our_logits(decoder, tokens, pos), alone, atol=1e-4)
    save_hf(out / layout, decoder, dtype="float32", files={})
try:
    load_hf(folder, layout="stacked", dtype=jnp.float32, mesh=make_mesh(MeshConfig(model=8)), quiet=True)
except InputError as error:
    print(error)
whole = load_hf(folder, layout="stacked", dtype=jnp.float32, mesh=make_mesh(MeshConfig(fsdp=2, model=4)), quiet=True,
                table=PARAM | {"K": None, "V": None})
assert whole.blocks.k_DKH[...].addressable_shards[0].data.shape == (2, 16, 2, 8)
"""


def test_a_mesh_of_eight_devices_holds_the_same_model_and_saves_the_same_bytes(checkpoint, tmp_path):
    model, _ = checkpoint("llama")
    config = transformers.LlamaConfig(**model.config.to_dict() | {"vocab_size": 104, "num_key_value_heads": 2})
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "in")
    run = subprocess.run(
        [sys.executable, "-c", MESH, str(tmp_path / "in"), str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "8"},
    )
    assert run.returncode == 0, run.stderr
    assert "axis N of size 4 cannot be split over model = 8" in run.stdout
    for layout in ("stacked", "unrolled"):
        assert raw_tensors(tmp_path / layout) == raw_tensors(tmp_path / "in")
