// The settings panel: reads and writes its form, and turns it into the fields of a request.

import { byId, element } from "./dom.js";
import { loadKey, loadSettings, saveSettings } from "./store.js";

const SLIDERS = [
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.05, value: 0.7 },
  { name: "top_p", label: "Top-p", min: 0, max: 1, step: 0.01, value: 1 },
  { name: "top_k", label: "Top-k (0: off)", min: 0, max: 200, step: 1, value: 0 },
  { name: "min_p", label: "Min-p", min: 0, max: 1, step: 0.01, value: 0 },
  { name: "repetition_penalty", label: "Repetition penalty", min: 0.5, max: 2, step: 0.01, value: 1 },
  { name: "max_tokens", label: "Most tokens", min: 1, max: 4096, step: 1, value: 1024 },
];
const SCHEMA = {
  type: "object",
  properties: { name: { type: "string" }, year: { type: "integer" } },
  required: ["name", "year"],
  additionalProperties: false,
};
const TOOLS = [
  {
    type: "function",
    function: {
      name: "get_weather",
      description: "The weather in a city now",
      parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
    },
  },
];
const DEFAULTS = {
  ...Object.fromEntries(SLIDERS.map((one) => [one.name, one.value])),
  seed: "",
  stop: "",
  format: "text",
  schema: JSON.stringify(SCHEMA, null, 2),
  regex: "\\d{4}-\\d{2}-\\d{2}",
  useTools: false,
  tools: JSON.stringify(TOOLS, null, 2),
  toolChoice: "auto",
  system: "",
};

export class Settings {
  constructor(onChange) {
    this.onChange = onChange;
    this.form = byId("settings");
    this.values = { ...loadSettings(DEFAULTS), apiKey: loadKey() };
    this.build();
    this.show();
    this.form.addEventListener("input", (event) => this.changed(event.target));
    this.form.addEventListener("submit", (event) => event.preventDefault());
    byId("reset").addEventListener("click", () => this.reset());
  }

  build() {
    for (const one of SLIDERS) {
      const { name, min, max, step } = one;
      byId("sampling").append(
        element(
          "div",
          { class: "slider" },
          element("label", { htmlFor: name }, one.label),
          element("input", { type: "range", id: name, name, min, max, step }),
          element("input", { type: "number", name: `${name}-number`, min, max, step, "aria-label": `${one.label}, as a number` }),
        ),
      );
    }
    byId("sampling").append(
      element("label", { htmlFor: "seed" }, "Seed"),
      element("input", { id: "seed", name: "seed", inputMode: "numeric", placeholder: "random" }),
      element("label", { htmlFor: "stop-text" }, "Stop at"),
      element("input", { id: "stop-text", name: "stop", placeholder: "a text that ends the answer" }),
    );
  }

  show() {
    for (const [name, value] of Object.entries(this.values)) {
      const input = this.form.elements[name];
      if (!input) continue;
      if (input.type === "checkbox") input.checked = value;
      else input.value = value;
      if (input.type === "range") this.form.elements[`${name}-number`].value = value;
    }
    for (const part of this.form.querySelectorAll("[data-when]")) {
      const when = part.dataset.when;
      part.hidden = when === "tools" ? !this.values.useTools : this.values.format !== when;
    }
    byId("settings-error").textContent = this.problem();
    this.onChange(this);
  }

  changed(input) {
    const name = input.name.replace("-number", "");
    const numeric = SLIDERS.some((one) => one.name === name);
    if (numeric && input.value === "") return;
    this.values[name] = input.type === "checkbox" ? input.checked : numeric ? Number(input.value) : input.value;
    if (numeric) {
      const other = this.form.elements[input.name === name ? `${name}-number` : name];
      other.value = input.value;
    }
    saveSettings(this.values);
    if (input.type === "range" || input.type === "number") return;
    const at = input.selectionStart;
    this.show();
    if (typeof at === "number" && document.activeElement === input) input.setSelectionRange(at, at);
  }

  reset() {
    this.values = { ...DEFAULTS, apiKey: this.values.apiKey };
    saveSettings(this.values);
    this.show();
  }

  /** What is wrong with the JSON that was typed, or "". */
  problem() {
    try {
      if (this.values.format === "json_schema") JSON.parse(this.values.schema);
    } catch (error) {
      return `Schema: ${error.message}`;
    }
    try {
      if (this.values.useTools && !Array.isArray(JSON.parse(this.values.tools))) return "Tools: must be a JSON list";
    } catch (error) {
      return `Tools: ${error.message}`;
    }
    return "";
  }

  /** One line for under the message box. */
  mode() {
    const { format, useTools } = this.values;
    const names = { json_object: "JSON object", json_schema: "JSON schema", regex: "Regex" };
    return [names[format], useTools ? "Tools" : null].filter(Boolean).join(" · ");
  }

  /** The fields of a chat completion request. */
  fields() {
    const { values } = this;
    const body = Object.fromEntries(SLIDERS.map((one) => [one.name, values[one.name]]));
    if (/^-?\d+$/.test(values.seed)) body.seed = Number(values.seed);
    if (values.stop) body.stop = [values.stop];
    if (values.format === "json_object") body.response_format = { type: "json_object" };
    if (values.format === "json_schema") {
      const schema = JSON.parse(values.schema);
      body.response_format = { type: "json_schema", json_schema: { name: "answer", schema, strict: true } };
    }
    if (values.format === "regex") body.guided_regex = values.regex;
    if (values.useTools) {
      body.tools = JSON.parse(values.tools);
      body.tool_choice = values.toolChoice;
    }
    return body;
  }
}
