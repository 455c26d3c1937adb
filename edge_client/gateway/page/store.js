// The conversations. In memory, unless the user asks to keep them: then also in this browser's localStorage.

import { shorten } from "./words.js";

const PLACE = "fl-llama.chat.1";
const SAVE_MS = 300;
export const NEW_TITLE = "New conversation";

const fresh = () => crypto.getRandomValues(new Uint32Array(3)).join("-");

/**
 * A conversation is {id, title, named, changed, settings, messages}; a message {id, role, content, state}, an answer also
 * {usage, fault}. States: done; and of an answer: waiting, streaming, stopped, cut (the connection went), failed.
 */
export class Store {
  conversations = [];
  current = null;
  keep = false;
  /** What went wrong with keeping, in words, or null. */
  trouble = null;
  #listeners = [];
  #timer = 0;
  #saved = new Set();

  constructor() {
    this.#load();
    if (!this.conversations.length) this.#add({});
    this.current = this.conversations[0];
    addEventListener("storage", (event) => event.key === PLACE && this.#adopt(event.newValue));
    addEventListener("pagehide", () => this.#save());
  }

  /** `listener(what)` hears of every change: "list" (titles, which one is shown) or "messages" (of the shown one). */
  listen(listener) {
    this.#listeners.push(listener);
  }

  /** Say that a conversation changed, and have it kept if the user wants that. */
  touch(conversation, what = "messages") {
    conversation.changed = Date.now();
    this.#later();
    this.#tell(what);
  }

  select(conversation) {
    this.current = conversation;
    this.#tell("list");
  }

  /** Show an empty conversation: the one there is, or a new one with the settings in use. */
  begin() {
    const empty = this.conversations.find((one) => !one.messages.length);
    this.select(empty ?? this.#add(this.current.settings));
  }

  rename(conversation, title) {
    conversation.title = shorten(title, 80) || conversation.title;
    conversation.named = true;
    this.touch(conversation, "list");
  }

  remove(conversation) {
    const place = this.conversations.indexOf(conversation);
    this.conversations.splice(place, 1);
    if (!this.conversations.length) this.#add(conversation.settings);
    if (this.current === conversation) this.current = this.conversations[Math.min(place, this.conversations.length - 1)];
    this.#later();
    this.#tell("list");
  }

  addMessage(conversation, role, content, state = "done") {
    const message = { id: fresh(), role, content, state };
    conversation.messages.push(message);
    if (!conversation.named && role === "user" && conversation.messages.length === 1) {
      conversation.title = shorten(content) || NEW_TITLE;
    }
    this.touch(conversation, "list");
    return message;
  }

  /** Switch keeping on or off; off removes what was kept. */
  setKeep(keep) {
    this.keep = keep;
    this.trouble = null;
    if (keep) this.#save();
    else this.#forget();
    this.#tell("list");
  }

  #add(settings) {
    const conversation = {
      id: fresh(),
      title: NEW_TITLE,
      named: false,
      changed: Date.now(),
      settings: { ...settings },
      messages: [],
    };
    this.conversations.unshift(conversation);
    return conversation;
  }

  #tell(what) {
    for (const listener of this.#listeners) listener(what);
  }

  #later() {
    if (this.keep && !this.#timer) this.#timer = setTimeout(() => this.#save(), SAVE_MS);
  }

  #save() {
    clearTimeout(this.#timer);
    this.#timer = 0;
    if (!this.keep) return;
    const kept = this.conversations.filter((one) => one.messages.length);
    try {
      localStorage.setItem(PLACE, JSON.stringify(kept));
      this.#saved = new Set(kept.map((one) => one.id));
    } catch {
      this.trouble = "This browser has no room left for them (or forbids keeping): they are in memory only.";
      this.#tell("list");
    }
  }

  #forget() {
    try {
      localStorage.removeItem(PLACE);
    } catch {
      // A browser that forbids keeping has kept nothing.
    }
  }

  #load() {
    let kept = null;
    try {
      kept = localStorage.getItem(PLACE);
    } catch {
      return;
    }
    if (kept === null) return;
    this.keep = true;
    this.conversations = read(kept);
    this.#saved = new Set(this.conversations.map((one) => one.id));
  }

  // Another tab saved: take over what is newer there and not at work here, and let go what was deleted there.
  #adopt(text) {
    if (text === null) this.keep = false;
    const theirs = new Map(text === null ? [] : read(text).map((one) => [one.id, one]));
    const changed = (one) => theirs.has(one.id) && theirs.get(one.id).changed > one.changed && !isRunning(one);
    const deleted = (one) => text !== null && this.#saved.has(one.id) && !theirs.has(one.id) && !isRunning(one);
    const mine = this.conversations.filter((one) => !deleted(one)).map((one) => (changed(one) ? theirs.get(one.id) : one));
    const known = new Set(this.conversations.map((one) => one.id));
    this.conversations = [...mine, ...[...theirs.values()].filter((one) => !known.has(one.id))];
    this.#saved = new Set(theirs.keys());
    if (!this.conversations.length) this.#add(this.current.settings);
    this.current = this.conversations.find((one) => one.id === this.current.id) ?? this.conversations[0];
    this.#tell("list");
  }
}

/** Whether an answer is being made in it. */
export function isRunning(conversation) {
  return isOpen(conversation.messages.at(-1));
}

/** Whether this answer is not over. */
export function isOpen(message) {
  return message !== undefined && (message.state === "waiting" || message.state === "streaming");
}

// What is kept may be of another version, or written by somebody's hand.
function read(text) {
  try {
    return JSON.parse(text)
      .filter((one) => typeof one.id === "string" && typeof one.title === "string" && Array.isArray(one.messages))
      .map((one) => ({ ...one, settings: { ...one.settings }, messages: one.messages.filter(isMessage).map(closed) }));
  } catch {
    return [];
  }
}

const isMessage = (one) => typeof one?.id === "string" && typeof one.content === "string";

// An answer that was kept half: its tab was closed in the middle.
const closed = (message) => (isOpen(message) ? { ...message, state: "cut" } : message);
