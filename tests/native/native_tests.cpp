// NumPy arrays in, NumPy arrays out: csrc/common for every instruction set this processor has.
#include "maths.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

namespace py = pybind11;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

template <typename From, typename To>
auto mapped(void (*function)(const From*, To*, int64_t)) {
  return [function](const Array<From>& x) {
    Array<To> y(x.size());
    function(x.data(), y.mutable_data(), x.size());
    return y;
  };
}

// c = start + a b by `parts` threads' shares, one after the other; arrays of any strides, b with unit columns.
template <typename T>
auto multiplied(void (*function)(const tilewise::Product<T>&, int64_t, int64_t)) {
  using Strided = py::array_t<T>;
  return [function](const Strided& a, const Strided& b, Strided c, const std::optional<Strided>& start, int64_t parts) {
    constexpr int64_t kSize = sizeof(T);
    tilewise::Product<T> product{.rows = c.shape(0), .columns = c.shape(1), .depth = a.shape(1)};
    product.a = a.data();
    product.a_row = a.strides(0) / kSize;
    product.a_depth = a.strides(1) / kSize;
    product.b = b.data();
    product.b_depth = b.strides(0) / kSize;
    product.c = c.mutable_data();
    product.c_row = c.strides(0) / kSize;
    product.c_column = c.strides(1) / kSize;
    if (start.has_value()) {
      product.start = start->data();
      product.start_row = start->strides(0) / kSize;
      product.start_column = start->strides(1) / kSize;
    }
    const int64_t units = tilewise::units_of(product);
    for (int64_t part = 0; part < parts; ++part) function(product, units * part / parts, units * (part + 1) / parts);
  };
}

void add_maths(py::module_& parent, const char* name, const tilewise::Maths& maths) {
  py::module_ m = parent.def_submodule(name);
  m.def("map_float", [&maths](const char* function, const Array<float>& x) {
    Array<float> y(x.size());
    maths.map_float(function, x.data(), y.mutable_data(), x.size());
    return y;
  });
  m.def("half_to_float", mapped(maths.half_to_float));
  m.def("bfloat16_to_float", mapped(maths.bfloat16_to_float));
  m.def("float_to_half", mapped(maths.float_to_half));
  m.def("float_to_bfloat16", mapped(maths.float_to_bfloat16));
  m.def("softmax", [&maths](const Array<float>& x, const Array<float>& c, const Array<int64_t>& tiles,
                            const Array<int64_t>& order) {
    const tilewise::Softmax s = maths.softmax(x.data(), c.data(), tiles.data(), order.data(), order.size());
    return py::make_tuple(s.max, s.sum, s.weight_sum, s.weighted_dot, s.exp_dot, s.argmax);
  });
  m.def("moments", [&maths](const Array<float>& x, const Array<int64_t>& tiles, const Array<int64_t>& order) {
    const tilewise::Moments s = maths.moments(x.data(), tiles.data(), order.data(), order.size());
    return py::make_tuple(s.count, s.mean, s.m2, s.scale);
  });
  m.def("multiply_float32", multiplied(maths.multiply_float));
  m.def("multiply_float64", multiplied(maths.multiply_double));
}

}  // namespace

PYBIND11_MODULE(native_tests, m) {
#if defined(__x86_64__)
  add_maths(m, "v2", tilewise::v2::maths);
  if (tilewise::cpu_level() >= 3) add_maths(m, "v3", tilewise::v3::maths);
  if (tilewise::cpu_level() >= 4) add_maths(m, "v4", tilewise::v4::maths);
#else
  add_maths(m, "baseline", tilewise::baseline::maths);
#endif
}
