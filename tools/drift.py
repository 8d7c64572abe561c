"""What another release of TRL does to the walkthroughs: symbols gone, anchors broken, lines changed, moved or new.

    python tools/drift.py VERSION [--json FILE] [--markdown FILE] [--fail]   report it; VERSION may be a wheel or a folder
    python tools/drift.py --page [--check]      write (or check) annotated_trainers/newest_trl.md, for readers

Without VERSION it is `newest` in pyproject.toml, the only release that there is a page about. The page holds no line of
TRL: its directives name lines, and tools/stage.py calls `render` to put the differences there, read from both releases.
"""

import argparse
import dataclasses
import difflib
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import textwrap
import zipfile
from pathlib import Path

from trl_source import REPOSITORY, AnchorError, Block, Source, SourceError, SymbolError, fold, newest_version
from walkthroughs import MOST_CODE_LINES, PAGES, Page, PageError, Quote, load, places, spans

NAME = "newest_trl.md"
LONG = 30  # lines of a difference; a longer one is folded away on the site
SYMBOL, LINES = r"trl\.[\w.]+", r"\d+(?:-\d+)?"
MARK = re.compile(r"<!--\s*drift\b")
RELEASES = re.compile(r"<!-- drift: (\d\S*) -> (\d\S*) -->")
DIRECTIVE = re.compile(
    rf"<!-- drift: (?P<symbol>{SYMBOL})(?: (?P<old>{LINES}))? ->(?: (?P<now>{SYMBOL}))?(?: (?P<new>{LINES}|nothing)) -->"
)
# What `compare` finds -> the words for it on the page, in the order of the page.
KINDS = {"gone": "gone", "broken": "anchor broken", "changed": "changed", "gained": "new lines", "moved": "moved"}


class Unavailable(SourceError):
    """The release cannot be had here: pip reaches no index with it. The repository may be in order all the same."""


# ------------------------------------------------------------------------------------------------------ the other release


def obtain(target: str) -> Source:
    """The release named by a folder, a wheel or a version; a version is fetched with pip and kept in .cache/.

    Raises Unavailable when pip reaches no index, SourceError when the target is none or the index has no such version.
    """
    path = Path(target)
    if path.is_dir():
        return Source.at(path)
    if not path.is_file() and not re.fullmatch(r"\d+(\.\w+)+", target):
        raise SourceError(f"`{target}` is neither a folder, nor a wheel, nor a version like 1.16.0")
    kept = REPOSITORY / ".cache" / (path.stem if path.is_file() else f"trl-{target}")
    if not kept.is_dir():
        kept.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
            wheel = path if path.is_file() else download(target, Path(scratch))
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(Path(scratch) / "files")
            try:
                (Path(scratch) / "files").rename(kept)
            except OSError:  # another process was faster
                if not kept.is_dir():
                    raise
    return Source.at(kept)


def download(version: str, folder: Path) -> Path:
    """The wheel of a version, fetched by pip into the folder."""
    # An environment made by uv has no pip of its own; any other will do, as nothing is installed.
    pip = [sys.executable, "-m", "pip"] if importlib.util.find_spec("pip") else ["pip"]
    options = ["--no-deps", "--only-binary", ":all:", "--ignore-requires-python", "--quiet", "--dest", str(folder)]
    try:
        done = subprocess.run([*pip, "download", *options, f"trl=={version}"], capture_output=True, text=True)
    except FileNotFoundError:
        raise Unavailable(f"TRL {version} cannot be had: there is no pip to download it") from None
    if done.returncode:
        said = f"pip cannot download TRL {version}: {done.stderr.strip()[-400:]}"
        # pip lists what the index has; an index out of reach has "none" for it.
        raise SourceError(said) if re.search(r"\(from versions: [^n]", done.stderr) else Unavailable(said)
    return next(folder.glob("trl-*.whl"))


# -------------------------------------------------------------------------------------------------------- the comparison


def compare(page: Page, new: Source) -> dict[str, list[dict]]:
    """What a page owes another release: symbols gone, anchors broken, excerpts changed or moved, lines gained."""
    found: dict[str, list[dict]] = {key: [] for key in ("gone", "broken", "changed", "moved", "gained")}
    now: dict[str, str | None] = {}
    for symbol in dict.fromkeys([*page.covers, *(quote.symbol for quote in page.quotes)]):
        try:
            new.symbol(symbol)
            now[symbol] = symbol
        except SymbolError as error:
            name = symbol.split(".")[-1]
            # A namesake that the old release has too is another function, and no successor.
            others = [
                other for other in new.elsewhere(symbol) if other.split(".")[-1] != name or not has(page.source, other)
            ]
            same = [other for other in others if other.split(".")[-1] == name]
            now[symbol] = same[0] if len(same) == 1 else None
            used = [q.line for q in page.quotes if q.symbol == symbol]
            entry = {"symbol": symbol, "now": others, "at": now[symbol], "page_lines": used, "message": str(error)}
            found["gone"].append(entry)
    explained: set[tuple[str, int]] = set()
    for quote in page.quotes:
        if not now[quote.symbol]:
            continue
        entry = {"kind": quote.kind, "symbol": quote.symbol, "page_line": quote.line}
        entry |= {"now": now[quote.symbol], "old": [quote.block.first, quote.block.last]}
        place = place_of(quote.block, page.source.symbol(quote.symbol), new.symbol(now[quote.symbol]))
        try:
            block = quote.select(new, now[quote.symbol])
            too_long = quote.kind == "excerpt" and len(block.code) > MOST_CODE_LINES
            if too_long and [block.first, block.last] != place:
                # One end has found another line with the same text: the lines between are not those of the notes.
                where = f"lines {block.first}-{block.last} of {block.path} (TRL {new.version})"
                message = f"the anchors enclose {len(block.code)} code lines, more than {MOST_CODE_LINES}: {where}"
                raise AnchorError(message, "both", len(block.code))
        except SourceError as error:
            why = {"key": error.key, "hits": error.hits} if isinstance(error, AnchorError) else {}
            entry |= {**why, "new": place, "message": str(error), "reread": quote.reread}
            found["broken"].append(entry)
            continue
        explained |= places(block)
        entry["new"] = [block.first, block.last]
        before, after = dedented(quote.block), dedented(block)
        if before != after:
            diff = list(difflib.unified_diff(before, after, n=1, lineterm=""))[2:]
            found["changed"].append({**entry, "reread": quote.reread, "diff": diff})
        elif quote.kind == "excerpt" and (block.first, block.path) != (quote.block.first, quote.block.path):
            found["moved"].append(entry)
    for symbol, old in page.covered.items():
        if not now[symbol]:
            continue
        block = new.symbol(now[symbol])
        numbers = sorted(n for n in fresh(old, block) & block.code if (block.path, n) not in explained)
        if numbers:
            lines = [[n, block.lines[n - block.first].rstrip()] for n in numbers]
            found["gained"].append({"symbol": symbol, "now": now[symbol], "lines": lines})
    return found


def has(source: Source, symbol: str) -> bool:
    try:
        source.symbol(symbol)
    except SymbolError:
        return False
    return True


def dedented(block: Block) -> list[str]:
    return textwrap.dedent("\n".join(block.lines)).split("\n")


def opcodes(before: list[str], after: list[str]) -> list[tuple[str, int, int, int, int]]:
    return difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes()


def fresh(old: Block, new: Block) -> set[int]:
    """Numbers of the lines of a symbol that it did not have before; code is compared with code, the rest line by line."""
    numbers = sorted(new.code)
    code = opcodes(*([fold(b.lines[n - b.first]) for n in sorted(b.code)] for b in (old, new)))
    every = opcodes(*([fold(line) for line in b.lines] for b in (old, new)))
    found = {n for tag, _, _, low, high in code if tag != "equal" for n in numbers[low:high]}
    return (
        found | {new.first + i for tag, _, _, low, high in every if tag != "equal" for i in range(low, high)} - new.code
    )


def place_of(block: Block, old: Block, new: Block) -> list[int] | None:
    """First and last line of what stands in the new symbol where the block stood in the old one; None for nothing."""
    start, stop = block.first - old.first, block.last - old.first + 1
    ends: list[int] = []
    for tag, low, high, new_low, new_high in opcodes(*([fold(line) for line in b.lines] for b in (old, new))):
        first, last = max(low, start), min(high, stop)
        if tag == "equal" and first < last:
            ends += [new_low + first - low, new_low + last - low]
        elif (tag == "insert" and start < low < stop) or (tag != "equal" and first < last):
            ends += [new_low, new_high]
    if not ends or min(ends) == max(ends):
        return None
    return [new.first + min(ends), new.first + max(ends) - 1]


def drift_report(old: str, new: str, pages: dict[str, dict[str, list[dict]]]) -> str:
    """The comparison as Markdown that reads well as plain text; it holds lines of TRL, so it is not committed."""
    out = [f"# From TRL {old} to {new}", "", "| Page | gone | broken | changed | moved | gained lines |"]
    out.append("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, found in pages.items():
        out.append(f"| {name} | " + " | ".join(str(count(found, key)) for key in found) + " |")
    for name, found in pages.items():
        if any(found.values()):
            out += ["", f"## {name}"]
        if found["gone"]:
            out += ["", "### Symbols that are gone", ""]
            out += [
                f"- {e['message']} (used in {spans(e['page_lines']) if e['page_lines'] else 'covers'})"
                for e in found["gone"]
            ]
        if found["broken"]:
            out += ["", "### Anchors that no longer hold", ""]
            for e in found["broken"]:
                where = f"About the same place: lines {e['new'][0]}-{e['new'][1]}. " if e["new"] else ""
                out.append(
                    f"- line {e['page_line']}, {e['kind']} of `{e['symbol']}`: {e['message']}. {where}Reread {e['reread']}"
                )
        if found["changed"]:
            out += ["", "### Lines that changed", ""]
            for e in found["changed"]:
                numbers = f"{e['old'][0]}-{e['old'][1]} -> {e['new'][0]}-{e['new'][1]}"
                out += [f"Line {e['page_line']}, {e['kind']} of `{e['symbol']}`, {numbers}. Reread {e['reread']}", ""]
                out += ["````diff", *e["diff"][:30], *(["..."] if len(e["diff"]) > 30 else []), "````", ""]
        if found["gained"]:
            out += ["", "### Covered lines that nobody explains", ""]
            for e in found["gained"]:
                out += [f"`{e['symbol']}`", "", "````text", *(f"{n:>5}  {text}" for n, text in e["lines"]), "````", ""]
        if found["moved"]:
            out += ["", "### Excerpts that only moved", ""]
            out += ["; ".join(f"`{e['symbol'].split('.')[-1]}` {e['old'][0]} -> {e['new'][0]}" for e in found["moved"])]
    return "\n".join(out) + "\n"


def count(found: dict[str, list[dict]], key: str) -> int:
    return sum(len(e["lines"]) for e in found["gained"]) if key == "gained" else len(found[key])


# ------------------------------------------------------------------------------------------------- the page, for readers


INTRODUCTION = """\
# What changes in TRL {new}

<!-- Written by tools/drift.py: do not edit it here. `make sync` writes it again. -->

<!-- drift: {old} -> {new} -->

The walkthroughs are about TRL {old}: every line that they quote is a line of that release. This page says what
TRL {new} does to those lines. Keep it open beside a walkthrough when the newer release is the one that you have.

No person wrote the entries. A script looks in both releases for every place that a walkthrough quotes, by the method
and the text of its first and last line, and compares what it finds:

```bash
python tools/drift.py --page
```

On the site each entry shows the difference, read from the two releases while the site is built. Elsewhere follow the
links: in each pair the first leads to the lines of {old}, the second to those of {new}. Whether a note still holds is
for you to judge from the difference. Where a walkthrough itself names {new}, a person has looked.

| word | what it means when you have {new} |
| --- | --- |
| gone | A method or class is not there under its name. What the walkthrough says about it holds for {old} only. |
| anchor broken | The text by which the walkthrough finds the lines is not in the method any more, or stands there more than once. Most of these places were rewritten: read the note as one about {old}. |
| changed | The lines were found, and they are not the same. The note may still hold. |
| new lines | Code in a method that the walkthrough explains line by line, and no note is about it. |
| moved | The same lines, elsewhere in the file. The note holds; only the numbers beside the code are others. |
"""
SAME = """\
# What changes in TRL {new}

<!-- Written by tools/drift.py: do not edit it here. `make sync` writes it again. -->

<!-- drift: {new} -> {new} -->

Nothing: the walkthroughs are about TRL {new} itself, and `pyproject.toml` names no newer release to compare with.
"""


def page_text(old: Source, new: Source, pages: list[Page]) -> str:
    """The page newest_trl.md: what `compare` finds on each walkthrough, with directives in place of TRL's lines."""
    if old.version == new.version:
        return SAME.format(new=new.version)
    found = {page.name: compare(page, new) for page in pages}
    out = [INTRODUCTION.format(old=old.version, new=new.version)]
    out.append(f"| walkthrough | places quoted | {' | '.join(KINDS.values())} |")
    out.append("| --- |" + " ---: |" * (1 + len(KINDS)))
    for page in pages:
        cells = [f"[{page.title}]({Path(page.name).name})", str(len(page.quotes))]
        for key, words in KINDS.items():
            number = count(found[page.name], key)
            cells.append(f"[{number}](#{slug(f'{short(page)}: {words}')})" if number else "0")
        out.append("| " + " | ".join(cells) + " |")
    out += ["", "The column *gone* counts methods and classes, *new lines* lines of code, the other three places."]
    for page in pages:
        out += ["", *page_part(page, new, found[page.name])]
    return "\n".join(out) + "\n"


def page_part(page: Page, new: Source, found: dict[str, list[dict]]) -> list[str]:
    """The lines about one walkthrough: a heading, a sentence, and a part for each kind of finding that there is."""
    old, quotes, name = page.source, {quote.line: quote for quote in page.quotes}, short(page)
    lost = sum(len(e["page_lines"]) for e in found["gone"] if not e["at"])
    differ = [e for e in found["broken"] if not unchanged(e, quotes[e["page_line"]], new)] + found["changed"]
    same = len(quotes) - lost - len(differ)
    out = [f"## {page.title}", ""]
    walkthrough = f"[the walkthrough]({Path(page.name).name})"
    if any(re.search(r"Trainer\.__init__$", e["symbol"]) and not e["at"] for e in found["gone"]):
        out += [
            f"**TRL {new.version} does not have this trainer.** What is left belongs to others that it shared code with.",
            "",
        ]
    out.append(f"Of the {len(quotes)} places that {walkthrough} quotes, {same} are in {new.version} word for word.")
    parts: dict[str, list[str]] = {key: [] for key in KINDS}
    for e in found["gone"]:
        parts["gone"] += gone_entry(e, page, new)
    for key in ("broken", "changed"):
        heading = None
        for e in found[key]:
            quote = quotes[e["page_line"]]
            if (section := page.section(quote.line)) != heading:
                heading = section
                parts[key] += ["", f"#### {section_link(page, quote.line)}"]
            parts[key] += ["", *entry(e, quote, old, new)]
    by_section: dict[str, list[str]] = {}
    for e in found["moved"]:
        pair = f"{numbers(old, e['symbol'], e['old'])} → {numbers(new, e['now'], e['new'])}"
        by_section.setdefault(section_link(page, e["page_line"]), []).append(pair)
    moved = [f"- {section}: {'; '.join(pairs)}" for section, pairs in by_section.items()]
    many = len(found["moved"])
    summary = (
        f"<summary>{many} place{'s' * (many != 1)}, by the heading above {'them' if many != 1 else 'it'}</summary>"
    )
    parts["moved"] += ["", '<details class="drift" markdown="1">', summary, "", *moved, "", "</details>"]
    parts["gained"] += gained_entries(found, old, new)
    for key, words in KINDS.items():
        if found[key]:
            out += ["", f"### {name}: {words}", *parts[key]]
    return out


def gone_entry(e: dict, page: Page, new: Source) -> list[str]:
    where = page.source.symbol(e["symbol"])
    out = ["", f"**`{where.name}`**, {numbers(page.source, e['symbol'], [where.first, where.last], 'lines ')}."]
    links = ", ".join(f"[`{other}`]({new.link(new.symbol(other))})" for other in e["now"])
    if e["at"]:
        out.append(f"It is now {links}.")
    else:
        out.append(f"TRL {new.version} has {links} instead." if links else f"TRL {new.version} has it no more.")
    if sections := list(dict.fromkeys(section_link(page, line) for line in e["page_lines"])):
        out.append(f"The walkthrough quotes it {times(len(e['page_lines']))}, under {', '.join(sections)}.")
    return out


def entry(e: dict, quote: Quote, old: Source, new: Source) -> list[str]:
    """A place that changed or whose anchor broke: where it stands in both releases, what to reread, and the directive."""
    before = numbers(old, e["symbol"], e["old"], "lines ")
    after = numbers(new, e["now"], e["new"]) if e["new"] else f"nothing in {new.version}"
    same = unchanged(e, quote, new)
    about = "about " if "message" in e and e["new"] and not same else ""
    out = [f"`{quote.block.name}`, {before} → {about}{after}."]
    if "message" in e:
        out.append(reason(e))
    if same:
        out.append("The lines themselves are the same.")
        directive = []
    else:
        now = "" if e["now"] == e["symbol"] else f"{e['now']} "
        directive = ["", f"<!-- drift: {e['symbol']} {span(e['old'])} -> {now}{span(e['new'])} -->"]
    if quote.kind == "left-out":
        out.append(f"Left out there: {quote.anchors['reason']}.")
    else:
        out.append(f"Reread: “{beginning(quote.notes)}”")
    return [*out, *directive]


def reason(e: dict) -> str:
    """Why an anchor does not hold, in words; the anchor itself is a piece of TRL and stays on the walkthrough."""
    if e.get("key") == "both":
        return f"The text of an end is found elsewhere, so that {e['hits']} lines of code lie between the two ends."
    which = {"from": "first line", "to": "last line"}.get(e.get("key"), "line that bounds the search")
    if e.get("hits"):
        return f"The text of the {which} stands there {times(e['hits'])}."
    return f"The text of the {which} is not there any more."


def gained_entries(found: dict[str, list[dict]], old: Source, new: Source) -> list[str]:
    """New lines by symbol, in runs; those in the place of a broken anchor are shown there and only counted here."""
    shown: dict[str, set[int]] = {}
    for e in found["broken"]:
        if e["new"]:
            shown.setdefault(e["now"], set()).update(range(e["new"][0], e["new"][1] + 1))
    out, elsewhere = [], []
    for e in found["gained"]:
        block, added = new.symbol(e["now"]), fresh(old.symbol(e["symbol"]), new.symbol(e["now"]))
        all_new = [number for number, _ in e["lines"]]
        rest = [number for number in all_new if number not in shown.get(e["now"], set())]
        if not rest:
            elsewhere.append(f"`{block.name}` ({len(all_new)})")
            continue
        out += ["", f"#### `{block.name}`"]
        if hidden := len(all_new) - len(rest):
            out += ["", f"{hidden} of the {len(all_new)} new lines stand above, where an anchor broke."]
        now = "" if e["now"] == e["symbol"] else f"{e['now']} "
        for first, last in runs(rest):
            while first - 1 in added - block.code and block.lines[first - 1 - block.first].strip():
                first -= 1  # a new comment right above belongs to it
            out += ["", f"{numbers(new, e['now'], [first, last], 'Lines ')}:"]
            out += ["", f"<!-- drift: {e['symbol']} -> {now}{span([first, last])} -->"]
    if elsewhere:
        out += ["", f"All new lines of {', '.join(elsewhere)} stand above, where an anchor broke."]
    return out


def runs(found: list[int], gap: int = 3) -> list[list[int]]:
    """First and last of each run of numbers; up to `gap` lines between two of them do not end a run."""
    out: list[list[int]] = []
    for number in found:
        if out and number - out[-1][1] <= gap + 1:
            out[-1][1] = number
        else:
            out.append([number, number])
    return out


def unchanged(e: dict, quote: Quote, new: Source) -> bool:
    """Whether the lines in the place of a broken anchor are still the old ones: then only the anchor is at fault."""
    return e["new"] is not None and dedented(cut(new.symbol(e["now"]), e["new"])) == dedented(quote.block)


def cut(whole: Block, lines: list[int]) -> Block:
    """A part of a symbol by line numbers. Raises SourceError when it does not lie in the symbol."""
    first, last = lines
    if not whole.first <= first <= last <= whole.last:
        raise SourceError(f"lines {first}-{last} are not in `{whole.symbol}`, lines {whole.first}-{whole.last}")
    text = whole.lines[first - whole.first : last - whole.first + 1]
    code = frozenset(number for number in whole.code if first <= number <= last)
    return dataclasses.replace(whole, first=first, last=last, lines=text, code=code)


def span(lines: list[int] | None) -> str:
    """Line numbers as a directive has them: "4", "4-6", "nothing"."""
    return "nothing" if lines is None else f"{lines[0]}-{lines[1]}" if lines[1] > lines[0] else str(lines[0])


def numbers(source: Source, symbol: str, lines: list[int], word: str = "") -> str:
    """Line numbers as a link to the release's tag, behind "lines " or "Lines " in the right number."""
    word = word if lines[1] > lines[0] else word.replace("s ", " ")
    return f"{word}[{span(lines)}]({source.link(cut(source.symbol(symbol), lines))})"


def times(number: int) -> str:
    return {1: "once", 2: "twice"}.get(number, f"{number} times")


def short(page: Page) -> str:
    return page.title.partition(",")[0]


def slug(heading: str) -> str:
    """The name that a Git host and the site give to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def section_link(page: Page, line: int) -> str:
    heading, file = page.section(line), Path(page.name).name
    return f"[{heading}]({file}#{slug(heading)})" if heading else f"[{page.title}]({file})"


def beginning(notes: str, length: int = 90) -> str:
    """The first words of a note as plain prose, cut between words and never inside `code` or $a formula$."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", notes.split("\n\n")[0]).replace("**", "")
    words = re.findall(r"(?:`[^`]*`|\$[^$]*\$|\S)+", text)
    kept: list[str] = []
    for word in words:
        if kept and len(" ".join([*kept, word])) > length:
            return " ".join(kept) + " ..."
        kept.append(fold(word))
    return " ".join(kept)


# ------------------------------------------------------------------------------------------------------------- the site


def render(text: str, name: str, old: Source | None = None, new: Source | None = None) -> str:
    """Markdown for the site: each directive becomes the difference between the two releases, in a fence.

    Where the other release cannot be had, each directive becomes a sentence that says so, and stderr gets a warning.
    Raises PageError when the page is about other releases than pyproject.toml, SourceError when a directive does not hold.
    """
    if Path(name).name != NAME:
        return text
    old = old or Source.installed()
    releases, wanted = RELEASES.findall(text), (old.version, new.version if new else newest_version())
    if releases != [wanted]:
        raise PageError(f"{name} is not about TRL {wanted[0]} and {wanted[1]}: run `make sync`")
    try:
        new = new or obtain(wanted[1])
    except Unavailable as error:
        print(f"warning: {name} shows no differences, only links: {fold(str(error))}", file=sys.stderr)
    out = []
    for number, line in enumerate(text.split("\n"), 1):
        if RELEASES.fullmatch(line):
            continue
        if not MARK.match(line):
            out.append(line)
        elif not (directive := DIRECTIVE.fullmatch(line)):
            raise PageError(f"{name}:{number}: `{line}` is no directive that tools/drift.py writes: run `make sync`")
        elif new is None:
            missing = f"TRL {wanted[1]} could not be had when this site was built, so the difference is not shown here."
            out.append(f"*{missing} The links lead to the lines.*")
        else:
            out.append(shown(difference(directive, old, new)))
    return "\n".join(out)


def difference(directive: re.Match, old: Source, new: Source) -> list[str]:
    """The lines of a diff, each hunk headed by the true line numbers of both releases."""
    symbol, now = directive["symbol"], directive["now"] or directive["symbol"]
    ends = {key: [int(n) for n in re.findall(r"\d+", directive[key] or "")] for key in ("old", "new")}
    before, after = (
        cut(source.symbol(name), [ends[key][0], ends[key][-1]]) if ends[key] else None
        for source, name, key in ((old, symbol, "old"), (new, now, "new"))
    )
    if before is None and after is None:
        raise SourceError(f"`{directive[0]}` names no lines")
    if before is None:
        whole = new.symbol(now)
        after = cut(whole, [max(after.first - 1, whole.first), min(after.last + 1, whole.last)])  # to see where it is
        added = fresh(old.symbol(symbol), whole)
        lines = enumerate(dedented(after), after.first)
        marked = [("+" if number in added else " ") + line for number, line in lines]
        return [f"@@ +{after.first} @@", *(marked[:-1] if marked[-1] == "+" else marked)]
    if after is None:
        return [f"@@ -{before.first} @@", *("-" + line for line in dedented(before))]
    texts = dedented(before), dedented(after)
    out = []
    for group in difflib.SequenceMatcher(None, *texts, autojunk=False).get_grouped_opcodes(2):
        out.append(f"@@ -{before.first + group[0][1]} +{after.first + group[0][3]} @@")
        for tag, low, high, new_low, new_high in group:
            if tag == "equal":
                out += [f" {line}" for line in texts[0][low:high]]
            else:
                out += [f"-{line}" for line in texts[0][low:high]] + [f"+{line}" for line in texts[1][new_low:new_high]]
    return out


def shown(diff: list[str]) -> str:
    """A diff as a fence; a long one is folded away."""
    ticks = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", "\n".join(diff)))])
    fence = "\n".join([f"{ticks}diff", *diff, ticks])
    if len(diff) <= LONG:
        return fence
    return f'<details class="drift" markdown="1">\n<summary>{len(diff)} lines of difference</summary>\n\n{fence}\n\n</details>'


# ---------------------------------------------------------------------------------------------------------- the command


def write_page(args: argparse.Namespace, old: Source, new: Source) -> int:
    path = args.pages / NAME
    if new.version != newest_version():
        raise SourceError(
            f"the page is about TRL {newest_version()}, which pyproject.toml names: to write it about {new.version}, "
            "change `newest` under [tool.annotated-trl] there"
        )
    text = page_text(old, new, [page for page in load(args.pages, old) if page.covers])
    if path.is_file() and path.read_text("utf-8") == text:
        return 0
    if args.check:
        print(f"{path.parent.name}/{NAME} is not what tools/drift.py writes now, run `make sync`")
        return 1
    path.write_text(text, "utf-8")
    print(f"wrote: {path.parent.name}/{NAME}")
    return 0


def report(args: argparse.Namespace, old: Source, new: Source) -> int:
    pages = {page.name: compare(page, new) for page in load(args.pages, old) if page.covers}
    text = drift_report(old.version, new.version, pages)
    if args.json:
        found = {"from": old.version, "to": new.version, "pages": pages}
        args.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    if args.markdown:
        args.markdown.write_text(text, "utf-8")
    if not args.json and not args.markdown:
        print(text)
    serious = any(found[key] for found in pages.values() for key in found if key != "moved")
    return 1 if args.fail and serious else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?", help="a version, a wheel, or a folder with an unpacked TRL")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    parser.add_argument("--fail", action="store_true", help="exit 1 if anything but line numbers is different")
    parser.add_argument("--page", action="store_true", help=f"write {NAME} instead of a report")
    parser.add_argument("--check", action="store_true", help="with --page: write nothing; exit 1 if the page is not so")
    parser.add_argument("--pages", type=Path, default=PAGES, help="folder of the walkthroughs")
    parser.add_argument("--trl", help="folder of an unpacked TRL to read instead of the installed one")
    args = parser.parse_args(argv)
    try:
        old = Source.at(args.trl) if args.trl else Source.installed()
        new = obtain(args.target or newest_version())
        return (write_page if args.page else report)(args, old, new)
    except Unavailable as error:
        print(f"{NAME} was not checked: {error}" if args.check else error, file=sys.stderr)
        return 0 if args.check else 2
    except (PageError, SourceError) as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
