"""Packages that are installed for a test alone."""

from __future__ import annotations

import importlib.metadata


def pretend_installed(monkeypatch, found):
    """Answer for the packages of a dictionary, by name, and for no others; it may change afterwards."""

    def distribution(name):
        if name not in found:
            raise importlib.metadata.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
