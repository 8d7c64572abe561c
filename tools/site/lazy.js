// What weighs most comes last: the index of the search when somebody is about to search, Mermaid when a diagram comes near
// the window. This runs before Material's script, which would ask for both at once.

{
  const { open, send } = XMLHttpRequest.prototype
  XMLHttpRequest.prototype.open = function (method, url, ...more) {
    this.isIndex = String(url).endsWith("/search/search_index.json")
    return open.call(this, method, url, ...more)
  }
  XMLHttpRequest.prototype.send = function (body) {
    if (!this.isIndex || new URLSearchParams(location.search).has("q")) return send.call(this, body)
    const stop = new AbortController()
    const go = event => {
      if (!event.target.closest?.(".md-search, [for=__search]")) return
      stop.abort()
      send.call(this, body)
    }
    for (const kind of ["focusin", "pointerover"]) document.addEventListener(kind, go, { signal: stop.signal })
  }

  const source = document.currentScript.dataset.mermaid
  // Material's colours, which follow light and dark, fit Mermaid's classic look. Its newer one has colours of its own: light
  // words on light boxes in the dark. Material also misses the arrowheads, whose names it takes to be fixed.
  const arrows = "[id$=-arrowhead] path { fill: var(--md-mermaid-sequence-message-line-color); stroke: none }" +
    ".actor-line { stroke-opacity: .4 }" // words cross it
  const flowchart = { wrappingWidth: innerWidth < 700 ? 120 : 260 } // narrow boxes for a phone: larger words
  const sequence = { wrap: true, width: 150, actorMargin: 24 } // a message is no wider than the way between its two
  let settings, loaded

  const load = () => loaded ??= new Promise((resolve, reject) => {
    const script = Object.assign(document.createElement("script"), { src: source, onload: resolve, onerror: reject })
    document.head.append(script)
  }).then(() => mermaid.initialize(
    { ...settings, themeCSS: settings.themeCSS + arrows, look: "classic", theme: "default", flowchart, sequence },
  ))

  // A wide diagram is scaled down to a half, on a phone to two thirds, where its words can still be read, and scrolls then.
  const least = innerWidth < 700 ? 0.66 : 0.5
  const readable = ({ svg, ...more }) => {
    setTimeout(() => window.makeScrollersFocusable?.())
    return { svg: svg.replace(/max-width: ([\d.]+)px/, (size, width) => `${size}; min-width: ${width * least}px`), ...more }
  }

  const near = element => new Promise(resolve => {
    new IntersectionObserver((entries, observer) => {
      if (!entries.some(entry => entry.isIntersecting)) return
      observer.disconnect()
      resolve()
    }, { rootMargin: "50% 0px" }).observe(element)
    addEventListener("beforeprint", resolve)
  })

  window.mermaid = { // until the real one takes its place
    initialize: given => { settings = given },
    async render(id, text) {
      await near([...document.querySelectorAll("pre.mermaid")].find(element => element.textContent === text))
      await load()
      return readable(await mermaid.render(id, text))
    },
  }
}
