// The chat page: one conversation, streamed from /v1/chat/completions of the server that it came
// from. The state is `turns`; everything on the screen is drawn from it.
import { blocks, element } from "./markdown.js";

const $ = (id) => document.getElementById(id);
const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed"];
const STORE = "pomona.chat";
const OPTIONS = "pomona.options";
const KEY = "pomona.key";

let turns = []; // { role, content, stats?, error?, stopped? }
let cards = []; // the models
let running = null; // the AbortController of the answer under way
let views = []; // by turn: { root, text, shown: sources of drawn blocks, under }
let pinned = true; // whether the view follows the end

// ---- what is kept ----

function load(store, name, otherwise) {
  try {
    return JSON.parse(store.getItem(name)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

function save(store, name, value) {
  try {
    store.setItem(name, JSON.stringify(value));
  } catch {
    // Full or forbidden: the page works without.
  }
}

const saveTurns = () => save(localStorage, STORE, turns);

function saveOptions() {
  const options = { model: $("model").value, system: $("system").value };
  for (const name of NUMBERS) options[name] = $(name).value;
  save(localStorage, OPTIONS, options);
  save(sessionStorage, KEY, $("key").value);
}

function restore() {
  const options = load(localStorage, OPTIONS, {});
  $("system").value = options.system ?? "";
  for (const name of NUMBERS) $(name).value = options[name] ?? "";
  $("key").value = load(sessionStorage, KEY, "");
  const kept = load(localStorage, STORE, []);
  const good = (turn) => turn && ["user", "assistant"].includes(turn.role) && typeof turn.content === "string";
  turns = Array.isArray(kept) ? kept.filter(good) : [];
  return options.model;
}

// ---- the server ----

function headers() {
  const key = $("key").value.trim();
  const all = { "content-type": "application/json" };
  if (key) all.authorization = "Bearer " + key;
  return all;
}

async function failure(response) {
  let message = `the server answered ${response.status}`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // Not ours; the status must do.
  }
  const again = response.headers.get("retry-after");
  return new Error(again ? `${message} (try again in ${again} s)` : message);
}

async function loadModels(wanted) {
  const select = $("model");
  try {
    const response = await fetch("/v1/models", { headers: headers() });
    if (!response.ok) throw await failure(response);
    const { data } = await response.json();
    cards = data;
    select.replaceChildren(...data.map((model) => new Option(model.id, model.id)));
    if (data.some((model) => model.id === wanted)) select.value = wanted;
    select.disabled = data.length === 0;
    introduce();
    status("");
  } catch (error) {
    select.replaceChildren(new Option("no model", ""));
    select.disabled = true;
    status(`No models: ${error.message}`);
    if (/key/i.test(error.message)) showSettings(true, $("key"));
  }
  enable();
}

/** Whether the chosen model can chat; one without a chat template only continues texts. */
const chats = () => cards.find((card) => card.id === $("model").value)?.chat !== false;

function introduce() {
  $("who").textContent = $("model").value || "a model";
  $("greeting").textContent = chats() ? "What shall we talk about?" : "How does it begin?";
  $("how").hidden = chats();
  $("prompt").placeholder = chats() ? "Write a message…" : "Begin a text, the model goes on…";
}

/** Yields the JSON of each event of a stream. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ")) continue;
      const data = part.slice(6);
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function request() {
  const system = $("system").value.trim();
  const body = { model: $("model").value, stream: true };
  if (chats()) {
    const said = turns.filter((turn) => turn.content || turn.role === "user");
    body.messages = said.map(({ role, content }) => ({ role, content }));
    if (system) body.messages.unshift({ role: "system", content: system });
  } else {
    body.prompt = system + turns.map((turn) => turn.content).join("");
    body.max_tokens = 256;
  }
  body.stream_options = { include_usage: true, continuous_usage_stats: true };
  for (const name of NUMBERS) {
    const value = $(name).value.trim();
    if (value !== "") body[name] = Number(value);
  }
  return body;
}

async function answer() {
  const body = request();
  const turn = { role: "assistant", content: "", stats: { model: body.model } };
  turns.push(turn);
  const mine = (running = new AbortController());
  const clock = { start: performance.now(), first: 0, last: 0, drawn: 0 };
  pinned = true;
  draw();
  enable();
  try {
    const options = { method: "POST", headers: headers(), body: JSON.stringify(body), signal: mine.signal };
    const path = body.messages ? "/v1/chat/completions" : "/v1/completions";
    const response = await fetch(path, options);
    if (!response.ok) throw await failure(response);
    for await (const event of events(response)) take(turn, event, clock);
  } catch (error) {
    if (error.name === "AbortError") turn.stopped = true;
    else turn.error = error.message === "Failed to fetch" ? "The server cannot be reached." : error.message;
  }
  // Another conversation may have begun meanwhile.
  if (running === mine) running = null;
  if (turns.at(-1) !== turn) return;
  saveTurns();
  draw();
  enable();
  $("prompt").focus({ preventScroll: true });
}

function take(turn, event, clock) {
  if (event.error) throw new Error(event.error.message);
  const choice = event.choices[0];
  const now = performance.now();
  const text = choice?.delta?.content || choice?.text;
  if (text) {
    clock.first ||= now;
    clock.last = now;
    turn.content += text;
  }
  if (choice?.finish_reason) turn.stats.finish = choice.finish_reason;
  if (event.usage && clock.first) measure(turn.stats, event.usage, clock);
  if (!clock.drawn) {
    clock.drawn = requestAnimationFrame(() => {
      clock.drawn = 0;
      if (running && turns.at(-1) === turn) drawTurn(turns.length - 1);
    });
  }
}

function measure(stats, usage, clock) {
  stats.ttft = clock.first - clock.start;
  stats.tokens = usage.completion_tokens;
  stats.prompt = usage.prompt_tokens;
  stats.cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
  const seconds = (clock.last - clock.first) / 1000;
  // The first token is the prompt's; a rate over a blink means nothing.
  if (stats.tokens > 1 && seconds > 0.02) stats.rate = (stats.tokens - 1) / seconds;
}

// ---- drawing ----

function make(name, className, text) {
  const node = document.createElement(name);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function iconButton(icon, title, act) {
  const button = make("button", "quiet");
  button.type = "button";
  button.title = title;
  button.setAttribute("aria-label", title);
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", "#" + icon);
  svg.append(use);
  button.append(svg);
  button.addEventListener("click", () => act(button, use));
  return button;
}

function draw() {
  $("welcome").hidden = turns.length > 0;
  while (views.length > turns.length) views.pop().root.remove();
  turns.forEach((_, index) => drawTurn(index));
}

function view(index) {
  if (views[index]) return views[index];
  const root = make("article", "turn " + turns[index].role);
  const text = make("div", "text");
  root.append(text);
  $("log").append(root);
  return (views[index] = { root, text, shown: [], under: null });
}

function drawTurn(index) {
  const turn = turns[index];
  const { root, text, shown } = view(index);
  const busy = running !== null && index === turns.length - 1;
  root.className = `turn ${turn.role}${busy ? " busy" : ""}`;
  if (turn.role === "user") text.textContent = turn.content;
  else drawMarkdown(text, shown, turn.content);
  drawUnder(index, busy);
  follow();
}

/** Draws only the blocks that have changed: usually the last one. */
function drawMarkdown(text, shown, content) {
  const sources = blocks(content);
  while (shown.length > sources.length) {
    shown.pop();
    text.lastElementChild.remove();
  }
  sources.forEach((source, at) => {
    if (shown[at] === source) return;
    const node = element(source);
    if (at < shown.length) text.children[at].replaceWith(node);
    else text.append(node);
    shown[at] = source;
  });
}

function figures(turn, busy) {
  const { ttft, tokens, rate, prompt, cached, finish } = turn.stats ?? {};
  const parts = [];
  if (ttft !== undefined) parts.push(`first token ${ttft < 1000 ? Math.round(ttft) + " ms" : (ttft / 1000).toFixed(1) + " s"}`);
  if (rate) parts.push(`${rate < 100 ? rate.toFixed(1) : Math.round(rate)} tok/s`);
  if (tokens) parts.push(`${tokens} tokens`);
  if (prompt && !busy) parts.push(`prompt ${prompt}${cached ? ` (${cached} cached)` : ""}`);
  if (turn.stopped) parts.push("stopped");
  else if (finish === "length" && !busy) parts.push("cut at the limit");
  return parts.join(" · ");
}

function drawUnder(index, busy) {
  const turn = turns[index];
  if (turn.role === "user") return;
  const seen = view(index);
  const line = figures(turn, busy);
  if (busy && seen.under) {
    seen.under.querySelector(".stats").textContent = line;
    return;
  }
  seen.under?.remove();
  seen.root.querySelector(".error")?.remove();
  const under = make("div", "under");
  const last = index === turns.length - 1;
  if (!busy && turn.content) under.append(iconButton("copy", "Copy", (_, use) => copyText(turn.content, use)));
  if (!busy && last) under.append(iconButton("again", "Answer again", again));
  under.append(make("span", "stats", line));
  if (turn.error) {
    const note = make("div", "error", turn.error);
    note.setAttribute("role", "alert");
    seen.root.append(note);
  }
  seen.root.append(under);
  seen.under = under;
  if (last) status(busy ? "Answering…" : "");
}

function follow() {
  const scroll = $("scroll");
  if (pinned) scroll.scrollTop = scroll.scrollHeight;
  $("latest").hidden = pinned;
}

const status = (text) => ($("status").textContent = text);

async function copyText(text, use) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Without HTTPS there is no clipboard but the old one.
    const area = make("textarea", "unseen", text);
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  if (!use) return;
  use.setAttribute("href", "#check");
  setTimeout(() => use.setAttribute("href", "#copy"), 1200);
}

function enable() {
  $("stop").hidden = running === null;
  $("send").hidden = running !== null;
  $("send").disabled = !$("prompt").value.trim() || $("model").disabled;
}

function grow() {
  const area = $("prompt");
  area.style.height = "auto";
  area.style.height = area.scrollHeight + "px";
  enable();
}

// ---- what the user does ----

function send(text) {
  if (running || !text.trim() || $("model").disabled) return;
  const wrong = document.querySelector("#settings :invalid");
  if (wrong) {
    showSettings(true, wrong);
    wrong.reportValidity();
    return;
  }
  turns.push({ role: "user", content: text.trim() });
  $("prompt").value = "";
  grow();
  answer();
}

function again() {
  if (running || !turns.length) return;
  if (turns.at(-1).role === "assistant") {
    turns.pop();
    views.pop().root.remove();
  }
  answer();
}

function stop() {
  running?.abort();
}

function startOver() {
  stop();
  running = null;
  turns = [];
  saveTurns();
  draw();
  enable();
  status("");
  $("prompt").focus();
}

function showSettings(open, focus) {
  $("settings").hidden = !open;
  $("toggle").setAttribute("aria-expanded", String(open));
  (open ? (focus ?? $("system")) : $("prompt")).focus();
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send($("prompt").value);
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send($("prompt").value);
});
$("prompt").addEventListener("input", grow);
$("stop").addEventListener("click", stop);
$("new").addEventListener("click", startOver);
$("toggle").addEventListener("click", () => showSettings($("settings").hidden));
$("close").addEventListener("click", () => showSettings(false));
$("latest").addEventListener("click", () => {
  pinned = true;
  follow();
});
$("scroll").addEventListener("scroll", () => {
  const { scrollTop, scrollHeight, clientHeight } = $("scroll");
  pinned = scrollHeight - scrollTop - clientHeight < 60;
  $("latest").hidden = pinned;
});
$("reset").addEventListener("click", () => {
  for (const name of ["system", ...NUMBERS]) $(name).value = "";
  saveOptions();
});
$("settings").addEventListener("input", saveOptions);
$("key").addEventListener("change", () => loadModels($("model").value));
$("model").addEventListener("change", () => {
  introduce();
  saveOptions();
});
$("log").addEventListener("click", (event) => {
  const button = event.target.closest("[data-copy]");
  if (!button) return;
  copyText(button.closest(".code").querySelector("code").textContent);
  button.textContent = "Copied";
  setTimeout(() => (button.textContent = "Copy"), 1200);
});
for (const idea of document.querySelectorAll(".ideas button")) {
  idea.addEventListener("click", () => send(idea.textContent));
}
addEventListener("keydown", (event) => {
  if (event.key === "Escape") {
    if (running) stop();
    else if (!$("settings").hidden) showSettings(false);
  } else if (event.altKey && event.code === "KeyN") {
    event.preventDefault();
    startOver();
  } else if (event.altKey && event.code === "KeyS") {
    event.preventDefault();
    showSettings($("settings").hidden);
  }
});
// A page that goes away in the middle keeps what it has.
addEventListener("pagehide", () => {
  if (running) turns.at(-1).stopped = true;
  saveTurns();
});

const wanted = restore();
draw();
grow();
loadModels(wanted);
