"""The app as a Ray Serve deployment: `ubmoe serve --engine ray`, or `serve run ubmoe_st.serving.ray_app:build`."""

from __future__ import annotations

import signal
import threading
from typing import Any

from ubmoe_st.terminal import say

from .settings import Settings


def import_serve() -> Any:
    """The module `ray.serve`.

    Raises:
        ImportError: Saying what to install.
    """
    try:
        from ray import serve
    except ImportError as error:
        raise ImportError("--engine ray needs Ray Serve: pip install 'ubmoe-st[serve,serve-ray]'") from error
    return serve


def build(arguments: dict[str, Any]) -> Any:
    """A Ray Serve application; its replicas, their autoscaling and their recovery are Ray's.

    From a shell: `serve run ubmoe_st.serving.ray_app:build model=models/ubmoe-135m`.

    Args:
        arguments: `model`, a folder or Hub id that every machine can read; `deployment`, options of the deployment such
            as `num_replicas`, `autoscaling_config`, `ray_actor_options`; others as for `load_app`.

    Raises:
        ValueError: If `model` is missing.
    """
    serve = import_serve()
    options = dict(arguments)
    path = options.pop("model", None)
    if not path:
        raise ValueError("the application needs the argument `model`: a checkpoint folder or Hub id")
    deployment = options.pop("deployment", {})
    options["settings"] = options.get("settings") or Settings()

    def app() -> Any:
        # Called in the replica: neither the model nor the app could be sent there.
        from .loading import load_app

        return load_app(path, **options)

    @serve.deployment(name="ubmoe", **deployment)
    @serve.ingress(app)
    class Replica:
        """One model with its own queues."""

    deployed: Any = Replica
    return deployed.bind()


def run(
    path: str, *, replicas: int, host: str, port: int, settings: Settings, threads: int | None = None, **options: Any
) -> None:
    """Serve on the Ray cluster this machine belongs to, or on one of its own, until interrupted.

    Args:
        path: Checkpoint folder or Hub id, readable by every machine.
        replicas: How many.
        host: Address to listen on.
        port: To listen on.
        settings: Limits of each replica.
        threads: Of each replica; also the cores that Ray keeps for it.
        **options: As for `load_app`.
    """
    serve = import_serve()
    import ray

    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
    cores = {"num_cpus": threads} if threads else {}
    deployment = {
        "num_replicas": replicas,
        "ray_actor_options": cores,
        # Ray hands a replica no more requests than these at a time; its own queues are shorter.
        "max_ongoing_requests": settings.max_waiting + settings.generations + 64,
        "graceful_shutdown_timeout_s": 5,
    }
    others = bool(serve.status().proxies)  # Serve runs already, with an address and maybe applications of its own
    if others:
        say("Ray Serve runs on this cluster already: the application is at its address, not at --host and --port")
    else:
        serve.start(http_options={"host": host, "port": port})
    arguments = {"model": path, "settings": settings, "threads": threads, "deployment": deployment, **options}
    arguments["local"] = options.get("api_key") is None
    serve.run(build(arguments), name="ubmoe", route_prefix="/")
    if not others:
        say(f"http://{host}:{port}/v1")
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    stop.wait()
    if others:
        serve.delete("ubmoe")
    else:
        serve.shutdown()
