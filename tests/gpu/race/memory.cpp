#include "memory.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>

namespace race {
namespace {

constexpr int64_t kRoom = 256;  // bytes before and behind an array
constexpr unsigned char kPoison = 0xff;

std::mt19937 generator(1);

int64_t bytes_of(Element element) {
  switch (element) {
    case Element::kInt64:
      return 8;
    case Element::kFloat:
    case Element::kInt32:
      return 4;
    default:
      return 2;
  }
}

Element element_of(tilewise::Dtype dtype) {
  if (dtype == tilewise::Dtype::kBFloat16) return Element::kBFloat16;
  return dtype == tilewise::Dtype::kFloat16 ? Element::kFloat16 : Element::kFloat;
}

}  // namespace

void* Memory::make(Element element, int64_t count, bool is_output) {
  const int64_t bytes = count * bytes_of(element) + 2 * kRoom;
  arrays_.push_back({element, count, is_output, std::make_unique_for_overwrite<unsigned char[]>(bytes)});
  unsigned char* begin = arrays_.back().bytes.get();
  std::memset(begin, kPoison, bytes);
  return begin + kRoom;
}

float* Memory::numbers(int64_t count, float low, float high) {
  float* values = scratch(count);
  std::uniform_real_distribution<float> any(low, high);
  std::generate_n(values, count, [&] { return any(generator); });
  return values;
}

void* Memory::numbers(tilewise::Dtype dtype, int64_t count) {
  const float* values = numbers(count);
  void* out = make(element_of(dtype), count, false);
  for (int64_t i = 0; i < count; ++i) {
    switch (dtype) {
      case tilewise::Dtype::kBFloat16:
        tilewise::from_float(values[i], static_cast<tilewise::BFloat16*>(out)[i]);
        break;
      case tilewise::Dtype::kFloat16:
        tilewise::from_float(values[i], static_cast<tilewise::Float16*>(out)[i]);
        break;
      default:
        static_cast<float*>(out)[i] = values[i];
    }
  }
  return out;
}

float* Memory::filled(int64_t count, float value) {
  float* values = scratch(count);
  std::fill_n(values, count, value);
  return values;
}

float* Memory::shares(int64_t batch, int64_t count) {
  float* values = numbers(batch * count, 0.1f, 1.0f);
  for (float* line = values; line < values + batch * count; line += count) {
    float sum = 0.0f;
    for (int64_t i = 0; i < count; ++i) sum += line[i];
    for (int64_t i = 0; i < count; ++i) line[i] /= sum;
  }
  return values;
}

int64_t* Memory::integers(int64_t count, int64_t below) {
  int64_t* values = integer_scratch(count);
  std::generate_n(values, count, [&] { return static_cast<int64_t>(generator() % static_cast<uint64_t>(below)); });
  return values;
}

int32_t* Memory::integers_32(int64_t count, int32_t below) {
  int32_t* values = static_cast<int32_t*>(make(Element::kInt32, count, false));
  std::generate_n(values, count, [&] { return static_cast<int32_t>(generator() % static_cast<uint32_t>(below)); });
  return values;
}

float* Memory::copy(const float* values, int64_t count) {
  float* copied = scratch(count);
  std::copy_n(values, count, copied);
  return copied;
}

void* Memory::output(tilewise::Dtype dtype, int64_t count) { return make(element_of(dtype), count, true); }

int64_t* Memory::integer_output(int64_t count) { return static_cast<int64_t*>(make(Element::kInt64, count, true)); }

int32_t* Memory::integer_output_32(int64_t count) { return static_cast<int32_t*>(make(Element::kInt32, count, true)); }

bool Memory::is_missing(const Array& array, int64_t i) {
  const unsigned char* begin = array.bytes.get() + kRoom;
  const auto at = [&]<typename T>(T) { return reinterpret_cast<const T*>(begin)[i]; };
  switch (array.element) {
    case Element::kFloat:
      return std::isnan(at(0.0f));
    case Element::kBFloat16:
      return std::isnan(tilewise::to_float(at(tilewise::BFloat16{})));
    case Element::kFloat16:
      return std::isnan(tilewise::to_float(at(tilewise::Float16{})));
    case Element::kInt32:
      return at(int32_t{}) == -1;
    case Element::kInt64:
      return at(int64_t{}) == -1;
  }
  return false;
}

std::string Memory::fault() const {
  for (size_t place = 0; place < arrays_.size(); ++place) {
    const Array& array = arrays_[place];
    const unsigned char* begin = array.bytes.get();
    const unsigned char* end = begin + kRoom + array.count * bytes_of(array.element);
    const auto poisoned = [](unsigned char byte) { return byte == kPoison; };
    if (!std::all_of(begin, begin + kRoom, poisoned) || !std::all_of(end, end + kRoom, poisoned))
      return "written outside array " + std::to_string(place);
    if (!array.is_output) continue;
    for (int64_t i = 0; i < array.count; ++i) {
      if (is_missing(array, i))
        return "element " + std::to_string(i) + " of array " + std::to_string(place) + " is not written, or NaN";
    }
  }
  return "";
}

}  // namespace race
