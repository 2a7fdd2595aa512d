"""Corpora: jsonl(.gz), csv, tsv, parquet, text folders, datasets and iterators become a stream of documents.

Every reader is lazy and remembers where each row stood, so that a bad row is reported with its line number. What is
read never depends on how much memory there is: a row larger than `max_row_bytes` is skipped over, not loaded.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import logging
import numbers
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO
from uuid import UUID

import numpy as np

from .lines import LargeLine, Lines

TEXT_SUFFIXES = (".txt", ".md", ".rst")
ROW_SUFFIXES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".csv", ".tsv", ".csv.gz", ".tsv.gz", ".parquet")

logger = logging.getLogger(__name__)
_quoted = json.encoder.encode_basestring_ascii
_decoded = json.JSONDecoder().decode
_OTHER_FILES = {
    b"\xff\xfe": "UTF-16: write it as UTF-8",
    b"\xfe\xff": "UTF-16: write it as UTF-8",
    b"\x1f\x8b": "compressed: name it .gz",
}
"""First bytes of files that are not what their names say."""

PARQUET_BYTES = 4 << 20
"""Rows of a Parquet file decoded at a time, in bytes by the file's own count."""


class CorpusError(ValueError):
    """A corpus, or a row of it, that cannot be indexed."""


class CorpusChangedError(CorpusError):
    """A corpus that is not the one an unfinished build began with."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be indexed."""

    place: str
    """Where it is: `corpus.jsonl line 17`, `row 3`."""
    reason: str
    """What is wrong with it and what was expected."""

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


@dataclass(slots=True)
class Document:
    """One good row of a corpus."""

    place: str
    id: str
    text: str
    title: str | None
    metadata: str | None
    """The other fields of the row, as JSON with sorted keys."""

    def digest_bytes(self) -> bytes:
        """What makes this row this row: used to notice that a corpus changed."""
        # The bytes of `json.dumps` of the four as a list, in a third of its time.
        title = "null" if self.title is None else _quoted(self.title)
        metadata = "null" if self.metadata is None else _quoted(self.metadata)
        return f"[{_quoted(self.id)}, {title}, {_quoted(self.text)}, {metadata}]".encode()


@dataclass(frozen=True)
class CorpusFields:
    """Where in a row the parts of a document are, and what is refused."""

    id: str | None = "id"
    """Field that holds the id. None: rows are numbered, on from those of the corpora before."""
    text: str = "text"
    """Field that holds the text."""
    title: str | None = "title"
    """Field that holds the title, absent or null in rows that have none."""
    metadata: tuple[str, ...] | None = None
    """Fields kept for filters and results. None: every other field of the row."""
    max_row_bytes: int = 4 << 20
    """A larger row is a bad row, in bytes of the file."""

    @classmethod
    def of(cls, values: dict[str, Any]) -> CorpusFields:
        """From `as_dict`."""
        return cls(**values | {"metadata": None if values["metadata"] is None else tuple(values["metadata"])})

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"metadata": None if self.metadata is None else list(self.metadata)}


@dataclass
class Corpus:
    """A corpus that can be read from its start: iterating yields `Document` and `BadRow` in a fixed order."""

    source: Any
    fields: CorpusFields = field(default_factory=CorpusFields)
    first_number: int = 0
    """What the first row is called where rows have no ids of their own."""

    def __post_init__(self) -> None:
        self._read = 0
        self._told = False
        self._total: int | None = None
        self._counted: Any = None
        if isinstance(self.source, os.PathLike):
            self.source = os.fspath(self.source)
        if isinstance(self.source, str) and not self.source.startswith("hf:") and not Path(self.source).exists():
            raise FileNotFoundError(f"corpus {self.source} does not exist: give a file, a folder, hf:NAME or rows")
        if hasattr(self.source, "columns"):
            raise TypeError(
                f"a corpus is a path or an iterable of rows, got a {type(self.source).__name__}, which iterates over "
                "columns: give its rows, with to_dict('records') of pandas or iter_rows(named=True) of polars"
            )
        if isinstance(self.source, io.IOBase):
            raise TypeError("a corpus is a path or an iterable of rows, got an open file: give its path")
        if isinstance(self.source, (bytes, Mapping)) or not (
            isinstance(self.source, str) or isinstance(self.source, Iterable)
        ):
            raise TypeError(f"a corpus is a path or an iterable of rows, got {type(self.source).__name__}")

    @property
    def repeatable(self) -> bool:
        """Whether it can be read more than once: not so for a generator."""
        return isinstance(self.source, str) or iter(self.source) is not self.source

    @property
    def name(self) -> str:
        """The file or folder name, or the type of the rows' container."""
        return Path(self.source).name if isinstance(self.source, str) else type(self.source).__name__

    @property
    def fraction(self) -> float | None:
        """How much of the corpus has been read, 0 to 1; None where that is unknown."""
        if not self._total:
            return None
        read = self._counted.tell() if self._counted is not None and not self._counted.closed else 0
        return min(1.0, (self._read + read) / self._total)

    def __iter__(self) -> Iterator[Document | BadRow]:
        self._read, self._counted = 0, None
        unseen = set(self.fields.metadata or ()) | ({self.fields.title} - {None, CorpusFields.title})
        number: int | None = None
        for number, (place, row) in enumerate(self._rows(), self.first_number):
            if unseen and isinstance(row, Mapping):
                unseen.difference_update(row)
            yield row if isinstance(row, BadRow) else self._document(place, row, number)
        if unseen and number is not None and not self._told:
            self._told = True
            names = ", ".join(sorted(map(repr, unseen)))
            logger.warning("%s: no row has the field %s, which was asked for as title or metadata", self.name, names)

    def _rows(self) -> Iterator[tuple[str, Any]]:
        """Pairs of a place and a mapping, a string or a `BadRow`."""
        if not isinstance(self.source, str):
            self._total = len(self.source) if hasattr(self.source, "__len__") else None
            for number, row in enumerate(self.source):
                self._read = number + 1
                yield f"row {number}", row
        elif self.source.startswith("hf:"):
            name, _, split = self.source[3:].partition("#")
            import datasets

            self._total = None
            for number, row in enumerate(datasets.load_dataset(name, split=split or "train", streaming=True)):
                yield f"{name} row {number}", row
        else:
            yield from self._files(Path(self.source))

    def _files(self, path: Path) -> Iterator[tuple[str, Any]]:
        if path.is_dir():
            if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
                import datasets

                dataset = datasets.load_from_disk(str(path))
                self._total = len(dataset)
                for number, row in enumerate(dataset):
                    self._read = number + 1
                    yield f"{path.name} row {number}", row
                return
            files = self._files_of(path)
            if not files:
                raise CorpusError(f"folder {path} holds no {', '.join(ROW_SUFFIXES + TEXT_SUFFIXES)} file")
        else:
            files = [path]
        self._total = sum(file.stat().st_size for file in files)
        for file in files:
            name = file.name if file == path else file.relative_to(path).as_posix()
            if file.name.lower().endswith(ROW_SUFFIXES):
                yield from self._row_file(file, name)
            elif file.name.lower().endswith(TEXT_SUFFIXES):
                yield name, self._text_file(file, name)
            else:
                raise CorpusError(
                    f"{file} is of no known kind: expected {', '.join(ROW_SUFFIXES)}, or a folder with "
                    f"{', '.join(TEXT_SUFFIXES)} files"
                )
            self._counted = None
            self._read += file.stat().st_size

    @staticmethod
    def _files_of(folder: Path) -> list[Path]:
        """The files of a folder that are read, sorted; hidden ones are not, and of other kinds a warning tells."""
        visible = [
            path
            for path in folder.rglob("*")
            if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        ]
        files = sorted(path for path in visible if path.name.lower().endswith(ROW_SUFFIXES + TEXT_SUFFIXES))
        others = Counter(path.suffix or path.name for path in visible) - Counter(path.suffix for path in files)
        if files and others:
            counts = ", ".join(f"{number} {suffix}" for suffix, number in others.most_common(5))
            logger.warning("%s: %d files are of no known kind and left out (%s)", folder, others.total(), counts)
        return files

    def _text_file(self, file: Path, name: str) -> Any:
        if file.stat().st_size > self.fields.max_row_bytes:
            return BadRow(name, self._too_large(file.stat().st_size))
        try:
            text = file.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            return BadRow(name, f"is not valid UTF-8 ({error.reason} at byte {error.start})")
        row = {self.fields.text: text}
        if self.fields.id is not None:
            row[self.fields.id] = name
        return row

    def _row_file(self, file: Path, name: str) -> Iterator[tuple[str, Any]]:
        if file.name.lower().endswith(".parquet"):
            yield from self._parquet(file, name)
            return
        with file.open("rb") as raw:
            self._counted = raw
            packed = file.name.lower().endswith(".gz")
            if not packed and (other := _OTHER_FILES.get(raw.read(2))):
                raise CorpusError(f"{name} is {other}")
            raw.seek(0)
            stream: Any = gzip.open(raw, "rb") if packed else raw
            stem = file.name.lower().removesuffix(".gz")
            try:
                if stem.endswith((".csv", ".tsv")):
                    yield from self._csv(stream, name, "\t" if stem.endswith(".tsv") else ",")
                else:
                    yield from self._jsonl(stream, name)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise CorpusError(
                    f"{name} cannot be decompressed to its end ({error}): it is truncated or damaged"
                ) from error

    def _lines(self, stream: BinaryIO, name: str) -> Iterator[tuple[str, str | BadRow]]:
        """Lines with their place; blank ones are left out, a huge one is passed over without loading it."""
        limit = self.fields.max_row_bytes
        number = 0
        while line := stream.readline(limit + 1):
            number += 1
            place = f"{name} line {number}"
            if len(line) > limit and not line.endswith(b"\n"):
                size = len(line)
                while not line.endswith(b"\n") and (line := stream.readline(1 << 20)):
                    size += len(line)
                yield place, BadRow(place, self._too_large(size))
                continue
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                yield place, line.decode("utf-8")
            except UnicodeDecodeError as error:
                reason = f"is not valid UTF-8 ({error.reason} at byte {error.start} of the line)"
                yield place, BadRow(place, reason)

    def _too_large(self, size: int) -> str:
        return (
            f"has {size:,} bytes, more than max_row_bytes={self.fields.max_row_bytes:,}: split it, or raise the limit "
            "and cut it into chunks with chunk_tokens"
        )

    def _jsonl(self, stream: BinaryIO, name: str) -> Iterator[tuple[str, Any]]:
        for place, line in self._lines(stream, name):
            if isinstance(line, BadRow):
                yield place, line
                continue
            try:
                yield place, _decoded(line)
            except (ValueError, RecursionError) as error:  # also numbers of too many digits
                yield place, BadRow(place, f"is not JSON ({error})")

    def _csv(self, stream: BinaryIO, name: str, delimiter: str) -> Iterator[tuple[str, Any]]:
        csv.field_size_limit(max(csv.field_size_limit(), self.fields.max_row_bytes))
        limit = self.fields.max_row_bytes

        lines = Lines(stream, limit)
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            header = next(reader, None)
        except LargeLine as error:
            raise CorpusError(
                f"{name} line 1 has {error.size:,} bytes, more than max_row_bytes={limit:,}, or the file has no line "
                "breaks; raise the limit, or write the file as jsonl"
            ) from None
        except csv.Error as error:
            raise CorpusError(f"{name} line 1: the header is not a {name.rsplit('.', 1)[-1]} row ({error})") from error
        if header is None:
            return
        if self.fields.text not in header:
            raise CorpusError(
                f"{name} has no column {self.fields.text!r}, its header is {header}: name the text column"
            )
        if len(set(header)) != len(header):
            raise CorpusError(f"{name} has columns of the same name, its header is {header}: rename them")
        while True:
            place = f"{name} line {lines.begin() + 1}"
            try:
                values = next(reader)
            except StopIteration:
                return
            except LargeLine as error:
                number, end = lines.pass_over(error)
                said = f"line {number} has more than max_row_bytes={limit:,} bytes ({error.size:,})"
                if end is None:
                    raise CorpusError(
                        f"{place}: {said}, and a quote that is open there does not end: close it, or write the file "
                        "as jsonl"
                    ) from None
                so_far = f"; the row ends in line {end}" if end > number else ""
                yield place, BadRow(place, f"{said}{so_far}: split it, or raise the limit")
                continue
            except csv.Error as error:
                lines.only_first()
                yield place, BadRow(place, f"is not a {name.rsplit('.', 1)[-1]} row ({error})")
                continue
            if not values:
                continue
            if delimiter == "\t" and any("\n" in one and ("\t" in one or len(header) == 1) for one in values):
                lines.only_first()
                reason = (
                    "it opens a quote that ends in a later line, and a row of a .tsv is one line: write it as jsonl"
                )
                yield place, BadRow(place, f"is not a {name.rsplit('.', 1)[-1]} row ({reason})")
                continue
            if len(values) != len(header):
                yield place, BadRow(place, f"has {len(values)} columns where the header has {len(header)}")
                continue
            yield place, {key: value for key, value in zip(header, values) if value != "" or key == self.fields.text}

    def _parquet(self, file: Path, name: str) -> Iterator[tuple[str, Any]]:
        import pyarrow
        import pyarrow.parquet

        try:
            # Read in pieces and not mapped: the pages of a map would add up to the file.
            parquet = pyarrow.parquet.ParquetFile(file, buffer_size=1 << 20)
            columns = parquet.schema_arrow.names
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise CorpusError(f"{name} is not a readable parquet file ({error})") from error
        if self.fields.text not in columns:
            raise CorpusError(f"{name} has no column {self.fields.text!r}, only {columns}: name the text column")
        if len(set(columns)) != len(columns):
            raise CorpusError(f"{name} has columns of the same name, {columns}: rename them")
        number = 0
        size = sum(parquet.metadata.row_group(n).total_byte_size for n in range(parquet.num_row_groups))
        rows = max(1, min(256, PARQUET_BYTES * parquet.metadata.num_rows // max(1, size)))
        with parquet:
            batches = parquet.iter_batches(batch_size=rows)
            while True:
                try:
                    batch = next(batches, None)
                except (pyarrow.ArrowException, OSError) as error:
                    raise CorpusError(
                        f"{name} cannot be read after row {number - 1} ({error}): it is damaged"
                    ) from error
                if batch is None:
                    return
                for row in self._rows_of(batch):
                    place = f"{name} row {number}"
                    yield place, BadRow(place, f"is not valid UTF-8 ({row})") if isinstance(row, UnicodeError) else row
                    number += 1

    @staticmethod
    def _rows_of(batch: Any) -> Iterator[Any]:
        """Rows of an Arrow batch; in the place of one whose text cannot be decoded, the error."""
        try:
            yield from batch.to_pylist()
        except UnicodeDecodeError:
            for position in range(batch.num_rows):
                try:
                    yield batch.slice(position, 1).to_pylist()[0]
                except UnicodeDecodeError as error:
                    yield error

    def _document(self, place: str, row: Any, number: int) -> Document | BadRow:
        """One row as a document, or what is wrong with it."""
        fields = self.fields
        if isinstance(row, str) and not isinstance(self.source, str):
            if row.lower().endswith(ROW_SUFFIXES + TEXT_SUFFIXES) and os.path.isfile(row):
                return BadRow(place, f"is the name of a file, {row!r}: give the path of a file or of a folder, no list")
            row = {fields.text: row} if fields.id is None else {fields.text: row, fields.id: number}
        if type(row) is not dict and not isinstance(row, Mapping):  # an abstract class is slow to ask
            return BadRow(place, f"is a {type(row).__name__}, expected an object with {fields.text!r}")
        text = row.get(fields.text)
        if not isinstance(text, str):
            got = (
                f"is a {type(text).__name__}" if fields.text in row else f"is absent; it has {', '.join(map(str, row))}"
            )
            return BadRow(place, f"needs a string in {fields.text!r}, which {got}")
        if not text.strip():
            return BadRow(place, f"has an empty {fields.text!r}")
        if fields.id is None:
            identity: str | None = str(number)
        else:
            identity = id_text(row.get(fields.id))
        if not identity:
            got = (
                f"got {row[fields.id]!r}" if fields.id in row else f"which is absent; it has {', '.join(map(str, row))}"
            )
            return BadRow(place, f"needs a non-empty string or integer in {fields.id!r}, {got}")
        title = row.get(fields.title) if fields.title is not None else None
        if title is not None and not isinstance(title, str):
            return BadRow(place, f"needs a string in {fields.title!r}, got {type(title).__name__}")
        own = (fields.id, fields.text, fields.title)
        kept = [key for key in row if key not in own] if fields.metadata is None else fields.metadata
        try:
            found = {str(key): _known(row[key]) for key in kept if key in row} if kept else {}
            if len(found) < len(kept) and len({str(key) for key in row}) < len(row):
                return BadRow(place, "has two fields whose names are one as text")
            values = {key: value for key, value in found.items() if value is not None} if found else found
            metadata = _json(values) if values else None
            size = utf8_bytes(identity) + utf8_bytes(text) + utf8_bytes(title or "") + utf8_bytes(metadata or "")
        except UnicodeEncodeError:
            return BadRow(place, "is not valid UTF-8 (it holds bytes or surrogates that are no character)")
        except (TypeError, ValueError, RecursionError) as error:
            return BadRow(place, f"has metadata that JSON cannot hold ({error})")
        if size > fields.max_row_bytes:
            return BadRow(place, self._too_large(size))
        return Document(place, identity, text, title or None, metadata)


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True, ensure_ascii=False, allow_nan=False, default=_plain)


def _known(value: Any) -> Any:
    """A value with None for what is NaN, which is how tables say that there is none, and JSON cannot."""
    if isinstance(value, Mapping):
        return {key: _known(item) for key, item in value.items()}
    if hasattr(value, "tolist"):  # of numpy
        value = plain_array(value)
    if isinstance(value, (list, tuple)):
        return [_known(item) for item in value]
    number = isinstance(value, (float, Decimal)) or hasattr(value, "isoformat")  # pandas has dates that are none
    return None if number and value != value else value


def plain_array(value: Any) -> Any:
    """What numpy, pandas and torch hold as plain values: times as dates, or as ISO text where Python has none so fine.

    Args:
        value: Has a `tolist`.
    """
    if not isinstance(value, (np.generic, np.ndarray)) or value.dtype.kind != "M":
        return value.tolist()
    if value.ndim:
        return [plain_array(one) for one in np.asarray(value)]
    plain = value.tolist()
    if not isinstance(plain, int):
        return plain
    if np.isnat(value):
        return None
    rounded = value.astype("datetime64[us]")  # nanoseconds, as pandas has them, would come out as a number
    found = rounded.tolist()
    return found if rounded.astype(value.dtype) == value and not isinstance(found, int) else str(value)


def _plain(value: Any) -> Any:
    """Dates, decimals and identifiers as JSON values."""
    if hasattr(value, "isoformat"):
        return value.isoformat()
    if isinstance(value, Decimal) and value.is_finite():
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, UUID):
        return str(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} is not a JSON value")


def utf8_bytes(text: str) -> int:
    """Bytes of a text in UTF-8.

    Raises:
        UnicodeEncodeError: If it holds surrogates.
    """
    return len(text) if text.isascii() else len(text.encode())


def id_text(value: Any) -> str | None:
    """An id as it is stored: text as it is, whole numbers as text; None for what is no id."""
    if type(value) is str:
        return value
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return str(int(value))
    return value if isinstance(value, str) else None


def id_texts(ids: Any) -> list[str]:
    """One id or many as they are stored.

    Raises:
        TypeError: If one is neither a text nor a whole number.
    """
    if isinstance(ids, (bytes, bytearray)) or not isinstance(ids, (str, numbers.Integral, Iterable)):
        raise TypeError(f"an id is a text or a whole number, got {ids!r}")
    many = [ids] if isinstance(ids, (str, numbers.Integral)) else list(ids)
    found = []
    for value in many:
        if (identity := id_text(value)) is None:
            raise TypeError(f"an id is a text or a whole number, got {value!r}")
        found.append(identity)
    return found


def key_of(identity: str) -> bytes:
    """The 128-bit key of an id; one with surrogates has a key, too, and is in no index."""
    return hashlib.blake2b(identity.encode(errors="surrogatepass"), digest_size=16).digest()
