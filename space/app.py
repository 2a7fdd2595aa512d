"""Search an index and answer from it, embeddings and text from the same weights, held in memory once.

Environment: `UBMOE_MODEL` (checkpoint folder or Hub id), `UBMOE_INDEX` (index folder; without one the docstrings of the
Python standard library are indexed at the first start), `UBMOE_BASE` (the base model to compare with; without it the
checkpoint's own `generator`, opened by stock transformers).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import gradio as gr
import torch
from stdlib_corpus import write_corpus
from transformers import AutoModelForCausalLM

from ubmoe_st import EmbeddingIndex, UBMoE
from ubmoe_st.answers import answer, find
from ubmoe_st.bases import resolve_base
from ubmoe_st.checkpoint import GENERATOR_FOLDER

MODEL = "org/ubmoe-135m"
EXAMPLES = ["read a csv file row by row", "copy a directory tree", "turn a dictionary into a JSON string"]
ANSWERED_FROM = 2
MAX_NEW_TOKENS = 80
MAX_CHECKED_TOKENS = 256


def load_model(name: str) -> UBMoE:
    """The model, with its experts on the shared weights where they are low-rank."""
    model = UBMoE(name)
    if model.ubmoe_config is not None and model.ubmoe_config.expert_rank is not None:
        model[0].use_low_memory()
    return model


def load_index(model: UBMoE, folder: Path) -> EmbeddingIndex:
    """The index of a folder; one over the standard library's docstrings is made if there is none."""
    if (folder / "index_info.json").is_file():
        return EmbeddingIndex.open(folder, model=model)
    corpus = folder.with_suffix(".jsonl")
    write_corpus(corpus)
    return EmbeddingIndex.build(model, corpus, folder, kind="flat", with_title=False, progress=True)


def compare(model: UBMoE, base: str | None, text: str) -> dict[str, Any]:
    """Run a text through the generator view and through the base model, opened apart by stock transformers.

    Args:
        model: Both views.
        base: Folder, `.gguf` file, Hub id or short name of the base. None: the checkpoint's `generator` folder.
        text: At most the first 256 tokens are compared.

    Returns:
        What the base was read from, number of tokens, whether all logits are equal bit for bit, and the largest
        difference of logits for the `uni` and, so that it says something, for the `bi` experts.
    """
    source, name = (
        Path(model[0].folder) / GENERATOR_FOLDER,
        "this checkpoint's `generator`, opened by transformers",
    )
    if base:
        found = resolve_base(base)
        source, name = found.path, f"{found.name} ({', '.join(found.sha256)})"
        if model.ubmoe_config is None or found.sha256 != model.ubmoe_config.base_sha256:
            name += ", **not the file this checkpoint was made from**"
    untouched: Any = AutoModelForCausalLM.from_pretrained(source, dtype=model.dtype)
    untouched = untouched.to(model.device).eval()
    ids = torch.tensor([model.token_ids(text)[:MAX_CHECKED_TOKENS]], device=model.device)  # (1, T)
    tokens = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.inference_mode():
        expected = untouched(**tokens).logits
        ours = model.generator(**tokens).logits
        bi = model.generator_for("bi")(**tokens).logits
    return {
        "base": name,
        "tokens": tokens["input_ids"].shape[1],
        "equal": torch.equal(ours, expected),
        "uni": (ours - expected).abs().max().item(),
        "bi": (bi - expected).abs().max().item(),
    }


def build_app(model: UBMoE, index: EmbeddingIndex, base: str | None) -> gr.Blocks:
    """The page: search and answer on one tab, the lossless check on the other."""

    def ask(question: str, count: int) -> Iterator[tuple[list[list[str]], str]]:
        if not question.strip():
            raise gr.Error("Type a question first.")
        hits = find(index, question, int(count))
        rows = [[f"[{n}]", f"{hit.score:.3f}", hit.id, " ".join(hit.text.split())] for n, hit in enumerate(hits, 1)]
        text = ""
        yield rows, text
        for piece in answer(model, question, hits[:ANSWERED_FROM], max_new_tokens=MAX_NEW_TOKENS, stream=True):
            text += piece
            yield rows, text

    def check(text: str) -> str:
        if not text.strip():
            raise gr.Error("Type a text first.")
        result = compare(model, base, text)
        verdict = "**equal bit for bit**" if result["equal"] else "**not equal**"
        return (
            f"Logits of {result['tokens']} tokens against {result['base']}: {verdict}.\n\n"
            "| experts | largest difference of logits |\n|---|---|\n"
            f"| `uni`, which generate | {result['uni']:g} |\n| `bi`, which embed | {result['bi']:.3g} |"
        )

    report = model.memory_report()
    with gr.Blocks(title="ubmoe: one model that embeds and generates") as app:
        gr.Markdown(
            "# One model that embeds and generates\n"
            f"Search and answer below come from the same weights: both views together need "
            f"{report['total'] / 1e6:,.1f} MB, {report['ratio']:.3f} times the base model alone."
        )
        with gr.Tab("Search and answer"):
            question = gr.Textbox(label="Question", value=EXAMPLES[0], elem_id="question")
            count = gr.Slider(1, 10, value=4, step=1, label="Entries")
            button = gr.Button("Search and answer", variant="primary", elem_id="ask")
            gr.Examples(EXAMPLES, inputs=question)
            found = gr.Dataframe(
                headers=["number", "cosine", "entry", "text"],
                label=f"Found among {len(index):,} entries",
                column_widths=["10%", "10%", "25%", "55%"],
                wrap=True,
                interactive=False,
                elem_id="hits",
            )
            answered = gr.Textbox(
                label=f"Answer, from the first {ANSWERED_FROM} entries", lines=4, interactive=False, elem_id="answer"
            )
            gr.on([button.click, question.submit], fn=ask, inputs=[question, count], outputs=[found, answered])
        with gr.Tab("Lossless check"):
            gr.Markdown("The generator is the base model: its logits are compared with the base's, loaded apart.")
            text = gr.Textbox(label="Text", value="The quick brown fox jumps over the lazy dog.", elem_id="text")
            compare_button = gr.Button("Compare", variant="primary", elem_id="compare")
            verdict = gr.Markdown(elem_id="verdict")
            compare_button.click(check, text, verdict)
    return app


def main() -> None:
    """Load everything once and serve the page."""
    try:
        model = load_model(os.environ.get("UBMOE_MODEL", MODEL))
        index = load_index(model, Path(os.environ.get("UBMOE_INDEX", "index")))
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    build_app(model, index, os.environ.get("UBMOE_BASE")).launch()


if __name__ == "__main__":
    main()
