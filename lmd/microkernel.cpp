// y = x W^T + b (+ or *) z in float32, for few rows of x: see lmd/panels.py.
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

#include <cstdint>
#include <cstring>
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace {

// How many floats a register holds, and how many rows of sums fit into all of them.
#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 13;
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int LANES = 8, ROWS = 6;
#else
constexpr int LANES = 4, ROWS = 8;
#endif
constexpr int VECTORS = 2, COLUMNS = VECTORS * LANES;
constexpr long ROWS_AT_ONCE = 16 * ROWS;  // whose inputs the second cache can hold
constexpr int LINE = 64;                  // bytes in a line of the cache
constexpr long WORTH_A_THREAD = 200000;   // multiplications that outweigh waking one

typedef float Vector __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float))));

enum Operation { NONE, ADD, MULTIPLY };

Vector load(const float* weights) { return *(const Vector*)weights; }

typedef uint16_t Half;
#if defined(__AVX512F__)
Vector load(const Half* w) { return (Vector)_mm512_cvtph_ps(_mm256_loadu_si256((__m256i*)w)); }
#elif defined(__AVX2__) && defined(__F16C__)
Vector load(const Half* w) { return (Vector)_mm256_cvtph_ps(_mm_loadu_si128((__m128i*)w)); }
#else
#define NO_HALVES
#endif

template <typename Weight>
struct Product {
  const float* x;
  const Weight* panels;
  const float *bias, *other;
  float* y;
  long n_inputs, n_outputs;
  Operation operation;
};

// Rows `row` ... `row + N - 1` of one panel; `next_share` inputs of the next one are fetched.
template <int N, typename Weight>
void multiply(const Product<Weight>& p, long row, long panel, const Weight* next, long next_share) {
  const float* x = p.x + row * p.n_inputs;
  const Weight* weights = p.panels + panel * p.n_inputs * COLUMNS;
  Vector sums[N][VECTORS] = {};
  for (long i = 0; i < p.n_inputs; ++i) {
    Vector w[VECTORS];
    for (int v = 0; v < VECTORS; ++v) w[v] = load(weights + i * COLUMNS + v * LANES);
    if (i < next_share)
      for (int c = 0; c < COLUMNS; c += LINE / sizeof(Weight))
        __builtin_prefetch(next + i * COLUMNS + c, 0, 2);
#pragma GCC unroll 16
    for (int r = 0; r < N; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) sums[r][v] += x[r * p.n_inputs + i] * w[v];
  }
  const long column = panel * COLUMNS;
  const int n = p.n_outputs - column < COLUMNS ? int(p.n_outputs - column) : COLUMNS;
  for (int r = 0; r < N; ++r) {
    float sum[COLUMNS];
    std::memcpy(sum, sums[r], sizeof sum);
    const long at = (row + r) * p.n_outputs + column;
    for (int c = 0; c < n; ++c) {
      float y = sum[c] + p.bias[column + c];
      if (p.operation == ADD) y += p.other[at + c];
      if (p.operation == MULTIPLY) y *= p.other[at + c];
      p.y[at + c] = y;
    }
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
// is NONE; y [rows, outputs], written.
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
