// Ctrl-C in a long computation (host only).
//
// Python runs the handlers of signals in its main thread and between its own instructions, of which a kernel has none:
// an Interrupt lets them run from time to time. What a handler raises, as a rule KeyboardInterrupt, would not pass
// through a kernel as what it is. It waits until the kernel, which ends at once with whatever it has, has returned to
// Python, and is raised there before anybody sees the result.
#pragma once

#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <tuple>

// Of Python's stable ABI; null in a process without Python.
extern "C" {
struct _object;
#define TILEWISE_PYTHON __attribute__((weak, visibility("default")))
TILEWISE_PYTHON int Py_IsInitialized(void);
TILEWISE_PYTHON int Py_AddPendingCall(int (*function)(void*), void* argument);
TILEWISE_PYTHON int PyGILState_Ensure(void);
TILEWISE_PYTHON void PyGILState_Release(int);
TILEWISE_PYTHON int PyErr_CheckSignals(void);
TILEWISE_PYTHON void PyErr_Fetch(_object** type, _object** value, _object** traceback);
TILEWISE_PYTHON void PyErr_Restore(_object* type, _object* value, _object* traceback);
#undef TILEWISE_PYTHON
}

namespace tilewise {

class Interrupt {
 public:
  // Whether to end. The thread that began the computation asks Python, the others hear of it.
  bool operator()() {
    if (raised_.load(std::memory_order_relaxed)) return true;
    if (std::this_thread::get_id() != thread_) return false;
    const int64_t now = milliseconds();
    if (now < next_) return false;
    next_ = now + kEvery;
    raised_.store(handler_raised(), std::memory_order_relaxed);
    return raised_.load(std::memory_order_relaxed);
  }

 private:
  static constexpr int64_t kEvery = 100;

  // Of the clock's last tick: the time since then costs as much as a small problem.
  static int64_t milliseconds() {
    timespec now{};
    ::clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
    return int64_t{now.tv_sec} * 1000 + now.tv_nsec / 1000000;
  }

  // In the main thread alone, which a process that ends does not leave behind without Python.
  static bool handler_raised() {
    if (::syscall(SYS_gettid) != ::getpid() || Py_IsInitialized == nullptr || Py_IsInitialized() == 0) return false;
    const int state = PyGILState_Ensure();
    bool raised = PyErr_CheckSignals() != 0;
    if (raised) {
      auto* exception = new Exception{};
      PyErr_Fetch(&std::get<0>(*exception), &std::get<1>(*exception), &std::get<2>(*exception));
      raised = Py_AddPendingCall(&Interrupt::raise, exception) == 0;
    }
    PyGILState_Release(state);
    return raised;
  }

  using Exception = std::tuple<_object*, _object*, _object*>;  // type, value, traceback

  static int raise(void* pending) {
    const std::unique_ptr<Exception> exception(static_cast<Exception*>(pending));
    std::apply(PyErr_Restore, *exception);
    return -1;
  }

  std::atomic<bool> raised_{false};
  const std::thread::id thread_ = std::this_thread::get_id();
  int64_t next_ = milliseconds() + kEvery;
};

}  // namespace tilewise
