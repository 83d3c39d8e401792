// Puts the page together: views, theme, settings, shortcuts.

import { health, models, setKey } from "./api.js";
import { Chat } from "./chat.js";
import { Dashboard } from "./dashboard.js";
import { announce, byId, element } from "./dom.js";
import { Settings } from "./settings.js";

const HEALTH = { ready: "Ready", starting: "Not ready", down: "Unreachable" };

const settings = new Settings((changed) => {
  setKey(changed.values.apiKey ?? "");
  byId("mode").textContent = changed.mode();
});
const chat = new Chat(settings);
const dashboard = new Dashboard();

function show(view) {
  const chats = view === "chat";
  byId("view-chat").hidden = !chats;
  byId("view-dashboard").hidden = chats;
  byId("toggle-panel").hidden = byId("toggle-list").hidden = !chats;
  byId("tab-chat").toggleAttribute("aria-current", false);
  byId("tab-dashboard").toggleAttribute("aria-current", false);
  byId(`tab-${view}`).setAttribute("aria-current", "page");
  if (chats) dashboard.stop();
  else dashboard.start();
  history.replaceState(null, "", chats ? location.pathname : "#dashboard");
}

function theme() {
  const root = document.documentElement;
  root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
  try {
    localStorage.setItem("jaxllm.theme", root.dataset.theme);
  } catch {
    announce("The theme is not remembered: this browser forbids it");
  }
  dashboard.draw();
  announce(`${root.dataset.theme} theme`);
}

function panel(open = byId("panel").hidden) {
  byId("panel").hidden = !open;
  byId("toggle-panel").setAttribute("aria-expanded", String(open));
  if (open) byId("temperature").focus();
}

function sidebar() {
  const shown = byId("sidebar").toggleAttribute("data-shown");
  byId("toggle-list").setAttribute("aria-expanded", String(shown));
}

async function loadModels() {
  try {
    const found = await models();
    byId("model").replaceChildren(...found.map((id) => element("option", { value: id }, id)));
    byId("model").title = byId("model").value;
    byId("model").toggleAttribute("data-single", found.length === 1);
    document.title = `${found[0]} · jaxllm`;
    if (chat.open.empty && !chat.running) chat.draw();
  } catch (error) {
    announce(`No models: ${error.message}`);
  }
}

async function watchHealth() {
  const state = await health();
  byId("health").dataset.state = state;
  if (byId("health").textContent !== HEALTH[state]) {
    byId("health").textContent = HEALTH[state];
    if (state === "ready") await loadModels();
  }
}

const SHORTCUTS = [
  { keys: "/", does: "Write a message", when: (e) => e.key === "/" && !typing(e), act: () => (show("chat"), byId("composer-text").focus()) },
  { keys: "Esc", does: "Stop the answer, or close the settings", when: (e) => e.key === "Escape", act: () => (chat.running ? chat.stop() : panel(false)) },
  { keys: "Alt N", does: "New chat", when: (e) => e.altKey && e.code === "KeyN", act: () => (show("chat"), chat.newChat()) },
  { keys: "Alt R", does: "Write another answer", when: (e) => e.altKey && e.code === "KeyR", act: () => chat.lastAnswer() && chat.regenerate(chat.lastAnswer()) },
  { keys: "Alt S", does: "Settings", when: (e) => e.altKey && e.code === "KeyS", act: () => (show("chat"), panel()) },
  { keys: "Alt D", does: "Chat or dashboard", when: (e) => e.altKey && e.code === "KeyD", act: () => show(byId("view-chat").hidden ? "chat" : "dashboard") },
  { keys: "Alt T", does: "Light or dark", when: (e) => e.altKey && e.code === "KeyT", act: theme },
  { keys: "?", does: "These keys", when: (e) => e.key === "?" && !typing(e), act: () => byId("help").showModal() },
];

function typing(event) {
  return event.target.matches("input, textarea, select") || event.ctrlKey || event.metaKey || event.altKey;
}

document.addEventListener("keydown", (event) => {
  if (event.defaultPrevented || event.isComposing || byId("help").open) return;
  const found = SHORTCUTS.find((one) => one.when(event));
  if (!found) return;
  event.preventDefault();
  found.act();
});
byId("keys").append(
  ...SHORTCUTS.map(({ keys, does }) => element("tr", {}, element("td", {}, ...keys.split(" ").flatMap((key) => [element("kbd", {}, key), " "])), element("td", {}, does))),
);
byId("tab-chat").addEventListener("click", () => show("chat"));
byId("tab-dashboard").addEventListener("click", () => show("dashboard"));
byId("toggle-theme").addEventListener("click", theme);
byId("toggle-panel").addEventListener("click", () => panel());
byId("toggle-list").addEventListener("click", sidebar);
byId("conversations").addEventListener("click", () => byId("sidebar").removeAttribute("data-shown"));
byId("show-help").addEventListener("click", () => byId("help").showModal());
byId("api-key").addEventListener("change", loadModels);
show(location.hash === "#dashboard" ? "dashboard" : "chat");
watchHealth();
setInterval(() => document.hidden || watchHealth(), 5000);
if (!matchMedia("(max-width: 46rem)").matches && !byId("view-chat").hidden) byId("composer-text").focus();
