// Runs the blocks of a kernel, two at a time, on one CPU thread. Each CUDA thread is a context of its own (makecontext)
// that runs to its next barrier, and a thread of its own to ThreadSanitizer, which knows its order to others by the
// barriers, fences and atomics of CUDA alone. So a race is found whichever way the threads happened to be run, within a
// block and between the blocks that run beside each other.
//
// This file is compiled without a sanitizer: its own memory is no kernel's business.
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "cuda_runtime.h"

// Of ThreadSanitizer; null without it.
extern "C" {
__attribute__((weak)) void __tsan_acquire(void*);
__attribute__((weak)) void __tsan_release(void*);
__attribute__((weak)) void* __tsan_get_current_fiber();
__attribute__((weak)) void* __tsan_create_fiber(unsigned);
__attribute__((weak)) void __tsan_destroy_fiber(void*);
__attribute__((weak)) void __tsan_switch_to_fiber(void*, unsigned);
}

namespace cuda_on_cpu {
namespace {

constexpr unsigned kBlocksAtOnce = 2, kWarp = 32, kMost = 256, kStack = 64 << 10;
constexpr unsigned kNoOrder = 1;  // a switch between fibers orders nothing

void acquire(void* what) {
  if (__tsan_acquire) __tsan_acquire(what);
}
void release(void* what) {
  if (__tsan_release) __tsan_release(what);
}
void* new_fiber() { return __tsan_create_fiber ? __tsan_create_fiber(0) : nullptr; }
void switch_to(void* fiber) {
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(fiber, kNoOrder);
}

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "cuda_on_cpu: %s\n", what);
  std::_Exit(3);
}

enum class State { ready, at_barrier, at_shuffle, done };
struct Block;

struct Thread {
  Indices indices{{}, {}, 1, 1};
  Block* block = nullptr;
  std::unique_ptr<char[]> stack{new char[kStack]};
  void* fiber = new_fiber();
  ucontext_t context;
  State state = State::done;
  bool odd = false;         // which of the block's two barriers is next
  uint64_t value = 0;       // that it gives in a shuffle
  bool fenced = false;      // atomics publish what came before the fence
  char fence = 0;           // its address stands for the fence
  std::vector<void*> seen;  // by atomics; the next fence orders what follows after their writers' fences
};

// A place for blocks, one after the other.
struct Block {
  bool runs = false;
  Thread threads[kMost];
  std::map<int, void*> shared;  // by line
  char barriers[2];             // their addresses stand for barriers: in turn, as the fast arrive before the slow leave
  char finished;                // its address stands for the ends of its threads
};

ucontext_t scheduler;
Thread* current;
const std::function<void()>* kernel;
void *host, *janitor;  // fibers: that of the launching thread, and one that comes after threads that are done
char launch;           // its address stands for the launch
cudaError_t last_error = cudaSuccess;

void pause(State state) {
  Thread* const self = current;
  self->state = state;
  switch_to(host);
  swapcontext(&self->context, &scheduler);
}

void live() {
  acquire(&launch);
  (*kernel)();
  release(&current->block->finished);
  pause(State::done);
}

void resume(Thread& thread) {
  current = &thread;
  switch_to(thread.fiber);
  swapcontext(&scheduler, &thread.context);
}

void start(Block& block, uint64_t number, dim3 grid, dim3 threads) {
  block.runs = true;
  for (unsigned i = 0; i < threads.x; ++i) {
    Thread& thread = block.threads[i];
    thread.block = &block;
    thread.indices = {{i, 0, 0}, {unsigned(number % grid.x), unsigned(number / grid.x), 0}, threads, grid};
    thread.state = State::ready;
    thread.odd = thread.fenced = false;
    thread.seen.clear();
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    makecontext(&thread.context, live, 0);
  }
}

// As the janitor: the host, who makes the memory of later blocks, must not come after the threads of this one.
void clear(Block& block) {
  block.runs = false;
  switch_to(janitor);
  acquire(&block.finished);
  for (auto& [line, memory] : block.shared) std::free(memory);
  block.shared.clear();
  switch_to(host);
}

// Lets threads [begin, end) go on if all of them that live wait for each other.
void let_go(Block& block, unsigned begin, unsigned end, State state) {
  for (unsigned i = begin; i < end; ++i) {
    const State at = block.threads[i].state;
    if (at != state && (at != State::done || state == State::at_shuffle)) return;
  }
  for (unsigned i = begin; i < end; ++i)
    if (block.threads[i].state == state) block.threads[i].state = State::ready;
}

}  // namespace

const Indices& indices() { return current->indices; }

void run(dim3 grid, dim3 threads, const std::function<void()>& function) {
  if (!grid.x || !grid.y || grid.x > 0x7fffffffu || grid.y > 65535 || !threads.x || threads.x > 1024) {
    last_error = cudaErrorInvalidConfiguration;
    return;
  }
  if (grid.z != 1 || threads.x > kMost || threads.y != 1 || threads.z != 1 || threads.x % kWarp)
    fail("no such grids here yet");
  static Block* const blocks = new Block[kBlocksAtOnce];
  static void* const fiber = new_fiber();
  kernel = &function;
  janitor = fiber;
  host = __tsan_get_current_fiber ? __tsan_get_current_fiber() : nullptr;
  release(&launch);
  uint64_t next = 0;
  bool forwards = true;  // the order of the threads, in turn: no kernel may lean on it
  for (bool moved = true; moved; forwards = !forwards) {
    moved = false;
    for (unsigned b = 0; b < kBlocksAtOnce; ++b)
      if (!blocks[b].runs && next < uint64_t(grid.x) * grid.y) start(blocks[b], next++, grid, threads);
    for (unsigned i = 0, all = kBlocksAtOnce * threads.x; i < all; ++i) {
      const unsigned at = forwards ? i : all - 1 - i;
      Thread& thread = blocks[at / threads.x].threads[at % threads.x];
      if (thread.state == State::ready) resume(thread), moved = true;
    }
    for (unsigned b = 0; b < kBlocksAtOnce; ++b) {
      Block& block = blocks[b];
      if (!block.runs) continue;
      let_go(block, 0, threads.x, State::at_barrier);
      for (unsigned w = 0; w < threads.x; w += kWarp) let_go(block, w, w + kWarp, State::at_shuffle);
      const auto done = [](const Thread& thread) { return thread.state == State::done; };
      if (std::all_of(block.threads, block.threads + threads.x, done)) clear(block);
    }
  }
  for (unsigned b = 0; b < kBlocksAtOnce; ++b) {
    if (blocks[b].runs) fail("threads wait at different barriers, or for one of their warp that has ended");
    acquire(&blocks[b].finished);
  }
}

// Of the present block: its array that is declared on this line.
void* shared_memory(int line, size_t bytes) {
  Thread* const self = current;
  void*& memory = self->block->shared[line];
  if (!memory) {
    switch_to(host);
    memory = std::malloc(bytes);
    std::memset(memory, 0xff, bytes);  // NaN: what nobody wrote shows in the result
    release(memory);
    switch_to(self->fiber);
  }
  acquire(memory);
  return memory;
}

uint64_t shuffle(unsigned mask, uint64_t value, unsigned lane) {
  if (mask != 0xffffffff) fail("no shuffles among some lanes here yet");
  Thread* const self = current;
  self->value = value;
  pause(State::at_shuffle);
  value = self->block->threads[self->indices.thread.x / kWarp * kWarp + lane].value;
  pause(State::at_shuffle);
  return value;
}

// A fence before the atomic: its writer's past up to the fence goes with the value. A fiber of its own carries it.
void before_atomic(void* address) {
  Thread* const self = current;
  pause(State::ready);
  if (!self->fenced || !__tsan_create_fiber) return;
  switch_to(host);
  void* const carrier = new_fiber();
  switch_to(carrier);
  acquire(&self->fence);
  release(address);
  switch_to(self->fiber);
  __tsan_destroy_fiber(carrier);
}

void after_atomic(void* address) { current->seen.push_back(address); }

}  // namespace cuda_on_cpu

cudaError_t cudaGetLastError() { return std::exchange(cuda_on_cpu::last_error, cudaSuccess); }

void __syncthreads() {
  using namespace cuda_on_cpu;
  Thread* const self = current;
  char* const barrier = &self->block->barriers[self->odd];
  self->odd = !self->odd;
  release(barrier);
  pause(State::at_barrier);
  acquire(barrier);
}

void __threadfence() {
  using namespace cuda_on_cpu;
  Thread* const self = current;
  for (void* address : self->seen) acquire(address);
  self->seen.clear();
  self->fenced = true;
  release(&self->fence);
}
