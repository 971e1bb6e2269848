// mala on the CPU, for one instruction set: chunks of tokens whose features and products stay in the cache.
#include "mala/mala.h"

#include <algorithm>
#include <memory>

#include "common/gemm_tile.h"
#include "common/math.h"

namespace tilewise::TILEWISE_ISA {
namespace {

constexpr int64_t kChunk = 128;
constexpr int64_t kCausalChunk = 32;  // within it all pairs are formed, most of them for nothing

template <typename T>
struct Matrix {
  T* data;
  int64_t row;
  int64_t column = 1;

  Matrix transposed() const { return {data, column, row}; }
  operator Matrix<const T>() const
    requires(!std::is_const_v<T>)
  {
    return {data, row, column};
  }
};

// c = a b or c += a b, with a (rows, depth), b (depth, columns)
template <typename T>
void multiply(Matrix<T> c, Matrix<const T> a, Matrix<const T> b, int64_t rows, int64_t columns, int64_t depth,
              bool add) {
  Product<T> product{.rows = rows, .columns = columns, .depth = depth};
  product.a = a.data;
  product.a_row = a.row;
  product.a_depth = a.column;
  product.b = b.data;
  product.b_depth = b.row;
  product.c = c.data;
  product.c_row = c.row;
  product.c_column = c.column;
  if (add) {
    product.start = c.data;
    product.start_row = c.row;
    product.start_column = c.column;
  }
  multiply_block(product);
}

template <typename T>
Matrix<T> packed(T* out, Matrix<const T> x, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) out[i * columns + j] = x.data[i * x.row + j * x.column];
  }
  return {out, columns};
}

template <typename T>
T dot(const T* a, const T* b, int64_t n) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

// y += factor x
template <typename T>
void add_scaled(T* y, const T* x, T factor, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] += factor * x[i];
}

template <typename T>
void scale_to(T* y, const T* x, T factor, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = factor * x[i];
}

template <typename T>
class Chunk {
 public:
  Chunk(const MalaHead<T>& head, int64_t rows)
      : head_(head), d_(head.features), dv_(head.values), rows_(rows), memory_(new T[static_cast<size_t>(size())]) {
    T* next = memory_.get();
    const auto take = [&](int64_t count) {
      T* begin = next;
      next += count;
      return begin;
    };
    for (T** matrix : {&f_, &a_, &g_, &b_, &w_, &weighted_}) *matrix = take(rows * d_);
    grad_ = take(rows * dv_);
    pairs_ = take(rows * rows);
    more_pairs_ = take(rows * rows);
    packed_ = take(std::max(rows, dv_) * std::max({rows, d_, dv_}));
    z_run_ = take(d_);
    u_run_ = take(dv_);
  }

  void sum_keys(int64_t begin, int64_t n) {
    load(head_.k, begin, n, g_, b_);
    add_keys(head_.sums, begin, n);
  }

  void queries(int64_t begin, int64_t n) {
    const T share = head_.scale / seen(head_.keys);
    load(head_.q, begin, n, f_, a_);
    multiply<T>(rows_of(head_.out, begin), rows(a(), d_), {head_.sums.s, dv_}, n, dv_, d_, false);
    for (int64_t i = 0; i < n; ++i) {
      const T z = share * dot(f_ + i * d_, head_.sums.z, d_);
      finish(begin + i, z, share, z / seen(head_.keys), head_.sums.u);
    }
  }

  void backward_queries(int64_t begin, int64_t n) {
    const T keys = seen(head_.keys);
    const T share = head_.scale / keys;
    load(head_.q, begin, n, f_, a_);
    multiply<T>({w_, d_}, rows_of(head_.grad_out, begin), state_t(head_.sums.s), n, d_, dv_, false);
    for (int64_t i = 0; i < n; ++i) {
      const T* grad_out = row(head_.grad_out, begin + i);
      const T z = share * dot(f_ + i * d_, head_.sums.z, d_);
      const Coefficients c = coefficients(i, z, share, dot(grad_out, head_.sums.u, dv_) / keys);
      write_query(begin + i, i, c, share, head_.sums.z);
      scale_to(weighted_ + i * d_, a() + i * d_, share * c.beta, d_);
      add_scaled(head_.grad_sums.z, f_ + i * d_, share * c.zeta, d_);
      add_scaled(head_.grad_sums.u, grad_out, -z / keys, dv_);
    }
    multiply<T>({head_.grad_sums.s, dv_}, Matrix<const T>{weighted_, 1, d_}, rows_of(head_.grad_out, begin), d_, dv_, n,
                true);
  }

  void backward_keys(int64_t begin, int64_t n) {
    load(head_.k, begin, n, g_, b_);
    multiply<T>({w_, d_}, rows_of(head_.v, begin), state_t(head_.grad_sums.s), n, d_, dv_, false);
    multiply<T>({grad_, dv_}, rows(b(), d_), {head_.grad_sums.s, dv_}, n, dv_, d_, false);
    for (int64_t j = 0; j < n; ++j) write_key(begin + j, j, head_.grad_sums.z, head_.grad_sums.u);
  }

  // Queries and keys of one chunk; the sums are those of all keys before it, and after it.
  void causal(int64_t begin, int64_t n) {
    load(head_.q, begin, n, f_, a_);
    load(head_.k, begin, n, g_, b_);
    multiply<T>({pairs_, n}, rows(a(), d_), packed(packed_, rows(b(), d_).transposed(), d_, n), n, n, d_, false);
    keep_seen(pairs_, n);
    multiply<T>(rows_of(head_.out, begin), rows(a(), d_), {head_.sums.s, dv_}, n, dv_, d_, false);
    multiply<T>(rows_of(head_.out, begin), Matrix<const T>{pairs_, n}, rows_of(head_.v, begin), n, dv_, n, true);
    start_running(head_.sums);
    for (int64_t t = 0; t < n; ++t) {
      run_to(begin + t, t);
      const T keys = seen(head_.seen + begin + t + 1);
      const T share = head_.scale / keys;
      const T z = share * dot(f_ + t * d_, z_run_, d_);
      finish(begin + t, z, share, z / keys, u_run_);
    }
    add_keys(head_.sums, begin, n);
  }

  void causal_backward_queries(int64_t begin, int64_t n) {
    load(head_.q, begin, n, f_, a_);
    load(head_.k, begin, n, g_, b_);
    multiply<T>({w_, d_}, rows_of(head_.grad_out, begin), state_t(head_.sums.s), n, d_, dv_, false);
    const Matrix<const T> values = packed(packed_, rows_of(head_.v, begin).transposed(), dv_, n);
    multiply<T>({pairs_, n}, rows_of(head_.grad_out, begin), values, n, n, dv_, false);
    keep_seen(pairs_, n);
    multiply<T>({w_, d_}, Matrix<const T>{pairs_, n}, rows(b(), d_), n, d_, n, true);
    start_running(head_.sums);
    for (int64_t t = 0; t < n; ++t) {
      run_to(begin + t, t);
      const T keys = seen(head_.seen + begin + t + 1);
      const T share = head_.scale / keys;
      const T z = share * dot(f_ + t * d_, z_run_, d_);
      const Coefficients c = coefficients(t, z, share, dot(row(head_.grad_out, begin + t), u_run_, dv_) / keys);
      write_query(begin + t, t, c, share, z_run_);
      T* saved = head_.per_query + begin + t;
      saved[0] = share * c.beta;
      saved[head_.queries] = share * c.zeta;
      saved[2 * head_.queries] = -z / keys;
    }
    add_keys(head_.sums, begin, n);
  }

  // From the last chunk to the first; grad_sums are those that later queries give.
  void causal_backward_keys(int64_t begin, int64_t n) {
    load(head_.q, begin, n, f_, a_);
    load(head_.k, begin, n, g_, b_);
    const T* saved = head_.per_query + begin;
    for (int64_t t = 0; t < n; ++t) scale_to(weighted_ + t * d_, a() + t * d_, saved[t], d_);
    const Matrix<const T> weighted{weighted_, d_};
    multiply<T>({w_, d_}, rows_of(head_.v, begin), state_t(head_.grad_sums.s), n, d_, dv_, false);
    const Matrix<const T> grads = packed(packed_, rows_of(head_.grad_out, begin).transposed(), dv_, n);
    multiply<T>({pairs_, n}, rows_of(head_.v, begin), grads, n, n, dv_, false);
    keep_seeing(pairs_, n);
    multiply<T>({w_, d_}, Matrix<const T>{pairs_, n}, weighted, n, d_, n, true);
    multiply<T>({grad_, dv_}, rows(b(), d_), {head_.grad_sums.s, dv_}, n, dv_, d_, false);
    multiply<T>({more_pairs_, n}, rows(b(), d_), packed(packed_, weighted.transposed(), d_, n), n, n, d_, false);
    keep_seeing(more_pairs_, n);
    multiply<T>({grad_, dv_}, Matrix<const T>{more_pairs_, n}, rows_of(head_.grad_out, begin), n, dv_, n, true);
    for (int64_t j = n - 1; j >= 0; --j) {
      add_scaled(head_.grad_sums.z, f_ + j * d_, saved[head_.queries + j], d_);
      add_scaled(head_.grad_sums.u, row(head_.grad_out, begin + j), saved[2 * head_.queries + j], dv_);
      write_key(begin + j, j, head_.grad_sums.z, head_.grad_sums.u);
    }
    multiply<T>({head_.grad_sums.s, dv_}, weighted.transposed(), rows_of(head_.grad_out, begin), d_, dv_, n, true);
  }

 private:
  struct Coefficients {
    T beta, zeta;
  };

  int64_t size() const {
    return rows_ * (6 * d_ + dv_ + 2 * rows_) + std::max(rows_, dv_) * std::max({rows_, d_, dv_}) + d_ + dv_;
  }

  // With no keys every sum is 0, and so is the output.
  static T seen(int64_t keys) { return static_cast<T>(keys > 0 ? keys : 1); }

  template <typename U>
  static U* row(const Tokens<U>& tokens, int64_t i) {
    return tokens.data + i * tokens.stride;
  }
  template <typename U>
  static Matrix<U> rows_of(const Tokens<U>& tokens, int64_t begin) {
    return {row(tokens, begin), tokens.stride};
  }
  static Matrix<const T> rows(const T* x, int64_t width) { return {x, width}; }
  const T* a() const { return head_.cos.data != nullptr ? a_ : f_; }
  const T* b() const { return head_.cos.data != nullptr ? b_ : g_; }

  Matrix<const T> state_t(const T* s) { return packed(packed_, Matrix<const T>{s, 1, dv_}, dv_, d_); }

  void rotate(const T* x, int64_t token, T direction, T* out) const {
    const T* cos = row(head_.cos, token);
    const T* sin = row(head_.sin, token);
    for (int64_t i = 0; i < d_ / 2; ++i) {
      const T even = x[2 * i], odd = x[2 * i + 1], s = direction * sin[i];
      out[2 * i] = even * cos[i] - odd * s;
      out[2 * i + 1] = even * s + odd * cos[i];
    }
  }

  // phi, computed without the cancellation of elu(x) + 1, and its rotation
  void load(const Tokens<const T>& tokens, int64_t begin, int64_t n, T* features, T* rotated) const {
    for (int64_t i = 0; i < n; ++i) {
      const T* x = row(tokens, begin + i);
      T* f = features + i * d_;
#pragma omp simd
      for (int64_t j = 0; j < d_; ++j) {
        const T e = fast_exp(x[j] < T(0) ? x[j] : T(0));
        f[j] = x[j] > T(0) ? x[j] + T(1) : e;
      }
      if (head_.cos.data != nullptr) rotate(f, begin + i, T(1), rotated + i * d_);
    }
  }

  void add_keys(const MalaSums<T>& sums, int64_t begin, int64_t n) const {
    multiply<T>({sums.s, dv_}, Matrix<const T>{b(), 1, d_}, rows_of(head_.v, begin), d_, dv_, n, true);
    for (int64_t j = 0; j < n; ++j) {
      add_scaled(sums.z, g_ + j * d_, T(1), d_);
      add_scaled(sums.u, row(head_.v, begin + j), T(1), dv_);
    }
  }

  void start_running(const MalaSums<T>& sums) {
    std::copy_n(sums.z, d_, z_run_);  // of no features there may be no memory
    std::copy_n(sums.u, dv_, u_run_);
  }

  void run_to(int64_t token, int64_t t) {
    add_scaled(z_run_, g_ + t * d_, T(1), d_);
    add_scaled(u_run_, row(head_.v, token), T(1), dv_);
  }

  // out holds S^T a
  void finish(int64_t token, T z, T share, T mean_factor, const T* u) const {
    T* out = row(head_.out, token);
    const T factor = (T(1) + T(1) / (z + head_.eps)) * share;
#pragma omp simd
    for (int64_t j = 0; j < dv_; ++j) out[j] = factor * out[j] - mean_factor * u[j];
  }

  // w_ holds S do; `mean` is do . U / n.
  Coefficients coefficients(int64_t i, T z, T share, T mean) const {
    const T inverse = T(1) / (z + head_.eps);
    const T weight = share * dot(a() + i * d_, w_ + i * d_, d_);
    return {T(1) + inverse, -weight * inverse * inverse - mean};
  }

  void write_query(int64_t token, int64_t i, Coefficients c, T share, const T* z) {
    T* w = w_ + i * d_;
    const T* f = f_ + i * d_;
    T* out = row(head_.grad_q, token);
    if (out == nullptr) return;
    if (head_.cos.data != nullptr) rotate(w, token, T(-1), w);
#pragma omp simd
    for (int64_t j = 0; j < d_; ++j) {
      const T df = share * (c.zeta * z[j] + c.beta * w[j]);
      out[j] = f[j] < T(1) ? df * f[j] : df;
    }
  }

  // w_ holds dS v, grad_ holds dS^T b.
  void write_key(int64_t token, int64_t j, const T* dz, const T* du) {
    T* w = w_ + j * d_;
    const T* g = g_ + j * d_;
    T* grad_k = row(head_.grad_k, token);
    T* grad_v = row(head_.grad_v, token);
    if (head_.cos.data != nullptr) rotate(w, token, T(-1), w);
    if (!head_.adds) {
      for (int64_t i = 0; i < d_; ++i) grad_k[i] = T(0);
      for (int64_t i = 0; i < dv_; ++i) grad_v[i] = T(0);
    }
#pragma omp simd
    for (int64_t i = 0; i < d_; ++i) {
      const T dg = dz[i] + w[i];
      grad_k[i] += g[i] < T(1) ? dg * g[i] : dg;
    }
#pragma omp simd
    for (int64_t i = 0; i < dv_; ++i) grad_v[i] += grad_[j * dv_ + i] + du[i];
  }

  // Pairs of a query (row) and the keys (columns) that it sees.
  static void keep_seen(T* pairs, int64_t n) {
    for (int64_t t = 0; t < n; ++t) {
      for (int64_t j = t + 1; j < n; ++j) pairs[t * n + j] = T(0);
    }
  }

  // Pairs of a key (row) and the queries (columns) that see it.
  static void keep_seeing(T* pairs, int64_t n) {
    for (int64_t j = 0; j < n; ++j) {
      for (int64_t t = 0; t < j; ++t) pairs[j * n + t] = T(0);
    }
  }

  const MalaHead<T>& head_;
  int64_t d_, dv_, rows_;
  std::unique_ptr<T[]> memory_;
  T *f_, *a_, *g_, *b_;     // (rows, D) features of queries and keys, and rotated
  T *w_, *weighted_;        // (rows, D)
  T* grad_;                 // (rows, Dv)
  T *pairs_, *more_pairs_;  // (rows, rows)
  T* packed_;
  T *z_run_, *u_run_;
};

template <typename T, typename Step>
void over(const MalaHead<T>& head, int64_t size, int64_t begin, int64_t end, bool back, Step step) {
  Chunk<T> chunk(head, std::min(size, std::max<int64_t>(1, end - begin)));
  const int64_t chunks = (end - begin + size - 1) / size;
  for (int64_t i = 0; i < chunks; ++i) {
    const int64_t first = begin + (back ? chunks - 1 - i : i) * size;
    step(chunk, first, std::min(size, end - first));
  }
}

template <typename T>
void sum_keys(const MalaHead<T>& head, int64_t begin, int64_t end) {
  over(head, kChunk, begin, end, false, [](Chunk<T>& chunk, int64_t i, int64_t n) { chunk.sum_keys(i, n); });
}

template <typename T>
void queries(const MalaHead<T>& head, int64_t begin, int64_t end) {
  over(head, kChunk, begin, end, false, [](Chunk<T>& chunk, int64_t i, int64_t n) { chunk.queries(i, n); });
}

template <typename T>
void backward_queries(const MalaHead<T>& head, int64_t begin, int64_t end) {
  over(head, kChunk, begin, end, false, [](Chunk<T>& chunk, int64_t i, int64_t n) { chunk.backward_queries(i, n); });
}

template <typename T>
void backward_keys(const MalaHead<T>& head, int64_t begin, int64_t end) {
  over(head, kChunk, begin, end, false, [](Chunk<T>& chunk, int64_t i, int64_t n) { chunk.backward_keys(i, n); });
}

template <typename T>
void causal(const MalaHead<T>& head) {
  over(head, kCausalChunk, 0, head.queries, false, [](Chunk<T>& chunk, int64_t i, int64_t n) { chunk.causal(i, n); });
}

template <typename T>
void causal_backward(const MalaHead<T>& head) {
  over(head, kCausalChunk, 0, head.queries, false,
       [](Chunk<T>& chunk, int64_t i, int64_t n) { chunk.causal_backward_queries(i, n); });
  over(head, kCausalChunk, 0, head.queries, true,
       [](Chunk<T>& chunk, int64_t i, int64_t n) { chunk.causal_backward_keys(i, n); });
}

template <typename T>
constexpr MalaKernels<T> kernels{sum_keys<T>,      queries<T>, backward_queries<T>,
                                 backward_keys<T>, causal<T>,  causal_backward<T>};

}  // namespace

extern const ForTypes<MalaKernels> mala_kernels{kernels<float>, kernels<double>};

}  // namespace tilewise::TILEWISE_ISA
