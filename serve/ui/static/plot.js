// One time series plot on a canvas, with axes, a legend, a crosshair, and its numbers as a table for those who cannot see it.

import { element } from "./dom.js";

const MARGIN = { left: 46, right: 8, top: 8, bottom: 20 };

export class Plot {
  /** `series`: [{name, pick(sample) -> number | null, color: CSS variable, dashed}]; `format(value)` for labels. */
  constructor({ title, series, format, floor = 0, ceiling = null }) {
    Object.assign(this, { title, series, format, floor, ceiling, samples: [], span: 300, at: null });
    this.canvas = element("canvas", { role: "img", tabIndex: 0, "aria-label": title });
    this.values = series.map(() => element("span"));
    const legend = series.map((one, i) => {
      const line = element("i", { class: one.dashed ? "dashed" : "" });
      line.style.borderTopColor = `var(${one.color})`;
      return element("span", { class: "legend" }, line, one.name, this.values[i]);
    });
    this.table = element("table");
    this.details = element("details", { ontoggle: () => this.fillTable() }, element("summary", {}, "As a table"), this.table);
    this.root = element("figure", { class: "plot" }, element("figcaption", {}, element("span", { class: "title" }, title), ...legend), this.canvas, this.details);
    this.canvas.addEventListener("pointermove", (event) => this.point(event.offsetX));
    this.canvas.addEventListener("pointerleave", () => this.point(null));
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(() => this.draw()).observe(this.canvas);
  }

  update(samples, span) {
    this.samples = samples;
    this.span = span;
    this.draw();
    if (this.details.open) this.fillTable();
  }

  point(x) {
    this.at = x;
    this.draw();
  }

  key(event) {
    const step = { ArrowLeft: -8, ArrowRight: 8 }[event.key];
    if (!step) return;
    event.preventDefault();
    this.point(Math.min(Math.max((this.at ?? this.canvas.clientWidth) + step, MARGIN.left), this.canvas.clientWidth - MARGIN.right));
  }

  shown() {
    const end = this.samples.at(-1)?.time ?? 0;
    return this.samples.filter((sample) => sample.time > end - this.span);
  }

  draw() {
    const { canvas } = this;
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    if (!width || !height) return;
    const scale = window.devicePixelRatio || 1;
    if (canvas.width !== Math.round(width * scale)) canvas.width = Math.round(width * scale);
    if (canvas.height !== Math.round(height * scale)) canvas.height = Math.round(height * scale);
    const paint = canvas.getContext("2d");
    paint.setTransform(scale, 0, 0, scale, 0, 0);
    paint.clearRect(0, 0, width, height);
    const style = getComputedStyle(canvas);
    const samples = this.shown();
    const end = samples.at(-1)?.time ?? 0;
    const values = samples.flatMap((sample) => this.series.map((one) => one.pick(sample))).filter((value) => value !== null);
    const top = this.ceiling ?? niceTop(Math.max(this.floor, ...values));
    const x = (time) => MARGIN.left + (width - MARGIN.left - MARGIN.right) * (1 - (end - time) / this.span);
    const y = (value) => height - MARGIN.bottom - ((height - MARGIN.top - MARGIN.bottom) * value) / top;
    this.grid(paint, style, { width, height, top, x, y, end });
    for (const one of this.series) this.line(paint, style, one, samples, x, y);
    if (!samples.length) {
      paint.fillStyle = style.getPropertyValue("--soft");
      paint.textAlign = "center";
      paint.fillText("Nothing measured yet", (width + MARGIN.left) / 2, height / 2);
    }
    const picked = this.at === null ? samples.at(-1) : nearest(samples, this.at, x);
    if (this.at !== null && picked) this.cross(paint, style, picked, x, y, height);
    this.values.forEach((node, i) => {
      const value = picked ? this.series[i].pick(picked) : null;
      node.textContent = value === null ? "–" : this.format(value);
    });
    const now = this.series.map((one, i) => `${one.name} ${this.values[i].textContent}`).join(", ");
    canvas.setAttribute("aria-label", `${this.title}, last ${this.span} seconds. ${this.at === null ? "Now" : "At the mark"}: ${now}`);
  }

  grid(paint, style, { width, height, top, x, y, end }) {
    paint.font = `11px ${style.fontFamily}`;
    paint.lineWidth = 1;
    paint.strokeStyle = style.getPropertyValue("--grid");
    paint.fillStyle = style.getPropertyValue("--soft");
    paint.textBaseline = "middle";
    paint.textAlign = "right";
    for (let i = 0; i <= 4; i += 1) {
      const at = Math.round(y((top * i) / 4)) + 0.5;
      paint.beginPath();
      paint.moveTo(MARGIN.left, at);
      paint.lineTo(width - MARGIN.right, at);
      paint.stroke();
      if (i % 2 === 0) paint.fillText(this.format((top * i) / 4), MARGIN.left - 6, at);
    }
    paint.textBaseline = "alphabetic";
    for (const share of [0, 0.5, 1]) {
      const ago = Math.round(this.span * (1 - share));
      paint.textAlign = share === 0 ? "left" : share === 1 ? "right" : "center";
      paint.fillText(ago === 0 ? "now" : ago >= 120 ? `−${ago / 60} min` : `−${ago} s`, x(end - ago), height - 5);
    }
  }

  line(paint, style, one, samples, x, y) {
    paint.strokeStyle = style.getPropertyValue(one.color);
    paint.lineWidth = 2;
    paint.lineJoin = "round";
    paint.setLineDash(one.dashed ? [5, 4] : []);
    paint.beginPath();
    let pen = false;
    for (const sample of samples) {
      const value = one.pick(sample);
      if (value === null) pen = false;
      else if (pen) paint.lineTo(x(sample.time), y(value));
      else paint.moveTo(x(sample.time), y(value));
      pen = value !== null;
    }
    paint.stroke();
    paint.setLineDash([]);
  }

  cross(paint, style, sample, x, y, height) {
    paint.strokeStyle = style.getPropertyValue("--soft");
    paint.lineWidth = 1;
    paint.beginPath();
    paint.moveTo(Math.round(x(sample.time)) + 0.5, MARGIN.top);
    paint.lineTo(Math.round(x(sample.time)) + 0.5, height - MARGIN.bottom);
    paint.stroke();
    for (const one of this.series) {
      const value = one.pick(sample);
      if (value === null) continue;
      paint.fillStyle = style.getPropertyValue(one.color);
      paint.beginPath();
      paint.arc(x(sample.time), y(value), 3.5, 0, 2 * Math.PI);
      paint.fill();
    }
  }

  fillTable() {
    const samples = this.shown();
    const every = Math.max(1, Math.ceil(samples.length / 12));
    const end = samples.at(-1)?.time ?? 0;
    const head = element("tr", {}, element("th", { scope: "col" }, "Seconds ago"), ...this.series.map((one) => element("th", { scope: "col" }, one.name)));
    const rows = samples
      .filter((_, i) => (samples.length - 1 - i) % every === 0)
      .reverse()
      .map((sample) => {
        const cells = this.series.map((one) => one.pick(sample)).map((value) => element("td", {}, value === null ? "–" : this.format(value)));
        return element("tr", {}, element("td", {}, String(Math.round(end - sample.time))), ...cells);
      });
    this.table.replaceChildren(head, ...rows);
  }
}

function nearest(samples, at, x) {
  return samples.reduce((best, one) => (best && Math.abs(x(best.time) - at) <= Math.abs(x(one.time) - at) ? best : one), null);
}

/** The least of a few round numbers times a power of ten that is not below the value. */
function niceTop(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 3, 4, 5, 6, 8, 10].find((step) => step * power >= value) * power;
}
