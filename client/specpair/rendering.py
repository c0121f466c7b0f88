"""How the command shows tokens, statistics and services."""

from __future__ import annotations

import contextlib
import math
import os
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from specpair.memory import MemoryPlan
from specpair.messages import ModelInfo
from specpair.results import Chunk, PositionExplanation, Result, Source, Stats
from specpair.visible import visible

__all__ = [
    "PLAIN",
    "STYLES",
    "StreamPrinter",
    "console",
    "decorated",
    "explanation_object",
    "explanation_table",
    "info_table",
    "legend",
    "plan_summary",
    "plan_table",
    "result_object",
    "status",
    "stderr",
    "stdout",
    "summary",
    "tally",
]

# See https://no-color.org; here nothing else that a terminal would interpret is written then either.
PLAIN = bool(os.environ.get("NO_COLOR"))
# Characters of a line where nobody looks at a screen.
_ENDLESS = 1_000_000


class _Console(Console):
    """Shows control characters in strings: names and messages come from services too."""

    def render_str(self, text: str, **how: Any) -> Text:  # noqa: ANN401 - rich's own
        return super().render_str(visible(text), **how)


def console(*, error: bool = False, soft_wrap: bool = True) -> Console:
    """A console for stdout or stderr that shows text as it is."""
    made = _Console(
        stderr=error,
        color_system=None if PLAIN else "auto",
        highlight=False,
        markup=False,
        emoji=False,
        soft_wrap=soft_wrap,
    )
    if soft_wrap and not made.is_terminal:  # a row of a table is a line, for whatever reads it
        made.width = _ENDLESS
    return made


stdout = console()
stderr = console(error=True)


def decorated(where: Console) -> bool:
    """Whether colours and lines that are redrawn in place are wanted there: on a terminal, without NO_COLOR."""
    return where.is_terminal and not PLAIN


@contextlib.contextmanager
def status(text: str) -> Iterator[Callable[[str], None]]:
    """What shows what is being done, inside the block, where somebody watches stderr."""
    if not decorated(stderr):
        yield lambda now: None
        return
    with stderr.status(Text(text)) as shown:  # in a string rich would look for markup
        yield lambda now: shown.update(Text(now))


STYLES = {
    Source.MODEL: Style(color="green"),
    Source.NGRAM: Style(color="cyan"),
    Source.PREDICTION: Style(color="magenta"),
    Source.TARGET: Style(),
}
_SHORT = {
    Source.MODEL: "draft model",
    Source.NGRAM: "prompt lookup",
    Source.PREDICTION: "prediction",
    Source.TARGET: "target",
}
_MEANING = {
    Source.MODEL: "proposed by the draft model, accepted",
    Source.NGRAM: "proposed by prompt lookup, accepted",
    Source.TARGET: "the target's own",
}


class StreamPrinter:
    """Prints chunks as they come: coloured by provenance on a terminal, plain text elsewhere."""

    def __init__(self, console: Console, *, ids: bool = False) -> None:
        self._console = console
        self._ids = ids
        self._first = True

    def show(self, chunk: Chunk) -> None:
        for token in chunk.tokens:
            text = token.text
            if self._ids:
                text, self._first = str(token.id) if self._first else f" {token.id}", False
            if decorated(self._console):
                self._console.print(Text(visible(text), STYLES[token.source]), end="")
            else:  # rich would replace tabs and other control characters
                self._console.file.write(visible(text) if self._console.is_terminal else text)
        self._console.file.flush()

    def end(self) -> None:
        self._console.file.write("\n")
        self._console.file.flush()


def legend() -> Text:
    """What the colours mean."""
    parts = [Text.assemble(("■ ", STYLES[source]), meaning) for source, meaning in _MEANING.items()]
    return Text("   ").join(parts)


def summary(stats: Stats) -> str:
    """One line about a generation."""
    line = f"{stats.output_tokens} tokens in {stats.seconds:.2f} s, {stats.tokens_per_second:.1f} tokens/s"
    if stats.proposed:
        line += (
            f"; {stats.rounds} rounds of {stats.tokens_per_round:.2f} tokens, "
            f"{stats.accepted} of {stats.proposed} proposals accepted ({stats.acceptance_rate:.0%})"
        )
    if stats.resumes:
        line += f"; target lost and resumed: {stats.resumes}"
    for change in stats.proposer_changes:
        line += f"; {change.proposer} from round {change.round}: {change.reason}"
    return line


def tally(stats: Stats) -> Text:
    """How a generation goes: tokens by who proposed them, in their colours, and the speed."""
    shown = Text(style="dim")
    for source, style in STYLES.items():
        own = (
            stats.output_tokens - stats.accepted if source is Source.TARGET else stats.accepted_by_source.get(source, 0)
        )
        if own:
            shown.append("■ ", style).append(f"{own} {_SHORT[source]}  ")
    if stats.proposed:
        shown.append(f"{stats.accepted} of {stats.proposed} proposals accepted ({stats.acceptance_rate:.0%})  ")
    return shown.append(f"{stats.tokens_per_second:.1f} tokens/s")


def result_object(result: Result) -> dict[str, object]:
    """A result as `--json` prints it."""
    stats = result.stats
    return {
        "text": result.text,
        "token_ids": list(result.token_ids),
        "sources": [str(token.source) for token in result.tokens],
        "prompt_tokens": stats.prompt_tokens,
        "finish_reason": str(result.finish_reason),
        "stop_string": result.stop_string,
        "logprobs": _logprobs(result),
        "stats": {
            "rounds": stats.rounds,
            "proposed": stats.proposed,
            "accepted": stats.accepted,
            "accepted_by_source": {str(source): count for source, count in stats.accepted_by_source.items()},
            "stale": stats.stale,
            "resumes": stats.resumes,
            "acceptance_rate": stats.acceptance_rate,
            "tokens_per_round": stats.tokens_per_round,
            "output_tokens": stats.output_tokens,
            "cached_tokens": stats.cached_tokens,
            "seconds": stats.seconds,
            "time_to_first_token": stats.time_to_first_token,
            "tokens_per_second": stats.tokens_per_second,
            "proposing_seconds": stats.proposing_seconds,
            "drafting_seconds": stats.drafting_seconds,
            "verifying_seconds": stats.verifying_seconds,
            "judging_seconds": stats.judging_seconds,
            "queued_seconds": stats.queued_seconds,
            "wire_seconds": stats.wire_seconds,
            "proposer": stats.proposer,
            "proposer_changes": [
                {"round": change.round, "proposer": change.proposer, "reason": change.reason}
                for change in stats.proposer_changes
            ],
        },
    }


def _logprobs(result: Result) -> list[dict[str, object]] | None:
    """One entry per token; None if they were not asked for."""
    known = [token.logprobs for token in result.tokens if token.logprobs is not None]
    return [
        {
            "logprob": _number(position.chosen),
            "top": [{"token_id": token_id, "logprob": _number(logprob)} for token_id, logprob in position.top],
        }
        for position in known
    ] or None


def explanation_object(explained: Sequence[PositionExplanation], texts: Mapping[int, str]) -> dict[str, object]:
    """An explanation as `--json` prints it."""
    return {
        "proposed": sum(one.proposed_token_id is not None for one in explained),
        "accepted": sum(one.accepted for one in explained),
        "positions": [
            {
                **asdict(one),
                "top2_margin": _number(one.top2_margin),
                "proposed_text": texts.get(one.proposed_token_id) if one.proposed_token_id is not None else None,
                "target_text": texts.get(one.target_token_id),
            }
            for one in explained
        ],
    }


def explanation_table(explained: Sequence[PositionExplanation], texts: Mapping[int, str]) -> Table:
    """One row per position; the reason, which begins with the verdict, in the verdict's colour."""
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("at", "proposed", "target's own", "target prob", "draft prob", "margin"):
        table.add_column(heading, justify="left" if heading in ("proposed", "target's own") else "right")
    table.add_column("verdict")
    accepted = sum(one.accepted for one in explained)
    for row, one in enumerate(explained):
        style = "green" if one.accepted else "red" if row == accepted < len(explained) - 1 else "dim"
        table.add_row(
            str(one.position),
            _token(one.proposed_token_id, texts) if one.proposed_token_id is not None else "",
            _token(one.target_token_id, texts),
            f"{one.target_prob:.4f}",
            f"{one.draft_prob:.4f}" if one.draft_prob is not None else "",
            f"{one.top2_margin:.3f}",
            Text(visible(one.reason), style),
        )
    return table


def _token(token_id: int, texts: Mapping[int, str]) -> str:
    return f"{token_id} {reprlib.repr(texts.get(token_id, ''))}"


def plan_summary(plan: MemoryPlan) -> str:
    """What the model is, and what the table assumes."""
    line = f"{plan.model}: {plan.architecture}, {plan.parameters / 1e9:.2f} billion parameters"
    line += f"; a slot holds {plan.max_length} positions"
    if plan.parallel > 1:
        line += f"; shared by {plan.parallel} processes, of which one takes this"
    return line + ("; a tenth of a GPU is left to activations and the framework" if plan.fits else "")


def plan_table(plan: MemoryPlan) -> Table:
    """One row per format: its weights, one KV slot, and the slots that fit beside the weights on each GPU."""
    table = Table("format")
    for column in ("weights GiB", "GB", "slot MiB", *(f"slots in {_size(memory)}" for memory in plan.fits)):
        table.add_column(column, justify="right")
    for one in plan.formats:
        slots = [str(fits[one.name]) for fits in plan.fits.values()]
        sizes = [f"{one.weights / 2**30:.2f}", f"{one.weights / 1e9:.2f}", f"{one.slot / 2**20:.1f}"]
        table.add_row(one.name, *sizes, *slots)
    return table


def _size(memory: int) -> str:
    """A memory size in the unit in which it is round."""
    return f"{memory / 1e9:g} GB" if memory % 10**6 == 0 or memory % 2**20 else f"{memory / 2**30:g} GiB"


def _number(value: float) -> float | None:
    """JSON knows no infinity."""
    return value if math.isfinite(value) else None


def info_table(target: ModelInfo, draft: ModelInfo | None) -> Table:
    """Both services side by side."""
    table = Table("", "target", *(["draft"] if draft else []))
    columns = [_facts(target), *([_facts(draft)] if draft else [])]
    for name in columns[0]:
        table.add_row(name, *(column[name] for column in columns))
    return table


def _facts(info: ModelInfo) -> dict[str, str]:
    fingerprint = info.fingerprint
    return {
        "model": info.model,
        "phase": f"{info.phase} {info.detail}".rstrip(),
        "architecture": info.architecture,
        "parameters": f"{info.parameters / 1e6:.1f} M" if info.parameters else "",
        "dtype": info.dtype,
        "quantization": info.quantization,
        "device": info.device,
        "attention": info.attn_implementation,
        "compiled": "yes" if info.compiled else "no",
        "verify width": str(info.verify_width or ""),
        "max length": str(info.max_length or ""),
        "processes": str(info.parallel or ""),
        "slots": f"{info.slots_in_use} of {info.slots} in use",
        "proposers": ", ".join(info.proposers),
        "vocabulary": f"{fingerprint.vocabulary_size} ({fingerprint.vocabulary_sha256[:12]})" if fingerprint else "",
        "identity": info.identity[:12],
        "version": info.version,
    }
