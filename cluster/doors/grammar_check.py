"""Whether a grammar can be compiled, found out in a process that can be killed: grammars are programs of strangers."""

import asyncio
import contextlib
import hashlib
import importlib.util
import json
import os
import sys
from collections import OrderedDict
from pathlib import Path

from manta.cluster.doors.errors import Kind, RequestError
from manta.cluster.preflight import model_folder
from manta.configs.schema import ServeConfig
from manta.configs.structured_outputs import GrammarKind, StructuredOutputsParams
from manta.protos.sampling_pb2 import Grammar

TIMEOUT_S = 10.0  # for one grammar
START_TIMEOUT_S = 120.0  # the process loads libraries and the vocabulary before the first
MAX_WAITING = 64  # different grammars at once
MAX_REMEMBERED = 4096  # grammars that were found good
PARAM = "structured_outputs"
_NEEDED = {"model", "tokenizer", "trust_remote_code"}  # of the configuration; the rest is nobody's business
KINDS: dict[GrammarKind, int] = {
    "json_schema": Grammar.JSON_SCHEMA,
    "regex": Grammar.REGEX,
    "ebnf": Grammar.EBNF,
    "structural_tag": Grammar.STRUCTURAL_TAG,
}


class GrammarChecker:
    """One child process, started with the first grammar. Equal grammars are compiled once. Used in one event loop."""

    def __init__(self, config: ServeConfig, timeout_s: float = TIMEOUT_S) -> None:
        self._config = config
        self._timeout_s = timeout_s
        self._child: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()  # the child does one thing at a time
        self._running: dict[bytes, asyncio.Task[None]] = {}
        self._good: OrderedDict[bytes, None] = OrderedDict()  # digests, the last used at the end

    async def check(self, constraint: StructuredOutputsParams | None) -> None:
        """Raises RequestError saying what is wrong with it."""
        if constraint is None:
            return
        if importlib.util.find_spec("xgrammar") is None:
            message = "structured outputs need the package xgrammar: pip install 'manta[structured]'"
            raise RequestError(message, PARAM, "unsupported_parameter")
        kind, text = constraint.grammar_text()
        digest = hashlib.sha256(f"{kind}:{text}".encode()).digest()
        if digest in self._good:
            self._good.move_to_end(digest)
            return
        task = self._running.get(digest)
        if task is None:
            if len(self._running) >= MAX_WAITING:
                message = f"{MAX_WAITING} grammars wait to be compiled; try again"
                raise RequestError(message, PARAM, "queue_full", Kind.OVERLOADED, retry_after_s=1.0)
            task = self._running[digest] = asyncio.create_task(self._try(kind, text))
            task.add_done_callback(lambda task: self._note(digest, task))
        await asyncio.shield(task)  # others may wait for the same one

    async def close(self) -> None:
        """Ends the child."""
        for task in list(self._running.values()):
            task.cancel()
        await asyncio.gather(*self._running.values(), return_exceptions=True)
        await self._end_child()

    def _note(self, digest: bytes, task: "asyncio.Task[None]") -> None:
        del self._running[digest]
        if task.cancelled() or task.exception() is not None:
            return
        self._good[digest] = None
        if len(self._good) > MAX_REMEMBERED:
            self._good.popitem(last=False)

    async def _try(self, kind: GrammarKind, text: str) -> None:
        async with self._turn:
            child = await self._get_child()
            assert child.stdin is not None
            try:
                child.stdin.write(json.dumps({"kind": KINDS[kind], "text": text}).encode() + b"\n")
                error = await _read(child, self._timeout_s)
            except TimeoutError:
                await self._end_child()
                raise RequestError(f"{PARAM} takes more than {self._timeout_s:.0f} s to compile", PARAM) from None
            except (EOFError, ConnectionError):
                await self._end_child()
                raise RequestError(f"{PARAM} cannot be compiled: the compiler failed on it", PARAM) from None
            except BaseException:
                await self._end_child()  # its answer would be taken for that of the next
                raise
            if error is not None:
                raise RequestError(error, PARAM)

    async def _get_child(self) -> asyncio.subprocess.Process:
        if self._child is not None and self._child.returncode is None:
            return self._child
        folder: Path = await asyncio.to_thread(model_folder, self._config)
        words = ["--config-json", self._config.model_dump_json(include=_NEEDED), "--model-folder", str(folder)]
        self._child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "manta.workers.grammar_trial", *words, "--parent-pid", str(os.getpid()),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        try:
            error = await _read(self._child, START_TIMEOUT_S)
        except (TimeoutError, EOFError):
            await self._end_child()
            raise RequestError(
                "structured outputs cannot be checked now: the process that does it does not start", PARAM,
                "internal_error", Kind.INTERNAL,
            ) from None  # fmt: skip
        except BaseException:
            await self._end_child()
            raise
        if error is not None:
            await self._end_child()
            raise RequestError(error, PARAM, "unsupported_parameter")
        return self._child

    async def _end_child(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        await child.wait()


async def _read(child: asyncio.subprocess.Process, timeout_s: float) -> str | None:
    """The child's next answer: what is wrong, or None. Raises TimeoutError, or EOFError when the child has ended."""
    assert child.stdout is not None
    line = await asyncio.wait_for(child.stdout.readline(), timeout_s)
    if not line:
        raise EOFError
    error: str | None = json.loads(line)["error"]
    return error
