// The live dashboard: reads /metrics every second while it is shown, turns counters into rates, draws.

import { metricsText } from "./api.js";
import { byId, element } from "./dom.js";
import { Plot } from "./plot.js";

const KEPT_S = 1800;
const PERIOD_MS = 1000;
const count = (value) => (value >= 10_000 ? `${(value / 1000).toFixed(value >= 100_000 ? 0 : 1)}k` : value >= 100 || Number.isInteger(value) ? value.toFixed(0) : value.toFixed(1));
const percent = (value) => `${(100 * value).toFixed(0)} %`;
const seconds = (value) => (value < 1 ? `${(value * 1000).toFixed(0)} ms` : `${value.toFixed(value < 10 ? 1 : 0)} s`);
const PREFIXES = ["jaxllm_engine_", "jaxllm_", "vllm:"];

/** Prometheus text as {name: sum over labels} and {name: [[upper bound, count]...]} for histograms. */
export function parseMetrics(text) {
  const values = {};
  const histograms = {};
  for (const line of text.split("\n")) {
    if (!line || line.startsWith("#")) continue;
    const found = line.match(/^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)/);
    if (!found) continue;
    const [, name, labels, number] = found;
    const bound = labels?.match(/le="([^"]+)"/);
    if (bound && name.endsWith("_bucket")) {
      const buckets = (histograms[name.slice(0, -7)] ??= new Map());
      const upper = bound[1] === "+Inf" ? Infinity : Number(bound[1]);
      buckets.set(upper, (buckets.get(upper) ?? 0) + Number(number));
    } else values[name] = (values[name] ?? 0) + Number(number);
  }
  for (const name of Object.keys(histograms)) histograms[name] = [...histograms[name]].sort((a, b) => a[0] - b[0]);
  return { values, histograms };
}

/** The value below which `share` of what was observed between two readings lies; null when nothing was. */
export function quantile(after, before, share) {
  if (!after) return null;
  const gained = after.map(([upper, total], i) => [upper, total - (before?.[i]?.[1] ?? 0)]);
  const all = gained.at(-1)?.[1] ?? 0;
  if (!(all > 0)) return null;
  let [low, below] = [0, 0];
  for (const [upper, total] of gained) {
    if (total >= share * all) return upper === Infinity ? low : low + ((upper - low) * (share * all - below)) / (total - below || 1);
    [low, below] = [upper, total];
  }
  return low;
}

export class Dashboard {
  constructor() {
    this.samples = [];
    this.readings = []; // of the last 30 s: quantiles need more than one second of observations
    this.paused = false;
    this.timer = null;
    const rate = (name) => (sample) => sample[name];
    this.plots = [
      { title: "Throughput, tokens/s", format: count, series: [
        { name: "Written", pick: rate("written"), color: "--series-1" },
        { name: "Read", pick: rate("read"), color: "--series-2", dashed: true }] },
      { title: "Time to first token", format: seconds, series: [
        { name: "Median", pick: rate("ttft50"), color: "--series-1" },
        { name: "99 %", pick: rate("ttft99"), color: "--series-2", dashed: true }] },
      { title: "Time per token after it", format: seconds, series: [
        { name: "Median", pick: rate("tpot50"), color: "--series-1" },
        { name: "99 %", pick: rate("tpot99"), color: "--series-2", dashed: true }] },
      { title: "Batch size, sequences", format: count, floor: 4, series: [{ name: "Running", pick: rate("running"), color: "--series-1" }] },
      { title: "Queue, sequences", format: count, floor: 4, series: [{ name: "Waiting", pick: rate("waiting"), color: "--series-3" }] },
      { title: "KV cache", format: percent, ceiling: 1, series: [
        { name: "In use", pick: rate("kvUsed"), color: "--series-1" },
        { name: "Prefixes kept", pick: rate("kvCached"), color: "--series-3", dashed: true }] },
    ].map((options) => new Plot(options));
    byId("plots").append(...this.plots.map((plot) => plot.root));
    byId("window").addEventListener("change", () => this.draw());
    byId("pause").addEventListener("click", () => this.pause());
    document.addEventListener("visibilitychange", () => document.hidden || this.timer === null || this.tick());
  }

  start() {
    this.timer ??= setInterval(() => document.hidden || this.tick(), PERIOD_MS);
    this.tick();
  }

  pause() {
    this.paused = !this.paused;
    byId("pause").setAttribute("aria-pressed", String(this.paused));
    byId("pause").textContent = this.paused ? "Go on" : "Pause";
  }

  stop() {
    clearInterval(this.timer);
    this.timer = null;
  }

  async tick() {
    if (this.paused) return;
    let text;
    try {
      text = await metricsText();
    } catch (error) {
      byId("dash-state").textContent = `No metrics: ${error.message}`;
      return;
    }
    const time = performance.now() / 1000;
    const reading = { time, ...parseMetrics(text) };
    const last = this.readings.at(-1);
    if (last && time - last.time < 0.3) return;
    this.readings = [...this.readings.filter((one) => one.time > time - 30), reading];
    this.samples = [...this.samples.filter((one) => one.time > time - KEPT_S), this.sample(reading, last)];
    byId("dash-state").textContent = "";
    this.draw();
  }

  sample(reading, last) {
    const value = (name, from = reading) => {
      for (const prefix of PREFIXES) {
        const found = from.values[prefix + name] ?? from.values[`${prefix}${name}_total`];
        if (found !== undefined) return found;
      }
      return null;
    };
    const rate = (...names) => {
      for (const name of names) {
        const [after, before] = [value(name), last ? value(name, last) : null];
        if (after !== null && before !== null) return Math.max(0, after - before) / (reading.time - last.time);
      }
      return null;
    };
    const histogram = (name, from) => PREFIXES.map((prefix) => from.histograms[`${prefix}${name}_seconds`]).find(Boolean);
    const spread = (name, share) => quantile(histogram(name, reading), histogram(name, this.readings[0]), share);
    const pages = value("total_pages");
    const part = (name) => (pages ? (value(name) ?? 0) / pages : null);
    const [hits, queries] = [value("prefix_hit_tokens"), value("prefix_query_tokens")];
    return {
      time: reading.time,
      written: rate("generated_tokens", "generation_tokens"),
      read: rate("prompt_tokens"),
      ttft50: spread("time_to_first_token", 0.5),
      ttft99: spread("time_to_first_token", 0.99),
      tpot50: spread("time_per_output_token", 0.5),
      tpot99: spread("time_per_output_token", 0.99),
      running: value("running") ?? value("num_requests_running"),
      waiting: value("waiting") ?? value("num_requests_waiting"),
      kvUsed: part("held_pages") ?? value("kv_cache_usage_perc"),
      kvCached: part("cached_pages"),
      hitRate: queries ? hits / queries : null,
      preemptions: value("preemptions"),
    };
  }

  draw() {
    const span = Number(byId("window").value);
    for (const plot of this.plots) plot.update(this.samples, span);
    const now = this.samples.at(-1);
    if (!now) return;
    const tiles = [
      ["Written", now.written, (v) => [count(v), "tokens/s"]],
      ["Running", now.running, (v) => [count(v), "sequences"]],
      ["Waiting", now.waiting, (v) => [count(v), "sequences"]],
      ["First token, median", now.ttft50, (v) => seconds(v).split(" ")],
      ["KV cache in use", now.kvUsed, (v) => percent(v).split(" ")],
      ["Prefix hits", now.hitRate, (v) => percent(v).split(" ")],
      ["Preemptions", now.preemptions, (v) => [count(v), ""]],
    ];
    byId("tiles").replaceChildren(
      ...tiles.map(([name, value, show]) => {
        const [number, unit] = value === null ? ["–", ""] : show(value);
        return element("div", {}, element("dt", {}, name), element("dd", {}, number, " ", element("small", {}, unit ?? "")));
      }),
    );
  }
}
