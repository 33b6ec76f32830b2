"""`python -m manta.workers.grammar_trial`: compiles grammars that nobody has looked at yet, so that one that takes all
the time or memory there is harms this process alone.

Reads lines of JSON, {"kind": number, "text": text}, on standard input, and answers each with a line {"error": sentence}
or {"error": null}; the first answer, before any line, says whether grammars can be compiled at all. Ends with its
input, and when its parent dies. Whoever waits too long for an answer kills it.
"""

import argparse
import json
import os
import resource
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

from manta.configs.model import ModelError, read_model_spec
from manta.configs.schema import ServeConfig
from manta.protos.sampling_pb2 import Grammar
from manta.workers.grammars import GrammarError, Grammars, load_vocabulary
from manta.workers.parent import watch_parent

MAX_COMPILED_BYTES = 2 * 2**30  # beside what the vocabulary takes
_CACHED_BYTES = 1  # nothing is kept: an answer is remembered by whoever asks
_NICENESS = 10  # steps come first


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m manta.workers.grammar_trial")
    parser.add_argument("--config-json", required=True, help="configs.schema.ServeConfig as JSON")
    parser.add_argument("--model-folder", type=Path, required=True, help="where the model's config.json is")
    parser.add_argument("--parent-pid", type=int, required=True, help="end when this is no longer the parent process")
    args = parser.parse_args()
    watch_parent(args.parent_pid, on_death=lambda: os._exit(0))
    os.nice(_NICENESS)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
    try:
        vocabulary = load_vocabulary(
            ServeConfig.model_validate_json(args.config_json), read_model_spec(args.model_folder)
        )
    except (GrammarError, ModelError) as error:
        _answer(answers, str(error))
        return
    _limit_memory()
    _answer(answers, None)
    _serve(Grammars(lambda: vocabulary, _CACHED_BYTES), sys.stdin, answers)


def _serve(grammars: Grammars, lines: Iterable[str], answers: TextIO) -> None:
    for line in lines:
        asked = json.loads(line)
        try:
            grammars.compile(Grammar(kind=asked["kind"], text=asked["text"]))
        except GrammarError as error:
            _answer(answers, str(error))
        except MemoryError:
            _answer(answers, "structured_outputs takes too much memory to compile")
        else:
            _answer(answers, None)


def _answer(answers: TextIO, error: str | None) -> None:
    print(json.dumps({"error": error}), file=answers, flush=True)


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) if sys.platform == "linux" else 0
    if pages:
        limit = pages * resource.getpagesize() + MAX_COMPILED_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    main()
