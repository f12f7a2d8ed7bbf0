// What the emulator found: faults with the place in the kernel, and counters.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace emulator {

enum class Fault {
  race,                // two threads of a block, one of them writing, with no barrier between
  block_conflict,      // two blocks of a launch, one of them writing, on one address
  uninitialised_read,  // of shared or global memory that nobody wrote
  in_flight_access,    // of bytes that an asynchronous copy has not delivered
  out_of_bounds,       // of shared memory, a device buffer or its red zone
  misaligned,          // for the width of the instruction
  divergence,          // threads meet in different barriers or collectives, or one has left
  deadlock,            // nobody can go on
  budget,              // more shared memory, threads or blocks than a device has
  missing_fence,       // asynchronous proxy reads what the generic proxy wrote, no fence between
  missing_wait,        // a thread ends with copies or products in flight
  mbarrier,            // touched by plain accesses, not initialised, more arrivals or bytes than it expects
};
const char* fault_name(Fault fault);

struct Entry {
  Fault fault;
  std::string kernel, message;  // the message of the first occurrence
  const void* where;            // an address in the kernel's code, null if there is none
  uint64_t count;               // occurrences of this fault at this place
};

// Counted over all launches since the last reset.
struct Counters {
  uint64_t launches, blocks, barriers, accesses;
  uint64_t mma, ldmatrix;
  uint64_t shared_wavefronts;  // passes over shared memory that the accesses of the warps take ...
  uint64_t bank_conflicts;     // ... and how many of them are there because of bank conflicts (if
                               // Options::count_bank_conflicts)
};

class Report {
 public:
  // Counts a fault of the running kernel that is known at this place. False if it is not: then add() it.
  bool count_again(Fault fault, const void* where);
  // Adds an entry, or counts it where it is known.
  void add(Fault fault, const void* where, std::string message);
  bool empty() const { return entries_.empty(); }
  bool has(Fault fault) const;
  const std::vector<Entry>& entries() const { return entries_; }
  std::string text() const;  // one line an entry, with symbol and offset of its place
  void clear();

  Counters counters{};
  std::string kernel;  // the kernel that runs now

 private:
  std::vector<Entry> entries_;
};

extern Report report;

std::string format(const char* pattern, ...) __attribute__((format(printf, 1, 2)));

}  // namespace emulator
