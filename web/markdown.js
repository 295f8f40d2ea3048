// A little Markdown, made into elements: whatever a model writes, it stays text. No HTML is ever
// parsed, and links go nowhere but to the web.

const FENCE = /^ {0,3}(```+|~~~+)\s*([\w+#.-]*)/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const HEADING = /^(#{1,6})\s+(.*?)\s*#*$/;
const RULE = /^ {0,3}([-*_])( *\1){2,} *$/;
const QUOTE = /^ {0,3}> ?/;

/** Cuts a text into blocks, each the source of one paragraph, list, heading or piece of code. */
export function blocks(source) {
  const out = [];
  let open = [];
  let fence = null;
  const close = () => {
    if (open.length) out.push(open.join("\n"));
    open = [];
  };
  for (const line of source.split("\n")) {
    if (fence) {
      open.push(line);
      if (line.trim().startsWith(fence) && !line.trim().slice(fence.length).replaceAll(fence[0], "").trim()) {
        fence = null;
        close();
      }
      continue;
    }
    const start = FENCE.exec(line);
    const inList = open.length > 0 && ITEM.test(open[0]);
    if (start) {
      close();
      fence = start[1];
      open.push(line);
    } else if (!line.trim()) {
      // A list goes on over an empty line; what follows decides.
      if (inList) open.push(line);
      else close();
    } else if (HEADING.test(line) || RULE.test(line)) {
      close();
      out.push(line);
    } else {
      const blank = open.length > 0 && !open.at(-1).trim();
      const item = ITEM.exec(line);
      const leaves = inList ? (item ? changesKind(open[0], item) : blank && !/^ {2,}/.test(line)) : item && !QUOTE.test(open[0]);
      if (open.length && leaves) close();
      if (open.length && QUOTE.test(open[0]) !== QUOTE.test(line) && !inList) close();
      open.push(line);
    }
  }
  close();
  return out;
}

// Numbers after dots (or the other way round) at the same depth begin another list.
function changesKind(first, item) {
  const [, depth, mark] = ITEM.exec(first);
  return item[1].length <= depth.length + 1 && /\d/.test(mark) !== /\d/.test(item[2]);
}

/** One block as an element. */
export function element(source) {
  const lines = source.split("\n");
  const fence = FENCE.exec(lines[0]);
  if (fence) return code(lines, fence);
  if (RULE.test(lines[0]) && lines.length === 1) return document.createElement("hr");
  const heading = HEADING.exec(lines[0]);
  if (heading) return inline(make("h" + Math.min(heading[1].length, 4)), heading[2]);
  if (ITEM.test(lines[0])) return list(lines);
  if (QUOTE.test(lines[0])) {
    const quote = make("blockquote");
    const inner = lines.map((line) => line.replace(QUOTE, "")).join("\n");
    // Deeper quotes than a few are text: nothing recurses without a bound.
    if (QUOTE.test(inner)) return inline(quote, inner);
    quote.append(...blocks(inner).map(element));
    return quote;
  }
  return inline(make("p"), source);
}

function make(name, className) {
  const node = document.createElement(name);
  if (className) node.className = className;
  return node;
}

function code(lines, fence) {
  const closed = lines.length > 1 && lines.at(-1).trim().startsWith(fence[1]);
  const body = lines.slice(1, closed ? -1 : undefined).join("\n");
  const box = make("div", "code");
  const bar = make("div", "bar");
  const language = make("span");
  language.textContent = fence[2] || "text";
  const copy = make("button", "quiet");
  copy.type = "button";
  copy.textContent = "Copy";
  copy.dataset.copy = "code";
  bar.append(language, copy);
  const pre = make("pre");
  const inner = make("code");
  inner.textContent = body;
  pre.append(inner);
  box.append(bar, pre);
  return box;
}

// Two levels of items: deeper ones join the second.
function list(lines) {
  const first = ITEM.exec(lines[0]);
  const base = first[1].length;
  const root = listOf(first[2]);
  let inner = null;
  let item = null;
  for (const line of lines) {
    const found = ITEM.exec(line);
    if (found && (found[1].length <= base + 1 || !item)) {
      item = make("li");
      item.dataset.source = found[3];
      root.append(item);
      inner = null;
    } else if (found) {
      if (!inner) item.append((inner = listOf(found[2])));
      const child = make("li");
      child.dataset.source = found[3];
      inner.append(child);
    } else if (line.trim() && item) {
      const last = inner ? inner.lastElementChild : item;
      last.dataset.source += "\n" + line.trim();
    }
  }
  for (const node of [root, ...root.querySelectorAll("li")]) {
    if (node.dataset.source === undefined) continue;
    const text = document.createDocumentFragment();
    inline(text, node.dataset.source);
    node.prepend(text);
    delete node.dataset.source;
  }
  return root;
}

function listOf(mark) {
  if (!/\d/.test(mark)) return make("ul");
  const node = make("ol");
  node.start = parseInt(mark, 10);
  return node;
}

const MARKS = [
  ["code", /^(`+)([^`]|[^`][\s\S]*?[^`])\1(?!`)/],
  ["strong", /^(\*\*|__)(?=\S)([\s\S]*?\S)\1/],
  ["em", /^(\*)(?=[^\s*])([\s\S]*?[^\s*])\*(?!\*)/],
  ["del", /^(~~)(?=\S)([\s\S]*?\S)~~/],
];
const LINK = /^\[([^\]\n]{1,200})\]\((https?:\/\/[^\s)]{1,2000})\)/;
const MAY_MARK = /[`*_~[\\\n]/;
// No mark reaches further than this, so that a text full of stars costs no more than its length
// times this number.
const REACH = 2000;

/** Adds text with marks to a node. */
function inline(parent, source, depth = 0) {
  let plain = "";
  const flush = () => {
    if (plain) parent.append(plain);
    plain = "";
  };
  for (let at = 0; at < source.length; ) {
    const char = source[at];
    if (!MAY_MARK.test(char)) {
      plain += char;
      at += 1;
      continue;
    }
    if (char === "\\" && /[\\`*_~[\]#>-]/.test(source[at + 1] ?? "")) {
      plain += source[at + 1];
      at += 2;
      continue;
    }
    if (char === "\n") {
      flush();
      parent.append(make("br"));
      at += 1;
      continue;
    }
    const rest = source.slice(at, at + REACH);
    const link = char === "[" && LINK.exec(rest);
    if (link) {
      flush();
      const anchor = make("a");
      anchor.href = link[2];
      anchor.target = "_blank";
      anchor.rel = "noopener noreferrer";
      anchor.textContent = link[1];
      parent.append(anchor);
      at += link[0].length;
      continue;
    }
    // An underline inside a word is part of its name.
    const inWord = char === "_" && /\w/.test(source[at - 1] ?? "");
    const found = depth < 3 && !inWord && MARKS.map(([name, mark]) => [name, mark.exec(rest)]).find(([, hit]) => hit);
    if (found) {
      flush();
      const [name, hit] = found;
      const node = make(name);
      if (name === "code") node.textContent = hit[2].replace(/^ (.*) $/s, "$1");
      else inline(node, hit[2], depth + 1);
      parent.append(node);
      at += hit[0].length;
      continue;
    }
    plain += char;
    at += 1;
  }
  flush();
  return parent;
}
