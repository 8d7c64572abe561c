// What the site does in the browser beyond Material: formulas, whole scripts to the clipboard, access by keyboard.

for (const element of document.querySelectorAll(".arithmatex")) {
  const tex = element.textContent.trim().replace(/^\\[([]|\\[)\]]$/g, "")
  katex.render(tex, element, { displayMode: element.tagName === "DIV", throwOnError: false })
}

// A long name in a table may break after a slash, a dot or a bracket: `completions/mean_length`. What is copied stays whole.
for (const code of document.querySelectorAll(".md-typeset table code")) {
  const walker = document.createTreeWalker(code, NodeFilter.SHOW_TEXT)
  const texts = []
  while (walker.nextNode()) texts.push(walker.currentNode)
  for (const text of texts) {
    const pieces = text.data.split(/(?<=[\/.([]+)(?=\w)/)
    if (pieces.length > 1) text.replaceWith(...pieces.flatMap((piece, i) => i ? [document.createElement("wbr"), piece] : piece))
  }
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
  const boxes = [...document.querySelectorAll(".katex-display, .md-typeset__scrollwrap, .highlight code")]
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
