// Calls the CUDA launchers of csrc/ as harness.py asks: on standard input the buffers and the arguments, on standard
// output what comes of it. Each buffer is an allocation of exactly its size.
//
//   in:   n, then n times: address, size, 1 where it may hold addresses of others, its bytes
//         function, its arguments in order: numbers, addresses, the fields of a struct
//   out:  what the function returns, 0 for void; the bytes of all buffers that hold no addresses, by address
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <map>
#include <string>
#include <type_traits>
#include <vector>

#include "ops.h"

namespace {

struct Buffer {
  char* here;
  size_t size;
  bool table;
};
std::map<uintptr_t, Buffer> buffers;  // by the address that the caller knows

// Null, or the place here of a caller's address; `where` that is none stays what it is.
bool translate(uintptr_t& where) {
  auto found = buffers.upper_bound(where);
  if (found == buffers.begin()) return false;
  --found;
  const uintptr_t offset = where - found->first;
  if (offset >= found->second.size) return false;
  where = reinterpret_cast<uintptr_t>(found->second.here) + offset;
  return true;
}

std::string word() {
  std::string text;
  std::cin >> text;
  return text;
}

int64_t whole() { return std::stoll(word()); }
double number() { return std::strtod(word().c_str(), nullptr); }

template <class A>
A argument() {
  if constexpr (std::is_pointer_v<A>) {
    uintptr_t where = whole();
    if (where && !translate(where)) throw std::out_of_range("an address that lies in no buffer");
    return reinterpret_cast<A>(where);
  } else if constexpr (std::is_same_v<A, minegan::Axis>) {
    return {whole(), whole(), whole()};
  } else if constexpr (std::is_same_v<A, minegan::RowStep>) {
    return {number(), number(), number(), number(), number(), number(), number(), number(), number()};
  } else if constexpr (std::is_floating_point_v<A>) {
    return number();
  } else {
    return A(whole());
  }
}

template <class R, class... A>
int64_t call(R (*function)(A...)) {
  const std::tuple<std::decay_t<A>...> arguments{argument<std::decay_t<A>>()...};  // braces: from left to right
  if constexpr (!std::is_void_v<R>) return std::apply(function, arguments);
  std::apply(function, arguments);
  return 0;
}

int64_t call(const std::string& function) {
  if (function == "bias_act_backward_splits") return call(minegan::bias_act_backward_splits);
  if (function == "bias_act_cuda") return call(minegan::bias_act_cuda);
  if (function == "bias_act_backward_cuda") return call(minegan::bias_act_backward_cuda);
  if (function == "row_update_cuda") return call(minegan::row_update_cuda);
  throw std::invalid_argument("no function " + function);
}

}  // namespace

int main() {
  std::ios::sync_with_stdio(false);
  for (std::string count; std::cin >> count;) {
    for (int64_t i = 0, n = std::stoll(count); i < n; ++i) {
      const uintptr_t address = whole();
      const size_t size = whole();
      const bool table = whole();
      char* const here = static_cast<char*>(std::malloc(size));
      std::cin.ignore(1);
      std::cin.read(here, size);
      buffers[address] = {here, size, table};
    }
    for (const auto& [address, buffer] : buffers)
      if (buffer.table)
        for (size_t at = 0; at < buffer.size; at += sizeof(uintptr_t))
          translate(*reinterpret_cast<uintptr_t*>(buffer.here + at));
    const int64_t result = call(word());
    std::cout << result << '\n';
    for (const auto& [address, buffer] : buffers) {
      if (!buffer.table) std::cout.write(buffer.here, buffer.size);
      std::free(buffer.here);
    }
    std::cout.flush();
    buffers.clear();
  }
}
