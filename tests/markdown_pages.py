"""Reads the Markdown of this repository for the tests: fences, directives, formulas, symbols, and running a page.

`python tests/markdown_pages.py` prints, page by page, how many fences of each language and how many formulas there are.
`python tests/markdown_pages.py --write PAGE` runs a page and puts what its blocks print into the page.

Nothing here imports torch or TRL; `run_page` executes what a page holds, so a page that imports torch does that itself.
"""

import argparse
import contextlib
import io
import re
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parent.parent
GUIDES = ROOT / "reference_guides"

NOT_RUN = re.compile(r"<!--\s*not run:(.*?)-->\s*$", re.DOTALL)
OUTPUT_OF = re.compile(r"<!--\s*output:(.*?)-->\s*$", re.DOTALL)
FORMULA = re.compile(r"<!--\s*formula:(.*?)-->\s*$", re.DOTALL)
FORMULA_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
# A line that opens or closes a fence, behind any mix of quote marks, list marks and white space.
FENCE_LINE = re.compile(r"^(?:[ \t]|>|[-*+](?=[ \t])|\d{1,9}[.)](?=[ \t]))*(?P<mark>`{3,}|~{3,})(?P<info>.*)$")


class PageError(AssertionError):
    """A page breaks a convention of this repository; the message names page:line and the remedy."""


@dataclass
class Fence:
    path: Path
    line: int  # 1-based, the line of the opening mark
    lang: str
    text: str
    comment: str  # the HTML comment directly before, "" if there is none
    after: "Fence | None" = None  # the fence that stands directly before this one, with nothing between

    @property
    def where(self) -> str:
        return f"{shown(self.path)}:{self.line}"

    @property
    def excuse(self) -> str | None:
        """The reason of `<!-- not run: reason -->`; None if the fence is not excused, "" if the reason is missing."""
        match = NOT_RUN.search(self.comment)
        return match and match.group(1).strip()


@dataclass
class Formula:
    name: str  # like "dpo-sigmoid"
    fence: Fence  # its math fence
    block: Fence | None = None  # the python fence whose function computes it
    closed: bool = False  # a python fence has followed

    @property
    def latex(self) -> str:
        return self.fence.text.strip()

    @property
    def function(self) -> str:
        return self.name.replace("-", "_")


@dataclass
class Run:
    """What running a page left behind."""

    namespace: dict = field(default_factory=dict)
    blocks: list[Fence] = field(default_factory=list)
    printed: dict[int, str] = field(default_factory=dict)  # line of the python fence -> what it printed


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def markdown_files() -> list[Path]:
    """Every *.md that git tracks or would track, deleted ones left out."""
    command = ["git", "ls-files", "-co", "--exclude-standard", "-z", "--", "*.md"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return sorted(ROOT / name for name in names if name and (ROOT / name).is_file())


def tokens(text: str) -> list:
    return MarkdownIt("commonmark").enable("table").parse(text)


def language(info: str) -> str:
    """`python title="x"`, `{.python linenums=1}` and `python` are all python."""
    words = info.strip().strip("{}").split()
    return words[0].lstrip(".").lower() if words else ""


@cache
def fences(path: Path) -> list[Fence]:
    """Every fence of a page as the Markdown parser sees it, also those inside lists and quotes, in order."""
    found, before, fence_before = [], "", None
    for token in tokens(path.read_text("utf-8")):
        if token.type == "fence":
            fence = Fence(path, token.map[0] + 1, language(token.info), token.content, before, fence_before)
            found.append(fence)
            before, fence_before = "", fence
        elif token.type == "html_block":
            before, fence_before = token.content.strip(), None
        else:
            before, fence_before = "", None
    return found


def indented_blocks(path: Path) -> list[int]:
    """Lines of code blocks made by indentation alone: no fence, no language, so no test would see them."""
    return [token.map[0] + 1 for token in tokens(path.read_text("utf-8")) if token.type == "code_block"]


def fence_openings(text: str) -> list[int]:
    """Lines (1-based) that open a fence, read from the raw text without the Markdown parser."""
    opened, mark = [], None
    for number, line in enumerate(text.splitlines(), 1):
        match = FENCE_LINE.match(line)
        if not match:
            continue
        found, info = match["mark"], match["info"]
        if mark is None:
            if found[0] == "`" and "`" in info:
                continue  # ```inline code``` in a paragraph
            opened.append(number)
            mark = found
        elif found[0] == mark[0] and len(found) >= len(mark) and not info.strip():
            mark = None
    return opened


def named_formulas(path: Path) -> list[Formula]:
    """The math fences of a page, each with its name and, where the next python fence defines its function, with that block.

    Raises PageError where a math fence has no name or a name is used twice; excused fences are left out.
    """
    found: list[Formula] = []
    for fence in fences(path):
        if fence.lang == "math" and fence.excuse is None:
            match = FORMULA.search(fence.comment)
            name = match.group(1).strip() if match else ""
            if not FORMULA_NAME.fullmatch(name):
                raise PageError(f"{fence.where}: put `<!-- formula: a-name -->` directly before this math fence")
            if name in [formula.name for formula in found]:
                raise PageError(f"{fence.where}: the formula name {name!r} is used twice on this page")
            found.append(Formula(name, fence))
        elif fence.lang == "python" and found and found[-1].block is None and not found[-1].closed:
            found[-1].closed = True  # only the first block after a formula can be its own
            if f"def {found[-1].function}(" in fence.text:
                found[-1].block = fence
    return found


def formulas(path: Path) -> list[Formula]:
    """The formulas of a guide: named, and each followed by the block that computes it. Raises PageError otherwise."""
    found = named_formulas(path)
    for formula in found:
        if formula.block is None:
            raise PageError(
                f"{formula.fence.where}: the first python fence after formula {formula.name!r} must define "
                f"`{formula.function}`"
            )
    return found


def run_page(path: Path) -> Run:
    """Runs the python fences of a page in order in one namespace; excused fences are left out.

    Line numbers in a traceback are those of the page. Raises PageError naming page:line of the fence that failed.
    """
    run = Run(namespace={"__name__": path.stem})
    for fence in fences(path):
        if fence.lang != "python" or fence.excuse is not None:
            continue
        printed = io.StringIO()
        try:
            code = compile("\n" * fence.line + fence.text, str(path), "exec")
            with contextlib.redirect_stdout(printed):
                exec(code, run.namespace)
        except Exception as error:
            line = next((n for n in _lines_in(error, str(path))), fence.line)
            raise PageError(f"{shown(path)}:{line}: {type(error).__name__}: {error}") from error
        run.blocks.append(fence)
        run.printed[fence.line] = printed.getvalue()
    return run


@cache
def ran(path: Path) -> Run:
    """The run of a page, made once in a process: for tests that only look at what it left behind."""
    return run_page(path)


def _lines_in(error: BaseException, filename: str):
    """Line numbers of an error inside a page, innermost first."""
    if isinstance(error, SyntaxError):
        yield error.lineno
    trace, numbers = error.__traceback__, []
    while trace:
        if trace.tb_frame.f_code.co_filename == filename:
            numbers.append(trace.tb_lineno)
        trace = trace.tb_next
    yield from reversed(numbers)


def inline_math(path: Path) -> list[tuple[int, str]]:
    """(line, LaTeX) of every `$...$` of a page. Raises PageError where a dollar sign has no partner."""
    found = []
    for token in tokens(path.read_text("utf-8")):
        if token.type != "inline":
            continue
        text = re.sub(r"(`+)(?:(?!\1).)+\1", "", token.content, flags=re.DOTALL)
        pieces = re.split(r"(?<!\\)\$", text)
        if len(pieces) % 2 == 0:
            line = token.map[0] + 1 if token.map else "?"
            raise PageError(f"{shown(path)}:{line}: a `$` has no partner here (a `|` in a table cell splits a formula)")
        found += [(token.map[0] + 1 if token.map else 0, piece) for piece in pieces[1::2]]
    return found


# LaTeX commands that are layout, relations or operators; every other command is taken to be a symbol.
SYNTAX = re.compile(
    r"\\(t?frac|left|right|[bB]igg?[lr]?|begin|end|q?quad|log|exp|max|min|sum|prod|int|sqrt|partial|nabla|cdots?|[lc]?dots"
    r"|times|mid|[lr]?[vV]ert|[lg][et]|neq?|approx|equiv|propto|in|sim|succ|prec|to|gets|leftarrow|[rR]ightarrow|mapsto"
    r"|infty|text)"
)
STYLES = {r"\mathrm", r"\mathcal", r"\mathbb", r"\mathbf", r"\hat", r"\bar", r"\tilde"}
LATEX_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|[^\s]")


def symbols(latex: str) -> set[str]:
    r"""The symbols of a formula, each with its subscript: `\pi_\theta(y_t \mid x)` has `\pi_{\theta}`, `y_{t}`, `x`.

    Layout, numbers and relations are no symbols; what stands under a sum is read as a formula of its own.
    """
    latex = re.sub(r"\\(begin|end)\{\w+\}|\\text\{[^}]*\}", " ", latex)
    return _symbols(LATEX_TOKEN.findall(latex))


def _group(parts: list[str], start: int) -> tuple[list[str], int]:
    """The parts of the group (or single part) that starts at `start`, and where to go on."""
    if start >= len(parts) or parts[start] != "{":
        return parts[start : start + 1], start + 1
    depth = 0
    for end in range(start, len(parts)):
        depth += (parts[end] == "{") - (parts[end] == "}")
        if depth == 0:
            return parts[start + 1 : end], end + 1
    raise PageError(f"unbalanced braces in {''.join(parts)!r}")


def _joined(parts: list[str]) -> str:
    r"""One spelling for one subscript: no white space but after a command, so `\lt` and `t` give `\lt t`."""
    text = "".join(part + " " if re.fullmatch(r"\\[A-Za-z]+", part) else part for part in parts)
    return re.sub(r" (?![A-Za-z])", "", text)


def _symbols(parts: list[str]) -> set[str]:
    found, i = set(), 0
    while i < len(parts):
        part, i = parts[i], i + 1
        if part in STYLES:
            inner, i = _group(parts, i)
            name = f"{part}{{{_joined(inner)}}}"
        elif (part.startswith("\\") and part[1].isalpha() and not SYNTAX.fullmatch(part)) or part.isalpha():
            name = part
        else:
            continue
        while i < len(parts) and parts[i] in {"_", "'", "^"}:
            if parts[i] == "'":
                name, i = name + "'", i + 1
                continue
            inner, end = _group(parts, i + 1)
            if parts[i] == "_":
                name = f"{name}_{{{_joined(inner)}}}"
            elif inner in (["*"], [r"\ast"]):
                name += "^{*}"
            else:
                found |= _symbols(inner)  # an exponent
            i = end
        found.add(name)
    return found


def refresh(path: Path) -> bool:
    """Writes what the python fences of a page print into the `text` fences directly below them; True if that changed it.

    A fence inside a list or a quote is left alone. The page is written only after the whole of it has run.
    """
    run, lines = run_page(path), path.read_text("utf-8").splitlines(keepends=True)
    for fence in reversed(fences(path)):
        if quotes_block_above(fence) and lines[fence.line - 1].startswith("```"):
            start, end = fence.line, fence.line + len(fence.text.splitlines())
            lines[start:end] = run.printed[fence.after.line].splitlines(keepends=True)
    text = "".join(lines)
    changed = text != path.read_text("utf-8")
    if changed:
        path.write_text(text, "utf-8")
        fences.cache_clear()
    return changed


def quotes_block_above(fence: Fence) -> bool:
    """True for a `text` fence right below a python fence that runs: it quotes what that one prints."""
    above = fence.after
    return fence.lang == "text" and above is not None and above.lang == "python" and above.excuse is None


def main() -> None:
    parser = argparse.ArgumentParser(description="Count the fences and formulas of every Markdown page.")
    parser.add_argument("--write", metavar="PAGE", type=Path, help="run PAGE and refresh the output that it quotes")
    page = parser.parse_args().write
    if page:
        if not page.is_file():
            parser.error(f"there is no page {page}: give the path of a Markdown file")
        print(f"{page}: {'rewritten' if refresh(page.resolve()) else 'already up to date'}")
        return
    for path in markdown_files():
        counts = Counter(fence.lang or "(none)" for fence in fences(path))
        line = ", ".join(f"{number} {lang}" for lang, number in sorted(counts.items())) or "no fences"
        named = f"; {len(formulas(path))} formulas" if path.parent == GUIDES else ""
        print(f"{shown(path)}: {line}{named}")


if __name__ == "__main__":
    main()
