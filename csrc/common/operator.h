// An operator as it is registered: looks at every tensor before its function does, and names itself in what is thrown
// (host only).
#pragma once

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <new>
#include <string_view>

#include "common/checks.h"
#include "library.h"

// What torch's own operators threw last on this thread; torch hands it on from 2.13.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace tilewise {

template <size_t kSize>
struct Name {
  char text[kSize];
  constexpr Name(const char (&characters)[kSize]) { std::copy_n(characters, kSize, text); }
};

// The name of an argument, from the schema.
struct ArgumentName {
  std::string op;
  int64_t index;
  std::string name = "an argument";

  void def(const char* schema) {
    std::string_view text(schema);
    if (!text.starts_with(op + "(")) return;
    text.remove_prefix(op.size() + 1);
    for (int64_t place = 0;; ++place) {
      std::string_view argument = text.substr(0, text.find(", "));
      text.remove_prefix(std::min(text.size(), argument.size() + 2));
      if (argument == "*") argument = text.substr(0, text.find(", "));
      if (place < index) continue;
      argument = argument.substr(0, argument.find_first_of("=)"));
      name = argument.substr(argument.rfind(' ') + 1);
      return;
    }
  }
};

inline std::string argument_name(const char* op, int64_t index) {
  ArgumentName name{op, index};
  define_kernels(name);
  return name.name;
}

// Every tensor is there, has memory, and lies on the device of the first.
class TensorCheck {
 public:
  explicit TensorCheck(const char* op) : op_(op) {}

  template <typename T>
  void look(const T&) {
    ++index_;
  }
  void look(const std::optional<Tensor>& tensor) {
    if (tensor.has_value()) return look(*tensor);
    ++index_;
  }
  void look(const Tensor& tensor) {
    if (!tensor.defined()) refuse("to be a tensor, got None");
    if (tensor.numel() > 0 && tensor.data_ptr() == nullptr) refuse("to have memory, but its storage was freed");
    if (first_ == nullptr) first_ = &tensor;
    if (tensor.device() != first_->device()) refuse("on the device of the first tensor");
    ++index_;
  }

 private:
  [[noreturn]] void refuse(const char* what) const {
    require(false, op_, "expected ", argument_name(op_, index_), " ", what);
    __builtin_unreachable();
  }

  const char* op_;
  int64_t index_ = 0;
  const Tensor* first_ = nullptr;
};

// What was thrown, as a message of ours.
inline std::string explained(const char* op, const std::exception& error) {
  const std::string own = std::string("tilewise.") + op + ": ", what = error.what();
  if (what.starts_with("tilewise.")) return what;
  if (dynamic_cast<const std::bad_alloc*>(&error) != nullptr) return own + "out of memory";
  if (what.find("API call failed") == std::string::npos) return own + what;
  if (torch_exception_get_what_without_backtrace != nullptr) return own + torch_exception_get_what_without_backtrace();
  return own + "an operation of torch failed, perhaps for lack of memory (torch 2.13 tells more)";
}

template <Name kName, auto kFunction>
struct Operator;

template <Name kName, typename Result, typename... Arguments, Result (*kFunction)(Arguments...)>
struct Operator<kName, kFunction> {
  static Result call(Arguments... arguments) {
    try {
      TensorCheck check(kName.text);
      (check.look(arguments), ...);
      return kFunction(arguments...);
    } catch (const std::exception& error) {
      throw std::runtime_error(explained(kName.text, error));
    }
  }
};

// A function of one struct, registered with the struct's fields, whose types are listed, as its arguments.
template <typename... Types>
struct Fields {
  template <auto kFunction>
  static auto call(Types... fields) {
    return kFunction({fields...});
  }
};

}  // namespace tilewise

#define TILEWISE_IMPL(m, name, function) m.impl(name, TORCH_BOX((&tilewise::Operator<name, &function>::call)))
