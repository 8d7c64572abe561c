"""Copy what all example scripts share from dpo.py into the others.

    python tools/scripts.py [--check]    write it, or say where it differs and exit 1

The shared part is everything below the line MARK: the run itself, which a script's reader has read once for all fifteen.
Change it in dpo.py.
"""

import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1] / "annotated_examples"
MARK = "# From here on the fifteen scripts are the same to the letter.\n"


def main() -> int:
    own, mark, shared = (EXAMPLES / "dpo.py").read_text("utf-8").partition(MARK)
    differing = []
    for path in sorted(EXAMPLES.glob("*.py")):
        own, mark, rest = path.read_text("utf-8").partition(MARK)
        if not mark:
            raise SystemExit(f"{path.name} has no line {MARK.strip()!r}: everything below it comes from dpo.py")
        if rest != shared:
            differing.append(path.name)
            if "--check" not in sys.argv:
                path.write_text(own + MARK + shared, "utf-8")
    if differing:
        print(
            "the shared part is not that of dpo.py, run `make sync`:" if "--check" in sys.argv else "wrote:", *differing
        )
    return 1 if differing and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
