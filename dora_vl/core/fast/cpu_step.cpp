// What comes between the matrix products of an adapted linear layer on a CPU, as operations of torch; letters as in
// functional.py, which has the same by the same names.
//
//     norms        n^2 = ||W||^2 + 2 s B.(W A^T + s/2 B A A^T), rows that cancel from the dense direction
//     output       y = f + B h + (g - 1) (f - b + B h) and h = s A x. For a few rows, a token of each sequence, two
//                  short loops: products through torch cost more in their calls than in their arithmetic.
//     gains        g = m / n, 1 where n is 0, and 1 / n
//     gradients    dz = g dy, and the sums of dy (f - b) and dy over rows, in one pass; dh = s dz B
//     factor_gradients   dA = dh^T x, dB = g dy^T h, dm = (B.dy^T h + sum of dy (f - b)) / n
//
// Sums are float32. Built by cpu_step.py; held to functional.py by tests.

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros_like.h>
#include <c10/util/BFloat16.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

using at::Tensor;
using c10::BFloat16;

namespace {

constexpr int64_t BLOCK_ROWS = 64;      // rows whose sums one thread takes at a time
constexpr int64_t FEW_ROWS = 8;         // above it a matrix product reads A and B once for all rows
constexpr int64_t GRAIN = 32768;        // numbers below which a pass is not worth a second thread
constexpr int64_t NARROW = 64;          // functional.py's
constexpr int64_t LANES = 16;           // sums of a dot product that run side by side
constexpr float CANCELLATION = 0.15;   // functional.py's

inline int64_t grain(int64_t numbers_each) { return std::max<int64_t>(1, GRAIN / std::max<int64_t>(numbers_each, 1)); }

inline float wide(float value) { return value; }
inline float wide(BFloat16 value) {
  uint32_t bits = static_cast<uint32_t>(value.x) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}
template <typename T> inline T narrow(float value);
template <> inline float narrow<float>(float value) { return value; }
template <> inline BFloat16 narrow<BFloat16>(float value) {  // to nearest even; branchless, so that it vectorises
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  uint32_t result = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded;
  return BFloat16(static_cast<uint16_t>(result), BFloat16::from_bits());
}

template <typename T, typename Other>
float dot(const T* left, const Other* right, int64_t count) {
  float lanes[LANES] = {0};
  int64_t k = 0;
  for (; k + LANES <= count; k += LANES) {
#pragma GCC ivdep
    for (int64_t lane = 0; lane < LANES; ++lane) lanes[lane] += wide(left[k + lane]) * wide(right[k + lane]);
  }
  float sum = 0;
  for (; k < count; ++k) sum += wide(left[k]) * wide(right[k]);
  for (float lane : lanes) sum += lane;
  return sum;
}

// Runs a templated pass for the dtype of a tensor.
template <typename Pass>
void with_dtype(const Tensor& tensor, Pass pass) {
  if (tensor.scalar_type() == at::kBFloat16) pass(BFloat16());
  else pass(float());
}

// The bias in float32, zeros where there is none.
Tensor wide_bias(const std::optional<Tensor>& bias, const Tensor& full) {
  return bias ? bias->detach().to(at::kFloat).contiguous() : at::zeros_like(full);
}

Tensor scaled_product(const Tensor& rows, const Tensor& matrix, double scale) {
  return at::addmm(at::empty({}, rows.options()), rows, matrix, 0, scale);
}

template <typename T>
inline T changed(float product, float low_rank, float full, float bias) {
  const float sum = product + low_rank;
  return narrow<T>(sum + (full - 1) * (sum - bias));
}

// y in the place of B h.
template <typename T>
void change_many(const T* product, T* y, const float* full, const float* bias, int64_t rows, int64_t out) {
  at::parallel_for(0, rows, grain(out), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* frozen = product + row * out;
      T* line = y + row * out;
#pragma GCC ivdep
      for (int64_t o = 0; o < out; ++o) line[o] = changed<T>(wide(frozen[o]), wide(line[o]), full[o], bias[o]);
    }
  });
}

template <typename T>
void change_few(const Tensor& product, const Tensor& x, const Tensor& a, const Tensor& b, Tensor& y, Tensor& hidden,
                const float* full, const float* bias, float scale) {
  const int64_t rows = x.size(0), in = x.size(1), out = y.size(1), rank = a.size(0);
  const T *input = x.const_data_ptr<T>(), *A = a.const_data_ptr<T>(), *B = b.const_data_ptr<T>();
  const T* frozen = product.const_data_ptr<T>();
  T *result = y.mutable_data_ptr<T>(), *h = hidden.mutable_data_ptr<T>();
  at::parallel_for(0, rank, grain(rows * in), [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k)
      for (int64_t row = 0; row < rows; ++row)
        h[row * rank + k] = narrow<T>(scale * dot(A + k * in, input + row * in, in));
  });
  at::parallel_for(0, out, grain(rows * rank), [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o)
      for (int64_t row = 0; row < rows; ++row) {
        const float low_rank = dot(B + o * rank, h + row * rank, rank);
        result[row * out + o] = changed<T>(wide(frozen[row * out + o]), low_rank, full[o], bias[o]);
      }
  });
}

// `a` and `b` are A and B in the dtype of x; `full` is g.
std::tuple<Tensor, Tensor> output(const Tensor& given_product, const Tensor& given_x, const Tensor& given_a,
                                  const Tensor& given_b, const std::optional<Tensor>& given_bias, const Tensor& full,
                                  double scale) {
  const Tensor product = given_product.contiguous(), x = given_x.contiguous(), a = given_a.contiguous();
  const Tensor b = given_b.contiguous(), bias = wide_bias(given_bias, full);
  const float *g = full.const_data_ptr<float>(), *shift = bias.const_data_ptr<float>();
  Tensor y, hidden;
  if (x.size(0) <= FEW_ROWS) {
    y = at::empty_like(product);
    hidden = at::empty({x.size(0), a.size(0)}, x.options());
    with_dtype(product, [&](auto zero) {
      change_few<decltype(zero)>(product, x, a, b, y, hidden, g, shift, static_cast<float>(scale));
    });
  } else {
    hidden = scaled_product(x, a.t(), scale);
    y = at::mm(hidden, b.t());
    with_dtype(product, [&](auto zero) {
      using T = decltype(zero);
      change_many(product.const_data_ptr<T>(), y.mutable_data_ptr<T>(), g, shift, y.size(0), y.size(1));
    });
  }
  return {y, hidden};
}

// Block by block of rows, each with sums of its own, so that memory is read in its order and the sums do not depend on
// the number of threads.
template <typename T>
void scale_and_sum(const T* dy, const T* product, const float* full, const float* bias, T* dz, float* dm, float* db,
                   int64_t rows, int64_t out) {
  const int64_t blocks = std::max<int64_t>(1, (rows + BLOCK_ROWS - 1) / BLOCK_ROWS);
  std::vector<float> partial(2 * blocks * out, 0.0f);
  at::parallel_for(0, blocks, grain(BLOCK_ROWS * out), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      float *products = partial.data() + 2 * block * out, *sums = products + out;
      for (int64_t row = block * BLOCK_ROWS; row < std::min((block + 1) * BLOCK_ROWS, rows); ++row) {
        const T *upstream = dy + row * out, *frozen = product + row * out;
        T* scaled = dz + row * out;
#pragma GCC ivdep
        for (int64_t o = 0; o < out; ++o) {
          const float value = wide(upstream[o]);
          products[o] += value * (wide(frozen[o]) - bias[o]);
          sums[o] += value;
          scaled[o] = narrow<T>(value + (full[o] - 1) * value);
        }
      }
    }
  });
  for (int64_t block = 0; block < blocks; ++block) {
    const float *products = partial.data() + 2 * block * out, *sums = products + out;
    for (int64_t o = 0; o < out; ++o) {
      dm[o] = products[o] + (block == 0 ? 0.0f : dm[o]);
      db[o] = sums[o] + (block == 0 ? 0.0f : db[o]);
    }
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gradients(const Tensor& given_dy, const Tensor& given_product,
                                                     const Tensor& b, const std::optional<Tensor>& given_bias,
                                                     const Tensor& full, double scale) {
  const Tensor dy = given_dy.contiguous(), product = given_product.contiguous(), bias = wide_bias(given_bias, full);
  Tensor dz = at::empty_like(dy), dm = at::empty_like(full), db = at::empty_like(full);
  with_dtype(dy, [&](auto zero) {
    using T = decltype(zero);
    scale_and_sum(dy.const_data_ptr<T>(), product.const_data_ptr<T>(), full.const_data_ptr<float>(),
                  bias.const_data_ptr<float>(), dz.mutable_data_ptr<T>(), dm.mutable_data_ptr<float>(),
                  db.mutable_data_ptr<float>(), dy.size(0), dy.size(1));
  });
  return {dz, scaled_product(dz, b, scale), dm, db};
}

// `frozen` is ||W||^2; A and B are taken in W's dtype, as the forward pass takes them.
Tensor norms(const Tensor& weight, const Tensor& frozen, const Tensor& lora_A, const Tensor& lora_B,
             double scale) {
  const auto dtype = weight.scalar_type();
  const Tensor a = lora_A.detach().to(dtype), b = lora_B.detach().to(dtype).contiguous();
  const Tensor half = at::mm(weight, a.t()).addmm_(b, at::mm(a, a.t()), 1, scale / 2);
  Tensor squared = at::empty_like(frozen);
  const float* before = frozen.const_data_ptr<float>();
  float* result = squared.mutable_data_ptr<float>();
  const int64_t rank = b.size(1);
  std::atomic<bool> cancels{false};
  with_dtype(weight, [&](auto zero) {
    using T = decltype(zero);
    const T *B = b.const_data_ptr<T>(), *H = half.const_data_ptr<T>();
    at::parallel_for(0, b.size(0), grain(rank), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        result[row] = before[row] + 2 * static_cast<float>(scale) * dot(B + row * rank, H + row * rank, rank);
        if (result[row] <= before[row] * CANCELLATION) cancels = true;
      }
    });
  });
  if (cancels) {
    const Tensor cancelled = (squared <= frozen * CANCELLATION).nonzero().flatten();
    const Tensor change = at::mm(lora_B.detach().index_select(0, cancelled), lora_A.detach());
    const Tensor dense = weight.index_select(0, cancelled).to(at::kFloat) + change * scale;
    squared.index_copy_(0, cancelled, dense.square().sum(1));
  }
  return squared.sqrt_();  // torch's, as the magnitudes came to be, so that a change of nothing has gain 1
}

std::tuple<Tensor, Tensor> gains(const Tensor& magnitude, const Tensor& norms) {
  const Tensor given = magnitude.detach().to(at::kFloat).contiguous();
  Tensor full = at::empty_like(norms), per_norm = at::empty_like(norms);
  const float *m = given.const_data_ptr<float>(), *n = norms.const_data_ptr<float>();
  float *g = full.mutable_data_ptr<float>(), *inverse = per_norm.mutable_data_ptr<float>();
  for (int64_t o = 0; o < norms.numel(); ++o) {
    g[o] = n[o] > 0 ? m[o] / std::max(n[o], std::numeric_limits<float>::min()) : 1.0f;
    inverse[o] = n[o] > 0 ? 1 / n[o] : 0.0f;
  }
  return {full, per_norm};
}

// `sums` are those of dy (f - b); B's gradient is taken as [rank, out] where the rank is small, twice as fast.
std::tuple<Tensor, Tensor, Tensor> factor_gradients(const Tensor& given_dy, const Tensor& x, const Tensor& hidden,
                                              const Tensor& dh, const Tensor& lora_B, const Tensor& sums,
                                              const Tensor& full, const Tensor& per_norm) {
  const Tensor dy = given_dy.contiguous(), dA = at::mm(dh.t(), x), B = lora_B.detach().to(at::kFloat).contiguous();
  const int64_t out = B.size(0), rank = B.size(1);
  const bool turned = rank < NARROW;
  const Tensor product = turned ? at::mm(hidden.t(), dy) : at::mm(dy.t(), hidden);
  Tensor dB = at::empty_like(B), dm = at::empty_like(full);
  const float *b = B.const_data_ptr<float>(), *g = full.const_data_ptr<float>(), *sum = sums.const_data_ptr<float>();
  const float* inverse = per_norm.const_data_ptr<float>();
  float *on_B = dB.mutable_data_ptr<float>(), *on_m = dm.mutable_data_ptr<float>();
  with_dtype(product, [&](auto zero) {
    using T = decltype(zero);
    const T* read = product.const_data_ptr<T>();
    at::parallel_for(0, out, grain(rank), [&](int64_t begin, int64_t end) {
      for (int64_t o = begin; o < end; ++o) {
        float moved = 0;
        for (int64_t k = 0; k < rank; ++k) {
          const float value = wide(read[turned ? k * out + o : o * rank + k]);
          moved += b[o * rank + k] * value;
          on_B[o * rank + k] = g[o] * value;
        }
        on_m[o] = (sum[o] + moved) * inverse[o];
      }
    });
  });
  return {dA.to(at::kFloat), dB, dm};
}

}  // namespace

TORCH_LIBRARY(dora_vl_cpu, m) {
  m.def("output", output);
  m.def("gains", gains);
  m.def("gradients", gradients);
  m.def("factor_gradients", factor_gradients);
  m.def("norms", norms);
}
