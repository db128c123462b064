// Which of the compiled instruction sets this process runs.
#pragma once

namespace grpo_kernels {

enum class Isa : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };

// The best set of this CPU, or the one that GRPO_KERNELS_ISA names; decided once per process.
// Throws std::runtime_error if the name is unknown, or this build or this CPU lacks that set.
Isa isa();

const char* isa_name(Isa isa);

}  // namespace grpo_kernels
