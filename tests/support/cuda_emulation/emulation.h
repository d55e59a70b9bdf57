// Runs a CUDA grid on one CPU thread: blocks one after another, the threads of a block as fibers.
//
// Every fiber runs until it waits at a barrier or in a warp's collective, or ends. When none can go on, the
// waits that are complete are released; if none is, the kernel hangs, which is reported with the lines at
// which threads wait. The order of the threads turns round from one such round to the next, so that most
// missing barriers give wrong values. A thread that ended is no longer waited for, as on the device.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 : uint3 {
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : uint3{x, y, z} {}
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace prcl::emulation {

constexpr size_t kStackBytes = 128 * 1024;
constexpr unsigned kMaxThreads = 1024, kMaxGridYz = 65535;
constexpr size_t kMaxDynamicBytes = 227 * 1024;

// The line of a call, where this is the default of a parameter.
struct Place {
  const char* file;
  int line;
  static Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
  bool operator==(const Place& other) const { return line == other.line && !strcmp(file, other.file); }
};

enum class State { kReady, kBarrier, kWarp, kDone };

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  ucontext_t entry;
  jmp_buf context;
  bool started = false;
  State state;
  uint3 thread;
  Place place;            // where it waits
  uint32_t mask;          // the lanes of the collective
  uint64_t sent;          // what it brings to the collective
  uint64_t received[32];  // what the lanes of `present` have brought
  uint32_t present;       // the lanes of the collective that have not ended
};

inline std::vector<std::unique_ptr<Fiber>> fibers;
inline size_t count = 0;  // fibers of the running block
inline Fiber* current = nullptr;
inline jmp_buf scheduler;
inline std::function<void()> body;
inline std::exception_ptr failure;
alignas(16) inline char dynamic_shared[kMaxDynamicBytes];
inline size_t dynamic_shared_bytes;
inline int barrier_votes;
inline std::recursive_mutex one_at_a_time;  // __shared__ variables are static

[[noreturn]] inline void fail(const std::string& what) {
  throw std::runtime_error("CUDA emulation: " + what);
}

inline size_t rank_in_block() {
  return threadIdx.x + size_t(blockDim.x) * (threadIdx.y + size_t(blockDim.y) * threadIdx.z);
}

// Out of line: a function that calls setjmp is not optimised.
__attribute__((noinline)) inline void wait(State state) {
  Fiber& self = *current;
  self.state = state;
  if (_setjmp(self.context) == 0) _longjmp(scheduler, 1);
}

inline void run_fiber() {
  for (;;) {
    try {
      body();
    } catch (...) {
      failure = std::current_exception();
    }
    wait(State::kDone);
  }
}

__attribute__((noinline)) inline void resume(Fiber& fiber) {
  threadIdx = fiber.thread;
  current = &fiber;
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.context, 1);
  fiber.started = true;
  getcontext(&fiber.entry);
  fiber.entry.uc_stack.ss_sp = fiber.stack.get();
  fiber.entry.uc_stack.ss_size = kStackBytes;
  makecontext(&fiber.entry, run_fiber, 0);
  setcontext(&fiber.entry);
}

// Lets the lanes go whose collective is complete: all that it names wait at the same line with the same mask.
inline bool release_warp(size_t first) {
  bool released = false;
  const size_t lanes = std::min<size_t>(32, count - first);
  for (size_t leader = 0; leader < lanes; ++leader) {
    const Fiber& reference = *fibers[first + leader];
    if (reference.state != State::kWarp) continue;
    uint64_t sent[32];
    memset(sent, 0xFF, sizeof(sent));  // NaN, or -1, from lanes that are not there
    uint32_t present = 0;
    bool complete = true;
    for (size_t lane = 0; lane < lanes; ++lane) {
      const Fiber& fiber = *fibers[first + lane];
      if (!(reference.mask >> lane & 1) || fiber.state == State::kDone) continue;
      complete &=
          fiber.state == State::kWarp && fiber.mask == reference.mask && fiber.place == reference.place;
      sent[lane] = fiber.sent;
      present |= 1u << lane;
    }
    if (!complete) continue;
    for (size_t lane = 0; lane < lanes; ++lane) {
      Fiber& fiber = *fibers[first + lane];
      if (!(present >> lane & 1)) continue;
      memcpy(fiber.received, sent, sizeof(sent));
      fiber.present = present;
      fiber.state = State::kReady;
    }
    released = true;
  }
  return released;
}

// Lets the block go if every thread that has not ended waits at the same barrier.
inline bool release_barrier() {
  const Fiber* first = nullptr;
  int votes = 0;
  for (size_t i = 0; i < count; ++i) {
    const Fiber& fiber = *fibers[i];
    if (fiber.state == State::kDone) continue;
    if (first == nullptr) first = &fiber;
    if (fiber.state != State::kBarrier || !(fiber.place == first->place)) return false;
    votes += fiber.sent != 0;
  }
  barrier_votes = votes;
  for (size_t i = 0; i < count; ++i) {
    if (fibers[i]->state == State::kBarrier) fibers[i]->state = State::kReady;
  }
  return true;
}

[[noreturn]] inline void report_divergence() {
  std::set<std::string> places;
  for (size_t i = 0; i < count; ++i) {
    const Fiber& fiber = *fibers[i];
    if (fiber.state == State::kDone) continue;
    const std::string what = fiber.state == State::kBarrier ? "a barrier" : "a warp's collective";
    places.insert(what + " at " + fiber.place.file + ":" + std::to_string(fiber.place.line));
  }
  std::string text = "divergent threads wait for ever in";
  for (const std::string& place : places) text += " [" + place + "]";
  fail(text);
}

inline void run_block() {
  for (size_t i = 0; i < count; ++i) {
    fibers[i]->state = State::kReady;
    fibers[i]->thread = {unsigned(i % blockDim.x), unsigned(i / blockDim.x % blockDim.y),
                         unsigned(i / blockDim.x / blockDim.y)};
  }
  memset(dynamic_shared, 0xFF, dynamic_shared_bytes);  // NaN, or -1
  for (size_t round = blockIdx.x;; ++round) {
    bool running = false;
    for (size_t i = 0; i < count; ++i) {
      Fiber& fiber = *fibers[round % 2 ? count - 1 - i : i];
      if (fiber.state == State::kReady) resume(fiber);
      if (failure) std::rethrow_exception(failure);
      running |= fiber.state != State::kDone;
    }
    if (!running) return;
    bool released = false;
    for (size_t first = 0; first < count; first += 32) released |= release_warp(first);
    if (!released && !release_barrier()) report_divergence();
  }
}

inline void run_grid(dim3 grid, dim3 block, size_t dynamic_bytes, std::function<void()> kernel) {
  const std::lock_guard<std::recursive_mutex> lock(one_at_a_time);
  count = size_t(block.x) * block.y * block.z;
  if (count == 0 || count > kMaxThreads || grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > kMaxGridYz ||
      grid.z > kMaxGridYz || dynamic_bytes > kMaxDynamicBytes) {
    fail("no device takes such a grid, block or amount of shared memory");
  }
  while (fibers.size() < count) fibers.push_back(std::make_unique<Fiber>());
  gridDim = grid;
  blockDim = block;
  body = std::move(kernel);
  dynamic_shared_bytes = dynamic_bytes;
  failure = nullptr;
  try {
    for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
      for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
        for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) run_block();
  } catch (...) {
    fibers.clear();  // some stopped half-way
    throw;
  }
}

inline int lane() { return int(rank_in_block() % 32); }

// Waits for the lanes of `mask`; the caller's `received` and `present` then hold what they brought.
inline const Fiber& exchange(uint32_t mask, uint64_t value, Place place) {
  if (!(mask >> lane() & 1)) fail("a lane calls a collective whose mask does not name it");
  Fiber& self = *current;
  self.mask = mask;
  self.sent = value;
  self.place = place;
  wait(State::kWarp);
  return self;
}

// Waits at the block's barrier; returns the number of threads whose `vote` is true.
inline int barrier(bool vote, Place place) {
  current->sent = vote;
  current->place = place;
  wait(State::kBarrier);
  return barrier_votes;
}

}  // namespace prcl::emulation
