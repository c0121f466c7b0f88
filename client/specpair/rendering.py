"""How the command shows tokens, statistics and services."""

from __future__ import annotations

from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from specpair.messages import ModelInfo
from specpair.results import Chunk, Result, Source, Stats

__all__ = ["StreamPrinter", "info_table", "legend", "result_object", "stderr", "stdout", "summary"]

stdout = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
stderr = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)

_STYLES = {
    Source.MODEL: Style(color="green"),
    Source.NGRAM: Style(color="cyan"),
    Source.PREDICTION: Style(color="magenta"),
    Source.TARGET: Style(),
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
            if self._console.is_terminal:
                self._console.print(Text(text, _STYLES[token.source]), end="")
            else:
                self._console.file.write(text)  # rich would replace tabs and other control characters
        self._console.file.flush()

    def end(self) -> None:
        self._console.file.write("\n")
        self._console.file.flush()


def legend() -> Text:
    """What the colours mean."""
    parts = [Text.assemble(("■ ", _STYLES[source]), meaning) for source, meaning in _MEANING.items()]
    return Text("   ").join(parts)


def summary(stats: Stats) -> str:
    """One line about a generation."""
    line = f"{stats.output_tokens} tokens in {stats.seconds:.2f} s, {stats.tokens_per_second:.1f} tokens/s"
    if stats.proposed:
        line += (
            f"; {stats.rounds} rounds of {stats.tokens_per_round:.2f} tokens, "
            f"{stats.accepted} of {stats.proposed} proposals accepted ({stats.acceptance_rate:.0%})"
        )
    for change in stats.proposer_changes:
        line += f"; {change.proposer} from round {change.round}: {change.reason}"
    return line


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
        "stats": {
            "rounds": stats.rounds,
            "proposed": stats.proposed,
            "accepted": stats.accepted,
            "accepted_by_source": {str(source): count for source, count in stats.accepted_by_source.items()},
            "stale": stats.stale,
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
            "queued_seconds": stats.queued_seconds,
            "wire_seconds": stats.wire_seconds,
            "proposer": stats.proposer,
            "proposer_changes": [
                {"round": change.round, "proposer": change.proposer, "reason": change.reason}
                for change in stats.proposer_changes
            ],
        },
    }


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
        "slots": f"{info.slots_in_use} of {info.slots} in use",
        "proposers": ", ".join(info.proposers),
        "vocabulary": f"{fingerprint.vocabulary_size} ({fingerprint.vocabulary_sha256[:12]})" if fingerprint else "",
        "version": info.version,
    }
