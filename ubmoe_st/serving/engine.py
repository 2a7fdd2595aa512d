"""What the HTTP app asks of a model: `Engine`; and `TorchEngine`, a `UBMoE`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from ubmoe_st.model import UBMoE
    from ubmoe_st.ranking import Method, Reading

logger = logging.getLogger(__name__)

Message = dict[str, str]
OnToken = Callable[[int], bool]
"""Takes a new token, says whether to go on."""
_RANKED_TOGETHER = 8
"""Documents of a batch: so soon a ranking stops whose client is gone."""


@dataclass(frozen=True)
class Tokens:
    """A text to embed.

    Attributes:
        ids: Its tokens, those of the prompt before it included.
        prompt_length: How many of them the pooling may leave out. None: as the pooling does without a prompt.
        cut: Whether the text was longer than the encoder takes.
        task: One of the engine's `tasks` that its vector is for. None: the text's own vector.
    """

    ids: list[int]
    prompt_length: int | None = None
    cut: bool = False
    task: str | None = None


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens. What is None is as the base model's generation config says, else greedy.

    With `top_p` or `top_k` tokens are drawn: at temperature 1, where neither names one.

    Attributes:
        max_tokens: At most so many new tokens.
        temperature: 0: the most probable token.
        top_p: Share of the probability that is kept, most probable tokens first.
        top_k: Only the K most probable tokens; 0: all.
        seed: The same seed gives the same text, whatever else runs. None: another text each time.
    """

    max_tokens: int
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None


class Engine(Protocol):
    """A model that embeds and generates. Every method may be called from several threads at once."""

    @property
    def name(self) -> str:
        """What clients call it."""
        ...

    @property
    def dimension(self) -> int:
        """Dimensions of a vector."""
        ...

    @property
    def longest_text(self) -> int:
        """Tokens of the longest text to embed."""
        ...

    @property
    def context(self) -> int:
        """Tokens of a prompt and its continuation together."""
        ...

    @property
    def prompts(self) -> dict[str, str]:
        """Prompts of the encoder by name."""
        ...

    @property
    def default_prompt(self) -> str | None:
        """Name of the prompt of a text that comes without one."""
        ...

    @property
    def tasks(self) -> tuple[str, ...]:
        """For which tasks it has other vectors than the texts' own."""
        ...

    def tokenize(self, texts: Sequence[str], prompt: str | None) -> list[Tokens]:
        """Texts as the encoder takes them, cut where they are too long.

        Args:
            texts: N texts.
            prompt: Put before each.
        """
        ...

    def embed(self, batch: Sequence[Tokens]) -> np.ndarray:
        """Vectors, float32: unit vectors, (N, D), or those of a task, of its length and width.

        Args:
            batch: N texts, of one task.
        """
        ...

    def continuation_ids(self, prompt: str | list[Message]) -> list[int]:
        """Token ids of a text to continue, or of a chat to answer.

        Raises:
            ValueError: If there is nothing to continue, or no chat template.
        """
        ...

    def generate_tokens(self, ids: list[int], sampling: Sampling, on_token: OnToken) -> None:
        """Generate until an end token, `max_tokens`, or `on_token` says no; returns when it is over.

        Args:
            ids: The prompt.
            sampling: How to choose.
            on_token: Called with each new token, an end token included.
        """
        ...

    def read_to_rank(self, query: str, documents: Sequence[str], method: Method) -> Reading:
        """What the base model reads to rank documents, see `ubmoe_st.ranking.read`.

        Args:
            query: One text.
            documents: At least one.
            method: `likelihood` or `yes_no`.

        Raises:
            ValueError: If there is nothing to rank, or the base cannot be asked so.
            NotImplementedError: If this engine does not rank.
        """
        ...

    def rank(self, reading: Reading, go_on: Callable[[], bool]) -> list[float]:
        """The score of each document, in their order; the higher the better.

        Args:
            reading: What `read_to_rank` gave.
            go_on: Asked before each batch.

        Raises:
            CancelledError: If `go_on` says no.
        """
        ...

    def decode(self, ids: list[int]) -> str:
        """Text of tokens, without special ones."""
        ...

    def is_end(self, token: int) -> bool:
        """Whether generation ends with this token."""
        ...

    def is_token(self, token: int) -> bool:
        """Whether the model has such a token."""
        ...


class Sampler:
    """Draws tokens from logits; one for each text, so that its seed is its own.

    Args:
        temperature: Above 0.
        top_p: In (0, 1].
        top_k: 0: all tokens.
        seed: None: of the operating system.
    """

    def __init__(self, temperature: float, top_p: float = 1.0, top_k: int = 0, seed: int | None = None) -> None:
        self._temperature, self._top_p, self._top_k = temperature, top_p, top_k
        self._random = np.random.default_rng(None if seed is None else seed % 2**64)

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """What tokens are drawn with, float64, (V,): temperature, then top-k, then top-p, as in transformers.

        Args:
            logits: (V,).
        """
        wide = logits.astype(np.float64)
        with np.errstate(over="ignore"):  # at a temperature near 0
            scaled = (wide - wide.max()) / self._temperature
        if 0 < self._top_k < len(scaled):
            scaled[scaled < np.partition(scaled, -self._top_k)[-self._top_k]] = -np.inf
        shares = np.exp(scaled)
        shares /= shares.sum()
        if self._top_p < 1.0:
            order = np.argsort(-shares, kind="stable")
            before = np.cumsum(shares[order]) - shares[order]
            # The first token always stays; others as long as those before them do not reach top_p.
            shares[order[1:][before[1:] >= self._top_p]] = 0.0
            shares /= shares.sum()
        return shares

    def __call__(self, logits: np.ndarray) -> int:
        """A token.

        Args:
            logits: (V,).
        """
        return int(self._random.choice(len(logits), p=self.probabilities(logits)))


_SAMPLING: dict[str, Any] = {"min_p": 0, "typical_p": 1, "epsilon_cutoff": 0, "eta_cutoff": 0, "top_h": None}
NOT_SERVED = _SAMPLING | {"num_beams": 1, "num_return_sequences": 1, "stop_strings": []}
"""Keys of a generation config that ask for another text than a server streams, with the values that ask for nothing."""
SHAPING = NOT_SERVED | {
    "repetition_penalty": 1, "encoder_repetition_penalty": 1, "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0, "suppress_tokens": [], "begin_suppress_tokens": [], "bad_words_ids": [],
    "sequence_bias": None, "min_new_tokens": 0, "min_length": 0, "forced_bos_token_id": None,
    "forced_eos_token_id": None, "exponential_decay_length_penalty": None, "guidance_scale": 1,
    "watermarking_config": None, "max_time": None,
}  # fmt: skip
"""Those, and keys that change which token comes next, beside those that `sampler` reads."""
_ONE_TEXT: dict[str, Any] = {
    "do_sample": False, "temperature": None, "top_p": None, "top_k": None, "num_beams": 1, "num_return_sequences": 1,
    "stop_strings": None, "prompt_lookup_num_tokens": None, "assistant_early_exit": None,
    "return_dict_in_generate": False,
}  # fmt: skip
"""The stock loop, greedy, a token at a time, whatever the generation config says."""
_CELLS = 1 << 16
"""Characters, those of padding included, that are tokenised together."""


def tell_unapplied(defaults: Mapping[str, Any], keys: Mapping[str, Any]) -> None:
    """Warn of what a base's generation config asks for and an engine does not do.

    Args:
        defaults: The generation config.
        keys: What is not done, with the values that ask for nothing.
    """
    for key, neutral in keys.items():
        value = defaults.get(key)
        if value is not None and value != neutral and (key not in _SAMPLING or defaults.get("do_sample")):
            logger.warning("the base's generation config has %s=%r, which this engine does not apply", key, value)


def sampler(sampling: Sampling, defaults: dict[str, Any]) -> Sampler | None:
    """The sampler a request asks for. None: greedy.

    Args:
        sampling: Of the request.
        defaults: `do_sample`, `temperature`, `top_p`, `top_k` of the base's generation config.
    """
    temperature = sampling.temperature
    if temperature is None:
        asked = sampling.top_p is not None or sampling.top_k is not None
        unset = 1.0 if asked else 0.0  # as in OpenAI's API: who says of how many tokens wants them drawn
        temperature = (defaults.get("temperature") or 1.0) if defaults.get("do_sample") else unset
    if temperature <= 0:
        return None
    given = defaults if defaults.get("do_sample") else {}
    top_p = sampling.top_p if sampling.top_p is not None else given.get("top_p") or 1.0
    top_k = sampling.top_k if sampling.top_k is not None else given.get("top_k") or 0
    return Sampler(temperature, top_p, top_k, sampling.seed)


def _of_like_length(texts: Sequence[str]) -> Iterator[list[int]]:
    """Rows of texts to tokenise together: tokenising pads all to the longest, so one long text must not meet many."""
    rows: list[int] = []
    for row in sorted(range(len(texts)), key=lambda row: len(texts[row])):
        if rows and (len(rows) + 1) * len(texts[row]) > _CELLS:
            yield rows
            rows = []
        rows.append(row)
    if rows:
        yield rows


class TorchEngine:
    """A `UBMoE` as an engine.

    Args:
        model: The model. Loaded with `low_memory=True` both views take little more memory than the base.
        name: What clients call it.
    """

    def __init__(self, model: UBMoE, name: str) -> None:
        from ubmoe_st.classification import TASK

        self.model, self.name = model, name
        # Built now: the first request would wait for it.
        self._lm: Any = model.generator_for(model.routing)
        self._views: Any = model[0]
        self._defaults = self._lm.generation_config.to_dict()
        tell_unapplied(self._defaults, NOT_SERVED)
        ends = self._defaults.get("eos_token_id")
        self._ends = set(
            ends if isinstance(ends, list) else [ends if ends is not None else model.tokenizer.eos_token_id]
        )
        # Empty ones, too: an empty `document` goes before a `passage`, as in `encode_document`.
        self.prompts = {key: prompt or "" for key, prompt in model.prompts.items()}
        self.default_prompt = model.default_prompt_name
        # As in `encode`: what is cut to fewer dimensions has lost what the task adds.
        self.tasks = (TASK,) if self._views.classification is not None and model.truncate_dim is None else ()
        self.dimension = int(model.get_embedding_dimension() or 0)
        self.context = int(self._lm.config.max_position_embeddings)
        self.longest_text = int(model.max_seq_length or self.context)

    def tokenize(self, texts: Sequence[str], prompt: str | None) -> list[Tokens]:
        """See `Engine`."""
        found: dict[int, Tokens] = {}
        for rows in _of_like_length(texts):
            features: dict[str, Any] = self.model.preprocess([texts[row] for row in rows], prompt=prompt or None)
            for row, padded, mask in zip(rows, features["input_ids"].tolist(), features["attention_mask"].tolist()):
                ids = [token for token, kept in zip(padded, mask) if kept]
                whole = (prompt or "") + texts[row]
                cut = len(ids) >= self.longest_text and len(self._views.token_ids(whole)) > len(ids)
                found[row] = Tokens(ids, features.get("prompt_length"), cut)
        return [found[row] for row in range(len(texts))]

    def embed(self, batch: Sequence[Tokens]) -> np.ndarray:
        """See `Engine`."""
        self.model.eval()  # a caller may train the very model
        task = batch[0].task if batch else None
        added = self._views.classification.linear.out_features if task else 0
        vectors = np.empty((len(batch), self.dimension + added), np.float32)
        for length in {tokens.prompt_length for tokens in batch}:
            rows = [row for row, tokens in enumerate(batch) if tokens.prompt_length == length]
            vectors[rows] = self._embed([batch[row].ids for row in rows], length, task)
        return vectors if task else vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)

    def _embed(self, rows: list[list[int]], prompt_length: int | None, task: str | None) -> np.ndarray:
        import torch

        longest = max(map(len, rows))
        pad = self.model.tokenizer.pad_token_id or 0
        ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=self.model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=self.model.device)
        features: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if prompt_length is not None:
            features["prompt_length"] = prompt_length
        with torch.inference_mode():
            vectors = self.model(features, task=task)["sentence_embedding"]
            if task is None:
                vectors = vectors[:, : self.dimension]  # of a `truncate_dim`
            return vectors.float().cpu().numpy()

    def continuation_ids(self, prompt: str | list[Message]) -> list[int]:
        """See `Engine`."""
        if isinstance(prompt, str):
            ids = self._views.token_ids(prompt)
        elif self.model.tokenizer.chat_template is None:
            raise ValueError("this checkpoint has no chat template; ask for a completion of a text instead")
        else:
            from ubmoe_st.generation import ChatOptions, chat_text

            text = chat_text(self.model.tokenizer, prompt, ChatOptions(continue_final_message=False))
            ids = self._views.token_ids(text, add_special_tokens=False)
        if not ids:
            raise ValueError("the prompt is empty: there is nothing to continue")
        return ids

    def generate_tokens(self, ids: list[int], sampling: Sampling, on_token: OnToken) -> None:
        """See `Engine`."""
        import torch
        from transformers import LogitsProcessorList, StoppingCriteriaList

        draw = sampler(sampling, self._defaults)

        def chosen(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if draw is None:
                return scores
            token = draw(scores[0].float().cpu().numpy())
            only = torch.full_like(scores, -torch.inf)
            only[0, token] = 0.0
            return only

        def over(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return torch.tensor([not on_token(int(input_ids[0, -1]))], device=input_ids.device)

        rows = torch.tensor([ids], device=self._lm.device)
        with torch.inference_mode():
            # What is drawn is made the only choice, with a random state of this text alone.
            self._lm.generate(
                input_ids=rows,
                attention_mask=torch.ones_like(rows),
                max_new_tokens=sampling.max_tokens,
                **_ONE_TEXT,
                pad_token_id=self.model.tokenizer.pad_token_id or 0,
                logits_processor=LogitsProcessorList([chosen]),
                stopping_criteria=StoppingCriteriaList([over]),
            )

    def read_to_rank(self, query: str, documents: Sequence[str], method: Method) -> Reading:
        """See `Engine`."""
        from ubmoe_st.ranking import read

        return read(self._views, query, documents, method)

    def rank(self, reading: Reading, go_on: Callable[[], bool]) -> list[float]:
        """See `Engine`."""
        from ubmoe_st.ranking import score

        return score(self._views, reading, _RANKED_TOGETHER, go_on)

    def decode(self, ids: list[int]) -> str:
        """See `Engine`."""
        return self.model.tokenizer.decode(ids, skip_special_tokens=True)

    def is_end(self, token: int) -> bool:
        """See `Engine`."""
        return token in self._ends

    def is_token(self, token: int) -> bool:
        """See `Engine`."""
        return 0 <= token < self._lm.config.vocab_size
