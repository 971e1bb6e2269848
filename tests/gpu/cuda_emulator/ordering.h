// What orders the memory of a kernel's threads, told to ThreadSanitizer where the emulator is compiled with it
// (`make race`): the start and the end of a launch, and barriers. A shuffle hands over its value and orders nothing.
// Elsewhere all of this is empty.
#pragma once

#include <cstddef>
#include <cstdio>
#include <string>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/common_interface_defs.h>
#include <sanitizer/tsan_interface.h>

extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

namespace emulator {

#if defined(__SANITIZE_THREAD__)

constexpr bool kWatched = true;

// In its scope nothing that this thread reads or writes counts: the emulator's own memory is no kernel's.
struct Unwatched {
  Unwatched() {
    AnnotateIgnoreReadsBegin("", 0);
    AnnotateIgnoreWritesBegin("", 0);
  }
  ~Unwatched() {
    AnnotateIgnoreWritesEnd("", 0);
    AnnotateIgnoreReadsEnd("", 0);
  }
  Unwatched(const Unwatched&) = delete;
  Unwatched& operator=(const Unwatched&) = delete;
};

// What is before release() in one thread is before what follows acquire() of the same token in another.
inline void release(char* token) { __tsan_release(token); }
inline void acquire(char* token) { __tsan_acquire(token); }

// A thread of a kernel as ThreadSanitizer knows it. Going from one to another orders nothing.
inline void* running_thread() { return __tsan_get_current_fiber(); }
inline void* new_thread() { return __tsan_create_fiber(0); }
inline void end_thread(void* thread) { __tsan_destroy_fiber(thread); }
inline void go_to_thread(void* thread) { __tsan_switch_to_fiber(thread, __tsan_switch_to_fiber_no_sync); }

inline std::string name_of(void* kernel) {
  char name[400] = "";
  // It takes what it is given for a return address, which lies behind the instruction that is meant.
  __sanitizer_symbolize_pc(static_cast<char*>(kernel) + 1, "%f", name, sizeof(name));
  return name;
}

#else

constexpr bool kWatched = false;
struct Unwatched {
  Unwatched() {}  // so that a variable of it is a used one
};
inline void release(char*) {}
inline void acquire(char*) {}
inline void* running_thread() { return nullptr; }
inline void* new_thread() { return nullptr; }
inline void end_thread(void*) {}
inline void go_to_thread(void*) {}
inline std::string name_of(void*) { return "a kernel"; }

#endif

}  // namespace emulator
