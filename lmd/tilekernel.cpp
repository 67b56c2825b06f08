// y = x W^T + b (+ or *) z, and SiLU of x W^T + b, in bfloat16 by AMX tiles: see lmd/tiles.py.
//
// W lies in panels of COLUMNS outputs, each a row of pairs of tiles, in the order in which they are
// read; a tile holds STEP inputs of 16 outputs, pairs of inputs side by side, as TDPBF16PS takes
// them. Two tiles of x by two of W give four tiles of float32 sums. While one panel is multiplied,
// the next is fetched into the second cache, a share with every pair of tiles of rows.
//
// All tiles of x have the same height, so that one configuration serves a whole product; where the
// number of rows is no multiple of it, the last tiles overlap and write the same numbers twice.
//
// Attention is of two such products, queries by keys and shares by values, which are laid into
// tiles for it; norms, rotation and softmax are microkernel.cpp's.
//
// With EMULATE_TILES the tiles are arrays: to test the rest of it, and what it asks of tiles, on
// any processor. Never to play with.

#include "microkernel.cpp"  // bfloat16, exponential, attention

#include <cstddef>

#if defined(EMULATE_TILES)
#include <atomic>
#elif defined(__AMX_TILE__) && defined(__AMX_BF16__)
#include <cerrno>
#include <sys/syscall.h>
#include <unistd.h>
#else
#error "the compiler knows no AMX tiles of bfloat16 for this processor"
#endif

extern "C" int omp_get_thread_num(), omp_get_num_threads();

namespace {

constexpr int TILE_ROWS = 16, TILE_BYTES = 1024;
constexpr int STEP = 32;             // inputs in a row of a tile: a line of the cache
constexpr int PANEL = 2 * 16;        // outputs
constexpr int PAIR = 2 * 16 * STEP;  // numbers in the two tiles of W that are read together
constexpr int PAIR_LINES = 2 * TILE_BYTES / LINE;
constexpr long X_AT_ONCE = 1 << 20;  // bytes of x that stay in the second cache
constexpr long FIRST_LINES = 512;    // of a thread's first panel, which no other one can fetch

// --- tiles ---

struct Config {  // as LDTILECFG reads it
  uint8_t palette = 1, start_row = 0, zeros[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(Config) == 64 && offsetof(Config, row_bytes) == 16 &&
                  offsetof(Config, rows) == 48,
              "the processor's layout");

#if defined(EMULATE_TILES)

inline float as_float(Brain x) {
  const uint32_t word = uint32_t(x.bits) << 16;
  float y;
  std::memcpy(&y, &word, sizeof y);
  return y;
}

std::atomic<int> faults{0};  // what a processor would have refused

struct Tiles {
  Config config;
  bool is_configured = false;
  uint8_t bytes[8][TILE_ROWS][64];

  void expect(bool is_right) { faults += !is_right; }
  void expect_tile(int tile) {
    expect(is_configured && tile >= 0 && tile < 8 && config.rows[tile] && config.row_bytes[tile]);
  }
};
thread_local Tiles tiles;

inline void configure(const Config& config) {
  tiles.expect(config.palette == 1 && config.start_row == 0);
  for (int tile = 0; tile < 16; ++tile) {
    const bool used = config.rows[tile] || config.row_bytes[tile];
    tiles.expect(!used || (tile < 8 && config.rows[tile] && config.row_bytes[tile]));
    tiles.expect(config.rows[tile] <= TILE_ROWS && config.row_bytes[tile] <= 64);
  }
  tiles.config = config;
  tiles.is_configured = true;
  std::memset(tiles.bytes, 0, sizeof tiles.bytes);
}

inline void release() { tiles.is_configured = false; }

template <int TILE>
inline void tile_zero() {
  tiles.expect_tile(TILE);
  std::memset(tiles.bytes[TILE], 0, TILE_BYTES);
}

template <int TILE>
inline void tile_load(const void* from, long stride) {
  tiles.expect_tile(TILE);
  std::memset(tiles.bytes[TILE], 0, TILE_BYTES);
  for (int r = 0; r < tiles.config.rows[TILE]; ++r)
    std::memcpy(tiles.bytes[TILE][r], (const uint8_t*)from + r * stride,
                tiles.config.row_bytes[TILE]);
}

template <int TILE>
inline void tile_store(void* to, long stride) {
  tiles.expect_tile(TILE);
  for (int r = 0; r < tiles.config.rows[TILE]; ++r)
    std::memcpy((uint8_t*)to + r * stride, tiles.bytes[TILE][r], tiles.config.row_bytes[TILE]);
}

template <int C, int A, int B>
inline void tile_multiply() {
  const Config& config = tiles.config;
  for (int tile : {C, A, B}) tiles.expect_tile(tile);
  tiles.expect(C != A && C != B && A != B && config.rows[C] == config.rows[A]);
  tiles.expect(config.row_bytes[C] == config.row_bytes[B]);
  tiles.expect(config.row_bytes[A] == 4 * config.rows[B] && config.row_bytes[C] % 4 == 0);
  for (int m = 0; m < config.rows[A]; ++m)
    for (int n = 0; n < config.row_bytes[B] / 4; ++n) {
      float sum;
      std::memcpy(&sum, &tiles.bytes[C][m][4 * n], sizeof sum);
      for (int k = 0; k < config.rows[B]; ++k) {
        Brain a[2], b[2];
        std::memcpy(a, &tiles.bytes[A][m][4 * k], sizeof a);
        std::memcpy(b, &tiles.bytes[B][k][4 * n], sizeof b);
        sum += as_float(a[0]) * as_float(b[0]) + as_float(a[1]) * as_float(b[1]);
      }
      std::memcpy(&tiles.bytes[C][m][4 * n], &sum, sizeof sum);
    }
}

#else

// Not <immintrin.h>'s: in GCC these do not tell the compiler which memory they read.

inline void configure(const Config& config) { asm volatile("ldtilecfg %0" : : "m"(config)); }

inline void release() { asm volatile("tilerelease" : : : "memory"); }

template <int TILE>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(TILE));
}

template <int TILE>
inline void tile_load(const void* from, long stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(TILE) : "memory");
}

template <int TILE>
inline void tile_store(void* to, long stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(TILE) : "memory");
}

template <int C, int A, int B>
inline void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

#endif

// Sums are in tiles 0 to 3, x in 4 and 5, W in 6 and 7.
void configure(int height) {
  Config config;
  for (int tile = 0; tile < 8; ++tile) {
    config.rows[tile] = uint8_t(tile < 6 ? height : TILE_ROWS);
    config.row_bytes[tile] = 64;
  }
  configure(config);
}

// --- products ---

struct TileProduct {
  const Brain *x, *panels, *bias, *other;
  Brain* y;
  long n_inputs, n_outputs;
  Operation operation;
};

inline void fetch(const void* from, long n_lines) {
  for (long line = 0; line < n_lines; ++line)
    __builtin_prefetch((const uint8_t*)from + line * LINE, 0, 2);
}

// Sums of one panel for R tiles of rows that begin at x[0] ...; with each of the first `n_next`
// pairs of tiles, `n_lines` lines from `next` on are fetched. Rows of sums are `sums_width` apart.
template <int R>
void multiply_tiles(const Brain* const* x, const Brain* panel, long n_steps, long height,
                    const Brain* next, long n_next, long n_lines, float* sums, long sums_width) {
  const long x_stride = n_steps * STEP * sizeof(Brain);
  const Brain *first = x[0], *second = x[R - 1];
  tile_zero<0>();
  tile_zero<1>();
  if constexpr (R == 2) tile_zero<2>();
  if constexpr (R == 2) tile_zero<3>();
  for (long step = 0; step < n_steps; ++step) {
    if (step < n_next) fetch(next + step * n_lines * (LINE / sizeof(Brain)), n_lines);
    tile_load<6>(panel, 64);
    tile_load<4>(first, x_stride);
    tile_multiply<0, 4, 6>();
    tile_load<7>(panel + PAIR / 2, 64);
    tile_multiply<1, 4, 7>();
    if constexpr (R == 2) {
      tile_load<5>(second, x_stride);
      tile_multiply<2, 5, 6>();
      tile_multiply<3, 5, 7>();
    }
    panel += PAIR;
    first += STEP;
    second += STEP;
  }
  const long stride = sums_width * sizeof(float);
  tile_store<0>(sums, stride);
  tile_store<1>(sums + 16, stride);
  if constexpr (R == 2) tile_store<2>(sums + height * sums_width, stride);
  if constexpr (R == 2) tile_store<3>(sums + height * sums_width + 16, stride);
}

// How rows are divided into tiles of one height: one, or an even number, the last ones overlapping.
struct Rows {
  long n, n_tiles, height, n_groups;

  explicit Rows(long n_rows) : n(n_rows), n_tiles((n_rows + TILE_ROWS - 1) / TILE_ROWS) {
    n_tiles += n_tiles > 1 && n_tiles % 2;
    height = (n + n_tiles - 1) / n_tiles;
    n_groups = (n_tiles + 1) / 2;
  }
  int in_group() const { return n_tiles == 1 ? 1 : 2; }
  long begin(long tile) const { return std::min(tile * height, n - height); }
};

// `n_rows` rows of sums to results, from `row` and the panel's first column on.
void finish(const TileProduct& p, const float* sums, long row, long n_rows, long column) {
  const long n = std::min<long>(PANEL, p.n_outputs - column);
  Brain bias[PANEL] = {}, part_of_other[PANEL] = {}, part[PANEL];  // of a panel's width
  std::memcpy(bias, p.bias + column, n * sizeof(Brain));
  for (long r = 0; r < n_rows; ++r) {
    const long at = (row + r) * p.n_outputs + column;
    const Brain* other = n == PANEL && p.other ? p.other + at : part_of_other;
    Brain* y = n == PANEL ? p.y + at : part;
    if (n < PANEL && p.other) std::memcpy(part_of_other, p.other + at, n * sizeof(Brain));
    for (int c = 0; c < PANEL; c += LANES) {
      Vector sum = load(sums + r * PANEL + c) + load(bias + c);
      if (p.operation == ADD) sum += load(other + c);
      if (p.operation == MULTIPLY) sum *= load(other + c);
      if (p.operation == SWISH) sum = sum / (1.0f + exponential(-sum));
      store(y + c, sum);
    }
    if (n < PANEL) std::memcpy(p.y + at, part, n * sizeof(Brain));
  }
}

// Rows `row` ... `row + n - 1`, panels `begin` ... `end - 1`.
void compute_rows(const TileProduct& p, long row, long n, long begin, long end) {
  const Rows split(n);
  const long n_steps = p.n_inputs / STEP, panel_lines = n_steps * PAIR_LINES;
  const long n_lines = (PAIR_LINES + split.n_groups - 1) / split.n_groups;
  alignas(64) float sums[2 * TILE_ROWS * PANEL];
  configure(int(split.height));
  for (long panel = begin; panel < end; ++panel) {
    const Brain *weights = p.panels + panel * n_steps * PAIR, *next = weights + n_steps * PAIR;
    for (long group = 0; group < split.n_groups; ++group) {
      const long done = std::min(group * n_steps * n_lines, panel_lines);
      const long n_next = panel + 1 < end ? (panel_lines - done + n_lines - 1) / n_lines : 0;
      const Brain* fetched = next + done * (LINE / sizeof(Brain));
      const Brain* x[2] = {};
      for (int i = 0; i < split.in_group(); ++i)
        x[i] = p.x + (row + split.begin(2 * group + i)) * p.n_inputs;
      if (split.in_group() == 1)
        multiply_tiles<1>(x, weights, n_steps, split.height, fetched, n_next, n_lines, sums, PANEL);
      else
        multiply_tiles<2>(x, weights, n_steps, split.height, fetched, n_next, n_lines, sums, PANEL);
      for (int i = 0; i < split.in_group(); ++i)
        finish(p, sums + i * split.height * PANEL, row + split.begin(2 * group + i), split.height,
               panel * PANEL);
    }
  }
  release();
}

void compute_tiles(const TileProduct& p, long n_rows, int n_threads) {
  const long n_panels = (p.n_outputs + PANEL - 1) / PANEL;
  const long most = std::max<long>(TILE_ROWS, X_AT_ONCE / (p.n_inputs * sizeof(Brain)));
  const long n_parts = (n_rows + most - 1) / most;
  const bool alone = n_rows * p.n_inputs * p.n_outputs < WORTH_A_THREAD;
#pragma omp parallel num_threads(alone ? 1 : n_threads)
  {
    const long thread = omp_get_thread_num(), n = omp_get_num_threads();
    const long begin = n_panels * thread / n, end = n_panels * (thread + 1) / n;
    const long panel_lines = p.n_inputs / STEP * PAIR_LINES;
    if (begin < end)
      fetch(p.panels + begin * p.n_inputs * PANEL, std::min(FIRST_LINES, panel_lines));
    for (long part = 0; part < n_parts && begin < end; ++part) {
      const long from = n_rows * part / n_parts, to = n_rows * (part + 1) / n_parts;
      compute_rows(p, from, to - from, begin, end);
    }
  }
}

// --- attention ---

// Memory that begins with a line of the cache, as rows of tiles do.
struct Room {
  std::vector<uint8_t> bytes;

  template <typename T>
  T* of(long n) {
    bytes.resize(n * sizeof(T) + LINE);
    return (T*)((uintptr_t(bytes.data()) + LINE - 1) / LINE * LINE);
  }
};

struct TileDesk {
  Room queries, keys, values, scores, shares, turned, nothing;
};

// One key into the tiles of keys: as a row of weights would lie there.
void place_key(const Brain* key, long at, long dim, Brain* tiles) {
  Brain* column = tiles + at / PANEL * PANEL * dim + at % PANEL / 16 * (PAIR / 2) + at % 16 * 2;
  for (long i = 0; i < dim; i += 2)
    std::memcpy(column + i / STEP * PAIR + i % STEP * 16, key + i, 2 * sizeof(Brain));
}

// Two values into the tiles of values, whose inputs are keys: `at` and `at + 1` of `n_keys`.
void place_values(const Brain* first, const Brain* second, long at, long n_keys, long dim,
                  Brain* tiles) {
  for (long i = 0; i < dim; i += 16) {
    uint32_t both[16];
    for (int c = 0; c < 16; ++c)
      both[c] = first[i + c].bits | uint32_t(second[i + c].bits) << 16;
    Brain* to = tiles + i / PANEL * PANEL * n_keys + i % PANEL / 16 * (PAIR / 2);
    std::memcpy(to + at / STEP * PAIR + at % STEP * 16, both, sizeof both);
  }
}

// Sums for the tiles of one group: `n` panels of W, after one another to the right.
void multiply_group(const Rows& split, const Brain* const* x, const Brain* panels, long n_panels,
                    long n_inputs, float* sums, long sums_width) {
  const long n_steps = n_inputs / STEP;
  for (long panel = 0; panel < n_panels; ++panel, panels += n_steps * PAIR, sums += PANEL)
    if (split.in_group() == 1)
      multiply_tiles<1>(x, panels, n_steps, split.height, x[0], 0, 0, sums, sums_width);
    else
      multiply_tiles<2>(x, panels, n_steps, split.height, x[0], 0, 0, sums, sums_width);
}

// `attend_head` by tiles: queries, keys, shares and values are rounded to bfloat16, sums are not.
void attend_head_by_tiles(const Attention<Brain>& a, TileDesk& desk, const Rows& split, long batch,
                          long head) {
  const long dim = a.dim, n_fresh = a.k ? a.n_tokens : 0, at = batch * a.n_heads + head;
  const long n_keys = a.n_past + n_fresh, n_padded = (n_keys + PANEL - 1) / PANEL * PANEL;
  Brain* queries = desk.queries.of<Brain>(a.n_tokens * dim);
  Brain* keys = desk.keys.of<Brain>(n_padded * dim);
  Brain* values = desk.values.of<Brain>(n_padded * dim);
  Brain* shares = desk.shares.of<Brain>(2 * TILE_ROWS * n_padded);
  float* scores = desk.scores.of<float>(2 * TILE_ROWS * std::max(n_padded, dim));
  float* turned = desk.turned.of<float>(2 * dim);
  Brain* nothing = desk.nothing.of<Brain>(dim);
  std::memset(nothing, 0, dim * sizeof(Brain));
  const Brain* past_key = a.past_key + at * a.n_past * dim;
  for (long i = 0; i < a.n_past; ++i) place_key(past_key + i * dim, i, dim, keys);
  const float scale = 1 / std::sqrt(float(dim));
  for (long t = 0; t < a.n_tokens; ++t) {
    const long row = (batch * a.n_tokens + t) * a.row_stride + head * dim, half = a.n_turned / 2;
    normalise(a.q + row, a.q_weight, a.q_bias, dim, a.epsilon, turned);
    turn(turned, a.cos + t * half, a.sin + t * half, a.n_turned);
    for (long i = 0; i < dim; i += LANES) store(queries + t * dim + i, load(turned + i) * scale);
    if (!a.k) continue;
    const long fresh = (at * a.n_tokens + t) * dim;
    normalise(a.k + row, a.k_weight, a.k_bias, dim, a.epsilon, turned);
    for (long i = 0; i < dim; i += LANES) store(a.fresh_key + fresh + i, load(turned + i));
    turn(turned, a.cos + t * half, a.sin + t * half, a.n_turned);
    Brain* rounded = (Brain*)(turned + dim);
    for (long i = 0; i < dim; i += LANES) store(rounded + i, load(turned + i));
    place_key(rounded, a.n_past + t, dim, keys);
    std::memcpy(a.fresh_value + fresh, a.v + row, dim * sizeof(Brain));
  }
  const Brain* past_value = a.past_value + at * a.n_past * dim;
  const auto value = [&](long key) -> const Brain* {
    if (key < a.n_past) return past_value + key * dim;
    return key < n_keys ? a.fresh_value + (at * a.n_tokens + key - a.n_past) * dim : nothing;
  };
  for (long key = 0; key < n_padded; key += 2)
    place_values(value(key), value(key + 1), key, n_padded, dim, values);
  for (long group = 0; group < split.n_groups; ++group) {
    const long n_rows = split.in_group() * split.height;
    const Brain *x[2] = {}, *y[2] = {};
    long tokens[2 * TILE_ROWS];
    float factors[2 * TILE_ROWS];
    for (int i = 0; i < split.in_group(); ++i) {
      const long first = split.begin(2 * group + i);
      x[i] = queries + first * dim;
      y[i] = shares + i * split.height * n_padded;
      for (long r = 0; r < split.height; ++r) tokens[i * split.height + r] = first + r;
    }
    multiply_group(split, x, keys, n_padded / PANEL, dim, scores, n_padded);
    for (long r = 0; r < n_rows; ++r) {
      float* row = scores + r * n_padded;
      const uint8_t* visible = a.visible ? a.visible + tokens[r] * n_keys : nullptr;
      factors[r] = soften(row, n_keys, n_padded, visible);
      for (long key = 0; key < n_padded; key += LANES)
        store(shares + r * n_padded + key, load(row + key));
    }
    multiply_group(split, y, values, dim / PANEL, n_padded, scores, dim);
    for (long r = 0; r < n_rows; ++r) {
      Brain* seen = a.seen + ((batch * a.n_tokens + tokens[r]) * a.n_heads + head) * dim;
      for (long i = 0; i < dim; i += LANES)
        store(seen + i, load(scores + r * dim + i) * factors[r]);
    }
  }
}

}  // namespace

// Asks the system for this process's use of tiles. Returns 0, or the number of its refusal.
extern "C" int tile_permission() {
#if defined(EMULATE_TILES)
  return 0;
#else
  constexpr long ARCH_GET_XCOMP_PERM = 0x1022, ARCH_REQ_XCOMP_PERM = 0x1023, TILE_DATA = 18;
  unsigned long allowed = 0;
  if (syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA)) return errno;
  if (syscall(SYS_arch_prctl, ARCH_GET_XCOMP_PERM, &allowed)) return errno;
  return allowed >> TILE_DATA & 1 ? 0 : EPERM;
#endif
}

// How often emulated tiles were asked for what a processor refuses.
extern "C" int tile_faults() {
#if defined(EMULATE_TILES)
  return faults;
#else
  return 0;
#endif
}

// All numbers are bfloat16. Args: x [rows, inputs], inputs a multiple of STEP; panels
// [ceil(outputs / PANEL), inputs / STEP, 2, 16, 16, 2]: a panel's steps, halves of its outputs, pairs
// of inputs, outputs, the two; bias [outputs]; other [rows, outputs], or null where the operation is
// NONE or SWISH; y [rows, outputs], written.
extern "C" void tile_linear(const Brain* x, const Brain* panels, const Brain* bias,
                            const Brain* other, Brain* y, long n_rows, long n_inputs,
                            long n_outputs, int operation, int n_threads) {
  compute_tiles({x, panels, bias, other, y, n_inputs, n_outputs, Operation(operation)}, n_rows,
                n_threads);
}

// `panel_attend` in bfloat16; `dim` is a multiple of PANEL.
extern "C" void tile_attend(const Attention<Brain>* a, int n_threads) {
  if (a->n_tokens == 0) return;
  const Rows split(a->n_tokens);
#pragma omp parallel num_threads(n_threads)
  {
    TileDesk desk;
    configure(int(split.height));
#pragma omp for schedule(static) nowait
    for (long i = 0; i < a->n_batch * a->n_heads; ++i)
      attend_head_by_tiles(*a, desk, split, i / a->n_heads, i % a->n_heads);
    release();
  }
}
