#include "isa.h"

#include <cstdlib>
#include <string>

#include "checks.h"

namespace sfpk {

namespace {

Isa widest() {
  const char* asked = std::getenv("SFPK_CPU_ISA");
  const std::string isa = asked ? asked : "avx512";
  STD_TORCH_CHECK(isa == "baseline" || isa == "avx2" || isa == "avx512",
                  "SFPK_CPU_ISA: wanted baseline, avx2 or avx512, got ", isa);
#if defined(__x86_64__)
  if (isa == "avx512" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    return Isa::kAvx512;
  if (isa != "baseline" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
#endif
  return Isa::kBaseline;
}

}  // namespace

Isa cpu_isa() {
  static const Isa chosen = widest();
  return chosen;
}

}  // namespace sfpk
