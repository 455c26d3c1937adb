// The chat page: puts its parts together.

import { Answers } from "./answers.js";
import { Connection } from "./connection.js";
import { askKey, confirmDelete, editSettings, prepare } from "./dialogs.js";
import { byId, h, icon } from "./dom.js";
import { announcer, Composer, Drawers } from "./input.js";
import { Panel } from "./panel.js";
import { Sidebar } from "./sidebar.js";
import { isRunning, Store } from "./store.js";
import { Messages } from "./view.js";
import { blockRange } from "./words.js";

// What the bundled model knows; other models speak for themselves.
const DEMO_EXAMPLES = [
  "Tell me a story.",
  "Mia is in the kitchen. Tom is in the garden. There is a ball in the kitchen. Mia takes the ball. Mia goes to the garden. Who has the ball?",
];

const LOST = "The gateway does not answer. Is edge-client serve running?";

let hello = null;
let countdown = 0;

const store = new Store();
const announce = announcer(byId("announce"));
const panel = new Panel();
const drawers = new Drawers();
const connection = new Connection({ onState: showState, onMessage: take });
const answers = new Answers(store, connection, { onUsage: count, onText: grow });
const messages = new Messages({ edit: (conversation) => composer.edit(conversation), again });
const composer = new Composer({ send, stop: () => answers.stop(store.current) });
const sidebar = new Sidebar(store, { open, remove });

function take(message) {
  if (message.type !== "hello") return answers.take(message);
  hello = message;
  panel.tell(hello);
  showStatus();
  showExamples();
}

function send(text, isEdit) {
  const conversation = store.current;
  if (!connection.isOpen) return false;
  if (isEdit) {
    const at = conversation.messages.findLastIndex((message) => message.role === "user");
    conversation.messages.splice(at);
  }
  store.addMessage(conversation, "user", text);
  announce.begin();
  return answers.ask(conversation);
}

function again(conversation) {
  if (!connection.isOpen || isRunning(conversation)) return;
  if (conversation.messages.at(-1).role === "assistant") conversation.messages.pop();
  announce.begin();
  answers.ask(conversation);
  composer.focus();
}

function grow(conversation, message, piece) {
  panel.word(piece);
  if (conversation !== store.current) return;
  messages.refresh(message);
  announce.say(message.content);
}

function count(message, grown) {
  panel.count(answers.totals);
  panel.fly(grown.rows_up);
  if (store.current.messages.at(-1) === message) panel.figures(message.usage);
  messages.refresh(message);
}

function open(conversation) {
  store.select(conversation);
  drawers.close();
  composer.focus();
}

function remove(conversation) {
  confirmDelete(conversation, () => {
    answers.stop(conversation);
    store.remove(conversation);
  });
}

function showAll() {
  const conversation = store.current;
  byId("title").textContent = conversation.title;
  messages.show(conversation);
  sidebar.show();
  composer.show(conversation, connection.isOpen);
  panel.figures(conversation.messages.findLast((message) => message.usage)?.usage);
  if (!isRunning(conversation)) announce.end(conversation.messages.at(-1));
}

function showExamples() {
  const texts = hello.model === "demo" ? DEMO_EXAMPLES : [];
  const button = (text) => h("button", { class: "example", type: "button", onclick: () => composer.propose(text) }, text);
  byId("examples").replaceChildren(...texts.map(button));
}

function showStatus() {
  const { partition: [p, q], blocks, model } = hello;
  byId("status").dataset.state = "open";
  byId("status-text").textContent = `${model}: ${blockRange(p, blocks - q)} of ${blocks} on the server`;
}

function showState(state) {
  clearInterval(countdown);
  byId("status").dataset.state = state.name;
  if (state.name === "open") {
    notice();
  } else {
    answers.cut();
    byId("status-text").textContent = { connecting: "Connecting \u2026", waiting: "Not connected", key: "A key is needed" }[state.name];
  }
  if (state.name === "waiting") waitFor(state.at);
  if (state.name === "connecting" && !byId("notice").hidden) notice(LOST, "Trying again \u2026");
  if (state.name === "key") {
    notice();
    askKey(state.wrong, (key) => connection.connect(key));
  }
  composer.show(store.current, connection.isOpen);
}

function waitFor(time) {
  const say = () => {
    const seconds = Math.max(1, Math.ceil((time - Date.now()) / 1000));
    notice(LOST, `Trying again in ${seconds === 1 ? "a second" : `${seconds} seconds`}.`);
  };
  say();
  countdown = setInterval(say, 1000);
}

// The words are read aloud once; the seconds are for the eye only.
function notice(text = "", when = "") {
  byId("notice").hidden = !text;
  if (byId("notice-text").textContent !== text) byId("notice-text").textContent = text;
  byId("notice-when").textContent = when;
}

const ICONS = { "open-side": "menu", "open-settings": "settings", "open-panel": "panel", "close-panel": "close", send: "send", stop: "stop" };
for (const [id, name] of Object.entries(ICONS)) byId(id).append(icon(name));
byId("new").addEventListener("click", () => {
  store.begin();
  drawers.close();
  composer.focus();
});
byId("try-now").addEventListener("click", () => connection.tryNow());
byId("open-settings").addEventListener("click", () => {
  editSettings(store.current, hello?.defaults, () => store.touch(store.current));
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
  if (!drawers.close() && !composer.leaveEdit()) answers.stop(store.current);
});

prepare();
store.listen(showAll);
showAll();
connection.connect();
composer.focus();
