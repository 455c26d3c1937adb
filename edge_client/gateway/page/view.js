// The messages of the conversation that is shown.

import { byId, h, icon } from "./dom.js";
import { markdown } from "./markdown.js";
import { isOpen, isRunning } from "./store.js";
import { bytes, explain, plural } from "./words.js";

const NEAR_END = 80;
const COPIED_MS = 1500;

export class Messages {
  #actions;
  #scroll = byId("scroll");
  #list = byId("messages");
  #nodes = new Map();
  #dirty = new Set();
  #shown = null;
  #follows = true;
  #lastTop = 0;

  /** `actions`: edit(conversation), again(conversation). */
  constructor(actions) {
    this.#actions = actions;
    this.#scroll.addEventListener("scroll", () => this.#noteScroll(), { passive: true });
    // The keyboard of a phone or a notice takes room: what was in view at the end stays there.
    new ResizeObserver(() => this.#follows && this.#toEnd()).observe(this.#scroll);
  }

  /** Show a conversation, or what changed in it. */
  show(conversation) {
    this.#noteScroll();
    if (this.#shown !== conversation) this.#follows = true;
    if (this.#shown !== conversation) this.#nodes.clear();
    this.#shown = conversation;
    const kept = new Map();
    for (const message of conversation.messages) kept.set(message.id, this.#render(conversation, message));
    this.#nodes = kept;
    this.#place([...kept.values()].map((node) => node.element));
    byId("empty").hidden = conversation.messages.length > 0;
    if (this.#follows) this.#toEnd();
  }

  /** New text or figures of one message: drawn with the next picture on the screen, however many tokens come until then. */
  refresh(message) {
    if (!this.#nodes.has(message.id)) return;
    if (!this.#dirty.size) requestAnimationFrame(() => this.#draw());
    this.#dirty.add(message);
  }

  #draw() {
    this.#noteScroll();
    for (const message of this.#dirty) {
      const node = this.#nodes.get(message.id);
      if (node) this.#fill(node, this.#shown, message);
    }
    this.#dirty.clear();
    if (this.#follows) this.#toEnd();
  }

  // Only who scrolls up stops following: the end also moves away when the text grows or the window shrinks.
  #noteScroll() {
    const { scrollTop } = this.#scroll;
    if (scrollTop < this.#lastTop || this.#isAtEnd()) this.#follows = this.#isAtEnd();
    this.#lastTop = scrollTop;
  }

  #toEnd() {
    this.#scroll.scrollTop = this.#scroll.scrollHeight;
    this.#lastTop = this.#scroll.scrollTop;
  }

  #isAtEnd() {
    const { scrollTop, scrollHeight, clientHeight } = this.#scroll;
    return scrollHeight - scrollTop - clientHeight < NEAR_END;
  }

  // Nodes that stay are not moved: moving one would take its focus and selection.
  #place(elements) {
    for (const child of [...this.#list.children]) if (!elements.includes(child)) child.remove();
    elements.forEach((element, index) => {
      if (this.#list.children[index] !== element) this.#list.insertBefore(element, this.#list.children[index] ?? null);
    });
  }

  #render(conversation, message) {
    let node = this.#nodes.get(message.id);
    if (!node) {
      const who = h("h2", { class: "sr" }, message.role === "user" ? "You asked" : "Answer");
      const body = h("div", { class: "body" });
      const under = h("div", { class: "under" });
      const element = h("li", { class: `message ${message.role}` }, who, body, under);
      node = { element, body, under, text: null, key: null };
    }
    this.#fill(node, conversation, message);
    return node;
  }

  #fill(node, conversation, message) {
    if (message.role === "user") {
      if (node.text !== message.content) node.body.replaceChildren(message.content);
    } else if (message.content) {
      if (node.text !== message.content) node.body.replaceChildren(...markdown(message.content));
    } else node.body.replaceChildren(...(isOpen(message) ? [thinking()] : []));
    node.text = message.content;
    node.element.setAttribute("aria-busy", String(isOpen(message)));
    this.#fillUnder(node, conversation, message);
  }

  #fillUnder(node, conversation, message) {
    const last = message === conversation.messages.at(-1);
    const question = message.role === "user" && message === conversation.messages.findLast((one) => one.role === "user");
    const running = isRunning(conversation);
    // Buttons are built anew only when they change, so that none is lost under a finger or a focus.
    const key = [message.state, last, question, running, Boolean(message.content)].join();
    if (node.key !== key) {
      node.key = key;
      node.figures = h("span", { class: "small" });
      const parts = message.role === "user" ? this.#forQuestion(message, question && !running) : this.#forAnswer(message, last);
      node.under.replaceChildren(node.figures, ...parts);
      for (const old of node.element.querySelectorAll(".fault-box, .cut-note")) old.remove();
      const note = this.#note(conversation, message, last);
      if (note) node.under.before(note);
    }
    node.figures.textContent = message.role === "user" ? "" : figuresOf(message);
  }

  #forQuestion(message, editable) {
    const edit = () => this.#actions.edit(this.#shown);
    return [
      copyButton(message, "Copy the question"),
      editable ? button("rename", "Change the question and ask again", edit) : null,
    ].filter(Boolean);
  }

  #forAnswer(message, last) {
    if (isOpen(message)) return [];
    const again = last && message.state !== "failed" && message.state !== "cut";
    return [
      message.content ? copyButton(message, "Copy the answer") : null,
      again ? button("again", "Ask again", () => this.#actions.again(this.#shown)) : null,
    ].filter(Boolean);
  }

  #note(conversation, message, last) {
    const again = last ? h("button", { class: "button", type: "button", onclick: () => this.#actions.again(conversation) }, "Ask again") : null;
    if (message.state === "stopped") return h("p", { class: "small cut-note" }, "You stopped this answer.");
    if (message.cutShort) return h("p", { class: "small cut-note" }, "The longest answer allowed ends here; Settings has the limit.");
    if (message.state === "cut") {
      const words = "The connection to the gateway was lost while this was written.";
      return h("div", { class: "fault-box", role: "alert" }, h("strong", {}, words), "What came until then is above; its end is missing.", h("br"), again);
    }
    if (message.state !== "failed") return null;
    const { what, todo } = explain(message.fault.code);
    const more = h("details", {}, h("summary", {}, "What the gateway says"), message.fault.text);
    return h("div", { class: "fault-box", role: "alert" }, h("strong", {}, what), todo, more, again);
  }
}

function thinking() {
  const dots = [1, 2, 3].map(() => h("i"));
  return h("span", { class: "thinking", role: "img", "aria-label": "Waiting for the first word" }, ...dots);
}

function figuresOf({ usage }) {
  if (!usage) return "";
  const parts = [plural(usage.completion_tokens, "token")];
  if (usage.tokens_per_second) parts.push(`${usage.tokens_per_second.toFixed(1)} a second`);
  parts.push(plural(usage.round_trips, "round trip"));
  parts.push(`${bytes(usage.bytes_up)} sent`);
  return parts.join(" \u00b7 ");
}

function button(name, label, onclick) {
  return h("button", { class: "icon-button", type: "button", title: label, "aria-label": label, onclick }, icon(name));
}

function copyButton(message, label) {
  const element = button("copy", label, async () => {
    await copy(message.content);
    element.replaceChildren(icon("done"));
    element.setAttribute("aria-label", "Copied");
    setTimeout(() => {
      element.replaceChildren(icon("copy"));
      element.setAttribute("aria-label", label);
    }, COPIED_MS);
  });
  return element;
}

async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  // Without TLS and not on this machine, browsers offer the old way only.
  const area = h("textarea", { class: "sr", readonly: true });
  area.value = text;
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}
