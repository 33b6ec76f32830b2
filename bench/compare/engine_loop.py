"""The loop of an engine process: load once, then generate as JSON lines on stdin say, one JSON line of answer each.

Imports nothing outside the standard library, because the engines live in environments of their own. What libraries
print goes to stderr.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol


class Engine(Protocol):
    """What an engine script provides."""

    versions: dict[str, str]

    def generate(self, prompts: list[list[int]], output_lens: list[int]) -> list[list[int]]:
        """Greedy output tokens of each prompt, exactly as many as asked for."""
        ...

    def close(self) -> None: ...


def serve(load: Callable[[str, dict[str, Any]], Engine]) -> None:
    """Loads the engine that `load(model, options)` makes from argv (model, options as JSON) and serves until EOF."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    engine = load(sys.argv[1], json.loads(sys.argv[2]))
    try:
        answers.write(json.dumps({"versions": engine.versions}) + "\n")
        for line in sys.stdin:
            request = json.loads(line)
            begin_s = time.perf_counter()
            outputs = engine.generate(request["prompts"], request["output_lens"])
            total_s = time.perf_counter() - begin_s
            answer: dict[str, Any] = {"total_s": total_s, "output_lens": [len(output) for output in outputs]}
            if request.get("return_tokens"):
                answer["tokens"] = outputs
            answers.write(json.dumps(answer) + "\n")
    finally:
        engine.close()
