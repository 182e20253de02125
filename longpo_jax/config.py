# SPDX-License-Identifier: Apache-2.0
"""Everything that a run of LongPO can be told: one dataclass a section of the YAML file. Imports no jax."""

import math
from dataclasses import dataclass, field
from typing import Literal

from longpo_jax.limits import require, require_above, require_sampling, require_window
from longpo_jax.objectives import Name, objective_of
from rapid_jax.attention.config import KernelName, Over
from rapid_jax.runtime.mesh_config import MeshConfig
from rapid_jax.runtime.storage import local_path, place_of

Remat = Literal["none", "layer", "attention"]


@dataclass(frozen=True)
class PolicyConfig:
    """The model that is taught, and that generates its own data."""

    source: str = "smollm2"  # the model that is taught: a Hugging Face folder, a .gguf file, or the name smollm2
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the arithmetic; auto: float32 on a CPU, else bfloat16
    rope_theta: float | None = None  # of the policy: trained and exported with it; null = the checkpoint's own
    reference_rope_theta: float | None = None  # of the frozen reference, on short contexts; null = the checkpoint's own
    # Of answers from whole documents; null = as rope_theta. Answers from excerpts have the checkpoint's own.
    generation_rope_theta: float | None = None

    def __post_init__(self):
        place_of(self.source, "source")
        require_above(1, self, "rope_theta", "reference_rope_theta", "generation_rope_theta", most=1e15)


@dataclass(frozen=True)
class CorpusConfig:
    """Which documents."""

    sources: tuple[str, ...] = ()  # DOMAIN=FOLDER or DOMAIN=GLOB of .txt, .md, .tex, .jsonl, each also .gz or .zst
    weights: tuple[float, ...] = ()  # of the domains while training, in order; empty: by how many pairs each has
    text_key: str = "text"  # where a JSONL line keeps its text; a line may also be a bare string
    max_mib: int = 16  # of a document as it is read (a file, or a JSONL line); larger ones are dropped and counted
    follow_links: bool = False  # links that lead out of a source's folder; they are left out and counted otherwise
    min_tokens: int = 65536  # of a document
    max_tokens: int = 131072  # of a document; with its turns it must fit the longest of train.lengths
    longer: Literal["drop", "split"] = "drop"  # split: into consecutive documents of max_tokens or less, at paragraphs
    documents: int | None = None  # at most so many, after shuffling; null = all

    @property
    def weight_of(self) -> dict[str, float]:
        """The weight of each domain; empty without weights."""
        domains = dict.fromkeys(source.partition("=")[0] for source in self.sources)
        return dict(zip(domains, self.weights, strict=False))

    def __post_init__(self):
        require_window(self.min_tokens, self.max_tokens)
        for source in self.sources:
            domain, equals, place = source.partition("=")
            named = bool(domain and equals and place)
            require(named, f"sources: expected DOMAIN=FOLDER or DOMAIN=GLOB, got {source!r}")
            place_of(place, "sources")
        domains = {source.partition("=")[0] for source in self.sources}
        require(len(self.weights) in (0, len(domains)), f"weights: expected {len(domains)}, got {len(self.weights)}")
        require(
            all(math.isfinite(weight) and weight > 0 for weight in self.weights),
            f"weights: expected numbers > 0, got {self.weights}",
        )
        require(1 <= self.max_mib <= 1024, f"max_mib: expected 1 to 1024, got {self.max_mib}")
        require(self.documents is None or self.documents >= 1, f"documents: expected at least 1, got {self.documents}")


@dataclass(frozen=True)
class ExcerptsConfig:
    """The short contexts that are cut out of a document."""

    min_tokens: int = 16384  # of an excerpt
    max_tokens: int = 30000  # of an excerpt
    split: Literal["auto", "paragraphs", "sections"] = "auto"  # auto: at LaTeX sections if any, else paragraphs
    per_document: int = 4  # excerpts, one turn each, drawn at random and kept in the document's order

    def __post_init__(self):
        require_window(self.min_tokens, self.max_tokens)
        require(self.per_document >= 1, f"per_document: expected at least 1, got {self.per_document}")


@dataclass(frozen=True)
class InstructConfig:
    """The questions that the model proposes about an excerpt."""

    questions: int = 4  # asked for; one of them is drawn
    at_least: int = 4  # found in the model's words, else the excerpt is dropped
    begins: str = ""  # what its words are made to begin with: "1:" for a small model that would rather talk of the text
    temperature: float = 0.7  # of the questions; 0 = greedy
    top_p: float = 0.9  # 1 = off
    max_new_tokens: int = 1024  # of all questions about an excerpt

    def __post_init__(self):
        asked = self.at_least, self.questions
        require(1 <= asked[0] <= asked[1] <= 16, f"expected 1 <= at_least <= questions <= 16, got {asked}")
        require(len(self.begins) <= 100, f"begins: expected at most 100 characters, got {len(self.begins)}")
        require(self.max_new_tokens >= 1, f"max_new_tokens: expected at least 1, got {self.max_new_tokens}")
        require_sampling(self.temperature, self.top_p)


@dataclass(frozen=True)
class PairsConfig:
    """The answers: chosen from the excerpt, rejected from the whole document."""

    temperature: float = 0.0  # 0 = greedy, as the paper says; its code has 1
    top_p: float = 1.0  # 1 = off
    max_new_tokens: int = 1024  # of an answer; one that is cut off teaches no end token
    max_context: int = 131072  # tokens of a prompt on a whole document and its answer; longer ones lose their middle
    repetition_penalty: float = 1.0  # 1 = off; greedy small models loop without one
    speculation: Literal["off", "lossless"] = "off"  # lossless: RAPID drafts the long answer from the excerpt
    gamma: int = 5  # tokens drafted a round
    batch: int = 4  # prompts of about equal length generated at once; a document's questions always are
    documents: int = 1  # whose long answers are generated at once, as many as their keys and values fit in memory
    repeats_chosen: float = 0.90  # share of words that occur more than once, above which an answer is dropped
    repeats_rejected: float = 0.95  # the same, of the rejected answer
    min_words: int = 2  # words of 3 letters or more that an answer has at least
    shard_pairs: int = 64  # documents a file of pairs

    def __post_init__(self):
        for name in ("max_new_tokens", "max_context", "batch", "documents", "shard_pairs"):
            require(getattr(self, name) >= 1, f"{name}: expected at least 1, got {getattr(self, name)}")
        require(1 <= self.gamma <= 64, f"gamma: expected 1 to 64, got {self.gamma}")
        require_sampling(self.temperature, self.top_p)
        penalty = self.repetition_penalty
        require(1e-3 <= penalty <= 1e3, f"repetition_penalty: expected a number > 0, 1e-3 to 1e3, got {penalty}")
        for name in ("repeats_chosen", "repeats_rejected"):
            require(0 <= getattr(self, name) <= 1, f"{name}: expected 0 to 1, got {getattr(self, name)}")
        require(self.min_words >= 0, f"min_words: expected at least 0, got {self.min_words}")
        most, new = self.max_context, self.max_new_tokens
        require(most > new, f"max_context: expected more than max_new_tokens, got {most} and {new}")


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is minimised (loss.py): nll_weight * NLL + preference_weight * preference loss; opsd: + a reverse KL."""

    name: Name = "longpo"  # what is minimised (longpo_jax/README.md has the sums)
    beta: float = 0.1  # of the rewards, Eq. 12
    preference_weight: float = 0.01  # the paper's lambda
    nll_weight: float = 1.0  # of the NLL of the chosen sequence
    nll: Literal["full", "response"] = "full"  # of the whole chosen sequence with the document, or of its answers
    alpha: float = 3.0  # solopo: weight of the short-to-long reward alignment
    distillation_weight: float = 1.0  # opsd: of the reverse KL divergence, a mean over the answers' tokens
    top_k: int = 32  # opsd: the teacher's most probable tokens, one by one; all others are one bucket

    def __post_init__(self):
        for name in ("beta", "preference_weight", "nll_weight", "alpha", "distillation_weight"):
            value = getattr(self, name)
            require(math.isfinite(value) and value >= 0, f"{name}: expected a number >= 0, got {value}")
        require(1 <= self.top_k <= 1024, f"top_k: expected 1 to 1024, got {self.top_k}")
        needed = objective_of(self.name).weights
        teaches = bool(needed) and all(getattr(self, name) > 0 for name in needed)
        more = f" or {' and '.join(needed)}" if needed else ""
        expected = f"a loss that teaches {self.name} something, nll_weight above 0{more}"
        shown = needed or ("preference_weight", "beta")
        got = ", ".join(f"{name} {getattr(self, name)}" for name in ("nll_weight", *shown))
        require(self.nll_weight > 0 or teaches, f"expected {expected}, got {got}")


@dataclass(frozen=True)
class OptimizerConfig:
    """Optax's adamw, or rmsprop as torch computes it."""

    name: Literal["adamw", "rmsprop"] = "adamw"  # the paper's is Adam, its code has rmsprop
    learning_rate: float = 5e-7  # at its peak; the paper's, over thousands of updates
    warmup_ratio: float = 0.1  # of all steps, linear: update k of W has k / W of learning_rate
    schedule: Literal["cosine", "constant"] = "cosine"  # after the warmup; cosine: to 0
    b1: float = 0.9  # adamw
    b2: float = 0.99  # adamw
    eps: float = 1e-8  # of both
    decay: float = 0.99  # rmsprop
    weight_decay: float = 0.0  # adamw
    clip_norm: float | None = 1.0  # of the gradient of all weights; null = off
    moments_dtype: Literal["float32", "bfloat16"] = "float32"  # of the optimizer's state

    def __post_init__(self):
        require_above(0, self, "learning_rate", "eps", "clip_norm")
        usable = 1e-20 <= self.learning_rate <= 1e20  # in float32 every update's rate is then above 0, and finite
        require(usable, f"learning_rate: expected 1e-20 to 1e20, got {self.learning_rate}")
        require(0 <= self.warmup_ratio <= 1, f"warmup_ratio: expected 0 to 1, got {self.warmup_ratio}")
        for name in ("b1", "b2", "decay"):
            require(0 <= getattr(self, name) < 1, f"{name}: expected 0 to below 1, got {getattr(self, name)}")
        require(0 <= self.weight_decay < math.inf, f"weight_decay: expected a number >= 0, got {self.weight_decay}")


EMERGENCY_KEPT = 2  # copies on a process's disk: the newest may be there on some processes alone


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    lengths: tuple[int, ...] = (65536, 98304, 133120)  # rows are padded to the first of these that holds them
    tail: int = 4096  # further slots of a row, for its rejected turns
    rows_per_step: int = 8  # rows (documents) an update; over data * fsdp devices, the rest accumulated
    epochs: int = 1  # passes over the pairs
    max_steps: int | None = None  # stop earlier; the schedule is that of all steps of this run
    # What the forward pass keeps of a layer. none: all; layer: its input; attention: that and attention's output.
    remat: Remat = "attention"
    offload: bool = False  # the layers' inputs wait in the host's memory (GPUs and TPUs)
    logits_chunk: int = 1024  # tokens of a device whose logits exist at once
    attention_block: int = 512  # slots attended at once by plain XLA
    log_every: int = 1  # updates between two lines of metrics.jsonl
    save_every: int = 50  # updates between two checkpoints; one is also written at the end and at SIGTERM
    keep: int = 2  # how many of the newest checkpoints stay
    keep_every: int | None = None  # and those of steps that are multiples of this
    emergency_every: int | None = None  # updates between two copies on each process's own disk; null: none
    emergency_folder: str | None = None  # where they are, on this machine
    tensorboard: bool = False  # write events for TensorBoard, too
    wandb: str | None = None  # project name; needs the package wandb

    def __post_init__(self):
        rise = len(self.lengths) > 0 and list(self.lengths) == sorted(set(self.lengths)) and self.lengths[0] >= 1
        require(rise, f"lengths: expected to rise from at least 1, got {list(self.lengths)}")
        sizes = "tail rows_per_step epochs logits_chunk attention_block log_every save_every keep"
        for name in sizes.split():
            require(getattr(self, name) >= 1, f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("max_steps", "keep_every", "emergency_every"):
            require(
                (value := getattr(self, name)) is None or value >= 1,
                f"{name}: expected at least 1, or null, got {value}",
            )
        given = (self.emergency_every is not None, self.emergency_folder is not None)
        require(given[0] == given[1], "emergency_every: expected with emergency_folder, got one of them alone")
        if self.emergency_folder is not None:
            local_path(self.emergency_folder, "emergency_folder")
        both = self.offload and self.remat == "none"
        require(not both, "offload: expected remat layer or attention, got remat none")


@dataclass(frozen=True)
class ExportConfig:
    """What is written in the end."""

    step: int | None = None  # the update whose weights are exported; null = the last. train.keep must have kept it

    def __post_init__(self):
        require(self.step is None or self.step >= 1, f"step: expected at least 1, or null, got {self.step}")


@dataclass(frozen=True)
class GenerationConfig:
    """How the model's own answers are computed."""

    # Of the layers: unrolled, one array each, decodes faster on CPUs and GPUs; stacked, all in one, compiles faster.
    layout: Literal["unrolled", "stacked"] = "unrolled"
    mesh: MeshConfig = field(default_factory=MeshConfig)  # of the devices that answer
    prefill_chunk: int = 512  # prompt tokens computed at once
    attention_block: int = 16384  # cache slots attended at once while decoding

    def __post_init__(self):
        for name in ("prefill_chunk", "attention_block"):
            require(getattr(self, name) >= 1, f"{name}: expected at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class ComputeConfig:
    """How attention is computed."""

    kernel: KernelName = "auto"  # auto: splash on TPUs, cudnn on GPUs, else xla
    context: Over = "ring"  # how keys and values reach the queries of other devices
    programs: bool = True  # keep compiled programs in $RAPID_JAX_CACHE, else ~/.cache/rapid_jax


@dataclass(frozen=True)
class LongPOConfig:
    """One run: all of its stages, in one folder."""

    run: str = "runs/longpo"  # folder that everything is written to, here or in a bucket
    seed: int = 42  # of the order of documents and rows, of excerpts, questions and sampled answers
    model: PolicyConfig = field(default_factory=PolicyConfig)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    excerpts: ExcerptsConfig = field(default_factory=ExcerptsConfig)
    instruct: InstructConfig = field(default_factory=InstructConfig)
    pairs: PairsConfig = field(default_factory=PairsConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)  # of training and of the reference
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    rounds: tuple[str, ...] = ()  # of `longpo rounds`: for each round, KEY=VALUE settings that differ, split by spaces

    def __post_init__(self):
        place_of(self.run, "run")
        mesh, train = self.mesh, self.train
        rows, pieces = mesh.data * mesh.fsdp, 2 * mesh.context if mesh.context > 1 else 1
        require(
            train.rows_per_step % rows == 0,
            f"train.rows_per_step: expected a multiple of {rows} (mesh data x fsdp), got {train.rows_per_step}",
        )
        for name, size in (*(("lengths", length) for length in train.lengths), ("tail", train.tail)):
            require(size % pieces == 0, f"train.{name}: expected multiples of {pieces} (2 x mesh.context), got {size}")
        require(0 <= self.seed < 2**32, f"seed must be in [0, 2^32), got {self.seed}")
