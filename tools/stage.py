"""Prepare the site: copy the repository's pages into build/docs, in the form that mkdocs reads.

    python tools/stage.py            # then: mkdocs build --strict
    python tools/stage.py --watch    # beside `mkdocs serve`: stage again after every change

The Markdown of this repository is written to be read on a Git host. Five things have to change on the way to the site:

1. README.md becomes the home page, and every script under annotated_examples/ gets a page that shows all of it.
2. Links follow: a link to a script goes to the script's page, a link to any other file (a test, pyproject.toml) goes
   to a page that shows that file. So no link leaves the site, and the site needs no Git host to work.
3. The directives (excerpts of TRL, left-out lines) are rendered by tools/walkthroughs.py, those of the differences
   between two releases by tools/drift.py; a formula's name becomes an anchor; all other HTML comments are dropped.
4. The navigation of tools/site/nav.yml, less the pages that do not exist yet, is written to build/nav.yml, which
   mkdocs.yml inherits.
5. KaTeX and Mermaid are taken from npm (versions and checksums in tools/site/package-lock.json), so that a reader's
   browser asks no other host for anything.

Nothing is written unless everything succeeded; on an error the last good build/docs stays as it was.
"""

import argparse
import ast
import posixpath
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote

import yaml

ROOT = Path(__file__).resolve().parent.parent

# What becomes a page of its own. Folders that scripts write into (outputs/) must not match.
PAGES = [
    "README.md",
    "ALL_TRAINERS_QUICK_REF.md",
    "annotated_examples/*.md",
    "annotated_examples/*.py",
    "annotated_examples/toy/README.md",
    "annotated_examples/recipes/README.md",
    "annotated_trainers/*.md",
    "reference_guides/*.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
]
# Folders that get a page listing theirs when nobody wrote an index.md or a README.md.
INDEXES = {
    "annotated_examples": "# Annotated examples\n\nEach script is one file. Run it as it is, read it from top to bottom, "
    "copy it.\n",
    "annotated_trainers": "# Annotated trainers\n\nTRL's own implementation, line by line, one page for each trainer.\n",
    "reference_guides": "# Reference guides\n\nThe mathematics, by subject, with code beside every formula.\n",
}
MAX_SHOWN = 200_000  # bytes; a larger or a binary file is offered as it is instead of being shown on a page

Render = Callable[[str, str], str]


class StageError(Exception):
    """Something in the repository or on this machine keeps the site from being made; the text names the remedy."""


# ---------------------------------------------------------------------------------------------------------------------
# Reading Markdown: which characters are prose


FENCE = re.compile(r"^[ >]*(?:[-*+] +|\d+[.)] +)?(`{3,}|~{3,})(.*)$")
COMMENT = re.compile(r"<!--(.*?)-->", re.S)
CODE_SPAN = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.S)
LIST_ITEM = re.compile(r"^ *([-*+]|\d+(?=[.)]))[.)]? +\S")
INLINE_MATH = re.compile(r"(?<![\\$])\$(?![\s$])[^$\n]*?(?<![\s\\])\$(?!\d)")


def blank(text: str) -> str:
    """The same number of characters and lines, all of them empty."""
    return re.sub(r"[^\n]", " ", text)


def without_fences(text: str) -> str:
    """`text` with every fenced block blanked; all offsets stay what they were."""
    out, closing = [], None
    for line in text.splitlines(keepends=True):
        fence = FENCE.match(line.rstrip("\n"))
        if closing is None:
            # An info string with a backtick is an inline code span at the start of a line, not a fence.
            if fence and not (fence[1][0] == "`" and "`" in fence[2]):
                closing = fence[1]
                line = blank(line)
        else:
            bare = line.strip(" >\n")
            if bare and set(bare) == {closing[0]} and len(bare) >= len(closing):
                closing = None
            line = blank(line)
        out.append(line)
    return "".join(out)


def prose(text: str) -> str:
    """`text` with fences, comments, code spans and inline math blanked; all offsets stay what they were."""
    text = without_fences(text)
    for pattern in (COMMENT, CODE_SPAN, INLINE_MATH):
        text = pattern.sub(lambda match: blank(match[0]), text)
    return text


def with_lists(text: str) -> str:
    """`text` with a blank line before every list that directly follows a paragraph, as Python-Markdown wants it.

    Inside a list item it also wants four spaces, where a Git host takes two. Four suit both, so fewer are an error, and
    so is a line that begins with `#12`, which it takes for a heading: ValueError names the text.
    """
    out, last, last_visible = [], "", ""
    for line, visible in zip(text.splitlines(), without_fences(text).splitlines(), strict=True):
        item, fence = LIST_ITEM.match(visible), not visible.strip() and FENCE.match(line)
        indent = len(line) - len(line.lstrip(" "))
        if 0 < indent < 4 and (item or fence or (visible.strip() and not last_visible.strip())):
            raise ValueError(
                f"`{line.rstrip()}`: inside a list, indent by four spaces; if this only looks like a list, break the "
                "line elsewhere"
            )
        if re.match(r"#+[^#\s]", visible):
            raise ValueError(f"`{line.rstrip()}`: here a heading begins with `#` alone; break the line elsewhere")
        begins = item and indent == 0 and item[1] in "-*+1"  # any other number is part of the paragraph
        if begins and last.strip() and last[0] != " " and not LIST_ITEM.match(last_visible):
            out.append("")
        out.append(line)
        last, last_visible = line, visible
    return "\n".join(out) + "\n"


def with_pictures(text: str) -> str:
    """Makes each picture a link to itself: on a small screen that is how it is enlarged."""
    visible = without_fences(text)
    pieces, end = [], 0
    for match in PICTURE.finditer(visible):
        pieces += [text[end : match.start()], f"[{text[match.start(1) : match.end(1)]}]({match[2]}){{ .picture }}"]
        end = match.end()
    return "".join([*pieces, text[end:]])


def fenced(code: str, info: str) -> str:
    """`code` as a fenced block whose fence is longer than any run of backticks in it."""
    ticks = "`" * max(3, 1 + max(map(len, re.findall(r"`+", code)), default=0))
    return f"{ticks}{info}\n{code.rstrip()}\n{ticks}\n"


# ---------------------------------------------------------------------------------------------------------------------
# The site


INLINE_TARGET = re.compile(r"\]\(\s*(<[^>\n]+>|[^()\s]+(?:\([^()\s]*\)[^()\s]*)*)")
REFERENCE_TARGET = re.compile(r"^ {0,3}\[[^\]\n]+\]:\s+(\S+)", re.M)
HTML_TARGET = re.compile(r"<(?:a|img|source)\b[^>]*?\b(?:href|src|srcset)=\"([^\"]+)\"")
ELSEWHERE = re.compile(r"^(?:[a-z][a-z0-9+.-]*:|//|#)", re.I)
PICTURE = re.compile(r"^(!\[[^\]]+\]\(([^()\s]+\.svg)\))$", re.M)  # alone in its paragraph
UNRENDERED = re.compile(r"^\s*(/?excerpt|left-out|covers|drift)\b")
BETWEEN_RELEASES = "annotated_trainers/newest_trl.md"  # about all walkthroughs, so it comes after them


class Site:
    """The staged files by their path on the site, filled by `add_pages`; `errors` names every broken link."""

    def __init__(self, root: Path, render: Render):
        self.root = root
        self.render = render
        self.files: dict[str, bytes] = {}
        self.errors: list[str] = []
        self.pages: dict[str, str] = {}  # path in the repository -> path under build/docs
        for pattern in PAGES:
            for path in sorted(root.glob(pattern)):
                name = path.relative_to(root).as_posix()
                self.pages[name] = str(Path(name).with_suffix(".md").as_posix())
        self.scripts = [name for name in self.pages if name.endswith(".py")]
        if "README.md" in self.pages:
            self.pages["README.md"] = "index.md"
        self.indexes = {}  # page -> the folder that it lists
        for folder in INDEXES:
            names = {posixpath.basename(name) for name in self.pages if posixpath.dirname(name) == folder}
            if names and not names & {"index.md", "README.md"}:
                self.indexes[f"{folder}/index.md"] = folder
        self.pages |= {page: page for page in self.indexes}

    # -- pages --------------------------------------------------------------------------------------------------------

    def add_pages(self) -> None:
        if "README.md" not in self.pages:
            raise StageError(f"{self.root} has no README.md, which is the site's home page")
        for source, page in list(self.pages.items()):
            if source in self.scripts:
                self.add_script(source)
            elif source in self.indexes:
                self.add(page, self.markdown(self.index(self.indexes[source]), source), search={"boost": 0.2})
            else:
                text = (self.root / source).read_text("utf-8")
                # Their titles hold the words that one searches for; still the page on a trainer should come first.
                is_index = source in ("README.md", "ALL_TRAINERS_QUICK_REF.md") or source.endswith("/index.md")
                search = {"boost": 0.2 if is_index else 2 if source.startswith("annotated_trainers/") else 1}
                tags = re.findall(r"^\| *Import *\|.*?\b(\w+Trainer)\b", text, re.M)  # searched before titles and text
                if source == BETWEEN_RELEASES:
                    search = {"exclude": True}  # it has the words of the walkthroughs, which should be found
                self.add(
                    page, self.markdown(text, source), source=source, search=search, **({"tags": tags} if tags else {})
                )
        if self.errors:
            raise StageError("\n".join(sorted(set(self.errors))))

    def add(self, page: str, text: str, **meta) -> None:
        self.files[page] = f"---\n{yaml.safe_dump(meta)}---\n\n{text}".encode()

    def markdown(self, text: str, source: str) -> str:
        """`text`, which stands at `source` in the repository, as the site needs it."""
        text = self.with_links(text, source)  # first, so that messages name the lines of the source
        try:
            return with_pictures(with_lists(self.without_comments(self.render(text, source), source)))
        except ValueError as error:  # of a directive that does not hold, or a list
            self.errors.append(f"{source}: {error}")
            return text

    def without_comments(self, text: str, source: str) -> str:
        visible = CODE_SPAN.sub(lambda match: blank(match[0]), without_fences(text))

        def replace(match: re.Match) -> str:
            body = text[match.start(1) : match.end(1)].strip()
            if UNRENDERED.match(body):
                self.errors.append(f"{source}: the directive `{body.splitlines()[0]}` was not rendered")
            name = re.fullmatch(r"formula:\s*([a-z0-9-]+)", body)
            if name:
                return (
                    f'\n\n<p class="formula" id="{name[1]}"><a href="#{name[1]}" '
                    f'title="Link to this formula">{name[1]}</a></p>\n\n'
                )
            return ""

        pieces, end = [], 0
        for match in COMMENT.finditer(visible):
            pieces += [text[end : match.start()], replace(match)]
            end = match.end()
        return "".join([*pieces, text[end:]])

    def add_script(self, source: str) -> None:
        """The page of one example script: what it is, its commands, and then all of it."""
        code = (self.root / source).read_text("utf-8")
        name = posixpath.basename(source)
        stem = name.removesuffix(".py")
        docstring = script_docstring(code, source)
        head = code[: code.find('"""') + 1] + docstring  # line 1 points to the walkthrough
        links = dict.fromkeys(re.findall(r"(?:annotated_trainers|reference_guides)/\w+\.md(?:#[\w-]+)?", head))
        walkthrough = f"annotated_trainers/{stem}.md"
        if walkthrough in self.pages and not any(link.startswith(walkthrough) for link in links):
            links = dict.fromkeys([walkthrough, *links])
        if walkthrough in self.pages and not any(link.startswith("reference_guides/") for link in links):
            text = (self.root / walkthrough).read_text("utf-8")
            for row in re.findall(r"^\| *Mathematics *\|(.*)$", text, re.M):  # of the walkthrough's quick facts
                links |= dict.fromkeys(re.findall(r"\]\(\.\./(reference_guides/[^)]+)\)", row))

        lines = []
        for link in links:
            kind = "TRL's own code, line by line" if link.startswith("annotated_trainers/") else "The mathematics"
            lines.append(f"- {kind}: [{self.title(link.partition('#')[0])}](../{link})\n")
        paragraph = docstring.split("\n\n")[0]
        body = self.markdown(f"# `{name}`\n\n{paragraph}\n\n{''.join(lines)}", source)

        body += f'\n[Download `{name}`]({name}){{ .md-button .script-download download="{name}" }}\n'
        commands = script_commands(docstring) or [f"python {source}"]
        body += "\n## Run it\n\n" + fenced("\n".join(commands), "bash")
        blocks, measured = 1, posixpath.join(posixpath.dirname(source), "expected", stem)
        if (self.root / f"{measured}.txt").is_file():
            blocks += 1
            printed = fenced(abridged((self.root / f"{measured}.txt").read_text("utf-8")), "text")
            body += f"\n## What it prints\n\n{printed}"
            image = f"![Each logged value over the steps of training: mean and range of six runs](expected/{stem}.svg)"
            body += self.markdown(f"\n## What it logs\n\n{image}\n", source)
        body += "\n## The whole script\n"
        sections = script_sections(code)
        if sections:  # lines are called after the number of their code block on the page, which begins with 0
            links = ", ".join(f'<a href="#__span-{blocks}-{line}">{title}</a>' for title, line in sections)
            body += f"\nIts sections: {links}.\n"  # raw HTML: mkdocs does not know that lines have names
        body += f'\n<div class="script" markdown="1">\n\n{python_block(code, name)}\n</div>\n'
        self.add(self.pages[source], body, source=source, description=first_line(docstring))
        self.files[source] = code.encode()

    def index(self, folder: str) -> str:
        rows = []
        for source in sorted(self.pages, key=lambda name: name == BETWEEN_RELEASES):
            if posixpath.dirname(source) != folder or source in self.indexes:
                continue
            name = posixpath.basename(source)
            if source in self.scripts:
                does = first_line(script_docstring((self.root / source).read_text("utf-8"), source))
                rows.append(f"- [`{name}`]({name}): {does}")
            else:
                rows.append(f"- [{self.title(source)}]({name})")
        text = INDEXES[folder]
        if f"{folder}/toy/README.md" in self.pages:
            text += "By default a script runs in the [toy world](toy/README.md): no download, no GPU.\n"
        return text + "\n" + "\n".join(rows) + "\n"

    def title(self, page: str) -> str:
        path = self.root / page
        if not path.is_file():
            return page  # the link itself is reported
        heading = re.search(r"^# +(.+?)\s*$", without_fences(path.read_text("utf-8")), re.M)
        return heading[1] if heading else page

    # -- links --------------------------------------------------------------------------------------------------------

    def with_links(self, text: str, source: str) -> str:
        visible = prose(text)
        # Markdown targets are paths of staged files, which mkdocs checks and turns into URLs; it leaves raw HTML alone,
        # so there the target must be the URL itself.
        found = [(m.span(1), False) for p in (INLINE_TARGET, REFERENCE_TARGET) for m in p.finditer(visible)]
        found += [(m.span(1), True) for m in HTML_TARGET.finditer(visible)]
        pieces, end = [], 0
        for (start, stop), is_html in sorted(found):
            link = text[start:stop]
            line = text.count("\n", 0, start) + 1
            pieces += [text[end:start], self.target(link.strip("<>"), source, line, is_html)]
            end = stop
        return "".join([*pieces, text[end:]])

    def target(self, link: str, source: str, line: int, is_html: bool) -> str:
        if ELSEWHERE.match(link):
            return link
        path, _, fragment = link.partition("#")
        path = unquote(path)
        # A Git host reads /x from the repository's top.
        base = "" if path.startswith("/") else posixpath.dirname(source)
        wanted = posixpath.normpath(posixpath.join(base, path.lstrip("/")))
        where = f"{source}, line {line}: the link `{link}`"
        if wanted.startswith(".."):
            self.errors.append(f"{where} leads out of the repository")
            return link
        if not (self.root / wanted).exists() and wanted not in self.pages:
            self.errors.append(f"{where} leads to `{wanted}`, which does not exist")
            return link
        page = self.page_for(wanted)
        if not wanted.endswith(".md") and not (self.root / wanted).is_dir():
            fragment = ""  # #L12 is a Git host's name for a line
        here = self.pages[source]
        if is_html:
            here, page = url_folder(here), url_folder(page)
            relative = posixpath.relpath(page or ".", here or ".") + ("/" if page.endswith("/") else "")
        else:
            relative = posixpath.relpath(page, posixpath.dirname(here) or ".")
        return relative + (f"#{fragment}" if fragment else "")

    def page_for(self, wanted: str) -> str:
        """The staged file to which a link to `wanted` (a path in the repository) leads; made now if need be."""
        if wanted == ".":
            return "index.md"
        for name in (wanted, f"{wanted}/index.md", f"{wanted}/README.md"):
            if name in self.pages:
                return self.pages[name]
        path = self.root / wanted
        shown = "source/" + re.sub(r"(^|/)\.", r"\1dot.", wanted)  # mkdocs drops hidden files without a word
        if path.is_dir():
            page = f"{shown}/index.md"
            if page not in self.files:
                names = sorted(f"{p.name}/" if p.is_dir() else p.name for p in path.iterdir() if p.name[0] not in "._")
                listing = "\n".join(f"- `{name}`" for name in names)
                self.add(page, f"# `{wanted}/`\n\n{listing}\n", search={"exclude": True})
            return page
        data = path.read_bytes()
        if is_text(data) and len(data) <= MAX_SHOWN and path.suffix not in {".svg", ".csv"}:
            page = f"{shown}.md"
            if page not in self.files:
                language = {".py": "python", ".toml": "toml", ".yaml": "yaml", ".yml": "yaml", ".json": "json"}
                code = fenced(data.decode(), f'{{ .{language.get(path.suffix, "text")} linenums="1" }}')
                self.add(page, f"# `{wanted}`\n\n{code}", source=wanted, search={"exclude": True})
            return page
        self.files[shown] = data
        return shown

    # -- navigation ---------------------------------------------------------------------------------------------------

    def navigation(self, plan: list) -> list:
        """`plan` (tools/site/nav.yml) less the pages that do not exist, with the paths of the site."""
        named = set(plan_paths(plan))
        taken: set[str] = set()

        def keep(entries: list) -> list:
            kept = []
            for entry in entries:
                title, value = next(iter(entry.items())) if isinstance(entry, dict) else (None, entry)
                if isinstance(value, list):
                    inner = keep(value)
                    if inner:
                        kept.append({title: inner})
                elif value.endswith("/*"):
                    rest = [n for n in self.pages if posixpath.dirname(n) == value[:-2] and n not in named]
                    taken.update(rest)
                    kept += [self.pages[name] for name in sorted(rest)]
                elif value in self.pages:
                    taken.add(value)
                    kept.append({title: self.pages[value]} if title else self.pages[value])
            return kept

        nav = keep(plan)
        forgotten = sorted(set(self.pages) - taken)
        if forgotten:
            raise StageError(
                "no place in the navigation for "
                + ", ".join(forgotten)
                + ": nobody would find it. Add it to tools/site/nav.yml"
            )
        return nav


def plan_paths(plan: list) -> list[str]:
    paths = []
    for entry in plan:
        value = next(iter(entry.values())) if isinstance(entry, dict) else entry
        paths += plan_paths(value) if isinstance(value, list) else [value]
    return paths


def url_folder(page: str) -> str:
    """The URL of a staged file, from the top of the site: `a/b.md` -> `a/b/`, `a/index.md` -> `a/`, others as is."""
    if not page.endswith(".md"):
        return page
    folder, name = posixpath.split(page)
    if name in ("index.md", "README.md"):
        return f"{folder}/" if folder else ""
    return page.removesuffix(".md") + "/"


def is_text(data: bytes) -> bool:
    try:
        return "\0" not in data.decode("utf-8")
    except UnicodeDecodeError:
        return False


def python_block(code: str, title: str) -> str:
    return fenced(code, f'{{ .python linenums="1" title="{title}" }}')


def abridged(printed: str) -> str:
    """What a script prints, with `...` in place of the lines of metrics."""
    lines = ["..." if line.startswith("{") else line for line in printed.rstrip().split("\n")]
    return "\n".join(line for place, line in enumerate(lines) if line != "..." or lines[place - 1] != "...")


def script_docstring(code: str, source: str) -> str:
    try:
        docstring = ast.get_docstring(ast.parse(code))
    except SyntaxError as error:
        raise StageError(f"{source}, line {error.lineno}: {error.msg}; its page is made from the script") from None
    if not docstring:
        raise StageError(f"{source} has no docstring; its first paragraph is the first paragraph of the script's page")
    return docstring


def first_line(docstring: str) -> str:
    return " ".join(docstring.split("\n\n")[0].split())


def script_commands(docstring: str) -> list[str]:
    """The command lines of a script's docstring, continuation lines included."""
    commands, continues = [], False
    for line in docstring.splitlines():
        bare = line.strip().removeprefix("$ ")
        if continues or re.match(r"(?:\w+=\S+ )*(?:python|accelerate|uv|torchrun) \S", bare):
            commands.append(f"    {bare}" if continues else bare)
            continues = bare.endswith("\\")
    return commands


def script_sections(code: str) -> list[tuple[str, int]]:
    """The headings that a script gives its parts, `# ------- data`, each with its line number."""
    lines = enumerate(code.splitlines(), 1)
    return [(heading[1], number) for number, line in lines if (heading := re.match(r"# -{20,} (\w.*)", line))]


# ---------------------------------------------------------------------------------------------------------------------
# Assets


def assets(folder: Path) -> dict[str, bytes]:
    """What the site carries under assets/: our own style, scripts and icon (`folder` is tools/site)."""
    return {
        f"assets/{path.name}": path.read_bytes() for path in sorted([*folder.glob("site.*"), *folder.glob("lazy.js")])
    }


def vendored(folder: Path) -> dict[str, bytes]:
    """KaTeX and Mermaid under assets/vendor/, installed by npm from the lock file unless they already are."""
    modules, lock = folder / "node_modules", (folder / "package-lock.json").read_bytes()
    stamp = modules / ".installed-from"
    if not (stamp.is_file() and stamp.read_bytes() == lock):
        npm = shutil.which("npm")
        if not (npm and shutil.which("node")):
            missing = "npm" if not npm else "node"
            raise StageError(
                f"{missing} was not found. The site takes KaTeX and Mermaid from npm: install Node.js 20 or newer "
                "(it brings npm), then run this again"
            )
        done = subprocess.run(
            [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"],
            cwd=folder,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise StageError(f"`npm ci` failed in {folder}:\n{(done.stderr or done.stdout).strip()[-2000:]}")
        stamp.write_bytes(lock)
    katex, mermaid = modules / "katex", modules / "mermaid"
    wanted = {
        "katex/katex.min.css": katex / "dist/katex.min.css",
        "katex/katex.min.js": katex / "dist/katex.min.js",
        "katex/LICENSE": katex / "LICENSE",
        "mermaid/mermaid.min.js": mermaid / "dist/mermaid.min.js",
        "mermaid/LICENSE": mermaid / "LICENSE",
    }
    for font in sorted((katex / "dist/fonts").glob("*.woff2")):
        wanted[f"katex/fonts/{font.name}"] = font
    return {f"assets/vendor/{name}": path.read_bytes() for name, path in wanted.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def directives_render() -> Render:
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    import drift
    import walkthroughs

    return lambda text, page: drift.render(walkthroughs.render(text, page), page)


def stage(root: Path = ROOT, render: Render | None = None, in_place: bool = False, vendor: bool = True) -> int:
    """Make `root`/build/docs and `root`/build/nav.yml; return the number of staged files.

    `render(markdown, page)` turns directives into Markdown (default: tools/walkthroughs.py, then tools/drift.py). With `in_place` only the
    files that differ are written, which is what a running `mkdocs serve` can follow; otherwise the whole folder is
    replaced. Raises StageError, having written nothing, when a page cannot be made.
    """
    site = Site(root, render or directives_render())
    site.add_pages()
    nav = site.navigation(yaml.safe_load((root / "tools/site/nav.yml").read_text("utf-8")))
    site.files |= assets(root / "tools/site")
    if vendor:
        site.files |= vendored(root / "tools/site")

    build, docs = root / "build", root / "build/docs"
    build.mkdir(exist_ok=True)
    if in_place and docs.is_dir():
        write(docs, site.files)
    else:
        fresh, old = build / "docs.new", build / "docs.old"
        for leftover in (fresh, old):
            shutil.rmtree(leftover, ignore_errors=True)
        write(fresh, site.files)
        if docs.exists():
            docs.rename(old)
        fresh.rename(docs)
        shutil.rmtree(old, ignore_errors=True)
    text = "# Written by tools/stage.py.\n" + yaml.safe_dump({"nav": nav}, sort_keys=False, allow_unicode=True)
    if not (build / "nav.yml").is_file() or (build / "nav.yml").read_text("utf-8") != text:
        (build / "nav.yml").write_text(text, "utf-8")
    return len(site.files)


def write(folder: Path, files: dict[str, bytes]) -> None:
    """Make `folder` hold exactly `files`, touching only what differs."""
    for name, data in sorted(files.items()):
        path = folder / name
        if not (path.is_file() and path.read_bytes() == data):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_file() and path.relative_to(folder).as_posix() not in files:
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def watch(root: Path) -> None:
    def state() -> dict[Path, int]:
        watched = [*PAGES, "tools/*.py", "tools/site/*", "annotated_examples/expected/*"]
        return {path: path.stat().st_mtime_ns for pattern in watched for path in root.glob(pattern) if path.is_file()}

    before = state()
    while True:
        time.sleep(1)
        now = state()
        if now != before:
            before = now
            # A process of its own, so that a changed tool is the one that runs.
            subprocess.run([sys.executable, __file__, "--in-place"], check=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--in-place", action="store_true", help="write only what changed, for a running `mkdocs serve`")
    parser.add_argument("--watch", action="store_true", help="stage in place now and after every change")
    options = parser.parse_args()
    try:
        count = stage(in_place=options.in_place or options.watch)
    except StageError as error:
        print(f"stage: {error}", file=sys.stderr)
        return 1
    print(f"staged {count} files in build/docs")
    if options.watch:
        watch(ROOT)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
