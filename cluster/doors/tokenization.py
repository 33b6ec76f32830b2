"""POST /tokenize and POST /detokenize, with the bodies that vLLM takes and gives."""

from typing import Any

from manta.cluster.doors import fields
from manta.cluster.doors.chat import chat_prompt
from manta.cluster.doors.checks import check_bool, shown
from manta.cluster.doors.errors import RequestError
from manta.cluster.doors.exchange import Reply
from manta.cluster.doors.fields import check_fields
from manta.cluster.doors.service import Service
from manta.cluster.doors.tools.request import read_tools


class Tokenize:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, body: dict[str, Any], request_id: str, reply: Reply) -> None:
        validator = self._service.validator
        given = check_fields(body, fields.TOKENIZE)
        validator.check_model(given.get("model"))
        with_strings = check_bool(given.get("return_token_strs", False), "return_token_strs")
        if "messages" in given and "prompt" in given:
            raise RequestError("give either prompt or messages, not both", "messages")
        if "messages" in given:
            text, add_special_tokens = chat_prompt(validator.tokenizer, given, read_tools(given))
        else:
            prompt = given.get("prompt")
            if not isinstance(prompt, str):
                raise RequestError(f"prompt must be a string, not {shown(prompt)}", "prompt", "invalid_type")
            text = prompt
            add_special_tokens = check_bool(given.get("add_special_tokens", True), "add_special_tokens")
        token_ids = await validator.encode(text, add_special_tokens)
        strings = validator.tokenizer.tokens(token_ids) if with_strings else None
        answer = {
            "count": len(token_ids),
            "max_model_len": validator.limits.max_model_len,
            "tokens": token_ids,
            "token_strs": strings,
        }
        await reply.json(answer)


class Detokenize:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, body: dict[str, Any], request_id: str, reply: Reply) -> None:
        validator = self._service.validator
        given = check_fields(body, fields.DETOKENIZE)
        validator.check_model(given.get("model"))
        token_ids = validator.check_tokens(given.get("tokens"), "tokens")
        await reply.json({"prompt": validator.tokenizer.decode(token_ids)})
