"""The built site in a browser: it asks no other host, shows every formula and diagram, fits a phone, finds and copies.

The site is staged and built once, strictly, into a temporary folder and served from there. Needs the docs extra, npm and
Chromium; without Chromium these tests are skipped, except in CI, where that is a failure.
"""

import contextlib
import functools
import gzip
import http.server
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import stage
import which
from markdown_it import MarkdownIt
from tables import NAMES, TRAINERS, quick_facts

ROOT = Path(__file__).resolve().parent.parent
WIDE, PHONE = {"width": 1440, "height": 900}, {"width": 360, "height": 740}
CHROMIUM_OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
# Material draws diagrams into closed shadow roots, which a test cannot look into.
PATIENCE = 120_000  # ms; a busy machine takes its time
OPEN_SHADOWS = """
const attach = Element.prototype.attachShadow
Element.prototype.attachShadow = function (options) { return attach.call(this, { ...options, mode: "open" }) }
"""
LOOK = """() => {
  const all = selector => [...document.querySelectorAll(selector)]
  const count = tags => all(`.md-content__inner :is(${tags})`).length
  return {
    formulas: all(".katex-display").length,
    unset: all(".arithmatex").filter(e => !e.querySelector(".katex")).map(e => e.textContent),
    formula_errors: all(".katex-error").map(e => e.title),
    diagrams: all("div.mermaid").filter(e => e.shadowRoot?.querySelector("svg")).length,
    outline: { items: count("li"), rows: count("tr"), headings: count("h1, h2, h3, h4") },
    links: all("a[href]").map(a => a.href.split("#")[0]),
    dead_fragments: all("a[href^='#']").map(a => decodeURIComponent(a.hash.slice(1)))
      .filter(id => id && !document.getElementById(id)),
  }
}"""
BOXES = """() => {
  const box = element => { const b = element.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom] }
  return [...document.querySelectorAll(".excerpt")].map(e =>
    [box(e.querySelector(".excerpt__code")), box(e.querySelector(".excerpt__notes"))])
}"""

FAINT = """() => {
  const channels = colour => colour.match(/[\\d.]+/g).map(Number)
  const light = colour => {
    const [r, g, b] = channels(colour).map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b
  }
  const contrast = (one, other) => {
    const [low, high] = [light(one), light(other)].sort((a, b) => a - b)
    return (high + 0.05) / (low + 0.05)
  }
  const seen = colour => colour.startsWith("rgb") && (channels(colour)[3] ?? 1) > 0.5
  const page = getComputedStyle(document.body).backgroundColor
  const faint = []
  for (const host of document.querySelectorAll("div.mermaid")) {
    const svg = host.shadowRoot.querySelector("svg")
    const shapes = [...svg.querySelectorAll("rect, polygon, path.label-container, .label-container path")].filter(e => seen(getComputedStyle(e).fill))
    const words = [...svg.querySelectorAll("text, span.nodeLabel, span.edgeLabel")].filter(e => e.textContent.trim())
    for (const word of words) {
      const style = getComputedStyle(word.querySelector("tspan") ?? word)
      const box = word.getBoundingClientRect(), x = box.left + box.width / 2, y = box.top + box.height / 2
      const below = shapes.filter(e => {
        const b = e.getBoundingClientRect()
        return b.left <= x && x <= b.right && b.top <= y && y <= b.bottom
      })
      const ground = below.length ? getComputedStyle(below.at(-1)).fill : page
      const ink = word.tagName === "text" ? style.fill : style.color
      if (contrast(ink, ground) < 4.5) faint.push(`${word.textContent.trim()}: ${ink} on ${ground}`)
    }
    for (const arrow of svg.querySelectorAll("[id$=-arrowhead] path, [id$=pointEnd] path")) {
      const ink = getComputedStyle(arrow).fill
      if (contrast(ink, page) < 3) faint.push(`an arrowhead: ${ink} on ${page}`)
    }
  }
  return faint
}"""


def missing(what: str) -> None:
    reason = f"the site was not looked at in a browser: {what}"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def browser():
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("playwright is not installed (pip install -e '.[docs]')")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        missing("no chromium, chromium-browser or google-chrome on the PATH")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_OPTIONS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def site(browser, tmp_path_factory):
    """The address of the freshly built site, with a slash at the end."""
    if not shutil.which("npm"):
        missing("npm is not installed")
    if not importlib.util.find_spec("mkdocs"):
        missing("mkdocs is not installed (pip install -e '.[docs]')")
    folder = tmp_path_factory.mktemp("site")
    for command in (
        [sys.executable, "tools/stage.py"],
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
    ):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command[1:])}\n{done.stdout}\n{done.stderr}"

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@contextlib.contextmanager
def window(browser, **options):
    """A browser window as wide as a desk screen."""
    context = browser.new_context(viewport=WIDE, **options)
    context.set_default_timeout(PATIENCE)
    yield context
    context.close()


@pytest.fixture
def page(browser):
    """An empty tab, allowed to use the clipboard."""
    with window(browser, permissions=["clipboard-read", "clipboard-write"]) as context:
        yield context.new_page()


@dataclass
class Visit:
    """What one page did when it was opened."""

    url: str  # from the top of the site
    source: str  # path in the repository
    requests: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    seen: dict = field(default_factory=dict)  # what LOOK found
    wide: list = field(default_factory=list)  # the excerpts' boxes, [code, notes], each left, top, right, bottom
    narrow: list = field(default_factory=list)
    width_on_phone: dict[str, int] = field(default_factory=dict)  # scheme of the colours -> pixels
    faint: dict[str, list] = field(default_factory=dict)  # scheme -> words in diagrams that one can hardly read


def sources() -> dict[str, str]:
    """Page of the site -> path in the repository."""
    pages = stage.Site(ROOT, lambda text, page: text).pages
    return {stage.url_folder(page): source for source, page in pages.items()}


@pytest.fixture(scope="session")
def visits(site, browser) -> list[Visit]:
    """Every page, opened once: on a wide screen, then on a phone in light and in dark."""
    with window(browser, color_scheme="light", reduced_motion="reduce") as context:
        context.add_init_script(OPEN_SHADOWS)
        return [visited(context.new_page(), site, Visit(url, source)) for url, source in sources().items()]


def visited(tab, site: str, visit: Visit) -> Visit:
    tab.on("request", lambda request: visit.requests.append(request.url))
    tab.on("pageerror", lambda error: visit.problems.append(str(error)))
    tab.on("console", lambda message: visit.problems.append(message.text) if message.type == "error" else None)
    answer = tab.goto(site + visit.url)
    assert answer.ok, f"{visit.url}: {answer.status}"
    tab.wait_for_function("[...document.querySelectorAll('.arithmatex')].every(e => e.querySelector('.katex'))")
    for _ in range(tab.locator("pre.mermaid").count()):  # drawn when one comes near it
        tab.locator("pre.mermaid").first.scroll_into_view_if_needed()
        tab.locator("pre.mermaid").first.wait_for(state="detached")
    visit.seen, visit.wide = tab.evaluate(LOOK), tab.evaluate(BOXES)
    tab.set_viewport_size(PHONE)
    visit.narrow = tab.evaluate(BOXES)
    for scheme, name in (("light", "default"), ("dark", "slate")):
        tab.emulate_media(color_scheme=scheme)
        tab.wait_for_selector(f"body[data-md-color-scheme={name}]")
        visit.width_on_phone[scheme] = tab.evaluate("document.documentElement.scrollWidth")
        visit.faint[scheme] = tab.evaluate(FAINT)
    tab.close()
    return visit


def fences(source: str, language: str) -> int:
    if not source.endswith(".md") or not (ROOT / source).is_file():
        return 0
    tokens = MarkdownIt().parse((ROOT / source).read_text("utf-8"))
    return sum(token.type == "fence" and token.info.split()[:1] == [language] for token in tokens)


def written(visits: list[Visit]) -> list[Visit]:
    """The visits of pages that somebody wrote; the others are made by tools/stage.py."""
    return [visit for visit in visits if visit.source.endswith(".md") and (ROOT / visit.source).is_file()]


def test_no_page_asks_another_host_for_anything(visits, site):
    elsewhere = {v.source: [u for u in v.requests if not u.startswith((site, "data:", "blob:"))] for v in visits}
    assert not {name: urls for name, urls in elsewhere.items() if urls}
    assert all(visit.requests for visit in visits)


def test_no_page_reports_an_error(visits):
    assert not {visit.source: visit.problems for visit in visits if visit.problems}


def test_every_formula_is_set(visits):
    for visit in visits:
        assert visit.seen["formula_errors"] == [], visit.source
        assert visit.seen["unset"] == [], visit.source
        assert visit.seen["formulas"] >= fences(visit.source, "math"), visit.source
    assert sum(visit.seen["formulas"] for visit in visits) > 0


def test_every_diagram_is_drawn(visits):
    for visit in visits:
        assert visit.seen["diagrams"] == fences(visit.source, "mermaid"), visit.source


def test_the_words_of_every_diagram_can_be_read_in_light_and_in_dark(visits):
    assert not {visit.source: visit.faint for visit in visits if any(visit.faint.values())}


def test_every_page_has_the_lists_tables_and_headings_that_a_git_host_shows(visits):
    for visit in written(visits):
        tokens = MarkdownIt("commonmark").enable("table").parse((ROOT / visit.source).read_text("utf-8"))
        opened = [token.tag for token in tokens if token.nesting == 1]
        assert visit.seen["outline"] == {
            "items": opened.count("li"),
            "rows": opened.count("tr"),
            "headings": sum(opened.count(tag) for tag in ("h1", "h2", "h3", "h4")),
        }, visit.source


def test_the_start_page_weighs_less_than_half_a_megabyte_as_a_host_sends_it(visits):
    (home,) = [visit for visit in visits if visit.url == ""]
    sizes = {}
    for url in {url for url in home.requests if url.startswith("http")}:
        with urllib.request.urlopen(url) as answer:
            sizes[url] = len(gzip.compress(answer.read()))
    assert not [url for url in sizes if "search_index" in url or "mermaid" in url]  # until somebody wants them
    assert sum(sizes.values()) < 500_000, sizes


def test_every_link_to_the_site_itself_leads_somewhere(visits, site):
    links = {link for visit in visits for link in visit.seen["links"] if link.startswith(site)}
    assert len(links) > len(visits)
    dead = {}
    for link in sorted(links):
        try:
            urllib.request.urlopen(link).close()
        except urllib.error.HTTPError as error:
            dead[link] = error.code
    assert dead == {}


def test_every_link_within_a_page_has_a_target(visits):
    assert not {visit.source: visit.seen["dead_fragments"] for visit in visits if visit.seen["dead_fragments"]}


def test_no_page_scrolls_sideways_on_a_phone(visits):
    assert not {v.source: v.width_on_phone for v in visits if max(v.width_on_phone.values()) > PHONE["width"]}


def test_notes_stand_beside_their_code_on_a_wide_screen_and_below_it_on_a_phone(visits):
    seen = 0
    for visit in visits:
        for code, notes in visit.wide:
            assert code[3] - code[1] > 20 and notes[3] - notes[1] > 20, f"an excerpt of {visit.source} is not visible"
            assert code[2] <= notes[0] + 1 and abs(code[1] - notes[1]) <= 1, visit.source
            seen += 1
        for code, notes in visit.narrow:
            assert code[3] <= notes[1] + 1, visit.source
            assert code[0] >= 0 and code[2] <= PHONE["width"] and notes[2] <= PHONE["width"], visit.source
    assert seen > 0


def test_the_code_stays_in_sight_while_a_longer_note_is_read(page, site):
    page.set_viewport_size({"width": 1120, "height": 900})  # narrow notes, so some are longer than their code
    page.goto(f"{site}annotated_trainers/dpo/")
    spare = [notes[3] - notes[1] - (code[3] - code[1]) for code, notes in page.evaluate(BOXES)]
    number = spare.index(max(spare))
    assert spare[number] > 60, "no note is longer than its code"
    page.evaluate("n => document.querySelectorAll('.excerpt')[n].scrollIntoView({ behavior: 'instant' })", number)
    code, notes = page.evaluate(BOXES)[number]
    header = page.evaluate("document.querySelector('.md-header').getBoundingClientRect().bottom")
    assert notes[1] < header - 30 and code[1] >= header - 1


@pytest.mark.parametrize("words", ["dpo trainer", "DPOTrainer"])
def test_the_search_finds_the_walkthrough_of_dpo_and_the_class_in_it(page, site, words):
    page.goto(site)
    page.keyboard.press("s")
    page.keyboard.type(words)
    results = page.locator(".md-search-result__item").first
    results.wait_for()
    page.wait_for_function("document.querySelectorAll('.md-search-result__item mark').length > 0")
    assert re.search(r"/annotated_trainers/dpo/", results.locator("a").first.get_attribute("href"))
    marked = page.locator(".md-search-result__list").inner_html()
    assert re.search(r"<mark[^>]*>DPO</mark><mark[^>]*>Trainer</mark>", marked)


def test_the_search_for_a_class_finds_the_walkthrough_of_its_trainer_first(page, site):
    first = {}
    for trainer in TRAINERS:
        text = (ROOT / "annotated_trainers" / f"{trainer}.md").read_text("utf-8")
        page.goto(site)
        page.keyboard.press("s")
        page.keyboard.type(re.search(r"\w+Trainer\b", quick_facts(text)["Import"])[0])
        link = page.locator(".md-search-result__item a[href*='h='][href$=trainer]").first  # the whole word was searched
        link.wait_for(state="attached")
        first[trainer] = page.locator(".md-search-result__item a").first.get_attribute("href")
    assert len(first) == 15
    assert {name for name, address in first.items() if f"/annotated_trainers/{name}/" not in address} == set()


def test_one_gets_from_the_home_page_over_the_walkthroughs_to_the_script_and_copies_it(page, site):
    page.goto(site)
    for link, address in (
        ("annotated_trainers/", "**/annotated_trainers/**"),
        ("dpo/", "**/annotated_trainers/dpo/**"),
        ("annotated_examples/dpo/", "**/annotated_examples/dpo/**"),
    ):
        page.locator(f".md-content a[href$='{link}']").first.click()
        page.wait_for_url(address)
    assert copied_script(page) == (ROOT / "annotated_examples/dpo.py").read_bytes()


def copied_script(page) -> bytes:
    page.evaluate("navigator.clipboard.writeText('nothing copied')")
    page.locator(".script button[data-md-type='copy'], .script button.md-clipboard").click()
    page.wait_for_function("navigator.clipboard.readText().then(text => text !== 'nothing copied')")
    return page.evaluate("navigator.clipboard.readText()").encode()


@pytest.mark.parametrize("script", sorted((ROOT / "annotated_examples").glob("*.py")), ids=lambda path: path.name)
def test_a_scripts_page_copies_and_downloads_the_file_to_the_last_byte(page, site, script):
    page.goto(f"{site}annotated_examples/{script.stem}/")
    assert copied_script(page) == script.read_bytes()
    with page.expect_download() as download:
        page.locator(".script-download").click()
    assert download.value.suggested_filename == script.name
    assert Path(download.value.path()).read_bytes() == script.read_bytes()


def test_a_copied_command_waits_for_the_enter_key(page, site):
    page.goto(f"{site}annotated_examples/dpo/")
    page.evaluate("navigator.clipboard.writeText('nothing copied')")
    page.locator(".highlight button").first.click()
    page.wait_for_function("navigator.clipboard.readText().then(text => text !== 'nothing copied')")
    command = page.evaluate("navigator.clipboard.readText()")
    assert command.startswith("python ") and not command.endswith("\n")


EACH_KIND = ("", "annotated_examples/dpo/", "annotated_trainers/newest_trl/", "reference_guides/notation/")
EACH_KIND += ("reference_guides/metrics/", "reference_guides/which_trainer/", "reference_guides/datasets/")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_fault_of_access_on_a_page_of_each_kind(browser, site, scheme):
    """Contrast, names for screen readers, reach by keyboard: what axe-core can see of them. `AXE=all` looks at every page."""
    faults = {}
    with window(browser, color_scheme=scheme, reduced_motion="reduce") as context:
        for url in sources() if os.environ.get("AXE") == "all" else EACH_KIND:
            tab = context.new_page()
            tab.goto(site + url)
            tab.add_script_tag(path=ROOT / "tools/site/node_modules/axe-core/axe.min.js")
            found = tab.evaluate("axe.run({ runOnly: ['wcag2a', 'wcag2aa', 'wcag21aa'] }).then(all => all.violations)")
            faults[url] = [f"{fault['id']}: {node['html'][:200]}" for fault in found for node in fault["nodes"]]
    assert not {url: found for url, found in faults.items() if found}


def test_the_colours_can_be_changed_by_keyboard(page, site):
    page.goto(site)
    seen = set()
    for _ in range(3):
        seen.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        page.locator(".md-header__option label:visible").focus()
        page.keyboard.press("Enter")
    assert len(seen) == 2


FILTERED = "reference_guides/metrics/"
SHOWN = """() => {
  const after = [...document.querySelectorAll(".filter-tables ~ *")]
  const seen = elements => elements.filter(element => element.offsetParent !== null)
  const rows = after.flatMap(element => [...element.querySelectorAll("tbody tr")])
  return {
    all: rows.length,
    rows: seen(rows).map(row => row.textContent.toLowerCase()),
    headings: seen(after).filter(element => element.tagName === "H2").length,
  }
}"""


def test_the_field_above_the_tables_keeps_the_rows_with_all_words(page, site):
    page.goto(site + FILTERED)
    field, before = page.get_by_label("Show the rows with these words"), page.evaluate(SHOWN)
    assert before["all"] == len(before["rows"]) > 100
    field.focus()
    page.keyboard.type("KL grpo")
    found = page.evaluate(SHOWN)
    assert found["rows"] == [row for row in before["rows"] if "kl" in row and "grpo" in row]
    assert 0 < len(found["rows"]) < 10
    assert 0 < found["headings"] < before["headings"]
    assert page.locator(".filter-tables output").inner_text() == f"{len(found['rows'])} of {before['all']} rows"
    page.keyboard.type(" nosuchword")
    nothing = page.evaluate(SHOWN)
    assert (nothing["rows"], nothing["headings"]) == ([], 0)
    page.keyboard.press("Escape")  # empties a search field
    assert page.evaluate(SHOWN) == before


def test_a_link_to_a_row_that_is_filtered_away_shows_all_rows_again(page, site):
    page.goto(f"{site}{FILTERED}#rewards-margins")
    before = page.evaluate(SHOWN)
    page.get_by_label("Show the rows with these words").fill("learning_rate ppo")
    assert len(page.evaluate(SHOWN)["rows"]) < before["all"]
    page.evaluate("location.hash = '#objective-kl'")
    page.wait_for_function("document.getElementById('objective-kl').offsetParent !== null")
    assert page.evaluate(SHOWN) == before
    top, field = (page.locator(x).bounding_box() for x in ("tr:has(> td > #objective-kl)", ".filter-tables"))
    assert field["y"] + field["height"] <= top["y"] + 1 < 900  # in sight, and not below the field that hangs there


def test_without_javascript_the_tables_are_whole_and_there_is_no_field(browser, site):
    with window(browser, java_script_enabled=False) as context:
        tab = context.new_page()
        tab.goto(site + FILTERED)
        assert tab.locator(".filter-tables").count() == 1
        assert not tab.locator(".filter-tables").is_visible()
        assert tab.locator(".filter-tables input").count() == 0
        assert tab.locator("#rewards-margins").count() == 1


def test_a_row_is_a_card_on_a_phone_so_that_nothing_scrolls_sideways(page, site):
    page.set_viewport_size(PHONE)
    page.goto(site + FILTERED)
    wide = page.evaluate(
        "[...document.querySelectorAll('.filter-tables ~ * td')].map(e => e.getBoundingClientRect().right)"
    )
    assert max(wide) <= PHONE["width"]


def test_the_menus_of_which_trainer_leave_the_ways_that_fit(page, site):
    page.goto(f"{site}reference_guides/which_trainer/")
    trainers, told = page.locator(".pick tbody tr:visible td:nth-child(2)"), page.locator(".pick [role=status]")
    assert trainers.all_inner_texts() == [NAMES[name] for _, name, _, _ in which.WAYS]
    page.get_by_label("You have").select_option("pairs: better, worse")
    page.get_by_label("Models in memory").select_option("at most 1")
    fits = [NAMES[name] for have, name, models, _ in which.WAYS if have.startswith("pairs") and models <= 1]
    assert trainers.all_inner_texts() == fits
    assert told.inner_text() == f"{len(fits)} of {len(which.WAYS)} ways fit."
    page.get_by_label("Samples while it trains").select_option("yes")
    assert trainers.count() == 0
    assert told.inner_text().startswith("No trainer fits")


def test_a_flag_in_a_line_stays_in_one_piece(page, site):
    page.set_viewport_size(PHONE)
    page.goto(f"{site}reference_guides/which_trainer/")
    flags = page.locator("code span", has_text="--")
    assert flags.count() >= 5
    for flag in flags.all():
        assert len(flag.evaluate("e => [...e.getClientRects()].map(b => b.top)")) == 1, flag.inner_text()


def test_a_long_line_of_an_excerpt_wraps_between_words_and_under_its_own_beginning(page, site):
    page.goto(f"{site}annotated_trainers/dpo/")
    seen = 0
    for number in (2, 40, 80):
        excerpt = page.locator(".excerpt").nth(number)
        excerpt.scroll_into_view_if_needed()
        breaks = excerpt.evaluate(
            """excerpt => [...excerpt.querySelectorAll('.excerpt__code [id^="__span"]')].flatMap(line => {
              const walker = document.createTreeWalker(line, NodeFilter.SHOW_TEXT), letters = []
              while (walker.nextNode()) [...walker.currentNode.data].forEach((letter, i) => {
                const range = document.createRange()
                range.setStart(walker.currentNode, i)
                range.setEnd(walker.currentNode, i + 1)
                if (letter.trim()) letters.push([letter, range.getBoundingClientRect()])
              })
              return letters.flatMap(([letter, box], i) => {
                const before = i && letters[i - 1]
                if (!before || box.top < before[1].bottom - 2) return []
                return [[before[0] + letter, box.left - letters[0][1].left, line.textContent]]
              })
            })"""
        )
        for pair, hangs, line in breaks:
            assert hangs > 0, line
            assert re.search(r"\W", pair) or pair[0] + " " + pair[1] in line, line
        seen += len(breaks)
        first = excerpt.locator('[id^="__span"]').first.bounding_box()
        button = excerpt.locator(".md-code__nav").bounding_box()
        assert button["y"] + button["height"] <= first["y"] + first["height"] + 1  # it hides nothing of the second line
    assert seen > 10


def test_a_long_line_of_an_excerpt_scrolls_on_a_phone(page, site):
    page.set_viewport_size(PHONE)
    page.goto(f"{site}annotated_trainers/kto/")
    for number in (2, 40, 80):
        excerpt = page.locator(".excerpt").nth(number)
        excerpt.scroll_into_view_if_needed()
        lines = excerpt.locator('[id^="__span"]')
        height, count = excerpt.locator("pre > code").evaluate("e => [e.clientHeight, e.scrollHeight]"), lines.count()
        assert height[0] == height[1] < 25 * (count + 2)  # a line of code is one line
    titles = page.locator(".excerpt__code .filename wbr")  # its name may break, behind an underscore
    assert titles.count() > 50
    assert titles.first.evaluate("e => getComputedStyle(e).display") == "inline"


def test_no_mark_is_left_alone_behind_a_short_formula(page, site):
    """Chromium would break the line between a formula and the comma behind it."""
    page.set_viewport_size(PHONE)
    page.goto(f"{site}reference_guides/preference_losses/")
    page.wait_for_function("[...document.querySelectorAll('.arithmatex')].every(e => e.querySelector('.katex'))")
    marks = page.evaluate(
        """() => [...document.querySelectorAll("span.arithmatex")].flatMap(formula => {
          const behind = formula.nextSibling
          if (behind?.nodeType !== Node.TEXT_NODE || !/^[,.;:!?)]/.test(behind.data)) return []
          const range = document.createRange()
          range.setStart(behind, 0)
          range.setEnd(behind, 1)
          const tex = formula.querySelector("annotation").textContent
          return [[tex.replace(/\\\\[a-z]+/gi, "x"), range.getBoundingClientRect().left < formula.getBoundingClientRect().left]]
        })"""
    )
    short = [alone for tex, alone in marks if len(tex) <= 24]
    assert len(short) > 20 and not any(short)


def test_the_menu_keeps_the_heading_that_is_read_in_sight(page, site):
    page.goto(f"{site}reference_guides/troubleshooting/")
    page.locator("#ppo-objectivekl-is-negative").scroll_into_view_if_needed()
    page.mouse.move(700, 400)
    page.mouse.wheel(0, 600)
    page.wait_for_function(
        """() => {
          const menu = document.querySelector(".md-sidebar--primary .md-sidebar__scrollwrap").getBoundingClientRect()
          const read = [...document.querySelectorAll(".md-nav--secondary .md-nav__link--active")].at(-1)
          const line = read?.getBoundingClientRect()
          return read?.textContent.includes("PPO") && line.top >= menu.top && line.bottom <= menu.bottom
        }""",
        timeout=5000,
    )


def test_no_other_page_has_the_field(page, site):
    page.goto(f"{site}reference_guides/notation/")
    assert page.locator(".filter-tables, #table-filter").count() == 0


# ---- for the trial only


def test_a_site_that_knows_its_repository_links_to_it_and_still_asks_no_other_host(browser, tmp_path):
    """With `repo_url` on a well known host, Material would ask that host for the number of stars."""
    for name in ("mkdocs.yml", "tools/site"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "README.md").write_text("# Home\n")
    stage.stage(tmp_path, render=lambda text, page: text, vendor=False)
    config = (
        (ROOT / "mkdocs.yml")
        .read_text("utf-8")
        .replace("# repo_url: https://git.example", "repo_url: https://github.com")
    )
    config = config.replace("# edit_uri:", "edit_uri:")
    (tmp_path / "mkdocs.yml").unlink()
    (tmp_path / "mkdocs.yml").write_text(config, "utf-8")
    subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict"], cwd=tmp_path, check=True, capture_output=True)
    requests = []
    with window(browser) as context:
        tab = context.new_page()
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto((tmp_path / "site/index.html").as_uri())
        tab.wait_for_timeout(1000)
        header, edit = tab.locator(".md-header .md-source"), tab.locator("a[rel=edit]")
        assert header.get_attribute("href") == "https://github.com/owner/name"
        assert edit.get_attribute("href") == "https://github.com/owner/name/edit/main/README.md"
    assert requests and all(url.startswith("file:") for url in requests)
