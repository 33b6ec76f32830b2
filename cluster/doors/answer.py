"""An answer's text as chat sends it: content, reasoning and calls of tools, in one piece or in deltas."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from manta.cluster.doors.errors import RequestError
from manta.cluster.doors.reasoning.parser import ReasoningParser
from manta.cluster.doors.reasoning.registry import REASONING_FORMATS, ReasoningFormat
from manta.cluster.doors.tools.events import Arguments, Broken, Call, Content, Event, Reasoning
from manta.cluster.doors.tools.forced import NamedParser, RequiredParser
from manta.cluster.doors.tools.parser import ToolParser
from manta.cluster.doors.tools.registry import TOOL_PARSERS
from manta.cluster.doors.tools.request import ToolRequest
from manta.configs.schema import ServeConfig


@dataclass(frozen=True, slots=True)
class AnswerPlan:
    """How the answers to one chat call are read; gives a reader to each of them."""

    tools: ToolRequest
    parser: type[ToolParser] | None = None  # for the choice "auto"
    reasoning: ReasoningFormat | None = None
    tells_reasoning: bool = True
    prompt: str = ""
    continued: str | None = None  # the part of the answer that the prompt holds

    @property
    def reads_text(self) -> bool:
        """False: the text is the content as it is."""
        return self.parser is not None or self.reasoning is not None or self.tools.is_forced

    @property
    def visible_tokens(self) -> frozenset[str]:
        """Special tokens that the text must show."""
        tags = () if self.reasoning is None else (self.reasoning.start, self.reasoning.end)
        return frozenset((*tags, *(self.parser.MARKERS if self.parser else ())))

    def new_reader(self) -> "AnswerReader":
        return AnswerReader(self._new_reasoning(), self._new_tools(), self)

    def _new_reasoning(self) -> ReasoningParser | None:
        return self.reasoning.new_parser(self.prompt, self.continued) if self.reasoning else None

    def _new_tools(self) -> ToolParser | None:
        if self.tools.choice == "named":
            return NamedParser(self.tools.name)
        if self.tools.choice == "required":
            return RequiredParser()
        return self.parser(self.tools.tools) if self.parser else None


def plan_answer(
    config: ServeConfig, tools: ToolRequest, tells_reasoning: bool, prompt: str, continued: str | None
) -> AnswerPlan:
    """Raises RequestError for a choice that the server was not started for."""
    if tools.choice == "auto" and not config.enable_auto_tool_choice:
        message = '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'
        raise RequestError(message, "tool_choice", "unsupported_parameter")
    parser = TOOL_PARSERS[config.tool_call_parser] if tools.choice == "auto" and config.tool_call_parser else None
    # A forced call is all of the answer: there is no thinking before it.
    reasoning = None if tools.is_forced or not config.reasoning_parser else REASONING_FORMATS[config.reasoning_parser]
    return AnswerPlan(tools, parser, reasoning, tells_reasoning, prompt, continued)


class AnswerReader:
    """The parsers of one answer behind each other: thinking first, then calls in what is not thinking."""

    def __init__(self, reasoning: ReasoningParser | None, tools: ToolParser | None, plan: AnswerPlan) -> None:
        self._reasoning, self._tools = reasoning, tools
        self._plan = plan
        self._num_calls = 0

    @property
    def num_thought_characters(self) -> int:
        """How much of the text so far is thinking, tags included."""
        return self._reasoning.num_thought_characters if self._reasoning is not None else 0

    def push(self, text: str, is_last: bool) -> list[Event]:
        events: list[Event] = [Content(text)] if text else []
        if self._reasoning is not None:
            events = self._reasoning.push(text) + (self._reasoning.flush() if is_last else [])
        if self._tools is not None:
            events = [new for event in events for new in self._read_calls(event)]
            events += self._tools.flush() if is_last else []
        events = [event for event in events if self._is_wanted(event)]
        self._num_calls += sum(isinstance(event, Call) for event in events)
        self._num_calls -= sum(isinstance(event, Broken) for event in events)
        return events

    def finish_reason(self, reason: str | None) -> str | None:
        """The engine's reason, or "tool_calls" where the answer is calls; as OpenAI, not for a function that the
        request named."""
        is_calls = reason == "stop" and self._num_calls > 0 and self._plan.tools.choice != "named"
        return "tool_calls" if is_calls else reason

    def _read_calls(self, event: Event) -> list[Event]:
        return self._tools.push(event.text) if self._tools and isinstance(event, Content) else [event]

    def _is_wanted(self, event: Event) -> bool:
        if isinstance(event, Reasoning):
            return self._plan.tells_reasoning
        if isinstance(event, Call | Arguments | Broken):
            return event.index == 0 or self._plan.tools.is_parallel
        return True


@dataclass(slots=True)
class _Parts:
    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: dict[int, dict[str, Any]] = field(default_factory=dict)


def message_body(events: Iterable[Event]) -> dict[str, Any]:
    """The message of a finished answer. A call that proved broken is content."""
    parts = _Parts()
    for event in events:
        match event:
            case Content(text):
                parts.content.append(text)
            case Reasoning(text):
                parts.reasoning.append(text)
            case Call(index, call_id, name):
                parts.calls[index] = _call(call_id, name)
            case Arguments(index, text):
                parts.calls[index]["function"]["arguments"] += text
            case Broken(index, raw):
                del parts.calls[index]
                parts.content.append(raw)
    content = "".join(parts.content)
    reasoning = "".join(parts.reasoning)
    is_content = content or not (reasoning or parts.calls)
    body: dict[str, Any] = {"role": "assistant", "content": content if is_content else None, "refusal": None}
    if parts.calls:
        body["tool_calls"] = list(parts.calls.values())
    if reasoning:
        body |= _reasoning(reasoning)
    return body


def delta_body(event: Event) -> dict[str, Any] | None:
    """The `delta` that tells of one event; None for what cannot be told any more."""
    match event:
        case Content(text):
            return {"content": text}
        case Reasoning(text):
            return _reasoning(text)
        case Call(index, call_id, name):
            return {"tool_calls": [{"index": index} | _call(call_id, name)]}
        case Arguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
    return None


def _call(call_id: str, name: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": ""}}


def _reasoning(text: str) -> dict[str, str]:
    """Under both names that clients know."""
    return {"reasoning_content": text, "reasoning": text}
