"""The layout's promises: imports look down, files and functions stay short."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = [
    "errors",
    "attention config conv flow rope shapes tree",
    "cache detect dit text vae video",
    "checkpoint metrics rollout score sharding",
    "convert data losses sampler state",
]  # every other module of the package stands above these, and the root scripts above all
FLOOR = {name: height for height, names in enumerate(FLOORS) for name in names.split()}
FILES = sorted([*ROOT.glob("*.py"), *ROOT.glob("rfjax/**/*.py")], key=str)


def floor(file: Path) -> int:
    return FLOOR.get(file.stem, len(FLOORS)) if file.parent != ROOT else len(FLOORS) + 1


def imported_modules(tree: ast.Module) -> set[str]:
    """Names of the package's own modules that a file imports, wherever in the file it does so."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: relative import; write `from rfjax import …`"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("rfjax.")}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_look_down_and_pieces_stay_short(file):
    text = file.read_text()
    tree = ast.parse(text)
    for name in imported_modules(tree):
        if (ROOT / "rfjax" / f"{name}.py").exists():
            imported = FLOOR.get(name, len(FLOORS))
            assert imported < floor(file), f"{file.name} imports {name}, which is not on a lower floor"
    assert text.count("\n") <= 400, f"{file.name} has more than 400 lines; split it"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= 60, f"{file.name}: {node.name} has {length} lines; split it"
