"""The pin of TRL and the ranges of the other packages: pyproject.toml is their one place, this copies and moves them.

    python tools/pins.py sync [--check]   write the ranges into the PEP 723 block of every example script, or check them
    python tools/pins.py bump VERSION     move the pin of TRL: report, regenerate, list what a person must read again

`bump` changes the environment that it runs in: it installs the new release there, because the tools read the installed one.
"""

import argparse
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PIN = re.compile(r'"trl==([^"]+)"')
NEWEST = re.compile(r'^newest = "([^"]+)"$', re.M)  # the release that tools/drift.py compares the pinned one with
VERSION = re.compile(r"\d+(\.\d+)+((a|b|rc|\.dev|\.post)\d+)?")
BLOCK = re.compile(r"^# /// script\n(?:#.*\n)*?# ///\n", re.M)


class PinError(ValueError):
    """The pin or a copy of it cannot be read or moved; the message names the file and the remedy."""


def project(root: Path = ROOT) -> dict:
    """The [project] table of pyproject.toml."""
    return tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]


def pinned(root: Path = ROOT) -> str:
    """The pinned version of TRL."""
    found = PIN.findall((root / "pyproject.toml").read_text("utf-8"))
    if len(found) != 1:
        raise PinError(f'pyproject.toml: expected one "trl==VERSION", found {len(found)}')
    return found[0]


def order(version: str) -> list[int]:
    """What versions are compared by: 1.9 comes before 1.16.0."""
    return [int(number) for number in re.findall(r"\d+", version)]


def table(root: Path = ROOT) -> None:
    """Prints the ranges as a Markdown table, for the README: cog puts it there."""
    rows = [re.fullmatch(r"([\w.-]+)(.*)", entry).groups() for entry in project(root)["dependencies"]]
    rows.insert(0, ("Python", project(root)["requires-python"]))
    print("\n| " + " | ".join(name for name, _ in rows) + " |")
    print("|" + "---|" * len(rows))
    print("| " + " | ".join(bounds.replace(",", ", ") for _, bounds in rows) + " |\n")


def block(root: Path = ROOT) -> str:
    """The PEP 723 block with the same requirements as pyproject.toml: `uv run` reads it and not the project."""
    about = project(root)
    lines = [f'requires-python = "{about["requires-python"]}"', "dependencies = ["]
    lines += [f'    "{entry}",' for entry in about["dependencies"]] + ["]"]
    return "\n".join(["# /// script", *(f"# {line}" for line in lines), "# ///", ""])


def sync(root: Path = ROOT, check: bool = False) -> list[str]:
    """Names of the example scripts whose block differs from pyproject.toml; unless `check`, they are rewritten."""
    scripts = {path: path.read_text("utf-8") for path in sorted((root / "annotated_examples").glob("*.py"))}
    for path, text in scripts.items():
        if len(BLOCK.findall(text)) != 1:
            raise PinError(f"{path.relative_to(root)}: needs exactly one PEP 723 block, `# /// script` to `# ///`")
    wanted = {path: BLOCK.sub(lambda _: block(root), text) for path, text in scripts.items()}
    differing = [path for path in scripts if scripts[path] != wanted[path]]
    for path in [] if check else differing:
        path.write_text(wanted[path], "utf-8")
    return [str(path.relative_to(root)) for path in differing]


def text_files(root: Path = ROOT) -> dict[str, str]:
    """Name -> text of each file that git tracks or would track; binary files are left out."""
    command = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.split("\0")
    found = {}
    for name in sorted(set(names) - {""}):
        path = root / name
        if path.is_file() and b"\0" not in (data := path.read_bytes()):
            found[name] = data.decode("utf-8", "replace")
    return found


def mentions(version: str, root: Path = ROOT) -> list[str]:
    """`file:line: text` of each line that names this version of TRL, links to its source aside."""
    number = re.compile(rf"(?<![\d.]){re.escape(version)}(?!\.?\d)")
    return [
        f"{name}:{i}: {line.strip()[:140]}"
        for name, text in text_files(root).items()
        if not name.endswith((".json", ".jsonl"))
        for i, line in enumerate(text.splitlines(), 1)
        if number.search(re.sub(r"/blob/v[^/]+/", "", line))
    ]


def stale_measurements(version: str, root: Path = ROOT) -> list[str]:
    """Committed measurements that were made with another release of TRL."""
    found = []
    for path in sorted((root / "annotated_examples" / "expected").glob("*.json")):
        result = json.loads(path.read_text("utf-8"))
        measured = result.get("versions", {}).get("trl")
        if measured != version:  # those of a trainer were made by several runs of its script
            again = f"make expected TRAINER={path.stem}" if "trainer" in result else result["command"]
            found.append(f"{path.relative_to(root)}: measured with TRL {measured}; `{again}`")
    return found


def bump(version: str, root: Path = ROOT, run: Callable[[list[str]], int] | None = None) -> int:
    """Moves the pin to `version`; `run` starts a command and gives its exit status.

    Returns 0 when everything could be regenerated. A release that cannot be read or installed leaves the files as they
    were. Raises PinError when the version is no version or is the pin already.
    """
    run = run or (lambda command: subprocess.run(command, cwd=root).returncode)
    old, file = pinned(root), root / "pyproject.toml"
    if not VERSION.fullmatch(version):
        raise PinError(f"{version!r} is no version: say for example `make bump TRL=1.16.0`")
    if version == old:
        raise PinError(f"pyproject.toml pins TRL {old} already")
    python = sys.executable
    print(f"1. What TRL {version} does to the walkthroughs\n", flush=True)
    if run([python, "tools/drift.py", version]) != 0:
        raise PinError(f"TRL {version} could not be read (above); nothing was changed")
    print(f"\n2. The pin moves from {old} to {version}, and this environment with it\n", flush=True)
    before = file.read_text("utf-8")
    text = before.replace(f'"trl=={old}"', f'"trl=={version}"')
    if (newest := NEWEST.search(text)) and order(newest[1]) < order(version):
        text = NEWEST.sub(f'newest = "{version}"', text)
    file.write_text(text, "utf-8")
    if run([python, "-m", "pip", "install", "--quiet", "-e", "."]) != 0:
        file.write_text(before, "utf-8")
        raise PinError(f"TRL {version} could not be installed with these ranges (above); nothing was changed")
    print("\n3. What can be made again is made again\n", flush=True)
    failed = run(["make", "--keep-going", "sync", f"PYTHON={python}"]) != 0
    print("\n4. What a person must do now\n")
    print("- read the parts of the pages that the report above names")
    if failed:
        print("- repair what `make sync` complained of above, and run it again")
    for line in stale_measurements(version, root):
        print(f"- {line}")
    print(f"- read again each line that still names {old}:")
    print("\n".join(f"    {line}" for line in mentions(old, root)) or "    none")
    print("- run `make test`, `make environments` and `make site`; write it into CHANGELOG.md")
    return int(failed)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("sync", help="copy the ranges of pyproject.toml into the example scripts")
    command.add_argument("--check", action="store_true", help="write nothing; exit 1 if a script differs")
    command = commands.add_parser("bump", help="move the pin of TRL")
    command.add_argument("version", help="the release to move to, like 1.16.0")
    args = parser.parse_args(argv)
    try:
        if args.command == "bump":
            return bump(args.version)
        differing = sync(check=args.check)
    except PinError as error:
        print(error, file=sys.stderr)
        return 2
    for name in differing:
        print(f"{name}: {'differs from pyproject.toml; run `make sync`' if args.check else 'rewritten'}")
    return int(args.check and bool(differing))


if __name__ == "__main__":
    sys.exit(main())
