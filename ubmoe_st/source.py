"""What a model was read from, held open: later reads see these files whatever happens to the folder meanwhile."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from ubmoe_st.checkpoint import (
    CACHE_LINE,
    DELTA_FILE,
    GENERATOR_FOLDER,
    INDEX_FILE,
    ROUTER_FILE,
    SHARED_FILE,
    UNI_FILE,
    CheckpointError,
    data_start,
    read_config,
    weight_files,
)
from ubmoe_st.configuration import UBMoEConfig, trained_further
from ubmoe_st.experts import is_ffn_key, load_low_rank
from ubmoe_st.generator import uni_keys

if TYPE_CHECKING:
    from ubmoe_st.experts import LowRank

Stamps = dict[str, tuple[int, int, int]]


class Source:
    """The files from which a module reads what the generator has of its own: of a checkpoint, of a base, or none.

    All are mapped when the object is made, so neither a change of directory nor a folder that was deleted or replaced
    meanwhile mixes two models. A copy in another process opens them again, and refuses others under the same names.

    Args:
        folder: A checkpoint.
        base: Folder of the base model, for a module that was made of one.
        dtype: To load a base in whose tensors are stored in several.

    Raises:
        CheckpointError: If a file is missing.
    """

    def __init__(
        self, *, folder: Path | None = None, base: Path | None = None, dtype: torch.dtype | None = None
    ) -> None:
        self.folder = folder.absolute() if folder else None
        self.base = base.absolute() if base else None
        self._dtype = dtype
        self._stamps = self._stamp()
        self._files: _Files | None = None
        self._is_copy = False
        self._open()

    def __deepcopy__(self, memo: dict[int, object]) -> Source:
        twin = copy.copy(self)
        twin._files, twin._is_copy = self._files, True
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": None}

    def check_unchanged(self) -> None:
        """Refuse a folder whose weights are others than when this object was made.

        Raises:
            CheckpointError: If a file was replaced, or is gone.
        """
        if self._stamp() != self._stamps:
            raise CheckpointError(
                f"{self.folder or self.base} is not what it was when this model was loaded; load the model again"
            )

    def uni(self) -> dict[str, Tensor]:
        """Original FFNs and an untied head, by backbone name.

        Raises:
            ValueError: If there is neither a checkpoint nor a base.
        """
        files = self._open()
        if files is None:
            raise ValueError(
                "this model has no generator: it was not loaded from a UBMoE checkpoint; make one with `upcycle`"
            )
        if not self._is_copy:
            return dict(files.uni)
        # The model that this one was copied from may write into those in place.
        originals = files.originals(False)
        return {key: originals(key).clone() for key in files.uni}

    def low_rank(self) -> LowRank | None:
        """The low-rank form of the `bi` experts, where it is stored."""
        files = self._open()
        return files.low_rank if files else None

    def bi(self, low_rank: LowRank | None, uni: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """The merged `bi` experts as they were read: merged anew in another dtype, they would be rounded twice.

        Args:
            low_rank: The experts as they are now.
            uni: The original FFNs as they are now, by backbone name.
            dtype: Of the result.

        Returns:
            Tensors by backbone name; none where the experts are others now.
        """
        files = self._open()
        ffn = {key: tensor for key, tensor in uni.items() if is_ffn_key(key)}
        if not isinstance(files, _CheckpointFiles) or low_rank is not files.low_rank or self.changed(ffn) is not None:
            return {}
        originals = files.originals(True)
        return {key: originals(key).to(dtype) for key in ffn}

    def routers(self) -> dict[str, Tensor] | None:
        """The token routers of a checkpoint that says it has some."""
        files = self._open()
        return files.routers if files else None

    def generation_config(self) -> GenerationConfig | None:
        """The base model's defaults for `generate`."""
        files = self._open()
        return files.generation_config if files else None

    def alignment(self) -> int:
        """Where the base's tensors start in their file, modulo 64 bytes; see `checkpoint.save_tensors`."""
        files = self._open()
        return files.alignment if files else 0

    def changed(self, tensors: Mapping[str, Tensor], *, bi: bool = False) -> str | None:
        """The first tensor whose values are not those that were read, in its own dtype; None where all are.

        Args:
            tensors: Shared tensors, original FFNs and an untied head, by backbone name.
            bi: Whether the FFNs among them are the `bi` experts.

        Returns:
            Its name. The first name of all where a base can no longer be read, so that nothing is claimed of it.
        """
        files = self._open()
        if files is None:
            return next(iter(tensors), None)
        try:
            # Not what `uni()` gave: that may have been written to in place.
            originals = files.originals(bi)
        except (CheckpointError, OSError):
            return next(iter(tensors), None)
        for name, tensor in tensors.items():
            original = originals(name)
            if original is None or not _equal(original, tensor):
                return name
        return None

    def relabelled(self, config: UBMoEConfig, encoder: Mapping[str, Tensor]) -> UBMoEConfig:
        """The config to write, which says so where the `bi` experts of the checkpoint were trained further.

        Args:
            config: Of the module. A label that is not the checkpoint's was set by somebody who knows, and stays.
            encoder: The encoder's tensors by backbone name.
        """
        files = self._open()
        if files is None or config.training is None or config.training != files.training:
            return config
        changed = self.changed({key: tensor for key, tensor in encoder.items() if is_ffn_key(key)}, bi=True)
        return config if changed is None else replace(config, training=trained_further(config.training))

    def _open(self) -> _Files | None:
        if self._files is None and (self.folder or self.base):
            self.check_unchanged()
            # Tensors made in inference mode would be refused by autograd for ever.
            with torch.inference_mode(False):
                self._files = _CheckpointFiles(self.folder) if self.folder else _BaseFiles(self)
            self.check_unchanged()
        return self._files

    def _stamp(self) -> Stamps:
        paths = _weights(self.folder) if self.folder else sorted(self.base.glob("*.safetensors")) if self.base else []
        stamps = {}
        for path in paths:
            try:
                stat = path.stat()
            except FileNotFoundError:
                continue
            stamps[path.name] = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        return stamps


class SmallSource(Source):
    """Of a module that reads its tensors from the files itself, one at a time: nothing large is mapped or loaded."""

    def changed(self, tensors: Mapping[str, Tensor], *, bi: bool = False) -> str | None:  # noqa: D102 - as above
        self.check_unchanged()
        return Source(folder=self.folder, base=self.base, dtype=self._dtype).changed(tensors, bi=bi)

    def _open(self) -> _Files | None:
        if self._files is None and (self.folder or self.base):
            self.check_unchanged()
            self._files = _SmallFiles(self)
            self.check_unchanged()
        return self._files


class _Files:
    """What both kinds of source hold open."""

    uni: dict[str, Tensor]
    low_rank: LowRank | None = None
    routers: dict[str, Tensor] | None = None
    generation_config: GenerationConfig | None = None
    training: str | None = None
    alignment = 0

    def originals(self, bi: bool) -> Any:
        """Function from a backbone name to the tensor as it was read, or None; of the `bi` experts or the original."""
        raise NotImplementedError


class _SmallFiles(_Files):
    def __init__(self, source: Source) -> None:
        if source.folder is not None:
            config = read_config(source.folder)
            self.training = config.training
            if config.expert_rank is not None:
                self.low_rank = load_low_rank(source.folder / DELTA_FILE)[0]
            if config.router is not None:
                self.routers = _tensors(_mapped(source.folder, ROUTER_FILE))
            self.generation_config = _generation_config(source.folder / GENERATOR_FOLDER)
            self.alignment = data_start(source.folder / SHARED_FILE) % CACHE_LINE
        elif source.base is not None:
            self.generation_config = _generation_config(source.base)
            self.alignment = _base_alignment(source.base)


class _CheckpointFiles(_Files):
    def __init__(self, folder: Path) -> None:
        shards = sorted({*json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"].values()})
        self._encoder = [_mapped(folder, shard) for shard in shards]
        self._uni = _mapped(folder, UNI_FILE)
        self.uni = _tensors(_mapped(folder, UNI_FILE))
        config = read_config(folder)
        self.training = config.training
        if config.expert_rank is not None:
            self.low_rank = load_low_rank(folder / DELTA_FILE)[0]
        if config.router is not None:
            self.routers = _tensors(_mapped(folder, ROUTER_FILE))
        self.generation_config = _generation_config(folder / GENERATOR_FOLDER)
        self.alignment = data_start(folder / SHARED_FILE) % CACHE_LINE

    def originals(self, bi: bool) -> Any:
        places = {key: shard for shard in self._encoder for key in shard.keys() if bi or not is_ffn_key(key)}
        if not bi:
            places |= dict.fromkeys(self._uni.keys(), self._uni)
        return lambda name: places[name].get_tensor(name) if name in places else None


class _BaseFiles(_Files):
    def __init__(self, source: Source) -> None:
        self._source = source
        if source.base is None:
            raise ValueError("a source of base files needs the folder of the base")
        # As stored, the files are mapped; converted, they would take memory that nobody may ask for.
        self._stored_dtype = _dtype_of(source.base)
        lm = self._load()
        state = lm.state_dict()
        self.uni = {key: state[name] for key, name in uni_keys(lm).items()}
        self.generation_config = _generation_config(source.base)
        self.alignment = _base_alignment(source.base)

    def _load(self) -> Any:
        base: Any = self._source.base
        return AutoModelForCausalLM.from_pretrained(base, dtype=self._stored_dtype or self._source._dtype)

    def originals(self, bi: bool) -> Any:
        self._source.check_unchanged()
        with torch.inference_mode(False):
            lm = self._load()
        prefix = f"{lm.base_model_prefix}."
        state = {name.removeprefix(prefix): tensor for name, tensor in lm.state_dict().items()}
        return state.get


def _base_alignment(folder: Path) -> int:
    first = next(iter(weight_files(folder)), None)
    return data_start(first) % CACHE_LINE if first else 0


def _dtype_of(folder: Path) -> torch.dtype | None:
    """The dtype of all tensors of a model folder; None where there are several."""
    dtypes = set()
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            dtypes |= {file.get_slice(key).get_dtype() for key in file.keys()}
    known = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    return known.get(dtypes.pop()) if len(dtypes) == 1 else None


def _equal(original: Tensor, tensor: Tensor) -> bool:
    if type(tensor) not in (Tensor, torch.nn.Parameter) or original.shape != tensor.shape:
        return False
    return torch.equal(original.to(tensor.dtype), tensor.detach().cpu())


def _weights(folder: Path) -> list[Path]:
    return sorted({*folder.glob("*.safetensors"), *(folder / GENERATOR_FOLDER).glob("*.safetensors")})


def _mapped(folder: Path, name: str) -> Any:
    try:
        return safe_open(folder / name, framework="pt")
    except FileNotFoundError as error:
        raise CheckpointError(f"{name} is missing from {folder}") from error


def _tensors(file: Any) -> dict[str, Tensor]:
    return {key: file.get_tensor(key) for key in file.keys()}


def _generation_config(folder: Path) -> GenerationConfig | None:
    if not (folder / "generation_config.json").is_file():
        return None
    return GenerationConfig.from_pretrained(folder)
