// L floats side by side, which one instruction multiplies and adds.
#pragma once

namespace minegan {
namespace {

#ifdef __GNUC__
template <int L>
struct Lanes {
  typedef float type __attribute__((vector_size(L * 4)));
};
#else
template <int L>
struct Lanes {
  struct type {
    float at[L];
    friend type operator*(type a, const type& b) {
      for (int j = 0; j < L; ++j) a.at[j] *= b.at[j];
      return a;
    }
    friend type operator*(type a, float b) {
      for (int j = 0; j < L; ++j) a.at[j] *= b;
      return a;
    }
    void operator+=(const type& b) {
      for (int j = 0; j < L; ++j) at[j] += b.at[j];
    }
  };
};
#endif

}  // namespace
}  // namespace minegan
