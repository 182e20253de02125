# SPDX-License-Identifier: Apache-2.0
"""What the commands tell about an answer on standard error."""

from rapid_jax.answer import Answer
from rapid_jax.config import RapidConfig
from rapid_jax.retrieval.select import Selection
from rapid_jax.runtime.command_line import say


def tell_retrieved(selection: Selection) -> None:
    """What was retrieved, a line a chunk."""
    note = "; none reached the threshold, the best one is kept" if selection.fallback else ""
    say(
        f"retrieved {selection.kept} of {selection.considered} chunks, {selection.tokens} tokens, "
        f"in {selection.seconds:.1f} s{note}"
    )
    for chunk, score in zip(selection.chunks, selection.scores, strict=True):
        say(f"  {score:.3f}  [{chunk.start}:{chunk.end}]  {' '.join(chunk.text.split())[:70]}")


def tell_summary(answer: Answer, config: RapidConfig) -> None:
    """How an answer came about, in full, behind an empty line."""
    seconds = answer.seconds
    say("")
    if answer.truncated:
        say(cut(answer, config))
    say(line(answer))
    if answer.sampling is not None:
        say(f"sampling: {answer.sampling}")
    reused = "prefill (document reused)" if answer.prefix_reused else "prefill"
    say(
        f"seconds: load {seconds['load']:.1f}, retrieval {seconds['retrieval']:.1f}, "
        f"{reused} {seconds['prefill']:.1f}, compile {seconds['compile']:.1f}, decode {seconds['decode']:.1f}"
    )


def cut(answer: Answer, config: RapidConfig) -> str:
    """A line about a document that was cut."""
    read = f" to fit a prompt of {answer.target_tokens}" if answer.mode != "retrieval" else ""
    return (
        f"the document has {answer.document_tokens} tokens and was cut (models.too_long = "
        f"{config.models.too_long}){read}"
    )


def line(answer: Answer) -> str:
    """How an answer came about, in a line."""
    acceptance = answer.acceptance_rate
    accepted = "" if acceptance is None else f", {acceptance:.0%} of the drafts accepted"
    lossy = f"; lossy: {', '.join(answer.lossy)}" if answer.lossy else ""
    return (
        f"{answer.mode}, eta {answer.eta:g}, gamma {answer.gamma}: {len(answer.token_ids)} tokens "
        f"({answer.finish_reason}) at {answer.tokens_per_second:.1f} tokens/s, "
        f"{answer.tokens_per_round:.2f} a round{accepted}{lossy}"
    )
