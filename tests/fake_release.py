"""Small releases of TRL and small pages for the tests of the walkthroughs' tools."""

from pathlib import Path

from trl_source import Source

ROOT = Path(__file__).resolve().parent.parent
NOT_WALKTHROUGHS = {"index.md", "newest_trl.md"}
PAGES = sorted(path for path in (ROOT / "annotated_trainers").glob("*.md") if path.name not in NOT_WALKTHROUGHS)


def release(folder: Path, version: str, modules: dict[str, str]) -> Source:
    """An unpacked wheel in `folder`: `modules` maps "trainer/toy_trainer.py" to its text."""
    for name, text in {"__init__.py": "", **modules}.items():
        path = folder / "trl" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    (folder / f"trl-{version}.dist-info").mkdir()
    return Source.at(folder)


def pages(folder: Path, **texts: str) -> Path:
    """A folder annotated_trainers with one page per keyword."""
    folder = folder / "annotated_trainers"
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.md").write_text(text, "utf-8")
    return folder
