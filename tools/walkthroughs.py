"""Keep the line-by-line part of annotated_trainers/*.md true to TRL's source.

    python tools/walkthroughs.py sync [--check] [PAGE ...]     write (or check) the links and tables made from the directives
    python tools/walkthroughs.py coverage [--lines PAGE]       how much of the covered methods is shown; which lines are missing

A page names TRL's lines in HTML comments: `covers`, `excerpt` and `left-out`; CONTRIBUTING.md shows how to write them.
tools/stage.py calls `render` to put the true lines beside the notes on the site. tools/drift.py says what another release
does to them.
"""

import argparse
import dataclasses
import difflib
import html
import re
import sys
import textwrap
from pathlib import Path

from trl_source import REPOSITORY, Block, Source, SourceError

PAGES = REPOSITORY / "annotated_trainers"
MOST_CODE_LINES = 22  # of one excerpt
KEYS = {"excerpt": {"from", "to", "after", "before"}, "left-out": {"from", "to", "after", "before", "reason"}}
TABLES = ("left-out-table", "coverage-table")
MARK = re.compile(r"<!--\s*(/?)\s*(left-out-table|coverage-table|excerpt|left-out|covers)\b")
CANONICAL = re.compile(r"<!-- (?:(?:excerpt|left-out|covers):|/excerpt -->$|/?(?:left-out|coverage)-table -->$)")
FENCE = re.compile(r"[ >]*(?:[-*+] +|\d+[.)] +)?(`{3,}(?=[^`]*$)|~{3,})(.*)")  # also in a list or a quote
HEADING = re.compile(r"(#+) +(.+?)\s*$")
LINK = re.compile(r"\[`[^`]+`, lines? [\d-]+\]\(https://github\.com/huggingface/trl/blob/")


class PageError(ValueError):
    """All that is wrong with the directives of one or several pages, one problem after the other."""


@dataclasses.dataclass
class Quote:
    """An excerpt or a left-out directive."""

    kind: str
    symbol: str
    line: int  # of the directive on the page, from 1
    end: int  # index of the first page line after the comment
    anchors: dict[str, str]
    close: int = 0  # index of the page line with the end mark of an excerpt
    notes: str = ""
    block: Block | None = None

    def select(self, source: Source, symbol: str | None = None) -> Block:
        keys = {key: self.anchors.get(key) for key in ("to", "after", "before")}
        return source.select(symbol or self.symbol, self.anchors.get("from"), **keys)

    @property
    def reread(self) -> str:
        if self.kind == "left-out":
            return f'the reason of this left-out: "{self.anchors.get("reason", "")}"'
        return f'the notes under this excerpt: "{textwrap.shorten(self.notes, 100, placeholder=" ...")}"'


@dataclasses.dataclass
class Row:
    """What became of a covered symbol's code lines, as (file, line number)."""

    block: Block | None  # None: all symbols of the page together
    code: set[tuple[str, int]]
    shown: set[tuple[str, int]]
    left: set[tuple[str, int]]

    @property
    def unaccounted(self) -> set[tuple[str, int]]:
        return self.code - self.shown - self.left

    @property
    def share(self) -> float:
        return len(self.shown) / len(self.code) if self.code else 0.0


class Page:
    """A page's directives, resolved against a release; `problems` holds everything that is wrong with them."""

    def __init__(self, text: str, name: str, source: Source):
        self.name = name
        self.lines = text.split("\n")
        self.source = source
        self.quotes: list[Quote] = []
        self.covers: dict[str, int] = {}  # symbol -> line on the page
        self.tables: dict[str, tuple[int, int]] = {}  # name -> indices of its two marks
        self.hidden: set[int] = set()  # indices of page lines that belong to directives
        self.headings: list[tuple[int, str]] = []  # line on the page, text
        self.problems: list[str] = []
        self._parse()
        self._resolve()

    def problem(self, line: int, text: str) -> None:
        self.problems.append(f"{self.name}:{line}: {text}")

    def _parse(self) -> None:
        fence, fence_line, opened, index = "", 0, None, 0
        while index < len(self.lines):
            line, number, start = self.lines[index], index + 1, index
            index += 1
            if mark := FENCE.match(line):
                if not fence:
                    fence, fence_line = mark[1], number
                elif mark[1].startswith(fence) and not mark[2].strip():
                    fence = ""
            elif not fence and (heading := HEADING.match(line)):
                self.headings.append((number, heading[2]))
            mark = None if fence else MARK.search(line)
            if not mark:
                continue
            if not CANONICAL.match(line.rstrip()):
                self.problem(number, f"`{line.strip()}` is not how a directive begins: see CONTRIBUTING.md")
                continue
            while "-->" not in self.lines[index - 1] and index < len(self.lines):
                index += 1
            body, closed, rest = "\n".join(self.lines[start:index]).partition("-->")
            if not closed or rest.strip() or "<!--" in body[4:]:
                self.problem(number, "the comment is not closed by `-->` at the end of a line")
                index = start + 1
                continue
            self.hidden.update(range(start, index))
            body, kind = body[mark.end() :].removeprefix(":").strip(), mark[2]
            if kind in TABLES:
                if mark[1] and kind in self.tables and not self.tables[kind][1]:
                    self.tables[kind] = (self.tables[kind][0], start)
                elif mark[1] or kind in self.tables:
                    self.problem(number, f"`{line.strip()}` has no partner, or stands on the page twice")
                else:
                    self.tables[kind] = (start, 0)
            elif kind == "covers":
                for symbol in body.split():
                    if symbol in self.covers:
                        self.problem(number, f"`{symbol}` is covered twice")
                    self.covers[symbol] = number
            elif mark[1]:
                if opened is None:
                    self.problem(number, "the end of an excerpt that was not opened")
                else:
                    opened.close, opened.notes = start, self._notes(opened.end, start)
                    opened = None
            else:
                quote = self._quote(kind, body, number, index)
                self.quotes.append(quote)
                if kind == "excerpt":
                    if opened is not None:
                        self.problem(opened.line, f"this excerpt is not closed before the next one, line {number}")
                    opened = quote
        if fence:
            self.problem(fence_line, "this code fence is not closed, so no directive after it is read")
        if opened is not None:
            self.problem(opened.line, "this excerpt is not closed: `<!-- /excerpt -->` is missing")
        for name, (start, end) in self.tables.items():
            if not end:
                self.problem(start + 1, f"`<!-- /{name} -->` is missing")

    def _notes(self, start: int, end: int) -> str:
        start += bool(LINK.match(self.lines[start]))
        return re.sub(r"<!--.*?-->", "", "\n".join(self.lines[start:end]), flags=re.DOTALL).strip()

    def _quote(self, kind: str, body: str, number: int, end: int) -> Quote:
        symbol, *rest = [line.strip() for line in body.split("\n")]
        quote = Quote(kind, symbol, number, end, {})
        for line in filter(None, rest):
            key, _, value = (part.strip() for part in line.partition(":"))
            if key not in KEYS[kind]:
                self.problem(number, f"unknown key in `{line}`: {kind} takes {', '.join(sorted(KEYS[kind]))}")
            elif key in quote.anchors or not value:
                self.problem(number, f"`{key}:` stands twice" if value else f"`{key}:` is empty")
            else:
                quote.anchors[key] = value
        required = "from" if kind == "excerpt" or set(quote.anchors) - {"reason"} else None
        for key in filter(None, (required, "reason" if kind == "left-out" else None)):
            if key not in quote.anchors:
                self.problem(number, f"{kind} of `{symbol}` has no `{key}:`")
        return quote

    def _resolve(self) -> None:
        for quote in self.quotes:
            what = f"{quote.kind} of `{quote.symbol}`"
            try:
                quote.block = quote.select(self.source)
            except SourceError as error:
                self.problem(quote.line, f"{what}: {error}.\n    Reread {quote.reread}")
                continue
            if quote.kind == "excerpt" and len(quote.block.code) > MOST_CODE_LINES:
                self.problem(
                    quote.line,
                    f"{what} shows {len(quote.block.code)} code lines, more than {MOST_CODE_LINES}: split it",
                )
            if quote.kind == "excerpt" and quote.close and not quote.notes:
                self.problem(quote.line, f"{what} has no note: every excerpt is explained")
        self.covered: dict[str, Block] = {}
        for symbol, line in self.covers.items():
            try:
                self.covered[symbol] = self.source.symbol(symbol)
            except SourceError as error:
                self.problem(line, f"covers: {error}.\n    Reread every note on this symbol")
        code = set().union(*map(places, self.covered.values()))
        for quote in self.quotes:
            if quote.kind != "left-out" or quote.block is None:
                continue
            if not places(quote.block) & code:
                self.problem(
                    quote.line, f"left-out of `{quote.symbol}` lies in no covered symbol: cover it or drop this"
                )
            for other in self.quotes:
                if other.kind == "excerpt" and other.block and (both := places(other.block) & places(quote.block)):
                    numbers = spans({line for _, line in both})
                    self.problem(
                        quote.line, f"left out here and shown by the excerpt in line {other.line}: TRL's {numbers}"
                    )
        for name, needed in zip(TABLES, (any(q.kind == "left-out" for q in self.quotes), self.covers), strict=True):
            if needed and name not in self.tables:
                self.problem(1, f"no place for a table: add `<!-- {name} -->` and `<!-- /{name} -->`")
        if self.quotes and not self.covers:
            self.problem(self.quotes[0].line, "the page quotes TRL and covers nothing: add `<!-- covers: ... -->`")

    @property
    def title(self) -> str:
        return self.headings[0][1] if self.headings else self.name

    def section(self, line: int) -> str:
        """The text of the heading under which a line of the page stands; "" above the first one."""
        return next((text for number, text in reversed(self.headings) if number <= line), "")

    def rows(self) -> list[Row]:
        """One row per covered symbol, and at the end one for all of them, where a line counts once."""
        shown = set().union(*(places(q.block) for q in self.quotes if q.kind == "excerpt" and q.block))
        left = set().union(*(places(q.block) for q in self.quotes if q.kind == "left-out" and q.block))
        rows = [Row(b, places(b), shown & places(b), left & places(b)) for b in self.covered.values()]
        total = [set().union(*(getattr(row, name) for row in rows)) for name in ("code", "shown", "left")]
        return [*rows, Row(None, *total)]

    def synced(self) -> str:
        """The page's text with the links and tables as this release has them. Call it when there are no problems."""
        edits = []
        for quote in self.quotes:
            if quote.kind == "excerpt":
                after = self.lines[quote.end]
                old = 1 if LINK.match(after) else 0
                edits.append((quote.end, quote.end + old, [self.link_line(quote)] + ([] if old or not after else [""])))
        for name, make in zip(TABLES, (self.left_out_table, self.coverage_table), strict=True):
            if name in self.tables:
                start, end = self.tables[name]
                edits.append((start + 1, end, ["", *make(), ""]))
        lines = list(self.lines)
        for start, end, new in sorted(edits, reverse=True):
            lines[start:end] = new
        return "\n".join(lines)

    def link_line(self, quote: Quote) -> str:
        block = quote.block
        label = f"[`{block.name}`, {spans(range(block.first, block.last + 1))}]({self.source.link(block)})"
        start, to = quote.anchors["from"], quote.anchors.get("to")
        return f"{label}: " + (f"from {code_span(start)} to {code_span(to)}" if to else code_span(start))

    def link(self, block: Block) -> str:
        return f"[{spans(range(block.first, block.last + 1)).split()[1]}]({self.source.link(block)})"

    def left_out_table(self) -> list[str]:
        groups: dict[tuple[str, str], list[Block]] = {}
        for quote in self.quotes:
            if quote.kind == "left-out":
                groups.setdefault((quote.block.name, quote.anchors["reason"]), []).append(quote.block)
        table = ["| Left out of | Lines | Code lines | Why |", "| --- | --- | ---: | --- |"]
        for (name, reason), blocks in groups.items():
            blocks.sort(key=lambda block: block.first)
            links = ", ".join(map(self.link, blocks))
            count = len(set().union(*map(places, blocks)))
            table.append(f"| `{name}` | {links} | {count} | {reason.replace('|', chr(92) + '|')} |")
        return table if groups else ["Nothing is left out."]

    def coverage_table(self) -> list[str]:
        table = ["| Covered | Lines | Code lines | Shown | Left out |", "| --- | --- | ---: | ---: | ---: |"]
        for row in self.rows():
            if b := row.block:
                table.append(f"| `{b.name}` | {self.link(b)} | {len(row.code)} | {len(row.shown)} | {len(row.left)} |")
            else:
                shown = f"{len(row.shown)} ({row.share:.1%})"
                table.append(f"| **together** | | {len(row.code)} | {shown} | {len(row.left)} |")
        return table


def places(block: Block) -> set[tuple[str, int]]:
    return {(block.path, number) for number in block.code}


def spans(numbers) -> str:
    """Line numbers in words: "line 4", "lines 4-6, 9"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ", ".join(f"{first}-{last}" if last > first else f"{first}" for first, last in runs)
    return ("lines " if len(runs) > 1 or any(first < last for first, last in runs) else "line ") + text


def code_span(text: str) -> str:
    ticks = "``" if "`" in text else "`"
    pad = " " if "`" in text else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def load(folder: Path, source: Source, names: list[str] | None = None) -> list[Page]:
    """All pages of a folder, or the named ones. Raises PageError with every problem of every page."""
    chosen = sorted(folder.glob("*.md"))
    if names:
        wanted = {Path(name).stem for name in names}
        if missing := wanted - {path.stem for path in chosen}:
            raise PageError(f"no such page in {folder.name}: {', '.join(sorted(missing))}")
        chosen = [path for path in chosen if path.stem in wanted]
    pages = [Page(path.read_text("utf-8"), f"{folder.name}/{path.name}", source) for path in chosen]
    if problems := [problem for page in pages for problem in page.problems]:
        raise PageError("\n".join(problems))
    return pages


def render(markdown_text: str, page: str, source: Source | None = None) -> str:
    """Markdown for the site: each excerpt becomes a two-column block with TRL's true lines and their real numbers.

    The wrappers need `md_in_html`, the lines `pymdownx.superfences`. Raises PageError with all problems of the page.
    """
    if not MARK.search(markdown_text):
        return markdown_text
    source = source or Source.installed()
    parsed = Page(markdown_text, page, source)
    if not parsed.problems:
        parsed = Page(parsed.synced(), page, source)
    if parsed.problems:
        raise PageError("\n".join(parsed.problems))
    lines: list[str | None] = [None if i in parsed.hidden else line for i, line in enumerate(parsed.lines)]
    for quote in parsed.quotes:
        if quote.kind == "excerpt":
            lines[quote.end] = excerpt_block(quote.block, source)
            lines[quote.close] = "\n</div>\n</div>\n"
    return "\n".join(line for line in lines if line is not None)


def excerpt_block(block: Block, source: Source) -> str:
    code = textwrap.dedent("\n".join(block.lines))
    fence = "`" * max([3, *(len(ticks) + 1 for ticks in re.findall("`+", code))])
    where = f"{spans(range(block.first, block.last + 1))} of {block.path}"
    kind = "excerpt drawing" if set(code) & set("▲▼") else "excerpt"  # a figure in a comment: its lines must not wrap
    return f"""<div class="{kind}" markdown="1">
<div class="excerpt__code" markdown="1">

{fence}python title="{html.escape(block.name)}" linenums="{block.first}"
{code}
{fence}

<p class="excerpt__source"><a href="{source.link(block)}">{where}</a></p>

</div>
<div class="excerpt__notes" markdown="1">
"""


def sync(args: argparse.Namespace, source: Source) -> int:
    stale = []
    for page in load(args.pages, source, args.names):
        text, path = "\n".join(page.lines), args.pages / Path(page.name).name
        if (new := page.synced()) == text:
            continue
        stale.append(page.name)
        if args.check:
            print(
                *difflib.unified_diff(text.split("\n"), new.split("\n"), page.name, "synced", n=0, lineterm=""),
                sep="\n",
            )
        else:
            path.write_text(new, "utf-8")
    if stale:
        print("not in step with TRL's source, run `make sync`:" if args.check else "wrote:", *stale)
    return 1 if stale and args.check else 0


def coverage(args: argparse.Namespace, source: Source) -> int:
    wanted = [args.lines] if args.lines else []
    pages = [page for page in load(args.pages, source, wanted) if page.covers]
    print(f"{'page':<28} {'symbols':>7} {'code':>6} {'shown':>6} {'left out':>8} {'missing':>7} {'share':>6}")
    for page in pages:
        *rows, total = page.rows()
        numbers = f"{len(total.code):>6} {len(total.shown):>6} {len(total.left):>8} {len(total.unaccounted):>7}"
        print(f"{page.name:<28} {len(rows):>7} {numbers} {total.share:>6.1%}")
        for row in rows if args.lines else []:
            if missing := {line for _, line in row.unaccounted}:
                print(f"\n{row.block.symbol}: {len(missing)} of {len(row.code)} code lines")
                print(*(f"{n:>6}  {row.block.lines[n - row.block.first]}" for n in sorted(missing)), sep="\n")
    return 1 if any(page.rows()[-1].unaccounted for page in pages) else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=Path, default=PAGES, help="folder of the walkthroughs")
    parser.add_argument("--trl", help="folder of an unpacked TRL to read instead of the installed one")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("sync", help="write the links and tables made from the directives")
    command.add_argument("names", nargs="*", metavar="PAGE", help="only these pages")
    command.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is not in step")
    command = commands.add_parser(
        "coverage", help="share of the covered code lines that is shown; exit 1 if lines are missing"
    )
    command.add_argument("--lines", metavar="PAGE", help="print the lines of this page that are missing")
    args = parser.parse_args(argv)
    try:
        source = Source.at(args.trl) if args.trl else Source.installed()
        return {"sync": sync, "coverage": coverage}[args.command](args, source)
    except (PageError, SourceError) as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
