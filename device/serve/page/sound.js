// Microphone, camera and loudspeaker of this machine, as the companion's.

const RATE = 24000; // what the protocol has
const PICTURE_MS = 100; // the model looks at two pictures a tick
const JPEG = 0.85;
const KNOWN = 64; // pictures that the timeline can still show

export class Sound {
  // One audio context for both directions; made by a click, as browsers want it.
  async open() {
    this.context = new AudioContext({ sampleRate: RATE, latencyHint: "interactive" });
    await this.context.audioWorklet.addModule("worklets.js");
    this.playback = new AudioWorkletNode(this.context, "playback", { numberOfInputs: 0, outputChannelCount: [1] });
    this.gain = new GainNode(this.context);
    this.playback.connect(this.gain).connect(this.context.destination);
    await this.context.resume();
  }

  listen(stream, onPacket) {
    this.capture = new AudioWorkletNode(this.context, "capture", { numberOfOutputs: 0, channelCount: 1, channelCountMode: "explicit" });
    this.capture.port.onmessage = ({ data }) => onPacket(data);
    this.context.createMediaStreamSource(stream).connect(this.capture);
  }

  onLoudness(report) {
    this.playback.port.onmessage = ({ data }) => report(data);
  }

  play(samples) {
    this.playback.port.postMessage(samples);
  }

  hush() {
    this.playback.port.postMessage("hush");
  }

  audible(yes) {
    this.gain.gain.value = yes ? 1 : 0;
  }

  async close() {
    if (this.context && this.context.state !== "closed") await this.context.close();
  }
}

export class Eyes {
  // Takes pictures of the size that the model sees, and keeps the newest by name.
  constructor(stream, onPicture) {
    this.video = Object.assign(document.createElement("video"), { srcObject: stream, muted: true, playsInline: true });
    this.canvas = Object.assign(document.createElement("canvas"), { width: 160, height: 120 });
    this.pictures = new Map();
    this.count = 0;
    this.onPicture = onPicture;
    this.video.play().catch(() => {}); // it was closed before it began
    this.timer = setInterval(() => this.look(), PICTURE_MS);
  }

  look() {
    const { video, canvas } = this;
    if (this.paused || this.busy || !video.videoWidth) return;
    const scale = Math.max(canvas.width / video.videoWidth, canvas.height / video.videoHeight);
    const wide = video.videoWidth * scale, tall = video.videoHeight * scale;
    canvas.getContext("2d").drawImage(video, (canvas.width - wide) / 2, (canvas.height - tall) / 2, wide, tall);
    this.busy = true;
    canvas.toBlob(async (blob) => {
      const name = `look_${++this.count}`;
      const kept = Object.assign(document.createElement("canvas"), { width: canvas.width, height: canvas.height });
      kept.getContext("2d").drawImage(canvas, 0, 0);
      this.pictures.set(name, kept);
      if (this.pictures.size > KNOWN) this.pictures.delete(this.pictures.keys().next().value);
      const url = await dataUrl(blob);
      this.busy = false;
      if (!this.paused) this.onPicture(name, url);
    }, "image/jpeg", JPEG);
  }

  close() {
    this.paused = true;
    clearInterval(this.timer);
    this.video.srcObject = null;
  }
}

export function toBase64(samples) {
  const bytes = new Uint8Array(samples.buffer, samples.byteOffset, samples.byteLength);
  let text = "";
  for (let i = 0; i < bytes.length; i += 8192) text += String.fromCharCode(...bytes.subarray(i, i + 8192));
  return btoa(text);
}

export function fromBase64(text) {
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
}

function dataUrl(blob) {
  return new Promise((resolve) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.readAsDataURL(blob);
  });
}
