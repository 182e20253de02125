# SPDX-License-Identifier: Apache-2.0
"""An answer as a page that shows where every token came from: one HTML file, nothing loaded from elsewhere."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rapid_jax.answer import Answer
from rapid_jax.config import RapidConfig
from rapid_jax.model.tokenizer import Tokenizer
from rapid_jax.retrieval.select import Selection
from rapid_jax.runtime import settings
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.files import replace_file
from rapid_jax.runtime.templates import render
from rapid_jax.speculative.state import Origin

_KINDS = {
    Origin.LOOKUP: ("lookup", "copied from text already read (prompt lookup), then accepted"),
    Origin.DRAFT: ("draft", "drawn by the drafter, accepted by the target"),
    Origin.CORRECTION: ("correction", "drawn in place of a rejected draft"),
    Origin.BONUS: ("bonus", "drawn from the target: after a full accept, or nothing was drafted"),
}


@dataclass(frozen=True)
class Piece:
    """Neighbouring tokens that only together are whole characters."""

    first: int  # position in the answer
    token_ids: tuple[int, ...]
    text: str  # empty where the tokens are special ones, which no text shows

    @property
    def last(self) -> int:
        """Position of the last token."""
        return self.first + len(self.token_ids) - 1


def pieces(token_ids: list[int], tokenizer: Tokenizer) -> list[Piece]:
    """The tokens grouped into the fewest pieces that each have text of their own; the texts join to the decoded whole.

    A special token is a piece alone, unless the tokens before it are still waiting for the rest of a character.
    """
    stream, waiting, found = tokenizer.stream(), [], []
    for position, token_id in enumerate(token_ids):
        waiting.append(token_id)
        text = stream.push([token_id])
        if text or (len(waiting) == 1 and token_id in tokenizer.special_ids):
            found.append(Piece(position - len(waiting) + 1, tuple(waiting), text))
            waiting = []
    rest = stream.finish()
    if waiting:
        found.append(Piece(len(token_ids) - len(waiting), tuple(waiting), rest))
    return found


def write_trace(path: Path, answer: Answer, tokenizer: Tokenizer, question: str, config: RapidConfig) -> None:
    """Writes the page, whole or not at all: the answer's tokens by origin, the retrieved chunks, times and settings.

    `tokenizer` is the target's. Raises InputError if the file cannot be written.
    """
    page = _page(answer, tokenizer, question, config)
    try:
        with replace_file(path) as temporary:
            temporary.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: the trace cannot be written: {error.strerror}") from error


def _page(answer: Answer, tokenizer: Tokenizer, question: str, config: RapidConfig) -> str:
    chosen = answer.selection
    return render(
        "rapid_jax",
        "trace.html",
        title=f"RAPID: {question[:80]}",
        question=question,
        spans=_spans(answer, tokenizer),
        origins=_origins(answer),
        figures=_figures(answer),
        selection=chosen,
        reader="target" if answer.mode == "retrieval" else "drafter",
        chunks=_chunks(chosen) if chosen else [],
        settings=settings.dump(config),
    )


def _spans(answer: Answer, tokenizer: Tokenizer) -> Iterator[dict[str, str]]:
    """One a piece: its origin, its tokens, the text that was kept and what a stop text cut off."""
    room = len(answer.text)
    for piece in pieces(answer.token_ids, tokenizer):
        names = [_KINDS[Origin(origin)][0] for origin in answer.origins[piece.first : piece.last + 1]]
        numbered = enumerate(zip(piece.token_ids, names, strict=True), piece.first)
        kept, cut = piece.text[:room], piece.text[room:]
        room -= len(kept)
        yield {
            "kind": names[-1],  # a piece is as the token that completed it
            "title": "\n".join(f"token {token_id}, position {at}, {name}" for at, (token_id, name) in numbered),
            "kept": kept,
            "cut": cut,
            "special": "" if piece.text else "".join(tokenizer.token_of(t) or "" for t in piece.token_ids),
        }


def _origins(answer: Answer) -> list[dict[str, Any]]:
    """How many tokens came from where, in the order of the legend."""
    counts = Counter(answer.origins)
    total = max(len(answer.origins), 1)
    return [
        {"name": name, "meaning": meaning, "count": counts[origin], "share": f"{counts[origin] / total:.0%}"}
        for origin, (name, meaning) in _KINDS.items()
    ]


def _figures(answer: Answer) -> list[tuple[str, str]]:
    acceptance, seconds = answer.acceptance_rate, answer.seconds
    reused = " (the document was not prefilled anew)" if answer.prefix_reused else ""
    return [
        ("mode", f"{answer.mode}, eta {answer.eta:g}, gamma {answer.gamma}"),
        ("speed", f"{answer.tokens_per_second:.1f} tokens/s while decoding"),
        ("drafts accepted", "none drafted" if acceptance is None else f"{acceptance:.0%}"),
        ("tokens a round", f"{answer.tokens_per_round:.2f} in {answer.generation.target_steps} rounds"),
        ("ended by", answer.finish_reason),
        ("sampling", str(answer.sampling or "")),
        ("prompt of the target", f"{answer.target_tokens} tokens, of a document of {answer.document_tokens}"),
        ("prompt of the drafter", f"{answer.draft_tokens} tokens"),
        *([("loading", f"{seconds['load']:.1f} s")] if "load" in seconds else []),  # of a first answer
        ("retrieval", f"{seconds['retrieval']:.1f} s"),
        ("prefill", f"{seconds['prefill']:.1f} s{reused}"),
        ("compiling programs", f"{seconds['compile']:.1f} s"),
        ("decoding", f"{seconds['decode']:.1f} s"),
    ]


def _chunks(chosen: Selection) -> Iterator[dict[str, Any]]:
    for chunk, score in zip(chosen.chunks, chosen.scores, strict=True):
        yield {
            "score": f"{score:.3f}",
            "start": chunk.start,
            "end": chunk.end,
            "tokens": chunk.tokens,
            "begins": " ".join(chunk.text.split())[:60],
            "text": chunk.text.strip(),
        }
