// CPU kernels are compiled once per instruction set (TILEWISE_ISA is the namespace of that build) and
// chosen once, when the library is loaded.
#pragma once

#include <cstdlib>
#include <cstring>

namespace tilewise {

#if defined(__x86_64__)

inline int cpu_level() {
  static const int level = [] {
    __builtin_cpu_init();
    int best = 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) best = 3;
    if (best == 3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd"))
      best = 4;
    // TILEWISE_CPU_ISA=v2|v3|v4 lowers the choice (never raises it): for tests and for comparing.
    const char* cap = std::getenv("TILEWISE_CPU_ISA");
    if (cap != nullptr && cap[0] == 'v' && cap[1] >= '2' && cap[1] - '0' < best) best = cap[1] - '0';
    return best;
  }();
  return level;
}

inline const char* cpu_isa() { return cpu_level() == 4 ? "v4" : cpu_level() == 3 ? "v3" : "v2"; }

// Declares `name` (a constant of type `type` defined by every build of one kernel file) and
// `selected_name()`, the one that fits this processor.
#define TILEWISE_DECLARE_KERNELS(type, name) \
  namespace v2 {                             \
  extern const type name;                    \
  }                                          \
  namespace v3 {                             \
  extern const type name;                    \
  }                                          \
  namespace v4 {                             \
  extern const type name;                    \
  }                                          \
  inline const type& selected_##name() { return cpu_level() == 4 ? v4::name : cpu_level() == 3 ? v3::name : v2::name; }

#else

inline const char* cpu_isa() { return "baseline"; }

#define TILEWISE_DECLARE_KERNELS(type, name) \
  namespace baseline {                       \
  extern const type name;                    \
  }                                          \
  inline const type& selected_##name() { return baseline::name; }

#endif

}  // namespace tilewise
