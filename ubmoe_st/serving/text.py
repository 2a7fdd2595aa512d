"""Tokens become text piece by piece: whole characters only, and nothing of what a stop text will cut off."""

from __future__ import annotations

from collections.abc import Sequence

from ubmoe_st.detokenization import IncrementalText

from .engine import Engine


class TextStream:
    """The text of one generation.

    Args:
        engine: Decodes, and knows end tokens.
        stops: Texts before which the new text ends.
    """

    def __init__(self, engine: Engine, stops: Sequence[str] = ()) -> None:
        self._engine = engine
        self._stops = [stop for stop in stops if stop]
        self._text = IncrementalText(engine.decode)
        self._held = ""
        self.tokens = 0
        self.finished = False

    def push(self, token: int) -> str:
        """What can be sent now that `token` is there. Sets `finished` after an end token or a stop text."""
        self.tokens += 1
        if self._engine.is_end(token):
            self.finished = True
            text = self._held + self._text.rest()
            self._held = ""
            return self._cut(text)[0]
        text, self.finished = self._cut(self._held + self._text.push(token))
        keep = 0 if self.finished else self._beginning_of_a_stop(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> str:
        """What was held back, when nothing more comes."""
        text, self._held = self._held + self._text.rest(), ""
        return self._cut(text)[0]

    def _cut(self, text: str) -> tuple[str, bool]:
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        return (text[: min(places)], True) if places else (text, False)

    def _beginning_of_a_stop(self, text: str) -> int:
        """How many characters at the end of `text` may be the beginning of a stop text."""
        return max(
            (
                size
                for stop in self._stops
                for size in range(1, min(len(stop), len(text) + 1))
                if text.endswith(stop[:size])
            ),
            default=0,
        )
