/** Making and changing elements. Text goes in as text only: names on this page were made by clients. */

export const byId = (id) => document.getElementById(id);

export function make(tag, options = {}, ...children) {
  const { className = "", text = "", ...attributes } = options;
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text) element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** Touch the page only where something is new: a selection stays, nothing is laid out again. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export function show(element, isShown) {
  if (element.hidden === isShown) element.hidden = !isShown;
}

export function setWidth(element, ratio) {
  const percent = Number.isFinite(ratio) ? Math.min(Math.max(ratio, 0), 1) * 100 : 0;
  element.style.width = `${percent.toFixed(2)}%`;
}

/**
 * One child of `parent` for each item, in order. Elements keep their item, so focus, hover and selection stay with it;
 * one that is in place already is never moved, since moving takes its focus.
 */
export function keyed(parent, items, keyOf, create, update) {
  const known = (parent.known ??= new Map());
  const wanted = new Set(items.map(keyOf));
  for (const [key, element] of known) {
    if (wanted.has(key)) continue;
    element.remove();
    known.delete(key);
  }
  let next = parent.firstElementChild;
  for (const item of items) {
    const key = keyOf(item);
    let element = known.get(key);
    if (!element) known.set(key, (element = create(item)));
    if (element === next) next = next.nextElementSibling;
    else parent.insertBefore(element, next);
    update(element, item);
  }
}
