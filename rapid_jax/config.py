# SPDX-License-Identifier: Apache-2.0
"""Everything that a run of RAPID can be told: one dataclass a section of the YAML file."""

from dataclasses import dataclass, field, replace
from typing import Literal

from rapid_jax.attention.config import KernelName, Over
from rapid_jax.retrieval.config import RetrievalConfig
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.files import cache_dir
from rapid_jax.runtime.mesh_config import MeshConfig
from rapid_jax.runtime.storage import place_of
from rapid_jax.speculative.config import SamplingSettings, SpeculationConfig

ATTENDED = "attended"


@dataclass(frozen=True)
class ModelsConfig:
    """Which models, and how they are laid out."""

    target: str = "smollm2"  # reads the whole document: a Hugging Face folder, a .gguf file, or the name smollm2
    target_weights: Literal["full", "int8"] = "full"  # int8: half the bytes to read; lossy: the quantised copy's answer
    # Reads the retrieved text. same: the target's own weights, no second copy; attended: those too, over what
    # the target attends to instead of retrieved text; else as target.
    drafter: str = "same"
    drafter_weights: Literal["full", "int8", "int4"] = "full"  # int8, int4: a quantised copy of the weights drafts
    encoder: str = "minilm"  # embeds chunks: a Hugging Face folder (BERT, a decoder that pools), or minilm
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: float32 on a CPU, else bfloat16
    # Of the layers: unrolled, one array each, decodes faster on CPUs and GPUs; stacked, all in one, compiles faster.
    layout: Literal["unrolled", "stacked"] = "unrolled"
    max_context: int | None = None  # tokens of prompt and answer; null = what the checkpoint was trained for
    # Of a document beyond max_context. head: its beginning is read; middle: its middle is cut out, as in the paper.
    too_long: Literal["error", "middle", "head"] = "error"

    def __post_init__(self):
        for name in ("target", "drafter", "encoder"):
            place_of(getattr(self, name), f"models.{name}")
        if self.target_weights != "full" and self.has_one_checkpoint and self.drafter_weights == "int4":
            raise InputError("models.drafter_weights int4 needs models.target_weights full, got int8")
        if self.max_context is not None and self.max_context < 1:
            raise InputError(f"models.max_context: expected at least 1, got {self.max_context}")

    @property
    def has_one_checkpoint(self) -> bool:
        """Whether the drafter is the target itself, or a copy of it."""
        return self.drafter in ("same", ATTENDED)

    def retrieves(self, speculation: SpeculationConfig) -> bool:
        """Whether anything is retrieved for answers of this kind."""
        return speculation.reads == "retrieved" or (speculation.drafts and self.drafter != ATTENDED)

    def loads_as(self, other: "ModelsConfig") -> bool:
        """Whether what is loaded is the same; how much of a document is read may differ."""
        return replace(self, max_context=other.max_context, too_long=other.too_long) == other


@dataclass(frozen=True)
class PromptsConfig:
    """What the models are asked, as one user message; {document} and {question} are filled in."""

    # What the target is asked; {document} before {question}, each once.
    target: str = (
        "Please read the following text and answer the question below.\n\n<text>\n{document}\n</text>\n\n{question}"
    )
    # What the drafter is asked, {document} being the retrieved text; in mode retrieval the target is asked this.
    drafter: str = (
        "Please read the following retrieved text chunks and answer the question below.\n\n"
        "<text>\n{document}\n</text>\n\n{question}"
    )
    system: str | None = None  # null = what the chat template puts there
    enable_thinking: bool = False  # models that can (Qwen3, SmolLM3) think before they answer

    def __post_init__(self):
        for name in ("target", "drafter"):
            template: str = getattr(self, name)
            if template.count("{document}") != 1 or template.count("{question}") != 1:
                raise InputError(f"prompts.{name}: expected {{document}} and {{question}} once each")
            if template.index("{document}") > template.index("{question}"):
                raise InputError(f"prompts.{name}: expected {{document}} before {{question}}")


@dataclass(frozen=True)
class ComputeConfig:
    """How the work is cut up. Changes speed and memory; the answer by rounding alone."""

    prefill_chunk: int = 512  # prompt tokens computed at once; a multiple of twice mesh.context
    attention_block: int = 16384  # cache slots attended at once while decoding
    kernel: KernelName = "auto"  # of prefill; auto: splash on TPUs, cudnn on GPUs, else xla
    kv: Literal["full", "int8"] = "full"  # of the document; int8: half the bytes, quantised after prefill; lossy
    context: Over = "ring"  # how keys and values reach the queries of other devices during prefill

    def __post_init__(self):
        for name in ("prefill_chunk", "attention_block"):
            if getattr(self, name) < 16:
                raise InputError(f"compute.{name}: expected at least 16, got {getattr(self, name)}")


@dataclass(frozen=True)
class CacheConfig:
    """What is kept: keys and values of documents on devices, host and disk, and what else saves time there."""

    folder: str | None = None  # or gs://, s3://, for documents; null = $RAPID_JAX_CACHE, else ~/.cache/rapid_jax
    device_gib: float | None = None  # at most, of documents' keys and values; null = what weights leave free
    host_gib: float = 16.0  # at most, of keys and values that the devices have no room for
    disk_gib: float = field(default=20.0, metadata={"was": "prefix_gib"})  # at most; least recently used go first
    prefixes: bool = True  # keep keys and values of documents on disk, or in cache.folder's bucket
    embeddings: bool = True  # keep embeddings of chunks, and indices over them
    programs: bool = True  # keep compiled programs

    def __post_init__(self):
        cache_dir(self.folder)
        for name in ("device_gib", "host_gib", "disk_gib"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1e9:
                raise InputError(f"cache.{name}: expected a number >= 0 and <= 1e9, got {value}")


@dataclass(frozen=True)
class RapidConfig:
    """One run."""

    models: ModelsConfig = field(default_factory=ModelsConfig)
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    speculation: SpeculationConfig = field(default_factory=SpeculationConfig)
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    stop: tuple[str, ...] = ()  # texts that end the answer, not part of it
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)  # of the target, and of a drafter that has none of its own
    drafter_mesh: MeshConfig | None = None  # devices of the drafter alone, after those of the target
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)

    @property
    def lossy(self) -> list[str]:
        """Settings by which the target's distribution is not the checkpoint's own."""
        given = {"models.target_weights": self.models.target_weights, "compute.kv": self.compute.kv}
        return [f"{name} {kind}" for name, kind in given.items() if kind != "full"]

    def __post_init__(self):
        if self.drafter_mesh is not None and self.models.has_one_checkpoint:
            drafter = self.models.drafter
            raise InputError(f"drafter_mesh is for a drafter with weights of its own, got models.drafter = {drafter}")
        if self.models.drafter == ATTENDED:
            self._check_attended()
        for name, mesh in (("mesh", self.mesh), ("drafter_mesh", self.drafter_mesh)):
            if mesh is None:
                continue
            if self.models.drafter_weights == "int4" and mesh.devices > 1:
                raise InputError(f"models.drafter_weights int4 is for one device, got {name} {mesh}")
            if mesh.data > 1:
                raise InputError(
                    f"{name}.data: one question at a time has no batch to split, expected 1, got {mesh.data}"
                )
            if mesh.context > 1 and self.compute.prefill_chunk % (2 * mesh.context):
                raise InputError(
                    f"compute.prefill_chunk: expected a multiple of {2 * mesh.context} (2 x {name}.context), "
                    f"got {self.compute.prefill_chunk}"
                )

    def _check_attended(self) -> None:
        speculation = self.speculation
        if speculation.effective_eta:
            raise InputError(
                "models.drafter attended knows no more than the target, whose distribution it cannot move: expected "
                f"speculation.mode lossless, or eta 0, got {speculation.mode} with eta {speculation.eta:g}"
            )
        if self.mesh.context > 1:
            raise InputError(
                f"models.drafter attended: expected mesh.context 1, a document on one device, got {self.mesh.context}"
            )
