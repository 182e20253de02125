# SPDX-License-Identifier: Apache-2.0
"""Drafting from the target's own cache: what is chosen, and that every choice gives the target's own answers."""

import importlib
import itertools
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rapid_jax.attention.attended import BLOCK, attended_prefix
from rapid_jax.attention.cache import KV, Prefix
from rapid_jax.attention.quantized_kv import quantize_kv
from rapid_jax.attention.strategy import Strategy
from rapid_jax.config import ModelsConfig, RapidConfig
from rapid_jax.model.fused import fuse, quantize
from rapid_jax.model.layer_kinds import LayerKind
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.mesh import make_meshes
from rapid_jax.runtime.mesh_config import MeshConfig
from rapid_jax.speculative.attended import Choices, check_attended
from rapid_jax.speculative.config import SamplingConfig, SpeculationConfig
from rapid_jax.speculative.generate import Generation, Prompted, generate
from tests.reference import all_sequences, chi_square_p, softmax
from tests.speculative.conftest import VOCABULARY
from tests.speculative.models import Weights, logits_of, prompted

# The word "generate" in the package is the module; the function in it hides it from a plain import.
pace_module = importlib.import_module("rapid_jax.speculative.pace")
LENGTHS = (340, 70, 300)  # five blocks and a part of one, one and a part, four and a part
GREEDY = SamplingConfig(temperature=0, max_new_tokens=24)
LOSSLESS = SpeculationConfig(mode="lossless", gamma=3, lookup="off", attended_tokens=192, attended_rounds=2)


def chosen_slots(q_GNH, k_KSH, length: int, count: int) -> list[list[int]]:
    """Of each kv head: the slots of the blocks with the largest softmax weight of its queries, first and last block
    always among them. The plain reference."""
    found = []
    for head, k_SH in enumerate(k_KSH[:, :length]):
        each = q_GNH.shape[1] // len(k_KSH)
        weight_S = np.zeros(length)
        for q_H in q_GNH[:, head * each : (head + 1) * each].reshape(-1, k_SH.shape[1]):
            scores = k_SH @ q_H / np.sqrt(len(q_H))
            weight_S += np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
        blocks = -(-length // BLOCK)
        weights = {block: weight_S[block * BLOCK : (block + 1) * BLOCK].sum() for block in range(blocks)}
        ranked = sorted(weights, key=lambda block: (block not in (0, blocks - 1), -weights[block]))
        kept = sorted(ranked[:count])
        found.append([slot for block in kept for slot in range(block * BLOCK, min((block + 1) * BLOCK, length))])
    return found


@pytest.mark.parametrize("kind", ["unrolled", "stacked", "int8", "shared"])
def test_the_blocks_that_weigh_most_are_chosen_for_each_layer_and_head(kind):
    """Documents of several lengths, one shorter than what is chosen; of rows that are not due the old choice stays."""
    rng = np.random.default_rng(3)
    L, K, S, H, N, G, count = 2, 2, 328, 8, 4, 3, 3
    lengths = [328, 150, 300] if kind != "shared" else [328]
    B, D = 3, len(lengths)
    k, v = rng.normal(size=(2, L, D, K, S, H)).astype(np.float32)
    k *= 2
    q_BGLNH = rng.normal(size=(B, G, L, N, H)).astype(np.float32)
    pos_BS = np.where(np.arange(S) < np.asarray(lengths)[:, None], np.arange(S), -1).astype(np.int32)
    layers = KV(jnp.asarray(k), jnp.asarray(v))
    if kind != "stacked":
        layers = tuple(KV(jnp.asarray(a), jnp.asarray(b)) for a, b in zip(k, v, strict=True))
    prefix = Prefix(layers, jnp.asarray(pos_BS), jnp.int32(S))
    prefix = quantize_kv(prefix) if kind == "int8" else prefix
    old = jax.tree.map(lambda x: jnp.full_like(x, 7), prefix.layers)
    slots = slice(0, count * BLOCK)
    trim = lambda x, axis: jnp.repeat(jnp.take(x, np.arange(count * BLOCK), axis=axis), B // D, axis=x.ndim - 4)  # noqa: E731
    if kind == "int8":
        old = tuple(
            KV(kv.k_BKSH[:, :, slots], kv.v_BKSH[..., slots], kv.k_scale_BKS[..., slots], kv.v_scale_BKS[..., slots])
            for kv in old
        )
    else:
        old = jax.tree.map(lambda x: trim(x, x.ndim - 2), old)
    before = Prefix(old, jnp.full((B, count * BLOCK), -1, jnp.int32), jnp.int32(0))
    due_B = np.asarray([True, True, False])
    got = jax.jit(attended_prefix, static_argnames="strategy")(
        prefix, before, q_BGLNH, due_B, strategy=Strategy(block=64)
    )
    for row, layer in np.ndindex(B, L):
        document = row * D // B
        far, kept = (
            jax.tree.map(lambda x, layer=layer: np.asarray(x[layer]), part.layers)
            if kind == "stacked"
            else jax.tree.map(np.asarray, part.layers[layer])
            for part in (prefix, got)
        )
        if not due_B[row]:
            assert (kept.k_BKSH[row] == 7).all() and (np.asarray(got.pos_BS[row]) == -1).all()
            continue
        keys = far.k_BKSH[document] * (1 if far.k_scale_BKS is None else far.k_scale_BKS[document][..., None])
        for head, at in enumerate(chosen_slots(q_BGLNH[row, :, layer], keys, lengths[document], count)):
            np.testing.assert_array_equal(np.asarray(got.pos_BS[row]) >= 0, np.arange(count * BLOCK) < len(at))
            np.testing.assert_array_equal(kept.k_BKSH[row, head, : len(at)], far.k_BKSH[document, head][at])
            if kind == "int8":
                values = far.v_BKSH[document, head][:, at]
                np.testing.assert_array_equal(kept.v_BKSH[row, head][:, : len(at)], values)
                for name in ("k_scale_BKS", "v_scale_BKS"):
                    scales = getattr(far, name)[document, head][at]
                    np.testing.assert_array_equal(getattr(kept, name)[row, head, : len(at)], scales)
            else:
                np.testing.assert_array_equal(kept.v_BKSH[row, head, : len(at)], far.v_BKSH[document, head][at])


class Documents:
    """Prompts of several lengths, and the target's own answers to them."""

    def __init__(self):
        rng = np.random.default_rng(5)
        self.weights = Weights.lively(VOCABULARY)
        self.prompts = [rng.integers(0, VOCABULARY, length).tolist() for length in LENGTHS]
        self.target = self.weights.decoder()

    def answers(
        self, speculation=LOSSLESS, sampling=GREEDY, *, rows=(0, 1, 2), target=None, drafter=None, **how
    ) -> Generation:
        target = target or self.target
        known = {"stops": (), "texts": [self.prompts[row] for row in rows]} | how
        reads = prompted(target, [self.prompts[row] for row in rows], keep=9, chunk=64, int8=known.pop("int8", False))
        return generate(reads, drafter or target, speculation=speculation, sampling=sampling, **known)

    def plain(self, sampling=GREEDY, **how) -> list[list[int]]:
        return self.answers(SpeculationConfig(mode="target", lookup="off"), sampling, **how).tokens


@pytest.fixture(scope="module")
def documents() -> Documents:
    return Documents()


@pytest.mark.parametrize(
    "changes", [{"rounds_per_read": 1, "attended_rounds": 3}, {"gamma": 5, "lookup": "on"}], ids=["drafts", "copies"]
)
def test_greedy_answers_are_the_targets_own(documents, changes):
    got = documents.answers(replace(LOSSLESS, **changes))
    assert got.tokens == documents.plain()
    assert 0 < sum(got.accepted) < sum(got.drafted)


def test_rounds_without_drafts_may_lie_between(documents, monkeypatch):
    """As under gamma auto: the latest queries are kept of them too."""
    calls = itertools.cycle([(3, 2), (0, 3), (3, 1)])
    script = SimpleNamespace(choose=lambda: next(calls), observe=lambda gamma, seen: None, gamma=3)
    monkeypatch.setattr(pace_module, "gamma_schedule", lambda config, has_drafter: script)
    got = documents.answers()
    assert got.tokens == documents.plain() and got.gammas.keys() == {0, 3}


@pytest.mark.parametrize("kind", ["stacked, int8 cache", "int8 weights, model 2"])
def test_greedy_answers_on_other_layouts_copies_and_meshes(documents, kind):
    layout = "stacked" if "stacked" in kind else "unrolled"
    mesh = make_meshes(MeshConfig(model=2), None)[0] if "model 2" in kind else None
    target = fuse(documents.weights.decoder(layout, mesh=mesh), spent=True)
    how = {"rows": (0, 1), "target": target, "int8": "int8 cache" in kind}
    got = documents.answers(drafter=quantize(target, 8) if "int8 weights" in kind else target, **how)
    assert got.tokens == documents.plain(**how)
    assert 0 < sum(got.accepted) < sum(got.drafted)


def test_sampled_answers_do_not_depend_on_the_batch(documents):
    """Rows choose anew after rounds of their own."""
    sampling = SamplingConfig(temperature=0.8, max_new_tokens=24)
    together = documents.answers(sampling=sampling, seeds=(4, 5, 6))
    alone = documents.answers(sampling=sampling, rows=(2,), seeds=(6,))
    assert alone.tokens == together.tokens[2:] and alone.accepted == together.accepted[2:]


def test_answers_follow_the_targets_distribution():
    """A thousand seeds under one document, whose keys and values are shared; three of its five blocks are read."""
    vocabulary, length, rows = 5, 3, 1024
    target = Weights.lively(vocabulary, sharpness=1.2).decoder()
    prompt = np.random.default_rng(2).integers(0, vocabulary, 310).tolist()
    one = prompted(target, [prompt], chunk=64)
    got = generate(
        Prompted(target, [prompt] * rows, one.prefix, list(one.cached) * rows),
        target,
        speculation=replace(LOSSLESS, gamma=2),
        sampling=SamplingConfig(temperature=0.9, max_new_tokens=length),
        stops=(),
        seeds=range(rows),
    )
    said = all_sequences(vocabulary, length)
    logits = logits_of(target, np.concatenate([np.tile(prompt, (len(said), 1)), said], axis=1))[:, len(prompt) - 1 :]
    p = np.stack([[softmax(z) for z in row] for row in logits[:, :length].astype(np.float64) / 0.9])
    distribution = np.zeros((vocabulary,) * length)
    distribution[tuple(said.T)] = np.prod(np.take_along_axis(p, said[..., None], axis=2)[..., 0], axis=1)
    counts = np.zeros_like(distribution)
    np.add.at(counts, tuple(np.asarray(got.tokens).T), 1)
    assert 0.2 < sum(got.accepted) / sum(got.drafted) < 0.99
    assert distribution.sum() == pytest.approx(1) and chi_square_p(counts, distribution) > 1e-4


def test_each_row_chooses_after_rounds_of_its_own():
    choices, rng = Choices(3, 1), np.random.default_rng(0)
    ran, chose = [0], [[]]
    for call in range(20):
        for due, part in choices.calls(int(rng.integers(1, 6))):
            for row in np.flatnonzero(due):
                chose[row].append(ran[row])
            ran = [count + part for count in ran]
        if call in (3, 8):  # another row joins behind those there are
            choices = choices.with_row(Choices(3), len(ran), len(ran) + 1)
            ran, chose = [*ran, 0], [*chose, []]
    assert [row[: len(range(0, count, 3))] for row, count in zip(chose, ran, strict=True)] == chose
    assert all(row == list(range(0, count, 3)) for row, count in zip(chose, ran, strict=True))
    assert choices.of_rows([2]).left == [choices.left[2]]


def test_what_cannot_be_drafted_so_is_refused(documents):
    attended = ModelsConfig(drafter="attended")
    with pytest.raises(InputError, match=r"expected speculation.mode lossless, or eta 0, got rapid with eta 10"):
        RapidConfig(models=attended)
    lossless = SpeculationConfig(mode="lossless")
    with pytest.raises(InputError, match=r"expected mesh.context 1, a document on one device, got 2"):
        RapidConfig(models=attended, speculation=lossless, mesh=MeshConfig(context=2))
    with pytest.raises(InputError, match=r"drafter_mesh is for a drafter with weights of its own"):
        RapidConfig(models=attended, speculation=lossless, drafter_mesh=MeshConfig())
    check_attended(documents.weights.config)
    with pytest.raises(InputError, match=r"expected a target whose layers see all of a document, got one with windows"):
        check_attended(replace(documents.weights.config, pattern=(LayerKind(window=64),)))
