"""The documentation matches the code, sizes and wording keep their limits, and every slow test gets its turn in CI."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic.fields import FieldInfo

from house import FILE_LINES, FLOORS, FUNCTION_LINES, PRODUCT_LINES, shared_names, sizes, sources, wording
from minka.__main__ import COMMANDS
from minka.plan.config import RunConfig
from minka.plan.config_sections import BatchStage, RopeScaling
from minka.plan.errors import ExitStatus
from minka.plan.ledger import EVENTS
from minka.plan.load_config import load_run, recipe_names
from planted import plant

GUIDES = (
    "architecture",
    "configuration",
    "numbers",
    "data",
    "training",
    "parallelism",
    "kernels",
    "checkpoints",
    "evaluation",
    "failures",
    "plan",
    "report",
)
TABLES: dict[str, Any] = {name: field.annotation for name, field in RunConfig.model_fields.items() if name != "format"}
TABLES |= {"model.rope_scaling": RopeScaling, "data.batch_warmup": BatchStage}


@pytest.mark.parametrize("section", sorted(TABLES))
def test_every_field_is_documented_with_its_unit_its_default_and_a_meaning(section: str, root: Path) -> None:
    rows = _table(_heading(section, (root / "docs/configuration.md").read_text()))
    fields = TABLES[section].model_fields
    assert {name: row[1] for name, row in rows.items()} == {name: _default(field) for name, field in fields.items()}
    assert all(unit and meaning for unit, _, meaning in rows.values())


def test_every_section_of_the_configuration_guide_is_a_section_of_a_run(root: Path) -> None:
    text = (root / "docs/configuration.md").read_text()
    assert set(re.findall(r"^##+ (\S+)$", text, re.MULTILINE)) == set(TABLES)


def test_the_readme_names_every_guide_folder_command_and_target(root: Path) -> None:
    readme = (root / "README.md").read_text()
    folders = [folder for folder in FLOORS if any((root / folder).glob("*.py"))]
    targets = re.findall(r"^([a-z-]+):", (root / "Makefile").read_text(), re.MULTILINE)
    wanted = [f"docs/{guide}.md" for guide in GUIDES] + [f"`{folder}/`" for folder in folders]
    wanted += [f"minka {command}" for command in COMMANDS] + [f"make {target}" for target in targets]
    wanted += [f"`{recipe}`" for recipe in recipe_names()]
    assert [name for name in wanted if name not in readme] == []


def test_the_handbook_names_every_exit_status_and_every_event(root: Path) -> None:
    text = (root / "docs/failures.md").read_text()
    assert {int(status) for status in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)} == {int(s) for s in ExitStatus}
    assert {event for event in EVENTS if f"`{event}`" not in text} == set()


def test_every_guide_exists_and_every_link_has_a_target(root: Path) -> None:
    pages = [root / "README.md", root / "CHANGELOG.md", root / "SECURITY.md", *sorted((root / "docs").glob("*.md"))]
    assert {page.stem for page in pages if page.parent.name == "docs"} == set(GUIDES)
    broken = []
    for page in pages:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.name} -> {target}")
    assert broken == []


def test_every_file_of_ours_that_a_page_names_exists(root: Path) -> None:
    ours = re.compile(rf"\b(?:{'|'.join([*FLOORS, 'tests', 'examples', 'docs'])})/[\w/.-]+\.\w+")
    pages = [root / "README.md", root / "CHANGELOG.md", root / "SECURITY.md", *sorted((root / "docs").glob("*.md"))]
    named = {(page.name, file) for page in pages for file in ours.findall(page.read_text())}
    assert len(named) > 20
    assert sorted((page, file) for page, file in named if not (root / file).exists()) == []


def test_a_command_line_in_the_documentation_starts_with_a_command_that_exists(root: Path) -> None:
    for page in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        blocks = re.findall(r"^```(?:sh|bash)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
        for line in "\n".join(blocks).splitlines():
            words = line.split()
            if words[:1] == ["minka"]:
                assert words[1] in {*COMMANDS, "--version", "--help"}, f"{page.name}: {line}"


def test_every_example_is_a_run_and_says_what_it_is_for(root: Path) -> None:
    examples = sorted((root / "examples").glob("*.toml"))
    assert examples
    for example in examples:
        assert example.read_text().startswith("# ")
        assert load_run(str(example)).config.run.name == example.stem


def test_the_product_its_files_and_its_functions_stay_within_their_sizes(root: Path) -> None:
    found = sizes(root)
    assert found.product <= PRODUCT_LINES
    assert found.long_files == []
    assert found.long_functions == []


def test_sizes_count_the_product_and_find_what_is_too_long(tmp_path: Path) -> None:
    long = "def f() -> None:\n" + FUNCTION_LINES * "    f()\n"
    plant(
        tmp_path,
        {
            "__main__.py": "\n",
            "plan/a.py": long,
            "report/page.js": FILE_LINES * "\n" + "\n",
            "plan/recipes/a.toml": "\n",
            "benchmarks/a.py": "\n\n",
            "tests/plan/test_a.py": "\n",
        },
    )
    found = sizes(tmp_path)
    assert found.product == 1 + (1 + FUNCTION_LINES) + (FILE_LINES + 1)
    assert (found.folders["benchmarks"], found.folders["tests"]) == (2, 1)
    assert (found.long_files, found.long_functions) == (["report/page.js 301"], ["plan/a.py:1 f 61"])


def test_the_product_and_its_guides_are_in_plain_words(root: Path) -> None:
    pages = [root / name for name in ("README.md", "CHANGELOG.md", "SECURITY.md", "Makefile", ".ci/run")]
    recipes = [*(root / "plan/recipes").glob("*.toml"), *(root / "examples").glob("*.toml")]
    files = [*sources(root), *pages, *recipes, *(root / "docs").glob("*.md"), *(root / "report").glob("*.js")]
    assert wording(root, [file.relative_to(root).as_posix() for file in files]) == []


@pytest.mark.parametrize(
    ("line", "phrases"),
    [
        ("these are no safetensors", 1),
        ("a run goes on where it stopped, for ever", 2),
        ("its weights are others by now", 2),
        ("Fillers lie beside the samples; the schedule lies behind", 3),
        ("there is no checkpoint, and it is no longer needed", 0),
        ("`beside` in code", 0),
    ],
)
def test_a_banned_phrase_is_found(line: str, phrases: int, tmp_path: Path) -> None:
    plant(tmp_path, {"a.md": f"\n{line}\n"})
    found = wording(tmp_path, ["a.md"])
    assert [breach.where for breach in found] == phrases * ["a.md:2"]


def test_classes_and_functions_that_are_different_things_have_different_names(root: Path, tmp_path: Path) -> None:
    assert shared_names(root).keys() == {"main"}
    plant(tmp_path, {"plan/a.py": "class State: ...\n", "train/b.py": "def State() -> None: ...\n"})
    assert shared_names(tmp_path) == {"State": ["plan/a.py", "train/b.py"]}


def test_prose_wraps_at_120_columns(root: Path) -> None:
    pages = [root / "README.md", root / "CHANGELOG.md", root / "SECURITY.md", *sorted((root / "docs").glob("*.md"))]
    lines = [(page.name, n, line) for page in pages for n, line in enumerate(page.read_text().splitlines(), 1)]
    assert [line for line in lines if len(line[2]) > 120 and not line[2].startswith("|")] == []


def test_nothing_is_left_open_in_the_code(root: Path) -> None:
    marks = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X|HA" + r"CK)\b")
    found = []
    for path in [*sources(root), *sorted((root / "tests").rglob("*.py"))]:
        found += [f"{path.name}:{n}" for n, line in enumerate(path.read_text().splitlines(), 1) if marks.search(line)]
    assert found == []


def test_the_namespace_is_one_relative_link(root: Path) -> None:
    """`cp -L` would turn it into a second copy of everything."""
    link = root / ".ns" / "minka"
    assert link.is_symlink()
    assert link.readlink() == Path("..")
    assert [entry.name for entry in link.parent.iterdir()] == ["minka"]


@pytest.mark.slow
def test_the_thirds_run_every_slow_test_once_and_every_fast_test_always(root: Path, tmp_path: Path) -> None:
    for name in ("conftest.py", "house.py"):
        shutil.copy(root / "tests" / name, tmp_path)
    (tmp_path / "test_it.py").write_text(
        "import pytest\n\ndef test_fast(): pass\n\n"
        "@pytest.mark.slow\n@pytest.mark.parametrize('n', range(40))\ndef test_slow(n): pass\n"
    )
    thirds = [_collected(tmp_path, f"--third={third}") for third in range(3)]
    assert all("test_it.py::test_fast" in third for third in thirds)
    slow = [test for third in thirds for test in third if "test_slow" in test]
    assert sorted(slow) == sorted(set(slow))
    assert len(slow) == 40
    assert all(len(third) > 1 for third in thirds)


def _collected(folder: Path, *options: str) -> list[str]:
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", "-c", "/dev/null"]
    done = subprocess.run(
        [*command, "--rootdir", str(folder), "-W", "ignore", *options, str(folder)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if "::" in line]


def _heading(name: str, text: str) -> str:
    """The text under a heading, up to the next one."""
    found = re.search(rf"^##+ {re.escape(name)}$(.*?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"docs/configuration.md has no section {name}"
    return found.group(1)


def _table(text: str) -> dict[str, tuple[str, str, str]]:
    """Rows of a table with the columns key, unit, default, meaning."""
    rows = {}
    for line in re.findall(r"^\| `.*\|$", text, re.MULTILINE):
        name, unit, default, meaning = (cell.strip() for cell in line.strip("|").split("|"))
        rows[name.strip("`")] = (unit, default, meaning)
    return rows


def _default(field: FieldInfo) -> str:
    """A default as the guide writes it."""
    if field.is_required():
        return "*required*"
    value = field.get_default(call_default_factory=True)
    return "*not set*" if value is None else f"`{json.dumps(value)}`"
