// The subset of Markdown that chat models write, as DOM nodes: raw HTML stays text, a link leads to http(s) or nowhere.
// Every step is linear in the text, and nesting is bounded, whatever a model says.

import { copyButton, element } from "./dom.js";

const FENCE = /^ {0,3}(`{3,}(?=[^`]*$)|~{3,})[ \t]*([\w+#.-]*)/;
const HEADING = /^ {0,3}(#{1,6})[ \t]/;
const RULE = /^ {0,3}([-*_])([ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])([ \t]{1,4}(?=\S)|$)/;
const TAB = 4;
const INLINE = /\\[!-/:-@[-`{-~]|`+|\*+|_+|\[|https?:\/\/[^\s<>"'`*\\\uE000-\uF8FF]+|\n/g;
const LINK = /\[([^[\]\n]{1,500})\]\(<?([^\s<>()]*(?:\([^\s<>()]*\)[^\s<>()]*)*)>?(?: +"[^"\n]*")?\)/y;
const DEEPEST = 8;
const CHIPS = /[\uE000-\uF8FF]/g;  // private-use characters stand for elements; a model's own become U+FFFD

const shown = new WeakMap();  // container -> sources of its blocks

/** Show text in a container. chips: [{at, make}], elements to set in at offsets of the text.
 *
 *  Blocks that have not changed stay the elements they are, so that what a reader has selected stays selected. */
export function render(container, text, chips = []) {
  let marked = "", from = 0;
  chips.forEach(({ at }, i) => {
    marked += text.slice(from, at).replace(CHIPS, "\uFFFD") + String.fromCharCode(0xE000 + (i % 6400));
    from = at;
  });
  marked += text.slice(from).replace(CHIPS, "\uFFFD");
  const blocks = parse(marked.replace(/\r\n?/g, "\n").split("\n"));
  const before = shown.get(container) ?? [];
  let same = 0;
  while (same < before.length && before[same] === blocks[same]?.source) same++;
  while (container.childNodes.length > same) container.lastChild.remove();
  container.append(...blocks.slice(same).map((block) => build(block, chips, 0)));
  shown.set(container, blocks.map((block) => block.source));
}

/** Return [{kind, lines, source}]. */
function parse(lines) {
  const blocks = [];
  for (let start = 0; start < lines.length;) {
    if (!lines[start].trim()) {
      start++;
      continue;
    }
    const kind = kindAt(lines, start);
    const end = Math.min(endOf(kind, lines, start), lines.length);
    const inside = lines.slice(start, end);
    blocks.push({ kind, lines: inside, source: `${kind}\n${inside.join("\n")}` });
    start = end;
  }
  return blocks;
}

function kindAt(lines, i) {
  const line = lines[i];
  if (FENCE.test(line)) return "code";
  if (HEADING.test(line)) return "heading";
  if (RULE.test(line)) return "rule";
  if (QUOTE.test(line)) return "quote";
  if (itemOf(line)) return "list";
  return line.includes("|") && isRowOfDashes(lines[i + 1] ?? "") ? "table" : "paragraph";
}

/** Say whether a line ends a paragraph before it: a list that begins there begins at 1, other numbers may be a year. */
function interrupts(lines, i) {
  const kind = kindAt(lines, i);
  return kind === "list" ? /^(\D|1\D)/.test(itemOf(lines[i])[2]) : kind !== "paragraph";
}

const itemOf = (line) => ITEM.exec(outdent(line, 0, Infinity));
const isOrdered = (line) => /\d/.test(itemOf(line)[2]);
const isRowOfDashes = (line) => line.includes("|") && cellsOf(line).every((cell) => /^:?-+:?$/.test(cell));
const closes = (line, fence) => line.trim().startsWith(fence) && !line.trim().replaceAll(fence[0], "");

/** Return a line without the blanks of its first `width` columns. Tabs become spaces, but only up to column `upto`. */
function outdent(line, width, upto = width) {
  let at = 0, column = 0;
  for (; column < upto && /[ \t]/.test(line[at] ?? ""); at++) column += line[at] === " " ? 1 : TAB - (column % TAB);
  return " ".repeat(Math.max(0, column - width)) + line.slice(at);
}

/** Return the cells of a table's line; `\|` is part of one. */
function cellsOf(line) {
  const cells = line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "").split(/(?<!\\)\|/);
  return cells.map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function endOf(kind, lines, start) {
  const until = (stop, from = start + 1) => {
    let end = from;
    while (end < lines.length && !stop(lines[end], end)) end++;
    return end;
  };
  if (kind === "code") {
    const fence = FENCE.exec(lines[start])[1];
    return until((line) => closes(line, fence)) + 1;
  }
  if (kind === "quote") return until((line) => !QUOTE.test(line));
  if (kind === "table") return until((line) => !line.includes("|"), start + 2);
  if (kind === "paragraph") return until((line, i) => !line.trim() || interrupts(lines, i));
  if (kind !== "list") return start + 1;
  const ordered = isOrdered(lines[start]);
  const inList = (line = "") => /^( {2}| ?\t)\s*\S/.test(line)
    || (itemOf(line) && !RULE.test(line) && isOrdered(line) === ordered);
  return until((line, i) => !inList(line) && (line.trim() ? !lines[i - 1].trim() || interrupts(lines, i)
    : !inList(lines[i + 1])));
}

function build({ kind, lines }, chips, depth) {
  const inline = (tag, text) => addInline(element(tag), text, chips);
  if (kind === "code") return codeBlock(lines, chips);
  if (kind === "rule") return element("hr");
  if (kind === "table") return table(lines, inline);
  if (kind === "heading") {
    const [opening, marks] = HEADING.exec(lines[0]);
    const text = lines[0].slice(opening.length).trim().replace(/(^|[ \t])#+$/, "").trim();
    return inline(marks.length < 3 ? "h3" : "h4", text);  // h1 and h2 are the page's own
  }
  if (depth < DEEPEST && kind === "quote") {
    const inner = parse(lines.map((line) => line.replace(QUOTE, "")));
    return element("blockquote", {}, ...inner.map((block) => build(block, chips, depth + 1)));
  }
  if (depth < DEEPEST && kind === "list") return list(lines, chips, depth);
  return inline("p", lines.map((line) => line.trim()).join("\n"));
}

function codeBlock(lines, chips) {
  const [, fence, language] = FENCE.exec(lines[0]);
  const closed = lines.length > 1 && closes(lines.at(-1), fence);
  const inside = lines.slice(1, closed ? -1 : undefined).map((line) => outdent(line, lines[0].search(/\S/)));
  const code = addText(element("code"), inside.join("\n"), chips);
  const bar = element("div", { className: "bar" }, element("span", {}, language || "code"),
    copyButton("Copy code", () => code.textContent));
  return element("div", { className: "code" }, bar,
    element("pre", { tabIndex: 0, role: "group", "aria-label": "Code" }, code));
}

function table(lines, inline) {
  const aligned = cellsOf(lines[1]).map((dashes) => (dashes.endsWith(":") ? (dashes.startsWith(":") ? "center" : "right") : ""));
  const row = (tag, line) => element("tr", {}, ...cellsOf(line).slice(0, aligned.length).map((text, i) => {
    const cell = inline(tag, text);
    cell.style.textAlign = aligned[i];
    return cell;
  }));
  return element("div", { className: "table", tabIndex: 0, role: "group", "aria-label": "Table" },
    element("table", {}, element("thead", {}, row("th", lines[0])),
      element("tbody", {}, ...lines.slice(2).map((line) => row("td", line)))));
}

function list(lines, chips, depth) {
  const [, indent, marker] = itemOf(lines[0]), ordered = isOrdered(lines[0]);
  const items = [];
  let width = 0;
  for (const line of lines) {
    const item = itemOf(line);
    if (item && item[1].length <= indent.length + 1 && isOrdered(line) === ordered) {
      width = item[0].length;
      items.push([outdent(line, 0, Infinity).slice(width)]);
    } else items.at(-1).push(outdent(line, width));
  }
  const made = items.map((item) => {
    const [first, ...rest] = parse(item);
    const li = element("li");
    if (first?.kind === "paragraph") addInline(li, first.lines.join("\n"), chips);
    else if (first) rest.unshift(first);
    li.append(...rest.map((block) => build(block, chips, depth + 1)));
    return li;
  });
  return ordered ? element("ol", { start: parseInt(marker) }, ...made) : element("ul", {}, ...made);
}

/** Append text with emphasis, code and links to a parent; returns the parent. */
function addInline(parent, text, chips, withLinks = true) {
  const open = [{ mark: "", node: parent }];  // emphasis that waits for its end
  const unclosed = new Set();  // lengths of backtick runs that have no partner further on
  let plain = "";
  const flush = () => {
    addText(open.at(-1).node, plain, chips);
    plain = "";
  };
  const add = (node) => {
    flush();
    open.at(-1).node.append(node);
  };
  const close = () => {  // emphasis without an end is text
    const { mark, node } = open.pop();
    open.at(-1).node.append(mark, ...node.childNodes);
  };
  const emphasis = (mark, before, after) => {
    const matching = open.findLastIndex((one) => one.mark === mark);
    if (matching > 0 && /\S/.test(before) && (mark[0] === "*" || !/\w/.test(after))) {
      flush();
      while (open.length > matching + 1) close();
      const { node } = open.pop();
      open.at(-1).node.append(node);
    } else if (/\S/.test(after) && !/\w/.test(before) && open.length < DEEPEST) {  // 2*3*4 has no emphasis
      flush();
      open.push({ mark, node: element(mark.length === 2 ? "strong" : "em") });
    } else plain += mark;
  };

  let from = 0;
  INLINE.lastIndex = 0;
  for (let match; (match = INLINE.exec(text));) {
    const at = match.index, [found] = match;
    let end = at + found.length;
    plain += text.slice(from, at);
    if (found[0] === "\\") plain += found[1];
    else if (found === "\n") add(element("br"));
    else if (found[0] === "`") {
      const closing = unclosed.has(found.length) ? -1 : endOfCode(text, found, end);
      if (closing < 0) {
        unclosed.add(found.length);
        plain += found;
      } else {
        add(addText(element("code"), text.slice(end, closing).replace(/^ (.*\S.*) $/, "$1"), chips));
        end = closing + found.length;
      }
    } else if (found[0] === "*" || found[0] === "_") {
      const marks = { 1: [found], 2: [found], 3: [found.slice(0, 2), found[0]] }[found.length];
      const before = text[at - 1] ?? " ", after = text[end] ?? " ";
      if (!marks) plain += found;
      else if (open.at(-1).mark.length === 1) marks.reverse().forEach((mark) => emphasis(mark, before, after));
      else marks.forEach((mark) => emphasis(mark, before, after));
    } else if (found === "[") {
      LINK.lastIndex = at;
      const whole = withLinks && LINK.exec(text);
      const made = whole && link(whole[2]);
      if (made) {
        add(addInline(made, whole[1], chips, false));
        end = at + whole[0].length;
      } else plain += found;
    } else {
      const address = addressIn(found);
      const made = withLinks && link(address);
      end = at + (made ? address.length : found.length);
      if (made) add(addText(made, address, chips));
      else plain += found;
    }
    from = INLINE.lastIndex = end;
  }
  plain += text.slice(from);
  flush();
  while (open.length > 1) close();
  return parent;
}

/** Return an address without what belongs to the sentence around it; a parenthesis that it opens itself it also ends. */
function addressIn(found) {
  let end = found.length;
  let surplus = found.split(")").length - found.split("(").length;  // parentheses that were opened before it
  while (/[.,:;!?\]}_]/.test(found[end - 1]) || (found[end - 1] === ")" && surplus-- > 0)) end--;
  return found.slice(0, end);
}

/** Return where the run of backticks that ends inline code begins, or -1. */
function endOfCode(text, fence, from) {
  const runs = /`+/g;
  runs.lastIndex = from;
  for (let run; (run = runs.exec(text));) if (run[0].length === fence.length) return run.index;
  return -1;
}

function link(address) {
  if (!/^https?:\/\//.test(address) || !URL.canParse(address) || address.search(CHIPS) >= 0) return null;
  return element("a", { href: address, target: "_blank", rel: "noopener noreferrer nofollow" });
}

/** Append text, with the elements that private-use characters stand for. */
function addText(parent, text, chips) {
  let from = 0;
  for (const { index, 0: char } of text.matchAll(CHIPS)) {
    parent.append(text.slice(from, index), chips[char.charCodeAt(0) - 0xE000].make());
    from = index + 1;
  }
  if (from < text.length) parent.append(text.slice(from));
  return parent;
}
