# SPDX-License-Identifier: Apache-2.0
"""`rapid bench` at the size of a CPU: what it prints is what was decoded, and a wrong decoder gets no speedup."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rapid_jax.bench import command, decoding
from rapid_jax.bench.cases import Case, plain_bytes
from rapid_jax.bench.decoding import Decoding
from rapid_jax.bench.figure import draw, rows_of
from rapid_jax.bench.models import random_decoder, random_prefix, scale_attention_outputs
from rapid_jax.bench.options import case_of, shape_of
from rapid_jax.cli import main
from rapid_jax.model.layer_kinds import LayerKind
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.mesh import make_mesh
from rapid_jax.runtime.mesh_config import MeshConfig

SMALL = ["bench", "--layers", "1", "--contexts", "64", "--short", "32", "--tokens", "24"]


@pytest.fixture(scope="module")
def bench():
    return Decoding(
        shape_of("small", 1), jnp.dtype("float32"), short=32, tokens=24, memory_rate=1e10, tell=lambda _: None
    )


def test_the_command_measures_every_part_and_draws(tmp_path, capsys):
    rows, figure = tmp_path / "rows.jsonl", tmp_path / "a" / "cost.png"
    cases = "plain,plain/int8,quoting,prose,full:3,int8:3,int4:3,attended:3"
    others = ["--with", str(Path(__file__).parent / "benchmarks" / "h200.jsonl")]
    assert main([*SMALL, "--cases", cases, "--json", str(rows), "--plot", str(figure), *others]) == 0
    made = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [row["part"] for row in made].count("attention") == 3
    decoded = [row for row in made if row["part"] == "decoding"]
    by_name = {row["name"]: row for row in decoded}
    assert len(by_name) == 8
    out = capsys.readouterr().out
    lines = out.splitlines()
    for row in decoded:
        assert row["timings"] == 3 and 0 < row["ms_least"] <= row["ms_per_token"] <= row["ms_most"]
        assert any(
            f"{row['ms_per_token']:.2f}  " in line and f" {row['dial']:.4g}  {row['name']} " in line for line in lines
        )
        if row["ratio"] is not None:
            # What a ratio is of stands before it, in the file and in the table.
            before = decoded[: decoded.index(row)]
            plain = [other for other in before if other["name"] == "plain" and other["dial"] == row["dial"]][-1]
            assert plain["ms_per_token"] == row["baseline_ms"]
            assert row["ratio"] == pytest.approx(row["baseline_ms"] / row["ms_per_token"])
    assert len({row["dial"] for row in decoded}) > 1 and rows_of(rows)
    for name, part in (("seconds", "prefill"), ("short_seconds", "prefill"), ("kernel_us", "attention")):
        (row, *_) = [row for row in made if row["part"] == part]
        assert 0 < row[f"{name}_least"] <= row[name] <= row[f"{name}_most"]
    for name, row in by_name.items():
        assert name in out and row["ms_per_token"] > 0
        if name != "plain" and "kv int8" not in name:
            assert row["same"] == "yes" and row["ratio"] > 0
    assert by_name["plain, copies, quoting"]["tokens_per_round"] > 2
    assert 1 < by_name["rapid, drafter full"]["tokens_per_round"] <= 4
    assert by_name["rapid, drafter full"]["draft_steps"] == 3 * by_name["rapid, drafter full"]["rounds"]
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_another_shape_drafts(tmp_path):
    """Of other weights and as many layers as it has, over a short prompt of its own."""
    rows = tmp_path / "rows.jsonl"
    asked = ["--parts", "decoding", "--drafter", "small", "--cases", "plain,full:3,int8:3", "--json", str(rows)]
    assert main([*SMALL, *asked]) == 0
    made = [row for line in rows.read_text().splitlines() if (row := json.loads(line))["part"] == "decoding"]
    drafted = [row for row in made if row["case"]["drafter"] != "none"]
    assert [row["name"] for row in drafted] == ["rapid, drafter small full", "rapid, drafter small int8"]
    for row in drafted:
        assert row["same"] == "yes" and row["ratio"] > 0 and 0.5 < row["acceptance"] <= 1
        assert row["draft_steps"] == 3 * row["rounds"]
    other = Decoding(
        shape_of("small", 1), jnp.dtype("float32"), 32, 24, small=shape_of("small", 2), tell=lambda _: None
    )
    assert (other._weights("full").config.num_layers, other._decoder().config.num_layers) == (2, 1)
    assert len(other._prefix("short", Case(64, drafter="full"), 32, 0).layers) == 2


@pytest.mark.parametrize(
    ("asked", "fault"),
    [
        (["--drafter", "qwen9"], "unknown shape 'qwen9'"),
        (["--drafter", "small", "--cases", "attended:3"], "attended drafts by the target's own weights"),
    ],
)
def test_a_drafter_that_cannot_be_is_said_before_anything_is_measured(asked, fault, capsys):
    assert main([*SMALL, *asked]) == 2
    said = capsys.readouterr()
    assert fault in said.err and said.out == ""


def test_the_dial_turns_acceptance(bench):
    """At 0 the drafter, which differs by its context alone, always agrees."""
    case = Case(64, drafter="full", gamma=3)
    bench.dial = 0.0
    assert bench._acceptance(case) == 1
    bench.dial = 64.0
    assert bench._acceptance(case) < 0.5
    assert abs(bench.calibrate(case, 0.8) - 0.8) <= 0.1
    bench.release()


def test_what_differs_from_the_baseline_gets_no_ratio(bench, monkeypatch):
    case = Case(64, drafter="full", gamma=3)
    bench.dial = 0.5
    good = bench.measure(case)
    assert good.same == "yes" and good.ratio is not None
    right = decoding.generate

    def wrong(target, drafter, **settings):
        made = right(target, drafter, **settings)
        if drafter is not None:
            made.tokens[0][5] = (made.tokens[0][5] + 7) % 2048
        return made

    monkeypatch.setattr(decoding, "generate", wrong)
    bad = bench.measure(case)
    assert bad.ratio is None and bad.same.startswith("no: token 5 of row 0 differs, by ")
    bench.release()


def test_the_command_fails_where_tokens_differ(monkeypatch, capsys):
    monkeypatch.setattr(Decoding, "_compared", lambda *_: "no: token 1 of row 0 differs")
    assert main([*SMALL, "--parts", "decoding", "--cases", "plain,full:3"]) == command.DIFFERENT
    assert "no: token 1" in capsys.readouterr().out


def test_the_median_and_the_ends_are_of_the_timings(bench, monkeypatch):
    """A run that is slow once moves no median; one that says something else once is seen."""
    case = Case(64, drafter="full", gamma=3)
    bench.dial = 0.5
    right, seconds = decoding.generate, iter([9.0, 1.0, 5.0, 2.0] * 3)

    def timed(*given, **settings):
        return replace(right(*given, **settings), decode_seconds=next(seconds))

    monkeypatch.setattr(decoding, "generate", timed)
    plain, found = bench.measure(case.baseline), bench.measure(case)
    assert (plain.ms_least, plain.ms_per_token, plain.ms_most) == pytest.approx((1000 / 24, 2000 / 24, 5000 / 24))
    assert plain.tokens_per_second == pytest.approx(12) and (plain.baseline_ms, plain.ratio) == (None, None)
    assert (found.baseline_ms, found.ratio, found.dial) == (plain.ms_per_token, 1.0, 0.5)
    monkeypatch.setattr(bench, "_compared", lambda case, wanted, got: got)
    tokens = ["yes", "no: token 1", "until a tie", "yes"]
    for worst in ("no: token 1", "until a tie", "yes"):
        assert bench._worst(case, [], tokens) == worst
        tokens = [said for said in tokens if said != worst]
    bench.release()


def test_a_plain_step_reads_weights_and_cache_once():
    config = shape_of("llama-3.1-8b", None)
    gib = 2**30
    assert plain_bytes(config, Case(131072), 2) / gib == pytest.approx(13.98 + 16, abs=0.05)  # all but the embedding
    assert plain_bytes(config, Case(131072, kv="int8"), 2) / gib == pytest.approx(13.98 + 8.25, abs=0.05)
    assert plain_bytes(config, Case(131072, batch=4), 2) / gib == pytest.approx(13.98 + 64, abs=0.05)
    for axes, weights, cache in (("context=2", 1, 2), ("model=4", 4, 4), ("context=2,model=8", 8, 16)):
        read = plain_bytes(config, Case(131072), 2, MeshConfig.named(axes)) / gib
        assert read == pytest.approx(13.98 / weights + 16 / cache, abs=0.05)


def test_over_a_mesh_the_command_decodes_what_plain_decoding_does(capsys):
    over = ["--mesh", "context=2,model=2", "--cases", "plain,full:3,int8:3", "--dial", "0.5", "--acceptance", "0.8"]
    assert main([*SMALL, *over]) == 0
    said = capsys.readouterr()
    assert "data 1 x fsdp 1 x context 2 x model 2" in said.err
    assert said.out.count(" yes\n") == 2 and "prefill of 64" in said.out


def test_random_models_say_the_next_id_and_the_dial_touches_attention_alone():
    config = shape_of("small", 1)
    decoder = random_decoder(config, jnp.dtype("float32"))
    silent = scale_attention_outputs(decoder, 0.0)
    assert not np.any(np.asarray(silent.blocks[0].o_NHD[...]))
    np.testing.assert_array_equal(silent.blocks[0].gate_DF[...], decoder.blocks[0].gate_DF[...])
    head = np.asarray(decoder.head_DV[...])
    embedding = np.asarray(decoder.embed_VD[...])
    votes = embedding[:50] @ head
    assert (votes.argmax(axis=1) == np.arange(1, 51)).all()
    around = replace(config, post_norms=True, norm_offset=1.0, tie_embeddings=True, embedding_scale=8.0)
    normed = random_decoder(around, jnp.dtype("float32"))
    assert not np.any(np.asarray(normed.blocks[0].attention_post_norm_D[...]))
    quiet = scale_attention_outputs(normed, 0.25).blocks[0]
    np.testing.assert_array_equal(quiet.attention_post_norm_D[...], np.full(config.hidden_size, -0.75))
    assert not np.any(np.asarray(quiet.mlp_post_norm_D[...]))
    prefix = random_prefix(config, batch=2, tokens=8, dtype=jnp.dtype("float32"))
    assert prefix.layers[0].k_BKSH.shape == (2, 2, 8, 32) and int(prefix.used) == 8
    assert len(jax.tree.leaves(prefix.layers)) == 2
    # As many tokens as context divides, of which a window keeps all.
    mesh, windowed = (
        make_mesh(MeshConfig(context=4), jax.devices()[:4]),
        replace(config, pattern=(LayerKind(window=9),)),
    )
    near = random_prefix(windowed, batch=2, tokens=12, dtype=jnp.dtype("float32"), mesh=mesh).near
    assert near is not None and sorted(np.asarray(near.prefix.pos_BS[1])) == list(range(12))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--cases", "int9:3"], "got 'int9:3'"),
        (["--cases", "full"], "got 'full'"),
        (["--cases", "int8:0"], "got 'int8:0'"),
        (["--cases", "plain:4"], "got 'plain:4'"),
        (["--cases", "plain/fp8"], "keys and values: expected of full, int8, got 'fp8'"),
        (["--mesh", "rows=2"], "expected mesh axes of data, fsdp, context, model as context=2,model=4, got 'rows=2'"),
        (["--mesh", "model=64"], "expected 64 devices, got "),
        (["--mesh", "context=\u00b2"], "expected mesh axes of data, fsdp, context, model as context=2,model=4"),
        (["--mesh", "data=2,context=2"], "--mesh: expected context and model alone, got data 2 x fsdp 1 x context 2"),
        (["--mesh", "context=4", "--short", "30"], "--short: expected a multiple of context = 4, got 30"),
        (["--mesh", "context=4", "--contexts", "64,66"], "--contexts: expected a multiple of context = 4, got 66"),
        (["--mesh", "context=2", "--cases", "attended:3"], "attended is for documents on one device, got data 1"),
        (["--mesh", "context=2", "--tpu-hour"], "--tpu-hour: expected one device, got data 1 x fsdp 1 x context 2"),
        (["--mesh", "model=2", "--parts", "attention"], "--parts: expected of prefill, decoding, got 'attention'"),
        (["--parts", "drawing"], "--parts: expected of attention, prefill, decoding, got 'drawing'"),
        (["--shape", "llama-9"], "unknown shape 'llama-9'"),
        (["--acceptance", "1"], "expected a share between 0 and 1, got 1.0"),
        (["--json", "/dev/null/rows"], "--json: /dev/null/rows"),
        (["--plot", "cost.png", "--with", "/dev/null/rows"], "/dev/null/rows: expected JSON lines of rapid bench"),
    ],
)
def test_bad_options_are_told_in_one_line(wrong, said, capsys):
    assert main([*SMALL, *wrong]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert said in lines[-1] and lines[-1].startswith("rapid: ")


def test_cases_by_name():
    assert case_of("int8:auto/int8") == Case(0, drafter="int8", kv="int8", gamma="auto")
    assert case_of("quoting") == Case(0, quoting=True) and case_of("prose") == Case(0, quoting=False)
    assert str(case_of("int4:6/int8")) == "rapid, drafter int4, kv int8"


def test_a_figure_needs_rows(tmp_path):
    with pytest.raises(InputError, match="expected rows of batch 1"):
        draw([{"part": "memory"}], tmp_path / "a.png")
    with pytest.raises(InputError, match="expected JSON lines"):
        rows_of(tmp_path / "none.jsonl")


ROW = {
    "part": "decoding",
    "name": "a $x$ \x1b",
    "case": {"context": 64, "batch": 1, "quoting": None},
    "ms_per_token": 2,
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": 3}, "name must be a string, got 3"),
        ({"ms_per_token": None}, "ms_per_token must be a number above 0, got null"),
        ({"ms_per_token": "2"}, "ms_per_token must be a number above 0, got '2'"),
        ({"ms_per_token": float("nan")}, "ms_per_token must be a number above 0, got nan"),
        ({"floor_ms": [1]}, r"floor_ms must be a number above 0, got \[1\]"),
        ({"ms_most": -1}, "ms_most must be a number above 0, got -1"),
        ({"case": "plain"}, "case must be an object, got 'plain'"),
        ({"case": {"context": 10**30, "batch": 1}}, "case.context must be a whole number from 1 to"),
        ({"case": {"context": 64}}, "case.batch must be a whole number of at least 1, got no such key"),
        ({"case": ROW["case"] | {"quoting": 1}}, "case.quoting must be true or false, got 1"),
    ],
)
def test_a_row_that_cannot_be_drawn_is_named(tmp_path, change, said):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in (ROW, {"part": "memory"}, ROW | change)))
    with pytest.raises(InputError, match=f"rows.jsonl:3: {said}"):
        rows_of(path)
    for lines in ("[]", "{", "1" * 5000):
        path.write_text(lines)
        with pytest.raises(InputError, match=r"rows.jsonl:1: "):
            rows_of(path)


def test_rows_with_the_spread_and_without_are_drawn(tmp_path):
    path = tmp_path / "rows.jsonl"
    other = ROW | {"case": ROW["case"] | {"context": 128}, "ms_least": 1.5, "ms_most": 3.0, "floor_ms": None}
    path.write_text("".join(json.dumps(row) + "\n" for row in (ROW, other)))
    draw(rows_of(path), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "a.svg").read_bytes().startswith(b"<?xml")
    assert (tmp_path / "a.csv").read_text().startswith("case,context,ms a token,low,high\n")


def test_the_gap_to_another_token_is_of_the_logits_that_plain_decoding_chose_by(bench):
    """And reading the text by pieces of another width moves them by no more than rounding."""
    bench.dial = 0.5
    case = Case(64, batch=2)
    said = bench._decode(case).tokens[1]
    for at in (0, 7, 8, 20):
        logits = [bench._logits(case, 1, said[:at], width) for width in decoding.WIDTHS]
        assert [int(z_V.argmax()) for z_V in logits] == [said[at]] * 2
        np.testing.assert_allclose(*logits, atol=1e-4)
    gap, tie = bench._gap(case, 1, said[:9], said[9], (said[9] + 1) % 2048)
    assert gap > 0.1 and tie < 1e-3
    bench.release()


def test_a_reader_that_contradicts_itself_makes_no_tie_of_everything(bench, monkeypatch):
    rng = np.random.default_rng(0)
    monkeypatch.setattr(bench, "_logits", lambda *_: rng.normal(size=2048))
    assert bench._gap(Case(64), 0, [], 1, 2)[1] == decoding.LARGEST_TIE


def test_what_a_first_hour_on_a_tpu_is_to_measure(tmp_path, capsys):
    """All devices sum, a matrix is read in full and in 8 bits, and a layer takes time beside its own."""
    path = tmp_path / "hour.jsonl"
    assert main(["bench", "--tpu-hour", "--repeats", "1", "--json", str(path)]) == 0
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [(row["part"], row.get("weights")) for row in rows] == [
        ("sum", None),
        ("product", "full"),
        ("layer", "full"),
        ("product", "int8"),
        ("layer", "int8"),
    ]
    assert rows[0]["chips"] == 8 and rows[0]["kib"] == 8 * 128 * 4 / 1024  # rows, hidden size, bytes
    # A layer's time is a difference, which the noise of a shared machine may make nothing.
    assert all(row["us"] > 0 or (row["part"] == "layer" and row["us"] == 0) for row in rows)
    assert all(0 <= row["small_us"] <= row["us"] for row in rows if "small_us" in row)
    whole, eighth = (row["us"] * row["bytes_per_second"] for row in rows if row["part"] == "product")
    assert whole / eighth == pytest.approx(128 * 512 * 4 / (128 * 512 + 512 * 4))  # a scale a column
    assert len(capsys.readouterr().out.strip().splitlines()) >= 5
