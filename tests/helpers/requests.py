"""Requests to an app on the loopback, and what is expected of their answers."""

from __future__ import annotations

import httpx
import numpy as np
import pytest
import torch

from helpers.servers import serving

pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")

# One for all requests: making a client reads the certificates, which takes longer than most tests.
client = httpx.Client(timeout=60, limits=httpx.Limits(max_keepalive_connections=0))


def running(app, **options):
    """The app behind uvicorn on a free port of the loopback."""
    return serving(uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", **options)))


def post(url, path, status=200, **body):
    answer = client.post(f"{url}/v1/{path}", json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


def vectors_of(found):
    return np.array([entry["embedding"] for entry in found["data"]], np.float32)


def greedy(lm, model, prompt, count, **options):
    ids = torch.tensor([model.token_ids(prompt)])
    new = lm.generate(ids, max_new_tokens=count, do_sample=False, pad_token_id=0, **options)[0, ids.shape[1] :]
    return new.tolist()
