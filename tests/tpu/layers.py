# SPDX-License-Identifier: Apache-2.0
"""What a round runs for a layer, besides the products with weights: operations, and the compiler's cycles of them.

    python -m tests.tpu.layers llama31_8b_128k_v5p_2x2x1 v5p:2x2x1

One line for each loop over layers that attends: the drafter's, then the target's. The cycles are XLA's estimate, some
2,100 for the smallest operation; kernels and transfers have none.
"""

import argparse
import re

from rapid_jax.config import RapidConfig
from rapid_jax.plan.architectures import architecture_of
from rapid_jax.plan.hlo import Instruction, parse
from rapid_jax.plan.programs import programs_of
from rapid_jax.plan.topologies import topology_of
from rapid_jax.runtime import settings
from tests.tpu.heads import CONFIGS

QUIET = ("parameter", "tuple", "get-tuple-element", "bitcast", "constant", "reshape", "partition-id")


def loops_over_layers(text: str) -> list[list[Instruction]]:
    """What runs in each loop whose body has a kernel, without what only names things."""
    computations, entry = parse(text)
    bodies = [found for name, found in computations.items() if name != entry and any(map(is_kernel, found))]
    return [
        [item for item in body if item.opcode not in QUIET and not item.opcode.endswith("-done")] for body in bodies
    ]


def is_kernel(item: Instruction) -> bool:
    """Whether it is one of Pallas's."""
    return 'custom_call_target="tpu_custom_call"' in item.rest


def small(layer: list[Instruction]) -> list[int]:
    """The cycles of each operation that has any, without products with weights."""
    weights = re.compile(r'op_name="[^"]*(DJ->BTJ|branch_0_fun)/dot_general"')
    found = [re.search(r'"estimated_cycles":"(\d+)"', item.rest) for item in layer if not weights.search(item.rest)]
    return [int(cycles[1]) for cycles in found if cycles and int(cycles[1])]


def main() -> None:
    """A line for each loop over layers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("topology")
    options = parser.parse_args()
    config = settings.load(RapidConfig, CONFIGS / "rapid" / f"{options.config}.yaml", [])
    devices, longest = topology_of(options.topology).devices, config.models.max_context
    assert longest is not None
    programs = programs_of(config, devices, architecture_of(config.models.target, None), None, longest)
    (text,) = (program.lower().compile().as_text() for program in programs if program.name == "round")
    for layer in loops_over_layers(text):
        cycles = small(layer)
        print(f"{len(layer)} operations; {len(cycles)} small ones: {sum(cycles)} cycles")


if __name__ == "__main__":
    main()
