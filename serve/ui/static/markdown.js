// The part of Markdown that models write, as DOM nodes. No HTML is ever parsed; links go to http(s) only.

import { element } from "./dom.js";

const INLINE = /(`+)([^`]|[^`][\s\S]*?[^`])\1(?!`)|\*\*(\S(?:[\s\S]*?\S)?)\*\*|\*([^\s*](?:[^*]*[^\s*])?)\*|\[([^\]\n]+)\]\((https?:\/\/[^\s)]+)\)/g;

function inline(text, into) {
  let at = 0;
  for (const found of text.matchAll(INLINE)) {
    into.append(text.slice(at, found.index));
    at = found.index + found[0].length;
    if (found[1]) into.append(element("code", {}, found[2].trim()));
    else if (found[3]) into.append(inline(found[3], element("strong")));
    else if (found[4]) into.append(inline(found[4], element("em")));
    else into.append(element("a", { href: found[6], target: "_blank", rel: "noopener noreferrer" }, found[5]));
  }
  into.append(text.slice(at));
  return into;
}

/** Splits a text into blocks: fences, headings, lists, quotes, tables, paragraphs; each with the text it came from. */
function blocks(text) {
  const found = [];
  const lines = text.split("\n");
  let i = 0;
  const take = (kind, test) => {
    const start = i;
    while (i < lines.length && test(lines[i], i - start)) i += 1;
    found.push({ kind, raw: lines.slice(start, i).join("\n") });
  };
  const ITEM = /^\s*([-*+]|\d+[.)])\s+/;
  while (i < lines.length) {
    const line = lines[i];
    if (!line.trim()) i += 1;
    else if (line.trimStart().startsWith("```")) {
      let open = true;
      take("fence", (each, n) => {
        if (!open) return false;
        if (n > 0 && each.trim() === "```") open = false;
        return true;
      });
    } else if (/^#{1,6} /.test(line)) take("heading", (each, n) => n === 0);
    else if (ITEM.test(line)) take("list", (each) => ITEM.test(each) || /^\s{2,}\S/.test(each));
    else if (line.startsWith(">")) take("quote", (each) => each.startsWith(">"));
    else if (line.trim().startsWith("|") && /^[\s|:-]+$/.test(lines[i + 1] ?? "x")) take("table", (each) => each.trim().startsWith("|"));
    else take("paragraph", (each, n) => n === 0 || (each.trim() && !/^(```|#{1,6} |>)/.test(each) && !ITEM.test(each)));
  }
  return found;
}

function list(raw) {
  const root = element("div");
  const stack = [{ indent: -1, list: root, item: root }];
  for (const line of raw.split("\n")) {
    const found = line.match(/^(\s*)([-*+]|\d+[.)])\s+(.*)$/);
    if (!found) {
      inline(` ${line.trim()}`, stack.at(-1).item);
      continue;
    }
    const indent = found[1].length;
    while (stack.at(-1).indent > indent) stack.pop();
    if (stack.at(-1).indent < indent) {
      const made = element(/\d/.test(found[2]) ? "ol" : "ul", /\d/.test(found[2]) ? { start: parseInt(found[2], 10) } : {});
      stack.at(-1).item.append(made);
      stack.push({ indent, list: made, item: made });
    }
    const item = inline(found[3], element("li"));
    stack.at(-1).list.append(item);
    stack.at(-1).item = item;
  }
  root.className = "list";
  return root;
}

function table(raw) {
  const rows = raw.split("\n").map((line) => line.trim().replace(/^\||\|$/g, "").split("|"));
  const made = element("table");
  rows.forEach((cells, i) => {
    if (i === 1) return;
    made.append(element("tr", {}, ...cells.map((cell) => inline(cell.trim(), element(i === 0 ? "th" : "td")))));
  });
  return made;
}

function fence(raw) {
  const lines = raw.split("\n");
  if (lines.length > 1 && lines.at(-1).trim() === "```") lines.pop();
  const code = lines.slice(1).join("\n");
  const copy = element("button", { type: "button", onclick: () => copyText(code, copy) }, "Copy");
  return element("div", { class: "fence" }, element("pre", { tabIndex: 0 }, element("code", {}, code)), copy);
}

export async function copyText(text, button) {
  await navigator.clipboard.writeText(text);
  const before = button.textContent;
  button.textContent = "Copied";
  setTimeout(() => (button.textContent = before), 1200);
}

const MAKERS = {
  fence,
  list,
  table,
  heading: (raw) => inline(raw.replace(/^#+ /, ""), element(`h${Math.min(raw.match(/^#+/)[0].length + 1, 4)}`)),
  quote: (raw) => inline(raw.replace(/^> ?/gm, ""), element("blockquote")),
  paragraph: (raw) => inline(raw, element("p")),
};

/** Shows `text` in `into`, keeping the nodes of blocks that did not change: a stream redraws only its last block. */
export function render(text, into) {
  const wanted = blocks(text);
  wanted.forEach((block, i) => {
    const old = into.children[i];
    const key = `${block.kind}\n${block.raw}`;
    if (old?.markdown === key) return;
    const made = MAKERS[block.kind](block.raw);
    made.markdown = key;
    if (old) old.replaceWith(made);
    else into.append(made);
  });
  while (into.children.length > wanted.length) into.lastChild.remove();
}
