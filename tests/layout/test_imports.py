"""Who may import what. The order of the folders is the design: a scheduler that imports torch is a different system."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HTTP = {"starlette", "uvicorn", "httptools", "uvloop", "orjson", "httpx", "prometheus_client"}
GRPC = {"grpc", "google", "grpc_health", "grpc_reflection"}
ALLOWED: dict[str, tuple[set[str], set[str]]] = {
    "configs": (set(), {"pydantic", "yaml"}),
    "protos": (set(), GRPC),
    "scheduler": ({"configs"}, {"numpy"}),
    "kernels": (set(), {"torch", "triton", "numba", "llvmlite", "numpy"}),
    "workers": (
        {"configs", "protos", "kernels"},
        {"torch", "numpy", "safetensors", "transformers", "huggingface_hub", "pydantic", "xgrammar"} | GRPC,
    ),
    "cluster": (
        {"configs", "protos", "scheduler"},
        {"ray", "numpy", "yaml", "pydantic", "pydantic_settings", "tokenizers", "transformers", "jinja2", "tqdm"}
        | {"huggingface_hub"} | GRPC | HTTP,
    ),
}  # fmt: skip
# The actor that holds a worker loads it inside the worker's own process; the bug report asks torch about GPUs; plots
# are for those who installed the extra that draws them.
EXCEPTIONS = {
    ("cluster/launch/actors.py", "manta.workers"),
    ("cluster/cli/collect_env.py", "torch"),
    ("cluster/bench/plot.py", "matplotlib"),
}


def _imports(path: Path) -> Iterator[tuple[str, int, bool]]:
    """(module, line, at import time of the file) for every import statement."""
    tree = ast.parse(path.read_text())
    inner = {node for function in ast.walk(tree) if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
             for node in ast.walk(function)}  # fmt: skip
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield name.name, node.lineno, node not in inner
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write imports in full, from manta.<folder>"
            assert node.module is not None
            if node.module == "manta":
                for name in node.names:
                    yield f"manta.{name.name}", node.lineno, node not in inner
            else:
                yield node.module, node.lineno, node not in inner


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports(folder: str) -> None:
    ours, outside = ALLOWED[folder]
    wrong = []
    for path in (ROOT / folder).rglob("*.py"):
        where = path.relative_to(ROOT).as_posix()
        for module, line, at_import in _imports(path):
            first, _, rest = module.partition(".")
            second = rest.partition(".")[0]
            excepted = not at_import and any(where == w and module.startswith(m) for w, m in EXCEPTIONS)
            allowed = second == folder or second in ours if first == "manta" else first in outside
            if not (allowed or excepted or first in sys.stdlib_module_names):
                wrong.append(f"{where}:{line} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_cluster_does_not_load_torch() -> None:
    """Frontends, scheduler and command line start fast and small because nothing there pulls torch in."""
    import subprocess

    modules = ["manta.cluster.cli.main", "manta.cluster.launch.supervisor", "manta.cluster.engine.main",
               "manta.cluster.doors.frontend", "manta.cluster.bench.serve"]  # fmt: skip
    code = f"import sys\nfor m in {modules}: __import__(m)\nassert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True)
