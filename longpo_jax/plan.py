# SPDX-License-Identifier: Apache-2.0
"""`longpo plan`: what a training step needs of a TPU slice, before one is rented."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `plan`."""


def run(options: argparse.Namespace) -> int:
    """Prints the plan."""
    return 0
