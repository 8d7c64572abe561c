"""Find classes, methods and functions of TRL in its source, and lines in them by their text, without importing TRL.

A walkthrough quotes a line of TRL by a dotted symbol and by a piece of the line's text, never by a line number:

    source = Source.installed()
    block = source.select("trl.trainer.dpo_trainer.DPOTrainer._compute_loss", start="delta_score = chosen_scores")
    block.first, block.lines, source.link(block)

Files are read as text and parsed with `ast`, so that nothing of TRL runs and torch is not needed.
"""

import ast
import difflib
import importlib.metadata
import importlib.util
import io
import re
import tokenize
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


class SourceError(ValueError):
    """What was asked for is not in this release; the message says what was sought, where, and what is there instead."""


class SymbolError(SourceError):
    """The symbol is not in the release, or is defined more than once."""


class AnchorError(SourceError):
    """An anchor matches no line, or several; `key` names it, `hits` says how many lines it matches."""

    def __init__(self, message: str, key: str, hits: int):
        super().__init__(message)
        self.key, self.hits = key, hits


@dataclass(frozen=True)
class Block:
    """Consecutive lines of one file; line numbers count from 1, and both ends are included."""

    symbol: str  # "trl.trainer.dpo_trainer.DPOTrainer._compute_loss"
    name: str  # the same without the module: "DPOTrainer._compute_loss"
    path: str  # relative to the repository of TRL: "trl/trainer/dpo_trainer.py"
    first: int
    last: int
    lines: tuple[str, ...]
    code: frozenset[int]  # numbers of the lines that are code: not blank, not only a comment, not a docstring


@dataclass(frozen=True)
class Module:
    path: str
    tree: ast.Module
    lines: tuple[str, ...]
    code: frozenset[int]


def fold(text: str) -> str:
    """White space folded: every run of it becomes one blank, none at the ends."""
    return " ".join(text.split())


def pinned_version() -> str:
    """The version of TRL that pyproject.toml pins, the one place where it stands."""
    dependencies = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]["dependencies"]
    return next(entry.removeprefix("trl==").strip() for entry in dependencies if entry.startswith("trl=="))


def newest_version() -> str:
    """The release that the pages are compared with, `newest` in pyproject.toml, the one place where it stands."""
    table = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["tool"].get("annotated-trl", {})
    if "newest" not in table:
        raise SourceError('pyproject.toml names no newest TRL: add `newest = "VERSION"` under [tool.annotated-trl]')
    return table["newest"]


def code_lines(text: str, tree: ast.Module) -> frozenset[int]:
    """Numbers of the lines that hold code. Each line of a call or of a string over several lines counts, a docstring
    (or any other string that stands alone as a statement), a blank line and a line with nothing but a comment do not."""
    alone = [
        (node.value.lineno, node.value.end_lineno)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]
    documentation = {number for first, last in alone for number in range(first, last + 1)}
    passed = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in passed or (token.type == tokenize.STRING and token.start[0] in documentation):
            continue
        found.update(range(token.start[0], token.end[0] + 1))
    return frozenset(number for number, line in enumerate(text.split("\n"), 1) if number in found and line.strip())


def definitions(scope: ast.AST) -> Iterator[tuple[str, ast.stmt]]:
    """Names defined directly in a module, class or function, also under `if`, `with`, `try`; in a module or class the
    assigned names as well (a config's fields)."""
    todo = list(ast.iter_child_nodes(scope))
    for node in todo:  # grows while it is read
        if isinstance(node, DEFINITIONS):
            yield node.name, node
        elif isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(scope, ast.Module | ast.ClassDef):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name):
                    yield target.id, node
        elif isinstance(node, ast.stmt | ast.ExceptHandler | ast.match_case):
            todo.extend(ast.iter_child_nodes(node))


class Source:
    """One release of TRL, as files."""

    def __init__(self, package: Path, version: str):
        self.package = package  # the folder `trl`
        self.version = version
        self.module = cache(self._module)
        self.elsewhere = cache(self._elsewhere)
        self.definers = cache(self._definers)

    @classmethod
    @cache
    def installed(cls) -> "Source":
        """The TRL of this environment. Raises SourceError if there is none, or if it is not the pinned version."""
        spec = importlib.util.find_spec("trl")  # finds the folder, imports nothing
        if spec is None or not spec.submodule_search_locations:
            raise SourceError("TRL is not installed in this environment: run `make install`")
        version = importlib.metadata.version("trl")
        if version != pinned_version():
            raise SourceError(
                f"TRL {version} is installed, but pyproject.toml pins {pinned_version()}, which the pages are about: "
                "run `make install`"
            )
        return cls(Path(next(iter(spec.submodule_search_locations))), version)

    @classmethod
    def at(cls, folder: Path | str) -> "Source":
        """A TRL that lies unpacked in `folder`: the folder `trl` itself or the one that holds it, from a wheel or a checkout."""
        folder = Path(folder).resolve()
        package = folder if folder.name == "trl" and (folder / "__init__.py").is_file() else folder / "trl"
        if not (package / "__init__.py").is_file():
            raise SourceError(f"no TRL in {folder}: neither `__init__.py` nor `trl/__init__.py` is there")
        info = sorted(package.parent.glob("trl-*.dist-info"))
        checkout = package.parent / "VERSION"
        if info:
            version = info[-1].name.removeprefix("trl-").removesuffix(".dist-info")
        else:
            version = checkout.read_text("utf-8").strip() if checkout.is_file() else "(version unknown)"
        return cls(package, version)

    def link(self, block: Block) -> str:
        """Address of the lines at the release's tag on GitHub."""
        lines = f"#L{block.first}" + (f"-L{block.last}" if block.last > block.first else "")
        return f"https://github.com/huggingface/trl/blob/v{self.version}/{block.path}{lines}"

    def _module(self, path: Path) -> Module:
        text = path.read_text("utf-8")
        tree = ast.parse(text)
        name = path.relative_to(self.package.parent).as_posix()
        return Module(name, tree, tuple(text.split("\n")), code_lines(text, tree))

    def _split(self, symbol: str) -> tuple[Path, list[str]]:
        """The file of the symbol's module, and the names after it."""
        head, *names = symbol.split(".")
        if head != "trl" or not names:
            raise SymbolError(
                f"`{symbol}` is not a dotted name inside trl, like trl.trainer.dpo_trainer.DPOTrainer.log"
            )
        folder = self.package
        while names and (folder / names[0]).is_dir():
            folder /= names.pop(0)
        if names and (folder / f"{names[0]}.py").is_file():
            return folder / f"{names.pop(0)}.py", names
        return folder / "__init__.py", names

    def symbol(self, symbol: str) -> Block:
        """All lines of a class, method, function (nested ones too) or field, decorators included. Raises SymbolError."""
        path, names = self._split(symbol)
        if not path.is_file() or not names:
            raise SymbolError(f"`{symbol}` names a module, not a class, method or function in it")
        module = self.module(path)
        node: ast.AST = module.tree
        for depth, name in enumerate(names):
            found = [child for child_name, child in definitions(node) if child_name == name]
            if not found:
                hint = self._near(node, names[:depth], name, module.path) if depth else self._hint(symbol)
                raise SymbolError(f"TRL {self.version} has no `{symbol}`{hint}")
            if len(found) > 1:
                lines = ", ".join(str(child.lineno) for child in found)
                raise SymbolError(
                    f"{module.path} of TRL {self.version} defines `{symbol}` {len(found)} times (lines {lines})"
                )
            node = found[0]
        first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
        return self._block(symbol, ".".join(names), module, first, node.end_lineno)

    @staticmethod
    def _near(scope: ast.AST, outer: list[str], name: str, path: str) -> str:
        names = list(dict.fromkeys(other for other, _ in definitions(scope)))
        near = difflib.get_close_matches(name, names, 3, 0.5)
        nearest = ", nearest: " + ", ".join(f"`{other}`" for other in near) if near else ""
        return f": `{'.'.join(outer)}` in {path} has no `{name}`{nearest}"

    def _hint(self, symbol: str) -> str:
        found = self.elsewhere(symbol)
        return "; there is " + ", ".join(f"`{other}`" for other in found) if found else ", nor its class elsewhere"

    def _elsewhere(self, symbol: str) -> list[str]:
        """Other modules that define the same class and method, or else the class alone; none if its class is in place."""
        path, names = self._split(symbol)
        if names and names[0] in dict(definitions(self.module(path).tree)):
            return []
        parts = symbol.split(".")
        for wanted in (parts, parts[:-1]):
            for names in (wanted[start:] for start in range(1, len(wanted))):
                found = []
                for path in self.definers().get(names[0], []):
                    scopes = [self.module(path).tree]
                    for name in names:
                        scopes = [node for scope in scopes for child, node in definitions(scope) if child == name]
                    module = path.relative_to(self.package.parent).with_suffix("").parts
                    other = ".".join([*module, *names]).replace(".__init__.", ".")
                    if scopes:
                        found.append(other)
                if found:
                    return found
        return []

    def _definers(self) -> dict[str, list[Path]]:
        """Name of a class or function, at any depth -> the files that define one of that name."""
        define, found = re.compile(r"^\s*(?:class|def|async def) (\w+)", re.MULTILINE), {}
        for path in sorted(self.package.rglob("*.py")):
            for name in dict.fromkeys(define.findall(path.read_text("utf-8"))):
                found.setdefault(name, []).append(path)
        return found

    def _block(self, symbol: str, name: str, module: Module, first: int, last: int) -> Block:
        inside = frozenset(number for number in module.code if first <= number <= last)
        return Block(symbol, name, module.path, first, last, module.lines[first - 1 : last], inside)

    def select(
        self,
        symbol: str,
        start: str | None = None,
        to: str | None = None,
        after: str | None = None,
        before: str | None = None,
    ) -> Block:
        """Lines of a symbol, from the line that holds `start` (on a page: `from:`) to the line that holds `to`.

        An anchor is a piece of one line, white space folded, whole words: `logps = x` is not found in `ref_logps = x`.
        Without a letter or digit it is the whole line: `)` is a line that holds nothing else.
        Each must match exactly one line: `after` in the symbol; `start` behind `after`; `before` in the symbol behind
        `after` (or, if it repeats, behind `start`), and neither `start` nor `to` is then sought from there on; `to` from
        `start` on. Without `to` it is one line, without `start` the whole symbol. Raises SymbolError, AnchorError.
        """
        whole = self.symbol(symbol)
        if start is None:
            return whole
        low, high = whole.first, whole.last
        if after is not None:
            low = self._one(whole, "after", after, low, high) + 1
        if before is not None and len(self._hits(whole, before, low, high)) < 2:
            high, before = self._one(whole, "before", before, low, high) - 1, None
        first = self._one(whole, "from", start, low, high)
        if before is not None:
            high = self._one(whole, "before", before, first + 1, high) - 1
        last = first if to is None else self._one(whole, "to", to, first, high)
        return self._block(symbol, whole.name, self.module(self.package.parent / whole.path), first, last)

    @staticmethod
    def _hits(whole: Block, anchor: str, low: int, high: int) -> list[int]:
        text = fold(anchor)
        ends = (r"(?<!\w)" if re.match(r"\w", text) else "", r"(?!\w)" if re.search(r"\w$", text) else "")
        if not re.search(r"\w", text):
            ends = ("^", "$")
        pattern = re.compile(ends[0] + re.escape(text) + ends[1])
        lines = enumerate(whole.lines, whole.first)
        return [number for number, line in lines if low <= number <= high and pattern.search(fold(line))]

    def _one(self, whole: Block, key: str, anchor: str, low: int, high: int) -> int:
        hits = self._hits(whole, anchor, low, high)
        if len(hits) == 1:
            return hits[0]
        texts = {number: fold(line) for number, line in enumerate(whole.lines, whole.first)}
        many = f"{len(hits)} lines" if hits else "no line"
        message = f"`{key}: {anchor}` matches {many} among lines {low}-{high} of {whole.path} (TRL {self.version})"
        if hits:
            found = "; ".join(f"line {number}: `{texts[number]}`" for number in hits)
            raise AnchorError(
                f"{message}, and must match one: {found}. Lengthen it, or add an `after:` or `before:` anchor",
                key,
                len(hits),
            )
        near = difflib.get_close_matches(fold(anchor), texts.values(), 2, 0.5)
        found = "; ".join(f"line {number}: `{text}`" for number, text in texts.items() if text in near and text)
        raise AnchorError(message + (f". Nearest: {found}" if found else ". No line of the symbol comes near"), key, 0)
