"""The one-way order of the layers and the limits that keep the code livable, read from the source."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path("jaxclust")
LAYERS = {
    "errors": 0, "files": 0, "plugins": 0, "progress": 0, "config": 0, "fields": 0, "kinds": 0, "runtime": 0,
    "hints": 0, "hosts": 0, "heartbeats": 0, "watch": 0,
    "ops": 1, "models": 2, "cluster": 2, "data": 2, "methods": 3, "features": 3,
    "evaluation": 4, "train": 5, "report": 5, "pictures": 6, "plan": 6, "jobs": 7, "main": 8,
}  # fmt: skip
FILES = sorted(PACKAGE.rglob("*.py"))


def module_name(path):
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def imports(path):
    """Modules of the package that a file imports, `from package import module` counting as the module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            joined = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else node.module for name in joined]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == "jaxclust")


def part(name):
    return name.split(".")[1] if "." in name else ""


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_imports_only_from_lower_layers_or_its_own_folder(path):
    name = module_name(path)
    if part(name) == "":
        return
    assert part(name) in LAYERS, f"{path} belongs to no layer"
    for imported in imports(path):
        own_folder = part(imported) == part(name)
        both_lowest = LAYERS.get(part(imported)) == 0 == LAYERS[part(name)]
        lower = LAYERS.get(part(imported), -1) < LAYERS[part(name)]
        assert own_folder or both_lowest or lower, f"{path} imports {imported}"


def test_there_are_no_import_cycles():
    graph = {name: {i for i in imports(path) if i != name} for name, path in MODULES.items()}
    # A package may gather from its own modules, which then may not import the package.
    done, active = set(), []

    def visit(name):
        if name in done or name not in graph:
            return
        assert name not in active, " -> ".join([*active, name])
        active.append(name)
        for imported in sorted(graph[name]):
            visit(imported)
        active.pop()
        done.add(name)

    for name in graph:
        visit(name)


def test_configs_import_nothing_but_the_config_module():
    for path in Path("configs").glob("*.py"):
        assert set(imports(path)) == {"jaxclust.config"}, path


@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_and_functions_stay_short(path):
    source = path.read_text()
    limit = {"methods": 250}.get(part(module_name(path)), 200 if path.name == "loop.py" else 400)
    assert source.count("\n") <= limit
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name
    assert "utils" not in path.stem


@pytest.mark.parametrize("path", FILES, ids=str)
def test_nothing_loaded_can_run_code(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
            assert not {"pickle", "dill", "joblib", "shelve", "marshal"} & set(names)
        if isinstance(node, ast.Call):
            called = getattr(node.func, "id", getattr(node.func, "attr", ""))
            assert called not in ("eval", "exec") or isinstance(node.func, ast.Attribute), ast.unparse(node)
            for keyword in node.keywords:
                if keyword.arg == "allow_pickle":
                    assert keyword.value.value is False
