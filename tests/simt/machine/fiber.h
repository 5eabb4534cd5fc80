// Switching stacks: saves the registers that a callee must preserve, about 2 ns. Assembly on x86-64 and aarch64,
// ucontext (ten times slower) elsewhere or with -DSIMT_UCONTEXT.
#pragma once
#include <cstddef>
#include <cstdint>

namespace simt {
extern "C" void simt_fiber_main();  // where a new fiber starts; never returns
}

#if !defined(SIMT_UCONTEXT) && (defined(__x86_64__) || defined(__aarch64__))

extern "C" void simt_switch(void** save_sp, void* load_sp);

namespace simt {
struct Context { void* sp = nullptr; };

inline void switch_context(Context& from, Context& to) { simt_switch(&from.sp, to.sp); }

inline void make_context(Context& c, char* stack, size_t bytes) {
  const uintptr_t top = (reinterpret_cast<uintptr_t>(stack) + bytes) & ~uintptr_t(63);
#if defined(__x86_64__)
  void** sp = reinterpret_cast<void**>(top) - 1;  // aligned as after a call
  *sp = nullptr;
  *--sp = reinterpret_cast<void*>(simt_fiber_main);
  for (int i = 0; i < 6; i++) *--sp = nullptr;    // rbp rbx r12..r15
#else
  void** sp = reinterpret_cast<void**>(top) - 20;  // x19..x30, d8..d15
  for (int i = 0; i < 20; i++) sp[i] = nullptr;
  sp[11] = reinterpret_cast<void*>(simt_fiber_main);  // x30, where ret goes
#endif
  c.sp = sp;
}
}  // namespace simt

#if defined(SIMT_FIBER_IMPLEMENTATION)
#if defined(__x86_64__)
asm(R"(
.text
.globl simt_switch
.hidden simt_switch
.type simt_switch,@function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch,.-simt_switch
)");
#else
asm(R"(
.text
.globl simt_switch
.hidden simt_switch
.type simt_switch,%function
simt_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size simt_switch,.-simt_switch
)");
#endif
#endif

#else
#include <ucontext.h>

namespace simt {
struct Context { ucontext_t u; };

inline void switch_context(Context& from, Context& to) { swapcontext(&from.u, &to.u); }

inline void make_context(Context& c, char* stack, size_t bytes) {
  getcontext(&c.u);
  c.u.uc_stack.ss_sp = stack;
  c.u.uc_stack.ss_size = bytes;
  c.u.uc_link = nullptr;
  makecontext(&c.u, simt_fiber_main, 0);
}
}  // namespace simt
#endif
