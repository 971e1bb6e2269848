// As driver.cpp, for clip_loss.
#include "calls.h"
#include "clip_loss/clip_loss.h"

namespace {

tilewise::ClipChunk<float> chunk_of(const ClipCall& call) {
  tilewise::ClipChunk<float> chunk{.similarities = call.similarities, .first = call.first};
  chunk.rows = call.rows;
  chunk.columns = call.columns;
  chunk.scale = call.scale;
  chunk.state = tilewise::clip_state(call.state, call.columns);
  chunk.grad_loss = call.grad_loss;
  chunk.gradient_dtype = static_cast<tilewise::Dtype>(call.gradient_dtype);
  chunk.gradient = call.gradient;
  return chunk;
}

}  // namespace

extern "C" const char* clip_statistics(const ClipCall& call) {
  auto* parts = static_cast<tilewise::ClipPart<float>*>(call.parts);
  return tilewise::clip_statistics_cuda(chunk_of(call),
                                        {parts, parts + call.rows * tilewise::clip_strips(call.columns)}, nullptr);
}

extern "C" const char* clip_finish(const ClipCall& call) {
  const tilewise::ClipLosses<float> losses{tilewise::clip_state(call.state, call.columns), call.loss_rows,
                                           call.share_rows, call.columns};
  tilewise::RowReduction<float> reduction{.rows = call.columns, .loss_rows = call.loss_rows};
  reduction.share_rows = call.share_rows;
  reduction.reduction = tilewise::Reduction::kMean;
  reduction.loss = call.loss;
  reduction.total = call.total;
  return tilewise::clip_finish_cuda(losses, reduction, nullptr);
}

extern "C" const char* clip_gradient(const ClipCall& call) {
  return tilewise::clip_gradient_cuda(chunk_of(call), nullptr);
}
