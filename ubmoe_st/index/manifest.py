"""What is in an index folder: the manifest, the journal of a build, and which names are the index's own.

The only file that knows how `index_info.json` and `build/journal.json` are laid out. A field that is added here is
stored from then on; the order of the fields is that of the files.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from .. import files as whole_files
from ..files import check_types, read_json, write_json

INFO_FILE = "index_info.json"
LOCK_FILE = ".lock"
FORMAT = "ubmoe-embedding-index"
FORMAT_VERSION = 1
DISCARD = "discard_unfinished() or `ubmoe discard`"
"""What throws an unfinished addition away."""

Record = dict[str, Any]
"""Size and SHA-256 of a file: {"bytes", "sha256"}."""
T = TypeVar("T")
OPTIONAL = ("folder", "relative_folder", "first_row", "rows", "entries_cut", "cut", "rules", "others", "words")
"""Fields that are not written where there is nothing to say."""

KEPT_SOURCES = 16
"""Corpora that have a record of their own after `compact`, the one of all before them included."""
FULL = 0.9
"""Share of the bytes that can be read at which a manifest takes no more additions."""

PARTS = {"dead": ".npy", "probes": ".npy", "bad_rows": ".txt", "index": ".faiss", "bm25": ""}
"""Parts that lie beside the manifest, by the beginning of their names, and what the names end with."""
OWN_NAMES = re.compile(
    r"""segments/[0-9]{6,}(\.tmp | /(vectors\.npy|entries\.arrow|keys\.npy))?
    | bm25-[0-9]{6,}b*(\.tmp | /[A-Za-z0-9_][^/]*)?
    | ((dead|probes)(-[0-9]{6,}b*)?\.npy | bad_rows(-[0-9]{6,}b*)?\.txt
       | index(-[0-9]{6,}b*)?(\.[0-9]+b*)?\.faiss)(\.tmp)?
    | build/((journal|index_names)\.json | probes\.npy | (dead|replaced)\.bin | bad_rows\.txt | seen
             | part-[0-9]{8,}(-[0-9a-f]{8})?\.(npy|arrow))(\.tmp)?""",
    re.VERBOSE,
)


def owns(name: str) -> bool:
    """Whether this is what an index calls a part of its own, beside the manifest and the lock, which stay.

    Args:
        name: Relative to the index folder, with slashes.
    """
    return OWN_NAMES.fullmatch(name) is not None


def now() -> str:
    """The time in UTC, ISO format, whole seconds."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def library_versions() -> dict[str, str]:
    """Versions of what made an index."""
    found = {}
    for name in ("ubmoe-st", "sentence-transformers", "transformers", "torch", "numpy", "pyarrow", "faiss-cpu"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _made(kind: type[T], values: Mapping[str, Any], **parts: Any) -> T:
    """A dataclass from its JSON form: fields that are absent keep their defaults, unknown ones are let go.

    Raises:
        TypeError: If a field is absent that has no default, or of another type.
        ValueError: If a number is negative.
    """
    known = {one.name for one in fields(kind)}  # type: ignore[arg-type]
    found = {name: value for name, value in values.items() if name in known} | parts
    check_types(kind, found)
    if negative := [name for name, value in found.items() if type(value) is int and value < 0]:
        raise ValueError(f"{negative[0]} is negative")
    return kind(**found)


def _json(record: Any) -> dict[str, Any]:
    """The JSON form of a dataclass."""
    return asdict(record, dict_factory=lambda pairs: {k: v for k, v in pairs if v is not None or k not in OPTIONAL})


def _check_records(files: Mapping[str, Record]) -> None:
    for name, record in files.items():
        if type(record.get("bytes")) is not int or not isinstance(record.get("sha256"), str):
            raise TypeError(f"{name}: expected bytes and sha256, got {str(record)[:80]!r}")


@dataclass
class FileRecord:
    """One file beside the manifest: probe vectors, dead rows, or the faiss index of the rows from `first_row` on."""

    file: str
    first_row: int | None = None
    rows: int | None = None
    bytes: int = 0
    sha256: str = ""

    def record(self) -> Record:
        """Size and SHA-256."""
        return {"bytes": self.bytes, "sha256": self.sha256}


@dataclass
class FolderRecord:
    """A folder of files that are written once: a segment, or the BM25 part. `files` is by name in it."""

    folder: str
    rows: int
    files: dict[str, Record]
    words: int | None = None
    """Of a BM25 part: the rule by which texts became words; None for the first one, and for ASCII texts."""

    def __post_init__(self) -> None:
        _check_records(self.files)

    def names(self) -> set[str]:
        """The folder and the files in it, relative to the index folder."""
        return {self.folder, *(f"{self.folder}/{name}" for name in self.files)}


@dataclass(kw_only=True)
class ModelRecord:
    """The model of an index: where it was, what it was."""

    id: str | None
    """Folder or Hub id."""
    folder: str | None = None
    """Where `id` was, when it is a folder."""
    relative_folder: str | None = None
    """The same, seen from the index folder."""
    weights: str | None
    """Fingerprint, from `embedder.weights_fingerprint`."""
    truncate_dim: int | None
    max_tokens: int | None
    prompts: dict[str, str]
    probes: FileRecord

    def locate(self, out: Path) -> None:
        """Note where the model is, seen from the index folder `out`, when `id` is a folder."""
        if self.id and Path(self.id).is_dir():
            self.folder = str(Path(self.id).resolve())
            self.relative_folder = os.path.relpath(self.folder, out.resolve())

    def find(self, out: Path) -> str:
        """The folder or Hub id to load the model from.

        Raises:
            ValueError: If the model is gone, or was never known.
        """
        if self.folder is not None and self.relative_folder is not None:
            for place in ((out / self.relative_folder).resolve(), Path(self.folder)):
                if place.is_dir():
                    return str(place)
            raise ValueError(
                f"the model of this index was in {self.folder}, which is gone: open the index with model=..."
            )
        if not self.id:
            raise ValueError("this index does not know where its model came from: open it with model=...")
        return self.id


@dataclass
class FaissRecord:
    """The faiss part of an index, and what was asked for when it was made."""

    file: str | None = None
    """The first of `files`."""
    files: list[FileRecord] = field(default_factory=list)
    kind: str = "flat"
    requested: str = "flat"
    memory_mb: int | None = None
    """Memory allowed for a search, MiB."""
    faiss_file: bool | None = None
    factory: str = "Flat"
    why: str = ""
    rows: int = 0
    """Rows in it: later ones are compared one by one."""
    bytes: int | None = None
    parameters: dict[str, int] = field(default_factory=dict)
    """Search parameters."""
    tuned: dict[str, Any] | None = None
    """What `tune` found."""

    @classmethod
    def of(cls, values: dict[str, Any]) -> FaissRecord:
        """From the JSON form; the first builds wrote one file, always, and no list."""
        files = values.get("files", [{"first_row": 0, **values}])
        return _made(cls, values, files=[_made(FileRecord, file) for file in files])


@dataclass
class RunConfig:
    """Everything that decides the vectors of a build or an addition: it is resumed only when this is the same."""

    operation: str | None = None
    """`build` or `add`."""
    base_version: int | None = None
    """The version that is added to."""
    weights: str | None = None
    dimension: int | None = None
    truncate_dim: int | None = None
    max_tokens: int | None = None
    prompts: dict[str, str] | None = None
    probe_tokens: list[int] | None = None
    dtype: str | None = None
    corpus: str | None = None
    fields: dict[str, Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    segment_rows: int | None = None

    def differences(self, other: RunConfig) -> list[str]:
        """`name: was X, is Y` for all that is otherwise in `other`, in alphabetical order."""
        mine, theirs = vars(self), vars(other)
        alike = ("truncate_dim",) if self._kept() == other._kept() else ()
        return [
            f"{name}: was {mine[name]!r}, is {theirs[name]!r}"
            for name in sorted(mine)
            if mine[name] != theirs[name] and name not in alike
        ]

    def _kept(self) -> int | None:
        """Dimensions that are kept: a cut that the model makes by itself was not on record in the first indexes."""
        return self.truncate_dim or self.dimension

    def same_input(self, other: RunConfig) -> bool:
        """Whether a corpus went in as `other` would take it in, whatever was there before."""
        mine, theirs = (replace(one, base_version=None, truncate_dim=one._kept()) for one in (self, other))
        return mine == theirs


@dataclass
class SourceRecord:
    """What an index remembers of a corpus that went into it."""

    version: int | None
    name: str
    corpus_rows: int
    sha256_of_rows: str
    entries: int
    tokens: int
    bad_rows: int
    bad_rows_file: str | None
    duplicates_left_out: int
    config: RunConfig
    added: str
    entries_cut: int | None = None
    """Entries of which the model reads only the beginning; None: none."""
    rules: dict[str, str] | None = None
    """`on_duplicate` and `on_bad_row`; None in indexes of before they were kept."""
    others: int | None = None
    """Later corpora that `compact` has taken into this record: numbers and `bad_rows_file` are those of all."""

    def same_rules(self, rules: dict[str, str]) -> bool:
        """Whether other rules would have given the same entries: they are the same, or had nothing to decide."""
        if self.rules is None:
            return True
        idle = {"raise"} | ({"skip"} if not self.duplicates_left_out else set())
        return (self.rules["on_duplicate"] in {rules["on_duplicate"], *idle}) and (
            self.rules["on_bad_row"] == rules["on_bad_row"] or not self.bad_rows
        )

    @classmethod
    def of(cls, values: dict[str, Any]) -> SourceRecord:
        """From the JSON form."""
        return _made(cls, {"version": None, "bad_rows_file": None, **values}, config=_made(RunConfig, values["config"]))


def folded(sources: list[SourceRecord]) -> tuple[list[SourceRecord], list[str]]:
    """Records of corpora of which the oldest become one, where there are more than `KEPT_SOURCES`.

    Returns:
        The records, and the reports of bad rows that belong to the first one together.
    """
    count = len(sources) - KEPT_SOURCES + 1
    if count < 2:
        return sources, []
    old = sources[:count]

    def total(name: str) -> int:
        return sum(getattr(source, name) or 0 for source in old)

    names = ("corpus_rows", "entries", "tokens", "bad_rows", "duplicates_left_out")
    numbers: dict[str, Any] = {name: total(name) for name in names}
    cut, others = total("entries_cut") or None, total("others") + count - 1
    first = replace(old[0], **numbers, entries_cut=cut, others=others, sha256_of_rows="", rules=None)
    return [first, *sources[count:]], [source.bad_rows_file for source in old if source.bad_rows_file]


@dataclass
class Manifest:
    """`index_info.json`: one committed version of an index."""

    version: int
    committed: str
    """Token of the last build or addition."""
    edited: bool
    """Whether rows were deleted or moved since the build."""
    created: str
    updated: str
    rows: int
    """Rows that can be found."""
    stored_rows: int
    dimension: int
    dtype: str
    metric: str
    model: ModelRecord
    fields: dict[str, Any]
    """See `CorpusFields`."""
    options: dict[str, Any]
    """See `PipelineOptions`."""
    segment_rows: int
    segments: list[FolderRecord]
    dead: FileRecord | None
    index: FaissRecord
    bm25: FolderRecord | None
    sources: list[SourceRecord]
    versions: dict[str, str]

    def is_version(self, other: Manifest) -> bool:
        """Whether both are of one version of one index: an index that was built anew begins to count again."""
        return (self.version, self.committed, self.updated) == (other.version, other.committed, other.updated)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The current version of an index.

        Raises:
            FileNotFoundError: If there is no index, or one whose build has not finished.
            ValueError: If the file is damaged or of a newer layout.
        """
        path = folder / INFO_FILE
        if not path.is_file():
            if Journal.path(folder).is_file():
                raise FileNotFoundError(
                    f"the build of {folder} has not finished: run the same build again to resume it"
                )
            raise FileNotFoundError(f"{folder} is no index: it has no {INFO_FILE}")
        try:
            values = read_json(path)
            kind, layout = values["format"], values["format_version"]
            if kind == FORMAT and layout <= FORMAT_VERSION:
                manifest = cls._of(values)
                if strange := sorted(name for name in manifest.names() if not owns(name)):
                    raise ValueError(f"it names {strange[0]!r}, as no file of an index is called")
                if manifest.dimension < 1 or manifest.segment_rows < 1:
                    raise ValueError("it has no dimensions, or no rows in a segment")
                if manifest.dtype not in ("float32", "float16"):
                    raise ValueError(f"its dtype is {manifest.dtype!r}")
                return manifest
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is damaged ({error!r}): restore it from a copy or build the index again"
            ) from error
        if kind != FORMAT:
            raise ValueError(f"{path} is of format {kind!r}, expected {FORMAT!r}")
        raise ValueError(
            f"{path} has layout version {layout}, this package reads up to {FORMAT_VERSION}: upgrade ubmoe-st"
        )

    @classmethod
    def _of(cls, values: dict[str, Any]) -> Manifest:
        model, dead, bm25 = values["model"], values["dead"], values["bm25"]
        return _made(
            cls,
            values,
            model=_made(ModelRecord, model, probes=_made(FileRecord, model["probes"])),
            segments=[_made(FolderRecord, segment) for segment in values["segments"]],
            dead=None if dead is None else _made(FileRecord, dead),
            index=FaissRecord.of(values["index"]),
            bm25=None if bm25 is None else _made(FolderRecord, bm25),
            sources=[SourceRecord.of(source) for source in values["sources"]],
        )

    @staticmethod
    def check_room(folder: Path) -> None:
        """Refuse to add to an index whose manifest has grown so much that the next one might not be read again.

        Raises:
            ValueError: Saying what makes it smaller.
        """
        path = folder / INFO_FILE
        if (size := path.stat().st_size) > FULL * whole_files.MAX_JSON_BYTES:
            raise ValueError(
                f"{path} has {size:,} bytes of additions and segments, of the {whole_files.MAX_JSON_BYTES:,} that can "
                "be read: call compact(), which makes it small, then add again"
            )

    @classmethod
    def exists(cls, folder: Path) -> bool:
        """Whether a folder holds a finished index."""
        return (folder / INFO_FILE).is_file()

    def as_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {"format": FORMAT, "format_version": FORMAT_VERSION, **_json(self)}

    def next_version(self, *, same_rows: bool = False) -> Manifest:
        """A copy to change and publish.

        Args:
            same_rows: Whether the change is of no row, so that the last corpus stays the last thing done to them.
        """
        changed = self._of(json.loads(json.dumps(self.as_dict())))
        changed.version += 1
        if same_rows and changed.sources[-1].version == self.version:
            changed.sources[-1].version = changed.version
        return changed

    def _folders(self) -> list[FolderRecord]:
        return [*self.segments, *([] if self.bm25 is None else [self.bm25])]

    def files(self) -> Iterator[tuple[str, Record]]:
        """Every file on record: relative name, and size and SHA-256."""
        for folder in self._folders():
            for name, record in folder.files.items():
                yield f"{folder.folder}/{name}", record
        for file in [*([] if self.dead is None else [self.dead]), *self.index.files, self.model.probes]:
            yield file.file, file.record()

    def names(self) -> set[str]:
        """The files and folders this version needs beside the manifest itself."""
        reports = {source.bad_rows_file for source in self.sources if source.bad_rows_file}
        return reports.union({name for name, _ in self.files()}, *(folder.names() for folder in self._folders()))


@dataclass(frozen=True)
class Position:
    """How far a corpus has been turned into rows."""

    row: int = 0
    """Source rows that are done with."""
    chunk: int = 0
    """Chunks of the next source row that are done with."""
    digest: str = ""
    """SHA-256 over the source rows before `row`."""


@dataclass
class PartRecord:
    """The files of one window, in `build/`; `files` is by suffix."""

    name: str
    rows: int
    files: dict[str, Record]

    def __post_init__(self) -> None:
        _check_records(self.files)

    def paths(self, folder: Path) -> Iterator[tuple[Path, Record]]:
        """The files in `build/`, here `folder`, with size and SHA-256."""
        for suffix, record in self.files.items():
            yield folder / f"{self.name}{suffix}", record


@dataclass
class Journal:
    """`build/journal.json`: what an unfinished build or addition has committed."""

    token: str
    config: RunConfig
    rules: dict[str, str]
    """`on_duplicate` and `on_bad_row`, which may change between two runs from `raise` to another."""
    position: Position = Position()
    windows: int = 0
    rows: int = 0
    tokens: int = 0
    segments: list[FolderRecord] = field(default_factory=list)
    parts: list[PartRecord] = field(default_factory=list)
    dead_bytes: int = 0
    bad_bytes: int = 0
    bad_rows: int = 0
    duplicates: int = 0
    cut: int | None = None
    """Entries of which the model reads only the beginning."""
    replaced_bytes: int | None = None
    finished: bool = False

    @staticmethod
    def path(folder: Path) -> Path:
        """Where the journal of an index folder is."""
        return folder / "build" / "journal.json"

    @classmethod
    def read(cls, folder: Path) -> Journal:
        """The journal of an index folder.

        Raises:
            ValueError: If it is damaged.
        """
        path = cls.path(folder)
        try:
            values = read_json(path)
            return _made(
                cls,
                values,
                config=_made(RunConfig, values["config"]),
                position=_made(Position, values["position"]),
                segments=[_made(FolderRecord, segment) for segment in values["segments"]],
                parts=[_made(PartRecord, part) for part in values["parts"]],
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged ({error!r}): begin again with overwrite=True") from error

    def write(self, folder: Path) -> None:
        """Replace the journal of an index folder."""
        values = _json(self)
        if self.replaced_bytes is None:
            del values["replaced_bytes"]  # as earlier versions wrote it
        write_json(self.path(folder), {"format_version": 1, **values})
