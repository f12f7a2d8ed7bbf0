// The context switch saves what the System V ABI calls callee-saved and swaps stacks: about 2 ns, a hundredth of what
// swapcontext takes (it makes a system call for the signal mask).
#include "runtime/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <new>

#if !defined(__x86_64__)
#error "the emulator's context switch is written for x86-64; port emulator_switch to this processor"
#endif

// Saves the running context at *save and continues the one saved at `load`.
extern "C" void emulator_switch(void** save, void* load);
asm(R"(
    .text
    .globl emulator_switch
    .hidden emulator_switch
    .type emulator_switch, @function
emulator_switch:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
    .size emulator_switch, . - emulator_switch
)");

namespace emulator {

namespace {
constexpr size_t kGuardBytes = 4096, kStackBytes = 128 * 1024;
constexpr int kSavedRegisters = 6;
}  // namespace

void Fiber::prepare(void (*entry)()) {
  if (stack_ == nullptr) {
    void* mapped = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    stack_ = static_cast<char*>(mapped);
    mprotect(stack_, kGuardBytes, PROT_NONE);  // an overflowing kernel stops here instead of spoiling its neighbour
  }
  // What emulator_switch pops: the registers, then its return address. The word above them stands for the return
  // address of entry(), so that the stack is aligned as at any function's start (16 n + 8).
  auto top = reinterpret_cast<void**>(stack_ + kGuardBytes + kStackBytes - 64);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
  position_ = top;
}

void Fiber::resume() { emulator_switch(&resumer_, position_); }
void Fiber::suspend() { emulator_switch(&position_, resumer_); }

Fiber::~Fiber() {
  if (stack_ != nullptr) munmap(stack_, kGuardBytes + kStackBytes);
}

}  // namespace emulator
