"""`ubmoe plan`: its options, and its table."""

from __future__ import annotations

from typing import Annotated, Literal

import typer
from rich.table import Table
from rich.text import Text

from ubmoe_st.terminal import JsonFlag, errors_in_one_line, megabytes, out, say_json, status


@errors_in_one_line
def plan(
    base: Annotated[
        str,
        typer.Argument(
            metavar="BASE",
            help="Base to plan for: a config.json, a model folder, a Hub id or a short name.",
            show_default=False,
        ),
    ],
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Weight dtype of the checkpoint; by default that of the base."),
    ] = None,
    rank: Annotated[int, typer.Option(min=0, help="Rank of the low-rank experts; 0 for dense ones.")] = 16,
    precision: Annotated[
        Literal["float32", "bf16-mixed", "bfloat16"],
        typer.Option(help="Precision of training: fp32, autocast over fp32 weights, or frozen weights in bf16."),
    ] = "float32",
    batch: Annotated[int, typer.Option(min=1, help="Texts that one GPU reads in a step; a pair is two.")] = 32,
    text_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each text, padding included.")] = 64,
    checkpointing: Annotated[bool, typer.Option(help="Compute layers again in the backward pass.")] = False,
    gpus: Annotated[int, typer.Option(min=1, help="Number of GPUs.")] = 1,
    gpu_memory: Annotated[float, typer.Option(min=0.1, help="Memory of one GPU in GB.")] = 80.0,
    shard: Annotated[bool, typer.Option(help="Divide the weights over the GPUs, by FSDP2 or ZeRO-3.")] = False,
    train_tokens: Annotated[float, typer.Option(min=1, help="Number of tokens to train on, like 1e9.")] = 1e9,
    tflops: Annotated[float, typer.Option(min=0.001, help="Peak of one GPU in TFLOP/s.")] = 989.0,
    utilization: Annotated[float, typer.Option(min=0.001, max=1.0, help="Share of that peak that is reached.")] = 0.35,
    dollars_per_gpu_hour: Annotated[float | None, typer.Option(min=0.0, help="Price of a GPU for an hour.")] = None,
    context_tokens: Annotated[int, typer.Option(min=1, help="Longest sequence when generating, in tokens.")] = 4096,
    as_json: JsonFlag = False,
) -> None:
    """Show what a checkpoint of a base will take: parameters, bytes, memory and hours, from its config alone."""
    with status(f"planning {base}"):
        from ubmoe_st.planning import Setting
        from ubmoe_st.planning import plan as reckon

        setting = Setting(
            rank=rank or None,
            precision=precision,
            batch=batch,
            text_tokens=text_tokens,
            checkpointing=checkpointing,
            gpus=gpus,
            gpu_memory_gb=gpu_memory,
            shard=shard,
            train_tokens=train_tokens,
            peak_tflops=tflops,
            utilization=utilization,
            dollars_per_gpu_hour=dollars_per_gpu_hour,
            context_tokens=context_tokens,
        )
        facts = reckon(base, setting, dtype=dtype)
    if as_json:
        say_json(facts)
        return
    table = Table(show_header=False, box=None)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("architecture", f"{facts['architecture']}, {facts['dtype']}")
    for part in ("parameters", "files", "training", "encoding", "generating", "time"):
        for key, value in facts[part].items():
            count = isinstance(value, int) and not isinstance(value, bool)
            shown = (
                megabytes(value) if count and part not in ("parameters", "time") else f"{value:,}" if count else value
            )
            table.add_row(f"{part}: {key.replace('_', ' ')}", Text(str(shown)))
    out.print(table)
