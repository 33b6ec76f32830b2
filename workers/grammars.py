"""Grammars of structured outputs, compiled for the model's vocabulary by xgrammar (Dong et al., "XGrammar: Flexible and
Efficient Structured Generation Engine for Large Language Models", 2024).

Compiling takes milliseconds to seconds and leaves other Python threads running; a compiled grammar is shared by all
sequences that follow it.
"""

import re
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manta.configs.model import ModelSpec
from manta.configs.schema import ServeConfig
from manta.protos.sampling_pb2 import Grammar

if TYPE_CHECKING:
    import xgrammar as xgr

MAX_CACHED_BYTES = 512 * 2**20  # of compiled grammars; a usual one has 0.01 to 1 MiB
MAX_WHITESPACE = 16  # in a row, between the parts of a JSON text; models may write nothing else for ever
# What xgrammar 0.2 writes for a character of a string with minLength or maxLength holds control characters, which JSON
# does not allow in strings.
_BOUNDED_CHARACTER = r"[^\"\\\r\n]"
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|.)")  # as it is written; `.` takes the second of two backslashes
_JSON_CHARACTER = r"[^\0-\x1f\"\\]"
_NUM_THREADS = 1  # per grammar: the cores are for steps
NOT_INSTALLED = "structured outputs need the package xgrammar: pip install 'manta[structured]'"


class GrammarError(ValueError):
    """The grammar cannot be followed; the message is one sentence for the user."""


class Grammars:
    """Compiles grammars once each. The compiled form of those used last is kept. Safe to call from several threads."""

    def __init__(self, load_vocabulary: "Callable[[], xgr.TokenizerInfo]", max_bytes: int = MAX_CACHED_BYTES) -> None:
        """load_vocabulary: called before the first grammar is compiled; takes seconds, and raises GrammarError."""
        self._load_vocabulary = load_vocabulary
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._compiler: Future[xgr.GrammarCompiler] | None = None
        self._compiled: OrderedDict[tuple[int, str], Future[xgr.CompiledGrammar]] = OrderedDict()  # least used first

    def compile(self, grammar: Grammar) -> "xgr.CompiledGrammar":
        """From the cache, or compiled now. Raises GrammarError."""
        key = (grammar.kind, grammar.text)
        with self._lock:
            future = self._compiled.get(key)
            is_new = future is None
            if future is None:
                future = self._compiled[key] = Future()
            self._compiled.move_to_end(key)
        if is_new:
            try:
                future.set_result(_compile(self._get_compiler(), grammar))
            except BaseException as error:
                future.set_exception(error)
                with self._lock:
                    self._compiled.pop(key, None)
                raise
            self._evict()
        return future.result()

    def _get_compiler(self) -> "xgr.GrammarCompiler":
        with self._lock:
            future = self._compiler
            is_new = future is None
            if future is None:
                future = self._compiler = Future()
        if is_new:
            try:
                future.set_result(_new_compiler(self._load_vocabulary()))
            except BaseException as error:
                future.set_exception(error)
                self._compiler = None
                raise
        return future.result()

    def _evict(self) -> None:
        """Drops what was used least, but never the last one."""
        with self._lock:
            sizes = {key: each.result().memory_size_bytes for key, each in self._compiled.items() if each.done()}
            left = sum(sizes.values())
            for key, size in list(sizes.items())[:-1]:
                if left <= self._max_bytes:
                    return
                del self._compiled[key]
                left -= size


def grammars_of(config: ServeConfig, spec: ModelSpec, small_files: Mapping[str, bytes] | None = None) -> Grammars:
    """For the configured model's vocabulary. Nothing is loaded before the first grammar comes. small_files: of the
    model, by name, where this host does not have it."""
    return Grammars(partial(load_vocabulary, config, spec, small_files))


def load_vocabulary(
    config: ServeConfig, spec: ModelSpec, small_files: Mapping[str, bytes] | None = None
) -> "xgr.TokenizerInfo":
    """The tokens of the configured tokenizer as the model numbers them. Raises GrammarError."""
    if small_files and not config.tokenizer:
        with tempfile.TemporaryDirectory(prefix="manta-tokenizer-") as folder:
            for name, data in small_files.items():
                (Path(folder) / name).write_bytes(data)
            return load_vocabulary(config.model_copy(update={"tokenizer": folder}), spec)
    try:
        import xgrammar as xgr
    except ImportError:
        raise GrammarError(NOT_INSTALLED) from None
    from transformers import AutoTokenizer

    name = config.tokenizer or config.model
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise GrammarError(f"structured outputs need a tokenizer, and none can be loaded from {name!r}: {reason}")
    stop_token_ids = [token for token in spec.eos_token_ids if token < spec.vocab_size]
    if not stop_token_ids:
        raise GrammarError("structured outputs need a model with an end-of-sequence token, and this one names none")
    info = xgr.TokenizerInfo.from_huggingface(tokenizer, vocab_size=spec.vocab_size, stop_token_ids=stop_token_ids)
    # A token without text is never part of what a grammar writes: special tokens would be left out of the text.
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    tokens = [""] * spec.vocab_size
    for token, index in tokenizer.get_vocab().items():
        if index < spec.vocab_size and index not in special:
            tokens[index] = token
    return xgr.TokenizerInfo(
        tokens,
        info.vocab_type,
        vocab_size=spec.vocab_size,
        stop_token_ids=stop_token_ids,
        add_prefix_space=info.add_prefix_space,
    )


def _new_compiler(vocabulary: "xgr.TokenizerInfo") -> "xgr.GrammarCompiler":
    import xgrammar as xgr

    return xgr.GrammarCompiler(vocabulary, max_threads=_NUM_THREADS, cache_enabled=False)


def _compile(compiler: "xgr.GrammarCompiler", grammar: Grammar) -> "xgr.CompiledGrammar":
    try:
        match grammar.kind:
            case Grammar.JSON_SCHEMA:
                return compiler.compile_grammar(_from_schema(grammar.text))
            case Grammar.REGEX:
                return compiler.compile_regex(grammar.text)
            case Grammar.EBNF:
                return compiler.compile_grammar(grammar.text)
            case Grammar.STRUCTURAL_TAG:
                return compiler.compile_structural_tag(grammar.text)
            case _:
                raise GrammarError(f"grammars of kind {grammar.kind} are not known to this worker")
    except (RuntimeError, ValueError, TypeError) as error:  # what the library raises for what it cannot read
        raise GrammarError(f"structured_outputs cannot be compiled: {_reason(error)}") from None


def _from_schema(text: str) -> "xgr.Grammar":
    import xgrammar as xgr

    grammar = xgr.Grammar.from_json_schema(text, max_whitespace_cnt=MAX_WHITESPACE)
    written = str(grammar)
    if _BOUNDED_CHARACTER not in written:
        return grammar
    written = written.replace(_BOUNDED_CHARACTER, _JSON_CHARACTER)
    return xgr.Grammar.from_ebnf(_ESCAPE.sub(_with_four_digits, written))


def _with_four_digits(escape: re.Match[str]) -> str:
    """\\xdf as \\u00df: of the first, the letters that follow would be read as more of its digits."""
    return f"\\u00{escape[1][1:]}" if len(escape[1]) > 1 else escape[0]


def _reason(error: Exception) -> str:
    """The library's words without the place in its own sources."""
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    head, found, rest = first.partition(": ")
    return rest if found and ".cc:" in head else first
