// The little Markdown that models write, as DOM nodes: paragraphs, headings, lists, code, bold, italic.
// No links and no images: a text from a model must not make this page ask anybody for anything.

import { h } from "./dom.js";

const FENCE = /^\s*(`{3,}|~{3,})/;
const HEADING = /^(#{1,6})\s+(.*)$/;
const BULLET = /^\s*[-*+]\s+(.*)$/;
const NUMBER = /^\s*(\d{1,9})[.)]\s+(.*)$/;
// Longer lines stay plain: marks are looked for with some backtracking.
const LONGEST_LINE = 4000;
const INLINE = /(`{1,3})(.+?)\1|\*\*(?=\S)(.+?\S?)\*\*|\*(?=\S)([^*]*?[^*\s])\*|(?<![\w_])_(?=\S)([^_]*?[^_\s])_(?![\w_])/s;

/** Nodes for a text that may still be growing. */
export function markdown(text) {
  const lines = text.split("\n");
  const nodes = [];
  let at = 0;
  while (at < lines.length) {
    const [node, next] = block(lines, at);
    if (node) nodes.push(node);
    at = next;
  }
  return nodes;
}

function block(lines, at) {
  const line = lines[at];
  if (!line.trim()) return [null, at + 1];
  if (FENCE.test(line)) return code(lines, at);
  const heading = HEADING.exec(line);
  // Headings of an answer stay below those of the page.
  if (heading) return [h(`h${Math.min(heading[1].length + 2, 6)}`, {}, ...inline(heading[2])), at + 1];
  if (BULLET.test(line)) return list(lines, at, BULLET, h("ul"));
  const number = NUMBER.exec(line);
  if (number) return list(lines, at, NUMBER, h("ol", { start: number[1] }));
  return paragraph(lines, at);
}

function code(lines, at) {
  const fence = FENCE.exec(lines[at])[1];
  let end = at + 1;
  while (end < lines.length && !lines[end].trim().startsWith(fence)) end += 1;
  const text = lines.slice(at + 1, end).join("\n");
  return [h("pre", { tabindex: "0" }, h("code", {}, text)), end + 1];
}

function list(lines, at, pattern, element) {
  let next = at;
  for (let match; next < lines.length && (match = pattern.exec(lines[next])); next += 1) {
    element.append(h("li", {}, ...inline(match[match.length - 1])));
  }
  return [element, next];
}

function paragraph(lines, at) {
  const special = (line) => !line.trim() || [FENCE, HEADING, BULLET, NUMBER].some((pattern) => pattern.test(line));
  let next = at + 1;
  while (next < lines.length && !special(lines[next])) next += 1;
  const node = h("p");
  lines.slice(at, next).forEach((line, index) => {
    if (index) node.append(h("br"));
    node.append(...inline(line));
  });
  return [node, next];
}

function inline(text) {
  if (text.length > LONGEST_LINE) return [text];
  const nodes = [];
  let rest = text;
  for (let match; (match = INLINE.exec(rest)); rest = rest.slice(match.index + match[0].length)) {
    if (match.index) nodes.push(rest.slice(0, match.index));
    if (match[2] !== undefined) nodes.push(h("code", {}, match[2]));
    else if (match[3] !== undefined) nodes.push(h("strong", {}, ...inline(match[3])));
    else nodes.push(h("em", {}, match[4] ?? match[5]));
  }
  if (rest) nodes.push(rest);
  return nodes;
}
