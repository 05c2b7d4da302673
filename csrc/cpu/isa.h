// Which instruction set the CPU kernels run with, chosen once per process.
//
// A kernel's arithmetic is written once, in <op>_kernel.h, and compiled by <op>_{baseline,avx2,avx512}.cpp
// with a pragma each; on other architectures only the baseline exists.
#pragma once

namespace sfpk {

enum class Isa { kBaseline, kAvx2, kAvx512 };

// The widest one this CPU has; SFPK_CPU_ISA=baseline|avx2|avx512 asks for a narrower one.
Isa cpu_isa();

}  // namespace sfpk
