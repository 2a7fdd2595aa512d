"""Tokens that come one by one become text piece by piece."""

from __future__ import annotations

from collections.abc import Callable

_BROKEN = "\N{REPLACEMENT CHARACTER}"
_HELD_TOKENS = 8
"""A character has at most four bytes, so at most four tokens; a text that stays broken for longer is broken."""


class IncrementalText:
    """The text of tokens that come one by one, in whole characters; the pieces joined are the text of all tokens.

    Args:
        decode: Text of tokens.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        # Tokens from `_context` are decoded together, those from `_said` are new: the space before a word depends on
        # what stands before it.
        self._context = self._said = 0

    def push(self, token: int) -> str:
        """The text that is whole now that `token` is there, and was not before."""
        self._ids.append(token)
        return self._new_text()

    def rest(self) -> str:
        """What was held back, when nothing more comes."""
        return self._new_text(whole=True)

    def _new_text(self, whole: bool = False) -> str:
        before = self._decode(self._ids[self._context : self._said])
        now = self._decode(self._ids[self._context :])
        if now.endswith(_BROKEN) and not whole and len(self._ids) - self._said < _HELD_TOKENS:
            return ""
        if len(now) > len(before):
            # A special token has no text: alone it would be no context.
            self._context = self._said
        self._said = len(self._ids)
        return now[len(before) :]
