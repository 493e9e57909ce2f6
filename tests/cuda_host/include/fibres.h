// Runs the threads of one CUDA block as fibres of one OS thread, with CUDA's barrier semantics.
//
// A fibre runs until it waits at a collective (a block barrier, a warp shuffle, a vote) or ends.
// The last thread to arrive resolves the collective and makes its peers ready again. When no
// fibre can run and some still wait, the block would hang or be undefined on a GPU: that is
// reported as an exception that names the block, a waiting thread, its barrier and a peer that
// did not come. Threads meet only at the same source line: CUDA leaves it undefined otherwise.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace host_cuda {

constexpr unsigned kWarp = 32;
constexpr unsigned kBlock = 0;  // "mask" of a collective of the whole block
constexpr size_t kStack = 64 * 1024;
constexpr unsigned kMaxThreads = 1024;

// A collective a thread waits at, and what it brings.
struct Arrival {
  const char* kind;
  const char* file;
  int line;         // 0: may meet other lines (__syncwarp)
  unsigned mask;    // lanes of the warp, or kBlock
  uint64_t value;   // payload: shuffled bits, predicate
  unsigned source;  // lane to read, for shuffles
};

struct Thread {
  ucontext_t context;  // where the fibre begins
  jmp_buf place;       // where it goes on: jumps, unlike swapcontext, need no system call
  bool begun = false;
  uint3 index;
  unsigned rank;
  enum { ready, waiting, done } state;
  Arrival arrival;
  uint64_t result;
};

// Fills in the results of a complete collective; `lane[i]` is null where i takes no part.
using Resolve = void (*)(Thread* const* lane, unsigned count);

inline bool descending = false;  // order in which threads run: results must not depend on it

inline std::string at(const uint3& i) {
  return "(" + std::to_string(i.x) + "," + std::to_string(i.y) + "," + std::to_string(i.z) + ")";
}

class Block {
 public:
  // Run `body` once per thread. Throws what a thread throws, or a report of a broken barrier.
  void run(const std::function<void()>& body) {
    body_ = &body;
    active_ = this;
    count_ = blockDim.x * blockDim.y * blockDim.z;
    for (unsigned i = 0; i < count_; ++i) {
      Thread& t = threads_[i];
      t.rank = i;
      t.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
      t.state = Thread::ready;
      if (!t.begun) begin(t);
    }
    while (pass()) {
    }
    for (unsigned i = 0; i < count_; ++i)
      if (threads_[i].state == Thread::waiting) report(threads_[i]);
  }

  // Wait until every thread of `mask` is at the same collective; return this thread's result.
  uint64_t meet(const Arrival& arrival, Resolve resolve) {
    Thread& self = *current_;
    if (arrival.mask != kBlock && !(arrival.mask >> (self.rank % kWarp) & 1))
      fail(self, std::string(arrival.kind) + ": the calling lane is not in its own mask");
    self.arrival = arrival;
    self.state = Thread::waiting;
    const auto [first, size] = range(self);
    peers_.assign(size, nullptr);
    for (unsigned i = 0; i < size; ++i) {
      if (!takes_part(arrival, i)) continue;
      if (first + i >= count_ || !together(threads_[first + i], self)) {
        yield(self);  // the last to arrive resolves
        return self.result;
      }
      peers_[i] = &threads_[first + i];
    }
    resolve(peers_.data(), size);
    for (Thread* t : peers_)
      if (t) t->state = Thread::ready;
    return self.result;
  }

  [[noreturn]] static void fail(const Thread& t, const std::string& what) {
    throw std::runtime_error("block " + at(blockIdx) + " thread " + at(t.index) + ": " + what);
  }

  static Block& active() { return *active_; }
  Thread& current() { return *current_; }

 private:
  // Let every ready thread run once; false if there was none.
  bool pass() {
    bool ran = false;
    for (unsigned i = 0; i < count_; ++i) {
      Thread& t = threads_[descending ? count_ - 1 - i : i];
      if (t.state != Thread::ready) continue;
      ran = true;
      current_ = &t;
      threadIdx = t.index;
      resume(t);
      if (failure_) {
        abandon();
        std::rethrow_exception(std::exchange(failure_, nullptr));
      }
    }
    return ran;
  }

  void begin(Thread& t) {
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = stacks_.get() + kStack * t.rank;
    t.context.uc_stack.ss_size = kStack;
    t.context.uc_link = nullptr;
    makecontext(&t.context, &Block::enter, 0);
  }

  // Fibres live on from block to block: each turn of this loop is one thread of one block.
  static void enter() {
    Thread& self = *active_->current_;
    for (;;) {
      try {
        (*active_->body_)();
      } catch (...) {  // an exception must not leave its fibre
        active_->failure_ = std::current_exception();
      }
      self.state = Thread::done;
      active_->yield(self);
    }
  }

  void resume(Thread& t) {
    if (_setjmp(scheduler_)) return;
    if (t.begun) _longjmp(t.place, 1);
    t.begun = true;
    setcontext(&t.context);
  }

  void yield(Thread& self) {
    if (!_setjmp(self.place)) _longjmp(scheduler_, 1);
  }

  // After a failure fibres are stuck amid a kernel: begin all of them anew.
  void abandon() {
    for (Thread& t : threads_) t.begun = false;
  }

  // Threads a collective may name: the first one's rank and how many.
  std::pair<unsigned, unsigned> range(const Thread& t) const {
    if (t.arrival.mask == kBlock) return {0u, count_};
    return {t.rank / kWarp * kWarp, kWarp};
  }

  static bool takes_part(const Arrival& a, unsigned i) {
    return a.mask == kBlock || (a.mask >> i & 1);
  }

  static bool together(const Thread& a, const Thread& b) {
    return a.state == Thread::waiting && std::string(a.arrival.kind) == b.arrival.kind &&
           a.arrival.mask == b.arrival.mask && a.arrival.line == b.arrival.line;
  }

  static std::string describe(const Arrival& a) {
    std::string text = a.kind;
    if (a.mask != kBlock) {
      char mask[16];
      std::snprintf(mask, sizeof mask, "0x%08x", a.mask);
      text += std::string(" with mask ") + mask;
    }
    return text + (a.line ? " (" + std::string(a.file) + ":" + std::to_string(a.line) + ")" : "");
  }

  [[noreturn]] void report(const Thread& stuck) {
    const Arrival& a = stuck.arrival;
    const auto [first, size] = range(stuck);
    std::string why;
    for (unsigned i = 0; i < size && why.empty(); ++i) {
      if (!takes_part(a, i)) continue;
      if (first + i >= count_) {
        why = "lane " + std::to_string(i) + " of its mask does not exist";
      } else if (const Thread& t = threads_[first + i]; !together(t, stuck)) {
        why = "thread " + at(t.index) +
              (t.state == Thread::done ? " has exited" : " waits at " + describe(t.arrival));
      }
    }
    abandon();
    fail(stuck, "waits for ever at " + describe(a) + ": " + why);
  }

  inline static Block* active_ = nullptr;
  jmp_buf scheduler_;
  std::unique_ptr<char[]> stacks_{new char[kStack * kMaxThreads]};
  std::vector<Thread> threads_{kMaxThreads};
  unsigned count_ = 0;
  std::vector<Thread*> peers_;
  Thread* current_ = nullptr;
  const std::function<void()>* body_ = nullptr;
  std::exception_ptr failure_;
};

}  // namespace host_cuda
