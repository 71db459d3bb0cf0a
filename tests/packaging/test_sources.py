"""Rules that every source file keeps."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("fastvit", "kernels", "benchmarks", "tests", "tools", "docs", "examples")
PACKAGE = ("fastvit", "kernels", "benchmarks")
MOST_LINES = 700


def files(*folders: str, suffixes: tuple[str, ...] = (".py",)) -> list[Path]:
    found = (path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in suffixes)
    return sorted(path for path in found if "__pycache__" not in path.parts)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", files(*PACKAGE), ids=name_of)
def test_module_has_a_docstring(path: Path) -> None:
    if path.name.startswith("_") and path.name != "__init__.py":
        pytest.skip("not public")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not tree.body or ast.get_docstring(tree), f"{name_of(path)} says nowhere what it is for"


@pytest.mark.parametrize("path", files("fastvit"), ids=name_of)
def test_exported_names_have_docstrings(path: Path) -> None:
    body = ast.parse(path.read_text(encoding="utf-8")).body
    lists = [node.value for node in body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"]
    exported = [name for value in lists for name in ast.literal_eval(value)]
    defined = [node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in exported]
    assert not [node.name for node in defined if not ast.get_docstring(node)]


def test_files_are_short() -> None:
    lines = {name_of(path): path.read_text(encoding="utf-8").count("\n") for path in files(*FOLDERS)}
    assert not {name: count for name, count in lines.items() if count > MOST_LINES}


def test_nothing_is_left_to_do() -> None:
    words = re.compile(r"\b(?:TO" r"DO|FIX" r"ME|XX" r"X|HA" r"CK)\b")
    found = [
        f"{name_of(path)}:{number}"
        for path in files(*FOLDERS, suffixes=(".py", ".md"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if words.search(line)
    ]
    assert not found


def test_renamed_folders_have_no_init() -> None:
    # With one, `kernels` in the working directory would hide the PyPI package of that name.
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "benchmarks" / "__init__.py").exists()


def test_torch_and_its_constraint_agree() -> None:
    (pin,) = re.findall(r"^torch==\S+", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert f"TORCH := {pin}\n" in (ROOT / "Makefile").read_text(encoding="utf-8")
