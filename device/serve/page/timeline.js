// The last twelve seconds, one lane for each sense; drawn from what the loop told of every tick.

const SECONDS = 12;
const LANES = [ // name, share of the height
  ["hears", 29], ["sees", 23], ["says", 17], ["does", 13], ["engine", 18],
];
const GAP = 6, LABEL = 16;

export class Timeline {
  constructor(canvas) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.calm = matchMedia("(prefers-reduced-motion: reduce)");
    this.ticks = [];
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.repaint());
    new ResizeObserver(() => this.draw()).observe(canvas);
    const step = () => {
      if (this.ticks.length && this.moving && !this.calm.matches) this.draw();
      requestAnimationFrame(step);
    };
    requestAnimationFrame(step);
  }

  begin(bundle) {
    this.bundle = bundle;
    this.shown = Math.ceil((SECONDS * 1000) / bundle.tick_ms);
    this.ticks = [];
    this.thumbnail = -Infinity; // the tick of the newest picture that is shown
    this.every = 1;
    this.moving = true;
    const { channels, per_tick } = bundle.dmel;
    this.spectrum = Object.assign(document.createElement("canvas"), { width: (this.shown + 1) * per_tick, height: channels });
  }

  end() {
    this.moving = false;
  }

  // `tick`: the loop's own account; `levels`: Uint8Array of its dMel; `picture`: the canvas it was shown, if any.
  add(tick, levels, picture) {
    const before = this.ticks.at(-1);
    for (let lost = before ? before.tick + 1 : tick.tick; lost < tick.tick; lost++) this.push({ tick: lost, lost: true });
    const seen = picture && tick.tick - this.thumbnail >= this.every; // one picture beside the other, not over it
    if (seen) this.thumbnail = tick.tick;
    this.push({ ...tick, levels, picture: seen ? picture : null, at: performance.now() });
    if (this.calm.matches) this.draw();
  }

  push(tick) {
    this.ticks.push(tick);
    if (this.ticks.length > this.shown + 1) this.ticks.shift();
    this.paint(tick);
  }

  // One tick's columns at the right end of the spectrum; what was there moves to the left.
  paint(tick) {
    const { channels, levels: most, per_tick } = this.bundle.dmel;
    const { spectrum } = this, context = spectrum.getContext("2d");
    context.globalCompositeOperation = "copy";
    context.drawImage(spectrum, -per_tick, 0);
    context.globalCompositeOperation = "source-over";
    if (!tick.levels) return;
    const image = context.createImageData(per_tick, channels), [r, g, b] = this.rgb("--hears");
    for (let column = 0; column < per_tick; column++) {
      for (let channel = 0; channel < channels; channel++) {
        const at = 4 * ((channels - 1 - channel) * per_tick + column);
        const share = tick.levels[column * channels + channel] / (most - 1);
        image.data.set([r, g, b, 255 * share ** 2], at);
      }
    }
    context.putImageData(image, spectrum.width - per_tick, 0);
  }

  repaint() {
    if (!this.bundle) return;
    this.spectrum.getContext("2d").clearRect(0, 0, this.spectrum.width, this.spectrum.height);
    for (const tick of this.ticks) this.paint(tick);
    this.draw();
  }

  draw() {
    const { canvas, context } = this, ratio = devicePixelRatio || 1;
    const width = canvas.clientWidth, height = canvas.clientHeight;
    if (canvas.width !== Math.round(width * ratio)) canvas.width = Math.round(width * ratio);
    if (canvas.height !== Math.round(height * ratio)) canvas.height = Math.round(height * ratio);
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    const whole = LANES.reduce((sum, [, share]) => sum + share, 0);
    let y = GAP;
    for (const [name, share] of LANES) {
      const tall = ((height - 2 * GAP) * share) / whole;
      context.font = `600 11px ${this.style("--sans")}`;
      context.fillStyle = this.style(`--${name}`);
      context.textAlign = "left";
      context.fillText(name, 10, y + 11);
      if (this.bundle) {
        context.save();
        context.beginPath();
        context.rect(0, y, width, tall);
        context.clip();
        this[name](y + LABEL, tall - LABEL - GAP, width / this.shown, width);
        context.restore();
      }
      y += tall;
    }
  }

  // Where a tick begins, in pixels; the newest ends at the right edge and moves on as time does.
  x(tick, size, width) {
    const newest = this.ticks.at(-1), since = newest.at ? (performance.now() - newest.at) / this.bundle.tick_ms : 0;
    const drift = this.calm.matches || !this.moving ? 0 : Math.min(1, since);
    return width - (newest.tick - tick + 1 + drift) * size + size;
  }

  hears(y, tall, size, width) {
    if (!this.ticks.length) return;
    const right = this.x(this.ticks.at(-1).tick, size, width) + size;
    this.context.imageSmoothingEnabled = false;
    this.context.drawImage(this.spectrum, right - size * (this.shown + 1), y, size * (this.shown + 1), tall);
    this.context.imageSmoothingEnabled = true;
    this.losses(y, tall, size, width);
  }

  losses(y, tall, size, width) {
    this.context.fillStyle = this.style("--lost");
    for (const { tick, lost } of this.ticks) if (lost) this.context.fillRect(this.x(tick, size, width), y, Math.max(1, size - 1), tall);
  }

  sees(y, tall, size, width) {
    const { context } = this, { width: w, height: h, patch } = this.bundle.frame;
    const wide = (tall * w) / h;
    this.every = Math.ceil((wide + 6) / size);
    for (const { tick, picture } of this.ticks) {
      if (!picture) continue;
      const x = this.x(tick, size, width), scale = tall / h;
      context.drawImage(picture, x, y, wide, tall);
      context.strokeStyle = this.style("--card");
      context.globalAlpha = 0.45;
      context.lineWidth = 1;
      context.beginPath();
      for (let at = patch; at < w; at += patch) context.moveTo(x + at * scale, y), context.lineTo(x + at * scale, y + tall);
      for (let at = patch; at < h; at += patch) context.moveTo(x, y + at * scale), context.lineTo(x + wide, y + at * scale);
      context.stroke();
      context.globalAlpha = 1;
    }
  }

  says(y, tall, size, width) {
    const { context } = this;
    context.fillStyle = this.style("--says");
    for (const tick of this.ticks) if (tick.speaking) context.fillRect(this.x(tick.tick, size, width), y + tall - 3, size, 3);
    context.font = `400 17px ${this.style("--serif")}`;
    let end = -Infinity, raised = false; // of the word before: one that would touch it is written higher
    for (const { tick, say } of this.ticks) {
      if (!say?.length) continue;
      const word = say.join(" "), x = this.x(tick, size, width);
      raised = x < end && !raised;
      context.fillText(word, x, y + tall - (raised ? 22 : 7));
      end = x + context.measureText(word).width + 6;
    }
  }

  does(y, tall, size, width) {
    const { context } = this;
    context.fillStyle = this.style("--does");
    context.font = `500 12px ${this.style("--sans")}`;
    for (const tick of this.ticks) {
      if (!tick.act || tick.act === "none") continue;
      const x = this.x(tick.tick, size, width);
      context.fillRect(x, y, 2, tall);
      context.fillText(tick.act.replace("_", " "), x + 6, y + tall / 2 + 4);
    }
  }

  engine(y, tall, size, width) {
    const { context } = this, budget = this.bundle.tick_ms;
    context.strokeStyle = this.style("--lost");
    context.setLineDash([3, 4]);
    context.beginPath();
    context.moveTo(0, y + 0.5);
    context.lineTo(width, y + 0.5);
    context.stroke();
    context.setLineDash([]);
    context.textAlign = "right";
    context.font = `400 11px ${this.style("--sans")}`;
    context.fillStyle = this.style("--soft");
    context.fillText(`budget ${budget} ms`, width - 10, y - 4);
    context.textAlign = "left";
    for (const tick of this.ticks) {
      if (tick.lost) continue;
      const over = tick.engine_ms > budget, high = Math.max(2, Math.min(1, tick.engine_ms / budget) * tall);
      context.fillStyle = this.style(over ? "--warn" : "--engine");
      context.fillRect(this.x(tick.tick, size, width), y + tall - high, Math.max(1, size - 1), high);
    }
  }

  style(name) {
    return getComputedStyle(this.canvas).getPropertyValue(name);
  }

  rgb(name) {
    return this.style(name).trim().match(/[0-9a-f]{2}/gi).map((hex) => parseInt(hex, 16));
  }
}
