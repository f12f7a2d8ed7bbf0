#include "runtime/mbarrier.h"

#include <algorithm>
#include <deque>
#include <utility>

#include "runtime/report.h"
#include "runtime/scheduler.h"
#include "runtime/shadow.h"

namespace emulator {

namespace {

constexpr int kMostAtOnce = (1 << 20) - 1;  // of arrivals, and of bytes of one phase (PTX ISA, "mbarrier")

struct Mbarrier {
  const uint64_t* word;
  int expected, arrived = 0;
  int64_t bytes = 0;  // expected in this phase and not arrived; negative where they come before the expectation
  uint32_t phase = 0;
  Stamp initialised;
  uint32_t clock;                // of the bytes that arrive here
  Knowledge gathered, released;  // from the arrivals of all phases; of the complete ones
  std::vector<Thread*> waiting = {};
  std::deque<Landing> landings = {};
};
std::deque<Mbarrier> mbarriers;

int number_of(const Mbarrier& b) {
  return int(std::find_if(mbarriers.begin(), mbarriers.end(), [&](const Mbarrier& other) { return &other == &b; }) -
             mbarriers.begin());
}
int actor_of(const Mbarrier& b) { return kFirstMbarrier + number_of(b); }

std::string name(const Mbarrier& b) { return format("mbarrier %d at %#x", number_of(b), shared_offset(b.word)); }

Mbarrier* find(const uint64_t* word, const char* instruction, const void* where) {
  const auto at = std::find_if(mbarriers.begin(), mbarriers.end(), [&](const Mbarrier& b) { return b.word == word; });
  if (at == mbarriers.end()) {
    report.add(Fault::mbarrier, where,
               format("%s by thread %d: no mbarrier is initialised there", instruction, running->id));
    return nullptr;
  }
  if (!shadow_ordered(at->initialised)) {
    report.add(Fault::race, where,
               format("%s by thread %d, initialised by thread %d with no barrier between", instruction, running->id,
                      emulator::actor_of(at->initialised)));
  }
  return &*at;
}

// Arrivals and bytes have all come: whoever waits goes on, ordered after them.
void complete_phase(Mbarrier& b) {
  if (b.arrived < b.expected || b.bytes != 0) return;
  ++b.phase;
  b.arrived = 0;
  b.gathered.of[size_t(actor_of(b))] = b.clock;
  b.released = b.gathered;
  for (Thread* thread : b.waiting) {
    acquire(*thread, b.released);
    thread->state = Thread::State::ready;
  }
  b.waiting.clear();
  ++report.counters.barriers;
}

void deliver(Mbarrier& b, const Landing& landing) {
  for (size_t i = 0; i < landing.bytes.size(); ++i) {
    auto address = reinterpret_cast<uintptr_t>(landing.target + i);
    if (landing.swizzled) address ^= (address >> 7 & 7) << 4;
    *reinterpret_cast<unsigned char*>(address) = landing.bytes[i];
  }
  shadow_end_write(landing.target, landing.bytes.size(), make_stamp(b.clock, actor_of(b)));
  b.bytes -= int64_t(landing.bytes.size());
}

}  // namespace

void mbarrier_init(uint64_t* word, int arrivals) {
  const void* where = __builtin_return_address(0);
  check_aligned(word, sizeof *word, "mbarrier", where);
  if (!in_shared_window(word)) {
    report.add(Fault::out_of_bounds, where, "mbarrier.init: not in shared memory");
    return;
  }
  if (arrivals < 1 || arrivals > kMostAtOnce || mbarriers.size() == kMaxMbarriers) {
    report.add(Fault::mbarrier, where,
               format("mbarrier.init for %d arrivals beside %zu other mbarriers: a block has up to %d, for up to %d",
                      arrivals, mbarriers.size(), kMaxMbarriers, kMostAtOnce));
    return;
  }
  shadow_access(word, sizeof *word, Access::write, where);
  shadow_mark_mbarrier(word);
  mbarriers.push_back({.word = word,
                       .expected = arrivals,
                       .initialised = make_stamp(running->clock, running->id),
                       .clock = observer.block_start,
                       .gathered = {},
                       .released = {}});
}

void mbarrier_arrive(uint64_t* word, uint32_t expected_bytes) {
  const void* where = __builtin_return_address(0);
  Mbarrier* b = find(word, "mbarrier.arrive", where);
  if (b == nullptr) return;
  if (b->arrived == b->expected || b->bytes + expected_bytes > kMostAtOnce) {
    report.add(
        Fault::mbarrier, where,
        format("%s: thread %d arrives with %u bytes, %d of %d arrivals and %lld bytes being expected", name(*b).c_str(),
               running->id, expected_bytes, b->expected - b->arrived, b->expected, (long long)b->bytes));
    return;
  }
  b->bytes += expected_bytes;
  ++b->arrived;
  release(*running, b->gathered);
  complete_phase(*b);
}

void mbarrier_wait(uint64_t* word, uint32_t parity, int line) {
  const void* where = __builtin_return_address(0);
  Mbarrier* b = find(word, "mbarrier.try_wait", where);
  if (b == nullptr) return;
  if (parity > 1) report.add(Fault::mbarrier, where, format("%s: parity %u", name(*b).c_str(), parity));
  if (b->phase % 2 != parity) return acquire(*running, b->released);
  b->waiting.push_back(running);
  suspend("mbarrier", shared_offset(word), line);
}

void send(Landing landing, uint64_t* word, const void* where) {
  Mbarrier* b = find(word, "bulk copy", where);
  if (b == nullptr) return;
  const Thread& by = thread_of_block(emulator::actor_of(b->initialised));
  if (clock_of(b->initialised) > std::max(by.fenced, by.fenced_mbarriers)) {
    report.add(
        Fault::missing_fence, where,
        format("%s takes bytes, initialised by thread %d without fence.mbarrier_init after", name(*b).c_str(), by.id));
  }
  shadow_begin_write(landing.target, landing.bytes.size(), where);
  b->landings.push_back(std::move(landing));
}

bool deliver_bytes(std::mt19937& random) {
  std::vector<Mbarrier*> awaited;
  for (Mbarrier& b : mbarriers) {
    if (!b.waiting.empty() && b.arrived == b.expected && !b.landings.empty()) awaited.push_back(&b);
  }
  if (awaited.empty()) return false;
  Mbarrier& b = *awaited[random() % awaited.size()];
  b.clock = later_than(b.clock);
  for (const uint32_t phase = b.phase; b.phase == phase && !b.landings.empty();) {
    const auto next = b.landings.begin() + std::ptrdiff_t(random() % b.landings.size());
    deliver(b, *next);
    b.landings.erase(next);
    complete_phase(b);
  }
  return true;
}

std::string awaited_at_mbarriers() {
  std::string all;
  for (const Mbarrier& b : mbarriers) {
    if (b.waiting.empty()) continue;
    all += format("; %s in phase %u lacks %d of %d arrivals and %lld bytes", name(b).c_str(), b.phase,
                  b.expected - b.arrived, b.expected, (long long)b.bytes);
  }
  return all;
}

void finish_mbarriers(bool stood_still) {
  for (Mbarrier& b : mbarriers) {
    if (!stood_still && !b.landings.empty()) {
      report.add(Fault::missing_wait, nullptr,
                 format("the block ends with %zu copies to %s in flight", b.landings.size(), name(b).c_str()));
    } else if (!stood_still && (b.arrived != 0 || b.bytes != 0)) {
      report.add(Fault::mbarrier, nullptr,
                 format("the block ends in phase %u of %s, with %d of %d arrivals and %lld bytes to come", b.phase,
                        name(b).c_str(), b.arrived, b.expected, (long long)b.bytes));
    }
    for (const Landing& landing : b.landings) deliver(b, landing);
    shadow_end_write(b.word, sizeof *b.word, b.initialised);
  }
  mbarriers.clear();
}

}  // namespace emulator
