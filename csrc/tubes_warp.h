// What one warp of the GPU does, as functions of the lane, so that the same code can be walked through on the CPU.
//
// A warp's item is a token, taken in runs of at most 256 pixels. First the lanes copy a run into the block's memory, in
// the order of the token, with the widest accesses that alignment allows. Then they normalise it from there and write it
// out, 16 bytes a lane side by side. Offsets inside a token take 32 bits, those of tokens 64.
#pragma once

#include <cstdint>

#include "numbers.h"
#include "tubes.h"

namespace mirasol {

constexpr int kLanes = 32;
constexpr uint32_t kRunPixels = 256;
constexpr uint32_t kRunElements = kRunPixels * kChannels;
constexpr int kMaxTasks = 16;

struct Task {  // one tube of a launch
  Tube tube;
  void* tokens;
  uint32_t first_item;  // of the launch
  uint32_t run;         // pixels at once; the last run of a token may be shorter
  uint8_t load_bytes;   // width of one load
  bool wide_stores;     // whether 16-byte stores are aligned
};

struct Launch {
  Clip clip;
  const void* video;
  bool packed;  // the channels of a pixel, and the pixels of a row, lie side by side
  int32_t step[3];  // the clip's strides t, h, w once more
  float scale[kChannels], shift[kChannels];
  uint32_t tasks, items;
  Task task[kMaxTasks];
};

struct Run {
  int64_t origin;        // of its token in the clip, in elements
  int64_t output;        // of its token among the tube's, in elements
  uint32_t first_pixel;  // of its token
  uint32_t pixels;
};

// The first run of an item.
MIRASOL_HD Run find_run(const Clip& clip, const Task& task, uint32_t item) {
  uint32_t token = item - task.first_item;
  Run run;
  run.first_pixel = 0;
  run.pixels = task.run < task.tube.pixels() ? task.run : task.tube.pixels();
  run.output = int64_t{token} * task.tube.elements();
  const Place at = task.tube.token(token);
  run.origin = task.tube.origin(clip, token, at);
  return run;
}

// Moves on to the next run of the same token, unless there is none.
MIRASOL_HD bool next_run(const Task& task, Run& run) {
  run.first_pixel += run.pixels;
  const uint32_t left = task.tube.pixels() - run.first_pixel;
  run.pixels = left < task.run ? left : task.run;
  return left != 0;
}

template <int Bytes>
struct Words {
  using Word = uint32_t;
};
template <>
struct Words<2> {
  using Word = uint16_t;
};
template <>
struct Words<1> {
  using Word = uint8_t;
};

// What one access moves.
template <int Bytes>
struct alignas(Bytes) Piece {
  typename Words<Bytes>::Word word[(Bytes + 3) / 4];
};

template <int Bytes>
MIRASOL_HD Piece<Bytes> read(const void* from) {
#ifdef __CUDA_ARCH__
  Piece<Bytes> piece;
  if constexpr (Bytes == 16) {
    *reinterpret_cast<uint4*>(&piece) = __ldg(static_cast<const uint4*>(from));
  } else if constexpr (Bytes == 8) {
    *reinterpret_cast<uint2*>(&piece) = __ldg(static_cast<const uint2*>(from));
  } else {
    piece.word[0] = __ldg(static_cast<const typename Words<Bytes>::Word*>(from));
  }
  return piece;
#else
  return *static_cast<const Piece<Bytes>*>(from);
#endif
}

// Writes 16 bytes at once, which a compiler may otherwise split, or one element.
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
  }
#endif
  *static_cast<T*>(to) = data;
}

// Moves a lane's pieces, several at a time: `load(piece)` for all of them before the first `store(piece, data)`, so that
// their latencies overlap.
template <class In, int Bytes, class Load, class Store>
MIRASOL_HD void move_pieces(uint32_t pieces, int lane, Load load, Store store) {
  constexpr uint32_t most = kRunElements * sizeof(In) / Bytes;
  constexpr uint32_t limit = Bytes == 16 ? 3 : 4;  // what registers allow
  constexpr uint32_t batch = most < limit * kLanes ? (most + kLanes - 1) / kLanes : limit;
  for (uint32_t first = lane; first < pieces; first += batch * kLanes) {
    Piece<Bytes> data[batch];
#pragma unroll
    for (uint32_t i = 0; i < batch; ++i) {
      if (first + i * kLanes < pieces) data[i] = load(first + i * kLanes);
    }
#pragma unroll
    for (uint32_t i = 0; i < batch; ++i) {
      if (first + i * kLanes < pieces) store(first + i * kLanes, data[i]);
    }
  }
}

// Copies this lane's share of a run with packed pixels: pieces of a row, whatever channel they begin with.
template <class In, int Bytes>
MIRASOL_HD void stage_packed(const Launch& launch, const Task& task, const Run& run, int lane, In* stage) {
  constexpr uint32_t each = Bytes / sizeof(In);
  const In* from = static_cast<const In*>(launch.video) + run.origin;
  const uint32_t row_elements = task.tube.kernel[2] * kChannels;
  const auto load = [&](uint32_t piece) {
    uint32_t column = run.first_pixel * kChannels + piece * each;
    uint32_t t = task.tube.by_elements.quotient(column);
    column -= t * row_elements;
    const uint32_t h = task.tube.by_plane.split(t);
    return read<Bytes>(from + static_cast<int32_t>(t * launch.step[0] + h * launch.step[1] + column));
  };
  const auto store = [&](uint32_t piece, const Piece<Bytes>& data) {
    *reinterpret_cast<Piece<Bytes>*>(stage + piece * each) = data;
  };
  move_pieces<In, Bytes>(run.pixels * kChannels / each, lane, load, store);
}

// Copies this lane's share of a run with the channels apart: pieces of one channel's row, spread over the pixels.
template <class In, int Bytes>
MIRASOL_HD void stage_planar(const Launch& launch, const Task& task, const Run& run, int lane, In* stage) {
  constexpr uint32_t each = Bytes / sizeof(In);
  const In* from = static_cast<const In*>(launch.video) + run.origin;
  const auto load = [&](uint32_t piece) {
    const uint32_t group = piece / kChannels, channel = piece % kChannels;
    const Place at = task.tube.pixel(run.first_pixel + group * each);
    const int32_t offset = at.t * launch.step[0] + at.h * launch.step[1] + at.w * launch.step[2];
    return read<Bytes>(from + channel * launch.clip.stride[4] + offset);
  };
  const auto store = [&](uint32_t piece, const Piece<Bytes>& data) {
    const uint32_t group = piece / kChannels, channel = piece % kChannels;
    In pixels[each];
    memcpy(pixels, &data, Bytes);
#pragma unroll
    for (uint32_t i = 0; i < each; ++i) stage[(group * each + i) * kChannels + channel] = pixels[i];
  };
  move_pieces<In, Bytes>(run.pixels / each * kChannels, lane, load, store);
}

template <class In, bool packed, int Bytes>
MIRASOL_HD void stage_pieces(const Launch& launch, const Task& task, const Run& run, int lane, In* stage) {
  if constexpr (packed) {
    stage_packed<In, Bytes>(launch, task, run, lane, stage);
  } else {
    stage_planar<In, Bytes>(launch, task, run, lane, stage);
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

// The factors of the element that a lane begins with, and of the two after it. Every run begins with channel 0.
struct Factors3 {
  float scale[kChannels], shift[kChannels];

  MIRASOL_HD Factors3(const Launch& launch, uint32_t first) {
#pragma unroll
    for (int j = 0; j < kChannels; ++j) {
      scale[j] = launch.scale[(first + j) % kChannels];
      shift[j] = launch.shift[(first + j) % kChannels];
    }
  }

  MIRASOL_HD void advance(int elements) {
    const Factors3 before = *this;
#pragma unroll
    for (int j = 0; j < kChannels; ++j) {
      scale[j] = before.scale[(j + elements) % kChannels];
      shift[j] = before.shift[(j + elements) % kChannels];
    }
  }
};

template <class Out>
constexpr int kWide = 16 / sizeof(Out);  // elements of a wide store

// Normalises and writes this lane's share of a run, `Each` elements at a time.
template <class In, class Out, int Each>
MIRASOL_HD void emit(const Run& run, Factors3 by, int lane, const In* stage, Out* out) {
  struct alignas(Each * sizeof(Out)) Elements {
    Out element[Each];
  };
  struct alignas(Each * sizeof(In) < 16 ? Each * sizeof(In) : 16) Pixels {
    In pixel[Each];
  };
  const uint32_t count = run.pixels * kChannels / Each;
  // Every third time the factors are those of the first again; wide pixels leave no registers for that.
#pragma unroll(sizeof(In) == 4 ? 1 : 3)
  for (uint32_t piece = lane; piece < count; piece += kLanes) {
    const Pixels pixels = *reinterpret_cast<const Pixels*>(stage + piece * Each);
    Elements made;
#pragma unroll
    for (int j = 0; j < Each; ++j) {
      const float pixel = convert<float>(pixels.pixel[j]);
      made.element[j] = convert<Out>(pixel * by.scale[j % kChannels] + by.shift[j % kChannels]);
    }
    write(out + piece * Each, made);
    by.advance(kLanes * Each);
  }
}

// `by` belongs to this lane's first wide store.
template <class In, class Out>
MIRASOL_HD void emit_run(const Launch& launch, const Task& task, const Run& run, const Factors3& by, int lane,
                         const In* stage) {
  Out* out = static_cast<Out*>(task.tokens) + run.output + run.first_pixel * kChannels;
  if (task.wide_stores) {
    emit<In, Out, kWide<Out>>(run, by, lane, stage, out);
  } else {
    emit<In, Out, 1>(run, Factors3(launch, lane), lane, stage, out);
  }
}

MIRASOL_HD const Task& find_task(const Launch& launch, uint32_t item) {
  uint32_t i = launch.tasks - 1;
  while (i > 0 && launch.task[i].first_item > item) --i;
  return launch.task[i];
}

// One pixel of the gradient for the clip: what every token that covers it holds, tubes and tokens in their order.
template <class In>
MIRASOL_HD void gather_pixel(const Launch& launch, uint32_t b, Place at, float* sum) {
  sum[0] = sum[1] = sum[2] = 0;
  for (uint32_t i = 0; i < launch.tasks; ++i) {
    const Tube& tube = launch.task[i].tube;
    const In* tokens = static_cast<const In*>(launch.task[i].tokens);
    uint32_t t0, t1, h0, h1, w0, w1;
    tube.covering(0, at.t, t0, t1);
    tube.covering(1, at.h, h0, h1);
    if (t0 == t1 || h0 == h1) continue;
    tube.covering(2, at.w, w0, w1);
    for (uint32_t t = t0; t < t1; ++t) {
      for (uint32_t h = h0; h < h1; ++h) {
        for (uint32_t w = w0; w < w1; ++w) {
          const uint32_t dt = at.t - tube.offset[0] - t * tube.stride[0], dh = at.h - tube.offset[1] - h * tube.stride[1],
                         dw = at.w - tube.offset[2] - w * tube.stride[2];
          const int64_t token = ((int64_t{b} * tube.grid[0] + t) * tube.grid[1] + h) * tube.grid[2] + w;
          const uint32_t pixel = (dt * tube.kernel[1] + dh) * tube.kernel[2] + dw;
          const In* from = tokens + (token * tube.pixels() + pixel) * kChannels;
#pragma unroll
          for (int c = 0; c < kChannels; ++c) sum[c] += convert<float>(from[c]);
        }
      }
    }
  }
}

}  // namespace mirasol
