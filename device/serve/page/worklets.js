// The two ends of the sound, on the browser's audio thread: samples out of the microphone, samples into the loudspeaker.

const PACKET = 480; // samples: 20 ms at 24 kHz
const AHEAD = 0.06; // seconds that the first sound waits: what arrives tick by tick arrives with jitter
const KEPT = 10; // seconds at most

class Capture extends AudioWorkletProcessor {
  constructor() {
    super();
    this.packet = new Int16Array(PACKET);
    this.filled = 0;
  }

  process([input]) {
    const samples = input[0];
    if (!samples) return true; // nothing is connected
    for (const sample of samples) {
      this.packet[this.filled++] = Math.max(-32768, Math.min(32767, Math.round(sample * 32768)));
      if (this.filled === PACKET) {
        this.port.postMessage(this.packet.slice());
        this.filled = 0;
      }
    }
    return true;
  }
}

class Playback extends AudioWorkletProcessor {
  constructor() {
    super();
    this.ring = new Float32Array(KEPT * sampleRate);
    this.read = this.written = this.held = 0;
    this.loudness = this.quantum = 0;
    this.port.onmessage = ({ data }) => (data === "hush" ? (this.read = this.written) : this.take(data));
  }

  take(samples) {
    for (const sample of samples) this.ring[this.written++ % this.ring.length] = sample / 32768;
    this.read = Math.max(this.read, this.written - this.ring.length);
  }

  process(_, [output]) {
    const out = output[0], begins = this.held >= AHEAD * sampleRate;
    this.held = this.read < this.written ? this.held + out.length : 0; // run empty: the next sound waits again
    let power = 0;
    for (let i = 0; i < out.length; i++) {
      out[i] = begins && this.read < this.written ? this.ring[this.read++ % this.ring.length] : 0;
      power += out[i] * out[i];
    }
    this.loudness = Math.max(this.loudness, Math.sqrt(power / out.length));
    if (++this.quantum % 8 === 0) { // every 43 ms: enough for a mouth
      this.port.postMessage(this.loudness);
      this.loudness = 0;
    }
    return true;
  }
}

registerProcessor("capture", Capture);
registerProcessor("playback", Playback);
