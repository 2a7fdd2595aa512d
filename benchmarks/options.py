"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Checkpoint = Annotated[Path, typer.Option(help="UBMoE checkpoint.")]
DataDir = Annotated[Path | None, typer.Option(help="Local data; default $UBMOE_DATA or ../shared/data.")]
ResultsFolder = Annotated[Path, typer.Option(help="Folder of the result files.")]
