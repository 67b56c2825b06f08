// y = x W^T + b (+ or *) z, and SiLU of x W^T + b, in float32, for few rows of x: see lmd/panels.py.
//
// A product of few rows is held up by reading W, once, and by what reading leaves undone meanwhile.
// So W lies in panels, COLUMNS of its outputs side by side, input after input, in the order in which
// they are read; ROWS rows of sums stay in registers for as long as a panel is read; and while one
// panel is multiplied, the next is fetched into the second cache, a share with every group of rows.
//
// W may be kept as 16-bit floats, which halves the reading: exact where its numbers are such, as
// those in a file of 16-bit weights are. Sums are of 32 bits either way.
//
// Every sum runs over the inputs in order, whatever the number of rows and of threads: a row comes
// out the same, bit for bit, alone or among others.
//
// Attention of few queries: see lmd/panel_attention.py. One head after another, everything between
// the two linear layers in one go: norms, rotation, scores, softmax, values. The scores of a group
// of queries stay in the first cache; keys and values are read where the context's cache has them.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__F16C__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

// How many floats a register holds, and how many rows of sums fit into all of them.
#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 13;
#elif defined(__AVX2__) && defined(__FMA__)
#define EIGHT_LANES
constexpr int LANES = 8, ROWS = 6;
#else
constexpr int LANES = 4, ROWS = 8;
#endif
constexpr int VECTORS = 2, COLUMNS = VECTORS * LANES;
constexpr long ROWS_AT_ONCE = 16 * ROWS;  // whose inputs the second cache can hold
constexpr int LINE = 64;                  // bytes in a line of the cache
constexpr long WORTH_A_THREAD = 200000;   // multiplications that outweigh waking one

typedef float Vector __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float))));

enum Operation { NONE, ADD, MULTIPLY, SWISH };

Vector load(const float* weights) { return *(const Vector*)weights; }

typedef uint16_t Half;
#if defined(__AVX512F__)
Vector load(const Half* w) { return (Vector)_mm512_cvtph_ps(_mm256_loadu_si256((__m256i*)w)); }
#elif defined(EIGHT_LANES) && defined(__F16C__)
Vector load(const Half* w) { return (Vector)_mm256_cvtph_ps(_mm_loadu_si128((__m128i*)w)); }
#else
#define NO_HALVES
#endif

// A bfloat16: the upper half of a float.
struct Brain {
  uint16_t bits;
};
typedef uint16_t Shorts __attribute__((vector_size(LANES * sizeof(uint16_t))));
typedef uint32_t Words __attribute__((vector_size(LANES * sizeof(uint32_t))));

inline Vector load(const Brain* brains) {
#if defined(__AVX512F__)  // one instruction to widen; of the last way, GCC makes five
  return (Vector)((Words)_mm512_cvtepu16_epi32(_mm256_loadu_si256((__m256i*)brains)) << 16);
#elif defined(EIGHT_LANES)
  return (Vector)((Words)_mm256_cvtepu16_epi32(_mm_loadu_si128((__m128i*)brains)) << 16);
#else
  Shorts bits;
  std::memcpy(&bits, brains, sizeof bits);
  return (Vector)(__builtin_convertvector(bits, Words) << 16);
#endif
}

inline void store(float* to, Vector x) { std::memcpy(to, &x, sizeof x); }
inline void store(Brain* to, Vector x) {  // to the nearest, ties to even
  const Words words = (Words)x, rounded = (words + 0x7fff + (words >> 16 & 1)) >> 16;
  const Words whole = (Words)(x == x ? rounded : Words{} + 0x7fc0);
#if defined(EIGHT_LANES)
  const __m256i packed = _mm256_packus_epi32((__m256i)whole, (__m256i)whole);
  _mm_storeu_si128((__m128i*)to, _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 8)));
#else
  const Shorts bits = __builtin_convertvector(whole, Shorts);
  std::memcpy(to, &bits, sizeof bits);
#endif
}

// e to the x, within a few units of the last place; 0 below e^-87 and for NaN, e^88 at most.
inline Vector exponential(Vector x) {
  typedef int32_t Integers __attribute__((vector_size(LANES * sizeof(int32_t))));
  const Vector lowest = Vector{} - 87.0f;
  const Vector highest = Vector{} + 88.0f;
  Vector clipped = x > lowest ? x : lowest;
  clipped = clipped < highest ? clipped : highest;
  const Integers power = __builtin_convertvector(clipped * 1.44269504f + 127.5f, Integers) - 127;
  const Vector n = __builtin_convertvector(power, Vector);
  const Vector r = (clipped - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  Vector sum = r * (1.0f / 5040) + 1.0f / 720;
  for (float factor : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) sum = sum * r + factor;
  const Integers bits = (power + 127) << 23;
  Vector scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return x > lowest ? sum * scale : Vector{};
}

inline float total(Vector x) {
  float sum = 0;
  for (int lane = 0; lane < LANES; ++lane) sum += x[lane];
  return sum;
}

template <typename Weight>
struct Product {
  const float* x;
  const Weight* panels;
  const float *bias, *other;
  float* y;
  long n_inputs, n_outputs;
  Operation operation;
};

// sums += x w for N rows of x, `x_stride` apart, and COLUMNS columns of w, whose rows are `w_stride`
// apart; the first `n_next` rows of `next` are fetched meanwhile.
template <int N, typename Weight>
inline void accumulate(Vector (&sums)[N][VECTORS], const float* x, long x_stride, const Weight* w,
                       long w_stride, long n_inputs, const Weight* next, long n_next) {
  for (long i = 0; i < n_inputs; ++i) {
    Vector row[VECTORS];
    for (int v = 0; v < VECTORS; ++v) row[v] = load(w + i * w_stride + v * LANES);
    if (i < n_next)
      for (int c = 0; c < COLUMNS; c += LINE / sizeof(Weight))
        __builtin_prefetch(next + i * COLUMNS + c, 0, 2);
#pragma GCC unroll 16
    for (int r = 0; r < N; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) sums[r][v] += x[r * x_stride + i] * row[v];
  }
}

// Rows `row` ... `row + N - 1` of one panel; `next_share` inputs of the next one are fetched.
template <int N, typename Weight>
void multiply(const Product<Weight>& p, long row, long panel, const Weight* next, long next_share) {
  Vector sums[N][VECTORS] = {};
  accumulate<N>(sums, p.x + row * p.n_inputs, p.n_inputs, p.panels + panel * p.n_inputs * COLUMNS,
                COLUMNS, p.n_inputs, next, next_share);
  const long column = panel * COLUMNS;
  const int n = p.n_outputs - column < COLUMNS ? int(p.n_outputs - column) : COLUMNS;
  for (int r = 0; r < N; ++r) {
    float sum[COLUMNS];
    std::memcpy(sum, sums[r], sizeof sum);
    const long at = (row + r) * p.n_outputs + column;
    for (int c = 0; c < n; ++c) {
      sum[c] += p.bias[column + c];
      if (p.operation == ADD) sum[c] += p.other[at + c];
      if (p.operation == MULTIPLY) sum[c] *= p.other[at + c];
    }
    for (int c = 0; p.operation == SWISH && c < COLUMNS; c += LANES) {
      const Vector y = load(sum + c) / (1.0f + exponential(-load(sum + c)));
      std::memcpy(sum + c, &y, sizeof y);
    }
    std::memcpy(p.y + at, sum, n * sizeof(float));
  }
}

// `multiply` for a number of rows that is known only now.
template <int N, typename Weight>
void multiply_rows(int n, const Product<Weight>& p, long row, long panel, const Weight* next,
                   long share) {
  if (n == N) return multiply<N>(p, row, panel, next, share);
  if constexpr (N > 1) multiply_rows<N - 1>(n, p, row, panel, next, share);
}

template <typename Weight>
void compute(const Product<Weight>& p, long n_rows, int n_threads) {
  const long n_panels = (p.n_outputs + COLUMNS - 1) / COLUMNS;
  const bool alone = n_rows * p.n_inputs * p.n_outputs < WORTH_A_THREAD;
#pragma omp parallel num_threads(alone ? 1 : n_threads)
  for (long first = 0; first < n_rows; first += ROWS_AT_ONCE) {
    const long n = n_rows - first < ROWS_AT_ONCE ? n_rows - first : ROWS_AT_ONCE;
    const long n_groups = (n + ROWS - 1) / ROWS;
#pragma omp for schedule(static) nowait
    for (long panel = 0; panel < n_panels; ++panel) {
      const bool is_last = panel + 1 == n_panels;
      const long share = is_last ? 0 : (p.n_inputs + n_groups - 1) / n_groups;
      const Weight* next = p.panels + (panel + 1) * p.n_inputs * COLUMNS;
      long row = first;
      for (long group = 0; group < n_groups; ++group) {
        const int rows = int(n / n_groups + (group < n % n_groups));
        const long done = group * share, left = p.n_inputs - done;
        multiply_rows<ROWS>(rows, p, row, panel, next + done * COLUMNS, left < share ? left : share);
        row += rows;
      }
    }
  }
}

// --- attention ---

template <typename Element>  // float here, Brain in tilekernel.cpp
struct Attention {
  // Fresh: [batch, token, head * dim], rows `row_stride` apart; no k and v: the past alone is seen.
  const Element *q, *k, *v;
  const Element *q_weight, *q_bias, *k_weight, *k_bias;  // of the norms over a head's dimensions
  const float *cos, *sin;                                // [token, n_turned / 2]
  const Element *past_key, *past_value;  // [batch, head, past, dim], as they are used
  const uint8_t* visible;                // [token, past + token], or null: all
  Element* seen;                         // written: [batch, token, head * dim]
  Element *fresh_key, *fresh_value;      // written: [batch, head, token, dim]
  long n_batch, n_heads, n_tokens, n_past, dim, n_turned, row_stride;
  float epsilon;
};

// What one thread works on: a head's queries, its keys in panels, the scores of ROWS queries, and a
// key that is being turned.
struct Desk {
  std::vector<float> queries, keys, scores, turned;
};

// A head's part of one token: to mean 0 and variance 1, then scaled and shifted. `n` is a multiple of
// LANES.
template <typename Element>
void normalise(const Element* x, const Element* weight, const Element* bias, long n, float epsilon,
               float* y) {
  Vector sum = {}, squares = {};
  for (long i = 0; i < n; i += LANES) sum += load(x + i);
  const float mean = total(sum) / n;
  for (long i = 0; i < n; i += LANES) squares += (load(x + i) - mean) * (load(x + i) - mean);
  const float scale = 1 / std::sqrt(total(squares) / n + epsilon);
  for (long i = 0; i < n; i += LANES)
    store(y + i, (load(x + i) - mean) * scale * load(weight + i) + load(bias + i));
}

// Pairs (i, i + n_turned / 2) by their angle.
inline void turn(float* x, const float* cos, const float* sin, long n_turned) {
  const long half = n_turned / 2;
  for (long i = 0; i < half; ++i) {
    const float left = x[i], right = x[half + i];
    x[i] = left * cos[i] - right * sin[i];
    x[half + i] = right * cos[i] + left * sin[i];
  }
}

// One key into the panels: COLUMNS keys side by side, dimension after dimension.
void place(const float* key, long at, long dim, float* panels) {
  float* column = panels + at / COLUMNS * COLUMNS * dim + at % COLUMNS;
  for (long i = 0; i < dim; ++i) column[i * COLUMNS] = key[i];
}

// Softmax of a row whose first `n` numbers count, but for one factor, which is returned.
float soften(float* row, long n, long n_padded, const uint8_t* visible) {
  for (long key = n; key < n_padded; ++key) row[key] = -INFINITY;
  for (long key = 0; visible && key < n; ++key)
    if (!visible[key]) row[key] = -INFINITY;
  Vector most = load(row);
  for (long key = LANES; key < n_padded; key += LANES) {
    const Vector other = load(row + key);
    most = other > most ? other : most;
  }
  float highest = most[0];
  for (int lane = 1; lane < LANES; ++lane) highest = std::max(highest, most[lane]);
  Vector sum = {};
  for (long key = 0; key < n_padded; key += LANES) {
    const Vector share = exponential(load(row + key) - highest);
    store(row + key, share);
    sum += share;
  }
  return 1 / total(sum);
}

// What ROWS queries of a head see; the first `n_rows` are written, `seen_stride` apart. There are
// `n_fresh` keys behind the past ones.
void look(Desk& desk, const float* queries, const float* past_value, long n_past,
          const float* fresh_value, long n_fresh, long dim, const uint8_t* visible, int n_rows,
          float* seen, long seen_stride) {
  const long n_keys = n_past + n_fresh, stride = (n_keys + COLUMNS - 1) / COLUMNS * COLUMNS;
  float* scores = desk.scores.data();
  for (long column = 0; column < stride; column += COLUMNS) {
    Vector sums[ROWS][VECTORS] = {};
    const float* keys = desk.keys.data() + column * dim;
    accumulate<ROWS>(sums, queries, dim, keys, COLUMNS, dim, keys, 0);
    for (int r = 0; r < ROWS; ++r)
      std::memcpy(scores + r * stride + column, sums[r], sizeof sums[r]);
  }
  float shares[ROWS] = {};
  for (int r = 0; r < n_rows; ++r)
    shares[r] = soften(scores + r * stride, n_keys, stride, visible ? visible + r * n_keys : nullptr);
  for (long column = 0; column < dim; column += COLUMNS) {
    Vector sums[ROWS][VECTORS] = {};
    accumulate<ROWS>(sums, scores, stride, past_value + column, dim, n_past, past_value, 0);
    accumulate<ROWS>(sums, scores + n_past, stride, fresh_value + column, dim, n_fresh, past_value, 0);
    for (int r = 0; r < n_rows; ++r)
      for (int v = 0; v < VECTORS; ++v)
        store(seen + r * seen_stride + column + v * LANES, sums[r][v] * shares[r]);
  }
}

void attend_head(const Attention<float>& a, Desk& desk, long batch, long head) {
  const long width = a.n_heads * a.dim, n_fresh = a.k ? a.n_tokens : 0;
  const long n_keys = a.n_past + n_fresh, at = batch * a.n_heads + head;
  const long n_groups = (a.n_tokens + ROWS - 1) / ROWS;
  desk.queries.assign(n_groups * ROWS * a.dim, 0);
  desk.keys.resize((n_keys + COLUMNS - 1) / COLUMNS * COLUMNS * a.dim);
  desk.scores.resize(ROWS * (n_keys + COLUMNS));
  desk.turned.resize(a.dim);
  const float* past_key = a.past_key + at * a.n_past * a.dim;
  for (long i = 0; i < a.n_past; ++i) place(past_key + i * a.dim, i, a.dim, desk.keys.data());
  const float scale = 1 / std::sqrt(float(a.dim));
  float* turned = desk.turned.data();
  for (long t = 0; t < a.n_tokens; ++t) {
    const long row = (batch * a.n_tokens + t) * a.row_stride + head * a.dim, half = a.n_turned / 2;
    float* query = desk.queries.data() + t * a.dim;
    normalise(a.q + row, a.q_weight, a.q_bias, a.dim, a.epsilon, query);
    turn(query, a.cos + t * half, a.sin + t * half, a.n_turned);
    for (long i = 0; i < a.dim; ++i) query[i] *= scale;
    if (!a.k) continue;
    const long fresh = (at * a.n_tokens + t) * a.dim;
    normalise(a.k + row, a.k_weight, a.k_bias, a.dim, a.epsilon, a.fresh_key + fresh);
    std::memcpy(turned, a.fresh_key + fresh, a.dim * sizeof(float));
    turn(turned, a.cos + t * half, a.sin + t * half, a.n_turned);
    place(turned, a.n_past + t, a.dim, desk.keys.data());
    std::memcpy(a.fresh_value + fresh, a.v + row, a.dim * sizeof(float));
  }
  const float* past_value = a.past_value + at * a.n_past * a.dim;
  const float* fresh_value = a.k ? a.fresh_value + at * a.n_tokens * a.dim : past_value;
  for (long first = 0; first < a.n_tokens; first += ROWS)
    look(desk, desk.queries.data() + first * a.dim, past_value, a.n_past, fresh_value, n_fresh, a.dim,
         a.visible ? a.visible + first * n_keys : nullptr,
         int(std::min<long>(ROWS, a.n_tokens - first)),
         a.seen + (batch * a.n_tokens + first) * width + head * a.dim, width);
}

}  // namespace

extern "C" int panel_columns() { return COLUMNS; }

extern "C" int panel_halves() {
#if defined(NO_HALVES)
  return 0;
#else
  return 1;
#endif
}

// Args: x [rows, inputs]; panels [ceil(outputs / COLUMNS), inputs, COLUMNS] of 16-bit floats if
// `is_half`, else of 32-bit ones; bias [outputs]; other [rows, outputs], or null where the operation
// is NONE or SWISH; y [rows, outputs], written.
extern "C" void panel_linear(const float* x, const void* panels, const float* bias,
                             const float* other, float* y, long n_rows, long n_inputs,
                             long n_outputs, int operation, int is_half, int n_threads) {
#if !defined(NO_HALVES)
  if (is_half)
    return compute(Product<Half>{x, (const Half*)panels, bias, other, y, n_inputs, n_outputs,
                                 Operation(operation)}, n_rows, n_threads);
#endif
  compute(Product<float>{x, (const float*)panels, bias, other, y, n_inputs, n_outputs,
                         Operation(operation)}, n_rows, n_threads);
  (void)is_half;
}

extern "C" void panel_attend(const Attention<float>* a, int n_threads) {
#pragma omp parallel num_threads(n_threads)
  {
    Desk desk;
#pragma omp for schedule(static) nowait
    for (long i = 0; i < a->n_batch * a->n_heads; ++i)
      attend_head(*a, desk, i / a->n_heads, i % a->n_heads);
  }
}
