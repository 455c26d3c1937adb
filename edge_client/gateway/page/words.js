// Numbers and errors in plain words.

/** 1234567 -> "1,234,567". */
export const whole = (number) => Math.round(number).toLocaleString("en");

/** Bytes as people read them. */
export function bytes(count) {
  if (count < 1000) return `${Math.round(count)} B`;
  const units = ["kB", "MB", "GB"];
  let value = count / 1000;
  let unit = 0;
  while (value >= 999.95 && unit < units.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return `${value.toFixed(value < 99.95 ? 1 : 0)} ${units[unit]}`;
}

/** "1 row", "2 rows". */
export const plural = (count, one, many = `${one}s`) => `${whole(count)} ${count === 1 ? one : many}`;

/** Blocks [first, end) of a model, as a range that ends with the last one. */
export function blockRange(first, end) {
  if (end <= first) return "no blocks";
  return end - first === 1 ? `block ${first}` : `blocks ${first}\u2013${end - 1}`;
}

/** The first line of a text, as a title. */
export function shorten(text, length = 48) {
  const line = text.trim().split("\n")[0].replace(/\s+/g, " ");
  if (line.length <= length) return line;
  const cut = line.slice(0, length);
  return `${cut.includes(" ") ? cut.slice(0, cut.lastIndexOf(" ")) : cut} \u2026`;
}

const ERRORS = {
  context_exceeded: [
    "This conversation has grown longer than the model can hold.",
    "Begin a new conversation, or shorten the question. Nothing was sent.",
  ],
  limit_exceeded: ["Too many answers are being made at the same time.", "Wait a moment, then ask again."],
  deadline_exceeded: ["The answer took longer than it may.", "Ask again, or ask for a shorter answer."],
  server_unreachable: [
    "The server that runs the middle blocks cannot be reached.",
    "Your text is still here. Check that the server runs and the network is up, then ask again.",
  ],
  server_fault: ["Something failed while the answer was made.", "Ask again. If it comes back, whoever runs the gateway finds more in its log."],
  out_of_pages: ["The server has no memory left for another conversation.", "Wait a moment, then ask again."],
  draining: ["The server is about to shut down and takes nothing new.", "Wait until it is back, then ask again."],
  bad_request: ["The gateway did not understand this question.", "Reload the page; it may be older than the gateway."],
  usage_error: ["The model cannot take this conversation as it is.", "See what it says below, and change the question or the settings."],
};

/** What happened and what to do, for an error's code. */
export function explain(code) {
  const [what, todo] = ERRORS[code] ?? ["The answer could not be made.", "Ask again. What the gateway says about it is below."];
  return { what, todo };
}
