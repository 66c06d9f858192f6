/** The face of ChatWidget. Everything said is set as textContent: it was written by people and models. */

const HINT = "Enter sends, Shift+Enter begins a new line";

function make(tag, options = {}, ...children) {
  const { text = "", ...attributes } = options;
  const element = document.createElement(tag);
  if (text) element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function message(role, content) {
  const who = { user: "You", assistant: "Model" }[role] ?? role;
  const said = make("div", { class: "said", text: content, dir: "auto" });
  return make("article", { class: `message ${role}`, "aria-label": who }, make("div", { class: "who", text: who }), said);
}

function field(label, input) {
  return make("label", {}, make("span", { text: label }), input);
}

/** Bring `list` to these messages; those that are the same stay, so that a selection in them does too. */
function showHistory(list, history) {
  const known = list.known ?? [];
  let same = 0;
  while (same < known.length && same < history.length && known[same].content === history[same].content) same += 1;
  while (list.children.length > same) list.lastChild.remove();
  list.append(...history.slice(same).map(({ role, content }) => message(role, content)));
  list.known = history;
}

/** The page's elements by name, put together in `el`. */
function build(el) {
  const it = {
    history: make("div", { class: "history", role: "log", "aria-label": "Conversation" }),
    question: message("user", ""),
    draft: message("assistant", ""),
    note: make("div", { class: "note", role: "status" }),
    text: make("textarea", { rows: "2", "aria-label": "Message", placeholder: HINT }),
    send: make("button", { type: "submit", text: "Send" }),
    stop: make("button", { type: "button", text: "Stop" }),
    clear: make("button", { type: "button", text: "Clear" }),
    system: make("textarea", { rows: "2" }),
    temperature: make("input", { type: "number", min: "0", max: "2", step: "0.1" }),
    max_tokens: make("input", { type: "number", min: "1", step: "1" }),
  };
  it.scroll = make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Messages" });
  it.scroll.append(it.history, it.question, it.draft);
  const fields = [
    field("System prompt", it.system),
    field("Temperature", it.temperature),
    field("Longest answer, tokens", it.max_tokens),
  ];
  const settings = make("details", {}, make("summary", { text: "Settings" }), make("div", { class: "fields" }, ...fields));
  const buttons = make("div", { class: "buttons" }, it.send, it.stop, it.clear, it.note);
  it.form = make("form", { class: "ask" }, it.text, buttons);
  el.classList.add("lltm-chat");
  el.replaceChildren(it.scroll, it.form, settings);
  return it;
}

/** Settings of the kernel go in where they are new; what somebody types meanwhile stays. */
function showSettings(it, settings, shown) {
  for (const [name, value] of Object.entries(settings)) {
    if (shown[name] !== value) it[name].value = String(value);
    shown[name] = value;
  }
}

function render({ model, el }) {
  const it = build(el);
  const shown = {};
  let sent = "";

  function followed(change) {
    const isAtEnd = it.scroll.scrollHeight - it.scroll.scrollTop - it.scroll.clientHeight < 40;
    change();
    if (isAtEnd) it.scroll.scrollTop = it.scroll.scrollHeight;
  }

  function showDraft() {
    followed(() => (it.draft.lastChild.textContent = model.get("draft") || "\u2026"));
  }

  function showState() {
    const { history = [], settings = {}, asked = "", note = "", failed = false, busy = false } = model.get("state");
    followed(() => {
      showHistory(it.history, history);
      it.question.hidden = it.draft.hidden = !busy;
      it.question.lastChild.textContent = asked;
    });
    showSettings(it, settings, shown);
    it.note.textContent = busy ? "answering" : note;
    it.note.classList.toggle("failed", failed);
    it.send.disabled = busy;
    it.stop.disabled = !busy;
    it.clear.disabled = !busy && history.length === 0;
    el.setAttribute("aria-busy", String(busy));
    if (failed && !it.text.value) it.text.value = sent;
    sent = busy ? asked : "";
    showDraft();
  }

  function send() {
    const text = it.text.value;
    if (!text.trim() || it.send.disabled) return;
    const settings = { system: it.system.value, temperature: it.temperature.value, max_tokens: it.max_tokens.value };
    sent = text;
    it.text.value = "";
    model.send({ kind: "send", text, settings });
  }

  it.form.addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  it.text.addEventListener("keydown", (event) => {
    event.stopPropagation(); // the notebook has shortcuts of its own
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  it.stop.addEventListener("click", () => model.send({ kind: "stop" }));
  it.clear.addEventListener("click", () => model.send({ kind: "clear" }));
  model.on("change:state", showState);
  model.on("change:draft", showDraft);
  showState();
  return () => {
    model.off("change:state", showState);
    model.off("change:draft", showDraft);
  };
}

export default { render };
