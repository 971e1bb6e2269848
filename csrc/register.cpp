// Hands the operators to PyTorch.
#include "library.h"

#include <torch/csrc/stable/library.h>

#include "common/isa.h"

STABLE_TORCH_LIBRARY(tilewise, m) {
  tilewise::define_kernels(m);
  tilewise::define_composites(m);
}

// For Python, by ctypes: the instruction sets of this processor, and the one in use; null where TILEWISE_CPU_ISA asks
// for another.
#define TILEWISE_EXPORT extern "C" __attribute__((visibility("default")))

TILEWISE_EXPORT const char* tilewise_cpu_isas() { return tilewise::cpu_isas(); }

TILEWISE_EXPORT const char* tilewise_cpu_isa() try { return tilewise::cpu_isa(); } catch (const std::runtime_error&) {
  return nullptr;
}
