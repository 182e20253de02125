# SPDX-License-Identifier: Apache-2.0
"""LongPO written plainly in torch: each sequence in a forward pass of its own, all logits at once, in float64."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from jax.sharding import Mesh
from torch.nn.functional import softplus
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from longpo_jax.dialogue import Branch
from longpo_jax.rows import packed
from longpo_jax.step import Sample
from longpo_jax.teacher import Teacher
from rapid_jax.model.config import from_hf
from rapid_jax.model.decoder import Decoder
from rapid_jax.model.hf_names import weights
from rapid_jax.model.placement import abstract
from rapid_jax.runtime.axes import TRAINED
from tests.expert_names import apart

VOCABULARY = 64
GEMMA3 = {
    **{"head_dim": 16, "query_pre_attn_scalar": 24, "layer_types": ["sliding_attention", "full_attention"]},
    "pad_token_id": None,  # whose row of the embedding torch leaves without a gradient
}
WINDOW = {"use_sliding_window": True, "sliding_window": 9}
TOP_K = 6  # of a teacher


@dataclass(frozen=True)
class Pair:
    """A document's two dialogues, the excerpt's two, and what the reference says."""

    shared: list[int]
    chosen: Branch
    rejected: Branch
    excerpt: list[int]
    references: Mapping[str, float]

    def sample(self, *, trunk: int, tail: int, objective: str = "longpo", excerpt_trunk: int = 32) -> Sample:
        """What training reads of it, for this objective."""
        if objective == "opsd":
            row = packed(self.shared, self.chosen, self.rejected, trunk=trunk, tail=tail)
            return Sample("", row, None, {}, self.teacher)
        sft, solopo = objective == "sft", objective == "solopo"
        if sft or solopo:
            row = packed(self.shared, self.chosen, None, trunk=trunk, tail=0)
        else:
            row = packed(self.shared, self.chosen, self.rejected, trunk=trunk, tail=tail)
        short = packed(self.excerpt, self.chosen, self.rejected, trunk=excerpt_trunk, tail=tail) if solopo else None
        names = () if sft else ("chosen", "rejected", *(("long_chosen",) if solopo else ()))
        return Sample("", row, short, {name: self.references[name] for name in names})

    @property
    def teacher_log_probs(self) -> np.ndarray:
        """[tokens, vocabulary] of the rejected answers, random: what a teacher knows."""
        answers = sum(turn > 0 for turn in self.rejected.turns)
        z_TV = np.random.default_rng(len(self.shared)).normal(size=(answers, VOCABULARY)) * 2
        return z_TV - np.log(np.sum(np.exp(z_TV), axis=-1, keepdims=True))

    @property
    def teacher(self) -> Teacher:
        """Of that the first tokens and the rest."""
        log_probs = self.teacher_log_probs
        order = np.argsort(-log_probs, axis=-1)
        log_probs = np.take_along_axis(log_probs, order, axis=-1)
        rest = np.log(np.sum(np.exp(log_probs[:, TOP_K:]), axis=-1)).astype(np.float32)
        tokens = tuple(self.rejected.turns.count(turn) for turn in range(1, max(self.rejected.turns) + 1))
        top = order[:, :TOP_K].astype(np.int32), log_probs[:, :TOP_K].astype(np.float32)
        return Teacher(*top, rest, tokens)


def pair(shared: int, chosen: Sequence[int], rejected: Sequence[int], margin: float = 0.0) -> Pair:
    """Random tokens: so many shared, and of each branch answers and what lies between them in turn.

    The excerpt is the last 8 shared tokens; `margin` is that of the reference's log-probabilities.
    """
    rng = np.random.default_rng(shared)

    def tokens(count: int) -> list[int]:
        return rng.integers(0, VOCABULARY, count).tolist()

    def branch(sizes: Sequence[int]) -> Branch:
        turns = [[0 if index % 2 else index // 2 + 1] * size for index, size in enumerate(sizes)]
        return Branch(tokens(sum(sizes)), [turn for part in turns for turn in part])

    given = tokens(shared)
    references = {"chosen": -38.5, "rejected": -38.5 - margin, "long_chosen": -39.0}
    return Pair(given, branch(chosen), branch(rejected), given[-8:], references)


def pairs() -> list[Pair]:
    """Two turns each; of all lengths, odd ones too; the last answer of the last was cut short."""
    return [
        pair(37, (5, 2, 4), (3, 3, 3), margin=-11.0),
        pair(44, (3, 4, 6), (6, 1, 7), margin=25.0),
        pair(21, (7, 1, 2), (2, 5, 4), margin=-8.0),
        pair(30, (4, 3, 4, 1), (1, 2, 9), margin=14.0),
    ]


def model(*, tied: bool, family: str = "llama") -> PreTrainedModel:
    """Two random layers, far from uniform, float64; qwen3's and smollm3's second has a window, gemma3's first."""
    torch.manual_seed(1)
    kind, special = {
        "llama": (LlamaConfig, {}),
        "qwen3": (Qwen3Config, {"head_dim": 16, "max_window_layers": 1} | WINDOW),
        "qwen3_moe": (
            Qwen3MoeConfig,
            {"head_dim": 16, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
        ),
        "smollm3": (SmolLM3Config, {"no_rope_layers": [1, 0], "pad_token_id": None} | WINDOW),
        "gemma3": (Gemma3TextConfig, GEMMA3 | WINDOW),
    }[family]
    config = kind(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.25,
        tie_word_embeddings=tied,
        **special,
    )
    # transformers' own choice of grouped products is for float32 at the most
    return AutoModelForCausalLM.from_config(config, experts_implementation="eager").double().eval()


def decoder_of(model: PreTrainedModel, mesh: Mesh | None = None) -> Decoder:
    """The same weights in float32 as training has them, put in place without a program."""
    config = from_hf(model.config.to_dict() | {"architectures": [type(model).__name__]})
    stored = apart({key: value.detach().numpy().astype(np.float32) for key, value in model.state_dict().items()})
    found: dict[Any, Any] = {}
    for weight in weights(config):
        array = stored[weight.key].reshape(weight.unflattened_shape).transpose(weight.to_ours)
        found.setdefault(weight.path("stacked"), []).append(array)
    graph, empty = nnx.split(abstract(config, layout="stacked", dtype=jnp.float32, mesh=mesh, table=TRAINED))
    filled = []
    for path, leaf in dict(nnx.to_flat_state(empty)).items():
        array = np.stack(found[path]).reshape(leaf.get_value().shape)  # in order of layers, of experts in a layer
        filled.append((path, leaf.replace(jax.device_put(array, leaf.get_value().sharding))))
    return nnx.merge(graph, nnx.from_flat_state(filled))


def named(decoder: Decoder, leaves: nnx.State) -> dict[str, np.ndarray]:
    """Weights, or what has their structure, by the checkpoint's names and in its shapes."""
    flat: dict[Any, Any] = dict(nnx.to_flat_state(leaves))
    found = {}
    for weight in weights(decoder.config):
        array = np.asarray(flat[weight.path("stacked")][...])
        array = array[weight.place("stacked")]
        found[weight.key] = array.transpose(weight.to_stored).reshape(weight.stored_shape)
    return found


def scores(model: PreTrainedModel, shared: list[int], branch: Branch) -> dict[str, torch.Tensor]:
    """Of one sequence: the sum of log p over the answers, and the means of -log p over all of it and over them."""
    ids = torch.tensor(shared + branch.tokens)
    log_softmax = torch.log_softmax(model(ids[None]).logits[0].double(), dim=-1)
    log_prob = log_softmax[:-1].gather(1, ids[1:, None])[:, 0]
    answer = torch.tensor([0] * len(shared) + branch.turns)[1:] > 0
    return {"sum": log_prob[answer].sum(), "full": -log_prob.mean(), "response": -log_prob[answer].mean()}


def divergence(model: PreTrainedModel, pair: Pair) -> torch.Tensor:
    """Mean over the tokens of the rejected answers: KL to the teacher, on its first tokens and one bucket of others."""
    ids = torch.tensor(pair.shared + pair.rejected.tokens)
    answer = torch.tensor([0] * len(pair.shared) + pair.rejected.turns)[1:] > 0
    p_TV = torch.softmax(model(ids[None]).logits[0].double(), dim=-1)[:-1][answer]
    q_TV = torch.from_numpy(np.exp(pair.teacher_log_probs))
    order = torch.argsort(-q_TV, dim=-1)
    p, q = (x.gather(1, order) for x in (p_TV, q_TV))
    p, q = (torch.cat([x[:, :TOP_K], x[:, TOP_K:].sum(1, keepdim=True)], dim=1) for x in (p, q))
    return (p * (p.log() - q.log())).sum(1).mean()


def loss_of(model: PreTrainedModel, pair: Pair, objective: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Loss, NLL and the rewards of a document."""
    name, beta = objective["name"], objective["beta"]
    chosen = scores(model, pair.shared, pair.chosen)
    found = {"nll": chosen[objective["nll"]]}
    if name == "opsd":
        found["kl"] = divergence(model, pair)
        found["loss"] = objective["nll_weight"] * found["nll"] + objective["distillation_weight"] * found["kl"]
        return found
    preferred = torch.zeros(())
    if name != "sft":
        before = pair.excerpt if name == "solopo" else pair.shared
        for side, branch in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            log_prob = scores(model, before, branch)["sum"]
            found[f"rewards/{side}"] = beta * (log_prob - pair.references[side])
        preferred = softplus(found["rewards/rejected"] - found["rewards/chosen"])
    if name == "solopo":
        long = beta * (chosen["sum"] - pair.references["long_chosen"])
        preferred = preferred + objective["alpha"] * (found["rewards/chosen"] - long).abs()
    found["loss"] = objective["nll_weight"] * found["nll"] + objective["preference_weight"] * preferred
    return found


def metrics_and_gradients(
    model: PreTrainedModel, pairs: Sequence[Pair], objective: Mapping[str, Any]
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """(means over the documents, the gradient of the mean loss by the checkpoint's names)."""
    model.zero_grad()
    every = [loss_of(model, pair, objective) for pair in pairs]
    torch.stack([one["loss"] for one in every]).mean().backward()
    means = {name: float(np.mean([one[name].item() for one in every])) for name in every[0]}
    gradients = {key: x.grad.double().numpy().copy() for key, x in model.named_parameters() if x.grad is not None}
    return means, apart(gradients)
