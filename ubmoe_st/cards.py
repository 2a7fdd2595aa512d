"""Cards: the README.md of a checkpoint, on disk and on the Hub, and of an export."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ubmoe_st.checkpoint import GENERATOR_FOLDER
from ubmoe_st.configuration import UBMoEConfig

CARD = "README.md"
CUSTOMARY_FOLDERS = ("models", "checkpoints", "runs", "out", "outputs")
"""Where checkpoints lie, by custom."""

_MODEL_CARD = """---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
{front}tags: [sentence-transformers, feature-extraction, sentence-similarity, text-generation, ubmoe]
---

# {name}

One checkpoint that embeds (full attention, `bi` experts, {rank}) and generates {like}
(causal attention, `uni` experts). Embeddings, attention and norms are shared.

```python
from sentence_transformers import SentenceTransformer

embeddings = SentenceTransformer("{name}").encode(["a text", "another text"])
```

```python
from ubmoe_st import UBMoE

model = UBMoE("{name}")
model.encode(["a text"]), model.generate("Once upon a time", max_new_tokens=20)
```

```python
from transformers import AutoModelForCausalLM

generator = AutoModelForCausalLM.from_pretrained("{name}", subfolder="generator")
```

The root of this folder is the encoder. Opened as a causal language model it is **not** the generator:
its FFN weights are the `bi` experts. Use `UBMoE(...).generator`, or the folder `generator`.
"""


def model_card(config: UBMoEConfig | None, name: str) -> str:
    """The card of a checkpoint.

    Args:
        config: What the checkpoint says of itself.
        name: Of the checkpoint: its folder's, or its Hub id.
    """
    base = config.base_model if config else "unknown"
    like = (
        f"exactly like its base\nmodel {base}"
        if base
        else "with weights\nthat were changed since it was made of a base"
    )
    if base and config and config.routing != "uni":
        like = f'by `{config.routing}` routing, and with `routing="uni"` {like}'
    rank = f"low-rank, rank {config.expert_rank}" if config and config.expert_rank else "dense"
    card = _MODEL_CARD.format(name=name, like=like, rank=rank, front=_licence_line(config) + _base_line(base))
    if config and config.training:
        card += f"\nThe `bi` experts were trained: {config.training}.\n"
    return card + (_GEMMA_TERMS if _licence_line(config) else "")


def export_card(
    config: UBMoEConfig | None,
    prompts: Mapping[str, str | None],
    view: str,
    format: str,
    quantize: str | None,
    output: str | None = None,
) -> str:
    """The card of an export, with Python that runs it from within its folder.

    Args:
        config: What the checkpoint says of itself.
        prompts: Of the checkpoint, by name.
        view: `encoder` or `generator`.
        format: `hf`, `multivector`, `cross-encoder`, `onnx` or `openvino`.
        quantize: None or `int8`.
        output: Of a graph: what to ask it for. None: `sentence_embedding` of an encoder, `logits` of a generator.
    """
    output = output or ("sentence_embedding" if view == "encoder" else "logits")
    base = (config.base_model if config else "unknown") or "a changed base"
    encoder = view == "encoder"
    what = "encoder view (full attention, `bi` experts)" if encoder else "generator view (the base model)"
    used = {name: text for name, text in prompts.items() if text} if encoder else {}
    shown = ", ".join(f"{name}: {text!r}" for name, text in used.items())
    kind = f"{format}, {quantize}" if quantize else format
    return (
        f"---\nlibrary_name: {'sentence-transformers' if encoder else 'transformers'}\n"
        f"pipeline_tag: {'sentence-similarity' if encoder else 'text-generation'}\n{_base_line(base)}---\n\n"
        f"The {what} of a UBMoE checkpoint on {base}, exported as {kind}.\n\n"
        f"```python\n{_snippet(view, format, output)}\n```\n"
        + (
            f"\nPrompts ({shown}) are put before a text by sentence-transformers, not by the tokenizer.\n"
            if used
            else ""
        )
        + (
            "\nThe pooling leaves prompts out, and how many tokens they have is not known to a graph: its hidden "
            "states are yours to pool, without those of the prompt.\n"
            if output == "last_hidden_state"
            else ""
        )
    )


def with_licence(text: str, config: UBMoEConfig | None, card: str) -> str:
    """The card of an export with the licence of its checkpoint.

    Args:
        text: The card of the export.
        config: What the checkpoint says of itself.
        card: Of the checkpoint; empty if it has none.
    """
    front = re.match(r"---\n(.*?\n)---\n", card, re.DOTALL)
    said = re.findall(r"^license\w*: .*\n", front[1], re.MULTILINE) if front else []
    line = "".join(said) or _licence_line(config)
    return text.replace("---\n", f"---\n{line}", 1) + (_GEMMA_TERMS if _licence_line(config) else "")


def card_on_the_hub(text: str, name: str, repo_id: str) -> str:
    """The card with the folder's path replaced by the repository's id in its quoted strings; ids of others stay.

    Args:
        text: The card.
        name: Of the folder.
        repo_id: `owner/name`.
    """
    # Of two parts, `models/name` is where the checkpoint lies, and `someone/name` the id of another model.
    first = "|".join([*CUSTOMARY_FOLDERS, *map(re.escape, repo_id.split("/")[:-1])])
    path = rf'"(?:(?:\.{{1,2}}|{first})/(?:[\w.-]+/)*|(?:[\w.-]+/){{2,}})?{re.escape(name)}'
    text = re.sub(rf'{path}/{GENERATOR_FOLDER}"', f'"{repo_id}", subfolder="{GENERATOR_FOLDER}"', text)
    return re.sub(rf'{path}"', f'"{repo_id}"', text)


def renamed_card(text: str, name: str) -> str:
    """A card whose title and code say another name; as it is where it has no code that opens the checkpoint.

    Args:
        text: The card.
        name: The new name, of a folder or on the Hub.
    """
    found = re.search(r'\bUBMoE\("([^"]+)"', text)
    if found is None:
        return text
    old = re.escape(found[1])
    text = re.sub(rf"(?m)^# {old}$", lambda _: f"# {name}", text)
    return re.sub(rf'"{old}(?=["/])', lambda _: f'"{name}', text)


def card_with_datasets(text: str, names: Sequence[str]) -> str:
    """A card whose front matter names the datasets that a model was trained on.

    Args:
        text: The card.
        names: Hub ids.
    """
    from huggingface_hub import ModelCard

    card = ModelCard(text, ignore_metadata_errors=True)
    card.data["datasets"] = list(names)
    return str(card)


def check_front_matter(text: str, file: Path) -> None:
    """Refuse a card that the Hub would refuse, before anything is uploaded.

    Args:
        text: The card.
        file: Where it is from.

    Raises:
        ValueError: If its front matter is not valid.
    """
    import yaml
    from huggingface_hub import ModelCard

    try:
        ModelCard(text)
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"the front matter of {file} is not valid: {' '.join(str(error).split())}") from error


_GEMMA_TERMS = """
Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms. This model is a
derivative of it: the same terms and their prohibited use policy (ai.google.dev/gemma/prohibited_use_policy) hold.
"""


def _licence_line(config: UBMoEConfig | None) -> str:
    """The licence that a base passes on to everything made of it; none for bases whose card says it themselves."""
    return "license: gemma\n" if config and config.base_architecture.startswith("Gemma") else ""


def _base_line(base: str) -> str:
    return f"base_model: {base}\n" if "/" in base else ""


_ENCODER_INPUTS = """from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("tokenizer.json")  # pads and truncates
batch = tokenizer.encode_batch(["a text", "another text"])
inputs = {"input_ids": np.array([x.ids for x in batch])}
inputs["attention_mask"] = np.array([x.attention_mask for x in batch])"""
_GENERATOR_INPUTS = """
ids = np.array([[1, 2, 3]])  # a whole text: there is no KV cache
inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}"""


def _snippet(view: str, format: str, output: str) -> str:
    """Python that runs an export from within its folder, with as few libraries as possible."""
    if format == "hf" and view == "encoder":
        return """from sentence_transformers import SentenceTransformer

print(SentenceTransformer(".").encode(["a text", "another text"]).shape)"""
    if format == "multivector":
        return """from sentence_transformers import MultiVectorEncoder

model = MultiVectorEncoder(".")
queries, documents = model.encode_query(["a cat"]), model.encode_document(["a kitten", "a train"])
print(model.similarity(queries, documents))"""
    if format == "cross-encoder":
        return """from sentence_transformers import CrossEncoder

model = CrossEncoder(".")
print(model.rank("Where is the cat?", ["It sleeps in the house.", "Trains run on time."]))"""
    if format == "hf":
        return """from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")
print(tokenizer.decode(model.generate(**tokenizer("Once", return_tensors="pt"), max_new_tokens=20)[0]))"""
    inputs = _ENCODER_INPUTS if view == "encoder" else _GENERATOR_INPUTS
    if format == "onnx":
        return f"""import numpy as np
import onnxruntime
{inputs}
session = onnxruntime.InferenceSession("onnx/model.onnx")
print(session.run(["{output}"], inputs)[0].shape)"""
    return f"""import numpy as np
import openvino
{inputs}
# Without the hint OpenVINO computes in bf16 where the processor can, and vectors differ by some thousandths.
model = openvino.compile_model("openvino/openvino_model.xml", "CPU", {{"INFERENCE_PRECISION_HINT": "f32"}})
print(model(inputs)["{output}"].shape)"""
