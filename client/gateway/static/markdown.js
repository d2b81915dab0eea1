// A model's Markdown as document nodes. Text only ever becomes text: nothing here parses HTML, and
// links go to http, https and mailto alone. A stream may end anywhere, so whatever is not closed is
// shown as far as it goes.

export function h(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "class") node.className = value;
    else if (value === true) node.setAttribute(name, "");
    else node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

const SAFE_LINK = /^(https?:\/\/|mailto:)/i;
const INLINE = [
  ["code", /(`+)([^`](?:[\s\S]*?[^`])?)\1(?!`)/],
  ["link", /\[([^\]\n]+)\]\(([^)\s]+)\)/],
  ["auto", /\bhttps?:\/\/[^\s<>()"'`]*[^\s<>()"'`.,;:!?]/],
  ["strong", /\*\*(?=\S)([\s\S]*?\S)\*\*|__(?=\S)([\s\S]*?\S)__(?!\w)/],
  ["em", /\*(?=[^\s*])([^*]*[^\s*])\*|(?<!\w)_(?=[^\s_])([^_]*[^\s_])_(?!\w)/],
  ["del", /~~(?=\S)([\s\S]*?\S)~~/],
];

function link(address, ...children) {
  if (!SAFE_LINK.test(address)) return null;
  return h("a", { href: address, target: "_blank", rel: "noopener noreferrer" }, ...children);
}

function inline(text) {
  const nodes = [];
  let rest = text;
  while (rest) {
    let best = null;
    for (const [kind, pattern] of INLINE) {
      const match = pattern.exec(rest);
      if (match && (!best || match.index < best.match.index)) best = { kind, match };
    }
    if (!best) break;
    const { kind, match } = best;
    if (match.index) nodes.push(rest.slice(0, match.index));
    if (kind === "code") nodes.push(h("code", {}, match[2].trim() || match[2]));
    else if (kind === "link") nodes.push(link(match[2], ...inline(match[1])) ?? match[0]);
    else if (kind === "auto") nodes.push(link(match[0], match[0]));
    else nodes.push(h(kind, {}, ...inline(match[1] ?? match[2])));
    rest = rest.slice(match.index + match[0].length);
  }
  if (rest) nodes.push(rest);
  return nodes;
}

function lines(text) {
  // A line break in a paragraph is kept: models mean it.
  return inline(text).flatMap((node) =>
    typeof node === "string"
      ? node.split("\n").flatMap((part, i) => (i ? [h("br"), part] : [part]))
      : [node],
  );
}

function codeBlock(language, text) {
  const copy = h("button", { class: "copy", type: "button" }, "Copy");
  copy.addEventListener("click", async () => {
    await navigator.clipboard.writeText(text);
    copy.textContent = "Copied";
    setTimeout(() => (copy.textContent = "Copy"), 1500);
  });
  return h(
    "figure",
    { class: "code" },
    h("figcaption", {}, h("span", {}, language || "text"), navigator.clipboard ? copy : null),
    h("pre", { tabindex: "0" }, h("code", {}, text)),
  );
}

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`\s]*)/;
const HEADING = /^(#{1,6})\s+(.*?)\s*#*$/;
const RULE = /^ {0,3}([-*_])(\s*\1){2,}\s*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const TABLE_RULE = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;

const cells = (line) =>
  line.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));

function list(rows, from) {
  const [, indent, mark] = ITEM.exec(rows[from]);
  const ordered = /\d/.test(mark);
  const node = h(ordered ? "ol" : "ul", ordered && parseInt(mark) !== 1 ? { start: parseInt(mark) } : {});
  let at = from;
  while (at < rows.length) {
    const item = ITEM.exec(rows[at]);
    if (!item || item[1].length < indent.length || /\d/.test(item[2]) !== ordered) break;
    const inner = [item[3]];
    const depth = item[1].length + item[2].length + 1;
    at += 1;
    while (at < rows.length) {
      const row = rows[at];
      const next = ITEM.exec(row);
      if (next && next[1].length <= item[1].length) break;
      const spaces = row.length - row.trimStart().length;
      if (!row.trim()) {
        // An empty line ends the item unless what follows belongs to it.
        const after = rows[at + 1] ?? "";
        const sibling = ITEM.exec(after);
        if (sibling && sibling[1].length === item[1].length) { at += 1; break; }
        if (after.length - after.trimStart().length < 2) break;
      } else if (!next && spaces < 2 && rows[at - 1].trim() === "") break;
      inner.push(row.slice(Math.min(spaces, depth)));
      at += 1;
    }
    const blocks = render(inner.join("\n"));
    const only = blocks.length && blocks[0].tagName === "P" ? [...blocks[0].childNodes, ...blocks.slice(1)] : blocks;
    node.append(h("li", {}, ...only));
  }
  return [node, at];
}

/** The blocks of a Markdown text. */
export function render(text) {
  const rows = text.replaceAll("\r\n", "\n").split("\n");
  const blocks = [];
  let at = 0;
  while (at < rows.length) {
    const row = rows[at];
    const fence = FENCE.exec(row);
    if (!row.trim()) {
      at += 1;
    } else if (fence) {
      const end = rows.findIndex((line, i) => i > at && line.trim().startsWith(fence[1]) && !line.trim().replaceAll(fence[1][0], ""));
      blocks.push(codeBlock(fence[2], rows.slice(at + 1, end < 0 ? rows.length : end).join("\n")));
      at = end < 0 ? rows.length : end + 1;
    } else if (HEADING.test(row)) {
      const [, marks, title] = HEADING.exec(row);
      // The page has its own first headings.
      blocks.push(h(`h${Math.min(marks.length + 2, 6)}`, {}, ...inline(title)));
      at += 1;
    } else if (RULE.test(row)) {
      blocks.push(h("hr"));
      at += 1;
    } else if (/^ {0,3}>/.test(row)) {
      const inner = [];
      while (at < rows.length && /^ {0,3}>/.test(rows[at])) inner.push(rows[at++].replace(/^ {0,3}> ?/, ""));
      blocks.push(h("blockquote", {}, ...render(inner.join("\n"))));
    } else if (ITEM.test(row)) {
      const [node, next] = list(rows, at);
      blocks.push(node);
      at = next;
    } else if (row.includes("|") && TABLE_RULE.test(rows[at + 1] ?? "") && rows[at + 1].includes("-")) {
      const head = h("tr", {}, ...cells(row).map((cell) => h("th", { scope: "col" }, ...inline(cell))));
      const body = h("tbody");
      at += 2;
      while (at < rows.length && rows[at].includes("|")) {
        body.append(h("tr", {}, ...cells(rows[at++]).map((cell) => h("td", {}, ...inline(cell)))));
      }
      blocks.push(h("div", { class: "scroll-x", tabindex: "0" }, h("table", {}, h("thead", {}, head), body)));
    } else {
      const inner = [];
      while (
        at < rows.length && rows[at].trim() && !FENCE.test(rows[at]) && !HEADING.test(rows[at]) &&
        !/^ {0,3}>/.test(rows[at]) && !(inner.length && ITEM.test(rows[at]))
      ) inner.push(rows[at++]);
      blocks.push(h("p", {}, ...lines(inner.join("\n"))));
    }
  }
  return blocks;
}
