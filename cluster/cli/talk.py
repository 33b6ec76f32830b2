"""`manta chat` and `manta complete`: a terminal client of any OpenAI-compatible server."""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import httpx

from manta.cluster.cli.flags import UsageError

_CONNECT_TIMEOUT_S = 10.0


def chat(argv: list[str]) -> int:
    """Asks one question (--quick, or standard input when it is no terminal) or holds a conversation."""
    args = _parser("chat", "Talk to a running server; an empty line or Ctrl-D ends.").parse_args(argv)
    history = [{"role": "system", "content": args.system_prompt}] if args.system_prompt else []
    with _Server(args) as server:
        for question in _inputs(args.quick):
            history.append({"role": "user", "content": question})
            deltas = server.stream("chat/completions", {"messages": history})
            answer = _show(choice["delta"].get("content") or "" for choice in deltas)
            history.append({"role": "assistant", "content": answer})
    return 0


def complete(argv: list[str]) -> int:
    """Continues each text it is given."""
    args = _parser("complete", "Continue a text; an empty line or Ctrl-D ends.").parse_args(argv)
    with _Server(args) as server:
        for text in _inputs(args.quick):
            _show(choice["text"] for choice in server.stream("completions", {"prompt": text}))
    return 0


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"manta {command}", description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="server, with or without its /v1")
    parser.add_argument("--model", help="name of the model; the first the server lists if unset")
    parser.add_argument("-q", "--quick", metavar="TEXT", help="send this one message, print the answer and exit")
    parser.add_argument("--api-key", default="", help="sent as a bearer token; that of OPENAI_API_KEY if unset")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--max-tokens", type=int, default=256, help="tokens of one answer at most")
    if command == "chat":
        parser.add_argument("--system-prompt", default="", help="first message of the conversation")
    return parser


def _inputs(quick: str | None) -> Iterator[str]:
    if quick is not None:
        yield quick
    elif not sys.stdin.isatty():
        yield sys.stdin.read().strip()
    else:
        while line := _prompt():
            yield line


def _prompt() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        print()
        return ""


def _show(pieces: Iterator[str]) -> str:
    """Prints pieces as they come; returns them joined."""
    text = ""
    for piece in pieces:
        text += piece
        print(piece, end="", flush=True)
    print()
    return text


def bearer(key: str | None) -> dict[str, str]:
    """The header of an API key: the given one, else that of OPENAI_API_KEY, else none."""
    key = key or os.environ.get("OPENAI_API_KEY", "")
    return {"Authorization": f"Bearer {key}"} if key else {}


class _Server:
    """One server and the settings every request shares."""

    def __init__(self, args: argparse.Namespace) -> None:
        headers = bearer(args.api_key)
        self._url = args.url.rstrip("/").removesuffix("/v1") + "/v1"
        self._client = httpx.Client(headers=headers, timeout=httpx.Timeout(None, connect=_CONNECT_TIMEOUT_S))
        self._settings = {"temperature": args.temperature, "max_tokens": args.max_tokens, "stream": True}
        self._model: str | None = args.model

    def __enter__(self) -> "_Server":
        return self

    def __exit__(self, *exc: object) -> None:
        self._client.close()

    def stream(self, endpoint: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The choices of a streamed answer, one by one. Raises UsageError with the server's own words."""
        try:
            body = {"model": self._model_name()} | self._settings | body
            with self._client.stream("POST", f"{self._url}/{endpoint}", json=body) as response:
                _raise_for_error(response)
                for line in response.iter_lines():
                    yield from _choices(line)
        except httpx.HTTPError as error:
            raise UsageError(f"no answer from {self._url}: {error}") from None

    def _model_name(self) -> str:
        if self._model is None:
            response = self._client.get(f"{self._url}/models")
            _raise_for_error(response)
            self._model = str(response.json()["data"][0]["id"])
        return self._model


def _choices(line: str) -> list[dict[str, Any]]:
    data = line.removeprefix("data:").strip()
    if not line.startswith("data:") or data == "[DONE]":
        return []
    chunk = json.loads(data)
    if "error" in chunk:
        raise UsageError(f"the server ended the answer: {chunk['error']['message']}")
    choices: list[dict[str, Any]] = chunk["choices"]
    return choices


def _raise_for_error(response: httpx.Response) -> None:
    if response.is_success:
        return
    body = response.read()
    try:
        message = json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = body.decode(errors="replace")[:200]
    raise UsageError(f"the server answered {response.status_code}: {message}")
