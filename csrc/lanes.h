// L numbers side by side, floats if nothing else is said, which one instruction multiplies and adds.
#pragma once

namespace minegan {
namespace {

#ifdef __GNUC__
template <int L, class T = float>
struct Lanes {
  typedef T type __attribute__((vector_size(L * sizeof(T))));
};
#else
template <int L, class T = float>
struct Lanes {
  struct type {
    T at[L];
    friend type operator*(type a, const type& b) {
      for (int j = 0; j < L; ++j) a.at[j] *= b.at[j];
      return a;
    }
    friend type operator*(type a, T b) {
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
