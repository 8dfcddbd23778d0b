// modulated_conv2d: equations and shapes in ops.h. The convolution is the library's; these are the passes around it.
#include "planes.h"

namespace minegan {
namespace {

template <class A>
struct Modulate {
  static constexpr int inputs = 1, outputs = 1, coefficients = 1, sums = 0;
  MINEGAN_HD void operator()(const A* v, A, const A* k, A* out, A*) const { out[0] = v[0] * k[0]; }
};

template <class A>
struct Backward {  // v = gy, x
  static constexpr int inputs = 2, outputs = 1, coefficients = 1, sums = 1;
  MINEGAN_HD void operator()(const A* v, A, const A* k, A* out, A* sum) const {
    out[0] = v[0] * k[0];
    sum[0] = v[0] * v[1];
  }
};

template <class A>
struct DoubleBackward {  // v = hx, gy, x; k = s, hs
  static constexpr int inputs = 3, outputs = 2, coefficients = 2, sums = 1;
  MINEGAN_HD void operator()(const A* v, A, const A* k, A* out, A* sum) const {
    out[0] = v[0] * k[0] + v[2] * k[1];
    out[1] = v[1] * k[1];
    sum[0] = v[0] * v[1];
  }
};

}  // namespace

void modulated_conv2d_modulate_cpu(DType dtype, const void* x, const void* s, void* y, const Planes& shape,
                                   int threads) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    planes::pass(planes::tensors<T>({x}, {y}, nullptr, s, nullptr, shape, Modulate<wide_t<T>>{}), threads);
  });
}

void modulated_conv2d_backward_cpu(DType dtype, const void* gy, const void* x, const void* s, void* gx, void* gs,
                                   const Planes& shape, int threads) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    planes::pass(planes::tensors<T>({gy, x}, {gx}, nullptr, s, gs, shape, Backward<wide_t<T>>{}), threads);
  });
}

void modulated_conv2d_double_backward_cpu(DType dtype, const void* hx, const void* gy, const void* x, const void* k,
                                          void* dgy, void* dx, void* ds, const Planes& shape, int threads) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    planes::pass(planes::tensors<T>({hx, gy, x}, {dgy, dx}, nullptr, k, ds, shape, DoubleBackward<wide_t<T>>{}),
                 threads);
  });
}

}  // namespace minegan
