// What the Python modules of all backends share: how a tensor is described to them.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "args.h"

namespace fsl {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline Rows rows(uintptr_t data, int dtype, int64_t batch, int64_t seq, int64_t columns, int64_t valid,
                 int64_t stride_b, int64_t stride_s) {
  if (dtype < 0 || dtype > 2)
    throw std::invalid_argument("expected dtype 0 (fp32), 1 (bf16) or 2 (fp16), got " +
                                std::to_string(dtype));
  if (valid < 0 || valid > columns)
    throw std::invalid_argument("expected 0 <= valid <= columns, got " + std::to_string(valid) + " of " +
                                std::to_string(columns));
  return {pointer<void>(data), static_cast<Dtype>(dtype), batch, seq, columns, valid, stride_b, stride_s};
}

inline Want want(int columns) {
  if (columns != 3 && columns != 4 && columns != 6)
    throw std::invalid_argument("expected 3, 4 or 6 statistics, got " + std::to_string(columns));
  return static_cast<Want>(columns);
}

// Local to the module: each backend's module has a class of its own.
inline void bind_rows(pybind11::module_& m) {
  namespace py = pybind11;
  py::class_<Rows>(m, "Rows", py::module_local())
      .def(py::init(&rows), py::kw_only(), py::arg("data"), py::arg("dtype"), py::arg("batch"),
           py::arg("seq"), py::arg("columns"), py::arg("valid"), py::arg("stride_b"), py::arg("stride_s"));
}

}  // namespace fsl
