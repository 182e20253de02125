# SPDX-License-Identifier: Apache-2.0
"""`longpo plan` as it is called, with devices of this machine in place of a slice, and what it counts."""

import argparse
import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx

from longpo_jax import plan
from longpo_jax.config import LongPOConfig
from longpo_jax.flops import flops_of
from longpo_jax.optimizer import transform_of
from longpo_jax.step import Step
from rapid_jax.model.config import LayerKind, from_hf
from rapid_jax.plan.architectures import Architecture
from rapid_jax.plan.topologies import GENERATIONS, GIB, Topology
from rapid_jax.runtime import settings
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.mesh import make_mesh
from tests.longpo import oracles

TRUNK, TAIL = 64, 16
TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
}
SETTINGS = (f"train.lengths=[32, {TRUNK}]", f"train.tail={TAIL}", "train.rows_per_step=8", "train.logits_chunk=8")
SETTINGS += ("train.attention_block=16", "mesh.data=2", "mesh.fsdp=2", "mesh.context=2", "compute.kernel=xla")
SETTINGS += ("excerpts.min_tokens=1", f"excerpts.max_tokens={TRUNK}")
TOP_K = f"objective.top_k={oracles.TOP_K}"
KEYS = {"program", "topology", "chips", "hbm_bytes", "bytes_per_chip", "flops_per_chip", "collectives"}
KEYS |= {"roofline_seconds", "roofline", "calls", "total_seconds", "compile_seconds", "fits"}


def slice_of(hbm_bytes: int = 96 * GIB) -> Topology:
    """Eight devices of this machine."""
    return Topology("v5p:2x2x2", replace(GENERATIONS["v5p"], hbm_bytes=hbm_bytes), tuple(jax.devices()))


def config_of(*overrides: str) -> LongPOConfig:
    return settings.defaults(LongPOConfig, [*SETTINGS, *overrides])


def tiny() -> Architecture:
    return Architecture(from_hf(TINY), "the test")


@pytest.fixture
def planned(tmp_path, monkeypatch):
    """The exit status of `longpo plan` with these words, on a slice whose chips have so many bytes."""
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    settings.save(config_of(f"model.source={tmp_path}"), tmp_path / "settings.yaml")

    def call(*words: str, hbm_bytes: int = 96 * GIB) -> int:
        monkeypatch.setattr(plan, "topology_of", lambda name: slice_of(hbm_bytes))
        parser = argparse.ArgumentParser()
        plan.add_arguments(parser)
        given = ("--config", str(tmp_path / "settings.yaml"), "--topology", "v5p:2x2x2", *words)
        return plan.run(parser.parse_args(given))

    return call


def test_what_fits_exits_with_0_and_prints_a_json_object_a_program(planned, capsys):
    assert planned("--json") == 0
    captured = capsys.readouterr()
    found = [json.loads(line) for line in captured.out.splitlines()]
    assert [item["program"] for item in found] == ["gradients", "update"]
    for item in found:
        kinds = item["bytes_per_chip"]
        assert item.keys() == KEYS
        assert item["fits"] and item["chips"] == 8
        assert kinds["peak"] == sum(size for kind, size in kinds.items() if kind != "peak")
        assert kinds["optimizer"] > 2.5 * kinds["weights"] > 0  # two moments and the sum of the gradients
    gradients, update = found
    assert gradients["calls"] == 2  # of 4 rows each
    assert gradients["flops_per_chip"] > 0 and "collective-permute" in gradients["collectives"]
    assert update["calls"] == 1 and update["roofline"]["hbm"] == update["roofline_seconds"] > 0
    assert captured.err == ""


def test_what_does_not_fit_exits_with_3_and_names_settings_of_training(planned, capsys):
    assert planned("--program", "gradients", "--layers", "1", hbm_bytes=2**16) == 3
    captured = capsys.readouterr()
    assert "1 layers of 32, 4 heads, 2 kv, vocabulary 64" in captured.out and "1 of its 2 layers" in captured.out
    assert "64 + 16 places, 8 an update; objective longpo, remat attention" in captured.out
    assert "gradients: DOES NOT FIT v5p:2x2x2 (8 chips)" in captured.out and "update:" not in captured.out
    (line,) = captured.err.splitlines()
    assert line.startswith("longpo: gradients needs ") and "mesh.context" in line
    assert line.endswith("(now data 2 x fsdp 2 x context 2 x model 1)")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--length", "66"), "expected multiples of 4"),
        (("--set", "mesh.data=1"), "needs 4 devices, got 8"),
        (("--shape", "gpt"), "unknown shape 'gpt'"),
        (("--layers", "0"), "--layers: expected at least 1, got 0"),
        (
            ("--set", "mesh.data=1", "--set", "mesh.fsdp=1", "--set", "mesh.model=4"),
            "axis K of size 2 cannot be split over model = 4",
        ),
    ],
)
def test_mistakes_are_one_line(planned, words: tuple[str, ...], said: str):
    with pytest.raises(InputError, match=said):
        planned(*words)


def test_the_longest_row_may_be_another():
    longer, shorter = (plan._longest(config_of(), length) for length in (96, 48))
    assert longer.train.lengths == (32, 64, 96)
    assert shorter.train.lengths == (32, 48)
    assert plan._longest(config_of(), None) == config_of()


def laid_out(tree) -> list:
    return [(x.shape, x.dtype, x.sharding) for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize("objective", ["longpo", "dpo", "sft", "solopo", "opsd"])
@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop"])
def test_what_is_planned_is_what_training_has(objective: str, optimizer: str):
    """Shapes, types and places of the weights, of what the optimizer keeps, of the sums and of a microbatch."""
    config = config_of(
        f"objective.name={objective}", f"optimizer.name={optimizer}", "optimizer.moments_dtype=bfloat16", TOP_K
    )
    gradients, update = plan.programs_of(config, slice_of(), tiny())
    decoder = oracles.decoder_of(oracles.model(tied=False), make_mesh(config.mesh, jax.devices()))
    step = Step(config, decoder, transform_of(config.optimizer, 10))
    excerpt = gradients.resident["other"].get("short_tokens_BT", np.zeros((1, TAIL))).shape[1] - TAIL
    pair = oracles.pair(40, (6, 2, 8), (6, 2, 8))
    sample = pair.sample(trunk=TRUNK, tail=TAIL, objective=objective, excerpt_trunk=excerpt)
    batch = step.place([sample] * 4)
    assert {name: laid_out(x) for name, x in gradients.resident["other"].items()} == {
        name: laid_out(x) for name, x in batch.items()
    }
    sums_of = step.zero_total(decoder)[0]
    state = step.start(decoder)
    for program in (gradients, update):
        assert laid_out(program.resident["weights"]) == laid_out(nnx.state(state.weights))
        moments, sums = program.resident["optimizer"]
        assert laid_out(moments) == laid_out(state.moments)
        assert laid_out(sums) == laid_out(sums_of)


@pytest.mark.parametrize("window", [1, 5, TRUNK - 3])
def test_flops_of_a_layer_with_a_window(window: int):
    shape = tiny().config
    some = replace(shape, pattern=(LayerKind(window=window), LayerKind()))
    row = plan._full_row(config_of("objective.name=longpo"))
    seen = row["pos_BT"][row["pos_BT"] >= 0] + 1
    fewer = int(np.sum(seen - np.minimum(seen, window)))
    less = float(flops_of(shape, "full", row)) - float(flops_of(some, "full", row))
    assert less == pytest.approx(12 * 4 * 8 * fewer, rel=1e-4)


# Places whose logits are needed: of all that is chosen, document and all, and of rejected answers; or of answers alone.
@pytest.mark.parametrize(
    ("objective", "nll", "rows", "logits"),
    [
        ("longpo", "full", 1, TRUNK + TAIL),
        ("longpo", "response", 1, 2 * TAIL),
        ("sft", "full", 1, TRUNK),
        ("sft", "response", 1, TAIL),
        ("solopo", "full", 2, TRUNK + 2 * TAIL),
    ],
)
def test_flops_of_a_full_row(objective: str, nll: str, rows: int, logits: int):
    """By the model, and what is computed: counted by hand, a matrix product at a time."""
    given, heads = (f"objective.name={objective}", f"objective.nll={nll}"), 4 * 8
    config = config_of(*given)
    row = plan._full_row(config)
    assert row["tokens_BT"].shape == (1, TRUNK + (TAIL if objective == "longpo" else 0))
    places = [np.sort(row[name][row[name] >= 0]) for name in row if name.endswith("pos_BT")]
    assert len(places) == rows
    tokens = sum(map(len, places))
    # A query sees what is not later than it, itself included: as many keys as its position, and one.
    pairs = sum(int(np.sum(pos + 1)) for pos in places)
    layer = 32 * (2 * 32 + 2 * 16 + 3 * 48)
    for remat, products, again in (("none", 9, 0), ("attention", 9, 2), ("layer", 11, 2)):
        needed, computed = plan._flops(config_of(*given, f"train.remat={remat}"), tiny(), row)
        assert needed == pytest.approx(6 * (2 * layer * tokens + 32 * 64 * logits) + 2 * 12 * heads * pairs, rel=1e-6)
        weights = 2 * (6 * layer + again * (layer - 32 * 48)) * tokens + 8 * 32 * 64 * logits
        assert computed == pytest.approx(weights + 2 * 2 * products * heads * pairs, rel=1e-6)
