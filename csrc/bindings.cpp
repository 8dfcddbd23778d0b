// The only file that knows Python. Pointers come as integers, 0 for none; the GIL is released while a function runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <tuple>

#include "ops.h"

namespace py = pybind11;
using minegan::Axis;
using minegan::DType;

namespace {

void* at(uintptr_t address) { return reinterpret_cast<void*>(address); }

using Pair = std::array<int64_t, 2>;

minegan::Resampling resampling(Pair counts, Pair in, Pair out, std::vector<int64_t> kernel, Pair up, Pair down,
                               Pair before, bool flip) {
  return {
      counts[0],      counts[1],          {in[0], in[1]},         {out[0], out[1]},   {kernel.front(), kernel.back()},
      {up[0], up[1]}, {down[0], down[1]}, {before[0], before[1]}, kernel.size() == 1, flip};
}

using Axes = std::array<std::array<int64_t, 3>, 6>;

minegan::Conv convolution(const std::array<int64_t, 6>& counts, const Axes& axes, bool transposed) {
  minegan::Conv shape{};
  std::tie(shape.B, shape.C, shape.k, shape.groups, shape.x_batch, shape.x_channel) = std::tuple_cat(counts);
  int64_t (*const fields[])[3] = {&shape.size,   &shape.positions, &shape.kernel,
                                  &shape.stride, &shape.padding,   &shape.dilation};
  for (int i = 0; i < 6; ++i) std::copy(axes[i].begin(), axes[i].end(), *fields[i]);
  shape.transposed = transposed;
  return shape;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  using Address = uintptr_t;
  const py::call_guard<py::gil_scoped_release> no_gil;

  m.def("cpu_isa", [] { return int(minegan::current_isa()); }, "0: baseline, 1: AVX2 + FMA, 2: AVX-512");
  m.def(
      "set_cpu_isa",
      [](int isa) {
        if (isa < 0 || isa > int(minegan::best_isa()))
          throw std::invalid_argument("this CPU has no such instruction set");
        minegan::current_isa() = minegan::Isa(isa);
      },
      "For tests: makes the CPU loops run as compiled for a lesser instruction set.");

  m.def(
      "bias_act_cpu",
      [](int dtype, Address x, Address b, Address y, Address out, int64_t outer, int64_t C, int64_t inner, double slope,
         double gain, int threads) {
        minegan::bias_act_cpu(DType(dtype), at(x), at(b), at(y), at(out), Axis{outer, C, inner}, slope, gain, threads);
      },
      no_gil);
  m.def(
      "bias_act_backward_cpu",
      [](int dtype, Address dy, Address y, Address dx, Address db, int64_t outer, int64_t C, int64_t inner,
         double slope, double gain, int threads) {
        minegan::bias_act_backward_cpu(DType(dtype), at(dy), at(y), at(dx), at(db), Axis{outer, C, inner}, slope, gain,
                                       threads);
      },
      no_gil);
  m.def(
      "row_update_cpu",
      [](int dtype, int weight_dtype, int rule, Address tensors, Address grads, int64_t n, Address step,
         Address grad_scale, Address found_inf, int threads) {
        minegan::row_update_cpu(DType(dtype), DType(weight_dtype), minegan::Rule(rule),
                                (const minegan::RowTensor*)tensors, (const void* const*)grads, n,
                                *(const minegan::RowStep*)step, (const float*)grad_scale, (const float*)found_inf,
                                threads);
      },
      no_gil);

  m.def(
      "row_score_cpu",
      [](int dtype, int kind, Address table, int64_t entries, Address out, double factor, int threads) {
        minegan::row_score_cpu(DType(dtype), minegan::Kind(kind), (const minegan::ScoredRows*)at(table), entries,
                               (double*)at(out), factor, threads);
      },
      no_gil);

  m.def(
      "row_gradient_cpu",
      [](Address x, Address gy, Address dW, const std::array<int64_t, 6>& counts, const Axes& axes, bool transposed,
         int threads) {
        const auto shape = convolution(counts, axes, transposed);
        minegan::row_gradient_cpu((const float*)at(x), (const float*)at(gy), (float*)at(dW), shape, threads);
      },
      no_gil);
  m.def(
      "row_gradient_last_cpu",
      [](Address x, Address gy, Address rows, Address dW, const std::array<int64_t, 4>& counts, const Axes& axes,
         std::array<int64_t, 4> x_strides, std::array<int64_t, 5> gy_strides, bool transposed, int threads) {
        const auto shape = convolution({counts[0], counts[1], counts[2], 1, 0, 0}, axes, transposed);
        minegan::Strides strides{};
        strides.channels = counts[3];
        std::copy(x_strides.begin(), x_strides.end(), strides.x);
        std::copy(gy_strides.begin(), gy_strides.end(), strides.gy);
        minegan::row_gradient_last_cpu((const float*)at(x), (const float*)at(gy), (const int64_t*)at(rows),
                                       (float*)at(dW), shape, strides, threads);
      },
      no_gil);

  m.def(
      "miner_cpu",
      [](int dtype, Address tasks, int64_t count, const std::vector<Address>& tensors, int threads) {
        minegan::miner_cpu(DType(dtype), (const minegan::MinerTask*)at(tasks), count, (void* const*)tensors.data(),
                           threads);
      },
      no_gil);

  m.def(
      "upfirdn2d_cpu",
      [](int dtype, Address x, Address f, Address y, Pair counts, Pair in, Pair out, std::vector<int64_t> kernel,
         Pair up, Pair down, Pair before, bool flip, double gain, int threads) {
        minegan::upfirdn2d_cpu(DType(dtype), at(x), at(f), at(y),
                               resampling(counts, in, out, kernel, up, down, before, flip), gain, threads);
      },
      no_gil);

  // B, C, P, last, noise_batch
  using Shape = std::array<int64_t, 5>;
  const auto planes = [](const Shape& s) { return minegan::Planes{s[0], s[1], s[2], s[3] != 0, s[4]}; };
  m.def(
      "modulated_conv2d_modulate_cpu",
      [planes](int dtype, Address x, Address s, Address y, const Shape& shape, int threads) {
        minegan::modulated_conv2d_modulate_cpu(DType(dtype), at(x), at(s), at(y), planes(shape), threads);
      },
      no_gil);
  m.def(
      "modulated_conv2d_backward_cpu",
      [planes](int dtype, Address gy, Address x, Address s, Address gx, Address gs, const Shape& shape, int threads) {
        minegan::modulated_conv2d_backward_cpu(DType(dtype), at(gy), at(x), at(s), at(gx), at(gs), planes(shape),
                                               threads);
      },
      no_gil);
  m.def(
      "modulated_conv2d_double_backward_cpu",
      [planes](int dtype, Address hx, Address gy, Address x, Address k, Address dgy, Address dx, Address ds,
               const Shape& shape, int threads) {
        minegan::modulated_conv2d_double_backward_cpu(DType(dtype), at(hx), at(gy), at(x), at(k), at(dgy), at(dx),
                                                      at(ds), planes(shape), threads);
      },
      no_gil);
  m.def(
      "noise_bias_act_cpu",
      [planes](int dtype, Address c, Address noise, Address k, Address y, const Shape& shape, double slope, double gain,
               int threads) {
        minegan::noise_bias_act_cpu(DType(dtype), at(c), at(noise), at(k), at(y), planes(shape), slope, gain, threads);
      },
      no_gil);
  m.def(
      "noise_bias_act_backward_cpu",
      [planes](int dtype, Address gy, Address y, Address noise, Address k, Address gc, Address sums, const Shape& shape,
               double slope, double gain, int threads) {
        minegan::noise_bias_act_backward_cpu(DType(dtype), at(gy), at(y), at(noise), at(k), at(gc), at(sums),
                                             planes(shape), slope, gain, threads);
      },
      no_gil);
  m.def(
      "noise_bias_act_double_backward_cpu",
      [planes](int dtype, Address hc, Address gy, Address y, Address noise, Address k, Address dgy, Address dy,
               Address dd, const Shape& shape, double slope, double gain, int threads) {
        minegan::noise_bias_act_double_backward_cpu(DType(dtype), at(hc), at(gy), at(y), at(noise), at(k), at(dgy),
                                                    at(dy), at(dd), planes(shape), slope, gain, threads);
      },
      no_gil);
  m.def(
      "minibatch_stddev_cpu",
      [](int dtype, Address x, Address y, int64_t size, int64_t groups, int64_t C, int64_t pixels, int64_t features,
         bool channels_last, int threads) {
        minegan::minibatch_stddev_cpu(DType(dtype), at(x), at(y), {size, groups, C, pixels, features, channels_last},
                                      threads);
      },
      no_gil);
  m.def(
      "minibatch_stddev_backward_cpu",
      [](int dtype, Address dy, Address D, Address x, Address dx, int64_t size, int64_t groups, int64_t C,
         int64_t pixels, int64_t features, bool channels_last, int threads) {
        minegan::minibatch_stddev_backward_cpu(DType(dtype), at(dy), at(D), at(x), at(dx),
                                               {size, groups, C, pixels, features, channels_last}, threads);
      },
      no_gil);
  m.def(
      "minibatch_stddev_double_backward_cpu",
      [](int dtype, Address ddx, Address D, Address x, Address ddy, Address gx, int64_t size, int64_t groups, int64_t C,
         int64_t pixels, int64_t features, bool channels_last, int threads) {
        minegan::minibatch_stddev_double_backward_cpu(DType(dtype), at(ddx), at(D), at(x), at(ddy), at(gx),
                                                      {size, groups, C, pixels, features, channels_last}, threads);
      },
      no_gil);
  m.def(
      "penalty_cpu",
      [](int dtype, Address g, Address mean, Address penalty, Address lengths, Address scale, Address new_mean,
         int64_t count, int64_t length, int64_t stride, double center, double decay, int64_t parts, bool squared,
         int threads) {
        minegan::penalty_cpu(DType(dtype), at(g), at(mean), at(penalty), at(lengths), at(scale), at(new_mean),
                             {count, length, stride, 0}, {center, decay, double(parts), squared}, threads);
      },
      no_gil);
  m.def(
      "penalty_philox_cpu",
      [](uint64_t seed, uint64_t offset, Address alpha, int64_t count) {
        minegan::penalty_philox_cpu(seed, offset, (float*)at(alpha), count);
      },
      no_gil);
  m.def(
      "penalty_backward_cpu",
      [](int dtype, Address g, Address scale, Address dpenalty, Address dg, int64_t count, int64_t length,
         int64_t stride, int64_t out_stride, int threads) {
        minegan::penalty_backward_cpu(DType(dtype), at(g), at(scale), at(dpenalty), at(dg),
                                      {count, length, stride, out_stride}, threads);
      },
      no_gil);

  // rows, I, K and their strides
  using Rows = std::array<int64_t, 6>;
  m.def(
      "demodulation_cpu",
      [](int dtype, Address s, Address w, Address d, Address q, int64_t B, const Rows& n, double eps, int threads) {
        minegan::demodulation_cpu(DType(dtype), at(s), at(w), at(d), at(q), B, {n[0], n[1], n[2], n[3], n[4], n[5]},
                                  eps, threads);
      },
      no_gil);
  m.def(
      "demodulation_styles_cpu",
      [](int dtype, Address gd, Address d, Address s, Address q, Address gs, const std::array<int64_t, 3>& n,
         int threads) {
        minegan::demodulation_styles_cpu(DType(dtype), at(gd), at(d), at(s), at(q), at(gs), n[0], n[1], n[2], threads);
      },
      no_gil);
  m.def(
      "demodulation_rows_cpu",
      [](int dtype, Address gd, Address d, Address s, Address w, Address rows, Address gw, int64_t B, int64_t O,
         const Rows& n, int threads) {
        minegan::demodulation_rows_cpu(DType(dtype), at(gd), at(d), at(s), at(w), (const int64_t*)at(rows), at(gw), B,
                                       O, {n[0], n[1], n[2], n[3], n[4], n[5]}, threads);
      },
      no_gil);

  // r, c, D
  using Sizes = std::array<int64_t, 3>;
  m.def(
      "manhattan_distance_cpu",
      [](Address p, Address q, Address t, const Sizes& n, int threads) {
        minegan::manhattan_distance_cpu((const float*)at(p), (const float*)at(q), (float*)at(t), n[0], n[1], n[2],
                                        threads);
      },
      no_gil);
  m.def(
      "manhattan_slopes_cpu",
      [](Address p, Address q, Address hp, Address hq, Address s, const Sizes& n, int threads) {
        minegan::manhattan_slopes_cpu((const float*)at(p), (const float*)at(q), (const float*)at(hp),
                                      (const float*)at(hq), (float*)at(s), n[0], n[1], n[2], threads);
      },
      no_gil);
  m.def(
      "manhattan_signs_cpu",
      [](Address A, Address p, Address q, Address out, const Sizes& n, int threads) {
        minegan::manhattan_signs_cpu((const float*)at(A), (const float*)at(p), (const float*)at(q), (float*)at(out),
                                     n[0], n[1], n[2], threads);
      },
      no_gil);
  m.def(
      "mmd_tile_cpu",
      [](const std::array<Address, 12>& a, const Sizes& n, const std::vector<int64_t>& squarings, int kernel,
         double weight, bool diagonal, int order, int threads) {
        const auto in = [&](int i) { return (const float*)at(a[i]); };
        const minegan::MmdTile tile{in(0),
                                    in(1),
                                    in(2),
                                    in(3),
                                    in(4),
                                    in(5),
                                    in(6),
                                    in(7),
                                    (const double*)at(a[8]),
                                    (float*)at(a[9]),
                                    (float*)at(a[10]),
                                    (double*)at(a[11]),
                                    n[0],
                                    n[1],
                                    n[2],
                                    n[2],
                                    squarings.data(),
                                    int64_t(squarings.size()),
                                    weight,
                                    diagonal};
        minegan::mmd_tile_cpu(tile, minegan::Kernel(kernel), order, threads);
      },
      no_gil);
  m.def(
      "mmd_groups_cpu",
      [](const std::array<Address, 7>& a, const std::vector<int64_t>& squarings, const std::vector<int64_t>& sizes,
         const std::vector<int64_t>& counts, std::array<int64_t, 2> rows, double within, double across, bool gradient,
         int threads) {
        const auto [N, M] = rows;
        const float *x = (const float*)at(a[0]), *y = (const float*)at(a[1]), *norms = (const float*)at(a[2]);
        const auto* numbers = (const double*)at(a[3]);
        float *xx = (float*)at(a[4]), *xy = (float*)at(a[5]);
        std::vector<minegan::MmdGroup> groups;
        int64_t column = 0, first = 0;
        for (int64_t g = 0; g < int64_t(sizes.size()); ++g) {
          groups.push_back({x + column, y + column, norms + g * M, xx + g * N * N, xy + g * N * M, numbers + first,
                            &squarings[first], counts[g], sizes[g]});
          column += sizes[g];
          first += counts[g];
        }
        minegan::mmd_groups_cpu(groups.data(), int64_t(groups.size()), N, M, column, within, across, gradient,
                                (double*)at(a[6]), threads);
      },
      no_gil);

#ifdef MINEGAN_CUDA
  m.attr("cuda_version") = MINEGAN_CUDA_VERSION;
  m.attr("cuda_architectures") = MINEGAN_CUDA;
  m.def(
      "cuda_problem",
      [](int device) {
        // One kernel of each .cu file: the kernels of a file are compiled for the same architectures.
        for (const auto problem : {minegan::bias_act_cuda_problem, minegan::row_update_cuda_problem})
          if (const std::string found = problem(device); !found.empty()) return found;
        return std::string();
      },
      no_gil, "Why the device cannot run the CUDA kernels; empty where it can.");
  m.def(
      "bias_act_cuda",
      [](int dtype, Address x, Address b, Address y, Address out, int64_t outer, int64_t C, int64_t inner, double slope,
         double gain, int device, Address stream) {
        minegan::bias_act_cuda(DType(dtype), at(x), at(b), at(y), at(out), Axis{outer, C, inner}, slope, gain, device,
                               stream);
      },
      no_gil);
  m.def(
      "bias_act_backward_cuda",
      [](int dtype, Address dy, Address y, Address dx, Address db, Address partial, int64_t outer, int64_t C,
         int64_t inner, double slope, double gain, int device, Address stream) {
        minegan::bias_act_backward_cuda(DType(dtype), at(dy), at(y), at(dx), at(db), at(partial), Axis{outer, C, inner},
                                        slope, gain, device, stream);
      },
      no_gil);
  m.def("bias_act_backward_splits", [](int64_t outer, int64_t C, int64_t inner) {
    return minegan::bias_act_backward_splits(Axis{outer, C, inner});
  });
  m.def(
      "row_update_cuda",
      [](int dtype, int weight_dtype, int rule, Address tensors, Address grads, Address items, int64_t n, Address step,
         Address lr, bool lr_is_float, Address grad_scale, Address found_inf, int device, Address stream) {
        minegan::row_update_cuda(DType(dtype), DType(weight_dtype), minegan::Rule(rule),
                                 (const minegan::RowTensor*)tensors, (const uintptr_t*)grads,
                                 (const minegan::RowItem*)items, n, *(const minegan::RowStep*)step, at(lr), lr_is_float,
                                 (const float*)grad_scale, (const float*)found_inf, device, stream);
      },
      no_gil);
#else
  m.attr("cuda_version") = "";
  m.attr("cuda_architectures") = "";
#endif
}
