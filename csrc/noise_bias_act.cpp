// noise_bias_act: equations and shapes in ops.h.
#include "planes.h"

namespace minegan {
namespace {

template <class A>
struct Activation {
  A gain, leak;                  // leak = slope gain
  A inverse_gain, inverse_leak;  // of an activation without a kink these are as the others
  MINEGAN_HD A factor(A side) const { return side > 0 ? gain : leak; }
  MINEGAN_HD A inverse(A y) const { return y * (y > 0 ? inverse_gain : inverse_leak); }
};

template <class A>
struct Forward : Activation<A> {  // v = c; k = d, f, h
  static constexpr int inputs = 1, outputs = 1, coefficients = 3, sums = 0;
  MINEGAN_HD void operator()(const A* v, A n, const A* k, A* out, A*) const {
    const A u = v[0] * k[0] + k[1] * n + k[2];
    out[0] = u * this->factor(u);
  }
};

template <class A>
struct Backward : Activation<A> {  // v = gy, y; k = d, f, h
  static constexpr int inputs = 2, outputs = 1, coefficients = 3, sums = 3;
  MINEGAN_HD void operator()(const A* v, A n, const A* k, A* out, A* sum) const {
    const A g = v[0] * this->factor(v[1]);
    out[0] = g * k[0];
    sum[0] = g * (this->inverse(v[1]) - k[1] * n - k[2]);
    sum[1] = g * n;
    sum[2] = g;
  }
};

template <class A>
struct DoubleBackward : Activation<A> {  // v = hc, gy, y; k = d, e, f, h
  static constexpr int inputs = 3, outputs = 2, coefficients = 4, sums = 1;
  MINEGAN_HD void operator()(const A* v, A n, const A* k, A* out, A* sum) const {
    const A m = this->factor(v[2]);
    out[0] = m * (v[0] * k[0] + this->inverse(v[2]) * k[1] + k[2] * n + k[3]);
    out[1] = k[1] * v[1];
    sum[0] = m * v[1] * v[0];
  }
};

template <template <class> class F, class T>
F<wide_t<T>> with(double slope, double gain) {
  F<wide_t<T>> f;
  f.gain = gain, f.leak = slope * gain, f.inverse_gain = 1 / gain, f.inverse_leak = 1 / (slope * gain);
  return f;
}

}  // namespace

void noise_bias_act_cpu(DType dtype, const void* c, const void* noise, const void* k, void* y, const Planes& shape,
                        double slope, double gain, int threads) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    planes::pass(planes::tensors<T>({c}, {y}, noise, k, nullptr, shape, with<Forward, T>(slope, gain)), threads);
  });
}

void noise_bias_act_backward_cpu(DType dtype, const void* gy, const void* y, const void* noise, const void* k, void* gc,
                                 void* sums, const Planes& shape, double slope, double gain, int threads) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    planes::pass(planes::tensors<T>({gy, y}, {gc}, noise, k, sums, shape, with<Backward, T>(slope, gain)), threads);
  });
}

void noise_bias_act_double_backward_cpu(DType dtype, const void* hc, const void* gy, const void* y, const void* noise,
                                        const void* k, void* dgy, void* dy, void* dd, const Planes& shape, double slope,
                                        double gain, int threads) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    planes::pass(planes::tensors<T>({hc, gy, y}, {dgy, dy}, noise, k, dd, shape, with<DoubleBackward, T>(slope, gain)),
                 threads);
  });
}

}  // namespace minegan
