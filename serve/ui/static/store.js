// Conversations as trees of messages: editing and regenerating add a sibling, nothing is overwritten. Kept in this
// browser's storage when that is allowed.

const KEY = "jaxllm.conversations";
const MAX_KEPT = 50;

export const newId = () => Math.random().toString(36).slice(2, 10);

export class Conversation {
  constructor(data = {}) {
    this.id = data.id ?? newId();
    this.title = data.title ?? "New chat";
    this.nodes = data.nodes ?? { root: { id: "root", role: "root", children: [], chosen: 0 } };
  }

  /** The messages from the first to the newest along the chosen branches. */
  path() {
    const found = [];
    let node = this.nodes.root;
    while (node.children.length) {
      node = this.nodes[node.children[node.chosen]];
      found.push(node);
    }
    return found;
  }

  /** Adds a message under `parent` and chooses it. */
  add(parentId, message) {
    const parent = this.nodes[parentId];
    const node = { id: newId(), parent: parentId, children: [], chosen: 0, ...message };
    this.nodes[node.id] = node;
    parent.children.push(node.id);
    parent.chosen = parent.children.length - 1;
    if (message.role === "user" && parentId === "root") this.title = message.content.trim().slice(0, 60) || this.title;
    return node;
  }

  siblings(node) {
    return this.nodes[node.parent].children;
  }

  /** Chooses the branch `step` to the left or right of this one. */
  turn(node, step) {
    const parent = this.nodes[node.parent];
    parent.chosen = Math.min(Math.max(parent.children.indexOf(node.id) + step, 0), parent.children.length - 1);
  }

  get last() {
    return this.path().at(-1) ?? this.nodes.root;
  }

  get empty() {
    return this.nodes.root.children.length === 0;
  }

  toJSON() {
    return { id: this.id, title: this.title, nodes: this.nodes };
  }
}

export function loadAll() {
  try {
    return JSON.parse(localStorage.getItem(KEY) ?? "[]").map((data) => new Conversation(data));
  } catch {
    return []; // storage forbidden, or not ours: begin anew
  }
}

export function saveAll(conversations) {
  try {
    localStorage.setItem(KEY, JSON.stringify(conversations.filter((one) => !one.empty).slice(0, MAX_KEPT)));
  } catch {
    return false; // forbidden or full: the page works on without
  }
  return true;
}

export function loadSettings(defaults) {
  try {
    return { ...defaults, ...JSON.parse(localStorage.getItem("jaxllm.settings") ?? "{}") };
  } catch {
    return { ...defaults };
  }
}

export function saveSettings(settings) {
  try {
    const { apiKey, ...kept } = settings;
    localStorage.setItem("jaxllm.settings", JSON.stringify(kept));
    sessionStorage.setItem("jaxllm.key", apiKey ?? "");
  } catch {
    return false;
  }
  return true;
}

export function loadKey() {
  try {
    return sessionStorage.getItem("jaxllm.key") ?? "";
  } catch {
    return "";
  }
}
