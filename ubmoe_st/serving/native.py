"""`NativeUBMoE`: both views in llama.cpp, over one base GGUF that is in memory once.

Two contexts share the mapped weights: a causal one without adapter, which is the base model, and one that attends in
full, pools, and adds the `bi` experts as a LoRA adapter. Needs neither torch nor transformers.
"""

from __future__ import annotations

import os
import threading
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from queue import LifoQueue, SimpleQueue
from typing import Any

import numpy as np

from ubmoe_st.configuration import check_texts

from .engine import SHAPING, Message, OnToken, Sampling, Tokens, sampler, tell_unapplied
from .native_files import POOLS_WITHOUT_PROMPTS, Parts, adapter_of, parts_of
from .text import TextStream

_SEQUENCES = 64
"""Texts that llama.cpp embeds in one pass."""
_LONGEST = 512
"""Tokens of the longest text to embed where neither a caller nor the checkpoint says less: the pass takes memory."""
_PREFILL = 512
"""Tokens of a prompt that it reads in one pass."""
_NON_CAUSAL = 1
_POOLINGS = {"mean": 1, "cls": 2, "lasttoken": 3}


_INSTALL = "pip install 'ubmoe-st[llama-cpp]'"
_TESTED = {("0.11548", "2026.10.11549")}
"""Declarations of llama-cpp-py-sync that were run over the library in xllamacpp."""


def _open() -> tuple[Any, Any]:
    """The C API of llama.cpp: declarations and library of llama-cpp-py-sync.

    Its Linux library needs glibc 2.38. On older systems the library is that in xllamacpp, which holds the same API, if
    the two are of versions that were tested together: a struct of another layout would corrupt memory.

    Raises:
        ImportError: If there is no library to open.
    """
    try:
        from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib
    except ImportError as error:
        raise ImportError(f"engine llama.cpp needs llama-cpp-py-sync: {_INSTALL}") from error
    ffi = get_ffi()
    try:
        return ffi, get_lib()
    except RuntimeError as error:
        found = find_spec("xllamacpp.xllamacpp") if find_spec("xllamacpp") else None
        if found is None or found.origin is None:
            raise ImportError(f"{error}; the library in xllamacpp would do: {_INSTALL}") from error
        pair = (version("llama-cpp-py-sync"), version("xllamacpp"))
        if pair not in _TESTED:
            raise ImportError(
                f"llama-cpp-py-sync {pair[0]} cannot load its own library here, and was not tested over the one in "
                f"xllamacpp {pair[1]}: {_INSTALL}"
            ) from error
        return ffi, ffi.dlopen(found.origin)


class _Library:
    """llama.cpp, opened once in a process."""

    def __init__(self) -> None:
        self.ffi, self.lib = _open()
        self._check_layout()
        self._said = ""

        def note(level: int, text: Any, _: Any) -> None:
            if level >= 4:
                self._said = self.ffi.string(text).decode("utf-8", "replace").strip()

        # Kept here: llama.cpp calls it for as long as the process lives.
        self._note = self.ffi.callback("void(enum ggml_log_level, const char *, void *)", note)
        self.lib.llama_log_set(self._note, self.ffi.NULL)
        self.lib.llama_backend_init()

    def _check_layout(self) -> None:
        """Refuse a library whose structs are not those declared.

        Raises:
            ImportError: If default values stand in other places.
        """
        found = self.lib.llama_context_default_params()
        values = (found.n_ctx, found.n_seq_max, found.pooling_type, found.attention_type, found.embeddings)
        if values != (512, 1, -1, -1, False) or (found.type_k, found.type_v) != (1, 1):
            raise ImportError(f"the llama.cpp library does not fit its declarations: {_INSTALL}")

    def check(self, pointer: Any, what: str) -> Any:
        """A pointer that is not null.

        Raises:
            ValueError: If it is; with the last error llama.cpp has named.
        """
        if pointer == self.ffi.NULL:
            raise ValueError(f"llama.cpp could not {what}: {self._said or 'it does not say why'}")
        return pointer


_LOCK = threading.Lock()
_LOADED: list[_Library] = []


def _library() -> _Library:
    with _LOCK:
        if not _LOADED:
            _LOADED.append(_Library())
        return _LOADED[0]


class NativeUBMoE:
    """Embeds and generates like `UBMoE`, computed by llama.cpp. Threads may encode and generate at the same time.

    Args:
        parts: The base GGUF, the experts, and what the checkpoint says of pooling, prompts and chats.
        name: What clients of a server call it.
        longest_text: Tokens of the longest text to embed; full attention needs it in one pass. None: as the checkpoint
            says, at most 512.
        context: Tokens of a prompt and its continuation.
        threads: None: as many as there are cores.
        generations: Texts generated at the same time; each has a cache of its own.

    Raises:
        ImportError: If llama.cpp is not installed.
        ValueError: If it cannot read a file.

    Example:
        >>> model = NativeUBMoE.from_checkpoint("models/ubmoe-135m")
        >>> model.encode(["a cat", "a kitten"]).shape, model.generate("The capital of France is", max_new_tokens=5)
    """

    def __init__(
        self,
        parts: Parts,
        *,
        name: str = "ubmoe",
        longest_text: int | None = None,
        context: int = 2048,
        threads: int | None = None,
        generations: int = 1,
    ) -> None:
        for argument, number in (("longest_text", longest_text), ("context", context), ("generations", generations)):
            if number is not None and number < 1:
                raise ValueError(f"{argument} must be at least 1, got {number}")
        self._library = _library()
        lib, check = self._library.lib, self._library.check
        self.name, self.parts = name, parts
        self.prompts, self.default_prompt = parts.prompts, parts.default_prompt
        self._model = check(
            lib.llama_model_load_from_file(os.fsencode(parts.gguf), lib.llama_model_default_params()),
            f"read {parts.gguf}",
        )
        self._vocab = lib.llama_model_get_vocab(self._model)
        tell_unapplied(parts.defaults, SHAPING)
        trained = lib.llama_model_n_ctx_train(self._model)
        longest_text = longest_text or min(parts.max_seq_length or _LONGEST, _LONGEST)
        self.context, self.longest_text = min(context, trained), min(longest_text, trained)
        self._sequences = min(_SEQUENCES, self.longest_text)  # more make llama.cpp end the process
        self._width = lib.llama_model_n_embd(self._model)
        width = len(parts.dense[-1][1]) if parts.dense else self._width
        self.tasks: tuple[str, ...] = ()
        self.dimension = min(width, parts.truncate_dim or width)
        self._vocab_size = lib.llama_vocab_n_tokens(self._vocab)
        threads = threads or os.cpu_count() or 1
        written = adapter_of(parts.experts, self._architecture())
        adapter = check(lib.llama_adapter_lora_init(self._model, os.fsencode(written)), f"read {written}")
        self._encoder = self._make_context(threads, embed=True)
        pointers = self._library.ffi.new("struct llama_adapter_lora *[1]", [adapter])
        if lib.llama_set_adapters_lora(self._encoder, pointers, 1, self._library.ffi.new("float[1]", [1.0])):
            raise ValueError(f"llama.cpp does not take {written} for {parts.gguf}")
        self._encoder_lock = threading.Lock()
        self._uses = 0
        self._changed = threading.Condition()
        self._generators: LifoQueue[Any] = LifoQueue()
        for _ in range(generations):
            self._generators.put(self._make_context(threads, embed=False))

    @classmethod
    def from_checkpoint(
        cls, path: str | os.PathLike[str], *, gguf: str | os.PathLike[str] | None = None, **options: Any
    ) -> NativeUBMoE:
        """Both views of a checkpoint with low-rank experts.

        Args:
            path: Checkpoint folder or Hub id.
            gguf: The base model. None: the GGUF that the checkpoint was made of, if it is installed; else one with
                16-bit weights is written once into `$UBMOE_CACHE`.
            **options: As for the class.

        Raises:
            ValueError: If the experts are dense, or llama.cpp cannot pool as the checkpoint does.
        """
        return cls(parts_of(path, gguf), **options)

    def _architecture(self) -> str:
        out = self._library.ffi.new("char[64]")
        self._library.lib.llama_model_meta_val_str(self._model, b"general.architecture", out, 64)
        return self._library.ffi.string(out).decode()

    def _make_context(self, threads: int, *, embed: bool) -> Any:
        lib = self._library.lib
        options = lib.llama_context_default_params()
        options.n_threads = options.n_threads_batch = threads
        if embed:
            options.n_ctx = options.n_batch = options.n_ubatch = self.longest_text
            options.n_seq_max, options.kv_unified = self._sequences, True
            options.embeddings, options.pooling_type = True, _POOLINGS[self.parts.pooling]
            options.attention_type = _NON_CAUSAL
        else:
            options.n_ctx, options.n_batch, options.n_ubatch = self.context, _PREFILL, _PREFILL
        made = lib.llama_init_from_model(self._model, options)
        return self._library.check(made, "make a context")

    # --- embedding -------------------------------------------------------------------------------------------

    def encode(
        self,
        sentences: str | Sequence[str],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool = False,
    ) -> np.ndarray:
        """Unit vectors of texts, float32, (N, D); (D,) for one text. Longer texts are cut.

        Args:
            sentences: A text or N texts.
            prompt_name: A prompt of the checkpoint. None: its default.
            prompt: Put before each text instead.
            batch_size: Taken for the sake of callers of `SentenceTransformer.encode`; as many texts as fit are
                embedded together.
            show_progress_bar: Taken for the same reason; there is none.

        Raises:
            TypeError: If an entry is no text.
            ValueError: If there is no such prompt, or the checkpoint pools without prompts.
        """
        name = prompt_name or self.default_prompt
        if prompt is None and name is not None:
            if name not in self.prompts:
                raise ValueError(f"the checkpoint has no prompt {name!r}; it has: {', '.join(self.prompts) or 'none'}")
            prompt = self.prompts[name]
        check_texts(sentences)
        texts = [sentences] if isinstance(sentences, str) else list(sentences)
        vectors = self.embed(self.tokenize(texts, prompt))
        return vectors[0] if isinstance(sentences, str) else vectors

    def encode_query(self, sentences: str | Sequence[str], **options: Any) -> np.ndarray:
        """As `encode`, with the prompt for queries if there is one."""
        return self._encode_with(("query",), sentences, options)

    def encode_document(self, sentences: str | Sequence[str], **options: Any) -> np.ndarray:
        """As `encode`, with the prompt for documents if there is one."""
        return self._encode_with(("document", "passage", "corpus"), sentences, options)

    def _encode_with(self, names: tuple[str, ...], sentences: Any, options: dict[str, Any]) -> np.ndarray:
        if options.get("prompt_name") is None and options.get("prompt") is None:
            options["prompt_name"] = next((name for name in names if name in self.prompts), None)
        return self.encode(sentences, **options)

    def tokenize(self, texts: Sequence[str], prompt: str | None) -> list[Tokens]:
        """See `Engine`."""
        if prompt and not self.parts.include_prompt:
            raise ValueError(f"the checkpoint {POOLS_WITHOUT_PROMPTS}; leave `prompt` out, or take UBMoE")
        found = []
        for text in texts:
            ids = self._token_ids((prompt or "") + text) or [self._end_token()]
            found.append(Tokens(ids[: self.longest_text], cut=len(ids) > self.longest_text))
        return found

    @property
    def max_seq_length(self) -> int:
        """`longest_text`, under the name by which indexes ask for it."""
        return self.longest_text

    def tokenizer(self, texts: Sequence[str], truncation: bool = False) -> dict[str, list[list[int]]]:
        """Token ids of texts with special tokens, as a tokenizer of transformers gives them: indexes count by them.

        Args:
            texts: N texts.
            truncation: Only what `encode` reads of each.

        Returns:
            `input_ids`, N lists.
        """
        read = self.longest_text if truncation else None
        return {"input_ids": [self._token_ids(text)[:read] for text in texts]}

    def _end_token(self) -> int:
        # As in the torch encoder: a text without tokens is embedded as one end token.
        return int(self._library.lib.llama_vocab_eos(self._vocab))

    def _token_ids(self, text: str, *, special: bool = True) -> list[int]:
        if self.parts.nfc:
            text = unicodedata.normalize("NFC", text)
        raw = text.encode("utf-8", "replace")
        size = len(raw) + 8
        out = self._library.ffi.new(f"llama_token[{size}]")
        with self._in_use():
            count = self._library.lib.llama_tokenize(self._vocab, raw, len(raw), out, size, special, True)
        if count < 0:
            raise ValueError(f"llama.cpp could not tokenise a text of {len(text)} characters")
        return list(out[0:count])

    def embed(self, batch: Sequence[Tokens]) -> np.ndarray:
        """See `Engine`."""
        vectors = np.empty((len(batch), self._width), np.float32)
        with self._in_use(), self._encoder_lock:
            first = 0
            while first < len(batch):
                last, used = first, 0
                while last < len(batch) and last - first < self._sequences:
                    used += len(batch[last].ids)
                    if used > self.longest_text:
                        break
                    last += 1
                vectors[first:last] = self._embed([tokens.ids for tokens in batch[first:last]])
                first = last
        for weight, bias in self.parts.dense:
            vectors = vectors @ weight.T + bias
        vectors = vectors[:, : self.dimension]
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)

    def _embed(self, rows: list[list[int]]) -> np.ndarray:
        ffi, lib = self._library.ffi, self._library.lib
        count = sum(map(len, rows))
        batch = lib.llama_batch_init(count, 0, 1)
        try:
            batch.n_tokens = count
            position = 0
            for sequence, ids in enumerate(rows):
                for place, token in enumerate(ids):
                    batch.token[position], batch.pos[position] = token, place
                    batch.n_seq_id[position], batch.seq_id[position][0] = 1, sequence
                    batch.logits[position] = 1
                    position += 1
            memory = lib.llama_get_memory(self._encoder)
            if memory != ffi.NULL:
                lib.llama_memory_clear(memory, True)
            failed = (lib.llama_encode if memory == ffi.NULL else lib.llama_decode)(self._encoder, batch)
            if failed:
                raise RuntimeError(f"llama.cpp could not embed {count} tokens (status {failed})")
            vectors = [lib.llama_get_embeddings_seq(self._encoder, sequence) for sequence in range(len(rows))]
            size = self._width * 4
            return np.stack([np.frombuffer(ffi.buffer(vector, size), np.float32) for vector in vectors])
        finally:
            lib.llama_batch_free(batch)

    # --- generating ------------------------------------------------------------------------------------------

    def generate(
        self,
        prompt: str | list[Message],
        *,
        max_new_tokens: int = 256,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        stream: bool = False,
    ) -> str | Iterator[str]:
        """Continue a text, or answer a chat.

        Args:
            prompt: A text, or messages with `role` and `content`.
            max_new_tokens: At most so many tokens.
            temperature: 0: greedy. None: as the base model's generation config says.
            top_p: Share of the probability that is kept.
            top_k: Only so many tokens.
            seed: The same seed gives the same text.
            stop: Text, or texts, before which the new text ends.
            stream: Return an iterator over pieces of text.

        Raises:
            ValueError: If prompt and answer do not fit into the context, or nothing is to be generated.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        if not isinstance(prompt, str) and prompt and prompt[-1].get("role") == "assistant":
            raise ValueError(
                "a chat that ends with the assistant's turn is continued by UBMoE.generate alone; end it with the "
                "user's, or give the chat as the text that the template makes of it"
            )
        ids = self.continuation_ids(prompt)
        if len(ids) + max_new_tokens > self.context:
            raise ValueError(
                f"the prompt has {len(ids)} tokens and max_new_tokens is {max_new_tokens}, but the context holds "
                f"{self.context}; ask for fewer, or load with a larger context"
            )
        stops = [stop] if isinstance(stop, str) else stop
        pieces = self._pieces(ids, Sampling(max_new_tokens, temperature, top_p, top_k, seed), stops)
        return pieces if stream else "".join(pieces)

    def _pieces(self, ids: list[int], sampling: Sampling, stops: Sequence[str]) -> Iterator[str]:
        text = TextStream(self, stops)
        sent: SimpleQueue[str | BaseException | None] = SimpleQueue()
        abandoned = threading.Event()

        def on_token(token: int) -> bool:
            sent.put(text.push(token))
            return not text.finished and not abandoned.is_set()

        def work() -> None:
            try:
                with self._in_use():  # to the last piece, which is decoded here
                    self.generate_tokens(ids, sampling, on_token)
                    sent.put(text.rest())
                sent.put(None)
            except Exception as error:
                sent.put(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            while (piece := sent.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                if piece:
                    yield piece
        finally:
            abandoned.set()
            thread.join()

    def continuation_ids(self, prompt: str | list[Message]) -> list[int]:
        """See `Engine`."""
        if isinstance(prompt, str):
            ids = self._token_ids(prompt)
        elif self.parts.chat_template is None:
            raise ValueError("this checkpoint has no chat template; ask for a completion of a text instead")
        else:
            ids = self._token_ids(self._chat_text(prompt), special=False)
        if not ids:
            raise ValueError("the prompt is empty: there is nothing to continue")
        return ids

    def _chat_text(self, messages: list[Message]) -> str:
        from jinja2.exceptions import TemplateError

        from ubmoe_st.chat_templates import environment

        try:
            template = environment().from_string(self.parts.chat_template or "")
            return template.render(messages=messages, add_generation_prompt=True, **self.parts.special_tokens)
        except (TemplateError, TypeError) as error:
            raise ValueError(f"the chat template does not take this chat: {error}") from error

    def generate_tokens(self, ids: list[int], sampling: Sampling, on_token: OnToken) -> None:
        """See `Engine`."""
        ffi, lib = self._library.ffi, self._library.lib
        draw = sampler(sampling, self.parts.defaults)
        with self._in_use(), self._a_generator() as generator:
            lib.llama_memory_clear(lib.llama_get_memory(generator), True)
            fresh = ids
            for _ in range(sampling.max_tokens):
                for begin in range(0, len(fresh), _PREFILL):
                    part = ffi.new("llama_token[]", fresh[begin : begin + _PREFILL])
                    failed = lib.llama_decode(generator, lib.llama_batch_get_one(part, len(part)))
                    if failed:
                        raise RuntimeError(f"llama.cpp could not read {len(part)} tokens (status {failed})")
                logits = np.frombuffer(
                    ffi.buffer(lib.llama_get_logits_ith(generator, -1), self._vocab_size * 4), np.float32
                )
                token = int(logits.argmax()) if draw is None else draw(logits)
                if not on_token(token) or self.is_end(token):
                    return
                fresh = [token]

    @contextmanager
    def _a_generator(self) -> Iterator[Any]:
        generator = self._generators.get()
        try:
            yield generator
        finally:
            self._generators.put(generator)

    def read_to_rank(self, query: str, documents: Sequence[str], method: str) -> Any:
        """See `Engine`. Not here.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("the engine llama.cpp does not rank; serve the checkpoint with --engine torch")

    def rank(self, reading: Any, go_on: Callable[[], bool]) -> list[float]:
        """See `Engine`. Never called, because nothing can be read to rank.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("the engine llama.cpp does not rank; serve the checkpoint with --engine torch")

    def decode(self, ids: list[int]) -> str:
        """See `Engine`."""
        return b"".join(self._piece(token) for token in ids).decode("utf-8", "replace")

    def _piece(self, token: int) -> bytes:
        ffi, lib = self._library.ffi, self._library.lib
        size = 64
        while True:
            out = ffi.new(f"char[{size}]")
            with self._in_use():
                count = lib.llama_token_to_piece(self._vocab, token, out, size, 0, False)
            if count >= 0:
                return ffi.unpack(out, count)
            size = -count

    def is_end(self, token: int) -> bool:
        """See `Engine`."""
        return bool(self._library.lib.llama_vocab_is_eog(self._vocab, token))

    def is_token(self, token: int) -> bool:
        """See `Engine`."""
        return 0 <= token < self._vocab_size

    def close(self) -> None:
        """Give all memory back; waits for texts that are being generated. Nothing can be asked afterwards."""
        lib = self._library.lib
        with self._changed:
            self._changed.wait_for(lambda: self._uses == 0)
            if self._encoder is None:
                return
            for context in (self._encoder, *(self._generators.get_nowait() for _ in range(self._generators.qsize()))):
                lib.llama_free(context)
            # Adapters go with their model.
            lib.llama_model_free(self._model)
            self._encoder = None

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        """While it is, nothing is freed; to be entered again from within."""
        with self._changed:
            if self._encoder is None:
                raise ValueError("this model is closed: load it again")
            self._uses += 1
        try:
            yield
        finally:
            with self._changed:
                self._uses -= 1
                self._changed.notify_all()
