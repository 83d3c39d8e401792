// Building elements without markup strings: what a model writes is only ever text.

export const byId = (id) => document.getElementById(id);

/** element("button", {type: "button", onclick: f, "aria-label": "Stop"}, "Stop", child...) */
export function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (key.startsWith("data-") || key.startsWith("aria-") || key === "role") made.setAttribute(key, value);
    else if (key === "class") made.className = value;
    else made[key] = value;
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

export function announce(text) {
  byId("announce").textContent = text;
}
