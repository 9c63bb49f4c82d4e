// A LoRA delta: y += x @ down^T @ up, slice by slice, without copying more than a block of rows.
//
// One call per layer and adapter instead of a dozen small PyTorch operators, whose fixed costs
// are most of a decode step's LoRA time. Weights are float32; sums are float32 and are rounded once,
// into y. Every sum is made in one order whatever else is in the batch: a row's delta is the same to
// the bit alone, beside others, and in a prompt that is read at once.
#include <ATen/Parallel.h>
#include <immintrin.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

namespace {

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
typedef float Floats __attribute__((vector_size(LANES * sizeof(float))));

constexpr int64_t GRAIN = 16384;      // multiply-adds worth waking a thread for
constexpr int64_t FEW = 16;           // rows up to which threads share ranks and outputs, not rows
constexpr int64_t BLOCK = 32;         // rows per task: with their hidden values they stay in L2
constexpr int VECS = 4;
constexpr int64_t STRIP = VECS * LANES;  // outputs whose sums stay in registers while the ranks pass

int64_t share(int64_t work) { return std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, work)); }

inline Floats load(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// Explicit, since the compiler may contract a product and a sum in one place and not in another.
inline Floats fma(Floats a, Floats b, Floats c) {
#ifdef __AVX512F__
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#endif
}

inline float total(Floats v) {
#ifdef __AVX512F__
  return _mm512_reduce_add_ps((__m512)v);
#else
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#endif
}

// GCC keeps an array of sums in memory unless every loop over it is gone before it looks.
#define UNROLL _Pragma("GCC unroll 8")

// R rows times N rows of `down` (K apart), each a dot product over K. 3 x 4 sums fill the registers of
// AVX2; eight hide the latency of the additions.
template <int R, int N>
void dots(const float* x, int64_t k, const float* w, float* out, int64_t step) {
  Floats sum[R][N];
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int n = 0; n < N; n++) sum[r][n] = Floats{};
  int64_t i = 0;
  for (; i + LANES <= k; i += LANES) {
    Floats value[R];
    UNROLL for (int r = 0; r < R; r++) value[r] = load(x + r * k + i);
    UNROLL for (int n = 0; n < N; n++) {
      const Floats weight = load(w + n * k + i);
      UNROLL for (int r = 0; r < R; r++) sum[r][n] = fma(value[r], weight, sum[r][n]);
    }
  }
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int n = 0; n < N; n++) {
      float all = total(sum[r][n]);
      for (int64_t j = i; j < k; j++) all = std::fma(x[r * k + j], w[n * k + j], all);
      out[r * step + n] = all;
    }
}

// R rows times ranks [begin, end).
template <int R, int N>
void some_dots(const float* x, int64_t k, const float* down, int64_t begin, int64_t end, float* hidden, int64_t ranks) {
  for (; begin + N <= end; begin += N) dots<R, N>(x, k, down + begin * k, hidden + begin, ranks);
  if constexpr (N > 1) some_dots<R, N / 2>(x, k, down, begin, end, hidden, ranks);
}

// hidden [rows, ranks] = x [rows, K] @ down [ranks, K]^T
void shrink(const float* x, int64_t rows, const float* down, int64_t ranks, int64_t k, float* hidden) {
  at::parallel_for(0, ranks, share(rows * k), [&](int64_t begin, int64_t end) {
    int64_t m = 0;
    for (; m + 3 <= rows; m += 3) some_dots<3, 4>(x + m * k, k, down, begin, end, hidden + m * ranks, ranks);
    for (; m + 2 <= rows; m += 2) some_dots<2, 4>(x + m * k, k, down, begin, end, hidden + m * ranks, ranks);
    for (; m < rows; m++) some_dots<1, 8>(x + m * k, k, down, begin, end, hidden + m * ranks, ranks);
  });
}

struct Strip {
  const float* up;
  int64_t rank, stride, n, first_rank, first_output;
};

// A whole strip of R rows.
template <int R, class T>
void expand(const float* hidden, int64_t ranks, const Strip& strip, T* const* y) {
  Floats sum[R][VECS];
  alignas(64) float wide[R][STRIP];
  UNROLL for (int r = 0; r < R; r++) {
    const float* from = wide[r];
    if constexpr (std::is_same_v<T, float>) from = y[r];
    else std::copy(y[r], y[r] + STRIP, wide[r]);
    UNROLL for (int v = 0; v < VECS; v++) sum[r][v] = load(from + v * LANES);
  }
  for (int64_t rank = 0; rank < strip.rank; rank++) {
    Floats value[R];
    UNROLL for (int r = 0; r < R; r++) value[r] = Floats{} + hidden[r * ranks + rank];
    UNROLL for (int v = 0; v < VECS; v++) {
      const Floats weight = load(strip.up + rank * strip.stride + v * LANES);
      UNROLL for (int r = 0; r < R; r++) sum[r][v] = fma(value[r], weight, sum[r][v]);
    }
  }
  UNROLL for (int r = 0; r < R; r++) {
    float* to = wide[r];
    if constexpr (std::is_same_v<T, float>) to = y[r];
    UNROLL for (int v = 0; v < VECS; v++) std::memcpy(to + v * LANES, &sum[r][v], sizeof sum[r][v]);
    if constexpr (!std::is_same_v<T, float>) std::copy(wide[r], wide[r] + STRIP, y[r]);
  }
}

// One row where a slice ends before the strip does.
template <class T>
void expand_short(const float* hidden, const Strip& strip, T* y) {
  for (int64_t i = 0; i < strip.n; i++) {
    float all = (float)y[i];
    for (int64_t rank = 0; rank < strip.rank; rank++) all = std::fma(hidden[rank], strip.up[rank * strip.stride + i], all);
    y[i] = (T)all;
  }
}

std::vector<Strip> strips(at::TensorList ups) {
  std::vector<Strip> all;
  int64_t first_rank = 0, first_output = 0;
  for (const at::Tensor& up : ups) {
    const int64_t rank = up.size(0), n = up.size(1);
    for (int64_t i = 0; rank && i < n; i += STRIP)
      all.push_back({up.const_data_ptr<float>() + i, rank, n, std::min(STRIP, n - i), first_rank, first_output + i});
    first_rank += rank, first_output += n;
  }
  return all;
}

template <class T>
struct Call {
  T* y;
  const T* x;
  int64_t y_step, x_step, k, ranks, slices;
  const float* down;
  std::vector<Strip> strips;
  const int64_t* index;  // rows of x and y; all when null
};

// A block of rows, shared among threads unless this is one of several blocks that are.
template <class T>
void block(const Call<T>& call, int64_t first, int64_t rows) {
  static thread_local std::vector<float> buffer;  // reused: rows as floats, then their hidden values
  const int64_t k = call.k, ranks = call.ranks;
  buffer.resize(rows * (k + ranks));
  float *hidden = buffer.data(), *wide = hidden + rows * ranks;
  const auto row = [&](int64_t m) { return call.index ? call.index[first + m] : first + m; };
  for (int64_t m = 0; m < rows; m++) {
    const T* from = call.x + row(m) * call.x_step;
    std::copy(from, from + k, wide + m * k);
  }
  shrink(wide, rows, call.down, ranks, k, hidden);
  const int64_t work = rows * STRIP * ranks / call.slices;
  at::parallel_for(0, call.strips.size(), share(work), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const Strip& strip = call.strips[i];
      const auto at = [&](int64_t m) { return call.y + row(m) * call.y_step + strip.first_output; };
      const float* values = hidden + strip.first_rank;
      int64_t m = 0;
      const auto tile = [&]<int R>(std::integral_constant<int, R>) {
        T* to[R];
        for (int r = 0; r < R; r++) to[r] = at(m + r);
        expand<R>(values + m * ranks, ranks, strip, to);
        m += R;
      };
      while (strip.n == STRIP && m + 3 <= rows) tile(std::integral_constant<int, 3>());
      while (strip.n == STRIP && m + 2 <= rows) tile(std::integral_constant<int, 2>());
      while (strip.n == STRIP && m < rows) tile(std::integral_constant<int, 1>());
      for (; m < rows; m++) expand_short(values + m * ranks, strip, at(m));
    }
  });
}

template <class T>
void run(at::Tensor& y, const at::Tensor& x, const at::Tensor& down, at::TensorList ups, const int64_t* index, int64_t rows) {
  const Call<T> call{y.mutable_data_ptr<T>(), x.const_data_ptr<T>(), y.stride(0), x.stride(0), x.size(1), down.size(0),
                     (int64_t)ups.size(), down.const_data_ptr<float>(), strips(ups), index};
  const int64_t blocks = rows <= FEW ? 1 : std::max<int64_t>(at::get_num_threads(), (rows + BLOCK - 1) / BLOCK);
  const int64_t size = (rows + blocks - 1) / blocks;
  if (blocks == 1) return block(call, 0, rows);
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end && i * size < rows; i++) block(call, i * size, std::min(size, rows - i * size));
  });
}

void check(const at::Tensor& y, const at::Tensor& x, const at::Tensor& down, at::TensorList ups) {
  int64_t ranks = 0, outputs = 0;
  for (const at::Tensor& up : ups) {
    TORCH_CHECK(up.dim() == 2 && up.is_contiguous(), "every up must be a contiguous [rank, outputs]");
    ranks += up.size(0), outputs += up.size(1);
  }
  TORCH_CHECK(x.dim() == 2 && y.dim() == 2 && down.dim() == 2 && down.is_contiguous(), "x, y and down must be matrices");
  TORCH_CHECK(x.size(0) == y.size(0) && x.scalar_type() == y.scalar_type(), "x and y must be the same rows in one dtype");
  TORCH_CHECK(x.stride(1) == 1 && y.stride(1) == 1, "rows of x and y must be contiguous");
  TORCH_CHECK(down.size(0) == ranks && down.size(1) == x.size(1) && outputs == y.size(1), "down or up has another shape");
}

// y [M, sum of outputs] of x [M, K]; down float32 [sum of ranks, K]; ups float32 [rank, outputs] per
// slice; rows int64, which of the M (all when absent).
void lora_add(at::Tensor& y, const at::Tensor& x, const at::Tensor& down, at::TensorList ups, const std::optional<at::Tensor>& rows) {
  check(y, x, down, ups);
  const int64_t* index = rows ? rows->const_data_ptr<int64_t>() : nullptr;
  const int64_t count = rows ? rows->numel() : x.size(0);
  for (int64_t i = 0; index && i < count; i++) TORCH_CHECK(index[i] >= 0 && index[i] < x.size(0), "row ", index[i], " of ", x.size(0));
  switch (x.scalar_type()) {
    case at::kFloat: return run<float>(y, x, down, ups, index, count);
    case at::kBFloat16: return run<at::BFloat16>(y, x, down, ups, index, count);
    case at::kHalf: return run<at::Half>(y, x, down, ups, index, count);
    default: TORCH_CHECK(false, "activations must be float32, bfloat16 or float16");
  }
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(quantserve, m) {
  m.def("lora_add(Tensor(a!) y, Tensor x, Tensor down, Tensor[] ups, Tensor? rows) -> ()");
}
TORCH_LIBRARY_IMPL(quantserve, CPU, m) { m.impl("lora_add", &lora_add); }
