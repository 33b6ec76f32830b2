"""What prompts are made of: token ids where the server takes them, else text; tried on the server before the run."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from manta.cluster.bench.answers import Record
from manta.cluster.bench.errors import BenchError
from manta.cluster.bench.load import Endpoint, Prepared, send_one
from manta.cluster.bench.server_info import ServerModel
from manta.cluster.bench.vocabulary import PromptTokenizer, load_prompt_tokenizer

# Sizes of vocabularies that are tried where none is known; the largest that the server takes is used.
_VOCABULARY_SIZES = (32_000, 4_096, 1_024, 256)
_REFUSALS = (400, 422, 500, 501)  # what servers answer to a body they cannot use


@dataclass(frozen=True)
class Prompts:
    """Token ids to draw prompts from (int32, ascending), and whether they are sent as text."""

    ids: np.ndarray
    as_text: bool
    tokenizer: PromptTokenizer | None
    told: str  # the choice in words


async def choose_prompts(
    args: argparse.Namespace, endpoint: Endpoint, where: str, model: ServerModel, settings: dict[str, Any]
) -> Prompts:
    """Asks the server for one token, with token ids first: they have exactly the wanted length and need no tokenizer.

    Raises BenchError when the server answers no request, or text is needed and no tokenizer is known.
    """
    tokenizer = _tokenizer(args, model)
    ids = np.empty(0, np.int32) if tokenizer is None else tokenizer.plain_ids()
    refusal = ""
    if not endpoint.is_chat and args.dataset_name != "sharegpt":
        if tokenizer is None:
            size, refusal = await _find_vocabulary_size(endpoint, where, settings)
            if size:
                # Special and byte tokens usually come first.
                ids = np.arange(min(256, size // 4), size, dtype=np.int32)
                return Prompts(ids, False, None, f"token ids below {size}, as the server takes; no tokenizer is known")
        else:
            refusal = await _try(endpoint, where, settings | {"prompt": ids[:2].tolist(), "max_tokens": 1})
            if not refusal:
                return Prompts(ids, False, tokenizer, f"token ids, {len(ids)} plain tokens of {tokenizer.name}")
    if tokenizer is None:
        reason = f" ({refusal})" if refusal else ""
        raise BenchError(f"text must be sent{reason}: name the model's tokenizer with --tokenizer FOLDER")
    prompt = {"messages": [{"role": "user", "content": "a"}]} if endpoint.is_chat else {"prompt": "a"}
    length = "max_completion_tokens" if endpoint.is_chat else "max_tokens"
    if refusal := await _try(endpoint, where, settings | prompt | {length: 1}):
        hint = "; --no-ignore-eos leaves out a field that not every server knows" if "ignore_eos" in refusal else ""
        raise BenchError(f"{where}{endpoint.path} answered a first request with {refusal}{hint}")
    return Prompts(ids, True, tokenizer, f"text, {len(ids)} plain tokens of {tokenizer.name}")


def _tokenizer(args: argparse.Namespace, model: ServerModel) -> PromptTokenizer | None:
    """The one asked for, else that of the model if its folder is on this machine. Raises BenchError."""
    for name in (args.tokenizer, model.root, model.name, args.model):
        if name and (name == args.tokenizer or (Path(name).expanduser() / "tokenizer.json").is_file()):
            tokenizer = load_prompt_tokenizer(name, args.trust_remote_code)
            if not len(tokenizer.plain_ids()):
                raise BenchError(f"the tokenizer {name!r} has no plain tokens")
            return tokenizer
    return None


async def _find_vocabulary_size(endpoint: Endpoint, where: str, settings: dict[str, Any]) -> tuple[int, str]:
    """The largest of a few sizes whose last id the server takes, or 0 and why it refused the smallest."""
    refusal = ""
    for size in _VOCABULARY_SIZES:
        refusal = await _try(endpoint, where, settings | {"prompt": [size - 1, size - 2], "max_tokens": 1})
        if not refusal:
            return size, ""
    return 0, refusal


async def _try(endpoint: Endpoint, where: str, body: dict[str, Any]) -> str:
    """ "" if the server answers, else why it refused the body. Raises BenchError for any other failure."""
    record = Record(0, 1)
    await send_one(endpoint, Prepared(orjson.dumps(body), 0, 1), record)
    if record.error and record.status not in _REFUSALS:
        raise BenchError(f"{where}{endpoint.path} answered a first request with {record.error}")
    return record.error
