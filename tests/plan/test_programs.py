# SPDX-License-Identifier: Apache-2.0
"""What is planned is what runs: the same programs with arrays of the same shapes in the same places."""

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rapid_jax.attention import quantized_kv
from rapid_jax.attention.quantized_kv import quantize_kv
from rapid_jax.config import ComputeConfig, ModelsConfig, RapidConfig
from rapid_jax.engine.host_prefixes import head_bytes
from rapid_jax.engine.lane import Lane, LaneKey
from rapid_jax.model.config import LayerKind
from rapid_jax.model.experts_config import Experts
from rapid_jax.model.fused import fuse, quantize
from rapid_jax.model.quantized import BITS
from rapid_jax.plan import programs
from rapid_jax.plan.architectures import Architecture, architecture_of
from rapid_jax.plan.cost import Pass, work_of
from rapid_jax.plan.models import own_bytes
from rapid_jax.plan.programs import QUESTION, programs_of
from rapid_jax.plan.report import tiled_bytes
from rapid_jax.retrieval.config import RetrievalConfig
from rapid_jax.runtime.mesh import make_meshes
from rapid_jax.runtime.mesh_config import MeshConfig
from rapid_jax.speculative import generate, prefill, split_mesh
from rapid_jax.speculative import rounds as rounds_module
from rapid_jax.speculative.config import SamplingConfig, SpeculationConfig
from rapid_jax.speculative.prefix_heads import Place
from rapid_jax.speculative.round_times import RoundTimes
from rapid_jax.speculative.state import Plan
from tests.speculative.models import Weights, config_of

VOCABULARY, CONTEXT, NEW = 64, 512, 16
LONG, SHORT = CONTEXT - NEW - QUESTION, 64 + QUESTION
SETTINGS = {
    "sampled": (
        SpeculationConfig(gamma=7, lookup="on"),  # rows of different gammas share the program of 8
        SamplingConfig(temperature=0.7, top_k=5, repetition_penalty=1.1, max_new_tokens=NEW),
    ),
    "greedy": (SpeculationConfig(gamma=2, lookup="off"), SamplingConfig(temperature=0.0, max_new_tokens=NEW)),
}


WINDOWED = (LayerKind(window=100), LayerKind())


class Spy:
    """A jitted function that remembers what it was called with, and what it was lowered with."""

    def __init__(self, real):
        self.real, self.ran, self.planned = real, [], []

    def __call__(self, *args, **static):
        self.ran.append(
            (jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), args), static)
        )
        return self.real(*args, **static)

    def lower(self, *args, **static):
        self.planned.append((args, static))


def config_for(
    settings: str, mesh: MeshConfig, layout="stacked", drafter_mesh=None, bits="full", kv="full"
) -> RapidConfig:
    speculation, sampling = SETTINGS[settings]
    drafter = "other" if drafter_mesh else "same"
    return RapidConfig(
        models=ModelsConfig(
            target="none",
            drafter=drafter,
            drafter_weights=bits,
            dtype="float32",
            layout=layout,
            max_context=CONTEXT,
        ),
        retrieval=RetrievalConfig(chunk_tokens=32, compression=8, min_tokens=64),
        speculation=speculation,
        sampling=sampling,
        mesh=mesh,
        drafter_mesh=drafter_mesh,
        compute=ComputeConfig(prefill_chunk=64, attention_block=128, kernel="xla", kv=kv),
    )


def run(config: RapidConfig, pattern: Sequence[LayerKind] = (LayerKind(),)) -> None:
    """The prompts that a plan assumes, answered as a lane of the engine does."""
    rng = np.random.default_rng(0)
    weights, meshes = Weights.lively(VOCABULARY, pattern=pattern), make_meshes(config.mesh, config.drafter_mesh)
    target = fuse(weights.decoder(config.models.layout, mesh=meshes[0]))
    drafter = target if config.drafter_mesh is None else fuse(weights.decoder(config.models.layout, mesh=meshes[1]))
    if config.models.drafter_weights != "full":
        drafter = quantize(drafter, BITS[config.models.drafter_weights])

    def prompted(decoder, length: int, cached: int, *, coarse: bool, rounds: bool) -> generate.Prompted:
        tokens = rng.integers(0, VOCABULARY, length).tolist()
        settings = prefill.PrefillSettings(config.compute.prefill_chunk, "xla", coarse=coarse)
        work = prefill.Prefill(decoder, [tokens[:cached]], settings, dtype=jnp.dtype("float32"))
        while work.left:
            work.step()
        prefix = quantize_kv(work.prefix) if rounds else work.prefix
        return generate.Prompted(decoder, [tokens], prefix, [cached])

    long, short = (
        prompted(target, LONG + QUESTION, LONG, coarse=False, rounds=config.compute.kv != "full"),
        prompted(drafter, SHORT, SHORT - 2, coarse=True, rounds=config.models.drafter_weights != "full"),
    )
    rounds = generate.start(
        long,
        short,
        speculation=config.speculation,
        sampling=config.sampling,
        stops=(VOCABULARY - 1,),
        texts=[[*long.prompts[0][:LONG], *short.prompts[0]]],
        block=config.compute.attention_block,
    )
    job: Any = SimpleNamespace(
        config=config,
        request=SimpleNamespace(logprobs=None),
        cancelled=threading.Event(),
        receive=lambda row, progress: False,
        seconds=Counter(),
        gammas={},
    )
    lane = Lane.of(LaneKey.of(config.speculation, None), job, rounds, "the document", RoundTimes())
    while lane.running:
        lane.advance()


def planned(config: RapidConfig, pattern: Sequence[LayerKind] = (LayerKind(),)) -> list[programs.Program]:
    architecture = Architecture(Weights.lively(VOCABULARY, pattern=pattern).config, "the test")
    drafter = None if config.drafter_mesh is None else architecture
    found = programs_of(config, tuple(jax.devices()), architecture, drafter, CONTEXT)
    for program in found:
        program.lower()
    return found


def check(spy: Spy) -> None:
    """Every planned call was one of those that ran, with arrays that lie alike."""
    for args, static in spy.planned:
        matching = [
            ran for ran, other in spy.ran if other == static and jax.tree.structure(ran) == jax.tree.structure(args)
        ]
        places = [[(x.shape, x.dtype) for x in jax.tree.leaves(ran)] for ran in matching]
        assert [(x.shape, x.dtype) for x in jax.tree.leaves(args)] in places
        ran = matching[places.index([(x.shape, x.dtype) for x in jax.tree.leaves(args)])]
        for mine, theirs in zip(jax.tree.leaves(args), jax.tree.leaves(ran), strict=True):
            assert mine.sharding.is_equivalent_to(theirs.sharding, len(mine.shape))


@pytest.mark.parametrize(
    ("settings", "layout", "bits", "kv", "pattern"),
    [
        ("sampled", "stacked", "full", "full", (LayerKind(),)),
        ("greedy", "unrolled", "full", "int8", (LayerKind(),)),
        ("greedy", "stacked", "int8", "full", WINDOWED),
        ("greedy", "unrolled", "full", "full", WINDOWED),
        ("greedy", "stacked", "int8", "int8", (LayerKind(window=100),)),
    ],
    ids=["sampled", "int8 cache", "int8 drafter, windows", "windows", "int8, a window in all layers"],
)
def test_what_is_planned_is_what_runs(monkeypatch, settings: str, layout: str, bits: str, kv: str, pattern):
    rounds, stacked, layers = Spy(rounds_module.run_rounds), Spy(prefill._chunk_stacked), Spy(prefill._chunk_layer)
    monkeypatch.setattr(rounds_module, "run_rounds", rounds)
    monkeypatch.setattr(programs, "run_rounds_on_tpu", rounds)
    monkeypatch.setattr(prefill, "_chunk_stacked", stacked)
    monkeypatch.setattr(prefill, "_chunk_layer", layers)
    rounding = Spy(quantized_kv.quantize_array)
    monkeypatch.setattr(quantized_kv, "quantize_array", rounding)
    monkeypatch.setattr(programs, "quantize_array", rounding)
    config = config_for(settings, MeshConfig(context=2, model=2), layout, bits=bits, kv=kv)
    run(config, pattern)
    names = ["prefill", "round"] if bits == "full" else ["drafter quantisation", "prefill", "drafter prefill", "round"]
    if kv != "full":
        names.insert(names.index("prefill") + 1, "prefix quantisation")
    assert [program.name for program in planned(config, pattern)] == names
    prefills = stacked if layout == "stacked" else layers
    assert (len(rounds.planned), len(prefills.planned)) == (1, sum("prefill" in name for name in names))
    assert len(rounding.planned) == (kv != "full")
    for spy in (rounds, prefills, rounding):
        check(spy)


@pytest.mark.parametrize("bits", ["full", "int8"])
def test_the_halves_of_a_round_apart_are_those_that_run(monkeypatch, bits: str):
    """In full, and with a copy that drafts over keys and values in 8 bits, both prompts'."""
    draft, verify = Spy(split_mesh._drafted), Spy(split_mesh._verified)
    for suffix in ("", "_on_tpu"):
        monkeypatch.setattr(split_mesh, f"_drafted{suffix}", draft)
        monkeypatch.setattr(split_mesh, f"_verified{suffix}", verify)
    config = config_for("sampled", MeshConfig(context=2, model=2), drafter_mesh=MeshConfig(model=2), bits=bits, kv=bits)
    run(config)
    names = ["prefill", "drafter prefill", "draft", "verify"]
    if bits == "int8":
        names = ["drafter quantisation", "prefill", "prefix quantisation", *names[1:]]
    found = planned(config)
    assert [program.name for program in found] == names
    documents = [x for program in found if program.name == "verify" for x in program.resident["cache"]]
    assert ("int8" in {x.dtype.name for x in jax.tree.leaves(documents)}) == (bits == "int8")
    check(draft)
    check(verify)


@pytest.mark.parametrize(("mode", "names"), [("target", ["prefill", "round"]), ("retrieval", ["prefill", "round"])])
def test_modes_without_a_drafter(mode, names):
    speculation = SpeculationConfig(mode=mode, gamma=3)
    config = RapidConfig(
        speculation=speculation, mesh=MeshConfig(model=2), compute=ComputeConfig(prefill_chunk=64, kernel="xla")
    )
    found = programs_of(config, tuple(jax.devices()), Architecture(config_of(VOCABULARY), "the test"), None, CONTEXT)
    assert [program.name for program in found] == names
    assert found[-1].lower().as_text()


@pytest.mark.parametrize("window", [100, 129, 600])
def test_what_prefill_holds_is_planned(window):
    """Also where a window keeps as many slots as it reaches while a prompt is read; what keeps all lies there once."""
    config = config_for("greedy", MeshConfig())
    config = replace(config, compute=replace(config.compute, prefill_chunk=64))
    pattern = LayerKind(window=window), LayerKind()
    found = next(program for program in planned(config, pattern) if program.name == "prefill")
    decoder = fuse(Weights.lively(VOCABULARY, pattern=pattern).decoder("stacked"))
    place = Place.of(LONG, LONG, 64, 1, *prefill.windows_of(decoder.config))
    arrays = [group.layers for prefix in found.resident["cache"] for group in prefix.groups]
    positions = 2 * 4 + 4 * (place.layout.slots + place.near.layout.slots)  # type: ignore[union-attr]
    assert own_bytes(arrays) == head_bytes(decoder, place, filling=True) - positions


def test_layers_with_a_window_keep_their_window():
    """Gemma-3-27B at 131,072 tokens: 10 layers of 62 keep all of them, 52 keep 1,024."""
    config = RapidConfig(models=ModelsConfig(target="none", dtype="bfloat16"), compute=ComputeConfig(kernel="xla"))
    gemma = architecture_of("", "gemma-3-27b")
    whole = replace(gemma, config=replace(gemma.config, pattern=(LayerKind(),)))
    models = [programs.models_of(config, tuple(jax.devices()), each, None, 131072)[0] for each in (gemma, whole)]
    kept, full = (sum(own_bytes(group.layers) for group in model.prefix().groups) for model in models)
    assert kept / full == pytest.approx((10 + 52 * 1024 / models[0].layout.slots) / 62) and kept / full < 0.17


def test_work_of_a_pass_by_hand():
    config, mesh = config_of(VOCABULARY), MeshConfig(context=2, model=2)
    layer = 32 * (2 * 32 + 2 * 16) + 3 * 32 * 48
    work = work_of(config, mesh, Pass(8, 100, 8), 2, split_tokens=False)
    assert work.flops == (2 * 2 * layer * 8 + 2 * 32 * VOCABULARY * 8 + 4 * 2 * 32 * 8 * 104 / 2) / 2
    assert work.hbm_bytes == 2 * ((2 * layer + 32 * VOCABULARY) / 2 + 2 * 2 * 1 * 8 * 50)
    assert work_of(config, mesh, Pass(8, 100, 0), 2, split_tokens=True).flops < work.flops


@pytest.mark.parametrize("seen, pairs", [(100, 8 * 10), (4, 6 * 4 + 6 * 3 + 2 * 10), (0, 8 * 4)])
def test_a_layer_with_a_window_sees_no_more(seen, pairs):
    """Its tokens' own pairs are counted as halves, as in a layer without."""
    config = replace(config_of(VOCABULARY), pattern=(LayerKind(window=10), LayerKind()))
    run, mesh = Pass(8, seen, 0), MeshConfig()
    work = work_of(config, mesh, run, 2, split_tokens=False)
    whole = work_of(replace(config, pattern=(LayerKind(),)), mesh, run, 2, split_tokens=False)
    heads, kv_heads = 4 * 32, 2 * 2 * 2 * 8
    assert whole.flops - work.flops == heads * (8 * (seen + 4) - pairs)
    assert whole.hbm_bytes - work.hbm_bytes == kv_heads * (seen - min(seen, 10))


def test_work_with_experts_by_hand():
    """A token is multiplied with its own; what is read are those that all are expected to touch."""
    experts = Experts(count=5, per_token=2, ffn=24, normalized=True)
    config = replace(config_of(VOCABULARY), experts=experts, pattern=(LayerKind(experts=True), LayerKind()))
    heads, mlp, head = 32 * (2 * 32 + 2 * 16), 3 * 32 * 48, 32 * VOCABULARY
    work = work_of(config, MeshConfig(), Pass(2, 0, 1), 2, split_tokens=False)
    own = 2 * heads + mlp + 32 * 5 + 2 * 3 * 32 * 24
    assert work.flops == 2 * own * 2 + 2 * head + 4 * 2 * 32 * 2
    assert work.hbm_bytes == pytest.approx(2 * (own + 1.2 * 3 * 32 * 24 + head))  # 3.2 of 5 experts


def test_bytes_are_those_of_whole_tiles():
    def array(*shape: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    assert tiled_bytes([array(16, 128), array(16, 256)]) == 16 * 384 * 2
    assert tiled_bytes(array(16, 64)) == 16 * 128 * 2  # half of every lane is empty
    assert tiled_bytes(array(3, 5, 4, 128)) == 3 * 5 * 4 * 128 * 2
    assert tiled_bytes(array(7, dtype=jnp.int32)) == 128 * 4


@pytest.mark.parametrize(("gamma", "copies", "steps"), [(1, 0, 0), (1, 4, 1), (3, 0, 2), (3, 4, 3)])
def test_the_first_draft_without_copies_is_no_step_of_the_loop(gamma, copies, steps):
    assert programs._draft_loop(Plan(gamma, copies, 2, 1024, 64)) == steps
