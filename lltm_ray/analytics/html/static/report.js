/** Draws the report's figures in the page's own colours, and brings the reader from a finding to what shows it. */
(() => {
  const THEMES = ["auto", "light", "dark"];
  const CONFIG = { displayModeBar: false, responsive: true, scrollZoom: false, doubleClick: false, showTips: false };
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const plots = [...document.querySelectorAll("[data-chart]")];
  const paper = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  let known = new Map();
  let round = 0;

  /** What a CSS colour comes to now, as Plotly can read it. */
  function colour(css) {
    if (!known.has(css)) {
      const probe = document.body.appendChild(document.createElement("i"));
      probe.style.color = css;
      paper.clearRect(0, 0, 1, 1);
      paper.fillStyle = getComputedStyle(probe).color;
      paper.fillRect(0, 0, 1, 1);
      const [red, green, blue, alpha] = paper.getImageData(0, 0, 1, 1).data;
      known.set(css, `rgba(${red},${green},${blue},${(alpha / 255).toFixed(3)})`);
      probe.remove();
    }
    return known.get(css);
  }

  const isColour = (text) => typeof text === "string" && /^(var|color-mix)\(/.test(text);

  /** A copy with colours painted; only what is named a colour is one, for any text may look like it. */
  function painted(value, isPaint) {
    if (Array.isArray(value)) return value.map((each) => painted(each, isPaint));
    if (value === null || typeof value !== "object") return isPaint && isColour(value) ? colour(value) : value;
    return Object.fromEntries(Object.entries(value).map(([name, each]) => [name, painted(each, /color(scale)?$/.test(name))]));
  }

  function shared() {
    return {
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, color: colour("var(--ink)"), size: 12 },
      hoverlabel: {
        bgcolor: colour("var(--panel)"), bordercolor: colour("var(--muted)"), align: "left", namelength: -1,
        font: { color: colour("var(--ink)"), size: 12 },
      },
    };
  }

  async function draw(element) {
    const { data, layout, height } = figures[element.dataset.chart];
    await Plotly.react(element, painted(data, false), { ...shared(), ...painted(layout, false), height }, CONFIG);
    element.dataset.drawn = String(round);
  }

  /** One after the other from the top, so that the page can be read and scrolled meanwhile. */
  async function drawAll() {
    const mine = ++round;
    known = new Map();
    for (const element of plots) {
      await new Promise((go) => setTimeout(go));
      if (mine !== round) return;
      await draw(element);
    }
    document.body.dataset.drawn = String(mine);
  }

  // --- theme; a page from a disk may be refused a place to keep it

  function kept() {
    try {
      return localStorage.getItem("lltm-theme") ?? "auto";
    } catch {
      return "auto";
    }
  }

  function keep(name) {
    try {
      localStorage.setItem("lltm-theme", name);
    } catch {
      // it holds until the page is closed
    }
  }

  function applyTheme(name) {
    if (name === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = name;
    button.textContent = `Theme: ${name}`;
    button.dataset.name = name;
    drawAll();
  }

  const button = document.getElementById("theme");
  button.hidden = false;
  button.addEventListener("click", () => {
    const name = THEMES[(THEMES.indexOf(button.dataset.name) + 1) % THEMES.length];
    keep(name);
    applyTheme(name);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);

  // --- from a finding to a trace

  function openTarget() {
    const target = location.hash.length > 1 ? document.getElementById(location.hash.slice(1)) : null;
    const folded = target?.closest("details");
    if (!folded) return;
    folded.open = true;
    target.scrollIntoView({ block: "start" });
    target.focus({ preventScroll: true });
  }

  addEventListener("hashchange", openTarget);
  // The same link again moves no hash, and shall still open what was closed since.
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a[href^='#']");
    if (link && link.hash === location.hash) openTarget();
  });

  // --- where the reader is

  const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
  const inView = new Set();
  const watch = new IntersectionObserver((seen) => {
    for (const { target, isIntersecting } of seen) inView[isIntersecting ? "add" : "delete"](target.id);
    const first = [...links.keys()].find((id) => inView.has(id));
    for (const [id, link] of links) id === first ? link.setAttribute("aria-current", "true") : link.removeAttribute("aria-current");
  }, { rootMargin: "-15% 0px -60% 0px" });
  for (const id of links.keys()) if (document.getElementById(id)) watch.observe(document.getElementById(id));

  // --- paper

  let shownTheme;
  addEventListener("beforeprint", () => {
    shownTheme = button.dataset.name;
    document.documentElement.dataset.theme = "light";
    known = new Map();
    for (const element of plots) draw(element);
  });
  addEventListener("afterprint", () => applyTheme(shownTheme));

  applyTheme(kept());
  openTarget();
})();
