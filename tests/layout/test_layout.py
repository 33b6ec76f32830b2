"""The tree is what the packaging says, and no folder shadows a package of somebody else."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ["cluster", "configs", "kernels", "protos", "scheduler", "workers"]


def _setuptools() -> dict[str, object]:
    table: dict[str, object] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    return table


def _packages_in_tree() -> set[str]:
    """Every folder that holds Python modules; the facade is `manta` itself."""
    found = {"manta"}
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            relative = path.parent.relative_to(ROOT)
            if relative != Path("cluster/facade"):
                found.add("manta." + ".".join(relative.parts))
    return found


def test_packages_match_the_tree() -> None:
    assert set(_setuptools()["packages"]) == _packages_in_tree()  # type: ignore[call-overload]


def test_package_dirs_exist_and_are_listed() -> None:
    mapping = _setuptools()["package-dir"]
    assert isinstance(mapping, dict)
    assert {f"manta.{folder}" for folder in FOLDERS} | {"manta"} == set(mapping)
    for folder in mapping.values():
        assert (ROOT / folder).is_dir(), folder


def test_only_the_facade_has_an_init() -> None:
    """With an __init__.py a folder such as kernels/ on sys.path hides the package of that name from transformers."""
    inits = {path.relative_to(ROOT) for folder in [*FOLDERS, "tests"] for path in (ROOT / folder).rglob("__init__.py")}
    assert inits == {Path("cluster/facade/__init__.py")}


def test_typing_name_points_to_the_root() -> None:
    assert (ROOT / ".typing" / "manta").is_symlink()
    assert (ROOT / ".typing" / "manta").resolve() == ROOT.resolve()


def test_generated_code_loads_on_the_oldest_protobuf() -> None:
    for path in (ROOT / "protos").glob("*_pb2.py"):
        assert "# Protobuf Python Version: 5.29" in path.read_text(), f"{path.name}: regenerate with `make protos`"
