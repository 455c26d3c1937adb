// The live picture: what stays on this computer on the left, the server on the right, rows of numbers flying between.

import { s } from "./dom.js";
import { blockRange } from "./words.js";

const HERE = { x: 1, width: 202 };
const THERE = { x: 265, width: 94 };
const HEIGHT = 300;
const UP_Y = 120;
const DOWN_Y = 209;
const FLIGHT_MS = 650;
// Apart enough to be told from each other; a long prompt's many rows are a few strips.
const APART_MS = 240;
const MOST_WAITING = 5;
const LONGEST_WORD = 13;
// A strip of shades stands for a row of numbers; the pattern means nothing.
const SHADES = [0.95, 0.45, 0.75, 0.3, 0.85, 0.55, 1, 0.4];

const text = (x, y, words, name, anchor = "middle") => s("text", { x, y, class: name, "text-anchor": anchor }, words);
const box = (x, y, width, height, name, rx = 7) => s("rect", { x, y, width, height, rx, class: name });
const path = (d, name) => s("path", { d, class: name });

/** Draw into `place`; gives {tell(hello), fly(rows), word(text)}. */
export function createPicture(place) {
  const calm = matchMedia("(prefers-reduced-motion: reduce)");
  // Rows fly above the ground and below the boxes: they come out of one and vanish into the next.
  const layer = s("g");
  const model = s("g");
  const word = text(70, 60, "your words", "pic-word");
  place.replaceChildren(frame(...ground(), layer, ...boxes(word), model));
  let waiting = 0;
  let timer = 0;

  const launch = () => {
    timer = waiting > 0 ? setTimeout(launch, APART_MS) : 0;
    if (!timer) return;
    waiting -= 1;
    cross(true).then(() => cross(false));
  };
  const cross = async (up) => {
    const [from, to] = up ? [156, 272] : [272, 156];
    const strip = row((up ? UP_Y : DOWN_Y) - 4.5, up ? "pic-up" : "pic-down");
    layer.append(strip);
    const frames = [
      { transform: `translateX(${from}px)` },
      { transform: `translateX(${to}px)` },
    ];
    await strip.animate(frames, { duration: FLIGHT_MS, fill: "both" }).finished;
    strip.remove();
  };

  return {
    /** Show the model's blocks and who has which. */
    tell(hello) {
      model.replaceChildren(...blocks(hello));
    },
    /** Let rows go over and back. */
    fly(rows) {
      if (calm.matches || document.hidden) return;
      waiting = Math.min(waiting + rows, MOST_WAITING);
      if (!timer) launch();
    },
    /** Show the newest words, where they stay. */
    word(piece) {
      const shown = piece.split(/\s+/).findLast((part) => /[\p{L}\p{N}]/u.test(part));
      if (shown) word.textContent = shown.length > LONGEST_WORD ? `${shown.slice(0, LONGEST_WORD - 1)}\u2026` : shown;
    },
  };
}

function frame(...children) {
  const told =
    "Words, tokens and the outer blocks with their keys and values stay on this computer. Rows of numbers go to the " +
    "server's middle blocks, and rows of numbers come back.";
  return s(
    "svg",
    { viewBox: `0 0 360 ${HEIGHT}`, role: "img", "aria-labelledby": "picture-title picture-told" },
    s("title", { id: "picture-title" }, "What stays here and what goes to the server"),
    s("desc", { id: "picture-told" }, told),
    ...children,
  );
}

function row(y, name) {
  const cells = SHADES.map((shade, index) => {
    return s("rect", { x: index * 4.2, y, width: 3.5, height: 9, rx: 1, "fill-opacity": shade });
  });
  return s("g", { class: `pic-row ${name}` }, ...cells);
}

function ground() {
  return [
    box(HERE.x, 1, HERE.width, HEIGHT - 2, "pic-here", 12),
    box(THERE.x, 1, THERE.width, HEIGHT - 2, "pic-there", 12),
    text(16, 26, "This computer", "pic-title pic-ink-here", "start"),
    text(THERE.x + THERE.width / 2, 26, "Server", "pic-title pic-ink-there"),
    path(`M192 ${UP_Y}H270`, "pic-wire pic-up"),
    path(`M270 ${DOWN_Y}H196`, "pic-wire pic-down"),
    text(234, UP_Y - 12, "rows", "pic-small pic-ink-up"),
    text(234, DOWN_Y + 21, "rows", "pic-small pic-ink-down"),
  ];
}

// Round trip: words, first blocks, noise, over, back, last blocks, the next word.
function boxes(word) {
  return [
    box(30, 40, 162, 32, "pic-box"),
    path("M112 47V65", "pic-line"),
    word,
    text(152, 60, "tokens", "pic-small"),
    path("M72 72V90", "pic-line"),
    path("M68.5 87L72 93L75.5 87z", "pic-tip"),
    path("M116 120H126", "pic-line"),
    path("M124 116.5L130 120L124 123.5z", "pic-tip"),
    path("M92 209H26Q18 209 18 201V64Q18 56 25 56", "pic-line"),
    path("M23 52.5L29 56L23 59.5z", "pic-tip"),
    box(271, 46, 82, 192, "pic-box"),
    path(`M264 ${UP_Y - 4.5}L271 ${UP_Y}L264 ${UP_Y + 4.5}z`, "pic-wire-tip pic-up"),
    ...memory(30, 162, ["keys and values", "of these blocks"]),
    ...memory(271, 82, ["its keys", "and values"]),
  ];
}

function memory(x, width, lines) {
  const cells = [0, 1, 2, 3, 4, 5].map((cell) => {
    return s("rect", { x: x + 8 + (cell % 2) * 6, y: 254 + Math.floor(cell / 2) * 7, width: 5, height: 5, rx: 1, class: "pic-cell" });
  });
  const words = lines.map((line, index) => text(x + 25, 261 + index * 13, line, "pic-tiny", "start"));
  return [box(x, 246, width, 36, "pic-box pic-faint"), ...cells, ...words];
}

function blocks({ partition: [p, q], blocks: total, noise }) {
  const last = q ? [blockRange(total - q, total), "and head"] : ["head"];
  const noisy = noise.sigma > 0;
  return [
    box(30, 94, 86, 52, "pic-box"),
    ...stack(38, 100, 40, Math.max(p, 1), "pic-block-here"),
    ...lines(65, 120, p ? blockRange(0, p).replace("blocks ", "blocks\n").split("\n") : ["embed-", "ding"]),
    box(132, 102, 60, 36, noisy ? "pic-noise" : "pic-noise pic-off"),
    text(162, 124.5, noisy ? "+ noise" : "no noise", "pic-small"),
    box(88, 183, 104, 52, "pic-box"),
    path(`M199 ${DOWN_Y - 4.5}L192 ${DOWN_Y}L199 ${DOWN_Y + 4.5}z`, "pic-wire-tip pic-down"),
    ...stack(96, 189, 40, Math.max(q, 1), "pic-block-here"),
    ...lines(124, 209, last),
    text(312, 66, blockRange(p, total - q), "pic-small"),
    ...stack(284, 76, 156, total - p - q, "pic-block-there", 56, 14),
  ];
}

function lines(x, middle, words) {
  const top = middle + 4.5 - (words.length - 1) * 7.5;
  return words.map((line, index) => text(x, top + index * 15, line, "pic-small", "start"));
}

// A few bars: how many blocks there are is told by the label.
function stack(x, y, height, count, name, width = 22, most = 5) {
  const shown = Math.min(count, most);
  const each = height / shown;
  const thick = Math.min(each - 3, 16);
  return Array.from({ length: shown }, (_, index) => box(x, y + index * each + (each - thick) / 2, width, thick, name, 3));
}
