"""What a checkpoint says of itself, without its weights."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from .names import (
    BI_FILE,
    DELTA_FILE,
    HEAD_FILE,
    MODULES_FILE,
    ONE_FILE,
    ROUTER_FILE,
    SHARED_FILE,
    UNI_FILE,
    CheckpointError,
    is_checkpoint,
)
from .structure import check_files, json_of, module_paths, read_config, read_shapes


def facts(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a checkpoint holds, from its JSON files and safetensors headers alone.

    Args:
        path: The checkpoint folder.

    Returns:
        For JSON: `name`, `architecture`, `layers`, `dimension`, `expert_rank`, `routing`, `router`, `parameters`
        (counts), `bytes` (by part), `base`, `layout_version` and `versions`.

    Raises:
        CheckpointError: If a file is missing, truncated or not valid.
        FileNotFoundError: If the folder is not a checkpoint.
    """
    root = Path(path)
    if not is_checkpoint(root):
        raise FileNotFoundError(f"{root} is not a UBMoE checkpoint; make one with `ubmoe build BASE --out {root}`")
    config = read_config(root)
    check_files(root)
    stock = json_of(root, "config.json")
    unset = [key for key in ("num_hidden_layers", "hidden_size") if type(stock.get(key)) is not int]
    if unset:
        raise CheckpointError(f"config.json: expected a whole number {unset[0]}, got {stock.get(unset[0])!r}")
    parts = {"delta": DELTA_FILE} if config.expert_rank is not None else {}
    parts |= {"router": ROUTER_FILE} if config.router is not None else {}
    parts |= {"classification": HEAD_FILE} if (root / HEAD_FILE).is_file() else {}
    parts = {"shared": SHARED_FILE, "bi": BI_FILE, "uni": UNI_FILE, **parts}
    count = {name: sum(map(math.prod, read_shapes(root, file).values())) for name, file in parts.items()}
    # The Hub's cache links two names to one blob.
    files = {file.resolve() for file in root.rglob("*") if file.is_file()}
    behind = sum(
        sum(map(math.prod, read_shapes(root, f"{module}/{ONE_FILE}").values()))
        for module in module_paths(root)
        if module and (root / module / ONE_FILE).is_file()
    )
    added = (count.get("delta") or count["bi"]) + count.get("router", 0) + count.get("classification", 0) + behind
    base_parameters = count["shared"] + count["uni"]
    return {
        "name": root.resolve().name,
        "architecture": config.base_architecture,
        "layers": stock["num_hidden_layers"],
        "dimension": min(_dimension(root, stock["hidden_size"]), _kept_dimensions(root)),
        "expert_rank": config.expert_rank,
        "routing": config.routing,
        "router": config.router,
        "parameters": {
            "stored": sum(count.values()) + behind,
            "active_encoding": count["shared"] + count["bi"] + behind,
            "active_generating": base_parameters,
            "base": base_parameters,
            "added": added,
            "added_percent": round(100 * added / base_parameters, 2),
        },
        "bytes": {
            "stored": sum(file.stat().st_size for file in files),
            **{name: (root / file).stat().st_size for name, file in parts.items()},
        },
        "base": {"name": config.base_model, "origin": config.base_origin, "sha256": config.base_sha256},
        "layout_version": config.layout_version,
        "versions": config.versions,
    }


def _dimension(root: Path, hidden: int) -> int:
    for module in reversed(json.loads((root / MODULES_FILE).read_text(encoding="utf-8"))):
        if module["path"] and (root / module["path"] / "config.json").is_file():
            settings = json_of(root, f"{module['path']}/config.json")
            modes, width = settings.get("pooling_mode"), settings.get("embedding_dimension")
            size = settings.get("out_features")
            if isinstance(modes, list) and isinstance(width, int):
                size = len(modes) * width
            if size is not None and type(size) is not int:
                raise CheckpointError(
                    f"{module['path']}/config.json: expected a whole number out_features, got {size!r}"
                )
            if size is not None:
                return size
    return hidden


def _kept_dimensions(root: Path) -> float:
    """How many dimensions of a vector are kept where the checkpoint says so."""
    file = "config_sentence_transformers.json"
    kept = json_of(root, file).get("truncate_dim") if (root / file).is_file() else None
    if kept is not None and type(kept) is not int:
        raise CheckpointError(f"{file}: expected a whole number truncate_dim, got {kept!r}")
    return math.inf if kept is None else kept
