/** Five minutes of requests and tokens, drawn by Plotly in the page's own colours. */

const CONFIG = { displayModeBar: false, responsive: true, scrollZoom: false, doubleClick: false, showTips: false };

/** Computed colours: Plotly does not know CSS variables. */
function colours(element) {
  const probe = element.appendChild(document.createElement("i"));
  const read = (name) => {
    probe.style.color = `var(--${name})`;
    return getComputedStyle(probe).color;
  };
  const found = Object.fromEntries(
    ["ink", "muted", "line", "panel", "accent", "accent-faint", "bad"].map((name) => [name, read(name)]),
  );
  probe.remove();
  return found;
}

function layout(paint, font) {
  const axis = {
    fixedrange: true,
    zeroline: false,
    gridcolor: paint.line,
    tickfont: { color: paint.muted, size: 11 },
    automargin: false,
  };
  const upright = { ...axis, rangemode: "tozero", nticks: 4, tickformat: "~s" };
  // An idle fleet is a line at the bottom, not an axis of thousandths.
  const least = (value) => ({ autorangeoptions: { include: value } });
  const heading = (text, y) => ({
    text, x: 0, y, xref: "paper", yref: "paper", xanchor: "left", yanchor: "bottom", showarrow: false,
    font: { color: paint.muted, size: 11 },
  });
  return {
    margin: { l: 40, r: 8, t: 18, b: 24 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: font, color: paint.ink },
    showlegend: false,
    dragmode: false,
    hovermode: "x unified",
    hoverlabel: { bgcolor: paint.panel, bordercolor: paint.line, font: { color: paint.ink, size: 12 } },
    uirevision: "kept",
    xaxis: { ...axis, type: "date", anchor: "y2", showgrid: false, nticks: 6, tickformat: "%H:%M", hoverformat: "%H:%M:%S" },
    yaxis: { ...upright, ...least(4), domain: [0.57, 1] },
    yaxis2: { ...upright, ...least(20), domain: [0, 0.43] },
    annotations: [heading("requests per second", 1), heading("generated tok/s", 0.43)],
  };
}

function traces(history, paint) {
  const x = history.unix_s.map((second) => new Date(second * 1000));
  const line = (name, y, colour, axis) => ({
    x, y, name, type: "scatter", mode: "lines", yaxis: axis, line: { color: colour, width: 1.25, shape: "hv" },
  });
  const area = { fill: "tozeroy", fillcolor: paint["accent-faint"] };
  return [
    { ...line("requests", history.requests, paint.accent, "y"), ...area },
    line("errors", history.errors, paint.bad, "y"),
    { ...line("tok/s", history.output_tokens, paint.accent, "y2"), ...area },
  ];
}

export class Chart {
  constructor(element) {
    this.element = element;
  }

  /** Nothing is drawn until Plotly, which is large, has come. */
  draw(history) {
    this.history = history;
    if (!globalThis.Plotly || !history) return;
    this.paint ??= colours(this.element);
    this.layout ??= layout(this.paint, getComputedStyle(document.body).fontFamily);
    globalThis.Plotly.react(this.element, traces(history, this.paint), this.layout, CONFIG);
  }

  /** After light became dark, or the reverse. */
  repaint() {
    this.paint = this.layout = undefined;
    this.draw(this.history);
  }
}
