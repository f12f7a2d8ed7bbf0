// Runs a grid: blocks one after another, the threads of a block as fibers that run until they have to wait.
#include "runtime/scheduler.h"

#include <algorithm>
#include <array>
#include <numeric>
#include <random>
#include <string>

#include "runtime/bank_conflicts.h"
#include "runtime/emulator.h"
#include "runtime/mbarrier.h"
#include "runtime/shadow.h"
#include "runtime/static_shared.h"

namespace emulator {

Thread* running = nullptr;

namespace {

// Threads that have come to a meeting point and wait for the others.
struct Meeting {
  WarpFunction function = nullptr;
  uint32_t mask = 0, arrived = 0;
  std::array<void*, kWarpSize> operands{};
};

struct Barrier {
  int expected = 0, arrived = 0;
  std::vector<Thread*> waiting;
  Knowledge released;  // by those who have arrived
};

uint32_t clock_now = kFirstClock;  // no clock is later
int launch_error = 0;

// One block. Constructed once and reused: fibers keep their stacks.
class Block {
 public:
  void run(dim3 grid, dim3 shape, dim3 index, unsigned number, const std::function<void()>& body);

  void meet_warp(const char* name, WarpFunction function, uint32_t mask, void* operand);
  void meet_warpgroup(const char* name, WarpFunction function);
  void meet_block(int line, bool predicate);
  void meet_named(int id, int expected, bool wait, int line);
  void order_lanes(uint32_t mask);
  void forget_clocks();
  int predicates_true() const { return predicate_count_; }
  Thread& thread(int id) { return threads_[id]; }
  int thread_count() const { return thread_count_; }

 private:
  static void entry();
  bool step(int warp);
  void finish_block_barrier();
  void report_stuck();
  void join_all();

  std::array<Thread, kMaxThreads> threads_;
  std::array<std::vector<Meeting>, kMaxWarps> meetings_;
  std::array<Meeting, kMaxThreads / kWarpgroupSize> group_meetings_;  // `arrived` counts here
  std::array<Barrier, kNamedBarriers> named_;
  int thread_count_ = 0, warp_count_ = 0, exited_ = 0;
  int at_barrier_ = 0, barrier_line_ = 0, predicates_now_ = 0, predicate_count_ = 0;
  std::mt19937 random_;
  const std::function<void()>* body_ = nullptr;
};

Block& block() {
  static Block instance;
  return instance;
}

void Block::entry() {
  (*block().body_)();
  Thread& self = *running;
  if (!self.open_products.empty() || !self.products.empty()) {
    report.add(Fault::missing_wait, nullptr, format("thread %d ends with warpgroup products in flight", self.id));
  }
  if (!self.open.empty() || !self.pending.empty() || !self.open_stores.empty() || !self.stores.empty()) {
    report.add(Fault::missing_wait, nullptr, format("thread %d ends with asynchronous copies in flight", self.id));
  }
  self.state = Thread::State::exited;
  ++block().exited_;
  self.fiber.suspend();
  __builtin_unreachable();
}

void Block::run(dim3 grid, dim3 shape, dim3 index, unsigned number, const std::function<void()>& body) {
  thread_count_ = int(shape.x * shape.y * shape.z);
  warp_count_ = (thread_count_ + kWarpSize - 1) / kWarpSize;
  exited_ = at_barrier_ = predicates_now_ = 0;
  body_ = &body;
  random_.seed(options.seed * 7919u + number);
  const uint32_t start = ++clock_now;
  observer.block_start = start;
  observer.block = number;
  observer.threads = thread_count_;
  for (int i = 0; i < thread_count_; ++i) {
    Thread& t = threads_[i];
    const unsigned u = unsigned(i);
    t.index = {dim3(u % shape.x, u / shape.x % shape.y, u / shape.x / shape.y), index, shape, grid};
    t.id = i;
    t.warp = i / kWarpSize;
    t.lane = i % kWarpSize;
    t.state = Thread::State::ready;
    t.clock = start;
    t.known.all = start - 1;  // what it holds of single actors is from before, too
    t.apart = false;
    t.open.clear();
    t.pending.clear();
    t.open_products.clear();
    t.products.clear();
    t.registers.clear();
    t.open_stores.clear();
    t.stores.clear();
    t.fenced = t.fenced_mbarriers = start - 1;
    t.shared_log.clear();
    t.fiber.prepare(&Block::entry);
  }
  for (int w = 0; w < warp_count_; ++w) meetings_[w].clear();
  for (Barrier& barrier : named_) {
    barrier.arrived = 0;
    barrier.waiting.clear();
  }
  group_meetings_.fill(Meeting{});

  std::vector<int> order(warp_count_);
  std::iota(order.begin(), order.end(), 0);
  bool stuck = false;
  while (exited_ < thread_count_ && !stuck) {
    if (options.seed) std::shuffle(order.begin(), order.end(), random_);
    bool progress = false;
    for (const int w : order) {
      while (step(w)) progress = true;
    }
    if (at_barrier_ > 0 && at_barrier_ + exited_ == thread_count_) {
      finish_block_barrier();
    } else if (!progress && exited_ < thread_count_) {
      stuck = !deliver_bytes(random_);
    }
  }
  if (stuck) report_stuck();
  for (int i = 0; i < thread_count_; ++i) {
    finish_copies(threads_[i]);
    finish_products(threads_[i]);
  }
  finish_bulk_stores();
  finish_mbarriers(stuck);
  join_all();
}

// Runs every ready lane of a warp until it waits. False if there was none.
bool Block::step(int warp) {
  const int first = warp * kWarpSize, count = std::min(kWarpSize, thread_count_ - first);
  std::array<uint8_t, kWarpSize> order;
  std::iota(order.begin(), order.end(), uint8_t(0));
  if (options.seed) std::shuffle(order.begin(), order.begin() + count, random_);
  bool any = false;
  for (int i = 0; i < count; ++i) {
    Thread& t = threads_[first + order[i]];
    if (t.state != Thread::State::ready) continue;
    any = true;
    impersonate(t);
    observer.running = true;
    t.fiber.resume();
    observer.running = false;
  }
  return any;
}

// Brings clocks of threads that go on together to one value, so that their reads of one place stay one entry there.
void align_clocks(Thread* threads, int count, uint32_t mask = kFullMask) {
  uint32_t latest = 0;
  for (int i = 0; i < count; ++i) {
    if (mask >> i % kWarpSize & 1) latest = std::max(latest, threads[i].clock);
  }
  for (int i = 0; i < count; ++i) {
    if (mask >> i % kWarpSize & 1) threads[i].clock = latest;
  }
}

// What the thread does from now on is told from what it did before.
void tick(Thread& thread) {
  thread.clock = later_than(thread.clock);
  if (&thread == running) observer.clock = thread.clock;
}

// The last lane to arrive runs the function in the name of all and goes on without a switch.
void Block::meet_warp(const char* name, WarpFunction function, uint32_t mask, void* operand) {
  Thread& self = *running;
  if (!(mask >> self.lane & 1)) {
    report.add(Fault::divergence, nullptr, format("%s: thread %d is not in its own mask %08x", name, self.id, mask));
    return;
  }
  std::vector<Meeting>& meetings = meetings_[self.warp];
  auto meeting = std::find_if(meetings.begin(), meetings.end(),
                              [&](const Meeting& m) { return m.function == function && m.mask == mask; });
  if (meeting == meetings.end()) {
    meetings.push_back({function, mask, 0, {}});
    meeting = meetings.end() - 1;
  }
  meeting->arrived |= 1u << self.lane;
  meeting->operands[self.lane] = operand;
  if (meeting->arrived != mask) return suspend(name, mask, 0);
  const Meeting complete = *meeting;
  meetings.erase(meeting);
  Thread* lanes = &threads_[self.warp * kWarpSize];
  if (options.count_bank_conflicts && mask == kFullMask) count_bank_conflicts(lanes, kWarpSize);
  align_clocks(lanes, kWarpSize, mask);
  function(mask, complete.operands.data());
  impersonate(self);
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (mask >> lane & 1) lanes[lane].state = Thread::State::ready;
  }
}

// Of other warps the lanes mostly know the same.
void Block::order_lanes(uint32_t mask) {
  const int first = running->warp * kWarpSize;
  Knowledge together = running->known;
  bool apart = mask != kFullMask;
  for (int i = first; i < first + kWarpSize; ++i) apart |= threads_[i].apart;
  for (int i = first; i < first + kWarpSize; ++i) {
    if (!(mask >> threads_[i].lane & 1)) continue;
    if (apart) together.join(threads_[i].known, thread_count_);
    together.of[size_t(i)] = threads_[i].clock;
  }
  for (int i = first; i < first + kWarpSize; ++i) {
    if (!(mask >> threads_[i].lane & 1)) continue;
    Knowledge& known = threads_[i].known;
    if (apart) {
      known = together;
    } else {
      std::copy_n(&together.of[size_t(first)], kWarpSize, &known.of[size_t(first)]);
    }
    threads_[i].apart = mask != kFullMask;
    tick(threads_[i]);
  }
}

void Block::meet_warpgroup(const char* name, WarpFunction function) {
  Thread& self = *running;
  Thread* lanes = &threads_[size_t(self.id / kWarpgroupSize * kWarpgroupSize)];
  Meeting& meeting = group_meetings_[size_t(self.id / kWarpgroupSize)];
  if (meeting.arrived == 0) {
    meeting.function = function;
  } else if (meeting.function != function) {
    report.add(Fault::divergence, nullptr,
               format("%s: thread %d finds its warpgroup in another instruction", name, self.id));
  }
  if (++meeting.arrived < kWarpgroupSize) return suspend(name, 0, 0);
  meeting.arrived = 0;
  align_clocks(lanes, kWarpgroupSize);
  function(kFullMask, nullptr);
  impersonate(self);
  for (int i = 0; i < kWarpgroupSize; ++i) lanes[i].state = Thread::State::ready;
}

void Block::meet_block(int line, bool predicate) {
  if (at_barrier_ == 0) {
    barrier_line_ = line;
  } else if (barrier_line_ != line) {
    report.add(Fault::divergence, nullptr,
               format("thread %d is at the __syncthreads of line %d, others at that of line %d", running->id, line,
                      barrier_line_));
  }
  ++at_barrier_;
  predicates_now_ += predicate;
  suspend("__syncthreads", 0, line);
}

void Block::finish_block_barrier() {
  if (exited_ > 0) {
    report.add(
        Fault::divergence, nullptr,
        format("__syncthreads of line %d: %d of %d threads have returned", barrier_line_, exited_, thread_count_));
  }
  join_all();
  predicate_count_ = predicates_now_;
  at_barrier_ = predicates_now_ = 0;
  ++report.counters.barriers;
  for (int i = 0; i < thread_count_; ++i) {
    if (threads_[i].state == Thread::State::waiting) threads_[i].state = Thread::State::ready;
  }
}

void Block::join_all() {
  if (options.count_bank_conflicts) {
    for (int w = 0; w < warp_count_; ++w) {
      const int first = w * kWarpSize;
      count_bank_conflicts(&threads_[first], std::min(kWarpSize, thread_count_ - first));
    }
  }
  ++clock_now;
  for (int i = 0; i < thread_count_; ++i) {
    threads_[i].clock = clock_now;
    threads_[i].known.all = clock_now - 1;
    threads_[i].apart = false;
  }
}

void Block::forget_clocks() {
  clock_now = kFirstClock;
  for (Thread& thread : threads_) thread.known = Knowledge{};
}

void Block::meet_named(int id, int expected, bool wait_here, int line) {
  Thread& self = *running;
  if (id < 1 || id >= kNamedBarriers || expected <= 0 || expected % kWarpSize) {
    report.add(Fault::divergence, nullptr,
               format("barrier %d for %d threads: 1..15 and whole warps are allowed", id, expected));
    return;
  }
  Barrier& barrier = named_[id];
  if (barrier.arrived == 0) {
    barrier.expected = expected;
    barrier.released = Knowledge{};
  } else if (barrier.expected != expected) {
    report.add(
        Fault::divergence, nullptr,
        format("barrier %d: thread %d expects %d threads, others expect %d", id, self.id, expected, barrier.expected));
  }
  release(self, barrier.released);
  if (wait_here) barrier.waiting.push_back(&self);
  if (++barrier.arrived < barrier.expected) {
    if (wait_here) suspend("named barrier", uint32_t(id), line);
    return;
  }
  for (Thread* t : barrier.waiting) {
    acquire(*t, barrier.released);
    t->state = Thread::State::ready;
  }
  barrier.arrived = 0;
  barrier.waiting.clear();
  ++report.counters.barriers;
}

void Block::report_stuck() {
  std::string who;
  int named = 0;
  for (int i = 0; i < thread_count_ && named < 3; ++i) {
    const Thread& t = threads_[i];
    if (t.state != Thread::State::waiting) continue;
    const bool same = named > 0 && i > 0 && threads_[i - 1].state == Thread::State::waiting &&
                      threads_[i - 1].waits_for == t.waits_for && threads_[i - 1].waits_with == t.waits_with;
    if (same) continue;
    who += format("; from thread %d: %s %08x line %d", i, t.waits_for, t.waits_with, t.line);
    ++named;
  }
  report.add(Fault::deadlock, nullptr,
             format("block %u stands still, %d of %d threads have returned%s%s", observer.block, exited_, thread_count_,
                    who.c_str(), awaited_at_mbarriers().c_str()));
}

// What a launch must satisfy on every device that is supported.
std::string refusal(dim3 grid, dim3 block, size_t dynamic_shared_bytes) {
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads || block.z > 64)
    return format("%llu threads a block", (unsigned long long)threads);
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    return format("grid of (%u, %u, %u)", grid.x, grid.y, grid.z);
  }
  if (dynamic_shared_bytes > options.shared_bytes_per_block) {
    return format("%zu bytes of shared memory, a block has %zu", dynamic_shared_bytes, options.shared_bytes_per_block);
  }
  return "";
}

}  // namespace

dim3 thread_index() { return running->index.thread; }
dim3 block_index() { return running->index.block; }
dim3 block_dim() { return running->index.block_dim; }
dim3 grid_dim() { return running->index.grid_dim; }

Thread& lane_of_running_warp(int lane) { return block().thread(running->warp * kWarpSize + lane); }

Thread& lane_of_running_warpgroup(int lane) {
  return block().thread(running->id / kWarpgroupSize * kWarpgroupSize + lane);
}

Thread& thread_of_block(int id) { return block().thread(id); }

void suspend(const char* what, uint32_t with, int line) {
  Thread& self = *running;
  self.state = Thread::State::waiting;
  self.waits_for = what;
  self.waits_with = with;
  self.line = line;
  self.fiber.suspend();
}

void release(Thread& thread, Knowledge& to) {
  to.join(thread.known, block().thread_count());
  uint32_t& own = to.of[size_t(thread.id)];
  own = std::max(own, thread.clock);
  tick(thread);
}

void acquire(Thread& thread, const Knowledge& from) {
  thread.known.join(from, block().thread_count());
  thread.apart = true;
}

uint32_t later_than(uint32_t clock) {
  clock_now = std::max(clock_now, clock + 1);
  return clock + 1;
}

void impersonate(Thread& thread) {
  running = &thread;
  observer.thread = thread.id;
  observer.clock = thread.clock;
  observer.known = &thread.known;
}

void warpgroup_collective(const char* name, WarpFunction function) { block().meet_warpgroup(name, function); }

// The ticks of both fences tell what was written before from what comes after.
void fence_proxy_async() {
  running->fenced = running->clock;
  tick(*running);
}

void fence_mbarrier_init() {
  running->fenced_mbarriers = running->clock;
  tick(*running);
}

void check_proxy_fence(const void* p, size_t bytes, const char* what, const void* where) {
  if (!in_shared_window(p)) return;
  Stamp fine = 0;
  for (size_t i = 0; i < bytes; i += kGranule) {
    const Stamp write = shadow_last_write(static_cast<const unsigned char*>(p) + i);
    if (write == fine) continue;
    fine = write;
    const int writer = actor_of(write);
    const uint32_t clock = clock_of(write);
    if (clock < observer.block_start || clock > kMaxClock || writer >= kFirstMbarrier) continue;
    if (clock <= thread_of_block(writer).fenced) continue;
    report.add(Fault::missing_fence, where,
               format("%s shared memory at %#zx, written by thread %d without fence.proxy.async after", what,
                      size_t(shared_offset(p)) + i, writer));
  }
}

void block_barrier(int line) { block().meet_block(line, false); }

int block_barrier_count(bool predicate, int line) {
  block().meet_block(line, predicate);
  return block().predicates_true();
}

void named_barrier(int id, int threads, bool wait, int line) { block().meet_named(id, threads, wait, line); }

void warp_collective(const char* name, WarpFunction function, uint32_t mask, void* operand) {
  block().meet_warp(name, function, mask, operand);
}

namespace {
void order_lanes(uint32_t mask, void* const*) { block().order_lanes(mask); }
}  // namespace

void warp_barrier(uint32_t mask) { warp_collective("__syncwarp", order_lanes, mask, nullptr); }

int launch(const char* kernel, dim3 grid, dim3 shape, size_t dynamic_shared_bytes, const std::function<void()>& body) {
  reserve_memory();
  find_static_shared_memory();
  report.kernel = kernel;
  if (const std::string why = refusal(grid, shape, dynamic_shared_bytes); !why.empty()) {
    report.add(Fault::budget, nullptr, why);
    return launch_error = 9;
  }
  if (clock_now > kMaxClock / 2) {
    shadow_restart_clocks(device_bytes_used());
    block().forget_clocks();
  }
  memory_map.shared_bytes = dynamic_shared_bytes;
  observer.launch_start = ++clock_now;
  const unsigned blocks = grid.x * grid.y * grid.z;
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  if (options.seed) std::shuffle(order.begin(), order.end(), std::mt19937(options.seed));
  for (const unsigned number : order) {
    block().run(grid, shape, dim3(number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y), number, body);
    if (clock_now > kMaxClock / 8 * 7) {
      report.add(Fault::budget, nullptr, "more barriers in one launch than the emulator can tell apart");
      break;
    }
  }
  const size_t static_bytes = static_shared_bytes_touched();
  if (static_bytes > kMaxStaticSharedBytes || static_bytes + dynamic_shared_bytes > options.shared_bytes_per_block) {
    report.add(Fault::budget, nullptr,
               format("%zu bytes of static and %zu of dynamic shared memory", static_bytes, dynamic_shared_bytes));
  }
  ++report.counters.launches;
  report.counters.blocks += blocks;
  running = nullptr;
  return 0;
}

int last_error() {
  const int error = launch_error;
  launch_error = 0;
  return error;
}

}  // namespace emulator
