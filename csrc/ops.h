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

// ---- row_score ----
// For each of the table's entries [entries, 6] = (g, w, outer, C, inner, start), in double:
//   out[start + c] += factor * sum over o, i of t(g[o, c, i], w[o, c, i]),      t = g^2 | |g| | g w   for kind 0 | 1 |
//   2
// g, w are addresses of [outer, C, inner]; w may be 0 but for kind 2. No two entries share an element of out. The order
// of a sum depends on its entry's shape alone.
void row_score_cpu(DType, const int64_t* table, int64_t entries, double* out, int kind, double factor, int threads);

}  // namespace minegan
