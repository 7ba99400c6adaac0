// The CPU path. This file is compiled once per instruction set, in a namespace MIRASOL_ISA of its own; products are
// never contracted with sums, so that every instruction set, the GPU and PyTorch itself round alike.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>

#ifdef __SSE2__
#include <immintrin.h>
#endif

#include "call.h"
#include "numbers.h"

namespace mirasol {
namespace MIRASOL_ISA {
namespace {

template <class A, class B>
using Compute = std::conditional_t<std::is_same_v<A, double> || std::is_same_v<B, double>, double, float>;

// How a row of pixels lies in memory. Packed: three channels beside each other. Planar: each channel beside itself.
enum class Row { kPacked, kPlanar, kStrided };

constexpr int64_t kBuffer = 8192;      // elements
constexpr int64_t kAround = 24 << 20;  // bytes of tokens that no cache will keep until they are read

Row row_of(const Clip& clip) {
  if (clip.stride[4] == 1 && clip.stride[3] == kChannels) return Row::kPacked;
  return clip.stride[3] == 1 ? Row::kPlanar : Row::kStrided;
}

// Threads worth waking for so many elements.
int team(int64_t elements, int threads) {
  constexpr int64_t least = 1 << 15;
  return elements / least + 1 < threads ? static_cast<int>(elements / least + 1) : threads;
}

// The channels' factors, repeated: as long as every vector register divides, in elements of a token.
template <class C>
struct Factors {
  static constexpr int kPeriod = 48;
  C scale[kPeriod], shift[kPeriod];

  explicit Factors(const Call& call) {
    for (int i = 0; i < kPeriod; ++i) {
      scale[i] = static_cast<C>(call.scale[i % kChannels]);
      shift[i] = static_cast<C>(call.shift[i % kChannels]);
    }
  }
};

template <class In, class Out>
MIRASOL_HD void convert_all(const In* __restrict in, Out* __restrict out, int n) {
  for (int i = 0; i < n; ++i) out[i] = convert<Out>(in[i]);
}

#ifdef __F16C__
MIRASOL_HD void convert_all(const float* __restrict in, Half* __restrict out, int n) {
  int i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i made = _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), made);
  }
  for (; i < n; ++i) out[i] = convert<Half>(in[i]);
}

MIRASOL_HD void convert_all(const Half* __restrict in, float* __restrict out, int n) {
  int i = 0;
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
  }
  for (; i < n; ++i) out[i] = convert<float>(in[i]);
}
#endif

// Normalises and converts up to a period of elements; `n` is a constant wherever it matters. Half precision takes a loop
// of its own before or behind, because compilers do not vectorise its conversion together with the rest.
template <class In, class Out, class C>
MIRASOL_HD void normalise_stretch(const In* __restrict in, Out* __restrict out, const Factors<C>& by, int n) {
  if constexpr (std::is_same_v<In, Half>) {
    C pixels[Factors<C>::kPeriod];
    convert_all(in, pixels, n);
    normalise_stretch(pixels, out, by, n);
  } else if constexpr (std::is_same_v<Out, Half>) {
    C elements[Factors<C>::kPeriod];
    normalise_stretch(in, elements, by, n);
    convert_all(elements, out, n);
  } else if constexpr (std::is_same_v<In, uint8_t> && std::is_same_v<Out, Bfloat>) {
#pragma omp simd
    for (int i = 0; i < n; ++i) out[i] = bfloat_of_number(convert<C>(in[i]) * by.scale[i] + by.shift[i]);
  } else {
#pragma omp simd
    for (int i = 0; i < n; ++i) out[i] = convert<Out>(convert<C>(in[i]) * by.scale[i] + by.shift[i]);
  }
}

// Writes past the caches, which would otherwise first read what is overwritten. `to` is aligned to 16 bytes.
template <class T, int N>
MIRASOL_HD void write_around(const T (&from)[N], T* to) {
#ifdef __SSE2__
  static_assert(N * sizeof(T) % sizeof(__m128i) == 0);
  for (size_t i = 0; i < N * sizeof(T) / sizeof(__m128i); ++i) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to) + i, _mm_load_si128(reinterpret_cast<const __m128i*>(from) + i));
  }
#else
  std::memcpy(to, from, sizeof(from));
#endif
}

// Ends a thread's writes around the caches.
MIRASOL_HD void settle() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

// Normalises and converts `n` elements in the order of a token, the first of them of channel 0.
template <class In, class Out, class C>
void normalise(const In* __restrict in, Out* __restrict out, const Factors<C>& by, int64_t n, bool around) {
  constexpr int period = Factors<C>::kPeriod;
  int64_t i = 0;
  if (around && reinterpret_cast<uintptr_t>(out) % 16 == 0) {
    for (; i + period <= n; i += period) {
      alignas(64) Out made[period];
      normalise_stretch(in + i, made, by, period);
      write_around(made, out + i);
    }
  }
  for (; i + period <= n; i += period) normalise_stretch(in + i, out + i, by, period);
  normalise_stretch(in + i, out + i, by, static_cast<int>(n - i));
}

// Copies a row of pixels side by side. A constant `Width` turns the copy into a few moves.
template <Row kind, int Width, class In>
inline void copy_row(const In* __restrict in, In* __restrict out, const Clip& clip, int width) {
  const int n = Width ? Width : width;
  if constexpr (kind == Row::kPacked) {
    std::memcpy(out, in, n * kChannels * sizeof(In));
  } else {
    const int64_t step = kind == Row::kPlanar ? 1 : clip.stride[3], plane = clip.stride[4];
    for (int i = 0; i < n; ++i) {
      out[i * kChannels] = in[i * step];
      out[i * kChannels + 1] = in[plane + i * step];
      out[i * kChannels + 2] = in[2 * plane + i * step];
    }
  }
}

// A row of tokens and one frame of each: the clip is read along its rows, in which the tokens lie side by side, and what
// was read passes through a buffer of the nearest cache, where every token's part lies in one piece.
template <Row kind, int Width, class In, class Out, class C>
void cut_frame(const In* frame, Out* out, In* buffer, const Tube& tube, const Clip& clip, const Factors<C>& by,
               bool around) {
  const int64_t row = int64_t{tube.kernel[2]} * kChannels, step = tube.stride[2] * clip.stride[3];
  const int64_t rows = std::max<int64_t>(1, std::min<int64_t>(tube.kernel[1], kBuffer / row));
  const int64_t tokens = std::max<int64_t>(1, std::min<int64_t>(tube.grid[2], kBuffer / (row * rows)));
  for (int64_t h = 0; h < tube.kernel[1]; h += rows) {
    const int64_t high = std::min(rows, tube.kernel[1] - h);
    for (int64_t w = 0; w < tube.grid[2]; w += tokens) {
      const int64_t wide = std::min(tokens, tube.grid[2] - w);
      for (int64_t i = 0; i < high; ++i) {
        const In* from = frame + (h + i) * clip.stride[2] + w * step;
        for (int64_t j = 0; j < wide; ++j) {
          copy_row<kind, Width>(from + j * step, buffer + (j * high + i) * row, clip, static_cast<int>(tube.kernel[2]));
        }
      }
      for (int64_t j = 0; j < wide; ++j) {
        normalise(buffer + j * high * row, out + (w + j) * tube.elements() + h * row, by, high * row, around);
      }
    }
  }
}

template <Row kind, class In, class Out, class C>
auto pick_cut(uint32_t width) {
  switch (width) {
    case 4: return cut_frame<kind, 4, In, Out, C>;
    case 8: return cut_frame<kind, 8, In, Out, C>;
    case 12: return cut_frame<kind, 12, In, Out, C>;
    case 16: return cut_frame<kind, 16, In, Out, C>;
    default: return cut_frame<kind, 0, In, Out, C>;
  }
}

template <Row kind, class In, class Out>
void extract(const Call& call, int threads) {
  using C = Compute<In, Out>;
  const Factors<C> by(call);
  const Clip& clip = call.clip;
  int64_t elements = 0;
  for (const Tube& tube : call.tubes) elements += clip.size[0] * tube.tokens() * tube.elements();
  const bool around = elements * static_cast<int64_t>(sizeof(Out)) > kAround;
#pragma omp parallel num_threads(team(elements, threads))
  for (size_t i = 0; i < call.tubes.size(); ++i) {
    const Tube& tube = call.tubes[i];
    const int64_t row = int64_t{tube.kernel[2]} * kChannels, frame = row * tube.kernel[1];
    const int64_t frames = clip.size[0] * tube.grid[0] * tube.grid[1] * tube.kernel[0];
    const auto cut = pick_cut<kind, In, Out, C>(tube.kernel[2]);
    const std::unique_ptr<In[]> buffer(new In[std::max(row, kBuffer)]);
    Out* out = static_cast<Out*>(call.tokens[i]);
#pragma omp for schedule(static) nowait
    for (int64_t n = 0; n < frames; ++n) {
      const int64_t t = n % tube.kernel[0], first = n / tube.kernel[0] * tube.grid[2];
      uint32_t b = static_cast<uint32_t>(first);
      const Place at = tube.token(b);
      const In* from = static_cast<const In*>(call.video) + tube.origin(clip, b, at) + t * clip.stride[1];
      cut(from, out + first * tube.elements() + t * frame, buffer.get(), tube, clip, by, around);
    }
    settle();
  }
}

// Adds to one row of the clip's gradient what every token that covers it holds, tubes and tokens in their order.
template <class In, class C>
void gather_row(const Call& call, uint32_t b, uint32_t frame, uint32_t height, C* row) {
  for (size_t i = 0; i < call.tubes.size(); ++i) {
    const Tube& tube = call.tubes[i];
    uint32_t t0, t1, h0, h1;
    tube.covering(0, frame, t0, t1);
    tube.covering(1, height, h0, h1);
    const int64_t width = int64_t{tube.kernel[2]} * kChannels;
    for (uint32_t t = t0; t < t1; ++t) {
      const int64_t dt = frame - tube.offset[0] - t * tube.stride[0];
      for (uint32_t h = h0; h < h1; ++h) {
        const int64_t dh = height - tube.offset[1] - h * tube.stride[1];
        const int64_t first = ((int64_t{b} * tube.grid[0] + t) * tube.grid[1] + h) * tube.grid[2];
        const In* in = static_cast<const In*>(call.tokens[i]) + first * tube.elements() + (dt * tube.kernel[1] + dh) * width;
        C* out = row + int64_t{tube.offset[2]} * kChannels;
        for (uint32_t w = 0; w < tube.grid[2]; ++w) {
#pragma omp simd
          for (int64_t e = 0; e < width; ++e) out[e] += convert<C>(in[e]);
          in += tube.elements();
          out += int64_t{tube.stride[2]} * kChannels;
        }
      }
    }
  }
}

template <class In, class Out>
void scatter(const Call& call, int threads) {
  using C = Compute<In, Out>;
  const int64_t* size = call.clip.size;
  const int64_t rows = size[0] * size[1] * size[2], length = size[3] * kChannels;
  C scale[kChannels];
  for (int c = 0; c < kChannels; ++c) scale[c] = static_cast<C>(call.scale[c]);
#pragma omp parallel num_threads(team(rows * length, threads))
  {
    const std::unique_ptr<C[]> sum(new C[length]);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t frame = r / size[2];
      for (int64_t i = 0; i < length; ++i) sum[i] = 0;
      gather_row<In>(call, static_cast<uint32_t>(frame / size[1]), static_cast<uint32_t>(frame % size[1]),
                     static_cast<uint32_t>(r % size[2]), sum.get());
      Out* out = static_cast<Out*>(call.video) + r * length;
      for (int64_t w = 0; w < length; w += kChannels) {
        for (int c = 0; c < kChannels; ++c) out[w + c] = convert<Out>(sum[w + c] * scale[c]);
      }
    }
  }
}

template <class F>
void with_float(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::kFloat16: return f(Half{});
    case Dtype::kBfloat16: return f(Bfloat{});
    case Dtype::kFloat64: return f(double{});
    default: return f(float{});
  }
}

}  // namespace

void extract(const Call& call, int threads) {
  with_float(call.element, [&](auto element) {
    const auto run = [&](auto pixel) {
      using In = decltype(pixel);
      using Out = decltype(element);
      switch (row_of(call.clip)) {
        case Row::kPacked: return extract<Row::kPacked, In, Out>(call, threads);
        case Row::kPlanar: return extract<Row::kPlanar, In, Out>(call, threads);
        case Row::kStrided: return extract<Row::kStrided, In, Out>(call, threads);
      }
    };
    if (call.pixel == Dtype::kUint8) return run(uint8_t{});
    with_float(call.pixel, run);
  });
}

void scatter(const Call& call, int threads) {
  with_float(call.element, [&](auto element) {
    with_float(call.pixel, [&](auto pixel) { scatter<decltype(element), decltype(pixel)>(call, threads); });
  });
}

}  // namespace MIRASOL_ISA
}  // namespace mirasol
