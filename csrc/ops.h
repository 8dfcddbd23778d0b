// Table of contents: every native function, its equation and its shapes. Pointers are raw and unchecked: the launchers
// in minegan_fast/ops/ have checked shapes, dtypes, devices and strides. All tensors of a call have the dtype given
// first.
#pragma once

#include <cstdint>

#include "common.h"

namespace minegan {

// A tensor as it lies in memory, seen from one axis: [outer, C, inner], C the size and inner the stride of that axis.
struct Axis {
  int64_t outer, C, inner;
};

// ---- bias_act ----
// Side of the kink s = y where given, else x + b. a(v) = v where s > 0, else slope v.
//   out[o, c, i] = a(x[o, c, i] + b[c]) gain
// b [C] and y [outer, C, inner] may be null. Without y it is the layer's forward, with y its second order (x, b = ddx,
// ddb).
void bias_act_cpu(DType, const void* x, const void* b, const void* y, void* out, Axis, double slope, double gain,
                  int threads);

//   dx[o, c, i] = (y[o, c, i] > 0 ? 1 : slope) gain dy[o, c, i]
//   db[c]       = sum over o, i of dx[o, c, i], in an order that depends on the shape alone
void bias_act_backward_cpu(DType, const void* dy, const void* y, void* dx, void* db, Axis, double slope, double gain,
                           int threads);

#ifdef MINEGAN_CUDA
void bias_act_cuda(DType, const void* x, const void* b, const void* y, void* out, Axis, double slope, double gain,
                   int device, uintptr_t stream);

// partial [C, bias_act_backward_splits(axis)], float32 (float64 for float64), is scratch.
void bias_act_backward_cuda(DType, const void* dy, const void* y, void* dx, void* db, void* partial, Axis, double slope,
                            double gain, int device, uintptr_t stream);
int64_t bias_act_backward_splits(Axis);
#endif

// ---- row_gradient ----
// A convolution in three dimensions; what has fewer has ones in front. Sizes that belong to x, then to gy.
struct Convolution {
  int64_t B, C, k, groups;     // C: channels that a neuron sees; x has groups C of them, gy has k
  int64_t x_batch, x_channel;  // strides of x, whose planes are dense; gy is dense
  int64_t size[3], positions[3];
  int64_t kernel[3], stride[3], padding[3], dilation[3];
  bool transposed;
  int64_t y_channel() const { return positions[0] * positions[1] * positions[2]; }
};

// With the sums of products below in float, those of blocks in double, in an order that depends on the shape and the
// instruction set alone, not on the number of threads:
//   dW[r, c, d] = sum over b, p of gy[b, r, p] x[b, c of r's group, p stride + d dilation - padding]
//   transposed:   sum over b, q of gy[b, r, q stride + d dilation - padding] x[b, c, q]
// x [B, groups C, *size], gy [B, k, *positions], dW [k, C, *kernel]; row r is of group r / (k / groups).
void row_gradient_cpu(const float* x, const float* gy, float* dW, const Convolution&, int threads);

}  // namespace minegan
