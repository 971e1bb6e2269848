// simplex_topk: arguments, memory, registration. Rows are dense.
#include "common/operator.h"
#include "common/problems.h"
#include "simplex_topk/simplex_topk.h"

namespace tilewise {
namespace {

template <typename T>
SimplexTopk<T> call_of(const Tensor& x, const Tensor& out) {
  SimplexTopk<T> call{.columns = x.size(x.dim() - 1)};
  call.rows = x.numel() / call.columns;
  call.x = static_cast<const T*>(x.data_ptr());
  call.out = static_cast<T*>(out.data_ptr());
  return call;
}

void check_rows(const Tensor& x, const char* op, const char* name) {
  computed(x, op, name);
  require(x.dim() > 0 && x.size(x.dim() - 1) > 0, op, "expected ", name,
          " to have a last dimension of at least 1, got shape ", shape_of(x));
  require(x.is_contiguous(), op, "expected ", name, " to be contiguous");
}

// In small pages: rows take less time than a virtual machine may need to find the memory behind huge ones.
Tensor output_like(const Tensor& x) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < x.dim(); ++i) sizes.push_back(x.size(i));
  return torch::stable::new_empty(x, sizes, x.scalar_type());
}

#if defined(TILEWISE_CUDA)

void run(const SimplexTopk<float>& call, const Tensor& x, bool backward) {
  void* stream = current_stream(x);
  require_launched(backward ? simplex_topk_backward_cuda(call, stream) : simplex_topk_cuda(call, stream),
                   "simplex_topk");
}

#else

constexpr int64_t kGrain = 16384;  // numbers that are worth a thread

template <typename T>
void run(const SimplexTopk<T>& call, const Tensor& x, bool backward) {
  constexpr bool kFloat = sizeof(T) == sizeof(float);
  const SimplexTopkKernels& kernels = selected_simplex_topk_kernels();
  const int64_t grain = std::max<int64_t>(1, kGrain / call.columns);
  if (backward) {
    torch::stable::parallel_for(0, call.rows, grain, [&](int64_t begin, int64_t end) {
      if constexpr (kFloat) {
        kernels.backward_float(call, begin, end);
      } else {
        kernels.backward_double(call, begin, end);
      }
    });
    return;
  }
  const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t workers = std::clamp<int64_t>(call.rows / grain, 1, threads);
  const int64_t size = simplex_elements(call.columns);
  constexpr int64_t kWide = sizeof(int64_t) / sizeof(T);
  const int64_t each = (2 + kWide) * size;
  const Tensor scratch = torch::stable::new_empty(x, {workers * each}, x.scalar_type());
  T* memory = static_cast<T*>(scratch.data_ptr());
  torch::stable::parallel_for(0, workers, 1, [&](int64_t first, int64_t last) {
    for (int64_t worker = first; worker < last; ++worker) {
      T* own = memory + worker * each;
      const ProjectScratch<T> spare{own, own + size, reinterpret_cast<int64_t*>(own + 2 * size)};
      const int64_t begin = call.rows * worker / workers, end = call.rows * (worker + 1) / workers;
      if constexpr (kFloat) {
        kernels.forward_float(call, spare, begin, end);
      } else {
        kernels.forward_double(call, spare, begin, end);
      }
    }
  });
}

#endif

Tensor simplex_topk(const Tensor& x, int64_t k, double scale) {
  const char* op = "simplex_topk";
  check_rows(x, op, "x");
  require(k >= 1 && k <= x.size(x.dim() - 1), op, "expected k to be in [1, ", x.size(x.dim() - 1), "], got ", k);
  const DeviceScope scope(x);
  const Tensor out = output_like(x);
  with_type(x, [&](auto zero) {
    using T = decltype(zero);
    SimplexTopk<T> call = call_of<T>(x, out);
    call.k = k;
    call.scale = positive<T>(scale, op, "scale");
    if (call.rows > 0) run(call, x, false);
  });
  return out;
}

Tensor simplex_topk_backward(const Tensor& grad, const Tensor& p) {
  const char* op = "simplex_topk_backward";
  check_rows(grad, op, "grad");
  check_rows(p, op, "p");
  require(shape_of(grad) == shape_of(p), op, "expected grad to have shape ", shape_of(p), ", got ", shape_of(grad));
  require_dtype(grad, p.scalar_type(), op, "grad");
  const DeviceScope scope(grad);
  const Tensor out = output_like(grad);
  if (grad.numel() == 0) return out;
  with_type(grad, [&](auto zero) {
    using T = decltype(zero);
    SimplexTopk<T> call = call_of<T>(p, out);
    call.grad = static_cast<const T*>(grad.data_ptr());
    run(call, grad, true);
  });
  return out;
}

}  // namespace
}  // namespace tilewise

STABLE_TORCH_LIBRARY_IMPL(tilewise, TILEWISE_DISPATCH_KEY, m) {
  TILEWISE_IMPL(m, "simplex_topk", tilewise::simplex_topk);
  TILEWISE_IMPL(m, "simplex_topk_backward", tilewise::simplex_topk_backward);
}
