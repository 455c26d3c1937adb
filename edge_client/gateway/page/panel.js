// "What left this computer": the picture, the counters, the setting in words, and the figures of one answer.

import { byId, h } from "./dom.js";
import { createPicture } from "./picture.js";
import { blockRange, bytes, whole } from "./words.js";

export class Panel {
  #picture = createPicture(byId("picture"));
  #hello = null;

  constructor() {
    const guess = { partition: [1, 1], blocks: 8, noise: { sigma: 1 } };
    this.#picture.tell(guess);
  }

  /** The setting in force. */
  tell(hello) {
    this.#hello = hello;
    this.#picture.tell(hello);
    const { partition: [p, q], blocks, hidden_size: width, codec, noise, server } = hello;
    byId("fact-row").textContent = `Rows of ${whole(width)} numbers, one for each token, as ${codec}. How many and when shows too.`;
    byId("fact-noise").textContent = describe(noise);
    const first = p ? blockRange(0, p) : "the embedding";
    const last = q ? `${blockRange(blocks - q, blocks)} and the head` : "the head";
    byId("fact-here").textContent = `Text, tokens, ${first}, ${last}, their keys and values, the choice of every word.`;
    byId("fact-there").textContent = `${sentence(blockRange(p, blocks - q))} of ${blocks}, with their keys and values, at ${server}`;
  }

  /** Sums since the page was opened. */
  count(totals) {
    byId("count-rows").textContent = whole(totals.rows_up);
    byId("count-up").textContent = bytes(totals.bytes_up);
    byId("count-down").textContent = bytes(totals.bytes_down);
  }

  fly(rows) {
    this.#picture.fly(rows);
  }

  word(text) {
    this.#picture.word(text);
  }

  /** Figures of the shown conversation's last answer. */
  figures(usage) {
    byId("figures").replaceChildren(...(usage ? rows(usage) : [h("div", {}, h("dt", {}, "None yet"), h("dd"))]));
  }
}

function rows(usage) {
  // Two columns: each line belongs together.
  const pairs = [
    ["Tokens a second", usage.tokens_per_second ? usage.tokens_per_second.toFixed(1) : "\u2026"],
    ["First token after", usage.ttft_ms ? `${whole(usage.ttft_ms)} ms` : "\u2026"],
    ["Tokens", whole(usage.completion_tokens)],
    ["Prompt tokens", whole(usage.prompt_tokens)],
    ["Round trips", whole(usage.round_trips)],
    ["of them cached", whole(usage.cached_tokens)],
    ["Tokens a trip", usage.round_trips ? (usage.completion_tokens / usage.round_trips).toFixed(2) : "\u2026"],
    ["Rows sent", whole(usage.rows_up)],
    ["Bytes sent", bytes(usage.bytes_up)],
    ["Bytes received", bytes(usage.bytes_down)],
  ];
  if (usage.drafted) pairs.push(["Guesses sent", whole(usage.drafted)], ["of them right", whole(usage.accepted)]);
  return pairs.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)));
}

function describe({ sigma, clip, setting }) {
  if (!sigma) return "Off: rows go over as they are.";
  const limit = clip ? `, rows clipped to length ${clip.toPrecision(3)}` : "";
  return `Standard deviation ${sigma.toPrecision(3)} on every number (${setting})${limit}.`;
}

const sentence = (text) => text[0].toUpperCase() + text.slice(1);
