// Python module _cuda: the GPU's path. Pointers, sizes, strides and the stream come as integers; neither PyTorch's nor
// CUDA's headers are needed here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "tubes_cuda.h"

namespace mirasol {
namespace {

void extract(uintptr_t video, int from, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
             const std::vector<int64_t>& numbers, const std::vector<double>& scale, const std::vector<double>& shift,
             const std::vector<uintptr_t>& tokens, int to, int device, uintptr_t stream) {
  const Clip clip = make_clip(sizes, strides);
  const std::vector<Tube> tubes = make_tubes(numbers, clip);
  require_pointers(clip, video, tokens, tubes.size());
  const Launch launch = make_launch(clip, tubes, make_affine(scale, shift), video, make_dtype(from),
                                      make_pointers<void*>(tokens), make_dtype(to));
  const pybind11::gil_scoped_release unlocked;
  extract_cuda(launch, make_dtype(from), make_dtype(to), device, reinterpret_cast<void*>(stream));
}

void scatter(const std::vector<uintptr_t>& tokens, int from, const std::vector<int64_t>& numbers,
             const std::vector<double>& scale, const std::vector<int64_t>& sizes, uintptr_t video, int to, int device,
             uintptr_t stream) {
  const Clip clip = make_contiguous_clip(sizes);
  const std::vector<Tube> tubes = make_tubes(numbers, clip);
  require_pointers(clip, video, tokens, tubes.size());
  const Launch launch = make_launch(clip, tubes, make_affine(scale, {0, 0, 0}), video, make_dtype(to),
                                      make_pointers<void*>(tokens), make_dtype(from));
  const pybind11::gil_scoped_release unlocked;
  scatter_cuda(launch, make_dtype(from), reinterpret_cast<void*>(video), make_dtype(to), device,
               reinterpret_cast<void*>(stream));
}

}  // namespace
}  // namespace mirasol

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "Sparse video tubes on a GPU";
  m.def("extract", &mirasol::extract);
  m.def("scatter", &mirasol::scatter);
}
