"""The body of POST /v1/responses: which fields it may hold, and what they are in the words of a chat call."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from manta.cluster.doors import fields
from manta.cluster.doors.checks import check_bool, check_int, shown
from manta.cluster.doors.errors import RequestError
from manta.cluster.doors.response_format import apply_response_format
from manta.cluster.doors.responses.function_tools import chat_tools
from manta.cluster.doors.responses.small_objects import check_object, read_metadata
from manta.cluster.doors.text import Tokenizer
from manta.configs.sampling import MAX_LOGPROBS

# What SamplingParams has and a response has no place for.
_NO_PLACE = frozenset({"n", "max_tokens", "logprobs", "prompt_logprobs"})
_EXTRAS = fields.SAMPLING - _NO_PLACE
_CHAT_EXTRAS = frozenset({"priority", "cache_salt", "add_special_tokens", "chat_template_kwargs", "include_reasoning"})
USED = (
    _EXTRAS
    | _CHAT_EXTRAS
    | {"model", "input", "instructions", "stream", "stream_options", "background", "store", "previous_response_id"}
    | {"max_output_tokens", "text", "reasoning", "include", "top_logprobs", "truncation"}
    | {"tools", "tool_choice", "parallel_tool_calls", "metadata"}
)
# Told again in the answer where that has a place for them; none of them changes the text. There are no hosted tools
# whose calls max_tool_calls could limit.
IGNORED = frozenset(
    {"user", "service_tier", "prompt_cache_key", "prompt_cache_retention", "prompt_cache_options", "safety_identifier"}
    | {"max_tool_calls"}
)
REFUSED: Mapping[str, tuple[Any, ...]] = {
    "conversation": (),
    "prompt": (),
    "context_management": ([],),
    "moderation": (),
    "image": (),
    "access_programs": (),
    "messages": (),
    "response_format": (),
    "reasoning_effort": (),
    "verbosity": (),
    "n": (1,),
    "max_tokens": (),
    "max_completion_tokens": (),
    "logprobs": (False,),
    "prompt_logprobs": (),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "chat_template": (),
    "enable_response_messages": (False,),
    "mm_processor_kwargs": ({},),
    "vllm_xargs": ({},),
}
_HINTS = {
    "conversation": "continue a conversation by previous_response_id",
    "prompt": "give the text as instructions and input",
    "messages": "give the conversation as input",
    "response_format": "use text.format",
    "reasoning_effort": "use reasoning.effort",
    "max_tokens": "use max_output_tokens",
    "max_completion_tokens": "use max_output_tokens",
    "logprobs": "use top_logprobs with include=['message.output_text.logprobs']",
    "functions": "use tools",
    "function_call": "use tool_choice",
    "chat_template": "start the server with --chat-template",
}
LOGPROBS = "message.output_text.logprobs"
# What the others ask for does not exist here: results of hosted tools and images, and thinking that is encrypted.
_INCLUDABLE = frozenset(
    {LOGPROBS, "reasoning.encrypted_content", "message.input_image.image_url", "file_search_call.results"}
    | {"web_search_call.results", "web_search_call.action.sources", "computer_call_output.output.image_url"}
    | {"code_interpreter_call.outputs"}
)
_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


@dataclass(frozen=True, slots=True)
class Settings:
    """All of a body but its conversation. `chat` are fields of a chat body, `sampling` those of SamplingParams, and
    `told` what the answer tells again, as it was given."""

    chat: dict[str, Any]
    sampling: dict[str, Any]
    told: dict[str, Any]
    instructions: str | None
    previous_id: str | None
    streams: bool
    is_background: bool
    is_stored: bool
    truncates: bool
    tells_logprobs: bool
    given: dict[str, Any] = field(default_factory=dict)  # the body's fields that are set


def read_settings(body: dict[str, Any], tokenizer: Tokenizer) -> Settings:
    """Raises RequestError naming the field at fault."""
    given = fields.check_fields(body, USED, IGNORED, REFUSED, _HINTS)
    streams = check_bool(given.get("stream", False), "stream")
    _check_stream_options(given, streams)
    is_stored = check_bool(given.get("store", True), "store")
    is_background = check_bool(given.get("background", False), "background")
    if is_background and not is_stored:
        raise RequestError("background needs store=true: its answer is fetched later", "background")
    truncation = given.get("truncation", "disabled")
    if truncation not in ("auto", "disabled"):
        raise RequestError(f"truncation must be 'auto' or 'disabled', not {shown(truncation)}", "truncation")
    tools, told_tools = chat_tools(given)
    sampling, tells_logprobs = _sampling(given)
    chat = {name: given[name] for name in _CHAT_EXTRAS | {"model"} if name in given} | tools
    told = told_tools | {
        "background": is_background,
        "max_output_tokens": given.get("max_output_tokens"),
        "max_tool_calls": body.get("max_tool_calls"),
        "metadata": read_metadata(given.get("metadata", {})),
        "parallel_tool_calls": given.get("parallel_tool_calls", True),
        "previous_response_id": _text_or_none(given, "previous_response_id"),
        "prompt_cache_key": body.get("prompt_cache_key"),
        "reasoning": _reasoning(given, chat, tokenizer),
        "safety_identifier": body.get("safety_identifier"),
        "service_tier": "default",
        "store": is_stored,
        "text": _text_format(given, sampling),
        "top_logprobs": given.get("top_logprobs", 0),
        "truncation": truncation,
        "user": body.get("user"),
    }
    return Settings(
        chat, sampling, told, _text_or_none(given, "instructions"), told["previous_response_id"], streams,
        is_background, is_stored, truncation == "auto", tells_logprobs, given,
    )  # fmt: skip


def retold(error: RequestError) -> RequestError:
    """An error of the chat call underneath, in the words of this API."""
    for ours, theirs in (
        ("response_format.json_schema", "text.format"),
        ("response_format", "text.format"),
        ("max_tokens", "max_output_tokens"),
        ("these messages", "this input"),
        ("messages do not fit", "the input does not fit"),
        ("messages", "input"),
    ):
        error.message = error.message.replace(ours, theirs)
        error.param = error.param and error.param.replace(ours, theirs)
    for ours, theirs in ((".function.", "."),):
        if error.param and error.param.startswith("tools["):
            error.message, error.param = error.message.replace(ours, theirs), error.param.replace(ours, theirs)
    return error


def _check_stream_options(given: dict[str, Any], streams: bool) -> None:
    if "stream_options" not in given:
        return
    if not streams:
        raise RequestError("stream_options needs stream=true", "stream_options")
    options = check_object(given["stream_options"], "stream_options", {"include_obfuscation"})
    check_bool(options.get("include_obfuscation", False), "stream_options.include_obfuscation")


def _text_or_none(given: dict[str, Any], name: str) -> str | None:
    value = given.get(name)
    if value is not None and not isinstance(value, str):
        raise RequestError(f"{name} must be a string, not {shown(value)}", name, "invalid_type")
    return value


def _sampling(given: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Fields of SamplingParams, unchecked, and whether log-probabilities are told."""
    sampling = {name: given[name] for name in _EXTRAS & given.keys()}
    if "max_output_tokens" in given:
        sampling["max_tokens"] = check_int(given["max_output_tokens"], "max_output_tokens", 1, 2**31 - 1)
    include = given.get("include", [])
    if not isinstance(include, list):
        raise RequestError(f"include must be a list of strings, not {shown(include)}", "include", "invalid_type")
    for each in include:
        if not isinstance(each, str) or each not in _INCLUDABLE:
            message = f"include must not hold {shown(each)}; possible are {', '.join(sorted(_INCLUDABLE))}"
            raise RequestError(message, "include")
    num_best = check_int(given.get("top_logprobs", 0), "top_logprobs", 0, MAX_LOGPROBS)
    tells = LOGPROBS in include
    if tells:
        sampling["logprobs"] = num_best
    elif num_best:
        raise RequestError(f"top_logprobs needs include=[{LOGPROBS!r}]", "top_logprobs")
    return sampling, tells


def _text_format(given: dict[str, Any], sampling: dict[str, Any]) -> dict[str, Any]:
    """Adds the constraint of text.format to `sampling`; returns `text` to tell again."""
    text = check_object(given.get("text", {}), "text", {"format", "verbosity"})
    verbosity = text.get("verbosity")
    if verbosity not in (None, "medium"):
        message = "text.verbosity is not supported by this server; say in the instructions how long answers should be"
        raise RequestError(message, "text.verbosity", "unsupported_parameter")
    form = text.get("format")
    if form is None:
        form = {"type": "text"}
    known = {"type", "name", "schema", "strict", "description"}
    form = check_object(form, "text.format", known)
    wrapped: dict[str, Any] = {"type": form.get("type")}
    if form.get("type") == "json_schema":
        wrapped["json_schema"] = {name: form[name] for name in known - {"type"} if name in form}
    try:
        apply_response_format({"response_format": wrapped}, sampling)
    except RequestError as error:
        raise retold(error)
    return {"format": form, "verbosity": "medium"}


def _reasoning(given: dict[str, Any], chat: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """Adds to the chat template's arguments what reasoning.effort is to it; returns `reasoning` to tell again."""
    known = {"effort", "summary", "generate_summary", "context", "mode"}
    asked = check_object(given.get("reasoning", {}), "reasoning", known)
    for name, neutral in (("context", "auto"), ("mode", "standard")):
        if asked.get(name) not in (None, neutral):
            message = f"reasoning.{name} is not supported by this server but for {neutral!r}"
            raise RequestError(message, f"reasoning.{name}", "unsupported_parameter")
    effort, summary = asked.get("effort"), asked.get("summary", asked.get("generate_summary"))
    if summary not in (None, "auto", "concise", "detailed"):
        raise RequestError("reasoning.summary must be 'auto', 'concise' or 'detailed'", "reasoning.summary")
    if effort is not None:
        arguments = effort_arguments(effort, "reasoning.effort", tokenizer)
        kwargs = chat.get("chat_template_kwargs", {})
        if isinstance(kwargs, dict):  # else the chat call underneath says what is wrong
            chat["chat_template_kwargs"] = arguments | kwargs
    return {"effort": effort, "summary": summary}


def effort_arguments(effort: Any, param: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """What an effort of thinking is to the chat template: templates know efforts by name, or thinking as something that
    is on or off. Raises RequestError."""
    if effort not in _EFFORTS:
        raise RequestError(f"{param} must be one of {', '.join(_EFFORTS)}, not {shown(effort)}", param)
    template = tokenizer.chat_template or ""
    arguments: dict[str, Any] = {}
    if "reasoning_effort" in template:
        arguments["reasoning_effort"] = effort
    if "enable_thinking" in template:
        arguments["enable_thinking"] = effort != "none"
    if not arguments:
        message = (
            f"{param} is not supported: the model's chat template reads neither reasoning_effort nor enable_thinking"
        )
        raise RequestError(message, param, "unsupported_parameter")
    return arguments
