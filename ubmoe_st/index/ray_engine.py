"""A build on Ray Data: a task reads the corpus, actors hold the model and write the parts, the driver commits them."""

from __future__ import annotations

import logging
import pickle
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from .embedder import Embedder
from .windows import Part, PartMaker, Reading, Window

BLOCK_BYTES = 1
"""Ray Data joins rows into blocks up to this size: so a window is a block, and goes out as soon as it is full."""


class _Embed:
    """Lives in an actor: one copy of the model. Takes a window, leaves its part in the index folder."""

    def __init__(self, model: Any, truncate_dim: int | None, maker: PartMaker) -> None:
        import ray

        model = ray.get(model) if isinstance(model, ray.ObjectRef) else model
        self._embedder = Embedder(model, truncate_dim=truncate_dim)
        self._maker = maker

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """One window in, one part out; an error of the reader is passed on."""
        item = pickle.loads(batch["item"][0])
        if isinstance(item, Window):
            item = self._maker.make(self._embedder, item)
        return {"item": [pickle.dumps(item)]}


class RayEngine:
    """Embeds windows on the actors of a Ray cluster.

    One read task makes the windows, the same ones a local build makes, because where they begin and end depends on
    what came before. `map_batches` spreads them over actors, which write vectors and entries straight into the index
    folder and hand back no more than size, checksum and position. The caller commits these in order. So the rows and
    the vectors are those of a local build on the same kind of machine, and a stopped build goes on with either.

    Args:
        model: A folder or Hub id that every worker can load, or a model object, which is sent to them.
        truncate_dim: As in `Embedder`.
        workers: Actors.
        resources: What an actor takes, for `map_batches`: `{"num_gpus": 1}`. None: one CPU each.

    Raises:
        ImportError: If ray is not installed.
    """

    def __init__(
        self, model: Any, truncate_dim: int | None, workers: int, resources: dict[str, Any] | None = None
    ) -> None:
        try:
            import ray
            import ray.data
        except ImportError as error:
            raise ImportError("engine='ray' needs Ray Data: pip install 'ubmoe-st[ray]'") from error
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        self._ray: Any = ray
        if not ray.is_initialized():
            ray.init(include_dashboard=False)
        self._model = _everywhere(model) if isinstance(model, str) else ray.put(model)
        self._truncate_dim, self._workers = truncate_dim, workers
        self._resources = resources or {"num_cpus": 1}

    def parts(self, reading: Reading, maker: PartMaker) -> Iterator[Part]:
        """The parts of what is left of a corpus, in order.

        Raises:
            CorpusError: As the reader raised it.
            TypeError: If the corpus cannot be sent to the reader.
        """
        if not reading.corpus.repeatable:
            raise TypeError(
                "engine='ray' needs a corpus that another process can read: a file, a folder, a list or a dataset, "
                f"got {reading.corpus.name}"
            )
        data = self._ray.data
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        windows = data.read_datasource(_source(_absolute(reading)), override_num_blocks=1, num_cpus=0)
        context = windows.context
        context.target_max_block_size = BLOCK_BYTES
        context.enable_progress_bars = context.print_on_execution_start = False
        context.execution_options.preserve_order = True
        parts = windows.map_batches(
            _Embed,
            batch_size=1,
            batch_format="numpy",
            compute=data.ActorPoolStrategy(size=self._workers),
            fn_constructor_args=(
                self._model,
                self._truncate_dim,
                replace(maker, folder=maker.folder.absolute(), suffix=f"-{uuid.uuid4().hex[:8]}"),
            ),
            **self._resources,
        )
        for row in parts.iter_rows():
            item = pickle.loads(row["item"])
            if isinstance(item, BaseException):
                raise item
            yield item


def _everywhere(path: str) -> str:
    """A path as workers find it, which have another working directory; other names, as those of the Hub, stay."""
    return str(Path(path).absolute()) if Path(path).exists() else path


def _absolute(reading: Reading) -> Reading:
    source = reading.corpus.source
    return replace(
        reading,
        corpus=replace(reading.corpus, source=_everywhere(source)) if isinstance(source, str) else reading.corpus,
        base=None if reading.base is None else (reading.base[0].absolute(), reading.base[1]),
        files=[file.absolute() for file in reading.files],
    )


def _source(reading: Reading) -> Any:
    """A Ray Data source of one task, whose rows are pickled windows, and the error that ended them, if one did."""
    import pyarrow as pa
    from ray.data import Datasource
    from ray.data.block import BlockMetadata
    from ray.data.datasource import ReadTask

    def block(item: Any) -> Any:
        return pa.table({"item": pa.array([pickle.dumps(item)], pa.large_binary())})

    def read() -> Iterator[Any]:
        with tempfile.TemporaryDirectory(prefix="ubmoe-index-") as folder:
            try:
                for window in replace(reading, scratch=Path(folder) / "seen").windows():
                    yield block(window)
            except Exception as error:
                yield block(error)

    class Windows(Datasource):
        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(self, *_: Any, **__: Any) -> list[Any]:
            unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
            return [ReadTask(read, unknown)]

    return Windows()
