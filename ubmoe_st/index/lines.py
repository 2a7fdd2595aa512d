"""Lines of a .csv or .tsv file, of which a row may take several: read in order, once more, or passed over."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import BinaryIO


class LargeLine(Exception):
    """A line that is larger than a row may be: in its place where it was not kept, raised where it is read.

    Args:
        size: Its bytes.
        quotes: Quotes in it.
    """

    def __init__(self, size: int, quotes: int) -> None:
        super().__init__(size, quotes)
        self.size, self.quotes = size, quotes


class Lines:
    """Lines of which those of a record that is none, but for its first one, can be read once more.

    Args:
        stream: The file.
        limit: Bytes of a line that is kept; a larger one is passed over without loading it.
    """

    def __init__(self, stream: BinaryIO, limit: int) -> None:
        self._lines, self._again = self._read_lines(stream, limit), deque[str]()
        self._record: list[str] = []
        self._read = 0

    @staticmethod
    def _read_lines(stream: BinaryIO, limit: int) -> Iterator[str | LargeLine]:
        codec = "utf-8-sig"
        while line := stream.readline(limit + 1):
            if len(line) > limit:
                size, quotes = len(line), line.count(b'"')
                while not line.endswith(b"\n") and (line := stream.readline(1 << 20)):
                    size, quotes = size + len(line), quotes + line.count(b'"')
                yield LargeLine(size, quotes)
            else:
                yield line.decode(codec, errors="surrogateescape")
            codec = "utf-8"

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else next(self._lines)
        if isinstance(line, LargeLine):
            raise line
        self._record.append(line)
        return line

    def begin(self) -> int:
        """A record begins; how many lines are before it."""
        self._read += len(self._record)
        self._record.clear()
        return self._read

    def only_first(self) -> None:
        """An open quote has swallowed the lines behind the first one of the record: they are lines of their own."""
        self._again.extendleft(reversed(self._record[1:]))
        del self._record[1:]

    def pass_over(self, large: LargeLine) -> tuple[int, int | None]:
        """Leave out what is left of a record with a large line, up to the line that closes as many quotes as are open.

        Returns:
            The numbers of the large line and of the last one; None where the record has no end.
        """
        quotes = sum(line.count('"') for line in self._record) + large.quotes
        self._record.append("")
        number = self._read + len(self._record)
        while quotes % 2:
            line = self._again.popleft() if self._again else next(self._lines, None)
            if line is None:
                return number, None
            quotes += line.quotes if isinstance(line, LargeLine) else line.count('"')
            self._record.append("")
        return number, self._read + len(self._record)
