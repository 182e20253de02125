# SPDX-License-Identifier: Apache-2.0
"""The command `longpo` with pairs that are made up: what random weights say is no question."""

import random
import sys
from pathlib import Path

from longpo_jax import cli
from longpo_jax.journal import Writer
from longpo_jax.records import Answer, Record, Turn
from longpo_jax.stages import inputs_of, is_done
from rapid_jax.runtime import sweep


def words(count: int, seed: int) -> str:
    """A text of words that no tokenizer finds odd."""
    return " ".join(random.Random(seed).choices(["read", "the", "text", "and", "say", "what", "of", "it"], k=count))


def made_pairs(config, folder, *, leads=True, quiet=False):
    """Four documents with a turn each; notes that it was asked."""
    place, inputs = folder / "pairs", inputs_of(config, "pairs")
    if is_done(place, inputs):
        return
    with open(folder.parents[1] / "made.txt", "a") as file:
        file.write(f"pairs {folder.name}\n")
    writer = Writer(place, inputs, shard_pairs=3)
    for index in range(4):
        text = words(40, index)
        chosen, rejected = (Answer(words(5, index + add), 5, True) for add in (100, 200))
        turn = Turn((0, 30), (0, 10), "As the text says,", "what of it?", chosen, rejected)
        writer.add(f"doc-{index}", Record(f"doc-{index}", "book", text, 40, None, (turn,), index, "made"), {"pairs": 1})
    writer.finish({"pairs": 4, "turns": 4})


def main() -> int:
    """As `python -m longpo_jax`, for the commands that a sweep starts, too."""
    sweep._MODULES["longpo"] = __spec__.name
    if sys.argv[1] != "sweep":
        from longpo_jax import pairs

        pairs.run_pairs = made_pairs
        with open(Path(sys.argv[-1]).parents[1] / "made.txt", "a") as file:
            file.write(f"{sys.argv[1]} {Path(sys.argv[-1]).stem}\n")
    return cli.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
