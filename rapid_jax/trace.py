# SPDX-License-Identifier: Apache-2.0
"""An answer as a page that shows where every token came from: one HTML file, nothing loaded from elsewhere."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path

from rapid_jax.answer import Answer
from rapid_jax.config import RapidConfig
from rapid_jax.model.tokenizer import Tokenizer
from rapid_jax.runtime import settings
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.files import replace_file
from rapid_jax.speculative.state import Origin

_KINDS = {
    Origin.LOOKUP: ("lookup", "copied from text already read (level 0), then accepted"),
    Origin.DRAFT: ("draft", "drawn by the drafter, accepted by the target"),
    Origin.CORRECTION: ("correction", "drawn in place of a rejected draft"),
    Origin.BONUS: ("bonus", "drawn from the target: after a full accept, or nothing was drafted"),
}
# Also of the page that `rapid serve` shows. Underlines repeat what the colours say; each text colour has a contrast of
# at least 7 with its background.
STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1a1a1a; --faint: #595959; --line: #c8c8c8; --box: #f6f6f6;
  --lookup: #d3ecd5; --draft: #d4e4fb; --correction: #ffd9c7; --bonus: #ece5f6; }
@media (prefers-color-scheme: dark) { :root { --page: #16181b; --ink: #ececec; --faint: #b0b0b0; --line: #44474c;
  --box: #1f2226; --lookup: #1d4526; --draft: #1c3c66; --correction: #6b2f12; --bonus: #423159; } }
body { background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; margin: 0 auto;
  max-width: 78rem; padding: 1.5rem; }
h1 { font-size: 1.3rem; } h2 { font-size: 1.05rem; margin: 1.6rem 0 .5rem; }
main { display: grid; gap: 2rem; grid-template-columns: minmax(0, 3fr) minmax(0, 2fr); }
@media (max-width: 60rem) { main { grid-template-columns: minmax(0, 1fr); } }
.answer, pre { background: var(--box); border: 1px solid var(--line); border-radius: 6px; overflow-wrap: anywhere;
  padding: .8rem 1rem; white-space: pre-wrap; }
.answer { font-size: 1.05rem; line-height: 1.9; } pre { font-size: .85rem; margin: .4rem 0 0; }
.lookup { background: var(--lookup); border-bottom: 3px double; }
.draft { background: var(--draft); border-bottom: 1px solid; }
.correction { background: var(--correction); border-bottom: 3px solid; }
.bonus { background: var(--bonus); border-bottom: 2px dotted; }
.answer span { border-radius: 2px; padding: .1em 0; } .answer span + span { margin-left: 1px; }
.cut { opacity: .75; text-decoration: line-through; } .special { font-family: monospace; font-size: .8em; }
table { border-collapse: collapse; } th { font-weight: 500; text-align: left; }
td, th { border-top: 1px solid var(--line); padding: .25rem 1.2rem .25rem 0; vertical-align: top; }
td.number { font-variant-numeric: tabular-nums; text-align: right; } .swatch { padding: 0 .6em; }
.faint { color: var(--faint); } summary { cursor: pointer; padding: .2rem 0; }
"""


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
    body = "".join(_spans(answer, tokenizer))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>RAPID: {escape(question[:80])}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{escape(question)}</h1>
<main>
<section>
<h2>Answer</h2>
<div class="answer">{body}</div>
{_legend(answer)}
<h2>What it took</h2>
{_table(_figures(answer))}
</section>
<section>
{_retrieved(answer)}
<details><summary>Settings</summary><pre>{escape(settings.dump(config))}</pre></details>
</section>
</main>
</body>
</html>
"""


def _spans(answer: Answer, tokenizer: Tokenizer) -> Iterator[str]:
    """One coloured span a piece; what a stop text cut off the answer is struck through."""
    room = len(answer.text)
    for piece in pieces(answer.token_ids, tokenizer):
        names = [_KINDS[Origin(origin)][0] for origin in answer.origins[piece.first : piece.last + 1]]
        numbered = enumerate(zip(piece.token_ids, names, strict=True), piece.first)
        title = escape("\n".join(f"token {token_id}, position {at}, {name}" for at, (token_id, name) in numbered))
        kept, cut = piece.text[:room], piece.text[room:]
        room -= len(kept)
        inner = escape(kept) + (f'<s class="cut">{escape(cut)}</s>' if cut else "")
        if not piece.text:
            spelt = "".join(tokenizer.token_of(token_id) or "" for token_id in piece.token_ids)
            inner = f'<span class="special">{escape(spelt)}</span>'
        # A piece is as the token that completed it.
        yield f'<span class="{names[-1]}" title="{title}">{inner}</span>'


def _legend(answer: Answer) -> str:
    counts = Counter(answer.origins)
    rows = []
    for origin, (name, meaning) in _KINDS.items():
        share = counts[origin] / max(len(answer.origins), 1)
        rows.append(
            f'<tr><th><span class="swatch {name}">{name}</span></th><td class="number">{counts[origin]}</td>'
            f'<td class="number">{share:.0%}</td><td class="faint">{meaning}</td></tr>'
        )
    return f"<h2>Where its {len(answer.origins)} tokens came from</h2>\n<table>{''.join(rows)}</table>"


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


def _table(rows: list[tuple[str, str]]) -> str:
    return (
        f"<table>{''.join(f'<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>' for name, text in rows)}</table>"
    )


def _retrieved(answer: Answer) -> str:
    chosen = answer.selection
    if chosen is None:
        return "<h2>Retrieved</h2>\n<p>Nothing: mode target reads the document alone.</p>"
    reader = "target" if answer.mode == "retrieval" else "drafter"
    note = " None reached the threshold; the best one was kept." if chosen.fallback else ""
    head = (
        f"<h2>Retrieved: {chosen.kept} of {chosen.considered} chunks, {chosen.tokens} tokens</h2>\n"
        f'<p class="faint">What the {reader} reads. Offsets are characters of the text that the target reads.{note}</p>'
    )
    items = [
        f"<details><summary>{score:.3f} &middot; characters {chunk.start}&ndash;{chunk.end} &middot; "
        f'{chunk.tokens} tokens <span class="faint">{escape(" ".join(chunk.text.split())[:60])}</span></summary>'
        f"<pre>{escape(chunk.text.strip())}</pre></details>"
        for chunk, score in zip(chosen.chunks, chosen.scores, strict=True)
    ]
    return head + "\n".join(items)
