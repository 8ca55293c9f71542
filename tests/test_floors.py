"""The layout's promises: imports look down, files and functions stay short."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# README's own list is what holds: "floor 2  dit  vae  stages/  …". The root scripts stand above all floors.
FLOORS = re.findall(r"^floor +\d+ +(.+)$", (ROOT / "README.md").read_text(), re.MULTILINE)
FLOOR = {"__init__": 0} | {
    name.rstrip("/"): height for height, names in enumerate(FLOORS) for name in names.split()
}
FILES = sorted([*ROOT.glob("*.py"), *ROOT.glob("rfjax/**/*.py")], key=str)


def module(file: Path) -> str | None:
    """rfjax/vae.py → "vae", rfjax/data/__init__.py → "data"; None for a script (root, `__main__`)."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return parts[1] if len(parts) > 1 and parts[-1] != "__main__" else None


def imported_modules(tree: ast.Module) -> set[str]:
    """The package's own modules that a file imports, wherever in the file it does so."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: relative import; write `from rfjax import …`"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("rfjax.")} & set(map(module, FILES))


def test_the_floors_have_every_module_once():
    named = [name.rstrip("/") for names in FLOORS for name in names.split()]
    assert sorted(named) == sorted({module(file) for file in FILES} - {None, "__init__"})


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_look_down_and_pieces_stay_short(file):
    text = file.read_text()
    tree = ast.parse(text)
    floor = FLOOR[module(file)] if module(file) else len(FLOORS)
    for name in imported_modules(tree) - {module(file)}:
        assert FLOOR[name] < floor, f"{file.name} imports {name}, which is not on a lower floor"
    assert text.count("\n") <= 400, f"{file.name} has more than 400 lines; split it"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= 60, f"{file.name}: {node.name} has {length} lines; split it"
