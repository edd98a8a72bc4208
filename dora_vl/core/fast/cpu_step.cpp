// One adapted linear layer on a CPU, as an operation of torch: the same passes as functional.AdaptedProduct, which says
// what they are, without Python between them and with each elementwise pass over [rows, out] taken once.
//
//     forward    y = g (W x + s B A x) + b       the gain, when it is due, right before, which leaves W in the cache
//     backward   dz = g dy, the sums of dy y and dy over rows in one pass; dx = dz W + dh A, dA, dB, dm, db
//
//     output     y without a graph; the frozen product is torch's own, so that an adapter which changes nothing changes
//                no bit. For a few rows, a token of each sequence, the low-rank path is two short loops: products
//                through torch cost more in their calls than in their arithmetic.
//
// Here s goes into B when it is cast, and into dB when that is: `b` is s B in the activations' dtype, h = A x. With
// dropout, s is divided by the share that is kept.
//
// Built by cpu_step.py; held to functional.py by tests.

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/_unsafe_view.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/div.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <c10/util/BFloat16.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

using at::Tensor;
using c10::BFloat16;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

namespace {

constexpr int64_t BLOCK_ROWS = 64;      // rows whose sums one thread takes at a time
constexpr int64_t FEW_ROWS = 8;         // above it a matrix product reads A and B once for all rows
constexpr float CANCELLATION = 0.15f;   // the three bounds of gain.py
constexpr float FRAGILE_GAIN = 0.05f;
constexpr float LARGE_BIAS = 8.0f;
constexpr int64_t GRAIN = 32768;        // numbers below which a pass is not worth a second thread

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

constexpr int64_t LANES = 16;  // sums of a dot product that run side by side

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

Tensor float_or_none(const std::optional<Tensor>& bias) { return bias ? bias->detach().to(at::kFloat) : Tensor(); }

template <typename T>
void scale_rows(T* y, const float* away, const float* bias, int64_t rows, int64_t out) {
  at::parallel_for(0, rows, grain(out), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      T* line = y + row * out;
#pragma GCC ivdep
      for (int64_t o = 0; o < out; ++o) {
        const float value = wide(line[o]);
        line[o] = narrow<T>(value + away[o] * (value - (bias == nullptr ? 0.0f : bias[o])));
      }
    }
  });
}

// Block by block of rows, each with sums of its own, so that memory is read in its order and the sums do not depend on
// the number of threads.
template <typename T>
void scale_and_sum(const T* dy, const T* y, const float* away, T* dz, float* dy_y, float* dy_sum, int64_t rows,
                   int64_t out) {
  const int64_t blocks = std::max<int64_t>(1, (rows + BLOCK_ROWS - 1) / BLOCK_ROWS);
  std::vector<float> partial(2 * blocks * out, 0.0f);
  at::parallel_for(0, blocks, grain(BLOCK_ROWS * out), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      float *products = partial.data() + 2 * block * out, *sums = products + out;
      for (int64_t row = block * BLOCK_ROWS; row < std::min((block + 1) * BLOCK_ROWS, rows); ++row) {
        const T *upstream = dy + row * out, *output = y + row * out;
        T* scaled = dz + row * out;
#pragma GCC ivdep
        for (int64_t o = 0; o < out; ++o) {
          const float value = wide(upstream[o]);
          products[o] += value * wide(output[o]);
          sums[o] += value;
          scaled[o] = narrow<T>(value + away[o] * value);
        }
      }
    }
  });
  std::copy(partial.begin(), partial.begin() + out, dy_y);
  std::copy(partial.begin() + out, partial.begin() + 2 * out, dy_sum);
  for (int64_t block = 1; block < blocks; ++block) {
    const float *products = partial.data() + 2 * block * out, *sums = products + out;
    for (int64_t o = 0; o < out; ++o) {
      dy_y[o] += products[o];
      dy_sum[o] += sums[o];
    }
  }
}

// A factor in the activations' dtype, times `scale`, in one pass.
template <typename To, typename From>
void cast_into(const From* from, To* to, int64_t count, float scale) {
  at::parallel_for(0, count, GRAIN, [&](int64_t begin, int64_t end) {
#pragma GCC ivdep
    for (int64_t i = begin; i < end; ++i) to[i] = narrow<To>(wide(from[i]) * scale);
  });
}

// n^2 = ||W||^2 + 2 s B.(W A^T + s B A A^T / 2), where s B is `kept` b
template <typename T>
void norms_squared(const T* b, const T* half, const float* frozen, float* squared, int64_t out, int64_t rank,
                   float kept) {
  at::parallel_for(0, out, grain(rank), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      squared[row] = frozen[row] + 2 * kept * dot(b + row * rank, half + row * rank, rank);
  });
}

// g = m / n, g - 1 and 1 / m from n^2 in `gain[0]`; false where a row needs gain.py's care. The root is torch's, which
// gave m its start: another library's may differ in the last bit, and g would not be 1 there.
bool gains(std::vector<Tensor>& gain, const Tensor& frozen, const Tensor& magnitude, const Tensor& bias) {
  Tensor squared = gain[0].clone();
  at::div_out(gain[0], magnitude, gain[0].sqrt_());
  const float *n2 = squared.const_data_ptr<float>(), *w2 = frozen.const_data_ptr<float>();
  const float *g = gain[0].const_data_ptr<float>(), *m = magnitude.const_data_ptr<float>();
  const float* b = bias.defined() ? bias.const_data_ptr<float>() : nullptr;
  float *away = gain[1].mutable_data_ptr<float>(), *per_magnitude = gain[2].mutable_data_ptr<float>();
  bool sound = true;
  for (int64_t row = 0; row < squared.numel(); ++row) {  // written so that a NaN is not sound
    away[row] = g[row] - 1;
    per_magnitude[row] = 1 / m[row];
    sound &= n2[row] > CANCELLATION * w2[row] && std::abs(g[row]) > FRAGILE_GAIN;
    if (b != nullptr) sound &= LARGE_BIAS * std::abs(m[row]) > std::abs(b[row]);
  }
  return sound;
}

// Adds rows matrix to `result`, whole or in two halves of the rows (products.py chooses: the bits are the same).
void add_product(Tensor& result, const Tensor& rows, const Tensor& matrix, bool halved) {
  const int64_t half = halved ? (rows.size(0) + 1) / 2 : rows.size(0);
  for (int64_t start = 0; start < rows.size(0); start += half)
    result.slice(0, start, start + half).addmm_(rows.slice(0, start, start + half), matrix);
}

Tensor cast(const Tensor& factor, at::ScalarType dtype, double scale) {
  Tensor from = factor.detach().contiguous();
  if (from.scalar_type() == dtype && scale == 1) return from;
  Tensor to = at::empty_like(from, from.options().dtype(dtype));
  auto run = [&](auto from_zero, auto to_zero) {
    using From = decltype(from_zero);
    using To = decltype(to_zero);
    cast_into(from.const_data_ptr<From>(), to.mutable_data_ptr<To>(), from.numel(), static_cast<float>(scale));
  };
  const bool from_wide = from.scalar_type() == at::kFloat, to_wide = dtype == at::kFloat;
  if (from_wide && to_wide) run(float(), float());
  else if (from_wide) run(float(), BFloat16());
  else if (to_wide) run(BFloat16(), float());
  else run(BFloat16(), BFloat16());
  return to;
}

void apply_gain(Tensor& y, const Tensor& away, const Tensor& bias) {
  const float* shift = bias.defined() ? bias.const_data_ptr<float>() : nullptr;
  if (y.scalar_type() == at::kBFloat16)
    scale_rows(y.mutable_data_ptr<BFloat16>(), away.const_data_ptr<float>(), shift, y.size(0), y.size(1));
  else
    scale_rows(y.mutable_data_ptr<float>(), away.const_data_ptr<float>(), shift, y.size(0), y.size(1));
}

// What one pass works on beside the operands that autograd knows of.
struct Pass {
  std::optional<Tensor> masked, positions, taken;  // dropout's: x as A reads it, where it is 0, what stood there
  Tensor a, b, full, away, per_magnitude;  // a and b are A and s B in the activations' dtype
  double scale;
  bool halved_forward, halved_backward;
};

class AdaptedProduct : public torch::autograd::Function<AdaptedProduct> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                        const Tensor& lora_A, const Tensor& lora_B, const Tensor& magnitude, const Pass& pass) {
    at::AutoDispatchBelowADInplaceOrView guard;
    Tensor rows = x.reshape({-1, x.size(-1)}), hidden = at::mm(pass.masked.value_or(rows), pass.a.t());
    // The small product first: W x is then added to it before it is rounded, and the larger rounding is saved.
    Tensor y = bias ? at::addmm(*bias, hidden, pass.b.t()) : at::mm(hidden, pass.b.t());
    add_product(y, rows, weight.t(), pass.halved_forward);
    apply_gain(y, pass.away, float_or_none(bias));
    std::vector<int64_t> shape = x.sizes().vec();
    shape.back() = y.size(1);
    Tensor output = at::_unsafe_view(y, shape);  // not a view of y: it may be edited in place
    const Tensor none;
    ctx->save_for_backward({pass.masked.value_or(x), weight, bias.value_or(none), lora_A, lora_B, hidden, y,
                            pass.positions.value_or(none), pass.taken.value_or(none)});
    ctx->saved_data["input_shape"] = x.sizes().vec();
    ctx->saved_data["gain"] = std::vector<Tensor>{pass.full, pass.away, pass.per_magnitude};
    ctx->saved_data["scale"] = pass.scale;
    ctx->saved_data["magnitude_dtype"] = magnitude.scalar_type();
    ctx->saved_data["halved"] = pass.halved_backward;
    // Shares the output's count of edits, without its memory.
    Tensor probe = at::empty({0}, y.options());
    probe.unsafeGetTensorImpl()->set_version_counter(output.unsafeGetTensorImpl()->version_counter());
    ctx->saved_data["probe"] = probe;
    ctx->saved_data["version"] = static_cast<int64_t>(output._version());
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstream);
};

struct Backward {
  Tensor dz, dm, db;
};

// dz, dm and db from one pass over dy and y, or from z where y was edited.
Backward start_backward(const Tensor& dy, const Tensor& y, const Tensor& z, const Tensor& bias,
                        const std::vector<Tensor>& gain) {
  Backward result{at::empty_like(dy), at::empty_like(gain[1]), at::empty_like(gain[1])};
  const Tensor& other = z.defined() ? z : y;
  auto run = [&](auto zero) {
    using T = decltype(zero);
    scale_and_sum(dy.const_data_ptr<T>(), other.const_data_ptr<T>(), gain[1].const_data_ptr<float>(),
                  result.dz.mutable_data_ptr<T>(), result.dm.mutable_data_ptr<float>(),
                  result.db.mutable_data_ptr<float>(), dy.size(0), dy.size(1));
  };
  if (dy.scalar_type() == at::kBFloat16) run(BFloat16());
  else run(float());
  if (z.defined()) result.dm.mul_(gain[0]);
  else if (bias.defined()) result.dm.sub_(bias.to(at::kFloat) * result.db);
  result.dm.mul_(gain[2]);
  return result;
}

// What torch's once_differentiable does in Python: a second derivative is an error and not a zero.
variable_list differentiable_once(variable_list gradients) {
  for (Tensor& gradient : gradients) {
    if (!gradient.defined()) continue;
    gradient = gradient.detach().requires_grad_();
    auto error = std::make_shared<torch::autograd::DelayedError>(
        "trying to differentiate twice a function that was marked with @once_differentiable", 1);
    gradient = (*error)({gradient})[0];
  }
  return gradients;
}

variable_list AdaptedProduct::backward(AutogradContext* ctx, const variable_list& upstream) {
  const variable_list saved = ctx->get_saved_variables();  // before the guard: a checkpoint recomputes here
  const bool twice = at::GradMode::is_enabled();
  at::AutoDispatchBelowADInplaceOrView guard;
  const Tensor &x = saved[0], &weight = saved[1], &bias = saved[2], &lora_A = saved[3], &lora_B = saved[4];
  const Tensor &hidden = saved[5], &y = saved[6], &positions = saved[7], &taken = saved[8];
  const std::vector<Tensor> gain = ctx->saved_data["gain"].toTensorVector();
  const double scale = ctx->saved_data["scale"].toDouble();
  const bool edited = ctx->saved_data["probe"].toTensor()._version() != ctx->saved_data["version"].toInt();
  Tensor rows = x.reshape({-1, x.size(-1)}), z, dx, dA, dB;
  Tensor dy = upstream[0].reshape({-1, upstream[0].size(-1)}).contiguous();
  const int64_t first = bias.defined() ? 3 : 2;  // of A's place among the tensors that were given
  Tensor b = cast(lora_B, dy.scalar_type(), scale);
  if (edited) {
    Tensor whole = positions.defined() ? rows.clone() : rows;
    if (positions.defined()) whole.view(-1).index_copy_(0, positions, taken);
    z = at::mm(hidden, b.t()).addmm_(whole, weight.t());
  }
  auto [dz, dm, db] = start_backward(dy, y, z, bias, gain);
  Tensor dh = at::mm(dz, b);
  if (ctx->needs_input_grad(0)) {
    dx = at::mm(dh, cast(lora_A, dy.scalar_type(), 1));
    if (positions.defined()) dx.view(-1).index_fill_(0, positions, 0);
    add_product(dx, dz, weight, ctx->saved_data["halved"].toBool());
    dx = dx.view(ctx->saved_data["input_shape"].toIntVector());
  }
  if (ctx->needs_input_grad(first)) dA = dh.t().mm(rows).to(lora_A.scalar_type());
  if (ctx->needs_input_grad(first + 1)) {
    dB = hidden.size(1) < 64 ? hidden.t().mm(dz).t() : dz.t().mm(hidden);  // functional.py's NARROW
    dB = dB.to(lora_B.scalar_type(), false, false, at::MemoryFormat::Contiguous).mul_(scale);
  }
  db = bias.defined() && ctx->needs_input_grad(2) ? db.to(bias.scalar_type()) : Tensor();
  dm = ctx->needs_input_grad(first + 2) ? dm.to(ctx->saved_data["magnitude_dtype"].toScalarType()) : Tensor();
  variable_list gradients{dx, Tensor(), db, dA, dB, dm, Tensor()};
  return twice ? differentiable_once(std::move(gradients)) : gradients;
}

// y, and whether the gain could be computed here; `gain` is full, g - 1 and 1 / m, filled where it is due. `scale` is s,
// and `kept` the share of x that dropout keeps, by which the low-rank path is divided and the norm is not.
std::tuple<Tensor, bool> adapted_product(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                         const Tensor& lora_A, const Tensor& lora_B, const Tensor& magnitude,
                                         const Tensor& frozen_norms_squared, std::vector<Tensor> gain, bool due,
                                         double scale, double kept, const std::optional<Tensor>& masked,
                                         const std::optional<Tensor>& positions, const std::optional<Tensor>& taken,
                                         bool halved, bool halved_backward) {
  Pass pass{masked, positions, taken};
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto dtype = weight.scalar_type();
    pass.a = cast(lora_A, dtype, 1);
    pass.b = cast(lora_B, dtype, scale / kept);
    if (due) {
      Tensor half = at::mm(weight, pass.a.t()).addmm_(pass.b, at::mm(pass.a, pass.a.t()), 1, kept / 2);
      auto run = [&](auto zero) {
        using T = decltype(zero);
        norms_squared(pass.b.const_data_ptr<T>(), half.const_data_ptr<T>(),
                      frozen_norms_squared.const_data_ptr<float>(), gain[0].mutable_data_ptr<float>(), lora_B.size(0),
                      lora_B.size(1), static_cast<float>(kept));
      };
      if (dtype == at::kBFloat16) run(BFloat16());
      else run(float());
      if (!gains(gain, frozen_norms_squared, magnitude.detach().to(at::kFloat), float_or_none(bias))) return {Tensor(), false};
    }
  }
  pass.full = gain[0];
  pass.away = gain[1];
  pass.per_magnitude = gain[2];
  pass.scale = scale / kept;
  pass.halved_forward = halved;
  pass.halved_backward = halved_backward;
  return {AdaptedProduct::apply(x, weight, bias, lora_A, lora_B, magnitude, pass), true};
}

// -- the output without a graph -------------------------------------------------------------------------------

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

}  // namespace

TORCH_LIBRARY(dora_vl_cpu, m) {
  m.def("adapted_product", adapted_product);
  m.def("adapted_output", adapted_output);
}
