// Table of contents: every native function, its equation and its shapes. Pointers are raw and unchecked: the launchers
// in minegan_fast/ops/ have checked shapes, dtypes, devices and strides. All tensors have the call's first dtype.
#pragma once

#include <cstdint>
#include <string>

#include "common.h"

namespace minegan {

// A tensor as it lies in memory, seen from one axis: [outer, C, inner], C the size and inner the stride of that axis.
struct Axis {
  int64_t outer, C, inner;
};

// ---- bias_act ----
// Side of the kink s = y where given, else x + b. a(v) = v where s > 0, else slope v.
//   out[o, c, i] = a(x[o, c, i] + b[c]) gain
// b [C] and y [outer, C, inner] may be null. Without y it is the layer's forward. With y it is its second order, and x
// and b are ddx and ddb.
void bias_act_cpu(DType, const void* x, const void* b, const void* y, void* out, Axis, double slope, double gain,
                  int threads);

//   dx[o, c, i] = (y[o, c, i] > 0 ? 1 : slope) gain dy[o, c, i]
//   db[c]       = sum over o, i of dx[o, c, i], in an order that depends on the shape alone
void bias_act_backward_cpu(DType, const void* dy, const void* y, void* dx, void* db, Axis, double slope, double gain,
                           int threads);

#ifdef MINEGAN_CUDA
std::string bias_act_cuda_problem(int device);  // "", or why the device cannot run the kernels of bias_act.cu

void bias_act_cuda(DType, const void* x, const void* b, const void* y, void* out, Axis, double slope, double gain,
                   int device, uintptr_t stream);

// partial [C, bias_act_backward_splits(axis)], float32 (float64 for float64), is scratch.
void bias_act_backward_cuda(DType, const void* dy, const void* y, void* dx, void* db, void* partial, Axis, double slope,
                            double gain, int device, uintptr_t stream);
int64_t bias_act_backward_splits(Axis);
#endif

// ---- row_update ----
// k rows of `length` elements each that are a run of memory: [k, length], in the leaf and in what lies as it does.
// Element j of row i also is weight[rows[i] row_stride + j / inner outer_stride + j % inner inner_stride].
// weight, average and the moments that a rule does not have may be null; without a weight, rows is not read.
// 16 words of 8 bytes: WORDS in minegan_fast/ops/_row_table.py.
struct RowTensor {
  void *leaf, *mean, *square, *average, *weight;
  const int64_t* rows;
  float* step;        // [k] steps that a row has taken
  uint32_t* tickets;  // [k] zeros, for rows that several GPU blocks share
  int64_t count, length, row_stride, outer_stride, inner, inner_stride;
  int64_t aligned;  // addresses and strides allow accesses of 16 bytes, as far as the gradient's does
  int64_t reserved;
};
static_assert(sizeof(RowTensor) == 16 * 8, "every field is a word");

enum class Rule : int { adam, adamw, sgd, momentum };  // RULES in minegan_fast/ops/row_update.py

struct RowStep {
  double lr, beta1, beta2, log_beta1, log_beta2, eps, decay, momentum, average;  // logarithms to the base 2
};

// Steps every row with a gradient (grads[i] may be null), g = grad / grad_scale, t = ++step:
//   adam, sgd:  g += decay leaf        adamw:  leaf *= 1 - lr decay
//   adam(w):    mean += (1 - beta1)(g - mean),  square = beta2 square + (1 - beta2) g²
//               leaf -= lr / (1 - beta1^t) mean / (√square / √(1 - beta2^t) + eps)
//   momentum:   mean = momentum mean + g,  leaf -= lr mean
//   sgd:        leaf -= lr g
// then average += step.average (leaf - average), also without a gradient, and weight[rows] = leaf.
// Leaves and what lies as they do have the first dtype, weights the second: the same, or float32 with bfloat16 or
// float16. grad_scale may be null; so may found_inf: where it is not 0, nothing changes.
void row_update_cpu(DType, DType weight_dtype, Rule, const RowTensor* tensors, const void* const* grads, int64_t n,
                    const RowStep& step, const float* grad_scale, const float* found_inf, int threads);

#ifdef MINEGAN_CUDA
// A work item: rows [row, row + rows), or of one row longer than 1024 elements the part-th 1024. A row belongs to one
// item or, part by part, to items of its own.
struct RowItem {
  int32_t tensor, row, rows, part;
};

std::string row_update_cuda_problem(int device);  // "", or why the device cannot run the kernels of row_update.cu

// All pointers are on the device; lr, a float or a double, takes the place of step.lr unless it is null.
void row_update_cuda(DType, DType weight_dtype, Rule, const RowTensor* tensors, const uintptr_t* grads,
                     const RowItem* items, int64_t n, const RowStep& step, const void* lr, bool lr_is_float,
                     const float* grad_scale, const float* found_inf, int device, uintptr_t stream);
#endif

// ---- row_score ----
// An entry of the table of gradients, 6 words of 8 bytes: `dense_table` in minegan_fast/ops/row_score.py.
struct ScoredRows {
  const void *g, *w;  // [outer, C, inner]; w may be null but for Kind::product
  Axis axis;
  int64_t start;
};
static_assert(sizeof(ScoredRows) == 6 * 8, "every field is a word");

enum class Kind : int { square, abs, product };  // KINDS in minegan_fast/ops/row_score.py

// For each entry of the table, in double:
//   out[start + c] += factor * sum over o, i of t(g[o, c, i], w[o, c, i])
//   t = g^2 (square), |g| (abs), g w (product)
// No two entries share an element of out. The order of a sum depends on its entry's shape alone.
void row_score_cpu(DType, Kind, const ScoredRows* table, int64_t entries, double* out, double factor, int threads);

// ---- row_gradient ----
// A convolution in three dimensions; what has fewer has ones in front. Sizes that belong to x, then to gy.
struct Conv {
  int64_t B, C, k, groups;     // C: channels that a neuron sees; x has groups C of them, gy has k
  int64_t x_batch, x_channel;  // strides of x, whose planes are dense; gy is dense
  int64_t size[3], positions[3];
  int64_t kernel[3], stride[3], padding[3], dilation[3];
  bool transposed;
  int64_t y_channel() const { return positions[0] * positions[1] * positions[2]; }
  int64_t taps() const { return kernel[0] * kernel[1] * kernel[2]; }
};

// With sums in float, in an order that depends on the shape and the instruction set alone, not on how many threads:
//   dW[r, c, d] = sum over b, p of gy[b, r, p] x[b, c of r's group, p stride + d dilation - padding]
//   transposed:   sum over b, q of gy[b, r, q stride + d dilation - padding] x[b, c, q]
// x [B, groups C, *size], gy [B, k, *positions], dW [k, C, *kernel]; row r is of group r / (k / groups).
void row_gradient_cpu(const float* x, const float* gy, float* dW, const Conv&, int threads);

struct Strides {
  int64_t x[4], gy[5], channels;  // of x's B and *size; of gy's B, channels and *positions; how many channels gy has
};

// The same for one group and an x of at least 16 channels that lie side by side. gy may lie in any way, and row r is
// its channel rows[r], where rows is null channel r; x_batch and x_channel are not read. Sums of about 128 positions
// are in float, those of more in double. Throws std::out_of_range where gy has no such channel.
void row_gradient_last_cpu(const float* x, const float* gy, const int64_t* rows, float* dW, const Conv&, const Strides&,
                           int threads);

// ---- upfirdn2d ----
// Sizes are vertical, then horizontal. x [outer, *in, inner] and y [outer, *out, inner] as they lie in memory.
struct Resampling {
  int64_t outer, inner, in[2], out[2], kernel[2], up[2], down[2], before[2];
  bool separable;  // the filter is f [k] times itself, kernel[0] = kernel[1] = k; else f [kernel[0], kernel[1]]
  bool flip;
};

// p[m] = x[(m - before) / up] where that is a whole number and there is such a sample, else 0, on both axes.
//   y[j] = gain sum over t of f[k - 1 - t] p[j down + t]      (f[t] with flip)
// f is of the type that sums are in: float, for doubles double.
void upfirdn2d_cpu(DType, const void* x, const void* f, void* y, const Resampling&, double gain, int threads);

// ---- planes ----
// A tensor [B, C, P], P the positions of an image, that lies so or, `last`, as [B, P, C]. noise_batch is the stride
// along B of a noise [B or 1, P], 0 where the samples share it. Below k and sums [.., B, C] and the noise are in float,
// for doubles in double; sums are taken in an order that depends on the shape alone.
struct Planes {
  int64_t B, C, P;
  bool last;
  int64_t noise_batch;
};

// ---- modulated_conv2d ----
//   y = s x
void modulated_conv2d_modulate_cpu(DType, const void* x, const void* s, void* y, const Planes&, int threads);
//   gx = s gy,   gs = sum over p of gy x
void modulated_conv2d_backward_cpu(DType, const void* gy, const void* x, const void* s, void* gx, void* gs,
                                   const Planes&, int threads);
//   dgy = s hx + hs x,   dx = hs gy,   ds = sum over p of hx gy;   k = s, hs
void modulated_conv2d_double_backward_cpu(DType, const void* hx, const void* gy, const void* x, const void* k,
                                          void* dgy, void* dx, void* ds, const Planes&, int threads);

// ---- noise_bias_act ----
// With u = d c + f n + h and m = gain where u > 0, else slope gain; slope, gain > 0, and y's sign is u's:
//   y = m u                                                                                       k = d, f, h
// n, the noise, may be null.
void noise_bias_act_cpu(DType, const void* c, const void* noise, const void* k, void* y, const Planes&, double slope,
                        double gain, int threads);
//   gc = m d gy,   sums = sum over p of m gy (y / m - f n - h), of m gy n, of m gy                k = d, f, h
void noise_bias_act_backward_cpu(DType, const void* gy, const void* y, const void* noise, const void* k, void* gc,
                                 void* sums, const Planes&, double slope, double gain, int threads);
//   dgy = m (d hc + e y / m + f n + h),   dy = e gy,   dd = sum over p of m gy hc                 k = d, e, f, h
void noise_bias_act_double_backward_cpu(DType, const void* hc, const void* gy, const void* y, const void* noise,
                                        const void* k, void* dgy, void* dy, void* dd, const Planes&, double slope,
                                        double gain, int threads);

// ---- minibatch_stddev ----
// A batch of size * groups samples, sample i in group i mod groups, of C channels in `features` equal runs.
struct Groups {
  int64_t size, groups, C, pixels, features;
  bool channels_last;
};

// With u the mean over a group and s = sqrt(mean over the group of (x - u)² + 1e-8), both of an element, K elements in
// a feature:
//   y = [x, mean over the feature of s]          y [B, C + features, pixels], as dy, ddy
//   dx = dy + D / (K size s) (x - u)             D [groups, features], of the type that sums are in
//   a = sum over the group of (x - u) ddx / (size s),  v = mean over the group of ddx
//   ddy = [ddx, mean over the feature of a],     gx = D / (K size s) (ddx - v - a (x - u) / s)
void minibatch_stddev_cpu(DType, const void* x, void* y, const Groups&, int threads);
void minibatch_stddev_backward_cpu(DType, const void* dy, const void* D, const void* x, void* dx, const Groups&,
                                   int threads);
void minibatch_stddev_double_backward_cpu(DType, const void* ddx, const void* D, const void* x, void* ddy, void* gx,
                                          const Groups&, int threads);

// ---- demodulation ----
// Rows of a weight: element (r, i, k) lies at r row_stride + i input_stride + k tap_stride. float and double alone.
struct WeightRows {
  int64_t rows, I, K, row_stride, input_stride, tap_stride;
};
// s, gs [B, I], q [O, I], d, gd [B, O], w and gw as WeightRows says; with g = -gd d^3:
//   q = sum over k of w^2,     d = 1 / sqrt(sum over i of s^2 q + eps),     gs = s sum over o of g q,
//   gw[r] = w[r] sum over b of g[b, o] s^2,     o = rows[r], or r without rows
void demodulation_cpu(DType, const void* s, const void* w, void* d, void* q, int64_t B, const WeightRows&, double eps,
                      int threads);
void demodulation_styles_cpu(DType, const void* gd, const void* d, const void* s, const void* q, void* gs, int64_t B,
                             int64_t O, int64_t I, int threads);
void demodulation_rows_cpu(DType, const void* gd, const void* d, const void* s, const void* w, const int64_t* rows,
                           void* gw, int64_t B, int64_t O, const WeightRows&, int threads);

// ---- manhattan ----
// p, hp [r, D], q, hq [c, D], A [r, c]; sums in float, in an order that depends on the shape alone:
//   t[i, j]   = sum over d of |p[i, d] - q[j, d]|
//   s[i, j]   = sum over d of sign(p[i, d] - q[j, d]) (hp[i, d] - hq[j, d])
//   out[i, d] = sum over j of A[i, j] sign(p[i, d] - q[j, d])
void manhattan_distance_cpu(const float* p, const float* q, float* t, int64_t r, int64_t c, int64_t D, int threads);
void manhattan_slopes_cpu(const float* p, const float* q, const float* hp, const float* hq, float* s, int64_t r,
                          int64_t c, int64_t D, int threads);
void manhattan_signs_cpu(const float* A, const float* p, const float* q, float* out, int64_t r, int64_t c, int64_t D,
                         int threads);

// ---- miner ----
// Codes of KINDS, ACTIVATIONS and EPILOGUES in minegan_fast/ops/_miner_program.py, where the tasks are described.
enum class MinerKind : int { product, outer, project, along, twice };
enum class MinerActivation : int { linear, relu, lrelu, tanh };
enum class MinerEpilogue : int { value, slope, second };
constexpr int kMinerTerms = 4, kMinerAdds = 2;

// Where an element lies: in tensors[tensor], at offset + its miner, row and sample times these strides. A tensor of -1
// is scratch memory, one of -2 is none.
struct MinerRows {
  int64_t tensor, offset, miner, row, sample;
};

// Of a matrix `row` and `sample` are the strides of its rows and columns. scratch: where the chain's scratch begins
// among that of all, scratch_rows: those of one miner.
struct MinerTask {
  int64_t kind, step, chain, miners, rows, columns, terms, adds, activation, epilogue, scratch, scratch_rows;
  int64_t depth[kMinerTerms];
  MinerRows out, raw, copy, h, p, q, add[kMinerAdds], matrix[kMinerTerms], source[kMinerTerms];
  double gain, add_scale[kMinerAdds], scale[kMinerTerms];
};
static_assert(sizeof(MinerTask) == 103 * 8, "every field is a word");  // WORDS

// Runs tasks, those of a chain together and in their order. A sum has one order, whatever the threads.
void miner_cpu(DType, const MinerTask* tasks, int64_t count, void* const* tensors, int threads);

// ---- mmd ----
enum class Kernel : int { gaussian, laplacian, polynomial, energy };  // KERNELS in minegan_fast/ops/mmd.py

// t [rows, columns] comes as <p, q>, and s as <p, hq> + <hp, q>; for the laplacian they are |p - q|_1 and the slopes
// above. u is what f is of, v its derivative along h:
//   gaussian     u = op + oq - 2 <p, q>   v = hop + hoq - s    f(u) = sum of exp(c u)
//   laplacian    u = |p - q|_1            v = s                f(u) = sum of exp(c u)
//   polynomial   u = op + oq + <p, q>     v = hop + hoq + s    f(u) = (b + c u)^3 - b^3
//   energy       u = op + oq - 2 <p, q>   v = hop + hoq - s    f(u) = sqrt(op) + sqrt(oq) - sqrt(u)
// `numbers` are the c; of polynomial c, b. squarings[n] > 0: exp(c[n] u) is exp(c[n - 1] u) squared so often.
//   totals[i] = sum over j of weight f(u)              j > i alone with `diagonal`
//   order -1    t = weight f(u)
//   order 1, 2  t = A = weight f'(u)                   gaussian, energy: twice that
//   order 2     s = B = weight f''(u) v                gaussian, energy: 4 times that
// hp, hq, hop, hoq and s are read for order 2 alone.
struct MmdTile {
  const float *p, *q, *hp, *hq, *op, *hop, *oq, *hoq;
  const double* numbers;
  float *t, *s;
  double* totals;
  int64_t rows, columns, D, stride;  // of p, q, hp and hq D elements a row, rows `stride` apart
  const int64_t* squarings;
  int64_t count;  // of them, one for each c
  double weight;
  bool diagonal;
};
void mmd_tile_cpu(const MmdTile&, Kernel, int order, int threads);

// ---- mmd_groups ----
// A group of features: x [N, D] and y [M, D], norms [M] = |y|², xx [N, N] = <x, x> and xy [N, M] = <x, y>, in place.
struct MmdGroup {
  const float *x, *y, *norms;
  float *xx, *xy;
  const double* numbers;
  const int64_t* squarings;
  int64_t count;  // of both
  int64_t D;
};

// With f(t) = sum of exp(c t) over the group's numbers, t = |x_i - x_j|² or |x_i - y_j|², w = within / count and
// v = across / count:
//   sums[group] = sum over i, j != i of w f + sum over i, j of v f, NaN where x is not finite
//   gradient    xx[i, j] = -4 w f',  xy[i, j] = -2 v f',  xx[i, i] = minus the sum of all others of both rows,
// so that xx x + xy y is the gradient of the group's sum by x. Rows of x and of y are `stride` apart.
void mmd_groups_cpu(const MmdGroup* groups, int64_t count, int64_t N, int64_t M, int64_t stride, double within,
                    double across, bool gradient, double* sums, int threads);

// ---- penalty ----
// `count` samples of `length` elements that lie densely, in any order, `stride` apart in g and `out_stride` in dg.
struct Samples {
  int64_t count, length, stride, out_stride;
};

struct Norm {
  double center, decay, parts;
  bool squared;
};

// With q_i the sum of the squares of sample i, r_i = sqrt(q_i / parts), m = mean where given, else center,
// a = m + decay (mean of r - m), and u_i = 2 / count (r_i - a - decay (mean of r - a)):
//   lengths = r,  new_mean = a,  penalty = mean of (r_i - a)²,  scale_i = u_i / (parts r_i), 0 where r_i is
//   squared: penalty = mean of q_i, scale_i = 2 / count
//   dg_i = dpenalty scale_i g_i
// g, dg are of the dtype, all others of the type that its arithmetic is in. The order of a sum depends on the shape
// alone.
void penalty_cpu(DType, const void* g, const void* mean, void* penalty, void* lengths, void* scale, void* new_mean,
                 const Samples&, const Norm&, int threads);
void penalty_backward_cpu(DType, const void* g, const void* scale, const void* dpenalty, void* dg, const Samples&,
                          int threads);
// alpha_i in [0, 1): the first number of Philox4x32-10 for the counter (i, offset, offset >> 32, 0).
void penalty_philox_cpu(uint64_t seed, uint64_t offset, float* alpha, int64_t count);

}  // namespace minegan
