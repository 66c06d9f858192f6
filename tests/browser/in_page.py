"""What tests ask the page, in its own language."""

FIGURES = """
Object.fromEntries([...document.querySelectorAll("[data-figure]")].map((e) => [e.dataset.figure, e.textContent]))
"""
ERRORS = """
Object.fromEntries(
  [...document.querySelectorAll("#errors li")].map((e) => [e.lastChild.textContent, Number(e.firstChild.textContent)]))
"""
PLACES = """
JSON.stringify([...document.querySelectorAll("main > *, .tile, .card, .slot, th")].map((e) => {
  const box = e.getBoundingClientRect();
  return [box.x, box.y, box.width, box.height];
}))
"""
ROWS = "document.querySelectorAll('#recent tr').length"
FOCUS_ROW = "document.querySelector('#recent tr').focus()"
OPEN_ROW = "document.querySelector('#recent tr').click()"
IS_OPEN = "document.querySelectorAll('#timeline .span').length"
FOCUSED_ROW = "document.activeElement.requestId"
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
DIALOG_OVERFLOW = """
(() => { const it = document.querySelector("#timeline-body"); return it.scrollWidth - it.clientWidth; })()
"""
SPAN_LABELS = """
[...document.querySelectorAll("#timeline .span")].map((e) => e.getAttribute("aria-label").split(",")[0])
"""
SPAN_BOXES = """
[...document.querySelectorAll("#timeline .span")].map((e) => [e.style.left, e.style.width, e.style.top].map(parseFloat))
"""
STATE = "document.querySelector('#state').dataset.state"
GROUND = "getComputedStyle(document.body).backgroundColor"

CONTRAST = """
(() => {
  const paper = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    paper.clearRect(0, 0, 1, 1);
    paper.fillStyle = colour;
    paper.fillRect(0, 0, 1, 1);
    return [...paper.getImageData(0, 0, 1, 1).data];
  };
  const linear = (part) => (part / 255 <= 0.04045 ? part / 255 / 12.92 : ((part / 255 + 0.055) / 1.055) ** 2.4);
  const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const under = (e) => {
    for (; e; e = e.parentElement) {
      const found = rgba(getComputedStyle(e).backgroundColor);
      if (found[3] === 255) return found;
    }
    return [255, 255, 255, 255];
  };
  const poor = new Set();
  for (const e of document.querySelectorAll("body *")) {
    const says = [...e.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!says || e.closest("svg") || e.closest(".unseen") || e.matches(":disabled") || !e.checkVisibility()) continue;
    const [low, high] = [rgba(getComputedStyle(e).color), under(e)].map(luminance).sort((one, other) => one - other);
    const ratio = (high + 0.05) / (low + 0.05);
    if (ratio < 4.5) poor.add(`${e.tagName} ${e.className} ${e.textContent.slice(0, 20)}: ${ratio.toFixed(2)}`);
  }
  return [...poor];
})()
"""
"""Texts whose contrast is below what WCAG 2 AA asks for (4.5; relative luminance as it defines it)."""
