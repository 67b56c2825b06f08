// What a training step computes between its matrix products, in bfloat16: see lmd/step_kernel.py.
//
// Numbers are read once, computed in float32 and rounded once. What is summed over all rows, the
// gradients of norms' weights and of biases, is summed within blocks of rows first, and these one
// after another: the same, bit for bit, whatever the number of threads.

#include "microkernel.cpp"

namespace {

constexpr long BLOCK = 64;  // rows
constexpr long AHEAD = 4;   // of them, fetched meanwhile

long n_blocks(long n_rows) { return (n_rows + BLOCK - 1) / BLOCK; }

// Calls work(first row, one behind the last, sums of that block), then adds the blocks up.
template <typename Work>
void by_block(long n_rows, long n_sums, int n_threads, float* sums, Work work) {
  std::vector<float> parts(n_blocks(n_rows) * n_sums);
#pragma omp parallel for schedule(static) num_threads(n_threads)
  for (long block = 0; block < n_blocks(n_rows); ++block)
    work(block * BLOCK, std::min(n_rows, (block + 1) * BLOCK), parts.data() + block * n_sums);
  std::fill(sums, sums + n_sums, 0.0f);
  for (long block = 0; block < n_blocks(n_rows); ++block)
    for (long i = 0; i < n_sums; ++i) sums[i] += parts[block * n_sums + i];
}

// Heads of tokens: x lies as [batch, token, head, dim], tokens `stride` apart, its gradient likewise
// but close together; results, and what arrives as their gradients, as [batch, head, token, dim].
struct Heads {
  long n_batch, n_heads, n_tokens, dim, stride;
  long n_rows() const { return n_batch * n_tokens; }
  long to(long row) const { return (row / n_tokens * n_heads * n_tokens + row % n_tokens) * dim; }
  long next() const { return n_tokens * dim; }  // head
};

// Like total(), in halves: rows are short, so that what a sum's steps wait for each other counts.
inline float folded(Vector x) {
#if defined(__clang__)
  return total(x);
#else
  typedef int32_t Integers __attribute__((vector_size(sizeof(Vector))));
  Integers lanes;
  for (int lane = 0; lane < LANES; ++lane) lanes[lane] = lane;
  for (int half = LANES / 2; half; half /= 2) x += __builtin_shuffle(x, lanes ^ half);
  return x[0];
#endif
}

// To the nearest, ties to even; a NaN stays one. (The instruction makes zeros of denormal numbers.)
inline void round_to(Brain* to, Vector x) {
#if defined(__AVX512BF16__)
  const __m256bh bits = _mm512_cvtneps_pbh((__m512)x);
  std::memcpy(to, &bits, sizeof bits);
#else
  store(to, x);
#endif
}

// What one thread works on: the heads of one token.
struct Token {
  const Heads heads;
  const float epsilon;
  std::vector<float> centred, arriving, scale;

  Token(const Heads& h, float e)
      : heads(h), epsilon(e), centred(h.n_heads * h.dim), arriving(centred), scale(h.n_heads) {}

  // Less their means; `scale` brings them to variance 1. Step by step for all of them: the heads'
  // sums do not wait for each other.
  void centre(const Brain* x) {
    const long dim = heads.dim;
    for (long i = 0; i < heads.n_heads * dim; i += LINE / sizeof(Brain))
      __builtin_prefetch(x + AHEAD * heads.stride + i);
    for (long head = 0; head < heads.n_heads; ++head) {
      Vector sum = {};
      for (long i = head * dim; i < (head + 1) * dim; i += LANES) {
        const Vector number = load(x + i);
        store(centred.data() + i, number);
        sum += number;
      }
      scale[head] = folded(sum) / dim;
    }
    for (long head = 0; head < heads.n_heads; ++head) {
      Vector squares = {};
      for (long i = head * dim; i < (head + 1) * dim; i += LANES) {
        const Vector number = load(centred.data() + i) - scale[head];
        store(centred.data() + i, number);
        squares += number * number;
      }
      scale[head] = 1 / std::sqrt(folded(squares) / dim + epsilon);
    }
  }

  void normalise(const Brain* x, const float* weight, const float* bias, long row, Brain* y) {
    centre(x + row * heads.stride);
    Brain* to = y + heads.to(row);
    for (long head = 0; head < heads.n_heads; ++head, to += heads.next()) {
      const float* from = centred.data() + head * heads.dim;
      for (long i = 0; i < heads.dim; i += LANES)
        round_to(to + i, load(from + i) * scale[head] * load(weight + i) + load(bias + i));
    }
  }

  // The gradient of `normalise`; those of weight and bias are added to `sums`.
  void unnormalise(const Brain* x, const Brain* gradient, const float* weight, long row,
                   Brain* to_x, float* sums) {
    const long dim = heads.dim;
    centre(x + row * heads.stride);
    to_x += row * heads.n_heads * dim;
    gradient += heads.to(row);
    for (long head = 0; head < heads.n_heads; ++head, gradient += heads.next()) {
      float *from = centred.data() + head * dim, *weighed = arriving.data() + head * dim;
      Vector sum = {}, product = {};
      for (long i = 0; i < dim; i += LANES) {
        const Vector normal = load(from + i) * scale[head], plain = load(gradient + i);
        const Vector weighted = plain * load(weight + i);
        store(sums + i, load(sums + i) + plain * normal);
        store(sums + dim + i, load(sums + dim + i) + plain);
        store(weighed + i, weighted);
        sum += weighted;
        product += weighted * normal;
      }
      const float level = folded(sum) / dim, slope = folded(product) / dim * scale[head];
      for (long i = 0; i < dim; i += LANES)
        round_to(to_x + head * dim + i,
                 (load(weighed + i) - level - load(from + i) * slope) * scale[head]);
    }
  }
};

// 1 / (1 + e^-x), within 1e-5 of it (rounding to bfloat16 takes up to 4e-3); below -87 as at -87.
inline Vector sigmoid(Vector x) {
  typedef int32_t Integers __attribute__((vector_size(sizeof(Vector))));
  Vector power = x * -1.44269504f;  // of two
  power = power < Vector{} + 126.0f ? power : Vector{} + 126.0f;  // and for NaN
  power = power > Vector{} - 126.0f ? power : Vector{} - 126.0f;
  const Integers whole = __builtin_convertvector(power + 127.5f, Integers);  // rounded, plus 127
  const Vector r = power - __builtin_convertvector(whole - 127, Vector);
  const Vector part = (((0.00959024f * r + 0.05587024f) * r + 0.24023677f) * r + 0.69312805f) * r;
  return 1.0f / (1.0f + (Vector)(whole << 23) * (1.0f + part));
}

}  // namespace

extern "C" int step_lanes() { return LANES; }

extern "C" void step_normalise(const Heads* heads, const Brain* x, const float* weight,
                               const float* bias, float epsilon, Brain* y, int n_threads) {
#pragma omp parallel num_threads(n_threads)
  {
    Token token(*heads, epsilon);
#pragma omp for schedule(static) nowait
    for (long row = 0; row < heads->n_rows(); ++row) token.normalise(x, weight, bias, row, y);
  }
}

// `sums`: the gradients of weight and bias, one behind the other.
extern "C" void step_unnormalise(const Heads* heads, const Brain* x, const Brain* gradient,
                                 const float* weight, float epsilon, Brain* to_x, float* sums,
                                 int n_threads) {
  const long n_sums = 2 * heads->dim;
  by_block(heads->n_rows(), n_sums, n_threads, sums, [&](long begin, long end, float* own) {
    Token token(*heads, epsilon);
    for (long row = begin; row < end; ++row)
      token.unnormalise(x, gradient, weight, row, to_x, own);
  });
}

// `[matrix, token, dim]`: pairs (i, i + half) by their token's angle, or back.
extern "C" void step_rotate(const Brain* x, const float* cos, const float* sin, long n_matrices,
                            long n_tokens, long dim, long half, int backwards, Brain* y,
                            int n_threads) {
  const float sign = backwards ? -1.0f : 1.0f;
#pragma omp parallel for schedule(static) num_threads(n_threads)
  for (long row = 0; row < n_matrices * n_tokens; ++row) {
    const Brain* from = x + row * dim;
    Brain* to = y + row * dim;
    const long angle = row % n_tokens * half;
    for (long i = 0; i < half; i += LANES) {
      const Vector left = load(from + i), right = load(from + half + i);
      const Vector c = load(cos + angle + i), s = load(sin + angle + i) * sign;
      round_to(to + i, left * c - right * s);
      round_to(to + half + i, right * c + left * s);
    }
    std::copy(from + 2 * half, from + dim, to + 2 * half);
  }
}

// Rows [value, gate] to value * silu(gate).
extern "C" void step_gate(const Brain* x, long n_rows, long width, Brain* y, int n_threads) {
#pragma omp parallel for schedule(static) num_threads(n_threads)
  for (long row = 0; row < n_rows; ++row) {
    const Brain *value = x + 2 * row * width, *gate = value + width;
    for (long i = 0; i < width; i += LANES) {
      const Vector g = load(gate + i);
      round_to(y + row * width + i, load(value + i) * g * sigmoid(g));
    }
  }
}

extern "C" void step_ungate(const Brain* x, const Brain* gradient, long n_rows, long width,
                            Brain* to_x, int n_threads) {
#pragma omp parallel for schedule(static) num_threads(n_threads)
  for (long row = 0; row < n_rows; ++row) {
    const Brain *value = x + 2 * row * width, *gate = value + width;
    Brain* to = to_x + 2 * row * width;
    for (long i = 0; i < width; i += LANES) {
      const Vector arriving = load(gradient + row * width + i);
      const Vector v = load(value + i), g = load(gate + i), share = sigmoid(g);
      round_to(to + i, arriving * g * share);
      round_to(to + width + i, arriving * v * share * (1.0f + g * (1.0f - share)));
    }
  }
}

// Of every column: a bias's gradient.
extern "C" void step_sum(const Brain* x, long n_rows, long width, float* sums, int n_threads) {
  by_block(n_rows, width, n_threads, sums, [&](long begin, long end, float* own) {
    for (long row = begin; row < end; ++row)
      for (long i = 0; i < width; i += LANES)
        store(own + i, load(own + i) + load(x + row * width + i));
  });
}

// y[i] = x[tokens[i]], in every one of the matrices [token, dim].
extern "C" void step_take(const Brain* x, const long* tokens, long n_matrices, long n_tokens,
                          long n_taken, long dim, Brain* y, int n_threads) {
#pragma omp parallel for schedule(static) num_threads(n_threads)
  for (long matrix = 0; matrix < n_matrices; ++matrix)
    for (long i = 0; i < n_taken; ++i)
      std::memcpy(y + (matrix * n_taken + i) * dim, x + (matrix * n_tokens + tokens[i]) * dim,
                  dim * sizeof(Brain));
}

// The way back: y[tokens[i]] is the sum of all its x[i], of several x, rounded once.
extern "C" void step_put(const Brain* const* x, const long* const* tokens, const long* n_taken,
                         long n_parts, long n_matrices, long n_tokens, long dim, Brain* y,
                         int n_threads) {
#pragma omp parallel num_threads(n_threads)
  {
    std::vector<float> sums(n_tokens * dim);
#pragma omp for schedule(static) nowait
    for (long matrix = 0; matrix < n_matrices; ++matrix) {
      std::fill(sums.begin(), sums.end(), 0.0f);
      for (long part = 0; part < n_parts; ++part)
        for (long i = 0; i < n_taken[part]; ++i) {
          const Brain* from = x[part] + (matrix * n_taken[part] + i) * dim;
          float* to = sums.data() + tokens[part][i] * dim;
          for (long d = 0; d < dim; d += LANES) store(to + d, load(to + d) + load(from + d));
        }
      for (long i = 0; i < n_tokens * dim; i += LANES)
        round_to(y + matrix * n_tokens * dim + i, load(sums.data() + i));
    }
  }
}
