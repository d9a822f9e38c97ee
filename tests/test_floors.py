"""The house keeps its floors, and each rule of tests/house.py can fail."""

import subprocess
import sys
from pathlib import Path

import pytest

from house import FLOORS, TORCH_FREE, breaches

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
    _plant(tmp_path, files)
    assert [breach.rule for breach in breaches(tmp_path)] == [rule]


def test_what_is_allowed_is_no_breach(tmp_path: Path) -> None:
    _plant(tmp_path, ALLOWED)
    assert breaches(tmp_path) == []


@pytest.mark.parametrize("folder", sorted(TORCH_FREE))
def test_importing_a_torch_free_folder_imports_no_torch(
    folder: str, root: Path, source_environment: dict[str, str]
) -> None:
    """The rule on files sees direct imports only; this sees what third parties drag in."""
    modules = [f"minka.{folder}.{path.stem}" for path in sorted((root / folder).glob("*.py"))]
    script = (
        f"import importlib, sys\nfor m in {modules!r}: importlib.import_module(m)\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], env=source_environment, check=True, timeout=60)


def test_every_folder_of_code_has_a_floor(root: Path) -> None:
    with_code = {path.parent.name for path in root.glob("[!.]*/*.py")} - {"tests", "examples", "build", "dist"}
    assert with_code <= set(FLOORS)


def _plant(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
