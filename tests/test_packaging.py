"""The three files that say what to install agree, and the package holds what it needs at run time."""

import ast
import importlib
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
# Imported under another name, or the other half of a declared package's interface.
COMES_WITH = {
    "yaml": "pyyaml", "IPython": "jupyterlab", "jupyter_client": "papermill", "nbclient": "papermill",
    "huggingface_hub": "transformers", "tokenizers": "transformers",
}  # fmt: skip


def _pins(lines: list[str]) -> dict[str, str]:
    pairs = [line.strip().split("==") for line in lines if "==" in line and not line.lstrip().startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def _project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def _ranges() -> dict[str, Requirement]:
    project = _project()
    wanted = [Requirement(text) for text in project["dependencies"] + project["optional-dependencies"]["test"]]
    return {canonicalize_name(item.name): item for item in wanted}


def _constraints() -> dict[str, str]:
    return _pins((ROOT / "constraints.txt").read_text().splitlines())


def _conda() -> tuple[list[str], list[str]]:
    listed = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    pip = next(item["pip"] for item in listed if isinstance(item, dict))
    return [item for item in listed if isinstance(item, str)], pip


def test_the_three_files_name_the_same_packages():
    assert set(_ranges()) == set(_constraints()) == set(_pins(_conda()[1]))


def test_constraints_and_conda_pin_the_same_versions():
    assert _constraints() == _pins(_conda()[1])


def test_every_pin_lies_in_the_range_of_pyproject():
    ranges = _ranges()
    outside = {name: pin for name, pin in _constraints().items() if not ranges[name].specifier.contains(pin)}
    assert not outside


def test_conda_python_is_one_that_pyproject_admits():
    python = next(item.partition("=")[2] for item in _conda()[0] if item.startswith("python="))
    assert Requirement("python" + _project()["requires-python"]).specifier.contains(python + ".0")


def test_imports_of_the_package_are_declared():
    imported = set()
    for path in (ROOT / "c2f_utils").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.partition(".")[0])
    third_party = imported - set(sys.stdlib_module_names) - {"c2f_utils"}
    extras = {canonicalize_name(Requirement(text).name) for text in _project()["optional-dependencies"]["vllm"]}
    declared = {*_ranges(), *extras}
    undeclared = {name for name in third_party if canonicalize_name(COMES_WITH.get(name, name)) not in declared}
    assert not undeclared


def test_profiles_and_subpackages_are_installed():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert settings["packages"]["find"]["include"] == ["c2f_utils*"]
    assert "settings/profiles/*.yaml" in settings["package-data"]["c2f_utils"]
    folders = {path.parent for path in (ROOT / "c2f_utils").rglob("*.py")}
    assert all((folder / "__init__.py").is_file() for folder in folders), "a folder without __init__.py is left out"


@pytest.mark.parametrize(
    "path", sorted([*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "examples").glob("*.py")]), ids=str
)
def test_what_benchmarks_and_examples_take_from_the_package_is_there(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("c2f_utils"):
            module = importlib.import_module(node.module)
            for item in node.names:
                if not hasattr(module, item.name):
                    importlib.import_module(f"{node.module}.{item.name}")
