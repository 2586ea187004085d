// The scheduler: a block's threads are fibers of one thread of this process.

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "tests/cuda_emulator/cuda_runtime.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_UNPOISON_MEMORY_REGION(address, size) (static_cast<void>(address), static_cast<void>(size))
#endif

namespace thinwire::emulator {
namespace {

constexpr std::size_t kStack = 64 * 1024;
constexpr unsigned kWorkers = 3;  // blocks side by side
constexpr unsigned kMostThreads = 1024;

std::atomic<std::size_t> launch_count{0};

/// What a fiber waits for: the counter to leave a value.
struct Waiting {
  const unsigned* counter = nullptr;
  unsigned value = 0;
};

/// A suspended flow of control: what its stack pointer was. swapcontext() would ask the kernel for the signal mask each time.
using Context = void*;

#if !defined(__x86_64__)
#error "the emulator switches stacks on x86-64 only"
#endif
// Saves what a call must preserve on the own stack, leaves the stack pointer in *from and goes on where `to` left off.
extern "C" void thinwire_emulator_switch(Context* from, Context to);
asm(R"(
.text
.globl thinwire_emulator_switch
.type thinwire_emulator_switch, @function
thinwire_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size thinwire_emulator_switch, .-thinwire_emulator_switch
)");

/// A context that will call `entry`, which never returns, on [stack, stack + size).
Context make_context(std::byte* stack, std::size_t size, void (*entry)()) {
  auto top = (reinterpret_cast<std::uintptr_t>(stack) + size) & ~std::uintptr_t(15);
  auto* words = reinterpret_cast<void**>(top) - 8;  // six registers, the entry's address, and its return address, which it does not use
  for (int i = 0; i < 6; ++i) words[i] = nullptr;
  words[6] = reinterpret_cast<void*>(entry);
  words[7] = nullptr;
  return words;
}

struct Fiber {
  Context context = nullptr;
  Waiting waiting;
  bool done = false;
};

struct Warp {
  std::array<std::uint64_t, 32> in{}, out{};
  unsigned live = 0, arrived = 0, gave = 0, generation = 0;  // lanes as bits

  void release_if_complete() {
    if (arrived == 0 || arrived != live) return;
    out = in;
    gave = arrived;
    in.fill(0);
    arrived = 0;
    ++generation;
  }
};

/// Stacks of a block, which the next launch takes over with the pages that were touched.
class Stacks {
 public:
  explicit Stacks(std::size_t bytes) {
    const std::lock_guard lock(mutex_);
    std::vector<std::unique_ptr<std::byte[]>>& free = free_[bytes_ = bytes];
    if (free.empty()) {
      data_.reset(new std::byte[bytes]);
    } else {
      data_ = std::move(free.back());
      free.pop_back();
    }
  }
  ~Stacks() {
    const std::lock_guard lock(mutex_);
    free_[bytes_].push_back(std::move(data_));
  }
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  std::byte& operator[](std::size_t i) { return data_[i]; }

 private:
  std::size_t bytes_;
  std::unique_ptr<std::byte[]> data_;
  static std::mutex mutex_;
  static std::map<std::size_t, std::vector<std::unique_ptr<std::byte[]>>> free_;
};

std::mutex Stacks::mutex_;
std::map<std::size_t, std::vector<std::unique_ptr<std::byte[]>>> Stacks::free_;

class Block {
 public:
  static thread_local Block* current;

  explicit Block(unsigned threads) : threads_(threads), fibers_(threads), stacks_(threads * kStack), warps_((threads + 31) / 32) {}

  void run(unsigned index, void (*thread_main)(void*), void* context) {
    main_ = thread_main;
    argument_ = context;
    current = this;
    live_ = threads_;
    arrived_ = 0;
    for (unsigned w = 0; w < warps_.size(); ++w) {
      const unsigned lanes = threads_ - 32 * w < 32 ? threads_ - 32 * w : 32;
      warps_[w].live = lanes == 32 ? ~0u : (1u << lanes) - 1;
      warps_[w].arrived = 0;
      warps_[w].in.fill(0);
    }
    for (unsigned i = 0; i < threads_; ++i) {
      Fiber& fiber = fibers_[i];
      fiber.done = false;
      fiber.waiting = {};
      fiber.context = make_context(&stacks_[i * kStack], kStack, &Block::enter);
    }
    blockIdx = {index, 0, 0};
    blockDim = dim3(threads_);
    std::uint32_t shuffle = index * 2654435761u + 1;
    while (live_ > 0) {
      // Another order every time round: an odd stride visits every thread of a power of two, and of any other count nearly all.
      shuffle = shuffle * 1664525u + 1013904223u;
      const unsigned start = (shuffle >> 8) % threads_, backward = shuffle >> 31;
      // One warp in two times round stands still, so that warps drift apart: only a barrier brings them together again.
      const unsigned still = warps_.size() > 1 ? (shuffle >> 16) % unsigned(2 * warps_.size()) : 1;
      for (unsigned n = 0; n < threads_; ++n) {
        running_ = (start + (backward != 0 ? threads_ - n : n)) % threads_;
        Fiber& fiber = fibers_[running_];
        if (running_ / 32 == still) continue;
        if (fiber.done || (fiber.waiting.counter != nullptr && *fiber.waiting.counter == fiber.waiting.value)) continue;
        fiber.waiting = {};
        threadIdx = {running_, 0, 0};
        thinwire_emulator_switch(&scheduler_, fiber.context);
      }
    }
  }

  void wait(const unsigned* counter) {
    Fiber& fiber = fibers_[running_];
    if (counter != nullptr) fiber.waiting = {counter, *counter};
    thinwire_emulator_switch(&fiber.context, scheduler_);
  }
  void barrier() {
    ++arrived_;
    if (arrived_ == live_) {
      arrived_ = 0;
      ++generation_;
    } else {
      wait(&generation_);
    }
  }
  const std::uint64_t* exchange(std::uint64_t value) {
    Warp& warp = warps_[running_ / 32];
    const unsigned lane = running_ % 32;
    warp.in[lane] = value;
    warp.arrived |= 1u << lane;
    const unsigned generation = warp.generation;
    warp.release_if_complete();
    if (warp.generation == generation) wait(&warp.generation);
    return warp.out.data();
  }
  unsigned lanes() const { return warps_[running_ / 32].gave; }

 private:
  static void enter() {
    Block& block = *current;
    block.main_(block.argument_);
    block.leave();
  }
  [[noreturn]] void leave() {
    Fiber& fiber = fibers_[running_];
    constexpr std::size_t kOuterFrames = 2048;  // it never returns from them
    ASAN_UNPOISON_MEMORY_REGION(&stacks_[(running_ + 1) * kStack - kOuterFrames], kOuterFrames);
    fiber.done = true;
    --live_;
    if (live_ > 0 && arrived_ == live_) {
      arrived_ = 0;
      ++generation_;
    }
    Warp& warp = warps_[running_ / 32];
    warp.live &= ~(1u << (running_ % 32));
    warp.release_if_complete();
    thinwire_emulator_switch(&fiber.context, scheduler_);
    std::abort();
  }

  unsigned threads_, running_ = 0, live_ = 0, arrived_ = 0, generation_ = 0;
  std::vector<Fiber> fibers_;
  Stacks stacks_;
  std::vector<Warp> warps_;
  Context scheduler_ = nullptr;
  void (*main_)(void*) = nullptr;
  void* argument_ = nullptr;
};

thread_local Block* Block::current = nullptr;

}  // namespace

void block_barrier() { Block::current->barrier(); }
const std::uint64_t* warp_exchange(std::uint64_t value) { return Block::current->exchange(value); }
unsigned warp_lanes() { return Block::current->lanes(); }
void yield() {
  Block::current->wait(nullptr);
  std::this_thread::yield();
}
std::size_t launches() { return launch_count; }

namespace {

std::atomic<std::size_t> wait_count{0}, copy_count{0};
std::mutex memory_lock;
std::map<const std::byte*, std::size_t> memory;  // device allocations and their sizes

}  // namespace

std::size_t waits() { return wait_count; }
std::size_t copies_to_host() { return copy_count; }
void note_wait() { ++wait_count; }
void note_copy(const void* to, const void* from) {
  if (on_device(from) && !on_device(to)) ++copy_count;
}

void* allocate(std::size_t bytes) {
  void* const p = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  const std::lock_guard lock(memory_lock);
  if (p != nullptr) memory[static_cast<const std::byte*>(p)] = bytes;
  return p;
}

void release(void* p) {
  {
    const std::lock_guard lock(memory_lock);
    memory.erase(static_cast<const std::byte*>(p));
  }
  std::free(p);
}

bool on_device(const void* p) {
  const std::lock_guard lock(memory_lock);
  auto next = memory.upper_bound(static_cast<const std::byte*>(p));
  if (next == memory.begin()) return false;
  --next;
  return static_cast<const std::byte*>(p) <= next->first + next->second;
}

void run_grid(unsigned blocks, unsigned threads, void (*thread_main)(void*), void* context) {
  ++launch_count;
  std::atomic<unsigned> next{0};
  const auto work = [&] {
    gridDim = dim3(blocks);
    Block block(threads);
    for (unsigned index; (index = next++) < blocks;) block.run(index, thread_main, context);
  };
  std::vector<std::thread> workers;
  for (unsigned i = 1; i < kWorkers && i < blocks; ++i) workers.emplace_back(work);
  work();
  for (auto& worker : workers) worker.join();
}

}  // namespace thinwire::emulator
