// What a person sees and touches. Texts from the kernel or the user only ever become text nodes,
// input values or canvas text, never HTML.

const PAST_S = 8, FUTURE_S = 4, MAX_MARKS = 400, GHOST_MS = 900;

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name in element && name !== "list") element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children); // strings become text nodes
  return element;
}

function short(text, longest = 44) {
  return text.length > longest ? `${text.slice(0, longest - 1)}…` : text;
}

// One control made from its entry in the kernel's list: a slider, a choice, a switch or a text.
class Field {
  constructor(spec, id, ask) {
    this.spec = spec;
    this.busy = false;
    this.id = `${id}-${spec.name}`;
    const common = { id: this.id, title: spec.hint };
    if (spec.kind === "choice") {
      const options = spec.choices.map((x) => make("option", { value: String(x) }, String(x)));
      this.input = make("select", common, ...options);
    } else {
      const type = { range: "range", switch: "checkbox", number: "number", text: "text" }[spec.kind];
      const limits = "min" in spec ? { min: spec.min, max: spec.max, step: spec.step } : {};
      this.input = make("input", { type, ...limits, ...common });
    }
    this.input.dataset.name = spec.name;
    this.output = spec.kind === "range" ? make("output", { htmlFor: this.id }) : null;
    const label = make("label", { htmlFor: this.id }, spec.label);
    this.element = make("div", { className: `lmd-field lmd-${spec.kind}` });
    this.element.append(label, ...(this.output ? [this.output] : []), this.input);
    const moving = spec.kind === "range" ? "input" : "change";
    this.input.addEventListener(moving, () => {
      this.write();
      ask(spec.name, this.value());
    });
    this.input.addEventListener("pointerdown", () => (this.busy = true));
    for (const end of ["pointerup", "change", "blur"])
      this.input.addEventListener(end, () => (this.busy = false));
  }
  value() {
    const { kind, choices } = this.spec;
    if (kind === "switch") return this.input.checked;
    if (kind === "choice") return choices[this.input.selectedIndex];
    return kind === "text" ? this.input.value : Number(this.input.value);
  }
  show(value) {
    if (this.busy) return; // a finger is on it
    const typed = ["text", "number"].includes(this.spec.kind);
    if (typed && document.activeElement === this.input) return; // somebody is writing in it
    if (this.spec.kind === "switch") this.input.checked = value;
    else this.input.value = String(value);
    this.write();
  }
  write() {
    if (!this.output) return;
    const { unit = "", digits = 0 } = this.spec;
    this.output.textContent = `${Number(this.input.value).toFixed(digits)}${unit}`;
  }
  // From a MIDI controller, 0…127.
  move(midi, ask) {
    const { kind, min, max, step, choices, name } = this.spec;
    if (kind === "range") {
      this.input.value = String(min + Math.round(((midi / 127) * (max - min)) / step) * step);
    } else if (kind === "choice") {
      this.input.selectedIndex = Math.min(choices.length - 1, Math.floor((midi / 128) * choices.length));
    } else if (kind === "switch") this.input.checked = midi >= 64;
    else return;
    this.write();
    ask(name, this.value());
  }
}

// The scrolling picture: what was heard, the playhead, and what waits in the queue.
class Picture {
  constructor(canvas, sampleRate) {
    Object.assign(this, { canvas, sampleRate, marks: [], palette: null, theme: "" });
    this.spectrum = new Spectrum(sampleRate);
    this.store = new OffscreenCanvas(N_COLUMNS, N_BANDS);
    this.ink = this.store.getContext("2d");
    this.ghosts = new OffscreenCanvas(N_COLUMNS, N_BANDS); // of a plan that was thrown away
    this.ghost = null;
  }
  // Samples from `first` on. What was planned there instead is thrown away: it fades from sight.
  add(samples, first) {
    const replaced = this.spectrum.end - first;
    if (replaced > 0 && this.palette) {
      this.ghosts.getContext("2d").drawImage(this.store, 0, 0);
      this.ghost = { from: Math.floor(first / HOP), end: this.spectrum.next, at: performance.now() };
      this.marks = this.marks.filter((mark) => mark.strong || mark.sample < first);
    }
    this.paint(...this.spectrum.push(samples, first));
  }
  paint(first, end) {
    if (!this.palette) return;
    for (let i = Math.max(first, end - N_COLUMNS); i < end; i++) {
      const image = this.ink.createImageData(1, N_BANDS);
      const column = (i % N_COLUMNS) * N_BANDS;
      for (let b = 0; b < N_BANDS; b++) {
        const color = this.palette[this.spectrum.columns[column + b]];
        image.data.set(color, 4 * (N_BANDS - 1 - b));
      }
      this.ink.putImageData(image, i % N_COLUMNS, 0);
    }
  }
  mark(sample, text, strong) {
    const last = this.marks[this.marks.length - 1];
    if (strong && last && last.strong && last.sample === sample) {
      last.text += `, ${text}`;
      return;
    }
    this.marks.push({ sample, text, strong });
    if (this.marks.length > MAX_MARKS) this.marks.shift();
  }
  // Colours follow the page's theme; all columns are painted anew when it changes.
  dress() {
    const style = getComputedStyle(this.canvas);
    const accent = style.getPropertyValue("--lmd-accent").trim() || "#e8710a";
    const theme = style.backgroundColor + style.color + accent;
    if (theme === this.theme) return;
    this.theme = theme;
    const [r, g, b] = style.backgroundColor.match(/[\d.]+/g).map(Number);
    this.dark = 0.3 * r + 0.6 * g + 0.1 * b < 128;
    this.canvas.closest(".lmd").dataset.scheme = this.dark ? "dark" : "light"; // the style sheet asks
    this.colors = { text: style.color, ground: style.backgroundColor, accent };
    const stops = this.dark
      ? [[r, g, b], [24, 38, 92], [28, 94, 138], [42, 160, 148], [140, 212, 122], [248, 250, 196]]
      : [[r, g, b], [205, 226, 240], [125, 178, 213], [55, 118, 176], [28, 60, 122], [8, 16, 54]];
    this.palette = Array.from({ length: 256 }, (_, i) => {
      const x = (i / 255) * (stops.length - 1), k = Math.min(Math.floor(x), stops.length - 2);
      return [0, 1, 2].map((c) => stops[k][c] + (x - k) * (stops[k + 1][c] - stops[k][c])).concat(255);
    });
    this.paint(this.spectrum.next - N_COLUMNS < 0 ? 0 : this.spectrum.next - N_COLUMNS, this.spectrum.next);
  }
  draw(playhead) {
    this.dress();
    const { canvas } = this, scale = window.devicePixelRatio || 1;
    const width = Math.round(canvas.clientWidth * scale), height = Math.round(canvas.clientHeight * scale);
    if (!width || !height) return;
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    const pen = canvas.getContext("2d"), perSample = width / ((PAST_S + FUTURE_S) * this.sampleRate);
    const x = (sample) => (sample - playhead + PAST_S * this.sampleRate) * perSample;
    const foot = 15 * scale, top = 30 * scale, tall = height - foot - top;
    pen.fillStyle = this.colors.ground;
    pen.fillRect(0, 0, width, height);
    this.blit(pen, this.store, x, top, tall, Math.floor((playhead - PAST_S * this.sampleRate) / HOP), this.spectrum.next);
    const now = x(playhead);
    pen.globalAlpha = 0.45;
    pen.fillStyle = this.colors.ground;
    pen.fillRect(now, top, width - now, tall); // what waits is paler
    const left = this.ghost ? 1 - (performance.now() - this.ghost.at) / GHOST_MS : 0;
    if (left > 0) {
      pen.globalAlpha = 0.5 * left;
      this.blit(pen, this.ghosts, x, top, tall, this.ghost.from, this.ghost.end);
    }
    pen.globalAlpha = 1;
    this.annotate(pen, x, { top, tall, width, height, scale });
    pen.fillStyle = this.colors.ground;
    pen.fillRect(now - 14 * scale, height - foot, 28 * scale, foot); // under "now" no block's number
    pen.fillStyle = this.colors.accent;
    pen.fillRect(now - scale, top - 4 * scale, 2 * scale, tall + 8 * scale);
    pen.textAlign = "center";
    pen.fillText("now", now, height - 4 * scale);
  }
  blit(pen, store, x, top, tall, from, end) {
    for (let i = Math.max(0, end - N_COLUMNS + 1, from); i < end; ) {
      const slot = i % N_COLUMNS, n = Math.min(end - i, N_COLUMNS - slot);
      const left = x(i * HOP), right = x((i + n) * HOP);
      pen.drawImage(store, slot, 0, n, N_BANDS, left, top, right - left, tall);
      i += n;
    }
  }
  annotate(pen, x, { top, tall, width, height, scale }) {
    pen.font = `${11 * scale}px system-ui, sans-serif`;
    let row = 0;
    const inOrder = [...this.marks].sort((a, b) => a.strong - b.strong); // changes on top
    for (const { sample, text, strong } of inOrder) {
      const at = Math.round(x(sample)) + 0.5;
      if (at < -300 * scale || at > width) continue;
      pen.textAlign = "left";
      pen.setLineDash(strong ? [4 * scale, 3 * scale] : []);
      pen.strokeStyle = pen.fillStyle = strong ? this.colors.accent : this.colors.text;
      pen.globalAlpha = strong ? 1 : 0.35;
      pen.lineWidth = strong ? 2 * scale : scale;
      pen.beginPath();
      pen.moveTo(at, top);
      pen.lineTo(at, top + tall);
      pen.stroke();
      pen.globalAlpha = strong ? 1 : 0.75;
      if (strong) pen.fillText(short(text), at + 3 * scale, (row++ % 2 ? 25 : 12) * scale);
      else pen.fillText(text, at + 3 * scale, height - 4 * scale);
      pen.globalAlpha = 1;
    }
    pen.setLineDash([]);
  }
}
