"""Run the tests with the lowest and with the highest versions that pyproject.toml admits.

    python tools/environments.py                        both, one after the other
    python tools/environments.py lowest                 one of them
    python tools/environments.py lowest -- tests/test_examples.py -x     what follows -- goes to pytest

Each environment is made anew by uv in build/environments/. "Lowest" is the lower bound of each package that
pyproject.toml names, "highest" the newest release below its upper bound; what those packages need in turn is always the
newest that fits. torch is not varied: it is a download of gigabytes, and a build for CPU exists in few places. It stays at
the version that this Python has, or at --torch VERSION. The two lists of versions are left in
build/environments/lowest.txt and highest.txt.
"""

import argparse
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "environments"
RESOLUTION = {"lowest": "lowest-direct", "highest": "highest"}
EXTRAS = ("test", "docs")


class EnvironmentsError(RuntimeError):
    """An environment could not be made, or is not what it should be; the message names the remedy."""


def requirements() -> dict[str, str]:
    """Package -> its bounds, like {"peft": ">=0.20,<0.22"}, as pyproject.toml has them."""
    entries = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["dependencies"]
    return dict(re.fullmatch(r"([\w.-]+)(.*)", entry).groups() for entry in entries)


def lower_bound(bounds: str) -> str:
    """The version after >= or ==. Raises EnvironmentsError where there is none."""
    match = re.search(r"[>=]=\s*([\w.+-]+)", bounds)
    if not match:
        raise EnvironmentsError(f"pyproject.toml: {bounds!r} has no lower bound: every range needs both ends")
    return match[1]


def torch_version() -> str:
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        raise EnvironmentsError("this Python has no torch to go by: say --torch VERSION, for example 2.13.0") from None


def surroundings() -> dict[str, str]:
    """The environment variables for uv. It does not read pip's settings, so where pip looks for wheels is handed on."""
    variables = {name: value for name, value in os.environ.items() if name not in {"VIRTUAL_ENV", "PYTHONPATH"}}
    command = [sys.executable, "-m", "pip", "config", "get", "global.find-links"]
    configured = subprocess.run(command, capture_output=True, text=True).stdout
    folders = (os.environ.get("PIP_FIND_LINKS", "") + " " + configured).split()
    if folders:
        variables.setdefault("UV_FIND_LINKS", ",".join(dict.fromkeys(folders)))
    if os.environ.get("PIP_EXTRA_INDEX_URL"):
        variables.setdefault("UV_INDEX", os.environ["PIP_EXTRA_INDEX_URL"])
        variables.setdefault("UV_INDEX_STRATEGY", "unsafe-best-match")  # as pip does: the best version of any index
    return variables


def uv() -> str:
    found = shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if not found:
        raise EnvironmentsError("uv is missing, which makes the environments: pip install '.[maintain]'")
    return found


def commands(name: str, torch: str, python: str) -> list[list[str]]:
    """What makes one environment: first the packages of the ranges, then the tools of the tests around them."""
    place = str(FOLDER / name)
    install = [uv(), "pip", "install", "--quiet", "--python", place, "--constraint", str(FOLDER / "constraints.txt")]
    extras = [word for extra in EXTRAS for word in ("--extra", extra)]
    return [
        [uv(), "venv", "--quiet", "--clear", "--python", python, place],
        [*install, "--resolution", RESOLUTION[name], "-r", "pyproject.toml"],
        [*install, "-r", "pyproject.toml", *extras],
    ]


def installed(name: str, variables: dict[str, str]) -> dict[str, str]:
    """Package -> version of the environment, which is also written beside it."""
    command = [uv(), "pip", "freeze", "--python", str(FOLDER / name)]
    frozen = subprocess.run(command, env=variables, capture_output=True, text=True, check=True).stdout
    (FOLDER / f"{name}.txt").write_text(frozen, "utf-8")
    return dict(line.split("==") for line in frozen.splitlines() if "==" in line)


def wrong_bounds(versions: dict[str, str]) -> list[str]:
    """Packages whose lowest installable version is not the bound that pyproject.toml claims (torch is not varied)."""
    claimed = {package: lower_bound(bounds) for package, bounds in requirements().items() if package != "torch"}
    return [
        f"{package}: pyproject.toml says {bound}, the lowest that can be installed is {versions.get(package)}"
        for package, bound in claimed.items()
        if re.sub(r"(\.0)+$", "", bound) != re.sub(r"(\.0)+$", "", versions.get(package, ""))
    ]


def make(name: str, torch: str, python: str) -> dict[str, str]:
    """Makes the environment and gives its versions. Raises EnvironmentsError."""
    variables = surroundings()
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "constraints.txt").write_text(f"torch=={torch}\n", "utf-8")
    for command in commands(name, torch, python):
        if subprocess.run(command, cwd=ROOT, env=variables).returncode:
            raise EnvironmentsError(f"{name}: this failed (see above): {' '.join(command)}")
    versions = installed(name, variables)
    if name == "lowest" and (wrong := wrong_bounds(versions)):
        raise EnvironmentsError("the lower bounds are not what gets installed:\n" + "\n".join(wrong))
    return versions


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="lowest|highest", help="which to run (default: both)")
    parser.add_argument("--torch", help="version of torch in both (default: the one of this Python)")
    parser.add_argument("--python", default=sys.executable, help="the Python to build them from")
    parser.add_argument("--only-make", action="store_true", help="make the environments and run no test")
    argv = list(sys.argv[1:] if argv is None else argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:cut])
    names = args.names or list(RESOLUTION)
    if unknown := set(names) - set(RESOLUTION):
        parser.error(f"there is no environment {', '.join(sorted(unknown))}: choose from {', '.join(RESOLUTION)}")
    results = {}
    try:
        for name in names:
            print(f"== {name}: installing", flush=True)
            versions = make(name, args.torch or torch_version(), args.python)
            print("   " + ", ".join(f"{package} {versions.get(package)}" for package in requirements()), flush=True)
            if args.only_make:
                continue
            test = [str(FOLDER / name / "bin" / "python"), "-m", "pytest", "-p", "no:cacheprovider", *argv[cut + 1 :]]
            variables = {key: value for key, value in os.environ.items() if key not in {"VIRTUAL_ENV", "PYTHONPATH"}}
            results[name] = subprocess.run(test, cwd=ROOT, env=variables).returncode
    except EnvironmentsError as error:
        print(error, file=sys.stderr)
        return 2
    for name, status in results.items():
        print(f"== {name}: {'passed' if status == 0 else f'failed, pytest ended with {status}'}")
    return int(any(results.values()))


if __name__ == "__main__":
    sys.exit(main())
