// Python module _native: the CPU path. Pointers, sizes and strides come as integers, so no PyTorch header is needed.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "plan.h"
#include "tubes_cpu.h"

namespace mirasol {

#define MIRASOL_DECLARE(isa)                                                                                       \
  namespace isa {                                                                                                  \
  void extract(const Clip&, const std::vector<Tube>&, const Affine&, const void*, Dtype, void* const*, Dtype, int); \
  void scatter(const Clip&, const std::vector<Tube>&, const Affine&, const void* const*, Dtype, void*, Dtype, int); \
  }
MIRASOL_DECLARE(baseline)
#ifdef MIRASOL_WITH_AVX2
MIRASOL_DECLARE(avx2)
#endif

namespace {

struct Path {
  const char* name;
  ExtractCpu extract;
  ScatterCpu scatter;
};

Path pick() {
#ifdef MIRASOL_WITH_AVX2
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2")) return {"avx2", avx2::extract, avx2::scatter};
#endif
  return {"baseline", baseline::extract, baseline::scatter};
}

const Path kPath = pick();

Affine make_affine(const std::vector<double>& scale, const std::vector<double>& shift) {
  require(scale.size() == kChannels && shift.size() == kChannels, "scale and shift must hold three numbers");
  Affine affine;
  for (int c = 0; c < kChannels; ++c) {
    affine.scale[c] = scale[c];
    affine.shift[c] = shift[c];
  }
  return affine;
}

void extract(uintptr_t video, int from, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
             const std::vector<int64_t>& numbers, const std::vector<double>& scale, const std::vector<double>& shift,
             const std::vector<uintptr_t>& tokens, int to, int threads) {
  const Clip clip = make_clip(sizes, strides);
  const std::vector<Tube> tubes = make_tubes(numbers, clip);
  const Affine affine = make_affine(scale, shift);
  require_pointers(clip, video, tokens, tubes.size());
  require(make_dtype(to) != Dtype::kUint8, "tokens must be floating");
  require(threads >= 1, "threads must be at least 1");
  std::vector<void*> out;
  for (uintptr_t pointer : tokens) out.push_back(reinterpret_cast<void*>(pointer));
  const pybind11::gil_scoped_release unlocked;
  kPath.extract(clip, tubes, affine, reinterpret_cast<const void*>(video), make_dtype(from), out.data(), make_dtype(to),
                threads);
}

void scatter(const std::vector<uintptr_t>& tokens, int from, const std::vector<int64_t>& numbers,
             const std::vector<double>& scale, const std::vector<int64_t>& sizes, uintptr_t video, int to,
             int threads) {
  const Clip clip = make_contiguous_clip(sizes);
  const std::vector<Tube> tubes = make_tubes(numbers, clip);
  const Affine affine = make_affine(scale, {0, 0, 0});
  require_pointers(clip, video, tokens, tubes.size());
  require(make_dtype(from) != Dtype::kUint8 && make_dtype(to) != Dtype::kUint8, "gradients must be floating");
  require(threads >= 1, "threads must be at least 1");
  std::vector<const void*> in;
  for (uintptr_t pointer : tokens) in.push_back(reinterpret_cast<const void*>(pointer));
  const pybind11::gil_scoped_release unlocked;
  kPath.scatter(clip, tubes, affine, in.data(), make_dtype(from), reinterpret_cast<void*>(video), make_dtype(to),
                threads);
}

}  // namespace
}  // namespace mirasol

PYBIND11_MODULE(_native, m) {
  m.doc() = "Sparse video tubes on the CPU";
  m.attr("isa") = mirasol::kPath.name;
  m.def("extract", &mirasol::extract);
  m.def("scatter", &mirasol::scatter);
}
