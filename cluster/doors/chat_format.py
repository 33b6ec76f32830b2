"""Chat messages to the text of a prompt: the model's chat template, or the plain format for a model without one."""

from typing import Any

from jinja2.exceptions import TemplateError

from manta.cluster.doors.errors import RequestError
from manta.cluster.doors.text import Tokenizer
from manta.cluster.doors.tools.history import check_history, with_argument_texts

TEXT_PARTS = ("text", "input_text", "output_text", "refusal")


def render_chat(
    tokenizer: Tokenizer,
    messages: list[dict[str, Any]],
    add_generation_prompt: bool,
    continue_final_message: bool,
    template_kwargs: dict[str, Any],
    tools: list[dict[str, Any]] | None = None,
) -> str:
    """The prompt text of checked messages (see `check_messages`). Raises RequestError for what the template refuses.

    Without a template the plain format is used: one line "role: content" per message, then "assistant:" as the cue.
    """
    if tools and not tokenizer.takes_tools:
        message = "the model's chat template does not take tools; start the server with a --chat-template that does"
        raise RequestError(message, "tools", "unsupported_parameter")
    if tokenizer.chat_template is None:
        return _plain_format(messages, add_generation_prompt, continue_final_message)
    kwargs = template_kwargs | {
        "chat_template": tokenizer.tool_template if tools else tokenizer.chat_template,
        "tools": tools or None,
        "add_generation_prompt": add_generation_prompt,
        "continue_final_message": continue_final_message,
    }
    try:
        try:
            text = tokenizer.hf.apply_chat_template(messages, tokenize=False, **kwargs)
        except TypeError:  # the template joins arguments to texts
            text = tokenizer.hf.apply_chat_template(with_argument_texts(messages), tokenize=False, **kwargs)
    except TemplateError as error:
        raise RequestError(f"messages do not fit the model's chat template: {error}", "messages")
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise RequestError(f"the model's chat template fails on these messages: {reason}", "messages")
    return str(text)


def _plain_format(messages: list[dict[str, Any]], add_generation_prompt: bool, continue_final_message: bool) -> str:
    lines = [f"{message['role']}: {message['content']}" for message in messages]
    if add_generation_prompt:
        lines.append("assistant:")
    return "\n".join(lines) + ("" if continue_final_message or add_generation_prompt else "\n")


def check_messages(value: Any) -> list[dict[str, Any]]:
    """Messages with plain string contents and calls of tools as `check_history` says; all other keys are left for the
    template. Raises RequestError."""
    if value is None:
        raise RequestError("messages is required", "messages", "missing_required_parameter")
    if not isinstance(value, list):
        raise RequestError("messages must be a list of objects", "messages", "invalid_type")
    if not value:
        raise RequestError("messages must hold at least one message", "messages")
    return [_check_message(message, f"messages[{index}]") for index, message in enumerate(value)]


def _check_message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise RequestError(f"{where} must be an object with role and content", where, "invalid_type")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise RequestError(
            f'{where}.role must be a string such as "system", "user" or "assistant"', f"{where}.role", "invalid_type"
        )
    content = message.get("content")
    if content is None and role != "assistant":
        raise RequestError(f"{where}.content is required", f"{where}.content", "missing_required_parameter")
    return check_history(message, where) | {"content": _join_content(content, f"{where}.content")}


def _join_content(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{where} must be a string or a list of text parts", where, "invalid_type")
    return "\n".join(_text_of(part, f"{where}[{index}]") for index, part in enumerate(content))


def _text_of(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, dict) else None
    if kind in TEXT_PARTS:
        text = part.get("refusal" if kind == "refusal" else "text")
        if isinstance(text, str):
            return text
        raise RequestError(f'{where}.text must be a string, as in {{"type": "text", "text": "..."}}', where)
    raise RequestError(
        f'{where} has type {kind!r}; this model takes text only: {{"type": "text", "text": "..."}}',
        where,
        "invalid_value",
    )
