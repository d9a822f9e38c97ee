"""The code keeps the rules of tests/house.py, each rule can fail, and every file that lists the folders agrees."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from house import FLOORS, OUTSIDE_THE_WHEEL, TORCH_FREE, breaches
from planted import plant

PLANTED = [
    ("floors", {"plan/a.py": "from minka.data.token_store import TokenStore\n", "data/token_store.py": ""}),
    ("floors", {"model/a.py": "import minka.parallel.mesh\n", "parallel/mesh.py": ""}),
    ("floors", {"report/a.py": "from minka.model import hub\n", "model/hub_folder.py": ""}),
    ("floors", {"eval/a.py": "from minka.train.loop import run\n", "train/loop.py": ""}),
    ("floors", {"__main__.py": "from minka.plan.errors import UserError\n", "plan/errors.py": ""}),
    ("no cycles", {"plan/a.py": "import minka.plan.b\n", "plan/b.py": "from minka.plan.a import x\n"}),
    ("no cycles", {"plan/a.py": "from minka.plan import b\n", "plan/b.py": "from minka.plan import a\n"}),
    ("no own imports inside functions", {"data/a.py": "def f():\n    import minka.data.b\n", "data/b.py": ""}),
    ("no own imports by name", {"data/a.py": "import importlib\nimportlib.import_module('minka.train.loop')\n"}),
    ("no relative imports", {"data/a.py": "from .b import x\n", "data/b.py": ""}),
    ("import a module, not the namespace", {"train/a.py": "from minka import eval\n"}),
    ("torch-free folders", {"plan/a.py": "def f():\n    import torch\n"}),
    ("torch-free folders", {"slurm/a.py": "from torch.distributed import init_process_group\n"}),
    ("kernels import torch and triton only", {"kernels/a.py": "import numpy\n"}),
    ("no __init__.py", {"data/__init__.py": ""}),
    ("no __init__.py", {"tests/plan/__init__.py": ""}),
    ("no module-level mutable state", {"data/a.py": "cache: dict[str, int] = {}\n"}),
    ("no module-level mutable state", {"data/a.py": "seen = set()\n"}),
    ("nothing is executed from disk", {"data/a.py": "import pickle\n"}),
    ("nothing is executed from disk", {"parallel/a.py": "import torch\nx = torch.load('x')\n"}),
    ("nothing is executed from disk", {"data/a.py": "import numpy\nnumpy.load('x', allow_pickle=True)\n"}),
]
ALLOWED = {
    "__main__.py": "import importlib\nimportlib.import_module('minka.train.command')\n",
    "data/command.py": "def main(argv):\n    from minka.data.token_store import TokenStore\n",
    "data/token_store.py": "import numpy\nfrom minka.plan.errors import UserError\nTABLE = {}\nmodel.eval()\n",
    "plan/errors.py": "import enum\n",
    "kernels/swiglu.py": "import math\nimport torch\nimport triton\n",
}


def test_the_house_keeps_its_floors(root: Path) -> None:
    assert breaches(root) == []


@pytest.mark.parametrize(("rule", "files"), PLANTED)
def test_a_planted_breach_is_found(rule: str, files: dict[str, str], tmp_path: Path) -> None:
    plant(tmp_path, files)
    assert [breach.rule for breach in breaches(tmp_path)] == [rule]


def test_what_is_allowed_is_not_a_breach(tmp_path: Path) -> None:
    plant(tmp_path, ALLOWED)
    assert breaches(tmp_path) == []


@pytest.mark.parametrize("folder", sorted(TORCH_FREE))
def test_importing_a_torch_free_folder_imports_no_torch(
    folder: str, root: Path, source_environment: dict[str, str]
) -> None:
    """The rule on files sees direct imports only; this sees what third-party packages import."""
    modules = [f"minka.{folder}.{path.stem}" for path in sorted((root / folder).glob("*.py"))]
    script = (
        f"import importlib, sys\nfor m in {modules!r}: importlib.import_module(m)\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], env=source_environment, check=True)


def test_every_folder_of_code_has_a_floor(root: Path) -> None:
    with_code = {path.parent.name for path in root.glob("[!.]*/*.py")} - {"tests", "examples", "build", "dist"}
    assert with_code <= set(FLOORS)


@pytest.mark.parametrize("page", ["README.md", "docs/architecture.md"])
def test_the_table_of_floors_is_that_of_the_code(page: str, root: Path) -> None:
    table = floors_in((root / page).read_text(encoding="utf-8"))
    assert set(table) - set(FLOORS) == set()
    assert set(folders_with_code(root)) - set(table) == set()
    assert table == {folder: FLOORS[folder] & set(table) for folder in table}


def test_a_table_of_floors_is_read_as_it_is_written() -> None:
    rows = ["`plan/` | a | nothing", "`data` | b | plan", "`train/` | c | all of these", "`x/` | d | anything"]
    found = floors_in("\n".join(f"| {row} |" for row in rows))
    assert found == {"plan": set(), "data": {"plan"}, "train": {"plan", "data"}, "x": {"plan", "data", "train"}}


def test_every_list_of_folders_names_those_with_code(root: Path) -> None:
    """The wheel's map, mypy's files, ruff's banned bare imports, the Makefile's folders."""
    tool = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    folders = set(folders_with_code(root))
    mapped = {"minka": "."} | {f"minka.{folder}": folder for folder in folders - OUTSIDE_THE_WHEEL}
    assert tool["setuptools"]["package-dir"] == mapped
    assert sorted(tool["setuptools"]["packages"]) == sorted(mapped)
    checked = [path.removeprefix(".ns/minka/") for path in tool["mypy"]["files"]]
    assert sorted(checked) == sorted({*folders, "__main__.py", "tests"})
    assert set(tool["ruff"]["lint"]["flake8-tidy-imports"]["banned-api"]) == {*FLOORS, "tests", "pickle"}
    (listed,) = re.findall(r"^FOLDERS := (.*)$", (root / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed.split()) == sorted(FLOORS)


def folders_with_code(root: Path) -> list[str]:
    return [folder for folder in FLOORS if any((root / folder).glob("*.py"))]


def floors_in(text: str) -> dict[str, set[str]]:
    """The rows "| `folder` | what it holds | what it may import |" of a page, in their order."""
    table: dict[str, set[str]] = {}
    for folder, may in re.findall(r"^\| `([a-z]+)/?` \| .* \| ([a-z, ]+) \|$", text, re.MULTILINE):
        everything = may in ("all of these", "anything")
        table[folder] = set(table) if everything else {name for name in may.split(", ") if name != "nothing"}
    return table
