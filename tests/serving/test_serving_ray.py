"""The app as a Ray Serve deployment: two replicas give the vectors of one, and one may die."""

from __future__ import annotations

import os
import time

import httpx
import numpy as np
import pytest
from helpers.models import TEXTS

ray = pytest.importorskip("ray")
serve = pytest.importorskip("ray.serve")
pytest.importorskip("fastapi")

from ubmoe_st import UBMoE  # noqa: E402 - after the skips
from ubmoe_st.serving.ray_app import build  # noqa: E402

PATIENCE = {
    "RAY_raylet_start_wait_time_s": "300",
    "RAY_agent_register_timeout_ms": "300000",
    "RAY_worker_register_timeout_seconds": "300",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",
}


@pytest.fixture(scope="module")
def url(checkpoint):
    """Two replicas on a Ray of their own, whose workers find this source tree."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    # Its own limits are for idle machines.
    for name, value in PATIENCE.items():
        os.environ.setdefault(name, value)
    paths = os.pathsep.join([str(os.getcwd()), os.environ.get("PYTHONPATH", "")])
    environment = {"env_vars": {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}}
    # A cluster of its own: another test may have one on this machine.
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        deployment = {"num_replicas": 2, "ray_actor_options": {"num_cpus": 1}, "health_check_period_s": 1}
        arguments = {"model": str(checkpoint), "name": "tiny", "threads": 1, "deployment": deployment}
        serve.run(build(arguments), name="ubmoe", route_prefix="/")
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()
    finally:
        ray.shutdown()


def vectors(url, texts):
    answer = httpx.post(f"{url}/v1/embeddings", json={"input": texts}, timeout=60)
    assert answer.status_code == 200, answer.text
    return np.array([entry["embedding"] for entry in answer.json()["data"]])


def replicas():
    return [actor for actor in ray.util.list_named_actors(all_namespaces=True) if "ubmoe#ubmoe#" in actor["name"]]


def test_two_replicas_embed_and_generate_and_one_may_die(url, checkpoint):
    """No request after a killed replica is lost, and another takes its place."""
    model = UBMoE(str(checkpoint), device="cpu")
    expected = model.encode(TEXTS)
    for _ in range(4):
        np.testing.assert_allclose(vectors(url, TEXTS), expected, atol=1e-5)
    body = {"prompt": "the cat", "max_tokens": 6, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    first = {actor["name"] for actor in replicas()}
    assert len(first) == 2
    killed = replicas()[0]
    ray.kill(ray.get_actor(killed["name"], namespace=killed["namespace"]))
    for _ in range(20):
        np.testing.assert_allclose(vectors(url, TEXTS[:2]), expected[:2], atol=1e-5)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and len({actor["name"] for actor in replicas()} - {killed["name"]}) < 2:
        time.sleep(1)
    assert len({actor["name"] for actor in replicas()} - first) == 1


def test_the_application_needs_a_model():
    with pytest.raises(ValueError, match="`model`"):
        build({})
