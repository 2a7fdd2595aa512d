"""Fixtures: tiny random models, made once a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.gguf import make_gguf_checkpoint
from helpers.models import make_base, make_checkpoint


@pytest.fixture(scope="session")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(architecture: str = "llama") -> Path:
        if architecture not in made:
            made[architecture] = make_base(tmp_path_factory.mktemp(architecture) / "base", architecture)
        return made[architecture]

    return get


@pytest.fixture(scope="session")
def checkpoint_of(base_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(architecture: str = "llama") -> Path:
        if architecture not in made:
            made[architecture] = make_checkpoint(
                base_of(architecture), tmp_path_factory.mktemp(architecture) / "ubmoe-tiny"
            )
        return made[architecture]

    return get


@pytest.fixture(scope="session")
def checkpoint(checkpoint_of: Callable[[str], Path]) -> Path:
    return checkpoint_of("llama")


@pytest.fixture(scope="session")
def base(base_of: Callable[[str], Path]) -> Path:
    return base_of("llama")


@pytest.fixture(scope="session")
def gguf_checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    made: dict[str, tuple[Path, Path]] = {}

    def get(name: str) -> tuple[Path, Path]:
        if name not in made:
            made[name] = make_gguf_checkpoint(tmp_path_factory.mktemp(name), name)
        return made[name]

    return get
