// Arrays one behind the other in scratch memory (host only). From null it only counts their bytes.
#pragma once

#include <cstdint>

namespace tilewise {

class Scratch {
 public:
  explicit Scratch(void* begin) : begin_(static_cast<char*>(begin)) {}

  template <typename T>
  T* take(int64_t count) {
    constexpr int64_t kBoundary = 16;
    T* array = begin_ == nullptr ? nullptr : reinterpret_cast<T*>(begin_ + bytes_);
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + kBoundary - 1) / kBoundary * kBoundary;
    return array;
  }

  int64_t bytes() const { return bytes_; }

 private:
  char* begin_;
  int64_t bytes_ = 0;
};

}  // namespace tilewise
