"""What engines in the caller's own program stand on: worker processes of this host, an engine thread, a tokenizer."""

import random
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from manta.cluster import preflight
from manta.cluster.doors.limits import read_limits
from manta.cluster.doors.text import Tokenizer, load_tokenizer
from manta.cluster.engine.thread import Deliver, EngineThread
from manta.cluster.launch.local import LocalLauncher, local_gpus
from manta.configs.schema import ServeConfig

_WINDOW_FACTOR = 4  # requests kept in the engine, per sequence that can run at once
_WORKER_GRACE_S = 1.0


class OfflineEngine:
    """Starts when it is made and ends with `close`, with its last reference or with the interpreter.

    Raises pydantic.ValidationError, PreflightError, LaunchError, WorkerError, BringUpError or TokenizerError when it
    cannot start; the message says what to change.
    """

    def __init__(
        self, model: str, skip_tokenizer_init: bool, config: dict[str, Any], deliver: Deliver | None = None
    ) -> None:
        """`config` holds fields of ServeConfig; `deliver` as of EngineThread."""
        config.setdefault("distributed_executor_backend", "local")
        self.config = preflight.with_absolute_paths(ServeConfig.model_validate({"model": model} | config))
        if self.config.distributed_executor_backend != "local":
            raise ValueError(
                "offline engines run on this host: distributed_executor_backend must be 'local'; serve with Ray instead"
            )
        spec = preflight.check(self.config, on_gpu=self.config.device != "cpu" and bool(local_gpus()), ports=False).spec
        launcher = LocalLauncher()
        stop_workers = weakref.finalize(self, launcher.stop, _WORKER_GRACE_S)
        self._close: Callable[[], object] = stop_workers
        try:
            with ThreadPoolExecutor(1) as executor:  # importing transformers takes as long as starting workers
                tokenizer = None if skip_tokenizer_init else executor.submit(load_tokenizer, self.config)
                self.thread = EngineThread(self.config, spec, launcher.start_workers(self.config), deliver)
                self._close = weakref.finalize(self, _close, self.thread, launcher)
                stop_workers.detach()
                self.tokenizer: Tokenizer | None = tokenizer.result() if tokenizer else None
            self.limits = read_limits(self.config, self.thread.info.max_model_len)
        except BaseException:
            self.close()
            raise
        self.seeds = random.Random(self.config.seed)

    @property
    def window(self) -> int:
        """Sequences that the engine is given at most at a time; more would only be held twice."""
        window = _WINDOW_FACTOR * self.config.max_num_seqs * self.config.data_parallel_size
        return min(window, self.config.max_num_queued_reqs)

    def text_tokenizer(self) -> Tokenizer:
        """Raises ValueError when there is none."""
        if self.tokenizer is None:
            raise ValueError("texts need a tokenizer; skip_tokenizer_init=True leaves only token ids")
        return self.tokenizer

    def close(self) -> None:
        """Ends the engine and the worker processes. May be called twice."""
        self._close()


def _close(thread: EngineThread, launcher: LocalLauncher) -> None:
    """The engine first: it would take ending workers for failing ones."""
    try:
        thread.close()
    finally:
        launcher.stop(_WORKER_GRACE_S)
