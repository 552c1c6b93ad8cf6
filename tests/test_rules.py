"""Rules of the house that no linter knows."""

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("modeling", "data", "train", "inference_pipeline")
LIBRARY = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))
SCRIPTS = sorted((ROOT / "scripts").rglob("*.py"))
OURS = {*PACKAGES, "scripts", "tests", "benchmarks"}
MAY_IMPORT = {
    "modeling": {"modeling"},
    "data": {"data", "modeling.batch", "modeling.flow", "modeling.geometry"},
    "train": {"train", "data", "modeling"},
    "inference_pipeline": {"inference_pipeline", "data", "modeling"},
}
MAX_LIBRARY_LINES = 13400
MAX_STEP_LINES = 60


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def place(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{node.lineno}"


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """(place, absolute module) of every import of ours, also inside functions."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(tree(path)):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1]]
            modules = [".".join([*base, *([node.module] if node.module else [])])]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = names if node.module in OURS else [node.module or ""]
        yield from ((place(path, node), m) for m in modules if m.split(".")[0] in OURS)


def imported(path: Path) -> set[str]:
    """Modules of ours that are there when the file runs, not those for its types alone."""
    for_types = {
        place(path, inner)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in node.body
    }
    return {module for where, module in imports(path) if where not in for_types}


def within(module: str, allowed: set[str]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in allowed)


def test_the_library_is_there():
    assert {p.relative_to(ROOT).parts[0] for p in LIBRARY} >= {"modeling", "data", "train"}
    assert ("modeling.flow" in {m for _, m in imports(ROOT / "modeling" / "batch.py")}) is True
    assert "modeling.attention" in {m for _, m in imports(ROOT / "modeling/bagel/bagel.py")}


@pytest.mark.parametrize("package", PACKAGES)
def test_direction_of_imports(package):
    allowed = MAY_IMPORT[package]
    files = [p for p in LIBRARY if p.relative_to(ROOT).parts[0] == package]
    found = [f"{where}: {m}" for p in files for where, m in imports(p) if not within(m, allowed)]
    assert found == []


def test_scripts_do_not_import_train():
    found = [f"{w}: {m}" for p in SCRIPTS for w, m in imports(p) if within(m, {"train"})]
    assert found == []


def test_processes_meet_in_three_files():
    """Collectives and signals, what shards the model, what shares a test set; all else is told."""
    meeting = re.compile(r"\btorch\.distributed\b")
    allowed = {ROOT / "train" / name for name in ("distributed.py", "backends.py")}
    allowed.add(ROOT / "inference_pipeline" / "shards.py")
    assert {path for path in LIBRARY if meeting.search(path.read_text())} == allowed


def test_training_reads_from_the_entry_to_the_loop():
    """main_sr_pixel_loss.py -> build.py -> trainer.py, and nothing leads back."""
    files = {f"train.{path.stem}": path for path in (ROOT / "train").glob("*.py")}
    graph = {
        name: {m for found in imported(path) for m in files if within(found, {m})}
        for name, path in files.items()
    }
    order = [*TopologicalSorter(graph).static_order()]
    entry, build, loop = (f"train.{n}" for n in ("main_sr_pixel_loss", "build", "trainer"))
    assert build in graph[entry] and loop in graph[build]
    assert order.index(loop) < order.index(build) < order.index(entry)
    assert [name for name in graph if entry in graph[name]] == []
    # The dry run builds too, as far as it can.
    assert {name for name in graph if build in graph[name]} == {entry, "train.preflight"}
    assert {name for name in graph if loop in graph[name]} == {entry, build}


def test_the_environment_is_read_in_one_place():
    reading = re.compile(r"\b(environ|getenv|putenv)\b")
    allowed = ROOT / "train" / "distributed.py"
    assert [str(p) for p in LIBRARY if p != allowed and reading.search(p.read_text())] == []


def test_no_path_of_somebodys_machine():
    absolute = re.compile(r"(?<![\w.$}])/(home|root|mnt|tmp|work|data|Users)/")
    found = [f"{p}: {m.group()}" for p in LIBRARY for m in absolute.finditer(p.read_text())]
    assert found == []


def test_file_names_hold_no_versions():
    files = [p for p in ROOT.rglob("*.py") if not set(p.parts) & {".venv", "build"}]
    stale = re.compile(r"(_v\d+|_old|_new|_bak|_backup|(^|_)copy|_final)(_|\.|$)", re.IGNORECASE)
    assert [str(p) for p in files if stale.search(p.name)] == []


def test_no_error_is_caught_unnamed():
    """`except Exception` also catches the mistakes of the code inside, of the sinks on purpose."""
    found = []
    for path in {*LIBRARY, *SCRIPTS} - {ROOT / "train" / "sinks.py"}:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ExceptHandler):
                names = (
                    [n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)]
                    if node.type
                    else []
                )
                if not names or set(names) & {"Exception", "BaseException"}:
                    found.append(place(path, node))
    assert found == []


def test_no_state_dict_is_loaded_loosely():
    found = []
    for path in [*LIBRARY, *SCRIPTS]:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                loose = any(
                    k.arg == "strict" and not (isinstance(k.value, ast.Constant) and k.value.value)
                    for k in node.keywords
                )
                if node.func.attr == "load_state_dict" and loose:
                    found.append(place(path, node))
    assert found == []


def test_size_of_the_library():
    assert sum(len(path.read_text().splitlines()) for path in LIBRARY) < MAX_LIBRARY_LINES


def test_a_train_step_fits_on_a_screen():
    functions = {
        node.name: node
        for node in ast.walk(tree(ROOT / "train" / "trainer.py"))
        if isinstance(node, ast.FunctionDef)
    }
    step = functions["train_step"]
    assert step.end_lineno - step.lineno + 1 <= MAX_STEP_LINES
    names = {n.value for n in ast.walk(step) if isinstance(n, ast.Constant)}
    assert not names & {"ce", "mse", "pixel", "ssim"}


def test_every_test_that_the_reliability_page_names_is_there():
    page = (ROOT / "docs" / "reliability.md").read_text()
    file = None
    names = re.findall(r"`([\w/]+\.py)?(?:::)?(test_\w+)?`", page)
    found = 0
    for path, name in names:
        file = ROOT / "tests" / path if path else file
        if name and file is not None:
            assert f"def {name}(" in file.read_text(), (file.name, name)
            found += 1
    assert found > 20
