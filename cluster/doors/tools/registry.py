"""The formats of --tool-call-parser by name."""

from collections.abc import Mapping

from manta.cluster.doors.tools.hermes import HermesParser
from manta.cluster.doors.tools.llama3_json import Llama3JsonParser
from manta.cluster.doors.tools.mistral import MistralParser
from manta.cluster.doors.tools.parser import ToolParser
from manta.cluster.doors.tools.pythonic import PythonicParser
from manta.cluster.doors.tools.qwen3_coder import Qwen3CoderParser

TOOL_PARSERS: Mapping[str, type[ToolParser]] = {
    "hermes": HermesParser,
    "llama3_json": Llama3JsonParser,
    "mistral": MistralParser,
    "pythonic": PythonicParser,
    "qwen3_coder": Qwen3CoderParser,
}
