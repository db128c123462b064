#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "head_tile.h"
#include "token_logps.h"

#ifdef GRPO_X86
#include <cpuid.h>
#endif

namespace grpo_kernels {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "avx512_bf16"};

Isa best_of_this_cpu() {
#ifdef GRPO_X86
  // The builtins ask the operating system too (XGETBV); F16C and AVX512_BF16 add no state of their own, so their
  // CPUID bits suffice, and older compilers do not know their names.
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & (1u << 29));
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !f16c) return Isa::kBaseline;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
    return Isa::kAvx2;
  const bool bf16 = __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 5));
  return bf16 ? Isa::kAvx512Bf16 : Isa::kAvx512;
#else
  return Isa::kBaseline;
#endif
}

Isa decide() {
  const Isa best = best_of_this_cpu();
  const char* wanted = std::getenv("GRPO_KERNELS_ISA");
  if (wanted == nullptr || *wanted == '\0') return best;
  for (int i = 0; i < 4; ++i) {
    if (std::strcmp(wanted, kNames[i]) != 0) continue;
    if (i <= static_cast<int>(best)) return static_cast<Isa>(i);
    throw std::runtime_error(std::string("GRPO_KERNELS_ISA=") + wanted + " is not available here: the best is " +
                             isa_name(best));
  }
  throw std::runtime_error(std::string("GRPO_KERNELS_ISA must be avx512_bf16, avx512, avx2 or baseline, got '") +
                           wanted + "'");
}

}  // namespace

Isa isa() {
  static const Isa chosen = decide();
  return chosen;
}

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

const TokenLogps& token_logps() {
#ifdef GRPO_X86
  switch (isa()) {
    case Isa::kAvx512Bf16: return kTokenLogpsAvx512Bf16;
    case Isa::kAvx512: return kTokenLogpsAvx512;
    case Isa::kAvx2: return kTokenLogpsAvx2;
    case Isa::kBaseline: break;
  }
#else
  isa();  // so that a wrong GRPO_KERNELS_ISA is an error on every machine
#endif
  return kTokenLogpsBaseline;
}

const HeadTile& head_tile() {
#ifdef GRPO_X86
  switch (isa()) {
    case Isa::kAvx512Bf16: return kHeadTileAvx512Bf16;
    case Isa::kAvx512: return kHeadTileAvx512;
    case Isa::kAvx2: return kHeadTileAvx2;
    case Isa::kBaseline: break;
  }
#else
  isa();  // so that a wrong GRPO_KERNELS_ISA is an error on every machine
#endif
  return kHeadTileBaseline;
}

}  // namespace grpo_kernels
