// The conversation: shows the chosen branch, streams answers into it, edits and regenerates by branching.

import { streamChat } from "./api.js";
import { announce, byId, element } from "./dom.js";
import { copyText, render } from "./markdown.js";
import { Conversation, loadAll, saveAll } from "./store.js";

const STARTERS = [
  "Write a Python function that merges two sorted lists.",
  "Explain what a page table does, in three sentences.",
  "Turn this into JSON: Ada Lovelace, born 1815, London.",
  "Give me five names for a small sailing boat.",
];

export class Chat {
  constructor(settings) {
    this.settings = settings;
    this.all = loadAll();
    this.open = this.all[0] ?? this.begin();
    this.running = null; // {node, controller} while an answer streams
    this.log = byId("messages");
    this.stuck = true; // to the newest text
    this.log.addEventListener("scroll", () => this.scrolled());
    byId("jump").addEventListener("click", () => this.toEnd());
    byId("stop").addEventListener("click", () => this.stop());
    byId("new-chat").addEventListener("click", () => this.newChat());
    this.composer();
    this.draw();
  }

  composer() {
    const text = byId("composer-text");
    const fit = () => {
      text.style.height = "auto";
      text.style.height = `${text.scrollHeight + 2}px`;
    };
    text.addEventListener("input", fit);
    text.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        byId("composer").requestSubmit();
      }
    });
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.running || !text.value.trim()) return;
      this.ask(text.value);
      text.value = "";
      fit();
    });
  }

  // ---- conversations ----

  begin() {
    const made = new Conversation();
    this.all = [made, ...(this.all ?? []).filter((one) => !one.empty)];
    return made;
  }

  newChat() {
    this.stop();
    this.open = this.begin();
    this.draw();
    byId("composer-text").focus();
  }

  choose(conversation) {
    this.stop();
    this.open = conversation;
    this.stuck = true;
    this.draw();
  }

  remove(conversation) {
    if (conversation === this.open) this.stop();
    this.all = this.all.filter((one) => one !== conversation);
    if (conversation === this.open) this.open = this.all[0] ?? this.begin();
    saveAll(this.all);
    this.draw();
  }

  // ---- asking ----

  ask(content) {
    this.open.add(this.open.last.id, { role: "user", content });
    this.answer(this.open.last.id);
  }

  regenerate(node) {
    if (!this.running) this.answer(node.parent);
  }

  edit(node, content) {
    this.open.add(node.parent, { role: "user", content });
    this.answer(this.open.last.id);
  }

  giveResult(node, index, content) {
    this.open.add(this.open.last.id, { role: "tool", content, callId: node.calls[index].id, name: node.calls[index].name });
    const given = new Set(this.open.path().filter((one) => one.role === "tool").map((one) => one.callId));
    if (node.calls.every((call) => given.has(call.id))) this.answer(this.open.last.id);
    else this.draw();
  }

  messages(upTo) {
    const found = [];
    if (this.settings.values.system.trim()) found.push({ role: "system", content: this.settings.values.system });
    for (const node of this.open.path()) {
      const message = { role: node.role, content: node.content };
      if (node.role === "tool") message.tool_call_id = node.callId;
      if (node.calls?.length) {
        message.content = node.content || null;
        message.tool_calls = node.calls.map(({ id, name, args }) => ({ id, type: "function", function: { name, arguments: args } }));
      }
      const nothing = node.role === "assistant" && !node.content && !node.calls.length; // it failed: not part of the talk
      if (!nothing) found.push(message);
      if (node.id === upTo) break;
    }
    return found;
  }

  async answer(parentId) {
    const conversation = this.open;
    let body;
    try {
      body = { model: byId("model").value, ...this.settings.fields(), messages: this.messages(parentId) };
    } catch (error) {
      this.draw();
      announce(`Settings: ${error.message}`);
      byId("settings-error").textContent = error.message;
      return;
    }
    const node = conversation.add(parentId, { role: "assistant", content: "", reasoning: "", calls: [], pieces: 0 });
    const controller = new AbortController();
    const run = { node, controller, began: performance.now(), first: null, frame: 0 };
    this.running = run;
    this.stuck = true;
    this.draw();
    try {
      const { finish, usage } = await streamChat(body, { signal: controller.signal, onDelta: (delta) => this.take(run, delta) });
      node.finish = finish;
      this.measure(run, usage);
    } catch (error) {
      if (controller.signal.aborted) node.finish = "stopped";
      else node.error = error.message;
      this.measure(run, null);
    }
    cancelAnimationFrame(run.frame);
    if (this.running === run) this.running = null;
    saveAll(this.all);
    this.draw();
    announce(node.error ? `Error: ${node.error}` : node.finish === "stopped" ? "Stopped" : "Answer complete");
  }

  take(run, delta) {
    const { node } = run;
    run.first ??= performance.now();
    node.pieces += 1;
    node.content += delta.content ?? "";
    node.reasoning += delta.reasoning_content ?? delta.reasoning ?? "";
    for (const piece of delta.tool_calls ?? []) {
      const call = (node.calls[piece.index] ??= { id: "", name: "", args: "" });
      call.id ||= piece.id ?? "";
      call.name += piece.function?.name ?? "";
      call.args += piece.function?.arguments ?? "";
    }
    this.measure(run, null);
    run.frame ||= requestAnimationFrame(() => {
      run.frame = 0;
      if (this.running === run) this.redraw(run.node);
    });
  }

  /** Tokens as the server counts them, else pieces, which are about tokens. */
  measure(run, usage) {
    const { node } = run;
    const now = performance.now();
    const tokens = usage?.completion_tokens ?? Math.max(node.pieces - 1, 0);
    const seconds = (now - (run.first ?? now)) / 1000;
    const speed = tokens > 1 && seconds > 0.02 ? (tokens - 1) / seconds : null;
    const cached = usage?.prompt_tokens_details?.cached_tokens ?? null;
    node.stats = { tokens, exact: usage !== null, speed, ttft: run.first === null ? null : run.first - run.began, cached };
  }

  stop() {
    this.running?.controller.abort();
    this.running = null;
  }

  lastAnswer() {
    return this.open.path().findLast((node) => node.role === "assistant");
  }

  // ---- drawing ----

  draw() {
    const path = this.open.path();
    this.log.replaceChildren(...(path.length ? path.map((node) => this.message(node)) : [this.welcome()]));
    this.log.setAttribute("aria-busy", String(Boolean(this.running)));
    byId("stop").hidden = !this.running;
    byId("send").hidden = Boolean(this.running);
    this.list();
    if (this.stuck) this.toEnd();
  }

  list() {
    const rows = this.all.map((one) =>
      element(
        "li",
        { "data-open": one === this.open ? "" : null },
        element("button", { type: "button", class: "pick", title: one.title, "aria-current": one === this.open ? "true" : null, onclick: () => this.choose(one) }, one.title),
        one.empty ? null : element("button", { type: "button", class: "drop", "aria-label": `Delete ${one.title}`, onclick: () => this.remove(one) }, "✕"),
      ),
    );
    byId("conversations").replaceChildren(...rows);
  }

  welcome() {
    const starters = STARTERS.map((text) => element("button", { type: "button", onclick: () => this.ask(text) }, text));
    return element(
      "div",
      { class: "empty" },
      element("h2", {}, "What shall we write?"),
      element("p", {}, `${byId("model").value || "The model"} runs on this server. Nothing leaves it.`),
      element("div", { class: "starters" }, ...starters),
    );
  }

  message(node) {
    const who = { user: "You", assistant: "Answer", tool: `Result of ${node.name}` }[node.role];
    const made = element("article", { class: "message", "data-role": node.role, "data-id": node.id, "aria-label": who });
    made.append(element("div", { class: "who" }, who), element("div", { class: "body" }), element("div", { class: "under" }));
    this.fill(made, node);
    return made;
  }

  redraw(node) {
    const shown = this.log.querySelector(`[data-id="${node.id}"]`);
    if (shown) this.fill(shown, node);
    if (this.stuck) this.toEnd();
  }

  fill(shown, node) {
    const live = this.running?.node === node;
    const body = shown.querySelector(".body");
    if (node.role !== "assistant") body.textContent = node.content;
    else this.fillAnswer(body, node, live);
    this.under(shown.querySelector(".under"), node, live, shown);
  }

  fillAnswer(body, node, live) {
    const part = (name, make) => {
      let found = body.querySelector(`:scope > .${name}`);
      if (!found) body.append((found = make()));
      return found;
    };
    if (node.reasoning) {
      const box = part("thinking", () => element("details", { class: "thinking", open: live }, element("summary"), element("div")));
      box.firstChild.textContent = live && !node.content && !node.calls.length ? "Thinking…" : "Thoughts";
      box.lastChild.textContent = node.reasoning;
    }
    const text = part("text", () => element("div", { class: "text body" }));
    render(node.content, text);
    text.classList.toggle("cursor", live && !node.content && !node.reasoning && !node.calls.length);
    const calls = part("calls", () => element("div", { class: "calls" }));
    if (node.calls.length) calls.replaceChildren(...node.calls.map((call, i) => this.call(node, call, i, live)));
    if (node.error) part("error", () => element("p", { class: "error", role: "alert" })).textContent = node.error;
  }

  call(node, call, index, live) {
    const box = element("section", { class: "call", "aria-label": `Call of ${call.name}` }, element("h3", {}, "Calls ", element("code", {}, call.name)), element("pre", {}, call.args));
    const given = this.open.path().some((one) => one.role === "tool" && one.callId === call.id);
    if (!live && !given) {
      const input = element("input", { "aria-label": `Result of ${call.name}`, placeholder: "What does it return?" });
      const send = (event) => {
        event.preventDefault();
        if (!this.running) this.giveResult(node, index, input.value);
      };
      box.append(element("form", { onsubmit: send }, input, element("button", { type: "submit" }, "Give result")));
    }
    return box;
  }

  under(row, node, live, shown) {
    const parts = [];
    if (node.stats) parts.push(element("span", { class: "stats" }, stats(node)));
    const button = (label, name, act) => element("button", { type: "button", "aria-label": label, title: label, onclick: act, disabled: Boolean(this.running) }, name);
    const siblings = this.open.siblings(node);
    if (siblings.length > 1 && !live) {
      const at = siblings.indexOf(node.id);
      const turn = (step) => () => {
        this.open.turn(node, step);
        this.stuck = false;
        saveAll(this.all);
        this.draw();
      };
      const back = button("Previous version", "‹", turn(-1));
      const next = button("Next version", "›", turn(1));
      back.disabled ||= at === 0;
      next.disabled ||= at === siblings.length - 1;
      parts.push(element("span", { class: "branches", role: "group", "aria-label": `Version ${at + 1} of ${siblings.length}` }, back, `${at + 1}/${siblings.length}`, next));
    }
    if (!live && node.role === "user") parts.push(button("Edit this message", "Edit", () => this.startEdit(shown, node)));
    if (!live && node.role === "assistant") {
      const copy = button("Copy the answer", "Copy", () => copyText(node.content, copy));
      parts.push(copy, button("Write another answer", "Regenerate", () => this.regenerate(node)));
    }
    row.replaceChildren(...parts);
  }

  startEdit(shown, node) {
    const text = element("textarea", { value: node.content, "aria-label": "Edit your message" });
    const done = (event) => {
      event?.preventDefault();
      if (text.value.trim() && !this.running) this.edit(node, text.value);
    };
    text.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) done(event);
      if (event.key === "Escape") {
        event.stopPropagation();
        this.draw();
      }
    });
    const cancel = element("button", { type: "button", onclick: () => this.draw() }, "Cancel");
    const send = element("button", { type: "submit", class: "primary" }, "Send as a new version");
    shown.replaceChildren(element("form", { class: "edit", onsubmit: done }, text, element("div", {}, cancel, send)));
    text.focus();
  }

  scrolled() {
    const left = this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight;
    this.stuck = left < 40;
    byId("jump").hidden = left < 200;
  }

  toEnd() {
    this.stuck = true;
    this.log.scrollTop = this.log.scrollHeight;
  }
}

function stats(node) {
  const { tokens, speed, ttft, cached } = node.stats;
  const parts = [`${tokens} tokens`];
  if (speed !== null) parts.push(`${speed.toFixed(speed < 100 ? 1 : 0)} tokens/s`);
  if (ttft !== null) parts.push(`first after ${ttft < 1000 ? `${ttft.toFixed(0)} ms` : `${(ttft / 1000).toFixed(2)} s`}`);
  if (cached) parts.push(`${cached} cached`);
  const ends = { length: "cut at the limit", stopped: "stopped", tool_calls: "calls tools" };
  if (ends[node.finish]) parts.push(ends[node.finish]);
  return parts.join(" · ");
}
