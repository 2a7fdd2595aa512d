"""safetensors files read and written one tensor at a time: a 7B model passes through the memory of its largest tensor.

What is written is what the safetensors library writes of the same tensors, to the byte.
"""

from __future__ import annotations

import json
import os
import threading
import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ubmoe_st.files import replacing_by_name

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CACHE_LINE = 64
"""Bytes; see `write_tensors`."""

_CODES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
_NAMES = {code: name for name, code in _CODES.items()}
_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
# The library puts types with wide elements first.
_ORDER = ["I64", "F64", "F32", "I32", "BF16", "F16", "I16", "I8", "U8", "BOOL"]
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class Spec:
    """What a tensor is, without its numbers."""

    dtype: str
    """As safetensors writes it: `F32`, `BF16`, ..."""

    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """Elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def bytes(self) -> int:
        """Bytes of the numbers."""
        return self.count * _BYTES[self.dtype]

    def blank(self) -> Tensor:
        """A tensor of this shape and type without numbers, on the meta device."""
        import torch

        return torch.empty(self.shape, dtype=getattr(torch, _NAMES[self.dtype]), device="meta")


def spec_of(shape: tuple[int, ...], dtype: torch.dtype) -> Spec:
    """Shape and type as safetensors names them.

    Raises:
        ValueError: If the type cannot be stored.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in _CODES:
        raise ValueError(f"tensors of type {name} are not written; expected one of {', '.join(_CODES)}")
    return Spec(_CODES[name], tuple(shape))


class Described(Mapping[str, "Tensor"]):
    """Tensors by name whose shapes and types are known without reading them."""

    @abstractmethod
    def spec(self, name: str) -> Spec:
        """Shape and type of a tensor."""

    @abstractmethod
    def __contains__(self, name: object) -> bool:
        """Whether there is a tensor of that name; that of `Mapping` would read it."""


class LazyTensors(Described):
    """Tensors that are made when they are asked for, and not kept.

    Args:
        makers: What each tensor is, and the function that gives it.
    """

    def __init__(self, makers: Mapping[str, tuple[Spec, Callable[[], Tensor]]]) -> None:
        self._makers = dict(makers)

    def spec(self, name: str) -> Spec:  # noqa: D102 - as of the class above
        return self._makers[name][0]

    def __getitem__(self, name: str) -> Tensor:
        return self._makers[name][1]()

    def __contains__(self, name: object) -> bool:
        return name in self._makers

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def pick(tensors: Mapping[str, Tensor], wanted: Callable[[str], bool]) -> Mapping[str, Tensor]:
    """The tensors whose name is wanted; reads none of them."""
    names = [name for name in tensors if wanted(name)]
    if isinstance(tensors, Described):
        return LazyTensors({name: (tensors.spec(name), partial(tensors.__getitem__, name)) for name in names})
    return {name: tensors[name] for name in names}


def specs_of(tensors: Mapping[str, Tensor]) -> dict[str, Spec]:
    """Shapes and types by name; reads no tensor that is not in memory.

    Raises:
        ValueError: If a tensor is of a type that is not written.
    """
    if isinstance(tensors, Described):
        return {name: tensors.spec(name) for name in tensors}
    return {name: spec_of(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def first_dtype(files: list[Path]) -> torch.dtype:
    """Type of the first tensor with a fraction, as transformers takes it where a config names none; by the headers."""
    import torch

    tensors = TensorFiles(files)
    kinds = (getattr(torch, _NAMES[tensors.spec(name).dtype]) for name in tensors)
    return next((kind for kind in kinds if kind.is_floating_point), torch.float32)


class TensorFiles(Described):
    """The tensors of one or more safetensors files by name; each is read from disk when it is asked for, and not kept.

    They are read, not mapped: what was looked at does not stay in the memory of the process. They are held open, so
    that the tensors are those of these files whatever is put under their names meanwhile, or wherever the process goes.

    Args:
        files: The files, of one model.

    Raises:
        ValueError: If a file is no safetensors file, or two hold the same tensor; from reading a tensor, if its file
            was written to since.
    """

    def __init__(self, files: list[Path]) -> None:
        self._places: dict[str, tuple[_HeldFile, int, Spec]] = {}
        for path in files:
            file = _HeldFile(path)
            for name, (offset, spec) in file.places.items():
                if name in self._places:
                    raise ValueError(f"{name} is in {self._places[name][0].name} and in {file.name}; expected it once")
                self._places[name] = (file, offset, spec)

    def spec(self, name: str) -> Spec:  # noqa: D102 - as of the class above
        return self._places[name][2]

    def __getitem__(self, name: str) -> Tensor:
        import torch

        file, offset, spec = self._places[name]
        data = bytearray(spec.bytes)
        file.read_into(data, offset)
        dtype = getattr(torch, _NAMES[spec.dtype])
        return (torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)).reshape(spec.shape)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class _HeldFile:
    """A safetensors file that stays open as long as something refers to this object; threads may read at once.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self._lock = threading.Lock()
        self._file = open(path, "rb", buffering=0)
        weakref.finalize(self, self._file.close)
        self._stamp = self._now()
        self.places = _read_header(self._file, self.name)

    def _now(self) -> tuple[int, int]:
        stat = os.fstat(self._file.fileno())
        return stat.st_size, stat.st_mtime_ns

    def read_into(self, data: bytearray, offset: int) -> None:
        """Fill `data` from `offset` on.

        Raises:
            ValueError: If the file ends before, or was written to since it was opened.
        """
        view, read = memoryview(data), 0
        with self._lock:
            self._file.seek(offset)
            # One call of the system reads two gigabytes at most.
            while read < len(data) and (count := self._file.readinto(view[read:])):
                read += count
        size, _ = now = self._now()
        if read < len(data) or size < self._stamp[0]:
            raise ValueError(f"{self.name} is truncated: {size:,} bytes, and {self._stamp[0]:,} when it was opened")
        if now != self._stamp:
            raise ValueError(f"{self.name} was written to while it was read; load the model again")


def read_header(path: Path, name: str | None = None) -> dict[str, tuple[int, Spec]]:
    """Offset in the file and spec of each tensor of a safetensors file, all held against the length of the file.

    Args:
        path: The file.
        name: What messages call it. None: its name.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is truncated, too long or no safetensors file, or holds tensors of a type that is not read.
    """
    with open(path, "rb") as file:
        return _read_header(file, name or path.name)


def _read_header(file: BinaryIO | FileIO, name: str) -> dict[str, tuple[int, Spec]]:
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8) or b"", "little")
    if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
        raise ValueError(f"{name} is truncated or no safetensors file: {size:,} bytes do not hold its header")
    try:
        header = json.loads(file.read(length) or b"")
        # Half of a surrogate pair is JSON for Python, and not for the library that reads the tensors.
        json.dumps(header, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not a safetensors file: its header is not JSON") from error
    metadata = header.pop("__metadata__", {}) if isinstance(header, dict) else None
    if not _are_texts(metadata) or not all(_describes_tensor(entry) for entry in header.values()):
        raise ValueError(f"{name} is not a safetensors file: its header does not describe tensors")
    found, end = {}, 0
    for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in _NAMES:
            raise ValueError(
                f"{name}: {key} is of type {entry['dtype']}; expected {', '.join(_NAMES)}. "
                "Quantised weights are not read: start from the unquantised model"
            )
        spec, (begin, stop) = Spec(entry["dtype"], tuple(entry["shape"])), entry["data_offsets"]
        if begin != end or stop - begin != spec.bytes:
            raise ValueError(
                f"{name} is not a safetensors file: {key} of {spec.bytes:,} bytes is said to be at {begin:,} to "
                f"{stop:,}, after {end:,}"
            )
        found[key] = (8 + length + begin, spec)
        end = stop
    if size != 8 + length + end:
        state = "truncated" if size < 8 + length + end else "too long"
        raise ValueError(f"{name} is {state}: {size:,} bytes, its header says {8 + length + end:,}")
    return found


def _are_texts(metadata: Any) -> bool:
    return isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())


def _describes_tensor(entry: Any) -> bool:
    """Whether an entry of a header has a type, a shape and two offsets."""

    def counts(values: Any) -> bool:
        return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)

    return (
        isinstance(entry, dict)
        and isinstance(entry.get("dtype"), str)
        and counts(entry.get("shape"))
        and counts(entry.get("data_offsets"))
        and len(entry["data_offsets"]) == 2
    )


def header_bytes(specs: Mapping[str, Spec], metadata: Mapping[str, str] | None = None) -> bytes:
    """The head of a safetensors file: its length, and JSON padded to eight bytes.

    Args:
        specs: Of each tensor, by name.
        metadata: Kept in the header.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name in in_file_order(specs):
        spec = specs[name]
        header[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [start, start + spec.bytes]}
        start += spec.bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def in_file_order(specs: Mapping[str, Spec]) -> list[str]:
    """Names of the tensors in the order in which a file holds them."""
    return sorted(specs, key=lambda name: (_ORDER.index(specs[name].dtype), name))


def aligned_header(specs: Mapping[str, Spec], alignment: int = 0) -> bytes:
    """A header after which the first tensor starts at an offset modulo 64 bytes; see `write_tensors`."""
    plain = header_bytes(specs, {"format": "pt", "pad": ""})
    missing = (alignment - len(plain)) % CACHE_LINE
    # Eight more characters of metadata move the data by eight bytes.
    return header_bytes(specs, {"format": "pt", "pad": " " * missing}) if missing else plain


def file_bytes(specs: Mapping[str, Spec], head: bytes) -> int:
    """Bytes of a file with these tensors and this head."""
    return len(head) + sum(spec.bytes for spec in specs.values())


def write_tensors(path: Path, tensors: Mapping[str, Tensor], alignment: int = 0) -> None:
    """Write a safetensors file whose tensors start at a given offset modulo 64 bytes.

    transformers maps weights from the file, so their address modulo 64 is that of the file. MKL's matrix-vector
    product rounds differently for addresses that are 8 and 0 modulo 16: logits are bit-identical to the base
    only if the copy of a tensor is aligned like the original.

    Args:
        path: The file.
        tensors: By name; each is asked for once, when it is written.
        alignment: Offset modulo 64; a multiple of 8, as safetensors pads its header to.

    Raises:
        ValueError: If a tensor is not what its spec says.
    """
    specs = specs_of(tensors)
    _write(path, aligned_header(specs, alignment), tensors, specs)


def write_with_metadata(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file; the same tensors and metadata always give the same bytes.

    The library writes metadata in an order that differs from call to call, and so do the checksums.

    Args:
        path: The file.
        tensors: By name.
        metadata: Kept in the header.
    """
    specs = specs_of(tensors)
    _write(path, header_bytes(specs, metadata), tensors, specs)


def _write(path: Path, head: bytes, tensors: Mapping[str, Tensor], specs: Mapping[str, Spec]) -> None:
    import torch

    # Under another name first: the tensors may be mapped from the very file that is replaced.
    with replacing_by_name(path) as temporary, open(temporary, "wb") as file:
        file.write(head)
        for name in in_file_order(specs):
            tensor = tensors[name].detach().cpu().contiguous()
            found = spec_of(tuple(tensor.shape), tensor.dtype)
            if found != specs[name]:
                raise ValueError(f"{name}: expected {specs[name]}, got {found}")
            # Of bytes, because numpy knows no bfloat16.
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
