"""The example of docs/tools.md runs as it is printed, with a model that calls the tool."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.doors.test_tools import AUTO, TEMPLATE, serving
from tests.support.small_tokenizers import write_model_folder

PAGE = Path(__file__).parents[3] / "docs" / "tools.md"


def test_the_example_of_a_tool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (source,) = re.findall(r"```python\n(import json.*?)```", PAGE.read_text(), re.DOTALL)
    with serving(write_model_folder(tmp_path, chat_template=TEMPLATE), **AUTO) as chat:
        call = '<tool_call>{"name": "weather", "arguments": {"city": "Bonn"}}</tool_call>'
        texts = [chat.tokenizer.encode(text, add_special_tokens=False) for text in (call, "It is sunny.")]

        def model(request: Any) -> list[int]:
            return texts["21 degrees" in chat.tokenizer.decode(list(request.prompt_token_ids))]

        chat.doors.client.model = model
        exec(compile(source.replace("http://localhost:8000", chat.doors.base_url), str(PAGE), "exec"), {})
    assert capsys.readouterr().out == "It is sunny.\n"
