"""Which fields the HTTP bodies may hold: those that are used, those that are harmless, those that cannot be honoured.

A field that would change the answer is never ignored in silence.
"""

import difflib
from collections.abc import Mapping, Set
from typing import Any

from manta.cluster.doors.errors import RequestError
from manta.configs.sampling import SamplingParams

SAMPLING = frozenset(SamplingParams.model_fields) - {"output_kind"}
SHARED = frozenset(
    {
        "model",
        "stream",
        "stream_options",
        "priority",
        "cache_salt",
        "add_special_tokens",
        "return_token_ids",
        "return_tokens_as_token_ids",
        "request_id",
    }
)
COMPLETION = SAMPLING | SHARED | {"prompt", "echo", "response_format"}
CHAT_TEMPLATE = frozenset(
    {"messages", "add_generation_prompt", "continue_final_message", "chat_template_kwargs", "tools"}
)
TOOLS = frozenset({"tool_choice", "parallel_tool_calls", "include_reasoning"})
CHAT = SAMPLING | SHARED | CHAT_TEMPLATE | TOOLS | {"max_completion_tokens", "top_logprobs", "response_format"}
TOKENIZE = CHAT_TEMPLATE | {"model", "prompt", "add_special_tokens", "return_token_strs"}
POOLING = frozenset({"model", "truncate_prompt_tokens", "add_special_tokens", "priority", "cache_salt", "request_id"})
EMBEDDING = POOLING | CHAT_TEMPLATE | {"input", "encoding_format", "dimensions", "normalize"}
SCORE = POOLING | {"text_1", "text_2"}
DETOKENIZE = frozenset({"model", "tokens"})

# OpenAI clients send these; none of them changes the text.
IGNORED = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
    }
)

# Known but not honoured, with the values that ask for nothing (null always does) and are therefore accepted.
NOT_SUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "logits_processors": ([],),
    "prompt_embeds": (),
    "suffix": ("",),
    "chat_template": (),
    "documents": ([],),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": (),
    "verbosity": (),
    "spaces_between_special_tokens": (True,),
    "mm_processor_kwargs": ({},),
    "kv_transfer_params": (),
    "vllm_xargs": ({},),
}

_HINTS = {
    "top_logprobs": "it belongs to chat; completions take logprobs as a number",
    "chat_template": "start the server with --chat-template",
    "reasoning_effort": "pass what the model's template reads through chat_template_kwargs",
    "tools": "they belong to chat",
    "tool_choice": "it belongs to chat",
}
# Former or misspelt names of constrained output that difflib would not find, and which part of the field they mean.
_CONSTRAINTS = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "structural_tag": "structural_tag",
    "json_schema": "json",
    "regex": "regex",
    "choice": "choice",
    "grammar": "grammar",
    "ebnf": "grammar",
}


def check_fields(
    body: Mapping[str, Any],
    used: frozenset[str],
    ignored: frozenset[str] = IGNORED,
    refused: Mapping[str, tuple[Any, ...]] = NOT_SUPPORTED,
    hints: Mapping[str, str] = _HINTS,
) -> dict[str, Any]:
    """The fields of `body` that are in `used` and not null. Raises RequestError for any other that means something:
    `refused` ones, but for the values that ask for nothing, and unknown ones. `hints` say what to do instead."""
    for name, value in body.items():
        if name in used or name in ignored or (value is None and name in refused):
            continue
        if name not in refused:
            raise _unknown(name, used, ignored | refused.keys())
        if not _asks_for_nothing(name, value, body, refused[name]):
            hint = f"; {hints[name]}" if name in hints else ""
            raise RequestError(f"{name} is not supported by this server{hint}", name, "unsupported_parameter")
    return {name: value for name, value in body.items() if name in used and value is not None}


def _asks_for_nothing(name: str, value: Any, body: Mapping[str, Any], neutral_values: tuple[Any, ...]) -> bool:
    if name in ("tools", "functions"):
        choice = "tool_choice" if name == "tools" else "function_call"
        return value == [] or body.get(choice) == "none"
    # 0 == False: "logprobs": 0 asks for the log probability of the chosen token, so types must agree too.
    return any(type(value) is type(neutral) and value == neutral for neutral in neutral_values)


def _unknown(name: str, used: frozenset[str], known: Set[str]) -> RequestError:
    if name in _CONSTRAINTS or name.startswith(("guided_", "structured")):
        inner = _CONSTRAINTS.get(name)
        advice = f"use structured_outputs={{{inner!r}: ...}}" if inner else "did you mean 'structured_outputs'?"
        return RequestError(f"unknown field {name!r}; {advice}", name, "unknown_parameter")
    return unknown_field(name, used | known, used)


def unknown_field(name: str, known: Set[str], used: Set[str]) -> RequestError:
    """Names the nearest of the known fields, or lists those that are used."""
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6)
    advice = f"did you mean {close[0]!r}?" if close else f"known fields: {', '.join(sorted(used))}"
    return RequestError(f"unknown field {name!r}; {advice}", name, "unknown_parameter")
