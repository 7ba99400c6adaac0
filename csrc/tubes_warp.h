// What one warp of the GPU does, as functions of the lane, so that the tests can walk through the same code on a CPU.
//
// A warp takes a token, in runs of at most 256 pixels. First the lanes copy a run into the block's memory, in the order
// of the token, with the widest accesses that alignment allows. Then they normalise it from there and write it out, 16
// bytes a lane side by side. Of the clip's gradient a warp takes a row, in runs as long: each lane sums elements of its
// own, which lie side by side with the next lane's, in a place of the block's memory that is its own too.
#pragma once

#include <cstdint>

#include "launch.h"
#include "numbers.h"

namespace mirasol {

// What one access moves.
template <int Bytes>
struct alignas(Bytes) Piece {
  std::conditional_t<Bytes == 1, uint8_t, std::conditional_t<Bytes == 2, uint16_t, uint32_t>> word[(Bytes + 3) / 4];
};

template <int Bytes>
MIRASOL_HD Piece<Bytes> read(const void* from) {
  Piece<Bytes> piece;
#ifdef __CUDA_ARCH__
  if constexpr (Bytes == 16) {
    *reinterpret_cast<uint4*>(&piece) = __ldg(static_cast<const uint4*>(from));
  } else if constexpr (Bytes == 8) {
    *reinterpret_cast<uint2*>(&piece) = __ldg(static_cast<const uint2*>(from));
  } else {
    piece.word[0] = __ldg(static_cast<decltype(&piece.word[0])>(const_cast<void*>(from)));
  }
#else
  piece = *static_cast<const Piece<Bytes>*>(from);
#endif
  return piece;
}

// Writes 16 or 8 bytes at once, which a compiler may otherwise split, or one element.
template <class T>
MIRASOL_HD void write(void* to, const T& data) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) == sizeof(uint4)) {
    uint4 w;
    memcpy(&w, &data, sizeof(w));
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(w.x), "r"(w.y),
                 "r"(w.z), "r"(w.w)
                 : "memory");
    return;
  } else if constexpr (sizeof(T) == sizeof(uint2)) {
    uint2 w;
    memcpy(&w, &data, sizeof(w));
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)), "r"(w.x), "r"(w.y) : "memory");
    return;
  }
#endif
  *static_cast<T*>(to) = data;
}

struct Run {
  int64_t origin;  // of its token in the clip, in elements
  int64_t output;  // of its token among the tube's, in elements
  uint32_t first;  // pixel of its token
  uint32_t pixels;
};

// Offset of a run's piece of `each` elements from its token's first pixel. Packed: pieces of a row, whatever channel they
// begin with. Otherwise pieces of one channel's row, the three channels in turn.
template <bool packed>
MIRASOL_HD int64_t source(const Launch& launch, const Task& task, const Run& run, uint32_t piece, uint32_t each) {
  const uint32_t first = run.first + (packed ? piece * each / kChannels : piece / kChannels * each);
  const uint32_t channel = packed ? piece * each % kChannels : piece % kChannels;
  const Place at = task.tube.pixel(first);
  const int64_t row = int64_t{launch.step[0]} * static_cast<int32_t>(at.t) +
                      int64_t{launch.step[1]} * static_cast<int32_t>(at.h);
  if constexpr (packed) return row + (at.w * kChannels + channel);
  return row + int64_t{launch.step[2]} * static_cast<int32_t>(at.w) + channel * launch.clip.stride[4];
}

// Copies this lane's share of a run, several pieces at a time: all of them are loaded before the first is stored, so that
// their latencies overlap.
template <class In, bool packed, int Bytes>
MIRASOL_HD void stage_pieces(const Launch& launch, const Task& task, const Run& run, int lane, In* stage) {
  constexpr uint32_t each = Bytes / sizeof(In), most = (kRunElements / each + kLanes - 1) / kLanes;
  constexpr uint32_t limit = Bytes == 16 ? 3 : 4, batch = most < limit ? most : limit;  // what registers allow
  const In* from = static_cast<const In*>(launch.video) + run.origin;
  const uint32_t pieces = run.pixels * kChannels / each;
  for (uint32_t first = lane; first < pieces; first += batch * kLanes) {
    Piece<Bytes> data[batch];
#pragma unroll
    for (uint32_t i = 0; i < batch; ++i) {
      const uint32_t piece = first + i * kLanes;
      if (piece < pieces) data[i] = read<Bytes>(from + source<packed>(launch, task, run, piece, each));
    }
#pragma unroll
    for (uint32_t i = 0; i < batch; ++i) {
      const uint32_t piece = first + i * kLanes;
      if (piece >= pieces) continue;
      if constexpr (packed) {
        *reinterpret_cast<Piece<Bytes>*>(stage + piece * each) = data[i];
      } else {
        In pixels[each];
        memcpy(pixels, &data[i], Bytes);
        In* to = stage + piece / kChannels * each * kChannels + piece % kChannels;
#pragma unroll
        for (uint32_t j = 0; j < each; ++j) to[j * kChannels] = pixels[j];
      }
    }
  }
}

template <class In, bool packed>
MIRASOL_HD void stage_run(const Launch& launch, const Task& task, const Run& run, int lane, In* stage) {
  switch (task.load_bytes) {
    case 16: return stage_pieces<In, packed, 16>(launch, task, run, lane, stage);
    case 8: return stage_pieces<In, packed, 8>(launch, task, run, lane, stage);
    case 4: return stage_pieces<In, packed, 4>(launch, task, run, lane, stage);
    default: return stage_pieces<In, packed, sizeof(In)>(launch, task, run, lane, stage);
  }
}

// The factors of an element and of the two after it. Every run begins with channel 0.
struct Factors {
  float scale[kChannels], shift[kChannels];

  MIRASOL_HD Factors(const Launch& launch, uint32_t first) {
#pragma unroll
    for (int j = 0; j < kChannels; ++j) {
      scale[j] = launch.scale[(first + j) % kChannels];
      shift[j] = launch.shift[(first + j) % kChannels];
    }
  }

  MIRASOL_HD void advance(int elements) {
    const Factors before = *this;
#pragma unroll
    for (int j = 0; j < kChannels; ++j) {
      scale[j] = before.scale[(j + elements) % kChannels];
      shift[j] = before.shift[(j + elements) % kChannels];
    }
  }
};

// Elements side by side, as they lie where they are moved at once.
template <class T, int Each>
struct alignas(Each * sizeof(T) < 16 ? Each * sizeof(T) : 16) Pack {
  T element[Each];
};

// Normalises and writes this lane's share of a run, `Each` elements at a time.
template <class In, class Out, int Each>
MIRASOL_HD void emit_pieces(const Launch& launch, const Run& run, int lane, const In* stage, Out* out) {
  const uint32_t pieces = run.pixels * kChannels / Each;
  Factors by(launch, lane * Each);
  // Every third time the factors are those of the first again; wide pixels leave no registers for that.
#pragma unroll(sizeof(In) == 4 ? 1 : 3)
  for (uint32_t piece = lane; piece < pieces; piece += kLanes) {
    const auto pixels = *reinterpret_cast<const Pack<In, Each>*>(stage + piece * Each);
    Pack<Out, Each> made;
#pragma unroll
    for (int j = 0; j < Each; ++j) {
      const float pixel = convert<float>(pixels.element[j]);
      made.element[j] = convert<Out>(pixel * by.scale[j % kChannels] + by.shift[j % kChannels]);
    }
    write(out + piece * Each, made);
    by.advance(kLanes * Each);
  }
}

template <class In, class Out>
MIRASOL_HD void emit_run(const Launch& launch, const Task& task, const Run& run, int lane, const In* stage) {
  Out* out = static_cast<Out*>(task.tokens) + run.output + run.first * kChannels;
  if (task.wide_stores) {
    emit_pieces<In, Out, 16 / sizeof(Out)>(launch, run, lane, stage, out);
  } else {
    emit_pieces<In, Out, 1>(launch, run, lane, stage, out);
  }
}

// A token from beginning to end: `each(task, run)` for one run after another.
template <class F>
MIRASOL_HD void for_runs(const Launch& launch, uint32_t token, F each) {
  uint32_t i = launch.tasks - 1;
  while (launch.task[i].first_token > token) --i;
  const Task& task = launch.task[i];
  token -= task.first_token;
  Run run;
  run.output = int64_t{token} * task.tube.elements();
  const Place at = task.tube.token(token);
  run.origin = task.tube.origin(launch.clip, token, at);
  for (run.first = 0; run.first < task.tube.pixels(); run.first += run.pixels) {
    const uint32_t left = task.tube.pixels() - run.first;
    run.pixels = left < task.run ? left : task.run;
    each(task, run);
  }
}

// Adds to this lane's sums of the elements [first, last) of a row of the clip's gradient what a row of tokens holds,
// one token after the other. `from` is where the first token's pixels under that row begin.
template <int Each, class In>
MIRASOL_HD void add_tokens(const Tube& tube, const In* from, uint32_t first, uint32_t last, int lane, float* sums) {
  for (uint32_t i = lane * Each; first + i < last; i += kLanes * Each) {
    const uint32_t pixel = (first + i) / kChannels, channel = (first + i) % kChannels;
    uint32_t w0, w1;
    tube.covering(2, pixel, w0, w1);
    if (w0 == w1) continue;
    auto& place = *reinterpret_cast<Pack<float, Each>*>(sums + i);
    Pack<float, Each> sum = place;
#pragma unroll 1
    for (uint32_t w = w0; w < w1; ++w) {
      const uint32_t dw = pixel - tube.offset[2] - w * tube.stride[2];
      const auto piece = read<Each * sizeof(In)>(from + int64_t{w} * tube.elements() + dw * kChannels + channel);
      In elements[Each];
      memcpy(elements, &piece, sizeof(elements));
#pragma unroll
      for (int j = 0; j < Each; ++j) sum.element[j] += convert<float>(elements[j]);
    }
    place = sum;
  }
}

// Writes this lane's share of a row of the clip's gradient, `Each` elements at a time, between which no token ends.
template <class In, class Out, int Each>
MIRASOL_HD void gather_pieces(const Launch& launch, uint32_t b, Place at, int lane, float* sums, Out* row) {
  const uint32_t length = static_cast<uint32_t>(launch.clip.size[3]) * kChannels;
  for (uint32_t first = 0; first < length; first += kRunElements) {
    const uint32_t last = length - first < kRunElements ? length : first + kRunElements;
    for (uint32_t i = lane * Each; first + i < last; i += kLanes * Each) {
      *reinterpret_cast<Pack<float, Each>*>(sums + i) = {};
    }
    for (uint32_t n = 0; n < launch.tasks; ++n) {
      const Tube& tube = launch.task[n].tube;
      uint32_t t0, t1, h0, h1;
      tube.covering(0, at.t, t0, t1);
      for (uint32_t t = t0; t < t1; ++t) {
        const uint32_t dt = at.t - tube.offset[0] - t * tube.stride[0];
        tube.covering(1, at.h, h0, h1);
        for (uint32_t h = h0; h < h1; ++h) {
          const uint32_t dh = at.h - tube.offset[1] - h * tube.stride[1];
          const int64_t token = ((int64_t{b} * tube.grid[0] + t) * tube.grid[1] + h) * tube.grid[2];
          const int64_t element = token * tube.elements() + (dt * tube.kernel[1] + dh) * tube.kernel[2] * kChannels;
          add_tokens<Each>(tube, static_cast<const In*>(launch.task[n].tokens) + element, first, last, lane, sums);
        }
      }
    }
    Factors by(launch, lane * Each);
    for (uint32_t i = lane * Each; first + i < last; i += kLanes * Each) {
      const auto sum = *reinterpret_cast<const Pack<float, Each>*>(sums + i);
      Pack<Out, Each> made;
#pragma unroll
      for (int j = 0; j < Each; ++j) made.element[j] = convert<Out>(sum.element[j] * by.scale[j % kChannels]);
      write(row + first + i, made);
      by.advance(kLanes * Each);
    }
  }
}

// One row of the clip's gradient: what every token that covers a pixel holds, tubes and tokens in their order.
template <class In, class Out>
MIRASOL_HD void gather_row(const Launch& launch, uint32_t row, int lane, float* sums) {
  Out* out = static_cast<Out*>(launch.video) + row * launch.clip.size[3] * kChannels;
  Place at;
  at.h = launch.by_height.split(row);
  at.t = launch.by_frames.split(row);
  if (row >= launch.clip.size[0]) return;
  if (launch.by_fours) {
    gather_pieces<In, Out, 4>(launch, row, at, lane, sums, out);
  } else {
    gather_pieces<In, Out, 1>(launch, row, at, lane, sums, out);
  }
}

template <class F>
void with_gpu_float(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::kFloat16: return f(Half{});
    case Dtype::kBfloat16: return f(Bfloat{});
    default: return f(float{});
  }
}

template <class F>
void with_gpu_pixel(Dtype dtype, F f) {
  return dtype == Dtype::kUint8 ? f(uint8_t{}) : with_gpu_float(dtype, f);
}

}  // namespace mirasol
