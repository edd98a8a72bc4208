// An adapted linear layer's output without a graph: y = g (W x + s B A x) + b, functional.py's `changed_product_` after
// the frozen product. That one is torch's own, so that an adapter which changes nothing changes no bit. For a few rows,
// a token of each sequence, the low-rank path is two short loops here: products through torch cost more in their calls
// than in their arithmetic.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/_unsafe_view.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <optional>
#include <vector>

#include "cpu_numbers.h"

using at::Tensor;

namespace {

constexpr int64_t FEW_ROWS = 8;  // above it a matrix product reads A and B once for all rows
constexpr int64_t LANES = 16;

template <typename T, typename Other>
float dot(const T* one, const Other* other, int64_t count) {
  float lanes[LANES] = {0};
  int64_t k = 0;
  for (; k + LANES <= count; k += LANES) {
#pragma GCC ivdep
    for (int64_t lane = 0; lane < LANES; ++lane) lanes[lane] += wide(one[k + lane]) * wide(other[k + lane]);
  }
  float sum = 0;
  for (; k < count; ++k) sum += wide(one[k]) * wide(other[k]);
  for (float lane : lanes) sum += lane;
  return sum;
}

template <typename T>
T changed(float product, float low_rank, float full, float bias) {
  const float z = product - bias + low_rank;
  return narrow<T>(product + low_rank + (full - 1) * z);
}

template <typename T>
void change_few(const Tensor& rows, Tensor& y, const Tensor& a, const Tensor& b, const float* full, const T* bias) {
  const int64_t count = rows.size(0), in = rows.size(1), out = y.size(1), rank = a.size(0);
  const T *x = rows.const_data_ptr<T>(), *A = a.const_data_ptr<T>(), *B = b.const_data_ptr<T>();
  T* result = y.mutable_data_ptr<T>();
  std::vector<float> hidden(count * rank);
  at::parallel_for(0, rank, grain(count * in), [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k)
      for (int64_t row = 0; row < count; ++row) hidden[row * rank + k] = dot(A + k * in, x + row * in, in);
  });
  at::parallel_for(0, out, grain(count * rank), [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o)
      for (int64_t row = 0; row < count; ++row) {
        const float low_rank = dot(B + o * rank, hidden.data() + row * rank, rank);
        T& place = result[row * out + o];
        place = changed<T>(wide(place), low_rank, full[o], bias == nullptr ? 0.0f : wide(bias[o]));
      }
  });
}

template <typename T>
void change_many(const Tensor& rows, Tensor& y, const Tensor& a, const Tensor& b, const float* full, const T* bias) {
  y.addmm_(at::mm(rows, a.t()), b.t());
  const int64_t out = y.size(1);
  T* result = y.mutable_data_ptr<T>();
  at::parallel_for(0, y.size(0), grain(out), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      T* line = result + row * out;
#pragma GCC ivdep
      for (int64_t o = 0; o < out; ++o)
        line[o] = changed<T>(wide(line[o]), 0.0f, full[o], bias == nullptr ? 0.0f : wide(bias[o]));
    }
  });
}

template <typename T>
void change(const Tensor& rows, Tensor& y, const Tensor& a, const Tensor& b, const float* full, const T* bias) {
  if (rows.size(0) <= FEW_ROWS) change_few<T>(rows, y, a, b, full, bias);
  else change_many<T>(rows, y, a, b, full, bias);
}

}  // namespace

// `a` and `b` are A and s B in the dtype of x, contiguous; `full` is the gain in float32.
Tensor adapted_output(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& a,
                      const Tensor& b, const Tensor& full) {
  const Tensor rows = x.reshape({-1, x.size(-1)}).contiguous();
  Tensor y = bias ? at::addmm(*bias, rows, weight.t()) : at::mm(rows, weight.t());
  if (y.scalar_type() == at::kBFloat16)
    change(rows, y, a, b, full.const_data_ptr<float>(), bias ? bias->const_data_ptr<BFloat16>() : nullptr);
  else
    change(rows, y, a, b, full.const_data_ptr<float>(), bias ? bias->const_data_ptr<float>() : nullptr);
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = y.size(1);
  return at::_unsafe_view(y, shape);
}
