// Python module _native: the CPU path. Pointers, sizes and strides come as integers, so no PyTorch header is needed.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "plan.h"
#include "tubes_cpu.h"
#include "tubes_rehearse.h"

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
  const char* isa;
  ExtractCpu extract;
  ScatterCpu scatter;
};

// What this processor can run, the fastest first.
std::vector<Path> paths() {
  std::vector<Path> able;
#ifdef MIRASOL_WITH_AVX2
  __builtin_cpu_init();
  // Every processor with AVX2 has F16C, which not every compiler knows how to ask for.
  if (__builtin_cpu_supports("avx2")) able.push_back({"avx2", avx2::extract, avx2::scatter});
#endif
  able.push_back({"baseline", baseline::extract, baseline::scatter});
  return able;
}

const std::vector<Path> kPaths = paths();

const Path& path(const std::string& isa) {
  for (const Path& candidate : kPaths) {
    if (isa.empty() || isa == candidate.isa) return candidate;
  }
  throw std::invalid_argument("isa must be one that this processor can run, was " + isa);
}

void extract(uintptr_t video, int from, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
             const std::vector<int64_t>& numbers, const std::vector<double>& scale, const std::vector<double>& shift,
             const std::vector<uintptr_t>& tokens, int to, int threads, const std::string& isa) {
  const Clip clip = make_clip(sizes, strides);
  const std::vector<Tube> tubes = make_tubes(numbers, clip);
  const Affine affine = make_affine(scale, shift);
  require_pointers(clip, video, tokens, tubes.size());
  require(make_dtype(to) != Dtype::kUint8, "tokens must be floating");
  require(threads >= 1, "threads must be at least 1");
  const auto out = make_pointers<void*>(tokens);
  const pybind11::gil_scoped_release unlocked;
  path(isa).extract(clip, tubes, affine, reinterpret_cast<const void*>(video), make_dtype(from), out.data(),
                    make_dtype(to), threads);
}

void scatter(const std::vector<uintptr_t>& tokens, int from, const std::vector<int64_t>& numbers,
             const std::vector<double>& scale, const std::vector<int64_t>& sizes, uintptr_t video, int to, int threads,
             const std::string& isa) {
  const Clip clip = make_contiguous_clip(sizes);
  const std::vector<Tube> tubes = make_tubes(numbers, clip);
  const Affine affine = make_affine(scale, {0, 0, 0});
  require_pointers(clip, video, tokens, tubes.size());
  require(make_dtype(from) != Dtype::kUint8 && make_dtype(to) != Dtype::kUint8, "gradients must be floating");
  require(threads >= 1, "threads must be at least 1");
  const auto in = make_pointers<const void*>(tokens);
  const pybind11::gil_scoped_release unlocked;
  path(isa).scatter(clip, tubes, affine, in.data(), make_dtype(from), reinterpret_cast<void*>(video), make_dtype(to),
                    threads);
}

// The GPU's launch for the same arguments, run here. Returns each tube's load width in bytes and whether its
// stores are wide.
std::vector<std::pair<int, bool>> rehearse(uintptr_t video, int from, const std::vector<int64_t>& sizes,
                                           const std::vector<int64_t>& strides, const std::vector<int64_t>& numbers,
                                           const std::vector<double>& scale, const std::vector<double>& shift,
                                           const std::vector<uintptr_t>& tokens, int to) {
  const Clip clip = make_clip(sizes, strides);
  const std::vector<Tube> tubes = make_tubes(numbers, clip);
  require_pointers(clip, video, tokens, tubes.size());
  const Launch launch = make_launch(clip, tubes, make_affine(scale, shift), video, make_dtype(from),
                                      make_pointers<void*>(tokens), make_dtype(to));
  rehearse_extract(launch, make_dtype(from), make_dtype(to));
  std::vector<std::pair<int, bool>> widths;
  for (uint32_t i = 0; i < launch.tasks; ++i) {
    widths.emplace_back(launch.task[i].load_bytes, launch.task[i].wide_stores);
  }
  return widths;
}

void rehearse_gradient(const std::vector<uintptr_t>& tokens, int from, const std::vector<int64_t>& numbers,
                       const std::vector<double>& scale, const std::vector<int64_t>& sizes, uintptr_t video, int to) {
  const Clip clip = make_contiguous_clip(sizes);
  const std::vector<Tube> tubes = make_tubes(numbers, clip);
  require_pointers(clip, video, tokens, tubes.size());
  const Launch launch = make_launch(clip, tubes, make_affine(scale, {0, 0, 0}), video, make_dtype(to),
                                      make_pointers<void*>(tokens), make_dtype(from));
  rehearse_scatter(launch, make_dtype(from), reinterpret_cast<void*>(video), make_dtype(to));
}

std::vector<std::string> names() {
  std::vector<std::string> names;
  for (const Path& able : kPaths) names.emplace_back(able.isa);
  return names;
}

}  // namespace
}  // namespace mirasol

PYBIND11_MODULE(_native, m) {
  m.doc() = "Sparse video tubes on the CPU, and a rehearsal of the GPU's launches";
  m.attr("instruction_sets") = mirasol::names();
  m.def("extract", &mirasol::extract);
  m.def("scatter", &mirasol::scatter);
  m.def("rehearse", &mirasol::rehearse);
  m.def("rehearse_gradient", &mirasol::rehearse_gradient);
}
