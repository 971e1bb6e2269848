// wta_crs: arguments, memory, registration. Rows come in batches of any strides.
#include <algorithm>
#include <cmath>

#include "common/operator.h"
#include "wta_crs/wta_crs.h"
#include "wta_crs/wta_crs_launch.h"

namespace tilewise {
namespace {

RowBatch rows_of(const Tensor& x, const char* op) {
  require(x.dim() == 3, op, "expected x to have shape (batch, rows, columns), got ", shape_of(x));
  RowBatch rows{.batch = x.size(0), .rows = x.size(1), .columns = x.size(2), .data = x.data_ptr()};
  rows.batch_stride = x.stride(0);
  rows.row_stride = x.stride(1);
  rows.column_stride = x.stride(2);
  const std::optional<Dtype> dtype = storage_of(x);
  require(dtype.has_value() && !(kOnGpu && *dtype == Dtype::kFloat64), op,
          "expected x to be float32, bfloat16, float16 or, on a CPU, float64, got ", toString(x.scalar_type()));
  rows.dtype = *dtype;
  return rows;
}

constexpr int64_t kGrain = 16384;  // numbers that are worth a thread

template <typename Call>
void share(int64_t count, int64_t each, void (*kernel)(const Call&, int64_t, int64_t), const Call& call) {
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, each)),
                              [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
}

Tensor wta_crs_norms(const Tensor& x) {
  const char* op = "wta_crs_norms";
  RowNorms call{.x = rows_of(x, op)};
  const DeviceScope scope(x);
  const Tensor out = torch::stable::new_empty(x, {call.x.batch, call.x.rows}, ScalarType::Float);
  call.out = static_cast<float*>(out.data_ptr());
  if (out.numel() == 0) return out;
  if constexpr (kOnGpu) {
    require_launched(wta_crs_norms_cuda(call, current_stream(x)), op);
  } else {
    share(out.numel(), call.x.columns, selected_wta_crs_kernels().norms, call);
  }
  return out;
}

SampleMethod method_of(const std::string& name, const char* op) {
  if (name == "systematic") return SampleMethod::kSystematic;
  if (name == "wta") return SampleMethod::kWta;
  require(name == "crs", op, "expected method to be 'systematic', 'wta' or 'crs', got '", name, "'");
  return SampleMethod::kCrs;
}

std::tuple<Tensor, Tensor> wta_crs_sample(const Tensor& x_norms, const std::optional<Tensor>& norms, const Tensor& seed,
                                          int64_t k, const std::string& method, double mix) {
  const char* op = "wta_crs_sample";
  require(x_norms.dim() == 2, op, "expected x_norms to have shape (batch, rows), got ", shape_of(x_norms));
  RowSample call{.batch = x_norms.size(0), .rows = x_norms.size(1), .k = k, .method = method_of(method, op)};
  require(k >= 1 && k <= call.rows, op, "expected k to be in [1, ", call.rows, "], the rows, got ", k);
  call.bits = weight_bits(call.rows, k);
  require(call.bits >= 8 && call.rows < int64_t{1} << 31, op,
          "expected at most 2^31 rows, and rows times k to be at most 2^50, got ", call.rows, " and ", k);
  require(mix >= 0 && mix <= 1, op, "expected mix to be in [0, 1], got ", mix);
  call.mix = static_cast<int64_t>(mix * static_cast<double>(int64_t{1} << kMixBits));
  const std::vector<int64_t> shape{call.batch, call.rows}, places{call.batch, k};
  call.x_norms = dense<float>(x_norms, shape, ScalarType::Float, op, "x_norms");
  call.y_norms = dense<float>(norms, shape, ScalarType::Float, op, "norms");
  call.seed = dense<int64_t>(seed, {1}, ScalarType::Long, op, "seed");
  const DeviceScope scope(x_norms);
  const Tensor indices = torch::stable::new_empty(x_norms, places, ScalarType::Int);
  const Tensor scales = torch::stable::new_empty(x_norms, places, ScalarType::Float);
  call.indices = static_cast<int32_t*>(indices.data_ptr());
  call.scales = static_cast<float*>(scales.data_ptr());
  if (call.batch == 0) return {indices, scales};
  if constexpr (kOnGpu) {
    const Tensor scratch = torch::stable::new_empty(x_norms, {WtaCrsLaunches::bytes(call)}, ScalarType::Byte);
    require_launched(WtaCrsLaunches(call, scratch.data_ptr()).sample(current_stream(x_norms)), op);
  } else {
    for (int64_t i = 0; call.y_norms != nullptr && i < norms->numel(); ++i)
      require(call.y_norms[i] >= 0 && std::isfinite(call.y_norms[i]), op,
              "expected norms to hold finite numbers >= 0, got ", call.y_norms[i]);
    const Tensor own = torch::stable::new_empty(x_norms, shape, ScalarType::UInt32);
    call.own = static_cast<uint32_t*>(own.data_ptr());
    std::optional<Tensor> sums;
    if (call.method != SampleMethod::kSystematic) {
      sums = torch::stable::new_empty(x_norms, shape, ScalarType::Long);
      call.sums = static_cast<int64_t*>(sums->data_ptr());
    }
    share(call.batch, call.rows, selected_wta_crs_kernels().sample, call);
  }
  return {indices, scales};
}

Tensor wta_crs_gather(const Tensor& x, const Tensor& indices, const std::optional<Tensor>& scales) {
  const char* op = "wta_crs_gather";
  RowGather call{.x = rows_of(x, op)};
  require(indices.dim() == 2, op, "expected indices to have shape (batch, k), got ", shape_of(indices));
  call.k = indices.size(1);
  const std::vector<int64_t> places{call.x.batch, call.k};
  call.indices = dense<int32_t>(indices, places, ScalarType::Int, op, "indices");
  call.scales = dense<float>(scales, places, ScalarType::Float, op, "scales");
  const DeviceScope scope(x);
  const Tensor out = torch::stable::new_empty(x, {call.x.batch, call.k, call.x.columns}, x.scalar_type());
  call.out = out.data_ptr();
  if (out.numel() == 0) return out;
  if constexpr (kOnGpu) {
    require_launched(wta_crs_gather_cuda(call, current_stream(x)), op);
  } else {
    for (int64_t i = 0; i < indices.numel(); ++i)
      require(call.indices[i] >= 0 && call.indices[i] < call.x.rows, op, "expected indices to be in [0, ", call.x.rows,
              "), the rows, got ", call.indices[i]);
    share(indices.numel(), call.x.columns, selected_wta_crs_kernels().gather, call);
  }
  return out;
}

}  // namespace
}  // namespace tilewise

STABLE_TORCH_LIBRARY_IMPL(tilewise, TILEWISE_DISPATCH_KEY, m) {
  TILEWISE_IMPL(m, "wta_crs_norms", tilewise::wta_crs_norms);
  TILEWISE_IMPL(m, "wta_crs_sample", tilewise::wta_crs_sample);
  TILEWISE_IMPL(m, "wta_crs_gather", tilewise::wta_crs_gather);
}
