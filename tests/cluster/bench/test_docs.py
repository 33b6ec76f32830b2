"""docs/bench.md names no flag that does not exist."""

import re

from manta.cluster.bench.latency import latency_parser
from manta.cluster.bench.serve_flags import serve_parser
from manta.cluster.bench.throughput import throughput_parser
from tests.support.server import ROOT


def test_flags_of_the_page_exist() -> None:
    parsers = [serve_parser(), throughput_parser(), latency_parser()]
    known = {flag for parser in parsers for action in parser._actions for flag in action.option_strings}
    page = (ROOT / "docs" / "bench.md").read_text()
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", page))
    assert "--goodput" in named
    assert named <= known
