"""Text for a terminal: what would control it is shown in place of being obeyed."""

from __future__ import annotations

__all__ = ["visible"]

# All control characters but tab and newline: pictures of them, or, behind ASCII, the sign for what cannot be shown.
_CONTROLS = {
    **{code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n"},
    **dict.fromkeys(range(0x80, 0xA0), "\N{REPLACEMENT CHARACTER}"),
    0x7F: "\N{SYMBOL FOR DELETE}",
}


def visible(text: str) -> str:
    """The text with a sign in the place of each control character. Whoever wrote it may be a model, or a peer."""
    return text.translate(_CONTROLS)
