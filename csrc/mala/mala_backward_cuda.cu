// The gradients of mala on CUDA: of queries by a chunk, which leaves three numbers a query, and then of keys and
// values.
#include "mala/mala_tiles.cuh"

namespace tilewise {
namespace {

// R^T of every row of a product; of the tile nothing else is read or written meanwhile.
__device__ __forceinline__ void rotate_back(const MalaCall& call, int64_t begin, int length, int first, int feature,
                                            Product& product, float* tile) {
  product.store(tile);
  rotate_spot<false>(call, begin, length, first, feature, true, product_spot(), tile);
  product.load(tile);
}

// A block per run of queries of a head. W = dL/d(R phi), before what the magnitudes add, stays in registers for the
// second pass where it is one tile, and is formed again where it is not. Causal, within a chunk
// beta W = beta S do + sum over j <= i of (beta_i do_i . v_j) b_j, to which zeta_i g_j joins if b is g.
// W and zeta Z cancel over many keys of values alike, so S is that of floats whatever is stored.
template <typename Storage, bool kCausal>
__global__ void __launch_bounds__(kThreads, 2) mala_query_gradient_kernel(const __grid_constant__ MalaCall call) {
  const bool by_tiles = has_tiles(call), rotates = call.cos != nullptr;
  float* zs = static_cast<float*>(dynamic_shared()) + kSourceFloats;
  float *us = zs + kTile, *z_parts = us + kTile, *weight_parts = z_parts + 3 * kTile;
  float *mean_parts = weight_parts + 2 * kTile, *beta = mean_parts + 3 * kTile, *zeta = beta + kTile;
  float* d = zeta + kTile;  // grad_out, then what pairs weigh
  float* s = d + kTileFloats;
  float* v = s + kTileFloats;  // causal: values of keys, then features of queries
  float* b = v + kTileFloats;  // causal: features of keys
  float* pairs = by_tiles ? b + kTileFloats : d;
  const auto& from = sources_of_queries<Storage, kCausal>(call, flat_block());
  const Block& block = from.block;
  if (block.queries == 0) return;
  const Spot staged = staged_spot(), own = product_spot();
  const int diagonal = own.row - own.column;
  const auto sees = [&](int r, int c) { return c - r <= diagonal; };
  for (int first = 0; first < block.queries; first += kTile) {
    const bool goes_on = first + kTile < block.queries;
    Product w, seen;  // seen: do . v of pairs
    float f[kRows][kColumns], z[kRows] = {}, weight[kRows] = {}, mean[kRows] = {}, mean_pairs[kRows] = {};
    __syncthreads();
    if (!by_tiles && first == 0) {
      stage_vector(from.sums.z, 0, call.features, zs);
      stage_vector(from.sums.u, 0, call.values, us);
      stage_sums<float>(call, from.sums.s, 0, 0, s);
      __syncthreads();
    }
    const auto rotate_if = [&](int length, int feature, float* tile) {
      if (rotates) rotate_features<Storage>(call, block.first, length, first, feature, tile);
    };
    if (kCausal && !by_tiles) {
      stage_features(call, from.k, first, 0, b);
      rotate_if(from.k.length, 0, b);
    }
    for (int value = 0; value == 0 || value < call.values; value += kTile) {
      if (by_tiles) {
        __syncthreads();
        stage_vector(from.sums.u, value, call.values, us);
        __syncthreads();
      }
      float x[kRows][kColumns];
      load_spot(from.grad_out, first, value, call.values, 0.0f, staged, x);
      add_dots(x, us + staged.column, mean);
      stage_spot(x, d);
      if (kCausal) stage_values(from.v, first, value, call.values, v);
      __syncthreads();
      if (kCausal)
        add_product(seen, TokenRows<Storage>{d}, TokenRows<Storage>{v}, static_cast<int>(call.values) - value);
      if (!by_tiles) add_product(w, TokenRows<Storage>{d}, Rows<true>{s}, static_cast<int>(call.values));
    }
    store_dots(mean, mean_parts + 2 * kTile, false);
    if (kCausal) {
      seen.each([&](int r, int c, float& x) {
        x = sees(r, c) ? x : 0.0f;
        mean_pairs[r] += x;
      });
      store_row_sums(mean_pairs, mean_parts, false);
      __syncthreads();
      seen.store(pairs);
      if (goes_on) {
        add_to_sums<float>(OtherColumns<Storage>{b}, TokenColumns<Storage>{v}, s);
        if (threadIdx.x < kTile) add_columns(v, nullptr, threadIdx.x, us);
      }
    }
    Product scores;
#pragma unroll
    for (int pass = 0; pass < 2; ++pass) {
      for (int feature = 0; feature == 0 || feature < call.features; feature += kTile) {
        if (by_tiles) {
          w = Product();
          __syncthreads();
          stage_vector(from.sums.z, feature, call.features, zs);
          for (int value = 0; value == 0 || value < call.values; value += kTile) {
            __syncthreads();
            stage_values(from.grad_out, first, value, call.values, d);
            stage_sums<float>(call, from.sums.s, feature, value, s);
            __syncthreads();
            add_product(w, TokenRows<Storage>{d}, Rows<true>{s}, static_cast<int>(call.values) - value);
          }
        }
        if (!kCausal && (pass == 0 || by_tiles)) load_features(call, from.q, first, feature, own, f);
        if (!kCausal && rotates && (pass == 0 || by_tiles)) {
          __syncthreads();
          rotate_back(call, block.first, from.q.length, first, feature, w, d);
        }
        if (!kCausal && pass == 0) {  // a . W = f . R^T W
          add_dots(f, zs + own.column, z);
          w.each([&](int r, int c, float& x) { weight[r] = fmaf(f[r][c], x, weight[r]); });
          continue;
        }
        if (pass == 0) {
          float of_queries[kRows] = {}, of_pairs[kRows] = {}, of_sums[kRows] = {};
          __syncthreads();
          float x[kRows][kColumns];
          load_features(call, from.q, first, feature, staged, x);
          add_dots(x, zs + staged.column, of_queries);
          stage_operand<Storage>(x, v);
          store_dots(of_queries, z_parts + 2 * kTile, feature > 0);
          if (by_tiles || rotates) stage_features(call, from.k, first, feature, b);
          if (rotates) {
            __syncthreads();
            add_row_sums(of_pairs, OtherRows<Storage>{v}, OtherRows<Storage>{b},
                         static_cast<int>(call.features) - feature, sees);
            store_row_sums(of_pairs, z_parts, feature > 0);
            __syncthreads();
            rotate_if(from.q.length, feature, v);
            rotate_if(from.k.length, feature, b);
          }
          __syncthreads();
          Product a;
          a.load(v);
          w.each([&](int r, int c, float& x) { of_sums[r] = fmaf(a.at(r, c), x, of_sums[r]); });
          store_row_sums(of_sums, weight_parts, feature > 0);
          add_product(scores, OtherRows<Storage>{v}, OtherRows<Storage>{b}, static_cast<int>(call.features) - feature);
          continue;
        }
        if (kCausal && by_tiles) {
          stage_features(call, from.k, first, feature, b);
          rotate_if(from.k.length, feature, b);
          __syncthreads();
        }
        w.each([&](int r, int, float& x) { x *= beta[own.row + r]; });
        if (kCausal) add_product(w, OtherRows<Storage>{pairs}, OtherColumns<Storage>{b}, kTile);
        if (kCausal && rotates) {
          rotate_back(call, block.first, from.q.length, first, feature, w, v);
          __syncthreads();
          stage_features(call, from.k, first, feature, b);
          Product ones;
          ones.each([&](int r, int c, float& x) { x = sees(r, c) ? operand<Storage>(zeta[own.row + r]) : 0.0f; });
          ones.store(v);
          __syncthreads();
          add_product(w, OtherRows<Storage>{v}, OtherColumns<Storage>{b}, kTile);
        }
        if (kCausal) load_features(call, from.q, first, feature, own, f);
        w.each(
            [&](int r, int c, float& x) { x = fmaf(zeta[own.row + r], zs[own.column + c], x) * fminf(f[r][c], 1.0f); });
        store_product(w,
                      block.tokens_of<Storage>(call.grad_q, block.head, block.of_queries) + first * call.grad_q.token,
                      call.grad_q.token, block.queries - first, feature, call.features);
        if (kCausal && goes_on) {
          __syncthreads();
          if (threadIdx.x < kTile) add_columns(b, nullptr, threadIdx.x, zs);
        }
      }
      if (pass == 1) break;
      if (kCausal) {
        Product of_values;
        of_values.load(pairs);
        scores.each([&](int r, int c, float& x) {
          if (!sees(r, c)) return;
          weight[r] = fmaf(x, of_values.at(r, c), weight[r]);
          z[r] += x;
        });
      }
      if (!kCausal || !rotates) store_row_sums(z, z_parts, false);
      store_row_sums(weight, weight_parts, kCausal);
      __syncthreads();
      if (threadIdx.x < kTile) {
        const int i = static_cast<int>(threadIdx.x);
        const float count = keys_seen(call, block, first + i), share = call.scale / count;
        const float of_queries = kCausal ? z_parts[2 * kTile + i] : 0.0f;
        const float scaled = share * (z_parts[i] + z_parts[kTile + i] + of_queries);
        const float inverse = 1.0f / (scaled + call.eps);
        const float of_values = mean_parts[2 * kTile + i] + (kCausal ? mean_parts[i] + mean_parts[kTile + i] : 0.0f);
        const float of_features = share * (weight_parts[i] + weight_parts[kTile + i]);
        beta[i] = share * (1.0f + inverse);
        zeta[i] = share * (-of_features * inverse * inverse - of_values / count);
        if (first + i < block.queries) {
          const int64_t all = coefficient_count(call);
          float* coefficients = block.coefficients_of(call, block.of_queries);
          coefficients[first + i] = beta[i];
          coefficients[all + first + i] = zeta[i];
          coefficients[2 * all + first + i] = -scaled / count;
        }
      }
      __syncthreads();
      if (!kCausal) continue;
      Product of_pairs;
      of_pairs.load(pairs);
      of_pairs.each([&](int r, int c, float& x) {
        const float pair = fmaf(beta[own.row + r], x, rotates ? 0.0f : zeta[own.row + r]);
        x = sees(r, c) ? operand<Storage>(pair) : 0.0f;
      });
      of_pairs.store(pairs);
      __syncthreads();
    }
  }
}

// A block per run of keys: of a key head, or causal of a query head and its keys, from the last chunk to the first.
template <typename Storage, typename Gradient, bool kCausal>
__global__ void __launch_bounds__(kThreads, 2) mala_key_gradient_kernel(const __grid_constant__ MalaCall call) {
  const bool by_tiles = has_tiles(call), rotates = call.cos != nullptr;
  auto& from = *static_cast<Sources<Storage>*>(dynamic_shared());
  float* zs = static_cast<float*>(dynamic_shared()) + kSourceFloats;
  float *us = zs + kTile, *c = us + kTile;  // c: (3, 64)
  float* x = c + 3 * kTile;                 // values of keys, or their features, or what pairs weigh
  float* s = x + kTileFloats;
  float* a = s + kTileFloats;  // causal: features of queries, and grad_out
  float* d = a + kTileFloats;
  if (threadIdx.x == 0) {
    const Block block(call, flat_block(), call.keys, kCausal ? call.heads : call.key_heads);
    const int64_t state = kCausal ? block.line * tiles(call.keys, call.run) + block.run : block.line;
    new (&from) Sources<Storage>(call, block, sums_at(call.grad_sums, call, state), block.of_keys, block.keys);
  }
  __syncthreads();
  const Block& block = from.block;
  if (block.keys == 0) return;
  const Spot own = product_spot();
  // x becomes factor pair + added of the queries that see a key.
  const auto weigh = [&](Product& pairs, const float* factor, const float* added) {
    pairs.each([&](int r, int column, float& pair) {
      const int query = own.column + column;
      const float weighed = fmaf(factor[query], pair, added == nullptr ? 0.0f : added[query]);
      pair = query >= own.row + r ? operand<Storage>(weighed) : 0.0f;
    });
    pairs.store(x);
  };
  for (int step = 0; step < block.keys; step += kTile) {
    const int first = kCausal ? (block.keys - 1) / kTile * kTile - step : step;
    const bool goes_on = step + kTile < block.keys;
    const auto rotate_if = [&](int length, int feature, float* tile) {
      if (rotates) rotate_features<Storage>(call, block.first, length, first, feature, tile);
    };
    __syncthreads();
    if (kCausal && threadIdx.x < 3 * kTile) {
      const int i = first + static_cast<int>(threadIdx.x) % kTile;
      const float* coefficients = block.coefficients_of(call, block.of_keys);
      c[threadIdx.x] = i < block.keys ? coefficients[threadIdx.x / kTile * coefficient_count(call) + i] : 0.0f;
    }
    if (!by_tiles && step == 0) {
      stage_vector(from.sums.z, 0, call.features, zs);
      stage_vector(from.sums.u, 0, call.values, us);
      stage_sums<Storage>(call, from.sums.s, 0, 0, s);
    }
    for (int feature = 0; feature == 0 || feature < call.features; feature += kTile) {
      Product w, pairs;  // dS v, and v . do
      if (by_tiles) {
        __syncthreads();
        stage_vector(from.sums.z, feature, call.features, zs);
      }
      for (int value = 0; value == 0 || value < call.values; value += kTile) {
        if (by_tiles) {
          __syncthreads();
          stage_sums<Storage>(call, from.sums.s, feature, value, s);
        }
        stage_values(from.v, first, value, call.values, x);
        if (kCausal) stage_values(from.grad_out, first, value, call.values, d);
        __syncthreads();
        add_product(w, TokenRows<Storage>{x}, OtherRows<Storage>{s}, static_cast<int>(call.values) - value);
        if (kCausal)
          add_product(pairs, TokenRows<Storage>{x}, TokenRows<Storage>{d}, static_cast<int>(call.values) - value);
      }
      __syncthreads();
      if (kCausal) {
        weigh(pairs, c, rotates ? nullptr : c + kTile);
        stage_features(call, from.q, first, feature, a);
        rotate_if(from.q.length, feature, a);
        __syncthreads();
        add_product(w, OtherRows<Storage>{x}, OtherColumns<Storage>{a}, kTile);
        if (rotates) __syncthreads();
      }
      if (rotates) rotate_back(call, block.first, from.k.length, first, feature, w, x);
      if (kCausal && rotates) {
        Product ones;
        ones.each([](int, int, float& pair) { pair = 1.0f; });
        weigh(ones, c + kTile, nullptr);
        stage_features(call, from.q, first, feature, a);
        __syncthreads();
        add_product(w, OtherRows<Storage>{x}, OtherColumns<Storage>{a}, kTile);
      }
      float g[kRows][kColumns];
      load_features(call, from.k, first, feature, own, g);
      w.each([&](int r, int j, float& of_key) { of_key = (of_key + zs[own.column + j]) * fminf(g[r][j], 1.0f); });
      store_product(w, block.tokens_of<Gradient>(call.grad_k, block.head, block.of_keys) + first * call.grad_k.token,
                    call.grad_k.token, block.keys - first, feature, call.features);
    }
    __syncthreads();
    if (kCausal && goes_on && threadIdx.x < kTile) add_columns(a, c + kTile, threadIdx.x, zs);
    for (int value = 0; value == 0 || value < call.values; value += kTile) {
      Product w, pairs;  // dS^T b, and b . a
      if (by_tiles) {
        __syncthreads();
        stage_vector(from.sums.u, value, call.values, us);
      }
      for (int feature = 0; feature == 0 || feature < call.features; feature += kTile) {
        if (by_tiles || rotates) __syncthreads();
        if (by_tiles) stage_sums<Storage>(call, from.sums.s, feature, value, s);
        stage_features(call, from.k, first, feature, x);
        rotate_if(from.k.length, feature, x);
        if (kCausal && (by_tiles || rotates)) {
          stage_features(call, from.q, first, feature, a);
          rotate_if(from.q.length, feature, a);
        }
        __syncthreads();
        add_product(w, OtherRows<Storage>{x}, OtherColumns<Storage>{s}, static_cast<int>(call.features) - feature);
        if (kCausal)
          add_product(pairs, OtherRows<Storage>{x}, OtherRows<Storage>{a}, static_cast<int>(call.features) - feature);
      }
      if (kCausal) {
        __syncthreads();
        weigh(pairs, c, c + 2 * kTile);
        if (by_tiles) stage_values(from.grad_out, first, value, call.values, d);
        __syncthreads();
        add_product(w, OtherRows<Storage>{x}, TokenColumns<Storage>{d}, kTile);
      }
      w.each([&](int, int j, float& of_value) { of_value += us[own.column + j]; });
      store_product(w, block.tokens_of<Gradient>(call.grad_v, block.head, block.of_keys) + first * call.grad_v.token,
                    call.grad_v.token, block.keys - first, value, call.values);
    }
    if (kCausal && goes_on) {
      __syncthreads();
      add_to_sums<Storage>(OtherColumns<Storage>{a, c}, TokenColumns<Storage>{d}, s);
      if (threadIdx.x < kTile) add_columns(d, c + 2 * kTile, threadIdx.x, us);
    }
  }
}

}  // namespace

const char* mala_query_gradient_cuda(const MalaCall& call, void* stream) {
  const int64_t blocks = call.sequences * call.heads * tiles(call.queries, call.run);
  if (blocks == 0) return nullptr;
  return with_storage(call.dtype, [&](auto tag) {
    using Storage = decltype(tag);
    return with_causal(call, [&](auto causal) {
      const size_t shared = shared_bytes(!causal.value ? 2 : has_tiles(call) ? 5 : 4, 12);
      return launch(mala_query_gradient_kernel<Storage, causal.value>, flat_grid(blocks), dim3(kThreads), shared,
                    stream, call);
    });
  });
}

const char* mala_key_gradient_cuda(const MalaCall& call, void* stream) {
  const int64_t heads = call.causal ? call.heads : call.key_heads;
  const int64_t blocks = call.sequences * heads * tiles(call.keys, call.run);
  if (blocks == 0) return nullptr;
  return with_storage(call.dtype, [&](auto tag) {
    using Storage = decltype(tag);
    return with_causal(call, [&](auto causal) {
      const auto run = [&](auto kernel) {
        return launch(kernel, flat_grid(blocks), dim3(kThreads), shared_bytes(causal.value ? 4 : 2, 5), stream, call);
      };
      if constexpr (causal.value && !std::is_same_v<Storage, float>) {
        if (call.grad_dtype != call.dtype) return run(mala_key_gradient_kernel<Storage, float, causal.value>);
      }
      return run(mala_key_gradient_kernel<Storage, Storage, causal.value>);
    });
  });
}

}  // namespace tilewise
