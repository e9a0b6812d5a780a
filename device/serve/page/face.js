// The face: acts become poses and motions, after the body's own table of motions (firmware_bridge/PROTOCOL.md).

const LOOKS = { look_up: [0, 1], look_down: [0, -1], look_left: [1, 0], look_right: [-1, 0] };
// [milliseconds, amount]: what the tilt servo does for a nod, and the pan servo for a shake.
const NOD = [[0, 0], [110, -0.9], [330, 0.35], [530, -0.5], [740, 0]];
const SHAKE = [[0, 0], [120, 0.9], [400, -0.9], [680, 0.6], [920, 0]];
const MOOD_MS = { asks: 2200, yields: 1400 };
const BLINK_MS = 130;
const TELLING = {
  look_up: "looking up", look_down: "looking down", look_left: "looking left", look_right: "looking right",
  nod: "nodding", shake: "shaking its head", light_on: "its lamp is on", light_off: "its lamp is off",
  yield: "giving way", ask: "thinking it over",
};

export class Face {
  constructor(svg) {
    this.svg = svg;
    this.head = svg.querySelector("#head");
    this.mouth = svg.querySelector("#mouth");
    this.calm = matchMedia("(prefers-reduced-motion: reduce)");
    this.sleep();
    this.blinkLater();
  }

  wake() {
    this.mood("awake");
    this.tell("awake");
  }

  sleep() {
    this.look(0, 0);
    this.svg.dataset.light = "off";
    this.speak(0);
    this.mood("asleep");
    this.tell("asleep");
  }

  act(name) {
    if (name in LOOKS) this.look(...LOOKS[name]);
    else if (name === "light_on" || name === "light_off") this.svg.dataset.light = name.slice(6);
    else if (name === "nod") this.move(NOD, (amount) => `translateY(${-26 * amount}px)`);
    else if (name === "shake") this.move(SHAKE, (amount) => `translateX(${-26 * amount}px) rotate(${-3 * amount}deg)`);
    else if (name === "ask") this.mood("asks");
    else if (name === "yield") this.mood("yields");
    this.svg.dataset.act = name;
    this.tell(TELLING[name] ?? name);
  }

  // How loud the voice is just now, 0 to 1.
  speak(loudness) {
    const open = Math.min(15, Math.sqrt(loudness) * 30);
    this.mouth.setAttribute("ry", open < 1.5 ? 0 : open.toFixed(1));
    this.svg.toggleAttribute("data-speaking", open >= 1.5);
  }

  look(pan, tilt) {
    this.svg.style.setProperty("--pan", pan);
    this.svg.style.setProperty("--tilt", tilt);
  }

  mood(name) {
    clearTimeout(this.moodTimer);
    this.svg.dataset.mood = name;
    if (name in MOOD_MS) this.moodTimer = setTimeout(() => this.mood("awake"), MOOD_MS[name]);
  }

  // Added to the pose, so that it can nod while it looks up.
  move(steps, transform) {
    if (this.calm.matches) return;
    const length = steps.at(-1)[0];
    const frames = steps.map(([ms, amount]) => ({ transform: transform(amount), offset: ms / length, easing: "ease-in-out" }));
    this.head.animate(frames, { duration: length, composite: "add" });
  }

  blinkLater() {
    setTimeout(() => {
      if (!this.calm.matches) {
        this.svg.dataset.blink = "";
        setTimeout(() => delete this.svg.dataset.blink, BLINK_MS);
      }
      this.blinkLater();
    }, 2500 + 3500 * Math.random());
  }

  tell(what) {
    this.svg.setAttribute("aria-label", `The companion's face: ${what}`);
  }
}
