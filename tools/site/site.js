// What the site does in the browser beyond Material: formulas, whole scripts to the clipboard, access by keyboard.

// What there is much of is done from the top of the page to its end, a few at a time, so that the page can be read and
// scrolled meanwhile. A link into the page waits for all of it: what is above its target must have its height.
const inSlices = (elements, handle, end) => {
  const waiting = [...elements]
  const some = () => {
    const until = location.hash ? Infinity : performance.now() + 20
    while (waiting.length && performance.now() < until) handle(waiting.shift())
    if (waiting.length) setTimeout(some)
    else end?.()
  }
  some()
}

// Formulas
{
  const set = element => {
    const tex = element.textContent.trim().replace(/^\\[([]|\\[)\]]$/g, "")
    katex.render(tex, element, { displayMode: element.tagName === "DIV", throwOnError: false })
    const behind = element.nextSibling
    const mark = behind?.nodeType === Node.TEXT_NODE && element.tagName === "SPAN" && /^[,.;:!?)]+/.exec(behind.data)
    if (!mark || tex.replace(/\\[a-z]+/gi, "x").length > 24) return // a long formula has to break somewhere
    const whole = document.createElement("span") // or the mark would begin the next line
    whole.style.whiteSpace = "nowrap"
    behind.data = behind.data.slice(mark[0].length)
    element.replaceWith(whole)
    whole.append(element, mark[0])
  }
  inSlices(document.querySelectorAll(".arithmatex"), set, () => makeScrollersFocusable())
}

// Code in a line breaks after a slash, a dot or a bracket (`completions/mean_length`), and a long name behind its
// underscores, where it stands in a table or is very long, and never behind the hyphens of a flag. What is copied stays
// whole.
const BREAKS = /(?<=[\/.([]+)(?=[\w~])/
const breakable = code => code.split(BREAKS).flatMap(word => word.length > 20 ? word.split(/(?<=\w_)(?=[a-z])/) : [word])
for (const code of document.querySelectorAll(".md-typeset :not(pre) > code")) {
  const inTable = code.closest("table")
  if (!inTable && !/(^|\s)-|\S{31}/.test(code.textContent)) continue
  const walker = document.createTreeWalker(code, NodeFilter.SHOW_TEXT)
  const texts = []
  while (walker.nextNode()) texts.push(walker.currentNode)
  for (const text of texts) {
    const pieces = text.data.split(/((?<!\S)-[^\s/.([]+)/).flatMap(part => {
      if (part.startsWith("-")) {
        const flag = document.createElement("span")
        flag.style.whiteSpace = "nowrap"
        flag.textContent = part
        return [flag]
      }
      const words = inTable || part.length > 30 ? breakable(part) : [part]
      return words.flatMap((word, i) => i ? [document.createElement("wbr"), word] : [word])
    }).filter(piece => piece !== "")
    if (pieces.length > 1 || pieces[0] instanceof Element) text.replaceWith(...pieces)
  }
}

for (const title of document.querySelectorAll(".excerpt__code .filename")) { // `KTOTrainer._compute_loss`
  const parts = title.textContent.split(/(?<=[._])(?=\w)/)
  title.replaceChildren(...parts.flatMap((part, i) => i ? [document.createElement("wbr"), part] : [part]))
}

// A long line of an excerpt wraps: behind a dot, a bracket or a comma, and the rest hangs under the line's own beginning.
inSlices(document.querySelectorAll('.excerpt__code [id^="__span"]'), line => {
  const code = line.textContent
  if (code.length < 45) return // fits
  line.style.setProperty("--indentation", `${/^ */.exec(code)[0].length}ch`)
  if (/\S{20}/.test(code)) for (const mark of line.querySelectorAll(".p, .o")) mark.after(document.createElement("wbr"))
})

for (const cell of document.querySelectorAll(".md-typeset td")) cell.classList.toggle("words", cell.textContent.length > 60)

// Beside `toc.integrate`, Material's `toc.follow` does nothing: the menu keeps the heading in sight that is being read.
{
  const menu = document.querySelector(".md-sidebar--primary .md-sidebar__scrollwrap")
  const titles = menu?.querySelector(".md-nav--secondary")
  const follow = () => {
    const read = [...titles.querySelectorAll(".md-nav__link--active")].at(-1)
    if (!read || !matchMedia("(min-width: 76.25em)").matches) return
    const [box, line] = [menu, read].map(element => element.getBoundingClientRect())
    if (line.top < box.top || line.bottom > box.bottom) menu.scrollTop += line.top - box.top - box.height / 3
  }
  let asked
  if (titles) new MutationObserver(() => {
    cancelAnimationFrame(asked)
    asked = requestAnimationFrame(follow)
  }).observe(titles, { attributeFilter: ["class"], subtree: true })
}

// Material copies what the eye sees, less the white space at the end. The text itself is better: a script's page copies
// the file to the last byte, and a wrapped line stays one line. Elsewhere the last line break is left out, so that a
// command pasted into a terminal waits for the Enter key.
document.addEventListener("click", event => {
  const button = event.target.closest?.("[data-clipboard-target]")
  if (!button) return
  const text = document.querySelector(button.dataset.clipboardTarget).textContent
  button.dataset.clipboardText = button.closest(".script") ? text : text.trimEnd()
}, { capture: true })

// A box that scrolls sideways must be reachable by keyboard.
function makeScrollersFocusable() {
  const boxes = [...document.querySelectorAll(".katex-display, .arithmatex, .md-typeset__scrollwrap, pre > code, .mermaid")]
  const scrolls = boxes.map(box => box.scrollWidth > box.clientWidth) // all reading before all writing: one layout
  boxes.forEach((box, i) => scrolls[i] ? box.setAttribute("tabindex", "0") : box.removeAttribute("tabindex"))
}
addEventListener("load", makeScrollersFocusable)
addEventListener("resize", makeScrollersFocusable)

document.querySelector(".md-search")?.setAttribute("aria-label", "Search") // a dialog without a name says nothing

// A search field where a page has <div class="filter-tables">: of the tables below it, the rows with all of its words stay.
// Headings and text between them go with their table. Without JavaScript nothing is missing but the field.
function addFilter(mark) {
  mark.innerHTML = `<label for="table-filter">Show the rows with these words</label>
    <input id="table-filter" type="search" placeholder="kl grpo" autocomplete="off" spellcheck="false">
    <output for="table-filter" aria-live="polite"></output>`
  const [field, output] = [mark.querySelector("input"), mark.querySelector("output")]
  const rowsOf = element => [...element.querySelectorAll("tbody tr")]
  function filter() {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean)
    let part = [], total = 0, shown = 0 // a heading and what follows it, up to the next one
    const close = () => {
      const left = part.flatMap(rowsOf).filter(row => !row.hidden).length
      part.forEach(element => { element.hidden = words.length > 0 && left === 0 })
      shown += left
    }
    for (let element = mark.nextElementSibling; element; element = element.nextElementSibling) {
      if (element.tagName === "H2") {
        close()
        part = []
      }
      for (const row of rowsOf(element)) {
        const text = row.textContent.toLowerCase()
        row.hidden = !words.every(word => text.includes(word))
        total += 1
      }
      part.push(element)
    }
    close()
    const above = mark.previousElementSibling // the field may hang at the top of the window, far below its place
    if (above?.getBoundingClientRect().bottom < 0) above.scrollIntoView()
    output.textContent = words.length ? `${shown} of ${total} rows` : ""
    makeScrollersFocusable()
  }
  field.addEventListener("input", filter)
  addEventListener("hashchange", () => { // a link to a row that is out of sight
    const row = document.getElementById(decodeURIComponent(location.hash.slice(1)))
    if (!row?.closest("[hidden]")) return
    field.value = ""
    filter()
    row.scrollIntoView()
  })
}
document.querySelectorAll(".filter-tables").forEach(addFilter)

// "Which trainer?": the rows of a table in `.pick` are narrowed down by menus, one for each column that `data-pick` names.
// A number means "at most". Without JavaScript all rows are there.
for (const box of document.querySelectorAll(".pick")) {
  const table = box.querySelector("table")
  const titles = [...table.tHead.rows[0].cells].map(cell => cell.textContent.trim())
  const rows = [...table.tBodies[0].rows].map(row => [row, [...row.cells].map(cell => cell.textContent.trim())])
  const form = document.createElement("form")
  const told = document.createElement("p")
  told.setAttribute("role", "status")
  const menus = box.dataset.pick.split(", ").map(title => {
    const column = titles.indexOf(title)
    const values = [...new Set(rows.map(([, cells]) => cells[column]))]
    const numbers = values.every(value => Number(value))
    const label = document.createElement("label"), menu = document.createElement("select")
    menu.append(new Option("any", ""))
    if (numbers) values.sort((a, b) => a - b)
    for (const value of values) menu.append(new Option(numbers ? `at most ${value}` : value, value))
    label.append(title, menu)
    form.append(label)
    return { menu, fits: cells => !menu.value || (numbers ? +cells[column] <= +menu.value : cells[column] === menu.value) }
  })
  form.addEventListener("change", () => {
    for (const [row, cells] of rows) row.hidden = !menus.every(({ fits }) => fits(cells))
    const left = rows.filter(([row]) => !row.hidden)
    told.textContent = left.length ? `${left.length} of ${rows.length} ways fit.` : "No trainer fits all of this: take one answer back."
  })
  box.prepend(form, told)
}

// What is far away has an estimated height until it comes near (content-visibility), so a link into the page is followed
// again until what lies around its target has its place, or the reader moves.
addEventListener("load", () => {
  const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)))
  if (!target) return
  const stop = new AbortController()
  for (const kind of ["wheel", "touchstart", "keydown", "pointerdown", "input", "hashchange"])
    addEventListener(kind, () => stop.abort(), { signal: stop.signal })
  let frames = 30
  const follow = () => {
    if (stop.signal.aborted || !frames--) return stop.abort()
    target.scrollIntoView({ behavior: "instant" })
    requestAnimationFrame(follow)
  }
  follow()
})
