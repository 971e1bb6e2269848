// The arrays of one call. Outputs start as NaNs, and so does the room around every array: after the call outputs must
// be numbers, and the room as it was.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "common/dtype.h"

namespace race {

enum class Element { kFloat, kBFloat16, kFloat16, kInt32, kInt64 };

class Memory {
 public:
  float* numbers(int64_t count, float low = -1.0f, float high = 1.0f);
  void* numbers(tilewise::Dtype dtype, int64_t count);
  float* filled(int64_t count, float value);
  // `batch` times `count` of them, above 0, that sum to 1.
  float* shares(int64_t batch, int64_t count);
  int64_t* integers(int64_t count, int64_t below);
  int32_t* integers_32(int64_t count, int32_t below);
  float* copy(const float* values, int64_t count);

  float* output(int64_t count) { return static_cast<float*>(output(tilewise::Dtype::kFloat32, count)); }
  void* output(tilewise::Dtype dtype, int64_t count);
  int64_t* integer_output(int64_t count);
  int32_t* integer_output_32(int64_t count);
  // Of what the call may leave as it is.
  float* scratch(int64_t count) { return static_cast<float*>(make(Element::kFloat, count, false)); }
  int64_t* integer_scratch(int64_t count) { return static_cast<int64_t*>(make(Element::kInt64, count, false)); }

  // What is wrong, or nothing.
  std::string fault() const;

 private:
  struct Array {
    Element element;
    int64_t count;
    bool is_output;
    std::unique_ptr<unsigned char[]> bytes;
  };

  void* make(Element element, int64_t count, bool is_output);
  static bool is_missing(const Array& array, int64_t i);

  std::vector<Array> arrays_;
};

}  // namespace race
