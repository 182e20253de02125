# SPDX-License-Identifier: Apache-2.0
"""Training data through seqio: a Task a domain, a Mixture of them, and a FeatureConverter that makes packed rows.

TensorFlow is imported here alone, and sees no device. A Task holds the places of rows (file, offset, turn), not their
text: shuffling is exact over all of them, what was read before a restart is skipped at no cost, and a row is read,
tokenised and packed where it is used.
"""

import contextlib
import json
import logging
import re
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property, partial
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from longpo_jax.config import LongPOConfig
from longpo_jax.objectives import objective_of
from longpo_jax.reference import OfRecords, check_references, sums_of
from longpo_jax.rows import Row
from longpo_jax.samples import Place, Rows
from longpo_jax.step import Sample
from longpo_jax.teacher import Teachers
from rapid_jax.model.tokenizer import Tokenizer
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.storage import AnyPlace

for _kind in ("GPU", "TPU"):
    tf.config.set_visible_devices([], _kind)

_FIELDS = ("tokens", "targets", "pos", "branch", "turn")  # of a Row, each an array of its places
_AHEAD = 2  # rows that are made while the devices work
_TEXT = seqio.Feature(seqio.PassThroughVocabulary(size=1), add_eos=False, dtype=tf.string, rank=0)


class Vocabulary(seqio.Vocabulary):
    """A checkpoint's tokenizer for seqio's own features and tasks; the rows here are tokenised when they are packed.

    Special tokens spelt out in a text stay text.
    """

    def __init__(self, tokenizer: Tokenizer):
        super().__init__()
        self.tokenizer = tokenizer

    @property
    def bos_id(self) -> int | None:
        """The id of the first token of a text, if there is one."""
        return self._special("bos_token")

    @property
    def eos_id(self) -> int | None:
        """The id of the end token."""
        return self._special("eos_token")

    @property
    def unk_id(self) -> int | None:
        """The id for what has none."""
        return self._special("unk_token")

    @property
    def _base_vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    def _special(self, name: str) -> int | None:
        token = self.tokenizer.special_tokens.get(name)
        return None if token is None else self.tokenizer.id_of(token)

    def _encode(self, s: str) -> list[int]:
        return self.tokenizer.encode_quoted(s)

    def _decode(self, ids: Any) -> str:
        return self.tokenizer.decode([int(id) for id in ids])

    def _encode_tf(self, s: Any) -> Any:
        def encode(text):  # bytes in a graph, an array of them when called at once
            return np.asarray(self._encode(np.asarray(text).item().decode()), np.int32)

        ids = tf.numpy_function(encode, [tf.convert_to_tensor(s, tf.string)], tf.int32, stateful=False)
        return tf.ensure_shape(ids, [None])

    def _decode_tf(self, ids: Any) -> Any:
        return tf.numpy_function(lambda ids: self._decode(ids).encode(), [ids], tf.string, stateful=False)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and other.tokenizer.fingerprint == self.tokenizer.fingerprint


class Epochs:
    """The seqio Mixture of the rows' domains, and its epochs.

    Raises InputError if `corpus.weights` has none for a domain.
    """

    def __init__(self, rows: Rows):
        self._rows = rows
        self._weights = rows.config.corpus.weight_of
        missing = sorted(rows.places.keys() - self._weights.keys())
        if self._weights and missing:
            raise InputError(
                f"corpus.weights: expected one of each domain of the records, got none of {', '.join(missing)}, which "
                "corpus.sources does not name"
            )

    @cached_property
    def mixture(self) -> Any:
        """The seqio Mixture: `corpus.weights` of the domains in the order of `corpus.sources`, else by their rows."""
        rates = []
        for number, (domain, places) in enumerate(sorted(self._rows.places.items())):
            # seqio allows few characters; the number keeps apart what differs in others.
            name = f"longpo_{number}_" + re.sub(r"\W", "_", domain)
            seqio.TaskRegistry.remove(name)
            lines = [json.dumps(vars(place)) for place in places]

            def read(split, shuffle_files, seed=None, lines=lines):
                del split, shuffle_files, seed
                return tf.data.Dataset.from_tensor_slices({"place": lines})  # type: ignore[arg-type]

            task = seqio.TaskRegistry.add(
                name,
                source=seqio.FunctionDataSource(  # type: ignore[arg-type]
                    read, splits=["train"], num_input_examples={"train": len(lines)}
                ),
                preprocessors=[],
                output_features={"place": _TEXT},
                metric_fns=[],
                shuffle_buffer_size=len(lines),
            )
            rates.append((task.name, self._weights.get(domain, float(len(lines)))))
        seqio.MixtureRegistry.remove("longpo")
        # A domain that runs out ends nothing: an epoch without weights has every row once.
        sample = partial(tf.data.Dataset.sample_from_datasets, stop_on_empty_dataset=False)
        return seqio.MixtureRegistry.add("longpo", rates, sample_fn=sample)

    def epoch(self, seed: int) -> Any:
        """A dataset of as many places as there are rows: each once, or by the weights of the domains."""
        with _quiet():
            dataset = self.mixture.get_dataset(
                sequence_length=None,
                split="train",
                shuffle=True,
                seed=seed,
                num_epochs=None if self._weights else 1,
            )
        return dataset.take(len(self._rows)).map(lambda item: {"place": item["place"]})


class PackedRows(seqio.FeatureConverter):
    """seqio's step from a task's features to the model's: a place becomes the packed row of what lies there."""

    TASK_FEATURES = {"place": seqio.FeatureConverter.FeatureSpec(dtype=tf.string, rank=0)}  # noqa: RUF012
    MODEL_FEATURES = {  # noqa: RUF012
        "id": seqio.FeatureConverter.FeatureSpec(dtype=tf.string, rank=0),
        "row": seqio.FeatureConverter.FeatureSpec(dtype=tf.int32, rank=2),
        "short": seqio.FeatureConverter.FeatureSpec(dtype=tf.int32, rank=2),
        "reach": seqio.FeatureConverter.FeatureSpec(dtype=tf.int32, rank=1),
        "turn": seqio.FeatureConverter.FeatureSpec(dtype=tf.int32, rank=0),
    }
    PACKING_FEATURE_DTYPES = {}  # noqa: RUF012

    def __init__(self, rows: Rows):
        super().__init__(pack=False)
        self._rows = rows
        self.refused: InputError | None = None  # why a row could not be made, which TensorFlow would wrap and print

    def _convert_features(self, ds: Any, task_feature_lengths: Mapping[str, int]) -> Any:
        del task_feature_lengths

        def read(place: bytes):
            empty = np.zeros((len(_FIELDS), 0), np.int32)
            nothing = b"", empty, empty, np.zeros(2, np.int32), np.int32(0)
            if not place:  # another host's
                return nothing
            at = Place(**json.loads(place))
            try:
                record, row, short = self._rows.row(at)
            except InputError as error:
                self.refused = error
                return nothing
            reach = np.asarray([row.reach, -1 if short is None else short.reach], np.int32)
            stacked = empty if short is None else _stack(short)
            return record.id.encode(), _stack(row), stacked, reach, np.int32(at.turn)

        def convert(item):
            types = (tf.string, tf.int32, tf.int32, tf.int32, tf.int32)
            name, row, short, reach, turn = tf.numpy_function(read, [item["place"]], types, stateful=False)
            return {
                "id": tf.ensure_shape(name, []),
                "row": tf.ensure_shape(row, [len(_FIELDS), None]),
                "short": tf.ensure_shape(short, [len(_FIELDS), None]),
                "reach": tf.ensure_shape(reach, [2]),
                "turn": tf.ensure_shape(turn, []),
            }

        return ds.map(convert, num_parallel_calls=_AHEAD, deterministic=True)

    def get_model_feature_lengths(self, task_feature_lengths: Mapping[str, int]) -> Mapping[str, int]:
        """Rows have the length of their bucket: none is the same for all."""
        del task_feature_lengths
        return {}

    def __call__(self, ds: Any, task_feature_lengths: Mapping[str, int]) -> Any:
        """The dataset of rows. seqio's own checks are of features that are one sequence each."""
        return self._convert_features(ds, task_feature_lengths).prefetch(_AHEAD)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without seqio's advice on shuffling sources that it cannot shuffle itself: the buffer here holds all places."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _stack(row: Row) -> np.ndarray:
    return np.stack([getattr(row, f"{field}_T") for field in _FIELDS])


class Reader:
    """Rows by position, the same on any number of hosts; a position follows from (seed, records) alone.

    Yields from position `start` on: a Sample, or None where `rows` does not hold position % train.rows_per_step.
    """

    def __init__(
        self,
        config: LongPOConfig,
        pairs: AnyPlace,
        references: OfRecords,
        tokenizer: Tokenizer,
        *,
        start: int = 0,
        rows: Collection[int] | None = None,
    ):
        self._config, self._references, self._start = config, references, start
        self._wanted = range(config.train.rows_per_step) if rows is None else rows
        self.rows = Rows(config, pairs, tokenizer)
        check_references(references, self.rows.turns, config.objective.name)
        self._epochs = Epochs(self.rows)
        self._tails = {"row": self.rows.tail, "short": config.train.tail}

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def total(self) -> int:
        """Rows of all epochs."""
        return len(self) * self._config.train.epochs

    def start_at(self, position: int, rows: Collection[int]) -> None:
        """From where the next iteration yields, and which rows."""
        self._start, self._wanted = position, rows

    def __iter__(self) -> Iterator[Sample | None]:
        for epoch in range(self._start // len(self), self._config.train.epochs):
            first = max(self._start - epoch * len(self), 0)
            dataset = self._epochs.epoch(self._config.seed + epoch).skip(first)
            places = dataset.enumerate(epoch * len(self) + first).map(self._hidden)
            converter = PackedRows(self.rows)
            for item in converter(places, {}).as_numpy_iterator():
                if converter.refused is not None:
                    raise converter.refused
                yield self._sample(item) if item["id"] else None

    def _hidden(self, position: Any, item: Any) -> Any:
        """Empty where the row is another host's."""
        index = position % self._config.train.rows_per_step
        mine = tf.reduce_any(tf.equal(index, tf.constant(sorted(self._wanted), tf.int64)))
        return {"place": tf.where(mine, item["place"], "")}

    def _sample(self, item: Mapping[str, Any]) -> Sample:
        name = item["id"].decode()
        row, short = (self._row(item, key, index) for index, key in enumerate(("row", "short")))
        assert row is not None
        objective, references = self._config.objective.name, self._references
        if isinstance(references, Teachers):
            return Sample(name, row, short, {}, references[name])
        scores = sums_of(references[name], objective, int(item["turn"])) if objective_of(objective).sums else {}
        return Sample(name, row, short, scores)

    def _row(self, item: Mapping[str, Any], key: str, index: int) -> Row | None:
        if not item[key].size:
            return None
        fields = {f"{field}_T": array for field, array in zip(_FIELDS, item[key], strict=True)}
        return Row(**fields, reach=int(item["reach"][index]), tail=self._tails[key])
