// CPU kernels are compiled once per instruction set (TILEWISE_ISA is the namespace of that build) and
// chosen once, when the library is loaded.
#pragma once

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace tilewise {

#if defined(__x86_64__)

// The best level of this processor.
inline int processor_level() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return 2;
  const bool v4 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                  __builtin_cpu_supports("avx512cd");
  return v4 ? 4 : 3;
}

inline const char* cpu_isas() {
  const int best = processor_level();
  return best == 4 ? "v2, v3, v4" : best == 3 ? "v2, v3" : "v2";
}

// The processor's best, or what the environment asks for: for tests and for comparing.
inline int cpu_level() {
  static const int level = [] {
    const int best = processor_level();
    const char* requested = std::getenv("TILEWISE_CPU_ISA");
    if (requested == nullptr) return best;
    const int number = std::strlen(requested) == 2 && requested[0] == 'v' ? requested[1] - '0' : 0;
    if (number >= 2 && number <= best) return number;
    throw std::runtime_error(std::string("tilewise: expected TILEWISE_CPU_ISA to be one of ") + cpu_isas() +
                             " on this processor, got '" + requested + "'");
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

inline const char* cpu_isas() { return "baseline"; }
inline const char* cpu_isa() { return "baseline"; }

#define TILEWISE_DECLARE_KERNELS(type, name) \
  namespace baseline {                       \
  extern const type name;                    \
  }                                          \
  inline const type& selected_##name() { return baseline::name; }

#endif

// A table of kernels for both types that are computed in.
template <template <typename> typename Kernels>
struct ForTypes {
  Kernels<float> on_float;
  Kernels<double> on_double;

  template <typename T>
  const Kernels<T>& of() const {
    if constexpr (sizeof(T) == sizeof(double)) {
      return on_double;
    } else {
      return on_float;
    }
  }
};

}  // namespace tilewise
