// Argument checks, views and allocation for the binding files (host only, LibTorch stable ABI).
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/dtype.h"

#if defined(__linux__) && !defined(TILEWISE_CUDA)
#include <sys/mman.h>
#endif

// A binding file is compiled twice, for the kernels of each device.
#if defined(TILEWISE_CUDA)
#define TILEWISE_DISPATCH_KEY CUDA
#else
#define TILEWISE_DISPATCH_KEY CPU
#endif

namespace tilewise {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#if defined(TILEWISE_CUDA)
inline constexpr bool kOnGpu = true;
#else
inline constexpr bool kOnGpu = false;
#endif

// Every message reads "tilewise.<op>: expected <argument> to be ..., got ...".
template <typename... Parts>
void require(bool condition, const char* op, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  message << "tilewise." << op << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// A shape as text, formed where it is written: most calls refuse nothing, and a stream costs as much as a small kernel.
struct ShapeText {
  const Tensor& tensor;

  friend std::ostream& operator<<(std::ostream& text, const ShapeText& shape) {
    text << "(";
    for (int64_t i = 0; i < shape.tensor.dim(); ++i) text << (i > 0 ? ", " : "") << shape.tensor.size(i);
    return text << (shape.tensor.dim() == 1 ? ",)" : ")");
  }
  friend bool operator==(const ShapeText& a, const ShapeText& b) {
    bool same = a.tensor.dim() == b.tensor.dim();
    for (int64_t i = 0; same && i < a.tensor.dim(); ++i) same = a.tensor.size(i) == b.tensor.size(i);
    return same;
  }
};

inline ShapeText shape_of(const Tensor& tensor) { return {tensor}; }

inline void require_shape(const Tensor& tensor, const std::vector<int64_t>& shape, const char* op, const char* name) {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; same && i < shape.size(); ++i) same = tensor.size(static_cast<int64_t>(i)) == shape[i];
  if (same) return;
  std::ostringstream expected;
  for (size_t i = 0; i < shape.size(); ++i) expected << (i > 0 ? ", " : "") << shape[i];
  require(false, op, "expected ", name, " to have shape (", expected.str(), shape.size() == 1 ? ",)" : ")", ", got ",
          shape_of(tensor));
}

inline void require_dtype(const Tensor& tensor, ScalarType dtype, const char* op, const char* name) {
  require(tensor.scalar_type() == dtype, op, "expected ", name, " to have dtype ", toString(dtype), ", got ",
          toString(tensor.scalar_type()));
}

// The elements of a tensor that lies densely; null when absent.
template <typename T>
const T* dense(const Tensor& tensor, std::vector<int64_t> shape, ScalarType dtype, const char* op, const char* name) {
  require_shape(tensor, std::move(shape), op, name);
  require_dtype(tensor, dtype, op, name);
  require(tensor.is_contiguous(), op, "expected ", name, " to be contiguous");
  return static_cast<const T*>(tensor.data_ptr());
}
template <typename T>
const T* dense(const std::optional<Tensor>& tensor, std::vector<int64_t> shape, ScalarType dtype, const char* op,
               const char* name) {
  return tensor.has_value() ? dense<T>(*tensor, std::move(shape), dtype, op, name) : nullptr;
}

// Uninitialised output. Large CPU outputs ask for huge pages: first touch of 4 KiB pages costs more than the
// arithmetic of a row kernel.
inline Tensor new_output(const Tensor& like, std::vector<int64_t> sizes, ScalarType dtype) {
  // Straight through the C shim: torch::stable::new_empty looks its operator up by name and boxes its arguments.
  int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), layout = 0, device = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(like.get(), &layout));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(like.get(), sizes.data(), static_cast<int64_t>(sizes.size()),
                                                          &type, &layout, &device, like.get_device_index(), nullptr,
                                                          &handle));
  Tensor output(handle);
#if defined(__linux__) && !defined(TILEWISE_CUDA)
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  const auto begin = reinterpret_cast<uintptr_t>(output.data_ptr());
  const uintptr_t end = begin + static_cast<uintptr_t>(output.numel()) * output.element_size();
  const uintptr_t first = (begin + kHuge - 1) / kHuge * kHuge;
  const uintptr_t last = end / kHuge * kHuge;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return output;
}

// Makes the tensor's device the current one for a launch; nothing to do on the CPU.
class DeviceScope {
 public:
#if defined(TILEWISE_CUDA)
  explicit DeviceScope(const Tensor& tensor) : guard_(tensor.get_device_index()) {}

 private:
  torch::stable::accelerator::DeviceGuard guard_;
#else
  explicit DeviceScope(const Tensor&) {}
#endif
};

#if defined(TILEWISE_CUDA)
inline void* current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}
#else
void* current_stream(const Tensor& tensor);  // never called
#endif

inline void require_launched(const char* error, const char* op) {
  require(error == nullptr, op, "the CUDA kernel could not be launched: ", error == nullptr ? "" : error);
}

// The type that is computed in: double for float64, else float.
inline ScalarType statistics_type(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Calls f with a zero of that type. No GPU kernel computes in double.
template <typename Function>
auto with_statistics(const Tensor& tensor, Function f) {
  if constexpr (!kOnGpu) {
    if (statistics_type(tensor) == ScalarType::Double) return f(double{});
  }
  return f(float{});
}

// How the elements of a tensor are stored; nothing for what no kernel reads.
inline std::optional<Dtype> storage_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return Dtype::kFloat64;
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      return {};
  }
}

}  // namespace tilewise
