// cvt: operands result, source (two sources for packed pairs, the upper half first); modifiers to, from, rounding,
// saturate, flush, relu. Types and roundings are numbered as in encode.py.
#include <algorithm>
#include <cmath>

#include "machine.h"

namespace emulator {
namespace {

enum Type { kU8, kS8, kU16, kS16, kU32, kS32, kU64, kS64, kF16, kBf16, kF32, kF64 };
enum Rounding { kNearest, kToZero, kDown, kUp, kNearestInteger, kZeroInteger, kDownInteger, kUpInteger };

__int128 integer_of(u64 x, s32 type) {
  switch (type) {
    case kU8: return static_cast<u8>(x);
    case kS8: return static_cast<s8>(x);
    case kU16: return static_cast<u16>(x);
    case kS16: return static_cast<s16>(x);
    case kU32: return static_cast<u32>(x);
    case kS32: return static_cast<s32>(x);
    case kU64: return x;
    default: return static_cast<s64>(x);
  }
}

double float_of(u64 x, s32 type) {
  switch (type) {
    case kF16: return bits<Half>(x);
    case kBf16: return bits<Bfloat>(x);
    case kF32: return bits<float>(x);
    default: return bits<double>(x);
  }
}

long double whole(long double x, s32 rounding) {
  switch (rounding % 4) {
    case kToZero: return std::trunc(x);
    case kDown: return std::floor(x);
    case kUp: return std::ceil(x);
    default: return std::nearbyint(x);
  }
}

// To a format with `precision` bits and exponents up to `most`.
long double rounded(long double x, int precision, int most, s32 rounding) {
  if (x == 0 || !std::isfinite(x)) return x;
  const int unit = std::max(std::ilogb(x), 1 - most) - precision + 1;
  const long double found = std::ldexp(whole(std::ldexp(x, -unit), rounding), unit);
  const long double largest = std::ldexp(2 - std::ldexp(1.0L, 1 - precision), most);
  if (std::fabs(found) <= largest) return found;
  const bool away = rounding == kNearest || rounding == (found < 0 ? kDown : kUp);
  return std::copysign(away ? INFINITY : largest, found);
}

u64 to_integer(__int128 x, s32 type, bool clamp) {
  const int size = 8 << type / 2;
  const bool is_signed = type % 2;
  const __int128 one = 1, low = is_signed ? -(one << (size - 1)) : 0, high = (one << (size - is_signed)) - 1;
  if (clamp) x = std::clamp(x, low, high);
  const u64 kept = static_cast<u64>(x);
  if (size < 32 && is_signed)
    return static_cast<u32>(size == 8 ? s32{static_cast<s8>(kept)} : s32{static_cast<s16>(kept)});
  return size == 64 ? kept : kept & ((1ull << size) - 1);
}

u64 converted(u64 x, const Instruction& i) {
  const s32 to = i.modifiers[0], from = i.modifiers[1];
  const bool saturate = i.modifiers[3], flush = i.modifiers[4], relu = i.modifiers[5];
  s32 rounding = i.modifiers[2];
  if (from < kF16 && to < kF16) return to_integer(integer_of(x, from), to, saturate);
  // A long double holds every source exactly.
  long double value = from < kF16 ? static_cast<long double>(integer_of(x, from)) : float_of(x, from);
  if (flush && from == kF32 && std::fabs(value) < 0x1p-126L) value = std::copysign(0.0L, value);
  if (to < kF16) {
    if (value != value)
      return from == kF64 || to >= kU64 ? to_integer(__int128{1} << ((8 << to / 2) - 1), to, false) : 0;
    return to_integer(static_cast<__int128>(std::clamp(whole(value, rounding), -0x1p65L, 0x1p65L)), to, true);
  }
  if (rounding >= kNearestInteger) value = whole(value, rounding), rounding = kNearest;
  if (relu && !(value > 0)) value = value != value ? value : 0;
  if (saturate) value = value > 0 ? std::min(value, 1.0L) : 0;
  if (to == kF64) return bits<u64>(static_cast<double>(rounded(value, 53, 1023, rounding)));
  if (to == kF32) {
    const float single = static_cast<float>(rounding == kNearest ? value : rounded(value, 24, 127, rounding));
    return bits<u64>(flush && std::fabs(single) < 0x1p-126f ? std::copysign(0.0f, single) : single);
  }
  float single = static_cast<float>(value);
  if (single != value || rounding != kNearest)
    single = rounded(value, to == kF16 ? 11 : 8, to == kF16 ? 15 : 127, rounding);
  return to == kF16 ? bits<u64>(static_cast<Half>(single)) : bits<u64>(Bfloat(single));
}

void convert(Warp& w, const Instruction& i, u32 lanes) {
  u64 *out = w.reg(i.operands[0]), *in = w.reg(i.operands[1]);
  each(lanes, [&](int lane) { out[lane] = converted(in[lane], i); });
}

void convert_pair(Warp& w, const Instruction& i, u32 lanes) {
  u64 *out = w.reg(i.operands[0]), *upper = w.reg(i.operands[1]), *lower = w.reg(i.operands[2]);
  each(lanes, [&](int lane) { out[lane] = converted(lower[lane], i) | converted(upper[lane], i) << 16; });
}

void widen_bf16(Warp& w, const Instruction& i, u32 lanes) {
  u64 *out = w.reg(i.operands[0]), *in = w.reg(i.operands[1]);
  each(lanes, [&](int lane) { out[lane] = static_cast<u32>(in[lane] << 16); });
}

}  // namespace

void add_conversions(Operations& table) {
  table["cvt"] = convert, table["cvt.pair"] = convert_pair, table["cvt.f32.bf16"] = widen_bf16;
  table["cvt.tf32"] = [](Warp& w, const Instruction& i, u32 lanes) {  // to nearest, ties away from zero
    u64 *out = w.reg(i.operands[0]), *in = w.reg(i.operands[1]);
    each(lanes, [&](int lane) {
      const u32 x = in[lane];
      out[lane] = (x & 0x7fffffff) > 0x7f800000 ? x | 0x7fffe000 : (x + 0x1000) & 0xffffe000u;
    });
  };
}

}  // namespace emulator
