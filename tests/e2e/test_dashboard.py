"""Every series that the dashboard asks for is one that a running server exports."""

import json
import re
from collections import defaultdict

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.support.server import ROOT, ServerProcess

DASHBOARD = ROOT / "deploy" / "monitoring" / "dashboard.json"


def _expressions() -> list[str]:
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    found = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    return found + [variable["definition"] for variable in dashboard["templating"]["list"] if "definition" in variable]


def test_series_and_labels_exist(server: ServerProcess) -> None:
    body = {"model": "text2sql", "prompt": "SELECT", "max_tokens": 4}
    assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == 200
    labels: dict[str, set[str]] = defaultdict(set)
    for family in text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text):
        for sample in family.samples:
            labels[sample.name] |= sample.labels.keys()
    expressions = _expressions()
    assert len(expressions) > 20
    for expression in expressions:
        names = re.findall(r"(?:vllm|manta):\w+", expression)
        assert names, expression
        asked = set(re.findall(r"(\w+)=~", expression)) | set(re.findall(r"by \((\w+)\)", expression))
        for name in names:
            assert name in labels, f"{name} of {expression}"
            assert asked <= labels[name], expression
