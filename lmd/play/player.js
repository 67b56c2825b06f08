// The live player: buttons, fields, meters, MIDI, and the traffic with the kernel (lmd/play/player.py).

const REPORT_MS = 200, SILENT_KERNEL_MS = 8000, TICK_MS = 100, TYPING_MS = 60;
const CONTEXT_S = 12; // more than any context
const MAX_ASKED = 64; // moves that wait for their block; those refused or overtaken never get one

const METERS = [
  ["queue", "in the queue", "seconds of sound that wait to be played"],
  ["rtf", "real-time factor", "seconds heard per second computed; under 1 the queue runs dry"],
  ["latency", "slider to sound", "from moving a control here to hearing it: median / 95 %"],
  ["underruns", "underruns", "how often the queue ran dry"],
  ["level", "level", "root mean square of what is played, in dB under full scale"],
  ["work", "per block", "transformer + decoder, milliseconds"],
];

// A live region is read out when it is written to, so only what is new is written.
function write(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function percentile(values, percent) {
  if (!values.length) return null;
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.max(0, Math.ceil((sorted.length * percent) / 100) - 1)];
}

class Player {
  constructor(model, el) {
    this.model = model;
    this.view = Math.random().toString(36).slice(2, 10);
    Object.assign(this, { audio: null, picture: null, epoch: 0, asked: new Map(), nextId: 1,
      due: [], latencies: [], heardKernel: performance.now(), lastReport: 0, timers: {},
      midiLearn: false, midiTarget: null, closed: false, notice: "", trouble: "" });
    this.build(el);
    this.listen();
    this.ticker = setInterval(() => this.tick(), TICK_MS);
    this.frame = requestAnimationFrame(() => this.paint());
    this.tell({ kind: "hello" });
  }

  // --- what is on the page ---

  build(el) {
    this.buttons = {};
    const button = (name, text, hint, act) =>
      (this.buttons[name] = make("button", { type: "button", title: hint, onclick: act }, text));
    const bar = make("div", { className: "lmd-bar", role: "group", ariaLabel: "transport" },
      button("play", "▶ Play", "start, pause or go on", () => this.play()),
      button("restart", "⟲ Restart", "begin again from silence", () => this.command("restart")),
      button("stop", "■ Stop", "end the take", () => this.command("stop")),
      button("record", "● Record", "write what is played to a file", () => this.command("record")),
      button("file", "Continue from…", "choose or drop a sound file: the music goes on from its end", () => this.file.click()),
      button("midi", "MIDI learn", "then move a control here, then one on the device", () => this.learn()));
    this.file = make("input", { type: "file", accept: "audio/*", hidden: true, ariaLabel: "sound file to continue from" });
    this.file.addEventListener("change", () => this.continueFrom(this.file.files[0]));
    bar.append(this.file);
    this.state = make("span", { className: "lmd-state", role: "status" });
    this.fields = {};
    const groups = {};
    for (const spec of this.model.get("fields")) {
      const field = new Field(spec, `lmd-${this.view}`, (name, value) => this.ask(name, value));
      this.fields[spec.name] = field;
      (groups[spec.group] ??= []).push(field.element);
      if (spec.name === "drop_context_frames") groups[spec.group].push(
        button("drop_context", "Drop context", "silence the oldest part of the context", () => this.command("drop_context")));
      if (spec.name === "seed") groups[spec.group].push(
        button("roll", "New seed", "draw another seed", () => this.command("roll")));
      if (spec.kind === "text") field.input.setAttribute("list", `lmd-${this.view}-prompts`);
      field.input.addEventListener("focus", () => this.touch(spec));
      field.input.addEventListener("input", () => this.touch(spec));
    }
    bar.append(...groups.bar, this.state);
    delete groups.bar;
    const prompts = this.model.get("prompt_choices").map((value) => make("option", { value }));
    const list = make("datalist", { id: `lmd-${this.view}-prompts` }, ...prompts);
    this.canvas = make("canvas", { className: "lmd-picture", role: "img",
      ariaLabel: "Spectrogram of the last seconds and of the queue, with block boundaries and control changes" });
    this.readings = {};
    const meters = make("dl", { className: "lmd-meters" }, ...METERS.map(([name, text, title]) =>
      make("div", { title }, make("dt", {}, text), (this.readings[name] = make("dd", {}, "–")))));
    this.gauge = make("meter", { min: 0, max: 1, value: 0, ariaLabel: "queue, of its target depth" });
    meters.firstChild.append(this.gauge);
    this.message = make("p", { className: "lmd-message", role: "alert" });
    this.notes = make("p", { className: "lmd-notes", ariaLive: "polite" });
    this.root = make("section", { className: "lmd", ariaLabel: "Live player" }, bar, list,
      ...Object.entries(groups).map(([name, parts]) =>
        make("fieldset", { className: `lmd-group lmd-group-${name}`, ariaLabel: name }, ...parts)),
      this.canvas, meters, this.message, this.notes);
    this.root.dataset.lmSuppressShortcuts = "true"; // keys pressed here are not notebook commands
    this.root.addEventListener("keydown", (event) => event.stopPropagation());
    this.root.addEventListener("dragover", (event) => event.preventDefault());
    this.root.addEventListener("drop", (event) => {
      event.preventDefault();
      this.continueFrom(event.dataTransfer.files[0]);
    });
    el.append(this.root);
    // Where the page does not sound, it has no volume, and no samples to draw.
    this.fields.volume.element.hidden = this.canvas.hidden = this.model.get("sink") !== "browser";
    this.picture = new Picture(this.canvas, this.model.get("sample_rate"));
    this.showTraits();
  }

  showTraits() {
    for (const [name, field] of Object.entries(this.fields)) field.show(this.model.get(name));
    const state = this.model.get("state"), recording = this.model.get("recording");
    this.buttons.play.textContent = state === "playing" || state === "priming" ? "❚❚ Pause" : "▶ Play";
    this.buttons.record.setAttribute("aria-pressed", String(Boolean(recording)));
    this.buttons.record.textContent = recording ? "● Recording" : "● Record";
    const idle = ["new", "stopped", "failed"].includes(state);
    for (const name of ["restart", "stop", "record", "drop_context"]) this.buttons[name].disabled = idle;
    write(this.message, this.trouble || this.model.get("message"));
    const take = this.model.get("take_path");
    const name = (path) => path.split(/[\\/]/).pop();
    this.notes.title = take;
    write(this.notes, [this.notice, this.model.get("instrument"), take && `take: ${name(take)}`,
      recording && `recording: ${name(recording)}`, ...(this.model.get("meters").advice ?? [])]
      .filter(Boolean).join(" · "));
  }
  // What the page itself has to say stands before what the kernel says.
  say(notice) {
    this.notice = notice;
    this.showTraits();
  }

  // --- traffic with the kernel ---

  listen() {
    this.onMessage = (message, buffers) => this.receive(message, buffers);
    this.onChange = () => {
      this.heardKernel = performance.now();
      this.showTraits();
      this.setVolume();
    };
    this.model.on("msg:custom", this.onMessage);
    this.model.on("change", this.onChange);
    this.onWake = () => document.hidden || this.wake();
    document.addEventListener("visibilitychange", this.onWake);
    this.root.addEventListener("click", this.onWake);
  }
  tell(message) {
    try {
      this.model.send({ ...message, view: this.view });
    } catch {
      this.lost = true; // the kernel was restarted: the state line says so
    }
  }
  // Slider moves come fast: the first goes at once, then at most one every TYPING_MS, the last always.
  ask(name, value, movedAt = performance.now()) {
    const id = this.nextId++;
    const pending = this.timers[name];
    if (pending) {
      pending.latest = { value, movedAt };
      return;
    }
    if (this.model.get("state") === "playing") this.expect(id, movedAt); // else nothing is heard
    this.tell({ kind: "set", id, name, value });
    const timer = (this.timers[name] = {});
    setTimeout(() => {
      delete this.timers[name];
      if (timer.latest) this.ask(name, timer.latest.value, timer.latest.movedAt);
    }, TYPING_MS);
  }
  expect(id, movedAt) {
    this.asked.set(id, movedAt);
    if (this.asked.size > MAX_ASKED) this.asked.delete(this.asked.keys().next().value);
  }
  command(command) {
    this.tell({ kind: "command", command });
  }
  receive(message, buffers) {
    this.heardKernel = performance.now();
    if (message.kind === "refused") {
      this.fields[message.name]?.show(message.value);
      return;
    }
    if (message.to !== this.view) {
      if (message.kind === "open") this.silence(); // another page has taken over
      return;
    }
    if (message.kind === "open") this.open(message);
    else if (message.epoch !== this.epoch || !this.audio) return;
    else if (message.kind === "audio") this.feed(message, buffers?.[0]);
    else if (message.kind === "made") this.picture.mark(message.sample, message.text, false);
    else if (message.kind === "applied") this.applied(message);
    else if (message.kind === "close") this.audio.post({ kind: "run", epoch: this.epoch, running: false });
    else this.audio.post(message);
  }
  open(message) {
    this.epoch = message.epoch;
    this.picture = new Picture(this.canvas, message.sample_rate);
    this.due = [];
    this.latencies = [];
    this.asked.clear();
    this.audio?.post({ kind: "open", epoch: message.epoch });
  }
  feed(message, buffer) {
    if (!buffer) {
      this.trouble = "No sound arrives: this notebook page drops the binary part of messages. " +
        "Open the notebook in JupyterLab, or run python -m lmd stream.";
      return this.showTraits();
    }
    const pcm = new Int16Array(buffer.buffer, buffer.byteOffset, buffer.byteLength / 2);
    const samples = Float32Array.from(pcm, (x) => x / 32767), { channels } = this.audio;
    const mono = channels === 1 ? samples : samples.filter((_, i) => i % channels === 0);
    this.picture.add(mono, message.first);
    this.audio.post({ kind: "push", epoch: message.epoch, first: message.first, samples });
  }
  applied({ ids, sample, text, block }) {
    this.picture.mark(sample, text, true);
    Object.assign(this.root.dataset, { appliedBlock: block, appliedSample: sample });
    for (const id of ids) {
      if (this.asked.has(id)) this.due.push({ id, sample, at: this.asked.get(id) });
      this.asked.delete(id);
    }
  }

  // --- sound ---

  async play() {
    const state = this.model.get("state");
    if (state === "playing" || state === "priming") {
      if (this.audio || this.model.get("sink") !== "browser") return this.command("pause");
    }
    if (await this.openAudio()) this.command("play");
  }
  // Whether there is sound, or none is wanted here. Call it inside a click: the browser permits it.
  async openAudio() {
    if (this.model.get("sink") !== "browser") return true;
    try {
      this.audio ??= new AudioOut(this.model.get("sample_rate"), this.model.get("channels"),
        (report) => this.onReport(report));
      this.setVolume();
      await this.audio.context.resume();
      await this.audio.ready;
      this.trouble = "";
      return true;
    } catch (error) {
      this.trouble = `This browser gives no sound: ${error.message}`;
      this.silence();
      this.showTraits();
      return false;
    }
  }
  // The end of a sound file becomes the context: decoded here, whatever the browser can read.
  async continueFrom(file) {
    if (!file) return;
    const rate = this.model.get("sample_rate"), channels = this.model.get("channels");
    try {
      const sound = await new OfflineAudioContext(channels, 1, rate).decodeAudioData(await file.arrayBuffer());
      const n = Math.min(sound.length, Math.ceil(CONTEXT_S * rate)), out = new Float32Array(n * channels);
      for (let c = 0; c < sound.numberOfChannels; c++) {
        const from = sound.getChannelData(c).subarray(sound.length - n);
        const share = channels === 1 ? 1 / sound.numberOfChannels : Number(c < channels);
        if (share) from.forEach((x, i) => (out[(channels === 1 ? 0 : c) * n + i] += share * x));
      }
      if (!(await this.openAudio())) return;
      this.model.send({ kind: "context", view: this.view }, undefined, [out.buffer]);
      this.say(`continues from ${file.name}`);
    } catch (error) {
      this.say(`${file.name} cannot be read as sound: ${error.message}`);
    }
  }
  silence() {
    this.audio?.close();
    this.audio = null;
  }
  // After sleep, or when the system took the sound device away.
  wake() {
    if (this.audio && this.audio.context.state !== "running") this.audio.context.resume();
  }
  setVolume() {
    if (!this.audio) return;
    const gain = this.model.get("volume") ** 2, { context, volume } = this.audio;
    volume.gain.setTargetAtTime(gain, context.currentTime, 0.02);
  }
  onReport(report) {
    if (report.epoch !== this.epoch) return;
    const now = performance.now();
    const { epoch, heard, silent, underruns, lost, lowest, level } = report;
    Object.assign(this.root.dataset, { epoch, heard, silent, underruns, lost, lowest, level });
    if (now - this.lastReport < REPORT_MS && report.running && !report.dry) return;
    this.lastReport = now;
    this.tell({ kind: "report", epoch, heard, silent, underruns, lowest });
  }

  // --- meters ---

  tick() {
    const meters = this.model.get("meters"), round = (x, n = 0) => (x == null ? "–" : x.toFixed(n));
    const { readings } = this, rate = this.model.get("sample_rate");
    this.countLatencies();
    const mine = this.latencies.length > 0;
    const p50 = mine ? percentile(this.latencies, 50) : meters.latency_p50_ms;
    const p95 = mine ? percentile(this.latencies, 95) : meters.latency_p95_ms;
    const queued = this.audio ? this.audio.report.level / rate : meters.queued_s ?? 0;
    readings.queue.textContent = `${round(queued, 1)} s`;
    this.gauge.value = Math.min(1, queued / (meters.target_s || 1));
    readings.rtf.textContent = `${round(meters.rtf, 2)}×`;
    readings.latency.textContent = p50 == null ? "–" : `${round(p50 / 1000, 2)} / ${round(p95 / 1000, 2)} s`;
    readings.underruns.textContent = String(this.audio ? this.audio.report.underruns : meters.underruns ?? 0);
    readings.work.textContent = `${round(meters.dit_ms)} + ${round(meters.decode_ms)} ms`;
    const here = this.model.get("sink") === "browser";
    const level = !here ? meters.level_db : this.audio?.report.running ? this.audio.levelDb() : null;
    readings.level.textContent = level == null ? "–" : `${round(level)} dB`;
    if (level != null) this.root.dataset.levelDb = level.toFixed(1);
    Object.assign(this.root.dataset, { latencyP50: p50 ?? "", latencyP95: p95 ?? "" });
    this.showState();
  }
  showState() {
    const state = this.model.get("state");
    const running = !["new", "stopped", "failed"].includes(state);
    const silentFor = performance.now() - this.heardKernel;
    let text = { new: "ready", priming: "filling the queue…", waiting: "waiting for the page" }[state] ?? state;
    if (this.lost || (running && silentFor > SILENT_KERNEL_MS)) {
      text = "no word from the kernel: run the cell again if it was restarted";
    } else if (running && !this.audio && this.model.get("sink") === "browser") {
      text = "playing in another page; press Play to hear it here";
    } else if (this.audio && this.audio.context.state !== "running") {
      text = "the browser holds the sound: click anywhere in the player";
    }
    write(this.state, text);
    this.root.dataset.state = state;
  }
  countLatencies() {
    if (!this.audio || !this.due.length) return;
    const heard = this.audio.heard(), now = performance.now(), rate = this.audio.sampleRate;
    const due = this.due.filter((p) => p.sample <= heard);
    this.due = this.due.filter((p) => p.sample > heard);
    for (const { sample, at } of due) this.latencies.push(now - (1000 * (heard - sample)) / rate - at);
    this.latencies = this.latencies.slice(-200);
  }
  paint() {
    if (this.closed) return;
    if (this.root.isConnected && !document.hidden) this.picture.draw(this.audio ? this.audio.heard() : 0);
    this.frame = requestAnimationFrame(() => this.paint());
  }

  // --- MIDI ---

  async learn() {
    this.midiLearn = !this.midiLearn;
    this.buttons.midi.setAttribute("aria-pressed", String(this.midiLearn));
    if (!this.midiLearn) return this.say("");
    try {
      if (!navigator.requestMIDIAccess) throw new Error("this browser has no WebMIDI (Chrome and Edge have)");
      this.midi ??= await navigator.requestMIDIAccess();
    } catch (error) {
      this.say(`No MIDI: ${error.message.replace(/\.+$/, "")}.`);
      this.midiLearn = false;
      this.buttons.midi.setAttribute("aria-pressed", "false");
      return;
    }
    if (this.closed) return;
    const attach = () => {
      for (const port of this.midi.inputs.values()) port.onmidimessage = ({ data }) => this.onMidi(data);
    };
    this.midi.onstatechange = attach;
    attach();
    this.say("MIDI learn: touch a control here, then move one on the device.");
  }
  touch({ name, kind }) {
    if (this.midiLearn && !["text", "number"].includes(kind)) this.midiTarget = name;
  }
  onMidi([status, controller, value]) {
    if ((status & 0xf0) !== 0xb0) return; // control changes only
    const key = `${status & 0x0f}:${controller}`, map = this.model.get("midi_map");
    if (this.midiLearn && this.midiTarget) {
      this.model.set("midi_map", { ...map, [key]: this.midiTarget });
      this.model.save_changes();
      this.say(`MIDI controller ${controller} moves ${this.midiTarget}.`);
      this.midiTarget = null;
    } else this.fields[map[key]]?.move(value, (name, moved) => this.ask(name, moved));
  }

  close() {
    this.tell({ kind: "gone" });
    this.closed = true;
    clearInterval(this.ticker);
    cancelAnimationFrame(this.frame);
    this.model.off("msg:custom", this.onMessage);
    this.model.off("change", this.onChange);
    document.removeEventListener("visibilitychange", this.onWake);
    if (this.midi) this.midi.onstatechange = null; // else a device plugged in later would attach again
    for (const port of this.midi?.inputs.values() ?? []) port.onmidimessage = null;
    this.silence();
  }
}

export default {
  render({ model, el }) {
    const player = new Player(model, el);
    return () => player.close();
  },
};
