"""Small trees of files that tests check the rules of the house on."""

from pathlib import Path


def plant(root: Path, files: dict[str, str]) -> None:
    """Write each file under `root`."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
