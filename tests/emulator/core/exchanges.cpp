// Instructions by which the lanes of a warp exchange values. They run once all lanes of their mask have come.
#include <algorithm>

#include "machine.h"

namespace emulator {
namespace {

enum Mode { kUp, kDown, kButterfly, kIndex };

// Operands: result, value, offset, clamp and segment, mask, whether the source was in range. Modifier: Mode.
void shuffle(Warp& w, const Instruction& i, u32 lanes) {
  u64 *out = w.reg(i.operands[0]), *value = w.reg(i.operands[1]), *b = w.reg(i.operands[2]), *c = w.reg(i.operands[3]);
  u64 found[kLanes], valid[kLanes];
  each(lanes, [&](int lane) {
    const int offset = b[lane] & 31, clamp = c[lane] & 31, segment = c[lane] >> 8 & 31;
    const int highest = (lane & segment) | (clamp & ~segment), lowest = lane & segment;
    int source = lane;
    bool inside = true;
    switch (i.modifiers[0]) {
      case kUp: source = lane - offset, inside = source >= highest; break;
      case kDown: source = lane + offset, inside = source <= highest; break;
      case kButterfly: source = lane ^ offset, inside = source <= highest; break;
      default: source = lowest | (offset & ~segment), inside = source <= highest;
    }
    if (!inside) source = lane;
    if (!has(lanes, source)) w.block->launch->error(&i, "shfl reads lane %d, which does not take part", source);
    found[lane] = static_cast<u32>(value[source]), valid[lane] = inside;
  });
  u64* in_range = i.operands[5] < 0 ? nullptr : w.reg(i.operands[5]);
  each(lanes, [&](int lane) {
    out[lane] = found[lane];
    if (in_range) in_range[lane] = valid[lane];
  });
}

void elect(Warp& w, const Instruction& i, u32 lanes) {  // operands: leader, whether this is it
  const int leader = __builtin_ctz(lanes);
  each(lanes, [&](int lane) {
    if (i.operands[0] >= 0) w.reg(i.operands[0])[lane] = leader;
    w.reg(i.operands[1])[lane] = lane == leader;
  });
}

// Operands: result, value. Modifiers: 0 add, 1 min, 2 max, 3 and, 4 or, 5 xor; signed.
void reduce(Warp& w, const Instruction& i, u32 lanes) {
  u64 *out = w.reg(i.operands[0]), *in = w.reg(i.operands[1]);
  const auto value = [&](int lane) {
    return i.modifiers[1] ? s64{static_cast<s32>(in[lane])} : s64{static_cast<u32>(in[lane])};
  };
  const int first = __builtin_ctz(lanes);
  s64 result = value(first);
  each(lanes & ~(1u << first), [&](int lane) {
    const s64 x = value(lane);
    switch (i.modifiers[0]) {
      case 0: result += x; break;
      case 1: result = std::min(result, x); break;
      case 2: result = std::max(result, x); break;
      case 3: result &= x; break;
      case 4: result |= x; break;
      default: result ^= x;
    }
  });
  each(lanes, [&](int lane) { out[lane] = static_cast<u32>(result); });
}

}  // namespace

void add_exchanges(Operations& table) {
  table["shfl"] = shuffle, table["elect"] = elect, table["redux"] = reduce;
  table["nop"] = [](Warp&, const Instruction&, u32) {};
}

}  // namespace emulator
