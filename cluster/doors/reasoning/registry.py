"""The formats of --reasoning-parser by name."""

from collections.abc import Mapping
from dataclasses import dataclass

from manta.cluster.doors.reasoning.parser import ReasoningParser


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    start: str
    end: str
    is_open: bool = False  # answers begin with thinking even where neither prompt nor answer has the start tag

    def new_parser(self, prompt: str, continued: str | None = None) -> ReasoningParser | None:
        """The parser of an answer to `prompt`; None where the prompt has ended the thinking.

        Templates may write the start tag themselves, or both tags for an answer without thinking. `continued` is the
        beginning of the answer where the prompt holds it.
        """
        is_open = self._state_of(prompt, continued)
        if is_open is False:
            return None
        return ReasoningParser(self.start, self.end, self.is_open if is_open is None else is_open)

    def _state_of(self, prompt: str, continued: str | None) -> bool | None:
        """True within the tags, False behind them, None where the prompt does not tell."""
        if continued is not None:
            start, end = continued.rfind(self.start), continued.rfind(self.end)
            return None if start == end else start > end
        text = prompt.rstrip()
        if text.endswith(self.start):
            return True
        return False if text.endswith(self.end) else None


REASONING_FORMATS: Mapping[str, ReasoningFormat] = {
    "deepseek_r1": ReasoningFormat("<think>", "</think>", is_open=True),
    "glm45": ReasoningFormat("<think>", "</think>"),
    "mistral": ReasoningFormat("[THINK]", "[/THINK]"),
    "qwen3": ReasoningFormat("<think>", "</think>"),
    "seed_oss": ReasoningFormat("<seed:think>", "</seed:think>"),
}
