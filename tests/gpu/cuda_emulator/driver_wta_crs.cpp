// As driver.cpp, for wta_crs.
#include "calls.h"
#include "common/launch.cuh"
#include "wta_crs/wta_crs_launch.h"

namespace {

tilewise::RowBatch rows_of(const RowsCall& call) {
  tilewise::RowBatch rows{.dtype = static_cast<tilewise::Dtype>(call.dtype)};
  rows.batch = call.batch;
  rows.rows = call.rows;
  rows.columns = call.columns;
  rows.data = call.data;
  rows.batch_stride = call.batch_stride;
  rows.row_stride = call.row_stride;
  rows.column_stride = call.column_stride;
  return rows;
}

}  // namespace

extern "C" const char* wta_crs_norms(const RowsCall& call) {
  return tilewise::wta_crs_norms_cuda({.x = rows_of(call), .out = static_cast<float*>(call.out)}, nullptr);
}

extern "C" const char* wta_crs_gather(const RowsCall& call) {
  tilewise::RowGather op{.x = rows_of(call), .k = call.k, .indices = call.indices, .scales = call.scales};
  op.out = call.out;
  return tilewise::wta_crs_gather_cuda(op, nullptr);
}

extern "C" const char* wta_crs_sample(const RowsCall& call, const float* x_norms, const float* y_norms,
                                      const int64_t* seed, int64_t method, int64_t mix) {
  tilewise::RowSample op{.batch = call.batch, .rows = call.rows, .k = call.k};
  op.bits = tilewise::weight_bits(call.rows, call.k);
  op.mix = mix;
  op.method = static_cast<tilewise::SampleMethod>(method);
  op.x_norms = x_norms;
  op.y_norms = y_norms;
  op.seed = seed;
  op.indices = call.indices;
  op.scales = call.scales;
  emulator::Scratch scratch(tilewise::WtaCrsLaunches::bytes(op), tilewise::quiet_nan<float>());
  return tilewise::WtaCrsLaunches(op, scratch.data()).sample(nullptr);
}
