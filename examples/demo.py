"""One model, three jobs: index the standard library's docstrings, search them, answer from them.

`python -m examples.demo models/ubmoe-135m`. The last step compares the generator with the untouched base model.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from pathlib import Path

from rich.console import Console

from space.stdlib_corpus import write_corpus
from ubmoe_st.answers import answer, hit_table, search_options

QUESTIONS = [
    "read a csv file row by row",
    "wait for several coroutines",
    "copy a directory tree",
    "measure how long a small piece of code takes",
    "turn a dictionary into a JSON string",
]
ANSWERED = 2
FOLDER = Path("indexes")

console = Console()


def main(model_folder: str) -> None:
    """Run the demo and print each step.

    Args:
        model_folder: The checkpoint.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from ubmoe_st import EmbeddingIndex, UBMoE
    from ubmoe_st.lossless import recorded_base

    logging.disable_progress_bar()
    console.rule("1. one model")
    model = UBMoE(model_folder, low_memory=True)
    report = model.memory_report()
    console.print(
        f"{model_folder}: both views in {report['total'] / 1e6:,.0f} MB, "
        f"{report['ratio']:.3f} times the base model alone"
    )

    console.rule("2. index the docstrings of the standard library")
    corpus = FOLDER / "stdlib.jsonl"
    count = write_corpus(corpus)
    start = time.perf_counter()
    index = EmbeddingIndex.build(
        model,
        corpus,
        FOLDER / "stdlib",
        kind="flat",
        with_title=False,  # the experts were trained on sentences, not on dotted names
        progress=True,
        overwrite=True,
        model_id=str(Path(model_folder).resolve()),
    )
    if importlib.util.find_spec("bm25s") is not None:
        index.build_bm25()
    console.print(f"{count:,} docstrings indexed in {time.perf_counter() - start:,.0f} s")

    console.rule("3. search")
    answers = index.search_entries(QUESTIONS, k=4, **search_options(index))
    for question, hits in zip(QUESTIONS, answers, strict=True):
        console.print(hit_table(hits, title=f"\n{question}"))

    console.rule("4. answer from what was found, with the same weights")
    question = f"Which function should I call to {QUESTIONS[ANSWERED]}?"
    console.print(f"[bold]{question}[/bold]")
    for piece in answer(model, question, answers[ANSWERED][:2], max_new_tokens=60, stream=True):
        console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
    console.print()
    for number, hit in enumerate(answers[ANSWERED][:2], 1):
        console.print(f"  [{number}] {hit.id}", markup=False)

    console.rule("5. generation is lossless")
    config = model.ubmoe_config
    base = recorded_base(config)
    untouched = AutoModelForCausalLM.from_pretrained(base.path, dtype=model.dtype).eval()
    inputs = model.tokenizer(["Bits are bits.", "The quick brown fox jumps over"], padding=True, return_tensors="pt")
    with torch.inference_mode():
        ours = model.generator(**inputs).logits
        theirs = untouched(**inputs).logits
        bi = model.generator_for("bi")(**inputs).logits
    console.print(f"base model: {config.base_model if config else base.name}")
    console.print(f"largest difference of logits, generator view - base:  {(ours - theirs).abs().max().item():g}")
    console.print(f"the same for the bi experts, so that it says something: {(bi - theirs).abs().max().item():.3g}")
    if not torch.equal(ours, theirs):
        raise SystemExit("the generator view differs from the base model")


if __name__ == "__main__":
    main(*sys.argv[1:2] or ["models/ubmoe-135m"])
