// The page: what the viewer does goes over the link, what comes goes to the player, and the rest says how it stands.

import {Link} from "/link.js";
import {Player, Recorder} from "/player.js";
import {compose, nodes, pending, read, split} from "/sentence.js";
import {Strip, clock} from "/strip.js";

const ROWS = {size: "size", colour: "colour", shape: "shape", motion: "motion", background: "colour"}; // row → words
const LOOKS = {circle: "●", square: "■", triangle: "▲", star: "★"};
const LIVELY = 2000; // milliseconds between requests that tell the server that someone is there
const SETTLE = 200; // milliseconds in which several chosen words become one prompt

const $ = (id) => document.getElementById(id);
const same = (text, other) => split(text).join(" ") === split(other).join(" ");
const state = {
  phase: "connecting", // ready | starting | playing | paused | full | lost | refused
  hello: null,
  prompt: "", // the newest that the server has
  wanted: "", // the one on its way there
  shown: "", // the one in the picture
  sent: [], // {prompt, number, at}: on their way into the picture
  number: 0,
  seed: 1,
  asked: 0, // when the stream was started
  begun: false, // whether frames that come are of this stream
  resume: "", // the prompt to go on with once the link is there
};
const prompt = $("prompt");
const player = new Player($("video"), shown);
const recorder = new Recorder($("video"));
const strip = new Strip($("film"), $("changes"), (text) => show(text));
const link = new Link({reply, frame, lost, refused});

// ------------------------------------------------------------------------------------------------ what is done

function start(seed = state.seed, text = prompt.value.trim() || state.prompt) {
  Object.assign(state, {seed, wanted: text, resume: "", begun: false, asked: performance.now()});
  $("seed").value = seed;
  player.clear();
  if (link.send("start", {prompt: text, seed})) return phase("starting");
  state.resume = text;
  phase("connecting");
  link.open();
}

function show(text) {
  prompt.value = text.trim();
  $("hint").textContent = "";
  written();
  if (!["playing", "paused", "starting"].includes(state.phase)) return start();
  if (same(text, state.wanted || state.prompt)) return;
  Object.assign(state, {asking: performance.now(), wanted: prompt.value});
  link.send("prompt", {prompt: prompt.value});
  written();
}

function pause(held = state.phase === "playing") {
  if (!["playing", "paused"].includes(state.phase)) return start();
  player.held = held;
  link.send("pause", {paused: held});
  phase(held ? "paused" : "playing");
}

function stop() {
  if (recorder.running) record();
  link.send("stop");
  state.begun = false;
  player.clear();
  phase("ready");
}

function record() {
  if (recorder.running) recorder.save(`rfjax-${split(state.shown).join("-").slice(0, 60)}-seed-${state.seed}`);
  else recorder.start(state.hello.fps), (state.recording = performance.now());
  $("tally").hidden = !recorder.running;
  $("record").setAttribute("aria-pressed", recorder.running);
  $("record").textContent = recorder.running ? "Save" : "Record";
}

const anew = () => start(Math.floor(Math.random() * 1e6));

// ------------------------------------------------------------------------------------------------ what comes

function reply({type, ...told}) {
  if (type === "hello") return greeted(told);
  if (type === "started") return started(told);
  if (type === "prompted") {
    Object.assign(state, {prompt: told.prompt, wanted: awaited(told.prompt)});
    state.sent.push({...told, at: state.asking});
  } else if (type === "refused") denied(told);
  else if (type === "figures") {
    state.dropped = told.dropped;
    if (state.phase === "playing") status(`${told.taken} of ${told.places} ${told.places === 1 ? "place" : "places"} taken`);
  }
  written();
}

function greeted(hello) {
  const first = !state.hello;
  state.hello = hello;
  player.fit(hello.width, hello.height, hello.fps);
  document.documentElement.style.setProperty("--aspect", hello.width / hello.height);
  prompt.maxLength = hello.prompt_limit;
  if (first) {
    prompt.value = hello.examples[0];
    furnish(hello);
    $("examples").open = matchMedia("(min-width: 52rem) and (min-aspect-ratio: 1/1)").matches;
    if (document.documentElement.scrollHeight > innerHeight) $("examples").open = false; // there is no room
  }
  prompt.disabled = false;
  if (state.resume) return start(state.seed, state.resume);
  phase("ready");
  written();
}

function started(told) {
  player.clear();
  player.held = false;
  player.skipped = 0;
  Object.assign(state, {begun: true, dropped: 0, prompt: told.prompt, wanted: awaited(told.prompt), shown: ""});
  state.sent = [{prompt: told.prompt, number: 0, at: state.asked}];
  strip.reset(state.hello.width / state.hello.height);
  written();
}

// What is still on its way once this prompt is there.
const awaited = (text) => (same(text, state.wanted) ? "" : state.wanted);

function denied({code, message}) {
  if (code === "late") return; // a newer one is on its way
  state.wanted = "";
  $("hint").textContent = message;
  if (code === "full") phase("full", message);
  else if (state.phase === "starting" && !state.begun) {
    link.send("stop"); // a stream that was to begin anew would go on, seen by nobody
    phase("ready");
  }
}

function frame(number, said, jpeg) {
  if (state.begun) player.push(number, said, jpeg);
}

// A frame is on the canvas.
function shown(entry, now) {
  if (state.phase === "starting") {
    $("first").textContent = ((now - state.asked) / 1000).toFixed(2);
    phase("playing");
  }
  const seconds = entry.number / state.hello.fps;
  const fresh = state.sent[0] && state.sent[0].number <= entry.prompt;
  strip.add(seconds, entry.bitmap, fresh);
  while (state.sent[0] && state.sent[0].number <= entry.prompt) {
    const came = state.sent.shift();
    if (came.number) $("change").textContent = ((now - came.at) / 1000).toFixed(2);
    state.shown = came.prompt;
    $("video").setAttribute("aria-label", `The video: ${came.prompt}`);
    strip.mark(seconds, came.prompt);
    written();
  }
}

function lost(reason) {
  if (state.phase === "starting") state.resume ||= state.wanted || state.prompt;
  if (["playing", "paused"].includes(state.phase)) state.resume ||= state.prompt;
  state.begun = false;
  player.clear();
  if (recorder.running) record();
  const said = state.phase === "lost" && $("curtain-why").textContent; // why it was lost, not why it cannot be had again yet
  phase("lost", said || reason || "The connection was lost.");
}

function refused(code, reason) {
  if (recorder.running) record();
  state.begun = false;
  player.clear();
  const watching = ["starting", "playing", "paused"].includes(state.phase);
  if (code === 4000 && !watching) return phase("ready"); // the link is opened again when it is wanted
  phase("refused", reason);
}

// ---------------------------------------------------------------------------------------------- how it stands

const WORDS = {
  connecting: "Connecting",
  ready: "Start",
  starting: "Starting",
  playing: "",
  paused: "",
  full: "Full",
  lost: "Reconnecting",
  refused: "Closed",
};

function phase(name, why = "") {
  state.phase = document.body.dataset.phase = name;
  const runs = ["starting", "playing", "paused"].includes(name);
  const able = runs || ["ready", "full", "refused"].includes(name);
  $("curtain-word").textContent = WORDS[name];
  $("curtain-why").textContent = why + (["full", "refused"].includes(name) ? " Press to try again." : "");
  $("curtain").disabled = !able || runs;
  $("curtain").setAttribute("aria-label", able && !runs ? "Start the video" : WORDS[name]);
  $("pause").textContent = {playing: "Pause", paused: "Go on"}[name] ?? "Start";
  for (const id of ["pause", "reseed"]) $(id).disabled = !able || name === "starting";
  $("restart").disabled = !runs || name === "starting";
  $("stop").disabled = !runs;
  $("record").disabled = !recorder.kind || !["playing", "paused"].includes(name);
  status({ready: "Ready", starting: "Starting", playing: "On air", paused: "Paused"}[name] ?? WORDS[name]);
}

function status(text) {
  if ($("status").textContent !== text) $("status").textContent = text;
}

// The sentence and its words, after either has changed.
function written() {
  const text = prompt.value, live = state.sent.length || ["playing", "paused"].includes(state.phase);
  const known = state.known;
  const marked = live ? pending(text, state.shown || "") : new Set();
  $("mirror").replaceChildren(...nodes(text, marked, known), document.createTextNode("\u200b"));
  const strange = known ? [...new Set(split(text))].filter((word) => !known.has(word)) : [];
  if (strange.length) $("hint").textContent = `Not among its words: ${strange.join(", ")}.`;
  else if ($("hint").textContent.startsWith("Not among")) $("hint").textContent = "";
  const there = !text.trim() || same(text, state.prompt) || same(text, state.wanted); // or on its way there
  $("show").hidden = Boolean(state.settling || !state.prompt || strange.length || there);
  if (!known) return;
  const said = read(text, state.hello.words);
  for (const button of document.querySelectorAll("#words button"))
    button.setAttribute("aria-pressed", said[button.dataset.row] === button.value);
}

function furnish(hello) {
  const list = $("examples").querySelector("ul");
  list.replaceChildren(...hello.examples.map((text) => {
    const item = document.createElement("li"), button = document.createElement("button");
    button.type = "button";
    button.textContent = text;
    button.onclick = () => show(text);
    item.append(button);
    return item;
  }));
  if (!Object.keys(hello.words).length) return;
  state.known = new Set(Object.values(hello.words).flat());
  $("words").replaceChildren(...Object.entries(ROWS).map(([row, group]) => {
    const [line, name, choices] = ["div", "span", "div"].map((tag) => document.createElement(tag));
    line.setAttribute("role", "group");
    name.id = `row-${row}`;
    name.textContent = row;
    line.setAttribute("aria-labelledby", name.id);
    choices.append(...hello.words[group].map((word) => choice(row, group, word)));
    line.append(name, choices);
    return line;
  }));
}

function choice(row, group, word) {
  const button = document.createElement("button"), look = document.createElement("i");
  button.type = "button";
  button.value = word;
  button.dataset.row = row;
  look.setAttribute("aria-hidden", "true");
  if (group === "colour") look.className = `swatch ${word}`;
  else if (LOOKS[word]) look.textContent = LOOKS[word];
  button.append(...(look.className || look.textContent ? [look] : []), word);
  button.onclick = () => choose(row, word);
  return button;
}

// Puts a word into the sentence; the size may also be taken out.
function choose(row, word) {
  const groups = state.hello.words;
  const said = {...read(state.hello.examples[0], groups), size: undefined};
  for (const [name, value] of Object.entries(read(prompt.value, groups))) if (value) said[name] = value;
  said[row] = row === "size" && said.size === word ? undefined : word;
  prompt.value = compose(said);
  clearTimeout(state.settling);
  state.settling = setTimeout(() => ((state.settling = 0), show(prompt.value)), SETTLE);
  written();
}

function figures() {
  const now = performance.now(), plays = state.phase === "playing";
  $("fps").textContent = plays ? player.rate(now).toFixed(1) : "–";
  $("hand").textContent = plays ? player.inHand.toFixed(1) : "–";
  $("dropped").textContent = (state.dropped ?? 0) + player.skipped;
  if (recorder.running) $("tally-time").textContent = clock((now - state.recording) / 1000);
}

// --------------------------------------------------------------------------------------------------- controls

$("curtain").onclick = () => start();
$("pause").onclick = () => pause();
$("restart").onclick = () => start();
$("reseed").onclick = anew;
$("stop").onclick = stop;
$("record").onclick = record;
$("keys").onclick = () => $("help").showModal();
$("video").onclick = () => pause();
$("seed").onchange = ({target}) => {
  if (!target.checkValidity() || target.value === "") return (target.value = state.seed);
  state.seed = target.valueAsNumber;
  if (["playing", "paused"].includes(state.phase)) start();
};
prompt.oninput = () => (($("hint").textContent = ""), written());
$("form").onsubmit = (event) => (event.preventDefault(), show(prompt.value));

const KEYS = {" ": () => pause(), "/": () => prompt.focus(), r: () => start(), n: anew, v: record, s: stop, "?": () => $("help").showModal()};
const BUTTONS = {r: "restart", n: "reseed", v: "record", s: "stop", " ": "pause"};

document.addEventListener("keydown", (event) => {
  if (event.target === prompt) return inSentence(event);
  if (event.ctrlKey || event.metaKey || event.altKey || $("help").open || event.target.id === "seed") return;
  if (event.key === " " && event.target.closest("button, summary")) return; // it presses what has the focus
  const key = event.key.toLowerCase();
  if (!KEYS[key] || (BUTTONS[key] && $(BUTTONS[key]).disabled)) return;
  event.preventDefault();
  if (!event.repeat) KEYS[key](); // a key that is held is pressed once
});

function inSentence(event) {
  if (event.key === "Enter" && !event.isComposing) {
    event.preventDefault();
    show(prompt.value);
  } else if (event.key === "Escape") {
    prompt.value = state.prompt || prompt.value;
    $("hint").textContent = "";
    written();
    prompt.blur();
  }
}

setInterval(figures, 250);
const watched = () => ["starting", "playing", "paused"].includes(state.phase) && !document.hidden;
setInterval(() => watched() && link.send("stats"), LIVELY);
