// The page: brings microphone, camera and loudspeaker to the companion, and shows what becomes of them.

import { Face } from "./face.js";
import { Eyes, Sound, fromBase64, toBase64 } from "./sound.js";
import { Timeline } from "./timeline.js";

const RETRY_S = [1, 2, 4, 8]; // after a connection was lost
const FULL = 1 << 17; // bytes waiting for the network: what is late is dropped, never queued up
const LINES = 200; // of the log
const TRY_AGAIN = 1013, POLICY = 1008; // close codes, as in device/serve/server.py

// By what it was lent: nothing, the microphone, the camera, both.
const PRESENT = [
  "It is here, but cannot hear or see you.",
  "It hears you, but cannot see you.",
  "It sees you, but cannot hear you.",
  "It is here, and attends to you.",
];

const $ = (id) => document.getElementById(id);
const face = new Face($("face")), timeline = new Timeline($("timeline"));
const token = decodeURIComponent(location.hash.slice(1));
const page = { wanted: false, socket: null, sound: null, eyes: null, streams: [], hears: false, sees: false, lost: 0, attempt: 0, retry: 0, words: new Set() };

// --- what is on the page -------------------------------------------------------------------------------------------

function state(name, text) {
  document.body.dataset.state = name;
  $("status").textContent = text;
  $("talk").textContent = name === "off" ? "Start talking" : "Stop";
}

function trouble(text) {
  const known = [...$("trouble").children].some((line) => line.textContent === text);
  if (!known) $("trouble").append(Object.assign(document.createElement("p"), { textContent: text }));
}

function record(seconds, kind, text) {
  const line = document.createElement("li");
  const time = Object.assign(document.createElement("time"), { textContent: clock(seconds) });
  const what = Object.assign(document.createElement("span"), { textContent: kind, className: "kind" });
  line.append(time, what, Object.assign(document.createElement("span"), { textContent: text, className: kind }));
  $("log").prepend(line);
  while ($("log").childElementCount > LINES) $("log").lastElementChild.remove();
}

function clock(seconds) {
  const whole = Math.floor(seconds / 60);
  return `${whole}:${(seconds % 60).toFixed(1).padStart(4, "0")}`;
}

const pressed = (id) => $(id).getAttribute("aria-pressed") === "true";

// --- devices -------------------------------------------------------------------------------------------------------

const MISSING = {
  NotAllowedError: (what) => `The ${what} is blocked. Allow it for this page in the address bar, then press Stop and Start again.`,
  NotFoundError: (what) => `No ${what} was found. Connect one, then press Stop and Start again.`,
  NotReadableError: (what) => `The ${what} is in use by another program. Close that one, then press Stop and Start again.`,
};
const WITHOUT = { microphone: "Until then it cannot hear you.", camera: "Until then it cannot see you." };

async function borrow(what, constraints) {
  if (!navigator.mediaDevices) {
    trouble("This browser lends microphone and camera only to this machine itself and to https pages. Open the page through localhost.");
    return null;
  }
  try {
    const stream = await navigator.mediaDevices.getUserMedia(constraints);
    stream.getTracks()[0].addEventListener("ended", () => trouble(`The ${what} was disconnected. ${WITHOUT[what]}`));
    page.streams.push(stream);
    return stream;
  } catch (error) {
    const text = MISSING[error.name]?.(what) ?? `The ${what} does not work (${error.message}).`;
    trouble(`${text} ${WITHOUT[what]}`);
    return null;
  }
}

async function openDevices() {
  page.sound = new Sound();
  try {
    await page.sound.open();
    page.sound.audible(pressed("voice"));
    page.sound.onLoudness((loudness) => face.speak(loudness));
  } catch (error) {
    trouble(`Sound does not work in this browser (${error.message}). You can still read what it says.`);
    page.sound = null;
  }
  // Its own voice must not come back to it: the browser cancels echo. The rest is left alone, for the model knows rooms.
  const audio = { echoCancellation: true, noiseSuppression: false, autoGainControl: false, channelCount: 1 };
  const heard = page.sound && (await borrow("microphone", { audio }));
  if (heard && page.wanted) page.sound.listen(heard, hear);
  const seen = page.wanted && (await borrow("camera", { video: { width: { ideal: 640 }, height: { ideal: 480 }, facingMode: "user" } }));
  Object.assign(page, { hears: Boolean(heard), sees: Boolean(seen) });
  if (seen && page.wanted) {
    page.eyes = new Eyes(seen, see);
    page.eyes.paused = !pressed("camera");
  }
}

function closeDevices() {
  page.streams.flatMap((stream) => stream.getTracks()).forEach((track) => track.stop());
  page.streams = [];
  page.eyes?.close();
  page.sound?.close();
  page.eyes = page.sound = null;
}

function hear(samples) {
  if (pressed("microphone")) send({ type: "input_audio_buffer.append", audio: toBase64(samples) });
}

function see(id, image_url) {
  const content = [{ type: "input_image", image_url }];
  send({ type: "conversation.item.create", item: { id: `${id}_${page.attempt}`, type: "message", role: "user", content } });
}

// --- the connection ------------------------------------------------------------------------------------------------

function send(event) {
  const { socket } = page;
  if (socket?.readyState === WebSocket.OPEN && socket.bufferedAmount < FULL) socket.send(JSON.stringify(event));
}

async function welcome() {
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  const answer = await fetch("/v1/models", { headers });
  return answer.status !== 401;
}

async function connect() {
  page.attempt += 1;
  try {
    if (!(await welcome())) {
      trouble("The key in this address is not valid, or no longer. Open the address that copresence serve printed when it began.");
      return stop("Not let in.");
    }
  } catch {
    return again("It cannot be reached.");
  }
  if (!page.wanted) return;
  const url = new URL("/v1/realtime?timeline=1", location.href.replace(/^http/, "ws"));
  url.hash = "";
  const socket = new WebSocket(url, ["realtime", ...(token ? [`openai-insecure-api-key.${token}`] : [])]);
  page.socket = socket;
  socket.onmessage = ({ data }) => page.socket === socket && receive(JSON.parse(data));
  socket.onclose = ({ code }) => {
    if (page.socket !== socket) return;
    page.socket = null;
    if (page.wanted) again(code === TRY_AGAIN ? "Somebody else is talking with it." : code === POLICY ? "It was too much at once." : "The connection was lost.");
  };
}

function again(why) {
  if (!page.wanted) return;
  const seconds = RETRY_S[Math.min(page.retry++, RETRY_S.length - 1)];
  rest();
  state("waiting", `${why} Trying again in ${seconds} s.`);
  page.timer = setTimeout(connect, seconds * 1000);
}

function rest() {
  timeline.end();
  face.sleep();
  page.sound?.hush();
}

async function start() {
  page.wanted = true;
  $("trouble").replaceChildren();
  state("waiting", "One moment.");
  await openDevices();
  if (page.wanted) await connect();
}

function stop(text = "Nobody is here.") {
  page.wanted = false;
  clearTimeout(page.timer);
  const { socket } = page;
  page.socket = null;
  socket?.close(1000);
  closeDevices();
  rest();
  page.retry = 0;
  state("off", text);
}

// --- what the companion tells --------------------------------------------------------------------------------------

function receive(event) {
  EVENTS[event.type]?.(event);
}

const EVENTS = {
  "copresence.bundle"(bundle) {
    page.retry = page.lost = 0;
    page.words = new Set(bundle.words);
    $("words").replaceChildren(...bundle.words.map((value) => Object.assign(document.createElement("option"), { value })));
    timeline.begin(bundle);
    page.tickMs = bundle.tick_ms;
    face.wake();
    state("on", PRESENT[Number(page.hears) + 2 * Number(page.sees)]);
  },
  "copresence.tick"(tick) {
    page.lost += tick.gap_ticks;
    const picture = page.eyes?.pictures.get(tick.seen?.replace(/_\d+$/, ""));
    timeline.add(tick, fromBase64(tick.heard), picture);
    $("engine").textContent = `${tick.engine_ms.toFixed(0)} of ${page.tickMs} ms`;
    $("age").textContent = tick.seen ? `${tick.frame_age_s.toFixed(1)} s old` : "none";
    $("lost").textContent = String(page.lost);
    $("since").textContent = clock(tick.t_s);
    if (tick.say.length) {
      record(tick.t_s, "says", tick.say.join(" "));
      $("word").textContent = tick.say.join(" ");
    }
    if (tick.act !== "none") {
      record(tick.t_s, "does", tick.act.replace("_", " "));
      face.act(tick.act);
    }
  },
  "copresence.think"({ tick, what, act, word, tool, reason }) {
    const detail = act?.replace("_", " ") ?? word ?? tool ?? reason ?? "";
    record(((tick + 1) * page.tickMs) / 1000, "thinks", `${what} ${detail}`.trim());
    if (what === "act") face.act(act);
  },
  "response.output_audio.delta"({ delta }) {
    page.sound?.play(new Int16Array(fromBase64(delta).buffer));
  },
  error({ error }) {
    if (error.code !== "busy") trouble(`It says: ${error.message}`);
  },
};

// --- controls ------------------------------------------------------------------------------------------------------

$("talk").addEventListener("click", () => (page.wanted ? stop() : start()));
for (const id of ["microphone", "camera", "voice"]) {
  $(id).addEventListener("click", () => {
    $(id).setAttribute("aria-pressed", String(!pressed(id)));
    if (id === "camera" && page.eyes) page.eyes.paused = !pressed(id);
    if (id === "voice") page.sound?.audible(pressed(id));
  });
}
$("tell").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("text").value.trim().toLowerCase();
  const unknown = text.split(/\s+/).find((word) => !page.words.has(word));
  if (!page.socket) trouble("Start talking first; there is nobody to write to yet.");
  else if (text && unknown) trouble(`It has no word “${unknown}”. It knows: ${[...page.words].join(", ")}.`);
  else if (text) {
    send({ type: "conversation.item.create", item: { type: "message", role: "user", content: [{ type: "input_text", text }] } });
    $("text").value = "";
    $("trouble").replaceChildren();
  }
});
addEventListener("pagehide", () => page.socket?.close(1000));
