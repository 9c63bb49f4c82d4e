// A LoRA delta for few rows: y += x @ down^T @ up, slice by slice, without copying any row.
//
// One call per layer and adapter instead of a dozen small PyTorch operators, whose fixed costs
// are most of a decode step's LoRA time. Weights are float32 and read once for all rows; sums are
// float32 and are rounded once, into y. Many rows are better served by a matrix library.
#include <ATen/Parallel.h>
#include <immintrin.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <vector>

namespace {

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
typedef float Floats __attribute__((vector_size(LANES * sizeof(float))));

constexpr int64_t GRAIN = 16384;      // multiply-adds worth waking a thread for
constexpr int64_t STRIP = 4 * LANES;  // outputs whose sums stay in registers while the ranks pass

int64_t share(int64_t work) { return std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, work)); }

inline Floats load(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof v);
  return v;
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

// R rows times N rows of `down` (K apart), each a dot product over K.
template <int R, int N>
void dots(const float* x, int64_t k, const float* w, float* out, int64_t step) {
  constexpr int CHAINS = R * N < 4 ? 4 : 1;  // separate sums hide the latency of the additions
  Floats sum[CHAINS][R][N] = {};
  int64_t i = 0;
  for (; i + CHAINS * LANES <= k; i += CHAINS * LANES)
    for (int c = 0; c < CHAINS; c++) {
      Floats weight[N];
      for (int n = 0; n < N; n++) weight[n] = load(w + n * k + i + c * LANES);
      for (int r = 0; r < R; r++) {
        const Floats value = load(x + r * k + i + c * LANES);
        for (int n = 0; n < N; n++) sum[c][r][n] += value * weight[n];
      }
    }
  for (int r = 0; r < R; r++)
    for (int n = 0; n < N; n++) {
      for (int c = 1; c < CHAINS; c++) sum[0][r][n] += sum[c][r][n];
      float all = total(sum[0][r][n]);
      for (int64_t j = i; j < k; j++) all += x[r * k + j] * w[n * k + j];
      out[r * step + n] = all;
    }
}

template <int N>
void dots(const float* x, int64_t rows, int64_t k, const float* w, float* out, int64_t step) {
  int64_t m = 0;
  for (; m + 4 <= rows; m += 4) dots<4, N>(x + m * k, k, w, out + m * step, step);
  for (; m < rows; m++) dots<1, N>(x + m * k, k, w, out + m * step, step);
}

// hidden [rows, ranks] = x [rows, K] @ down [ranks, K]^T
void shrink(const float* x, int64_t rows, const float* down, int64_t ranks, int64_t k, float* hidden) {
  at::parallel_for(0, ranks, share(rows * k), [&](int64_t begin, int64_t end) {
    int64_t rank = begin;
    for (; rank + 2 <= end; rank += 2) dots<2>(x, rows, k, down + rank * k, hidden + rank, ranks);
    for (; rank < end; rank++) dots<1>(x, rows, k, down + rank * k, hidden + rank, ranks);
  });
}

struct Strip {
  const float* up;
  int64_t rank, stride, n, first_rank, first_output;
};

// A whole strip of R rows.
template <int R, class T>
void expand(const float* hidden, int64_t ranks, const Strip& strip, T* const* y) {
  Floats sum[R][4];
  alignas(64) float out[STRIP];
  for (int r = 0; r < R; r++) {
    std::copy(y[r], y[r] + STRIP, out);
    for (int v = 0; v < 4; v++) sum[r][v] = load(out + v * LANES);
  }
  for (int64_t rank = 0; rank < strip.rank; rank++) {
    for (int v = 0; v < 4; v++) {
      const Floats weight = load(strip.up + rank * strip.stride + v * LANES);
      for (int r = 0; r < R; r++) sum[r][v] += hidden[r * ranks + rank] * weight;
    }
  }
  for (int r = 0; r < R; r++) {
    for (int v = 0; v < 4; v++) std::memcpy(out + v * LANES, &sum[r][v], sizeof sum[r][v]);
    std::copy(out, out + STRIP, y[r]);
  }
}

// One row where a slice ends before the strip does.
template <class T>
void expand_short(const float* hidden, const Strip& strip, T* y) {
  for (int64_t i = 0; i < strip.n; i++) {
    float all = (float)y[i];
    for (int64_t rank = 0; rank < strip.rank; rank++) all += hidden[rank] * strip.up[rank * strip.stride + i];
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
void run(at::Tensor& y, const at::Tensor& x, const at::Tensor& down, at::TensorList ups, const int64_t* index, int64_t rows) {
  static thread_local std::vector<float> buffer;  // reused: rows as floats, then their hidden values
  const int64_t k = x.size(1), ranks = down.size(0), x_step = x.stride(0), y_step = y.stride(0);
  buffer.resize(rows * (k + ranks));
  float *wide = buffer.data(), *hidden = wide + rows * k;
  const auto row = [&](int64_t m) { return index ? index[m] : m; };
  for (int64_t m = 0; m < rows; m++) {
    const T* from = x.const_data_ptr<T>() + row(m) * x_step;
    std::copy(from, from + k, wide + m * k);
  }
  shrink(wide, rows, down.const_data_ptr<float>(), ranks, k, hidden);
  const std::vector<Strip> all = strips(ups);
  T* to = y.mutable_data_ptr<T>();
  at::parallel_for(0, all.size(), share(rows * STRIP * ranks / ups.size()), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const auto at = [&](int64_t m) { return to + row(m) * y_step + all[i].first_output; };
      const float* values = hidden + all[i].first_rank;
      int64_t m = 0;
      for (; all[i].n == STRIP && m + 2 <= rows; m += 2) {
        T* const two[] = {at(m), at(m + 1)};
        expand<2>(values + m * ranks, ranks, all[i], two);
      }
      for (; all[i].n == STRIP && m < rows; m++) {
        T* const one[] = {at(m)};
        expand<1>(values + m * ranks, ranks, all[i], one);
      }
      for (; m < rows; m++) expand_short(values + m * ranks, all[i], at(m));
    }
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
