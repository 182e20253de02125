# SPDX-License-Identifier: Apache-2.0
"""The facade as a library: one object, many questions, the same models under other settings."""

import asyncio
import json
import time
from contextlib import aclosing, closing
from dataclasses import replace

import pytest
import safetensors.numpy

from rapid_jax.config import CacheConfig, ComputeConfig, ModelsConfig, PromptsConfig, RapidConfig
from rapid_jax.engine.request import Done, Event, Piece, Question, Retrieved
from rapid_jax.rapid import Rapid
from rapid_jax.retrieval.config import RetrievalConfig
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.mesh_config import MeshConfig
from rapid_jax.speculative.config import SamplingConfig, SamplingSettings, SpeculationConfig
from rapid_jax.speculative.prefill import Prefill
from rapid_jax.speculative.rounds import Rounds
from tests.retrieval import encoders
from tests.tiny_models import save_decoder, words

QUESTION = "w12 w34 w56?"


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> RapidConfig:
    folder = tmp_path_factory.mktemp("tiny")
    target, encoder = save_decoder(folder / "model"), encoders.save(folder / "encoder", "bert")
    return RapidConfig(
        models=ModelsConfig(target=str(target), encoder=str(encoder)),
        retrieval=RetrievalConfig(chunk_tokens=64, min_tokens=128),
        speculation=SpeculationConfig(gamma=3),
        sampling=SamplingConfig(temperature=0.0, max_new_tokens=16),
        compute=ComputeConfig(prefill_chunk=128),
        cache=CacheConfig(folder=str(folder / "cache"), prefixes=False),
    )


@pytest.fixture(scope="module")
def rapid(config) -> Rapid:
    return Rapid(config, quiet=True)


@pytest.fixture
def prefilled(monkeypatch) -> list[int]:
    """The sizes of documents that are prefilled from here on, each when it begins."""
    sizes: list[int] = []

    class Counting(Prefill):
        def __init__(self, decoder, prompts, settings, **how):
            sizes.extend(len(prompt) for prompt in prompts if not settings.coarse)
            super().__init__(decoder, prompts, settings, **how)

    monkeypatch.setattr("rapid_jax.engine.prefilling.Prefill", Counting)
    return sizes


def under(config: RapidConfig, **speculation) -> RapidConfig:
    return replace(config, speculation=replace(config.speculation, **speculation))


def test_text_is_told_in_order_after_what_was_retrieved(rapid):
    told: list = []
    answer = rapid.answer(words(200), QUESTION, on_text=told.append, on_retrieved=told.append)
    assert told[0] == answer.selection
    assert "".join(told[1:]) == answer.text
    assert (
        len(answer.token_ids)
        == len(answer.origins)
        == sum(answer.generation.gammas.values()) + sum(answer.generation.accepted)
    )
    assert answer.draft_tokens < answer.target_tokens
    assert answer.seconds["first_token"] <= answer.seconds["prefill"] + answer.seconds["decode"] + 60


@pytest.mark.parametrize("streamed", [False, True])
def test_the_first_token_comes_before_the_last(rapid, monkeypatch, streamed):
    """Whether or not somebody reads along."""
    advance = Rounds.advance

    def slow(self, plan, rounds):
        time.sleep(0.2)
        return advance(self, plan, rounds)

    monkeypatch.setattr(Rounds, "advance", slow)
    settings = under(rapid.config, rounds_per_read=1, mode="target", lookup="off")
    start = time.perf_counter()
    answer = rapid.answer(words(200), QUESTION, settings=settings, on_text=[].append if streamed else None)
    calls = len(answer.token_ids)
    assert calls > 4
    assert 0.2 <= answer.seconds["first_token"] <= time.perf_counter() - start - (calls - 1) * 0.2


def test_a_listener_that_raises_ends_the_answer_and_the_prefill_is_kept(rapid):
    """At once, also while the error is held on to."""

    def leave(_):
        raise RuntimeError("gone")

    for how in ({"on_text": leave}, {"on_retrieved": leave, "on_text": lambda _: None}):
        with pytest.raises(RuntimeError, match="gone") as caught:
            rapid.answer(words(200, seed=4), QUESTION, **how)
        assert caught.tb is not None and rapid.engine.is_idle
    assert rapid.answer(words(200, seed=4), QUESTION).prefix_reused


def test_a_stream_is_the_answer_piece_by_piece_in_this_thread_or_another(rapid):
    asked = Question(words(200), QUESTION)
    answer = rapid.answer(asked.document, asked.question)

    async def streamed() -> list[Event]:
        return [event async for event in rapid.astream(asked)]

    for first, *pieces, last in (list(rapid.stream(asked)), asyncio.run(streamed())):
        assert isinstance(first, Retrieved) and answer.selection is not None
        assert first.selection.chunks == answer.selection.chunks
        assert isinstance(last, Done) and last.answer.token_ids == answer.token_ids
        assert "".join(piece.text for piece in pieces) == answer.text and len(pieces) > 1
        assert [token for piece in pieces for token in piece.token_ids] == answer.token_ids


def test_whoever_leaves_a_stream_takes_the_request_back(rapid):
    asked = Question(words(200), QUESTION)
    settings = under(rapid.config, rounds_per_read=1)

    async def left() -> Event:
        async with aclosing(rapid.astream(asked, settings=settings)) as events:
            return await anext(events)

    assert isinstance(asyncio.run(left()), Retrieved) and rapid.engine.is_idle
    with closing(rapid.stream(asked, settings=settings)) as events:
        assert isinstance(next(events), Retrieved) and isinstance(next(events), Piece)
        assert not rapid.engine.is_idle
    assert rapid.engine.is_idle


def test_a_stream_that_fails_says_why(rapid):
    async def failed() -> None:
        async for _ in rapid.astream(Question("", QUESTION)):
            pass

    with pytest.raises(InputError, match="expected a document with text in it"):
        asyncio.run(failed())


def test_documents_that_were_prefilled_stay_in_memory(rapid):
    first = rapid.answer(words(200, seed=1), QUESTION)
    again = rapid.answer(words(200, seed=1), "w1?")
    other = rapid.answer(words(200, seed=2), QUESTION)
    third = rapid.answer(words(200, seed=1), QUESTION)
    assert [answer.prefix_reused for answer in (first, again, other, third)] == [False, True, False, True]
    assert third.token_ids == first.token_ids


def test_other_settings_share_models_and_prefill_and_change_the_rest(rapid):
    document, target = words(200, seed=3), rapid.target
    first = rapid.answer(document, QUESTION, settings=under(rapid.config, mode="lossless"))
    answer = rapid.answer(document, QUESTION, settings=under(rapid.config, mode="target"))
    assert rapid.target is target
    assert answer.prefix_reused and answer.token_ids == first.token_ids
    assert (answer.mode, answer.gamma, answer.draft_tokens, answer.selection) == ("target", 0, 0, None)
    assert rapid.answer(document, QUESTION).mode == "rapid", "they are of one call"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"models": ModelsConfig(target="other")}, "settings have the same models"),
        ({"mesh": MeshConfig(context=2)}, "settings leave the models where they are"),
        ({"compute": ComputeConfig(kv="int8")}, "settings leave the models where they are"),
        ({"cache": CacheConfig(host_gib=1)}, "settings have the same cache"),
    ],
)
def test_settings_that_concern_what_is_loaded_are_refused(rapid, changed, said):
    """In every method, and nothing is done."""
    settings = replace(rapid.config, **changed)
    asked = (words(50), QUESTION)
    for call in (
        lambda: rapid.load(settings),
        lambda: rapid.answer(*asked, settings=settings),
        lambda: rapid.answers([asked], settings=settings),
        lambda: rapid.read(asked, settings=settings),
        lambda: next(rapid.stream(Question(*asked), settings=settings)),
    ):
        with pytest.raises(ValueError, match=said):
            call()


def test_settings_that_cut_documents_share_models_too(rapid):
    models, target = replace(rapid.config.models, max_context=200), rapid.target
    settings = replace(under(rapid.config, mode="target"), models=models)
    with pytest.raises(InputError, match="the document is too long"):
        rapid.answer(words(400), QUESTION, settings=settings)
    settings = replace(rapid.config, models=replace(models, too_long="middle"))
    answer = rapid.answer(words(400), QUESTION, settings=settings)
    assert rapid.target is target and answer.target_tokens <= 200 and answer.truncated


def test_retrieval_alone_answers_as_the_target_does_from_the_retrieved_text(rapid, config):
    retrieved = rapid.answer(words(200), QUESTION, settings=under(config, mode="retrieval"))
    assert retrieved.selection is not None and retrieved.gamma == 0
    prompts = PromptsConfig(target=config.prompts.drafter)
    plain = replace(config, prompts=prompts, speculation=SpeculationConfig(mode="target"))
    expected = rapid.answer(retrieved.selection.text, QUESTION, settings=plain)
    assert retrieved.token_ids == expected.token_ids
    assert retrieved.target_tokens == expected.target_tokens


def test_the_drafter_reads_the_retrieved_text_in_its_own_prompt(rapid):
    """A drafter that reads all that the target reads, in the same words, is the target: every draft is accepted."""
    settings = replace(
        rapid.config,
        retrieval=replace(rapid.config.retrieval, min_tokens=4096, threshold=-1.0),
        prompts=PromptsConfig(drafter=rapid.config.prompts.target),
    )
    document = "w1 w2 w3 w4 w5 w6 w7 w8 w9."
    answer = rapid.answer(document, QUESTION, settings=settings)
    assert answer.draft_tokens == answer.target_tokens
    assert answer.acceptance_rate == 1.0


def test_a_drafter_of_another_vocabulary_is_refused_whenever_it_is_first_needed(rapid, config, tmp_path):
    save_decoder(tmp_path / "drafter", corpus=["quite another text about other things"])
    models = replace(config.models, drafter=str(tmp_path / "drafter"))
    alone = Rapid(replace(config, models=models, speculation=SpeculationConfig(mode="target")), quiet=True)
    assert alone.answer(words(50), QUESTION).token_ids
    with pytest.raises(InputError, match=r"the drafter must have the target's vocabulary: expected token \d+"):
        alone.answer(words(50), QUESTION, settings=under(alone.config, mode="rapid"))


def test_the_encoder_is_looked_for_before_weights_are_read(config, monkeypatch):
    monkeypatch.setattr("rapid_jax.engine.models.load_model", None)
    models = replace(config.models, encoder="absent")
    with pytest.raises(InputError, match="encoder: expected 'minilm' or a Hugging Face folder"):
        Rapid(replace(config, models=models), quiet=True).answer(words(50), QUESTION)


def test_a_stored_prefill_gives_the_same_answer_in_the_other_layout(config, tmp_path):
    kept = replace(
        config, cache=CacheConfig(folder=str(tmp_path), disk_gib=1), speculation=SpeculationConfig(mode="target")
    )
    first = Rapid(kept, quiet=True).answer(words(200), QUESTION)
    stacked = replace(kept, models=replace(kept.models, layout="stacked"))
    second = Rapid(stacked, quiet=True).answer(words(200), QUESTION)
    assert (first.prefix_reused, second.prefix_reused) == (False, True)
    assert first.token_ids == second.token_ids
    other_chunk = replace(kept, compute=replace(kept.compute, prefill_chunk=64))
    assert not Rapid(other_chunk, quiet=True).answer(words(200), QUESTION).prefix_reused


@pytest.mark.parametrize(
    ("weights", "layout", "mesh"),
    [("int8", "unrolled", MeshConfig()), ("int4", "unrolled", MeshConfig()), ("int8", "stacked", MeshConfig(model=2))],
)
def test_rounded_weights_draft_and_the_answer_stays_the_targets(rapid, config, weights, layout, mesh):
    lossless = under(config, mode="lossless")
    rounded = replace(lossless, models=replace(config.models, drafter_weights=weights, layout=layout), mesh=mesh)
    answer = Rapid(rounded, quiet=True).answer(words(200), QUESTION)
    assert answer.token_ids == rapid.answer(words(200), QUESTION, settings=lossless).token_ids
    assert sum(answer.generation.drafted) > 0


@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(context=2, model=2)], ids=str)
def test_a_rounded_prefix_is_stored_as_it_is_and_answers_nearly_the_same(config, tmp_path, mesh):
    """Settings that round find it again, those that do not make their own."""
    cache = CacheConfig(folder=str(tmp_path), disk_gib=1)
    settings = replace(config, cache=cache, speculation=SpeculationConfig(mode="target"), mesh=mesh)
    rounded = replace(settings, compute=replace(config.compute, kv="int8"))
    halved = Rapid(rounded, quiet=True)
    first = halved.answer(words(200), QUESTION)
    found = halved.engine.prefixes.find(halved.engine.prefixes.name(first.prompt.head))
    assert found.prefix is not None
    assert {kv.k_BKSH.dtype.name for kv in found.prefix.layers} == {"int8"}
    again = Rapid(replace(rounded, mesh=MeshConfig()), quiet=True).answers([(words(200), QUESTION)])[0]
    full = Rapid(settings, quiet=True).answer(words(200), QUESTION)
    assert [answer.prefix_reused for answer in (first, again, full)] == [False, True, False]
    assert first.token_ids == again.token_ids
    assert first.token_ids[:4] == full.token_ids[:4]


def test_drafts_over_rounded_keys_and_values_on_a_mesh_are_the_answer_without_drafts(config):
    """Greedy, and lossless but for the rounding, which both have."""
    compute, models = replace(config.compute, kv="int8"), replace(config.models, drafter_weights="int8")
    settings = replace(config, compute=compute, models=models, mesh=MeshConfig(context=2, model=2))
    settings = replace(settings, sampling=replace(config.sampling, temperature=0.0))
    drafted, plain = (
        Rapid(replace(settings, speculation=speculation), quiet=True).answer(words(200), QUESTION)
        for speculation in (SpeculationConfig(mode="lossless", gamma=3), SpeculationConfig(mode="target"))
    )
    assert drafted.token_ids == plain.token_ids and sum(drafted.generation.drafted) > 0
    assert drafted.to_json()["lossy"] == ["compute.kv int8"]


def test_rounded_documents_of_two_sizes_on_a_mesh_are_rows_of_one_batch(config):
    """The smaller one's arrays grow in every device's part: each answer is that of its document alone."""
    settings = replace(config, compute=replace(config.compute, kv="int8"), mesh=MeshConfig(context=2, model=2))
    settings = replace(settings, sampling=replace(config.sampling, temperature=0.0))
    rapid = Rapid(replace(settings, speculation=SpeculationConfig(mode="target")), quiet=True)
    asked = [(words(200), QUESTION), (words(60, seed=3), QUESTION)]
    alone = [rapid.answer(*one).token_ids for one in asked]
    assert [answer.token_ids for answer in rapid.answers(asked)] == alone and alone[0] != alone[1]
    slots = {
        rapid.engine.prefixes.find(rapid.engine.prefixes.name(rapid.answer(*one).prompt.head)).prefix.pos_BS.shape[1]
        for one in asked
    }
    assert len(slots) == 2


def test_a_target_in_8_bits_is_named_lossy_and_its_documents_are_its_own(config, tmp_path):
    cache = CacheConfig(folder=str(tmp_path), disk_gib=1)
    settings = replace(config, cache=cache, sampling=replace(config.sampling, temperature=0.0))
    eight = Rapid(replace(settings, models=replace(config.models, target_weights="int8")), quiet=True)
    answer, full = eight.answer(words(200), QUESTION), Rapid(settings, quiet=True).answer(words(200), QUESTION)
    assert answer.to_json()["lossy"] == ["models.target_weights int8"] and full.to_json()["lossy"] == []
    assert not full.prefix_reused  # what the copy made of the document is not the model's
    models = eight.engine.models
    assert models.target.decoder.bits == 8 and models.drafter is models.target
    again = Rapid(replace(eight.config, speculation=SpeculationConfig(mode="target")), quiet=True)
    alone = again.answer(words(200), QUESTION)
    assert (
        alone.prefix_reused
        and alone.token_ids
        == Rapid(replace(eight.config, speculation=SpeculationConfig(mode="lossless", gamma=3)), quiet=True)
        .answer(words(200), QUESTION)
        .token_ids
    )


def test_no_4_bits_of_8(config):
    with pytest.raises(InputError, match=r"int4 needs models\.target_weights full, got int8"):
        replace(config.models, drafter_weights="int4", target_weights="int8")


def test_weights_in_4_bits_are_for_one_device(config):
    said = "models.drafter_weights int4 is for one device, got mesh data 1 x fsdp 1 x context 1 x model 2"
    with pytest.raises(InputError, match=said):
        replace(config, models=replace(config.models, drafter_weights="int4"), mesh=MeshConfig(model=2))


def test_the_answer_does_not_wait_for_the_disk(config, tmp_path, monkeypatch):
    kept = replace(
        config, cache=CacheConfig(folder=str(tmp_path), disk_gib=1), speculation=SpeculationConfig(mode="target")
    )
    told: list[str] = []
    monkeypatch.setattr(
        "rapid_jax.speculative.prefix_store.PrefixStore.save", lambda *given, **more: told.append("saved")
    )
    answer = Rapid(kept, quiet=True).answer(words(100), QUESTION, on_text=told.append)
    assert told[-1] == "saved" and "".join(told[:-1]) == answer.text


def test_a_mesh_gives_the_answer_of_one_device_and_shares_its_stored_prefill(config, tmp_path):
    """One device stores the document's prefill; two meshes answer from it, and each from its own too."""
    sampled = replace(config.sampling, temperature=0.8, seed=3)
    kept = CacheConfig(folder=str(tmp_path), disk_gib=1.0)
    base = replace(config, sampling=sampled, cache=kept, speculation=replace(config.speculation, lookup="off"))
    document = words(300, seed=5)
    first = Rapid(base, quiet=True).answer(document, QUESTION)
    assert not first.prefix_reused and len(set(first.token_ids)) > 4
    for mesh in (MeshConfig(context=4, model=2), MeshConfig(model=4, replicate_kv=True)):
        again = Rapid(replace(base, mesh=mesh), quiet=True).answer(document, QUESTION)
        assert again.prefix_reused and again.token_ids == first.token_ids
        alone = Rapid(replace(base, mesh=mesh, cache=config.cache), quiet=True).answer(document, QUESTION)
        assert not alone.prefix_reused and alone.token_ids == first.token_ids


def test_a_drafter_on_its_own_devices_gives_the_same_answer(config, tmp_path):
    drafter = save_decoder(tmp_path / "drafter", seed=1)
    settings = replace(
        config,
        models=replace(config.models, drafter=str(drafter)),
        sampling=replace(config.sampling, temperature=0.8, seed=3),
        speculation=replace(config.speculation, lookup="off"),
    )
    one = Rapid(settings, quiet=True).answer(words(300), QUESTION)
    apart = Rapid(replace(settings, mesh=MeshConfig(context=4), drafter_mesh=MeshConfig(model=2)), quiet=True)
    assert apart.answer(words(300), QUESTION).token_ids == one.token_ids
    devices = [
        {shard.device for shard in model.decoder.norm_D[...].addressable_shards}
        for model in (apart.target, apart.drafter)
    ]
    assert [len(each) for each in devices] == [4, 2] and not devices[0] & devices[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mesh": MeshConfig(data=2)}, "mesh.data: one question at a time has no batch to split, expected 1, got 2"),
        ({"mesh": MeshConfig(context=3)}, r"prefill_chunk: expected a multiple of 6 \(2 x mesh.context\), got 128"),
        ({"drafter_mesh": MeshConfig()}, "drafter_mesh is for a drafter with weights of its own"),
    ],
)
def test_meshes_that_cannot_be_are_said_with_the_settings(config, settings, message):
    with pytest.raises(InputError, match=message):
        replace(config, **settings)


def test_answers_together_are_those_of_each_question_alone(rapid, config):
    """Of other lengths, drawn, with seeds of their own."""
    asked = [(words(150, seed=11), QUESTION), (words(90, seed=12), "w1 w2?")]
    for mode in ("retrieval", "rapid"):
        sampling = replace(config.sampling, temperature=0.9)
        settings = replace(under(config, mode=mode, lookup="off"), sampling=sampling)
        together = rapid.answers(asked, settings=settings, seeds=[0, 5])
        for seed, item, answer in zip((0, 5), asked, together, strict=True):
            alone = rapid.answer(*item, settings=replace(settings, sampling=replace(sampling, seed=seed)))
            for name in ("text", "token_ids", "origins", "finish_reason", "target_tokens", "draft_tokens"):
                assert getattr(answer, name) == getattr(alone, name), name
            assert answer.selection is not None and alone.selection is not None
            assert answer.selection.chunks == alone.selection.chunks
            assert (answer.generation.drafted, answer.tokens_per_round) == (
                alone.generation.drafted,
                alone.tokens_per_round,
            )


def test_answers_are_told_as_they_come(rapid):
    told: dict[int, str] = {}
    found = rapid.answers(
        [(words(80, seed=13), QUESTION), (words(60, seed=14), "w1?")],
        settings=under(rapid.config, mode="target"),
        on_answer=lambda place, answer: told.update({place: answer.text}),
    )
    assert told == {place: answer.text for place, answer in enumerate(found)}


def test_one_question_that_cannot_be_answered_takes_the_others_back(rapid):
    """And nothing of them is left for the next call."""
    settings, asked = under(rapid.config, mode="target"), [(words(80, seed=15), QUESTION), ("", "w1?")]
    with pytest.raises(InputError, match="expected a document with text in it"):
        rapid.answers(asked, settings=settings)
    assert rapid.engine.is_idle
    with pytest.raises(InputError, match="seed must be in"):
        rapid.answers([asked[0]] * 2, settings=settings, seeds=[1, -1])
    assert rapid.engine.is_idle


def test_more_questions_than_the_engine_keeps_waiting_for_strangers(rapid, config):
    """Whoever steps the engine waits for every answer: no question is one too many."""
    asked = [("", "w1?"), *[(words(80, seed=16), QUESTION)] * 1100]
    with pytest.raises(InputError, match="expected a document with text in it"):
        rapid.answers(asked, settings=under(config, mode="target"))
    assert rapid.engine.is_idle


def test_documents_are_prefilled_once_for_all_modes(rapid, prefilled):
    asked, found = [(words(80, seed=seed), QUESTION) for seed in (21, 22)], []
    for mode, rows in [("target", asked), ("rapid", asked), ("target", asked[:1]), ("lossless", asked)]:
        answers = rapid.answers(rows, settings=under(rapid.config, mode=mode, lookup="off"))
        found.append([answer.prefix_reused for answer in answers])
    assert found == [[False, False], [True, True], [True], [True, True]]
    assert len(prefilled) == 2


def test_what_is_retrieved_may_come_from_another_text(rapid):
    document, other = words(200, seed=31), words(200, seed=32)
    read = rapid.read(Question(document, QUESTION, retrieve_from=other))
    assert read.selection is not None
    assert all(other[chunk.start : chunk.end] == chunk.text for chunk in read.selection.chunks)
    assert read.long == rapid.read((document, QUESTION)).long


def test_an_answer_is_made_to_begin_with_words(rapid):
    plain, begun = (rapid.read(Question(words(60), QUESTION, begins=begins)) for begins in ("", " So w1 w2"))
    assert plain.short is not None and begun.short is not None
    for one, more in ((plain.long, begun.long), (plain.short, begun.short)):
        assert rapid.target.tokenizer.decode(more.tokens).removeprefix(rapid.target.tokenizer.decode(one.tokens)) == (
            " So w1 w2"
        )
    read = rapid.read(Question("w1 w2.", "w3?", template="Read.\n{document}\nAsked: {question}"))
    assert "Read.\nw1 w2.\nAsked: w3?" in rapid.target.tokenizer.decode(read.long.tokens)


def test_rows_of_one_document_are_prefilled_once_and_stored_once(config, tmp_path, prefilled):
    """One row serves them all; of several documents each is computed once."""
    cache = CacheConfig(folder=str(tmp_path), disk_gib=1)
    one = Rapid(
        replace(config, cache=cache, speculation=SpeculationConfig(mode="target", lookup="off")),
        quiet=True,
    )
    asked = [(words(80, seed=41), question) for question in (QUESTION, "w1?", "w2 w3?")]
    together = one.answers(asked)
    size = len(together[0].prompt.head)
    assert prefilled == [size] and len(list((tmp_path / "prefixes").glob("*"))) == 1
    assert [answer.token_ids for answer in together] == [one.answer(*item).token_ids for item in asked]
    assert prefilled == [size], "an answer alone finds the same prefill"
    other = (words(80, seed=42), QUESTION)
    mixed = one.answers([asked[0], other, asked[1]])
    assert prefilled[1:] == [len(mixed[1].prompt.head)]
    assert [mixed[0].token_ids, mixed[2].token_ids] == [answer.token_ids for answer in together[:2]]
    assert mixed[1].token_ids == one.answer(*other).token_ids


def test_the_checkpoints_own_sampling_is_the_default_and_settings_go_before_it(config, tmp_path, caplog):
    target = save_decoder(tmp_path / "model")
    file = target / "generation_config.json"
    file.write_text(json.dumps({"do_sample": True, "temperature": 0.6, "top_p": 0.9, "num_beams": 2}))
    open_ = replace(config, models=replace(config.models, target=str(target)), sampling=SamplingSettings(seed=3))
    found = Rapid(open_, quiet=True).sampling
    assert found.config == SamplingConfig(temperature=0.6, top_k=50, top_p=0.9, seed=3)
    assert caplog.messages == [f"{file}: not implemented and ignored: num_beams 2"]
    given = Rapid(replace(open_, sampling=SamplingSettings(temperature=0.0)), quiet=True)
    assert given.sampling.config == SamplingConfig(temperature=0.0)
    file.write_text('{"do_sample": true, "top_k": "50"}')
    with pytest.raises(InputError, match=f"{file}: top_k must be a whole number of at least 0, got '50'"):
        Rapid(open_, quiet=True).load()


def test_an_answer_from_weights_that_are_not_finite_is_refused_and_nothing_is_kept(config, tmp_path):
    target = save_decoder(tmp_path / "model")
    weights = safetensors.numpy.load_file(target / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    safetensors.numpy.save_file(weights, target / "model.safetensors", {"format": "pt"})
    cache = CacheConfig(folder=str(tmp_path / "cache"), disk_gib=1)
    models = replace(config.models, target=str(target))
    spoilt = Rapid(
        replace(config, models=models, cache=cache, speculation=SpeculationConfig(mode="target")), quiet=True
    )
    told: list[str] = []
    with pytest.raises(InputError, match=r"the target's logits are NaN.*: model.layers.1.mlp.up_proj.weight holds"):
        spoilt.answer(words(50), QUESTION, on_text=told.append)
    with pytest.raises(InputError, match="up_proj"):
        spoilt.answers([(words(50), QUESTION)])
    assert told == [] and not list((tmp_path / "cache" / "prefixes").rglob("*"))
    assert spoilt.engine.prefixes.bytes() == {"device": 0, "host": 0, "disk": 0} and spoilt.engine.is_idle
