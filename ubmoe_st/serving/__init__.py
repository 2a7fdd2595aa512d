"""Both views behind one HTTP port, by the OpenAI protocol: `ubmoe serve`, or `create_app` in a server of your own."""

from .app import create_app
from .engine import Engine, Sampling, Tokens
from .settings import Settings

__all__ = ["Engine", "Sampling", "Settings", "Tokens", "create_app"]
