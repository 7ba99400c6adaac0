// Python module _cuda: the GPU's path, on the current device and a stream of the caller's.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "launch.h"

namespace mirasol {
namespace {

void run(void (*function)(const Launch&, void*), const Numbers& numbers, uintptr_t stream) {
  const Launch launch = make_launch(make_call(numbers));
  const pybind11::gil_scoped_release unlocked;
  function(launch, reinterpret_cast<void*>(stream));
}

}  // namespace
}  // namespace mirasol

PYBIND11_MODULE(_cuda, m) {
  using namespace mirasol;
  m.doc() = "Sparse video tubes on a GPU";
  m.def("extract", [](const Numbers& call, uintptr_t stream) { run(extract_cuda, call, stream); });
  m.def("scatter", [](const Numbers& call, uintptr_t stream) { run(scatter_cuda, call, stream); });
}
