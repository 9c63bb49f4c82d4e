// Integer-weight linear layers for x86 CPUs, from AVX2 upwards. Built once per machine by
// serve/kernels_native.py, which picks the instruction set; knows nothing of vLLM or of files.
//
// Why integers: without native bfloat16, a float kernel spends its time turning 4-bit codes into
// floats. Here each activation row is written once as 16-bit integers with one float scale per
// chunk of K (block floating point; its step is 1/65534 of the chunk's range, finer than
// bfloat16's own rounding), and `pmaddwd` multiplies 16 of them by 16 weight codes per
// instruction, exactly, into 32-bit sums: twice the rate of float32 FMA, no conversion, and the
// same code serves one row (bound by memory) and hundreds (bound by arithmetic).
//
// Letters: M rows of activations, N outputs, K inputs; a chunk is the run of K that shares scales
// and fits 32-bit sums (the weight group, at most 256). Weights come packed by serve/kernels_ops.py
// in blocks of 16 outputs so that one vector lane belongs to one output:
//   4 bit: [N/16][K/8][16 outputs][2] 16-bit words; nibble j of word p is k = 2j + p, offset by 8
//   8 bit: [N/16][K/2][16 outputs][2] signed bytes
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <immintrin.h>
#include <torch/library.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
constexpr int LANES = 16, TILE = 8;  // outputs per vector; rows per register tile
using Ints = __m512i;
using Floats = __m512;
inline Ints zero() { return _mm512_setzero_si512(); }
inline Ints load(const void* p) { return _mm512_loadu_si512(p); }
inline void store(void* p, Ints v) { _mm512_storeu_si512(p, v); }
inline Ints widen(const int8_t* p) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p)); }
inline Ints spread(int32_t pair) { return _mm512_set1_epi32(pair); }
inline Ints dot(Ints sum, Ints a, Ints b) { return _mm512_dpwssd_epi32(sum, a, b); }
inline Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
template <int J> inline Ints nibble(Ints w) {
  return J == 3 ? _mm512_srli_epi16(w, 12) : _mm512_and_si512(_mm512_srli_epi16(w, 4 * J), _mm512_set1_epi16(15));
}
inline Floats loadf(const float* p) { return _mm512_loadu_ps(p); }
inline void storef(float* p, Floats v) { _mm512_storeu_ps(p, v); }
inline Floats spreadf(float f) { return _mm512_set1_ps(f); }
inline Floats to_float(Ints v) { return _mm512_cvtepi32_ps(v); }
inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline float total(Floats v) { return _mm512_reduce_add_ps(v); }
inline Floats loadf(const at::BFloat16* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
inline Floats loadf(const at::Half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
#else
constexpr int LANES = 8, TILE = 4;
using Ints = __m256i;
using Floats = __m256;
inline Ints zero() { return _mm256_setzero_si256(); }
inline Ints load(const void* p) { return _mm256_loadu_si256((const Ints*)p); }
inline void store(void* p, Ints v) { _mm256_storeu_si256((Ints*)p, v); }
inline Ints widen(const int8_t* p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)); }
inline Ints spread(int32_t pair) { return _mm256_set1_epi32(pair); }
inline Ints dot(Ints sum, Ints a, Ints b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }
inline Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
template <int J> inline Ints nibble(Ints w) {
  return J == 3 ? _mm256_srli_epi16(w, 12) : _mm256_and_si256(_mm256_srli_epi16(w, 4 * J), _mm256_set1_epi16(15));
}
inline Floats loadf(const float* p) { return _mm256_loadu_ps(p); }
inline void storef(float* p, Floats v) { _mm256_storeu_ps(p, v); }
inline Floats spreadf(float f) { return _mm256_set1_ps(f); }
inline Floats to_float(Ints v) { return _mm256_cvtepi32_ps(v); }
inline Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline float total(Floats v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline Floats loadf(const at::BFloat16* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
inline Floats loadf(const at::Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
#endif
// GCC would re-read weights per row and reorder the sums into spills; a value it cannot see into
// stays in its register. And it keeps an array of sums in memory unless every loop over it is gone
// before it looks.
#define UNROLL _Pragma("GCC unroll 8")
template <class V> inline void pin(V& v) { asm volatile("" : "+v"(v)); }

constexpr int OUT = 16, VECS = OUT / LANES;  // outputs per block; vectors per block
constexpr int ROWS = 64;                     // rows per task: their chunk stays in L1

// A source yields, for eight consecutive k of a block, four vectors of (k, k+1) weight pairs.
struct Int4 {
  static constexpr int BYTES = 64;  // of one block's eight k
  template <int J> static Ints pair(const int8_t* w, int v) { return nibble<J>(load(w + v * sizeof(Ints))); }
};
struct Int8 {
  static constexpr int BYTES = 128;
  template <int J> static Ints pair(const int8_t* w, int v) { return widen(w + 32 * J + v * sizeof(Ints) / 2); }
};
struct Int16 {  // what a chunk is unpacked to when many rows share it
  static constexpr int BYTES = 256;
  template <int J> static Ints pair(const int8_t* w, int v) { return load(w + 64 * J + v * sizeof(Ints)); }
};

// Activations as integers, chunk-major so that a tile walks adjacent lines whatever K is:
// value[chunk][M][width], scale[chunk][M], and start[chunk][M] = -(code offset) * sum(value),
// the 32-bit sum every output begins with. A chunk that is not finite has NaN for its scale, and so
// every output of its row is NaN; rows with infinities are gone over again, for those outputs that
// are infinite.
struct Rows {
  int64_t m = 0, chunks = 0, width = 0;
  std::vector<int16_t> value;
  std::vector<float> scale;
  std::vector<int32_t> start;
  std::vector<uint8_t> infinite;  // [M]
};

struct Weights {
  const int8_t* codes;
  const float* scale;  // [N/16][groups][16]
  int64_t n, groups, bits;
  int64_t block_bytes(int64_t k) const { return k / 8 * (bits == 4 ? Int4::BYTES : Int8::BYTES); }
  // One of them as a number, of input k; for the few that are asked for alone.
  float at(int64_t output, int64_t k, const Rows& rows) const {
    const int8_t* block = codes + output / OUT * block_bytes(rows.chunks * rows.width);
    const float factor = scale[(output / OUT * groups + (groups == 1 ? 0 : k / rows.width)) * OUT + output % OUT];
    if (bits == 8) return factor * block[(k / 2 * OUT + output % OUT) * 2 + k % 2];
    uint16_t word;
    std::memcpy(&word, block + ((k / 8 * OUT + output % OUT) * 2 + k % 2) * sizeof word, sizeof word);
    return factor * ((word >> k % 8 / 2 * 4 & 15) - 8);
  }
};

template <int J, class Source, int R, int SUMS>
inline void step(const int8_t* w, const int16_t* x, int64_t stride, Ints (&sum)[SUMS][R][VECS]) {
  Ints pair[VECS];
  UNROLL for (int v = 0; v < VECS; v++) pin(pair[v] = Source::template pair<J>(w, v));
  UNROLL for (int r = 0; r < R; r++) {
    int32_t values;
    std::memcpy(&values, x + r * stride + 2 * J, sizeof values);
    Ints both = spread(values);
    UNROLL for (int v = 0; v < VECS; v++) pin(sum[J % SUMS][r][v] = dot(sum[J % SUMS][r][v], pair[v], both));
  }
}

// R rows of one chunk times one block of 16 outputs, added to acc[R][16].
template <class Source, int R>
void tile(const int8_t* w, const Rows& rows, int64_t at, const float* scale, float* acc) {
  constexpr int SUMS = R * VECS < 4 ? 4 : 1;  // separate chains hide the latency of `dot`
  Ints sum[SUMS][R][VECS];
  UNROLL for (int i = 0; i < SUMS; i++)
    UNROLL for (int r = 0; r < R; r++)
      UNROLL for (int v = 0; v < VECS; v++) sum[i][r][v] = zero();
  const int16_t* x = rows.value.data() + at * rows.width;
  for (int64_t k = 0; k < rows.width; k += 8, x += 8, w += Source::BYTES) {
    step<0, Source>(w, x, rows.width, sum);
    step<1, Source>(w, x, rows.width, sum);
    step<2, Source>(w, x, rows.width, sum);
    step<3, Source>(w, x, rows.width, sum);
  }
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int v = 0; v < VECS; v++) {
      Ints s = add(sum[0][r][v], spread(rows.start[at + r]));
      UNROLL for (int i = 1; i < SUMS; i++) s = add(s, sum[i][r][v]);
      float* out = acc + r * OUT + v * LANES;
      Floats both = mul(spreadf(rows.scale[at + r]), loadf(scale + v * LANES));
      storef(out, fma(to_float(s), both, loadf(out)));
    }
}

template <class Source, int R = TILE>
void one_tile(int64_t count, const int8_t* w, const Rows& rows, int64_t at, const float* scale, float* acc) {
  if (count == R) return tile<Source, R>(w, rows, at, scale, acc);
  if constexpr (R > 1) one_tile<Source, R - 1>(count, w, rows, at, scale, acc);
}

// As few tiles as possible, of rows as equal as possible: 8 rows are 4 + 4, not 6 + 2.
template <class Source>
void tiles(int64_t count, const int8_t* w, const Rows& rows, int64_t at, const float* scale, float* acc) {
  for (int64_t left = (count + TILE - 1) / TILE; left > 0; left--) {
    const int64_t r = (count + left - 1) / left;
    one_tile<Source>(r, w, rows, at, scale, acc);
    count -= r, at += r, acc += r * OUT;
  }
}

template <class Source>
void unpack(const int8_t* w, int64_t width, int8_t* out) {
  for (int64_t k = 0; k < width; k += 8, w += Source::BYTES, out += Int16::BYTES)
    for (int v = 0; v < VECS; v++) {
      store(out + v * sizeof(Ints), Source::template pair<0>(w, v));
      store(out + 64 + v * sizeof(Ints), Source::template pair<1>(w, v));
      store(out + 128 + v * sizeof(Ints), Source::template pair<2>(w, v));
      store(out + 192 + v * sizeof(Ints), Source::template pair<3>(w, v));
    }
}

// acc[count][16] += rows [first, first + count) times one block of outputs, all of K.
template <class Source>
void block(const Weights& weights, const Rows& rows, int64_t n16, int64_t first, int64_t count, float* acc) {
  alignas(64) int8_t wide[256 / 8 * Int16::BYTES];
  const int64_t bytes = weights.block_bytes(rows.width);
  const int8_t* w = weights.codes + n16 * rows.chunks * bytes;
  const float* scale = weights.scale + n16 * weights.groups * OUT;
  for (int64_t c = 0; c < rows.chunks; c++, w += bytes) {
    const int64_t at = c * rows.m + first;
    const float* s = scale + (weights.groups == 1 ? 0 : c * OUT);
    if (count <= 2 * TILE) {
      tiles<Source>(count, w, rows, at, s, acc);
    } else {  // enough rows to pay for unpacking once
      unpack<Source>(w, rows.width, wide);
      tiles<Int16>(count, wide, rows, at, s, acc);
    }
  }
}

// One run of activations as integers in [-top, top], and its scale; the part past `have` is padding.
template <class T>
float quantize(const T* x, int64_t have, int64_t width, float biggest, float top, int16_t* out, int32_t* sum) {
  if (!std::isfinite(biggest)) {
    std::fill(out, out + width, (int16_t)0);
    *sum = 0;
    return std::numeric_limits<float>::quiet_NaN();
  }
  const float inverse = biggest > 1e-30f ? top / biggest : 0.f;  // smaller would overflow
  int32_t all = 0;
  for (int64_t k = 0; k < have; k++) {
    const int32_t q = (int32_t)std::nearbyint((float)x[k] * inverse);
    out[k] = (int16_t)q;
    all += q;
  }
  std::fill(out + have, out + width, (int16_t)0);
  *sum = all;
  return biggest / top;
}

// The largest magnitude of a run; NaN where there is one, else infinity where there is one: as bits,
// magnitudes are ordered like integers, infinity above all numbers and NaN above infinity.
template <class T>
float magnitude(const T* x, int64_t n) {
  uint32_t most = 0;
  for (int64_t k = 0; k < n; k++) most = std::max(most, std::bit_cast<uint32_t>((float)x[k]) & 0x7fffffffu);
  return std::bit_cast<float>(most);
}

// What is not finite in a row times the weights of one output: infinity where all agree, else NaN.
template <class T>
float infinite(const T* x, int64_t k, const Weights& weights, const Rows& rows, int64_t output) {
  float sum = 0;
  for (int64_t i = 0; i < k && !std::isnan(sum); i++)
    if (!std::isfinite((float)x[i])) sum += (float)x[i] * weights.at(output, i, rows);
  return sum;
}

template <class T>
void fill(Rows& rows, const T* x, int64_t k, int32_t offset, bool per_token) {
  rows.value.resize(rows.m * rows.chunks * rows.width);
  rows.scale.resize(rows.m * rows.chunks);
  rows.start.resize(rows.m * rows.chunks);
  rows.infinite.assign(rows.m, 0);
  at::parallel_for(0, rows.m, std::max<int64_t>(1, 16384 / k), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; m++) {
      const T* row = x + m * k;
      const float whole = per_token ? magnitude(row, k) : 0.f;
      for (int64_t c = 0; c < rows.chunks; c++) {
        const int64_t have = std::clamp<int64_t>(k - c * rows.width, 0, rows.width), at = c * rows.m + m;
        const T* run = row + c * rows.width;
        const float most = per_token ? whole : magnitude(run, have);
        rows.infinite[m] |= !per_token && std::isinf(most);
        int32_t sum;
        rows.scale[at] = quantize(run, have, rows.width, most, per_token ? 127.f : 32767.f, &rows.value[at * rows.width], &sum);
        rows.start[at] = -offset * sum;
      }
    }
  });
}

template <class T>
void multiply(const T* x, int64_t k, const Weights& weights, const Rows& rows, const T* bias, T* out) {
  const int64_t blocks = (weights.n + OUT - 1) / OUT, slices = (rows.m + ROWS - 1) / ROWS;
  at::parallel_for(0, blocks * slices, 1, [&](int64_t begin, int64_t end) {
    alignas(64) float acc[ROWS * OUT];
    for (int64_t task = begin; task < end; task++) {
      const int64_t n16 = task / slices, first = task % slices * ROWS;
      const int64_t count = std::min<int64_t>(ROWS, rows.m - first), wide = std::min<int64_t>(OUT, weights.n - n16 * OUT);
      std::fill(acc, acc + count * OUT, 0.f);
      (weights.bits == 4 ? block<Int4> : block<Int8>)(weights, rows, n16, first, count, acc);
      for (int64_t m = 0; m < count; m++) {
        if (rows.infinite[first + m])
          for (int64_t n = 0; n < wide; n++) acc[m * OUT + n] = infinite(x + (first + m) * k, k, weights, rows, n16 * OUT + n);
        for (int64_t n = 0; n < wide; n++) {
          const float extra = bias ? (float)bias[n16 * OUT + n] : 0.f;
          out[(first + m) * weights.n + n16 * OUT + n] = (T)(acc[m * OUT + n] + extra);
        }
      }
    }
  });
}

template <class T>
at::Tensor run(const at::Tensor& x, const Weights& weights, const at::Tensor* bias, int64_t chunks, int64_t width, bool per_token) {
  static thread_local Rows rows;  // reused: allocating per call costs more than one small layer
  const int64_t k = x.size(-1);
  rows.m = x.numel() / k, rows.chunks = chunks, rows.width = width;
  at::DimVector shape(x.sizes());
  shape.back() = weights.n;
  at::Tensor out = at::empty(shape, x.options());
  fill(rows, x.const_data_ptr<T>(), k, weights.bits == 4 ? 8 : 0, per_token);
  multiply(x.const_data_ptr<T>(), k, weights, rows, bias ? bias->const_data_ptr<T>() : nullptr, out.mutable_data_ptr<T>());
  return out;
}

// x [..., K]; codes as packed above, K padded to chunks * width; scale float32 [N/16, 1 or chunks, 16].
at::Tensor linear_int(const at::Tensor& input, const at::Tensor& codes, const at::Tensor& scale, const std::optional<at::Tensor>& bias,
                      int64_t n, int64_t bits, int64_t width, bool per_token) {
  const at::Tensor x = input.contiguous();
  const Weights weights{(const int8_t*)codes.const_data_ptr(), scale.const_data_ptr<float>(), n, scale.size(1), bits};
  const int64_t chunks = (x.size(-1) + width - 1) / width, blocks = (n + OUT - 1) / OUT;
  TORCH_CHECK(x.size(-1) > 0 && width > 0 && width <= 256 && width % 8 == 0, "bad shape or chunk width");
  TORCH_CHECK(bits == 4 || bits == 8, "bits must be 4 or 8");
  TORCH_CHECK(scale.size(0) == blocks && (scale.size(1) == 1 || scale.size(1) == chunks), "scales do not match");
  TORCH_CHECK((int64_t)codes.nbytes() == blocks * weights.block_bytes(chunks * width), "codes do not match");
  at::Tensor extra = bias ? bias->to(x.scalar_type()).contiguous() : at::Tensor();
  const at::Tensor* b = bias ? &extra : nullptr;
  switch (x.scalar_type()) {
    case at::kFloat: return run<float>(x, weights, b, chunks, width, per_token);
    case at::kBFloat16: return run<at::BFloat16>(x, weights, b, chunks, width, per_token);
    case at::kHalf: return run<at::Half>(x, weights, b, chunks, width, per_token);
    default: TORCH_CHECK(false, "activations must be float32, bfloat16 or float16");
  }
}

// R rows times HEAD outputs, each a dot product over K. 3 x 4 sums fill the registers of AVX2.
constexpr int HEAD = 4, HEAD_ROWS = 3;
template <int R, class W>
void dots(const float* x, const W* w, int64_t k, float* out) {
  Floats sum[R][HEAD];
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int n = 0; n < HEAD; n++) sum[r][n] = spreadf(0.f);
  const int64_t whole = k - k % LANES;
  for (int64_t i = 0; i < whole; i += LANES) {
    Floats row[R];
    UNROLL for (int r = 0; r < R; r++) pin(row[r] = loadf(x + r * k + i));
    UNROLL for (int n = 0; n < HEAD; n++) {
      Floats weight = loadf(w + n * k + i);
      pin(weight);
      UNROLL for (int r = 0; r < R; r++) sum[r][n] = fma(row[r], weight, sum[r][n]);
    }
  }
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int n = 0; n < HEAD; n++) out[r * HEAD + n] = total(sum[r][n]);
  for (int64_t i = whole; i < k; i++)
    for (int r = 0; r < R; r++)
      for (int n = 0; n < HEAD; n++) out[r * HEAD + n] += x[r * k + i] * (float)w[n * k + i];
}

template <class W>
void some_dots(int64_t count, const float* x, const W* w, int64_t k, float* out) {
  (count == 3 ? dots<3, W> : count == 2 ? dots<2, W> : dots<1, W>)(x, w, k, out);
}

template <class W>
void widen(const W* w, int64_t count, float* out) {
  int64_t i = 0;
  UNROLL for (; i + LANES <= count; i += LANES) storef(out + i, loadf(w + i));
  for (; i < count; i++) out[i] = (float)w[i];
}

// out [M, N] of float32 rows times 16-bit float weights [N, K], read once and widened on the way.
template <class W>
void wide(const at::Tensor& x, const W* w, int64_t n, float* out) {
  const int64_t m = x.size(0), k = x.size(1);
  const float* rows = x.const_data_ptr<float>();
  at::parallel_for(0, (n + HEAD - 1) / HEAD, 8, [&](int64_t begin, int64_t end) {
    std::vector<float> panel(HEAD * k);  // HEAD weight rows as floats, for many rows or the last outputs
    float sums[HEAD_ROWS * HEAD];
    for (int64_t block = begin; block < end; block++) {
      const int64_t first = block * HEAD, have = std::min<int64_t>(HEAD, n - first);
      const bool direct = m <= HEAD_ROWS && have == HEAD;
      if (!direct) widen(w + first * k, have * k, panel.data());
      for (int64_t row = 0; row < m; row += HEAD_ROWS) {
        const int64_t count = std::min<int64_t>(HEAD_ROWS, m - row);
        if (direct) some_dots(count, rows + row * k, w + first * k, k, sums);
        else some_dots(count, rows + row * k, panel.data(), k, sums);
        for (int64_t r = 0; r < count; r++) std::copy(sums + r * HEAD, sums + r * HEAD + have, out + (row + r) * n + first);
      }
    }
  });
}

// x float32 [M, K]; weight bfloat16 or float16 [N, K] as stored; exact products, float32 sums.
at::Tensor linear_wide(const at::Tensor& input, const at::Tensor& weight) {
  const at::Tensor x = input.contiguous();
  TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && weight.is_contiguous() && x.size(1) == weight.size(1), "shapes do not match");
  TORCH_CHECK(x.scalar_type() == at::kFloat, "activations must be float32");
  at::Tensor out = at::empty({x.size(0), weight.size(0)}, x.options());
  float* to = out.mutable_data_ptr<float>();
  if (weight.scalar_type() == at::kBFloat16) wide(x, weight.const_data_ptr<at::BFloat16>(), weight.size(0), to);
  else wide(x, weight.const_data_ptr<at::Half>(), weight.size(0), to);
  return out;
}

}  // namespace

TORCH_LIBRARY(quantserve, m) {
  m.def("linear_int(Tensor x, Tensor codes, Tensor scale, Tensor? bias, int n, int bits, int width, bool per_token) -> Tensor");
  m.def("linear_wide(Tensor x, Tensor weight) -> Tensor");
}
TORCH_LIBRARY_IMPL(quantserve, CPU, m) {
  m.impl("linear_int", &linear_int);
  m.impl("linear_wide", &linear_wide);
}
// Shapes alone, for torch.compile.
TORCH_LIBRARY_IMPL(quantserve, Meta, m) {
  m.impl("linear_int", [](const at::Tensor& x, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, int64_t n,
                          int64_t, int64_t, bool) {
    c10::SymDimVector shape(x.sym_sizes());
    shape.back() = n;
    return at::empty_symint(shape, x.options());
  });
  m.impl("linear_wide", [](const at::Tensor& x, const at::Tensor& weight) {
    return at::empty_symint({x.sym_size(0), weight.sym_size(0)}, x.options());
  });
}
