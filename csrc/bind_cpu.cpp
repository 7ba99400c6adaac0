// Python module _native: the CPU path.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "call.h"

namespace mirasol {

// tubes_cpu.cpp, compiled for each.
namespace baseline {
void extract(const Call&, int threads);
void scatter(const Call&, int threads);
}  // namespace baseline
namespace avx2 {
void extract(const Call&, int threads);
void scatter(const Call&, int threads);
}  // namespace avx2

namespace {

struct Path {
  std::string isa;
  void (*extract)(const Call&, int);
  void (*scatter)(const Call&, int);
};

// What this processor can run, the fastest first.
std::vector<Path> paths() {
  std::vector<Path> able = {{"baseline", baseline::extract, baseline::scatter}};
#ifdef __x86_64__
  __builtin_cpu_init();
  // Every processor with AVX2 has F16C, which not every compiler knows how to ask for.
  if (__builtin_cpu_supports("avx2")) able.insert(able.begin(), {"avx2", avx2::extract, avx2::scatter});
#endif
  return able;
}

const std::vector<Path> kPaths = paths();

void run(void (*Path::*function)(const Call&, int), const Numbers& numbers, int threads, const std::string& isa) {
  const Call call = make_call(numbers);
  require(threads >= 1, "threads must be at least 1");
  for (const Path& path : kPaths) {
    if (!isa.empty() && isa != path.isa) continue;
    const pybind11::gil_scoped_release unlocked;
    return (path.*function)(call, threads);
  }
  throw std::invalid_argument("isa must be one that this processor can run, was " + isa);
}

}  // namespace
}  // namespace mirasol

PYBIND11_MODULE(_native, m) {
  using namespace mirasol;
  m.doc() = "Sparse video tubes on the CPU";
  std::vector<std::string> names;
  for (const Path& path : kPaths) names.push_back(path.isa);
  m.attr("instruction_sets") = names;
  m.def("extract", [](const Numbers& call, int threads, const std::string& isa) {
    run(&Path::extract, call, threads, isa);
  });
  m.def("scatter", [](const Numbers& call, int threads, const std::string& isa) {
    require(std::get<1>(call) != 0, "a clip's gradient must be floating");
    run(&Path::scatter, call, threads, isa);
  });
}
