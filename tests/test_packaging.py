"""An installed minka is a whole minka: wheel, editable install and bare source tree all run the demo's dry run."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from house import FLOORS, OUTSIDE_THE_WHEEL


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """A copy of what a clone would hold: a stale build/ next to the sources would ship deleted files."""
    target = tmp_path_factory.mktemp("clone")
    listed = _run(["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"], cwd=root).stdout
    for name in filter(None, listed.split("\0")):
        source, copy = root / name, target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            copy.symlink_to(os.readlink(source))
        elif source.is_file():
            shutil.copy(source, copy)
    return target


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of that copy, built without a network."""
    out = tmp_path_factory.mktemp("wheel")
    _pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(out), str(tree))
    return next(out.glob("minka-*.whl"))


def test_the_wheel_holds_the_mapped_folders_and_the_front_door_and_nothing_else(wheel: Path, tree: Path) -> None:
    """Other files than Python too: a recipe or a template that package-data omits is missing for the user."""
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    shipped = FLOORS.keys() - OUTSIDE_THE_WHEEL
    files = [path for folder in shipped for path in (tree / folder).rglob("*") if path.is_file()]
    assert "minka/plan/recipes/demo.toml" in names
    assert names == {f"minka/{path.relative_to(tree)}" for path in files} | {"minka/__main__.py"}


def test_an_installed_wheel_runs_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    python = _environment(tmp_path / "env", "--no-index", str(wheel))
    _assert_runs([str(python.parent / "minka")], tmp_path, python, inside=tmp_path / "env")


def test_an_editable_install_runs_from_another_folder(tree: Path, tmp_path: Path) -> None:
    python = _environment(tmp_path / "env", "--no-index", "--no-build-isolation", "--editable", str(tree))
    _assert_runs([str(python.parent / "minka")], tmp_path, python, inside=tree)


def test_the_source_tree_runs_with_nothing_installed(tree: Path, tmp_path: Path) -> None:
    python = _environment(tmp_path / "env")
    namespace = {"PYTHONPATH": str(tree / ".ns")}
    _assert_runs([str(python), "-m", "minka"], tmp_path, python, inside=tree, environment=namespace)


def _assert_runs(
    minka: list[str], folder: Path, python: Path, inside: Path, environment: dict[str, str] | None = None
) -> None:
    """The dry run works, every module is the one under `inside`, and nothing was written."""
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    shown = _run([*minka, "train", "demo", "--dry-run"], cwd=elsewhere, environment=environment).stdout
    assert "demo" in shown
    assert list(elsewhere.iterdir()) == []
    where = _run(
        [str(python), "-c", "import minka.plan.load_config as m; print(m.__file__, *m.recipe_names())"],
        cwd=elsewhere,
        environment=environment,
    ).stdout.split()
    assert Path(where[0]).resolve().is_relative_to(inside.resolve())
    assert {"demo", "llama3-405b"} <= set(where[1:])


def _environment(folder: Path, *install: str) -> Path:
    """An environment without minka but with this one's third-party packages, then `pip install --no-deps install`."""
    _run([sys.executable, "-m", "venv", "--without-pip", str(folder)])
    python = folder / "bin" / "python"
    site = Path(_run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).stdout.strip())
    # A path named in a .pth is searched, but its own .pth files (an editable minka) are not read.
    (site / "third-party.pth").write_text(sysconfig.get_path("purelib") + "\n")
    if install:
        _pip("--python", str(python), "install", "--no-deps", *install)
    return python


def _pip(*arguments: str) -> None:
    _run([sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments])


def _run(
    command: list[str], cwd: Path | None = None, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=clean | (environment or {}), capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done
