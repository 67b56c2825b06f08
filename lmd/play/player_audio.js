// Sound in the browser: an AudioWorklet that plays from a ring buffer, and the spectrum of what is
// sent to it. Joined with player.js into one ES module; nothing is fetched from anywhere.

// The worklet. Its gain before every sample is min(previous + 1/fade, remaining/fade, 1), so that it
// fades to silence before it runs dry and in again when sound arrives (see lmd/play/play_queue.py).
const WORKLET = `
class LmdRing extends AudioWorkletProcessor {
  constructor(options) {
    super();
    const { channels, seconds } = options.processorOptions;
    this.channels = channels;
    this.size = Math.ceil(seconds * sampleRate);
    this.ring = Array.from({ length: channels }, () => new Float32Array(this.size));
    this.fade = Math.max(1, Math.round(0.02 * sampleRate));
    this.clear(0);
    this.port.onmessage = ({ data }) => this.take(data);
  }
  clear(epoch) {
    Object.assign(this, { epoch, read: 0, level: 0, gain: 0, dry: true, running: false,
      ending: false, heard: 0, silent: 0, underruns: 0, lost: 0, lowest: this.size, since: 0,
      hold: 0, mayPlay: Infinity, loop: [], loopAt: 0 });
  }
  take(data) {
    if (data.kind === "open") {
      this.clear(data.epoch);
      this.hold = Math.round((data.hold_s ?? 0) * sampleRate);
    }
    else if (data.epoch !== this.epoch) return;
    else if (data.kind === "push") this.push(data.samples, data.first);
    else if (data.kind === "run") this.running = data.running;
    else if (data.kind === "finish") this.ending = true;
    else if (data.kind === "hold") this.mayPlay = data.on ? this.fade : Infinity;
    this.tell();
  }
  // Interleaved samples from \`first\` of the stream on. What waited there and behind fades out under
  // them (see crossfaded in lmd/play/play_queue.py); too late, they begin with what is due now.
  push(samples, first) {
    const late = Math.max(0, this.heard - first), all = samples.length / this.channels - late;
    if (all <= 0) return;
    const kept = Math.min(first + late - this.heard, this.level);
    const n = Math.min(all, this.size - kept), nFade = Math.min(this.level - kept, this.fade, n);
    this.lost += all - n;
    const gains = this.gains(samples, late, kept, nFade);
    for (let c = 0; c < this.channels; c++) {
      const ring = this.ring[c];
      let at = (this.read + kept) % this.size;
      for (let i = 0; i < n; i++) {
        const x = samples[(late + i) * this.channels + c];
        ring[at] = i < nFade ? x * gains[2 * i] + ring[at] * gains[2 * i + 1] : x;
        if (++at === this.size) at = 0;
      }
    }
    this.level = kept + n;
  }
  // Pairs (in, out) that keep the power of what is faded, whatever the two have in common.
  gains(samples, late, kept, n) {
    let common = 0, old = 0, fresh = 0;
    for (let c = 0; c < this.channels; c++)
      for (let i = 0; i < n; i++) {
        const x = samples[(late + i) * this.channels + c];
        const y = this.ring[c][(this.read + kept + i + this.size) % this.size];
        common += x * y;
        old += y * y;
        fresh += x * x;
      }
    const r = old && fresh ? Math.max(0, common / Math.sqrt(old * fresh)) : 0, out = [];
    for (let i = 0; i < n; i++) {
      const angle = ((i + 0.5) / n) * (Math.PI / 2), a = Math.sin(angle), b = Math.cos(angle);
      const power = Math.sqrt(1 + 2 * r * a * b);
      out.push(a / power, b / power);
    }
    return out;
  }
  // What was played last, its beginning cross-faded from its end: it goes on into itself.
  looped(isAhead) { // isAhead: the sample at \`read\` has been counted as heard
    const past = Math.min(this.hold, this.heard - Number(isAhead)), n = past - this.fade;
    if (n < this.fade) return [];
    const from = this.read - past + 2 * this.size, at = (i) => (from + i) % this.size;
    const whole = new Float32Array(n * this.channels);
    for (let c = 0; c < this.channels; c++)
      for (let i = 0; i < n; i++) whole[i * this.channels + c] = this.ring[c][at(i)];
    const gains = this.gains(whole, 0, n - past, this.fade);
    return this.ring.map((ring, c) => Float32Array.from({ length: n }, (_, i) => {
      const x = whole[i * this.channels + c];
      return i < this.fade ? x * gains[2 * i] + ring[at(n + i)] * gains[2 * i + 1] : x;
    }));
  }
  process(_, [output]) {
    for (let i = 0; i < output[0].length; i++) {
      if (!this.running && this.gain === 0) return true;
      const isHeld = this.mayPlay <= 0, left = Math.min(this.level, this.mayPlay), before = this.gain;
      if (left <= 0) {
        if (!isHeld) {
          if (this.running && !this.dry && !this.ending) this.underruns++;
          this.dry = true;
          this.silent++;
        }
        this.gain = 0;
      } else {
        this.dry = false;
        this.level--;
        this.mayPlay--;
        this.heard++;
        const slope = (this.running ? 1 : -1) / this.fade;
        this.gain = Math.max(0, Math.min(this.gain + slope, (left - 1) / this.fade, 1));
      }
      if (before === 1 && this.gain < 1 && this.running) {
        this.loop = this.looped(left > 0);
        this.loopAt = 0;
      }
      const loops = this.gain < 1 && this.running && this.loop.length;
      for (let c = 0; c < output.length; c++) {
        const own = Math.min(c, this.channels - 1);
        const under = loops ? this.loop[own][this.loopAt % this.loop[own].length] : 0;
        output[c][i] = (left > 0 ? this.ring[own][this.read] * this.gain : 0) + (1 - this.gain) * under;
      }
      if (loops) this.loopAt++;
      if (left > 0 && ++this.read === this.size) this.read = 0;
    }
    if (!this.ending && this.mayPlay > 0) this.lowest = Math.min(this.lowest, this.level);
    this.since += output[0].length;
    if (this.since > 0.05 * sampleRate) this.tell();
    return true;
  }
  tell() {
    this.since = 0;
    const { epoch, heard, silent, underruns, lost, lowest, level, running, dry } = this;
    this.port.postMessage({ epoch, heard, silent, underruns, lost, lowest, level, running, dry,
      at: currentTime });
  }
}
registerProcessor("lmd-ring", LmdRing);
`;

const RING_SECONDS = 120; // more than the longest queue that the player can ask for

// One AudioContext with its worklet, volume and level meter. Make it inside a click.
class AudioOut {
  constructor(sampleRate, channels, onReport) {
    this.context = new AudioContext({ sampleRate, latencyHint: "interactive" });
    this.sampleRate = sampleRate;
    this.channels = channels;
    this.onReport = onReport;
    this.report = { heard: 0, level: 0, underruns: 0, silent: 0, running: false, dry: true, at: 0 };
    this.volume = this.context.createGain();
    this.analyser = this.context.createAnalyser();
    this.analyser.fftSize = 2048;
    this.waveform = new Float32Array(this.analyser.fftSize);
    this.volume.connect(this.analyser).connect(this.context.destination);
    this.ready = this.load();
  }
  async load() {
    const url = URL.createObjectURL(new Blob([WORKLET], { type: "text/javascript" }));
    try {
      await this.context.audioWorklet.addModule(url);
    } finally {
      URL.revokeObjectURL(url);
    }
    this.node = new AudioWorkletNode(this.context, "lmd-ring", {
      numberOfInputs: 0,
      outputChannelCount: [this.channels],
      processorOptions: { channels: this.channels, seconds: RING_SECONDS },
    });
    this.node.port.onmessage = ({ data }) => {
      this.report = data;
      this.onReport(data);
    };
    this.node.connect(this.volume);
  }
  async post(message, transfer = []) {
    await this.ready;
    this.node.port.postMessage(message, transfer);
  }
  // Samples that have left the loudspeaker, to the best of the browser's knowledge.
  heard() {
    const { heard, level, running, at } = this.report;
    const since = running ? (this.context.currentTime - at) * this.sampleRate : 0;
    const latency = (this.context.outputLatency || 0) * this.sampleRate;
    return Math.max(0, heard + Math.min(Math.max(0, since), level) - latency);
  }
  levelDb() {
    this.analyser.getFloatTimeDomainData(this.waveform);
    const power = this.waveform.reduce((sum, x) => sum + x * x, 0) / this.waveform.length;
    return 10 * Math.log10(Math.max(power, 1e-12));
  }
  close() {
    if (this.context.state !== "closed") this.context.close();
  }
}

const N_FFT = 1024, HOP = 512, N_BANDS = 96, N_COLUMNS = 2048, LOWEST_HZ = 50, FLOOR_DB = -85;

// Columns of a logarithmic spectrogram, one per HOP samples, 0…255 from FLOOR_DB to 0 dB.
class Spectrum {
  constructor(sampleRate) {
    this.columns = new Uint8Array(N_COLUMNS * N_BANDS);
    this.recent = new Float32Array(N_COLUMNS * HOP); // a ring of the latest samples
    this.end = 0; // samples so far
    this.next = 0; // the column that is computed next
    const top = sampleRate / 2;
    this.edges = Array.from({ length: N_BANDS + 1 }, (_, b) =>
      (LOWEST_HZ * (top / LOWEST_HZ) ** (b / N_BANDS) * N_FFT) / sampleRate);
    this.window = Float32Array.from({ length: N_FFT }, (_, i) =>
      0.5 - 0.5 * Math.cos((2 * Math.PI * i) / N_FFT));
    this.twiddle = Float32Array.from({ length: N_FFT }, (_, i) =>
      i % 2 ? -Math.sin((Math.PI * (i - 1)) / N_FFT) : Math.cos((Math.PI * i) / N_FFT));
  }
  // Mono samples from `first` of the stream on; returns the first and last + 1 of the new columns.
  push(samples, first) {
    const n = this.recent.length;
    this.next = Math.min(this.next, Math.max(0, Math.floor((first - N_FFT) / HOP) + 1));
    samples.forEach((x, i) => (this.recent[(first + i) % n] = x));
    this.end = first + samples.length;
    const begin = this.next;
    while (this.next * HOP + N_FFT <= this.end) this.compute();
    return [begin, this.next];
  }
  compute() {
    const from = this.next * HOP, n = this.recent.length, im = new Float32Array(N_FFT);
    const re = this.window.map((w, i) => w * this.recent[(from + i) % n]);
    fft(re, im, this.twiddle);
    const column = (this.next++ % N_COLUMNS) * N_BANDS;
    for (let b = 0; b < N_BANDS; b++) {
      const low = Math.floor(this.edges[b]), high = Math.max(low + 1, Math.floor(this.edges[b + 1]));
      let power = 0;
      for (let k = low; k < high; k++) power = Math.max(power, re[k] ** 2 + im[k] ** 2);
      const db = 10 * Math.log10(power / (N_FFT / 4) ** 2 + 1e-12);
      this.columns[column + b] = Math.max(0, Math.min(255, 255 * (1 - db / FLOOR_DB)));
    }
  }
}

// In place, radix 2, length N_FFT; twiddle holds cos and −sin of 2πi/N_FFT side by side.
function fft(re, im, twiddle) {
  const n = re.length;
  for (let i = 1, j = 0; i < n; i++) {
    let bit = n >> 1;
    for (; j & bit; bit >>= 1) j ^= bit;
    j ^= bit;
    if (i < j) [re[i], re[j]] = [re[j], re[i]];
  }
  for (let size = 2; size <= n; size <<= 1) {
    const half = size >> 1, step = n / size;
    for (let start = 0; start < n; start += size) {
      for (let k = 0; k < half; k++) {
        const c = twiddle[2 * k * step], s = twiddle[2 * k * step + 1];
        const a = start + k, b = a + half;
        const x = re[b] * c - im[b] * s, y = re[b] * s + im[b] * c;
        re[b] = re[a] - x;
        im[b] = im[a] - y;
        re[a] += x;
        im[a] += y;
      }
    }
  }
}
