"""The rules of the house as code: imports, sizes, wording. docs/architecture.md gives the reasons."""

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

FLOORS: dict[str, frozenset[str]] = {
    "plan": frozenset(),
    "kernels": frozenset(),
    "data": frozenset({"plan"}),
    "model": frozenset({"plan", "kernels"}),
    "parallel": frozenset({"plan", "kernels", "model"}),
    "checkpoint": frozenset({"plan", "model", "parallel"}),
    "launch": frozenset({"plan"}),
    "eval": frozenset({"plan", "data", "model", "parallel", "checkpoint", "launch"}),
    "train": frozenset({"plan", "kernels", "data", "model", "parallel", "checkpoint", "launch", "eval"}),
    "report": frozenset({"plan"}),
    "slurm": frozenset({"plan", "launch"}),
    "benchmarks": frozenset(
        {"plan", "kernels", "data", "model", "parallel", "checkpoint", "launch", "eval", "train", "report", "slurm"}
    ),
}
TORCH_FREE = frozenset({"plan", "launch", "report", "slurm"})
OUTSIDE_THE_WHEEL = frozenset({"benchmarks"})
KERNELS_MAY = frozenset({"torch", "triton"})
EXECUTES = frozenset({"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"})
PRODUCT_LINES, FILE_LINES, FUNCTION_LINES = 30_000, 300, 60  # at most
COUNTED = frozenset({".py", ".js", ".css", ".html"})  # suffixes of product files
# Phrases that read like a translation, each with what to write. Checked in the product and its guides.
WORDING = {
    r"(?<!there )\b(is|are) no (?!longer\b|more\b)": "is not a, are not",
    r"\b(go|goes|going|went) on (with|from|where|as)\b": "continues, resumes",
    r"\bby now\b": "now, or leave it out",
    r"\bfor ever\b": "forever",
    r"\bbeside\b": "alongside, next to",
    r"\banother (than|by)\b|\bothers (than|by)\b": "different from",
    r"\badopt(s|ed|ing)?\b|\bsettled?\b|\bheard\b|\banew\b": "the field's verb",
    r"\btold (of|to|by|its|the|what)\b": "describe, report",
    r"\bfillers?\b": "padding",
    r"\bby heart\b": "overfit, memorise",
    r"\blies (in|behind|before|beside|beyond)\b": "is in, is after",
}


class Breach(NamedTuple):
    """One place that breaks one rule."""

    rule: str
    where: str
    detail: str


class Import(NamedTuple):
    """One imported module, and whether the statement is at the top level of its file."""

    module: str
    line: int
    top: bool


def breaches(root: Path) -> list[Breach]:
    """Every breach under `root`, in the order of the files."""
    found = [
        Breach("no __init__.py", str(path.relative_to(root)), "shadows installed packages") for path in _inits(root)
    ]
    graph: dict[str, set[str]] = {}
    for path in sources(root):
        name = path.relative_to(root).as_posix()
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=name)
        found += [Breach(rule, f"{name}:{line}", detail) for rule, line, detail in _of_file(path, root, tree)]
        module = "minka." + name.removesuffix(".py").replace("/", ".")
        graph[module] = {imported.module for imported in _imports(tree)}
    found += [Breach("no cycles", cycle[0], " -> ".join(cycle)) for cycle in _cycles(graph)]
    return found


class Sizes(NamedTuple):
    """Lines by folder (tests too), lines of the product, files and functions over their limits."""

    folders: dict[str, int]
    product: int
    long_files: list[str]
    long_functions: list[str]


def sources(root: Path) -> list[Path]:
    """Our own modules: the front door and the mapped folders."""
    files = [root / "__main__.py"] if (root / "__main__.py").exists() else []
    return files + [path for folder in FLOORS for path in sorted((root / folder).glob("*.py"))]


def sizes(root: Path) -> Sizes:
    """Count lines. `where` in the lists is relative to `root`."""
    found = Sizes(dict.fromkeys((".", *FLOORS, "tests"), 0), 0, [], [])
    product = 0
    for folder in found.folders:
        files = (root / folder).glob("__main__.py") if folder == "." else (root / folder).rglob("*")
        for path in sorted(file for file in files if file.suffix in COUNTED):
            name, text = path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")
            count = text.count("\n")
            found.folders[folder] += count
            product += 0 if folder == "tests" or folder in OUTSIDE_THE_WHEEL else count
            if count > FILE_LINES:
                found.long_files.append(f"{name} {count}")
            if path.suffix == ".py":
                found.long_functions.extend(f"{name}:{where}" for where in _long_functions(ast.parse(text)))
    return found._replace(product=product)


def wording(root: Path, files: Iterable[str]) -> list[Breach]:
    """Every use of a phrase of WORDING in `files`, except in code quoted in backquotes."""
    return [
        Breach("plain words", f"{name}:{number}", f"{found.group()!r}: write {instead}")
        for name in files
        for number, line in enumerate((root / name).read_text(encoding="utf-8").splitlines(), 1)
        for phrase, instead in WORDING.items()
        for found in re.finditer(phrase, re.sub(r"`[^`]*`", "``", line), re.IGNORECASE)
    ]


def shared_names(root: Path) -> dict[str, list[str]]:
    """Public classes and functions of the product that have one name and are in several files."""
    found: dict[str, list[str]] = {}
    for path in sources(root):
        name = path.relative_to(root).as_posix()
        if name.split("/")[0] not in OUTSIDE_THE_WHEEL:
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                    found.setdefault(node.name, []).append(name)
    return {name: files for name, files in found.items() if len(files) > 1}


def _long_functions(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > FUNCTION_LINES:
                yield f"{node.lineno} {node.name} {length}"


def _inits(root: Path) -> Iterator[Path]:
    for folder in (*FLOORS, "tests"):
        yield from sorted((root / folder).rglob("__init__.py"))
    if (root / "__init__.py").exists():
        yield root / "__init__.py"


def _of_file(path: Path, root: Path, tree: ast.Module) -> Iterator[tuple[str, int, str]]:
    folder = path.parent.name if path.parent != root else ""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield "no relative imports", node.lineno, "." * node.level + (node.module or "")
        if isinstance(node, ast.Call):
            yield from _call(node, folder)
    for imported in _imports(tree):
        yield from _import(imported, folder, path)
    for statement in tree.body:
        yield from _state(statement)


def _import(imported: Import, folder: str, path: Path) -> Iterator[tuple[str, int, str]]:
    module, line, top = imported
    outer = module.split(".")[0]
    if outer in EXECUTES:
        yield "nothing is executed from disk", line, module
    if folder in TORCH_FREE and outer == "torch":
        yield "torch-free folders", line, module
    if outer != "minka":
        if folder == "kernels" and outer not in KERNELS_MAY and outer not in sys.stdlib_module_names:
            yield "kernels import torch and triton only", line, module
        return
    if module.count(".") < 2:
        yield "import a module, not the namespace", line, module
        return
    target = module.split(".")[1]
    if target != folder and target not in FLOORS.get(folder, frozenset()):
        yield "floors", line, f"{folder or 'the front door'} may not import {module}"
    if not top and not path.name.startswith("command"):  # there, so that --help stays instant
        yield "no own imports inside functions", line, module


def _imports(tree: ast.Module) -> list[Import]:
    top = {id(node) for node in tree.body}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [Import(alias.name, node.lineno, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            modules = [node.module]
            if node.module.startswith("minka.") and node.module.count(".") == 1:  # from minka.plan import config
                modules = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [Import(module, node.lineno, id(node) in top) for module in modules]
    return found


def _call(node: ast.Call, folder: str) -> Iterator[tuple[str, int, str]]:
    called = ast.unparse(node.func)
    if called in ("eval", "exec", "torch.load"):
        yield "nothing is executed from disk", node.lineno, called
    if any(word.arg == "allow_pickle" and ast.unparse(word.value) != "False" for word in node.keywords):
        yield "nothing is executed from disk", node.lineno, f"{called}(allow_pickle=...)"
    by_name = called in ("importlib.import_module", "import_module", "__import__")
    named = str(node.args[0].value) if node.args and isinstance(node.args[0], ast.Constant) else ""
    if folder and by_name and named.split(".")[0] == "minka":
        yield "no own imports by name", node.lineno, named


def _state(statement: ast.stmt) -> Iterator[tuple[str, int, str]]:
    if isinstance(statement, ast.Assign):
        targets, value = statement.targets, statement.value
    elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
        targets, value = [statement.target], statement.value
    else:
        return
    mutable = isinstance(value, ast.Dict | ast.List | ast.Set | ast.DictComp | ast.ListComp | ast.SetComp) or (
        isinstance(value, ast.Call) and ast.unparse(value.func).split(".")[-1] in ("dict", "list", "set", "defaultdict")
    )
    for target in targets:
        if mutable and isinstance(target, ast.Name) and not target.id.isupper() and not target.id.startswith("__"):
            yield "no module-level mutable state", statement.lineno, target.id


def _cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Each cycle once, from the first module that was visited."""
    done: set[str] = set()
    found: list[list[str]] = []

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            found.append([*path[path.index(module) :], module])
            return
        if module in done or module not in graph:
            return
        for target in sorted(graph[module]):
            visit(target, [*path, module])
        done.add(module)

    for module in sorted(graph):
        visit(module, [])
    return found
