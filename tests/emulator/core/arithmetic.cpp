// Instructions of one lane each: integers, bits, floating point, comparisons, moves.
#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "machine.h"

namespace emulator {
namespace {

// An operation out of a lambda: its signature says what type each operand is read as.
template <class F, class R, class... A>
struct OfLanes {
  template <size_t... k>
  static void run_with(Warp& w, const Instruction& i, u32 lanes, std::index_sequence<k...>) {
    u64* out = w.reg(i.operands[0]);
    u64* in[] = {w.reg(i.operands[k + 1])...};
    each(lanes, [&](int lane) { out[lane] = bits<u64>(static_cast<R>(F{}(bits<A>(in[k][lane])...))); });
  }
  static void run(Warp& w, const Instruction& i, u32 lanes) { run_with(w, i, lanes, std::index_sequence_for<A...>{}); }
};
template <class F, class R, class... A>
Operation typed(R (F::*)(A...) const) {
  return &OfLanes<F, R, A...>::run;
}
template <class F>
Operation lanes_of(F) {
  return typed(&F::operator());
}

float flushed(float a) { return std::fabs(a) < std::numeric_limits<float>::min() ? std::copysign(0.0f, a) : a; }

enum Comparison { kEq, kNe, kLt, kLe, kGt, kGe, kEqu, kNeu, kLtu, kLeu, kGtu, kGeu, kNum, kNan };

template <class T>
bool holds(s32 comparison, T a, T b) {
  switch (comparison) {
    case kEq: return a == b;
    case kNe: return a < b || a > b;
    case kLt: return a < b;
    case kLe: return a <= b;
    case kGt: return a > b;
    case kGe: return a >= b;
    case kEqu: return !(a < b || a > b);
    case kNeu: return !(a == b);
    case kLtu: return !(a >= b);
    case kLeu: return !(a > b);
    case kGtu: return !(a <= b);
    case kGeu: return !(a < b);
    case kNum: return a == a && b == b;
    default: return !(a == a && b == b);
  }
}

// Operands: result, a, b, the result's complement, a predicate to combine with. Modifiers: comparison, 0 and 1 or
// 2 xor, that predicate negated, flush.
template <class T>
void set_predicate(Warp& w, const Instruction& i, u32 lanes) {
  using Compared = std::conditional_t<std::is_same_v<T, Bfloat> || std::is_same_v<T, Half>, float, T>;
  u64 *out = w.reg(i.operands[0]), *a = w.reg(i.operands[1]), *b = w.reg(i.operands[2]);
  u64* other = i.operands[3] < 0 ? nullptr : w.reg(i.operands[3]);
  u64* with = i.operands[4] < 0 ? nullptr : w.reg(i.operands[4]);
  each(lanes, [&](int lane) {
    Compared x(bits<T>(a[lane])), y(bits<T>(b[lane]));
    if constexpr (std::is_same_v<T, float>)
      if (i.modifiers[3]) x = flushed(x), y = flushed(y);
    bool found = holds<Compared>(i.modifiers[0], x, y);
    bool complement = !found;
    if (with) {
      const bool p = (with[lane] != 0) != (i.modifiers[2] != 0);
      const auto combine = [&](bool x) { return i.modifiers[1] == 0 ? x && p : i.modifiers[1] == 1 ? x || p : x != p; };
      found = combine(found), complement = combine(complement);
    }
    if (other) other[lane] = complement;
    out[lane] = found;
  });
}

u64 low_bits(int count) { return count >= 64 ? ~0ull : (1ull << count) - 1; }

void move(Warp& w, const Instruction& i, u32 lanes) {  // modifier: bits
  u64 *out = w.reg(i.operands[0]), *in = w.reg(i.operands[1]), mask = low_bits(i.modifiers[0]);
  each(lanes, [&](int lane) { out[lane] = in[lane] & mask; });
}

void select(Warp& w, const Instruction& i, u32 lanes) {  // modifier: bits
  u64 *out = w.reg(i.operands[0]), *a = w.reg(i.operands[1]), *b = w.reg(i.operands[2]), *p = w.reg(i.operands[3]);
  const u64 mask = low_bits(i.modifiers[0]);
  each(lanes, [&](int lane) { out[lane] = (p[lane] ? a[lane] : b[lane]) & mask; });
}

void pack(Warp& w, const Instruction& i, u32 lanes) {  // modifiers: how many, bits of each
  const s32* from = &w.block->launch->kernel->lists[i.list];
  u64* out = w.reg(i.operands[0]);
  each(lanes, [&](int lane) {
    u64 value = 0;
    for (int k = 0; k < i.modifiers[0]; ++k)
      value |= (w.reg(from[k])[lane] & low_bits(i.modifiers[1])) << k * i.modifiers[1];
    out[lane] = value;
  });
}

void unpack(Warp& w, const Instruction& i, u32 lanes) {
  const s32* to = &w.block->launch->kernel->lists[i.list];
  u64* in = w.reg(i.operands[0]);
  each(lanes, [&](int lane) {
    const u64 value = in[lane];
    for (int k = 0; k < i.modifiers[0]; ++k)
      if (to[k] >= 0) w.reg(to[k])[lane] = value >> k * i.modifiers[1] & low_bits(i.modifiers[1]);
  });
}

template <class T>
T shift_left(T a, u32 n) {
  return n >= 8 * sizeof(T) ? T(0) : T(a << n);
}
template <class T>
T shift_right(T a, u32 n) {
  if (n >= 8 * sizeof(T)) return std::is_signed_v<T> && a < 0 ? T(-1) : T(0);
  return T(a >> n);
}

template <class T>
T bit_field(T a, u32 position, u32 length) {
  constexpr u32 kBits = 8 * sizeof(T);
  position &= 0xff, length &= 0xff;
  if (length == 0) return 0;
  const bool negative = std::is_signed_v<T> && a >> std::min(position + length - 1, kBits - 1) & 1;
  const u32 kept = position >= kBits ? 0 : std::min(length, kBits - position);
  const u64 field = kept == 0 ? 0 : u64(a) >> position & low_bits(kept);
  return T(negative ? field | ~low_bits(kept) : field);
}

template <class T>
void add_integer(Operations& table, const std::string& type) {
  using U = std::make_unsigned_t<T>;
  const auto put = [&](const char* name, Operation operation) { table[name + type] = operation; };
  put("add.", lanes_of([](U a, U b) { return U(a + b); }));
  put("sub.", lanes_of([](U a, U b) { return U(a - b); }));
  put("mul.lo.", lanes_of([](U a, U b) { return U(u64(a) * u64(b)); }));
  put("mad.lo.", lanes_of([](U a, U b, U c) { return U(u64(a) * u64(b) + u64(c)); }));
  put("neg.", lanes_of([](U a) { return U(0 - a); }));
  put("abs.", lanes_of([](T a) { return a < 0 ? U(0 - U(a)) : U(a); }));
  put("min.", lanes_of([](T a, T b) { return std::min(a, b); }));
  put("max.", lanes_of([](T a, T b) { return std::max(a, b); }));
  put("min.relu.", lanes_of([](T a, T b) { return std::max(std::min(a, b), T(0)); }));
  put("max.relu.", lanes_of([](T a, T b) { return std::max(std::max(a, b), T(0)); }));
  put("div.", lanes_of([](T a, T b) {
        return b == 0 ? T(-1) : b == T(-1) && std::is_signed_v<T> ? T(0 - U(a)) : T(a / b);
      }));
  put("rem.", lanes_of([](T a, T b) { return b == 0 ? a : b == T(-1) && std::is_signed_v<T> ? T(0) : T(a % b); }));
  put("shr.", lanes_of([](T a, u32 n) { return shift_right(a, n); }));
  put("bfe.", lanes_of([](T a, u32 position, u32 length) { return bit_field(a, position, length); }));
  put("setp.", set_predicate<T>);
  if constexpr (sizeof(T) < 8) {
    using W = std::conditional_t<std::is_signed_v<T>, std::conditional_t<sizeof(T) == 2, s32, s64>,
                                 std::conditional_t<sizeof(T) == 2, u32, u64>>;
    put("mul.wide.", lanes_of([](T a, T b) { return W(W(a) * W(b)); }));
    put("mad.wide.", lanes_of([](T a, T b, W c) { return W(u64(W(a) * W(b)) + u64(c)); }));
    put("mul.hi.", lanes_of([](T a, T b) { return T(W(a) * W(b) >> 8 * sizeof(T)); }));
    put("mad.hi.", lanes_of([](T a, T b, T c) { return T(T(W(a) * W(b) >> 8 * sizeof(T)) + c); }));
  } else {
    using W = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
    put("mul.hi.", lanes_of([](T a, T b) { return T(W(a) * W(b) >> 64); }));
  }
}

template <class U>
void add_bits(Operations& table, const std::string& type) {
  const auto put = [&](const char* name, Operation operation) { table[name + type] = operation; };
  put("and.", lanes_of([](U a, U b) { return U(a & b); }));
  put("or.", lanes_of([](U a, U b) { return U(a | b); }));
  put("xor.", lanes_of([](U a, U b) { return U(a ^ b); }));
  put("not.", lanes_of([](U a) { return U(~a); }));
  put("shl.", lanes_of([](U a, u32 n) { return shift_left(a, n); }));
  put("shr.", lanes_of([](U a, u32 n) { return shift_right(a, n); }));
  put("setp.", set_predicate<U>);
}

// The smaller (larger) number; of a number and a NaN the number; -0 is below 0.
template <class T>
T least(T a, T b) {
  if (a != a) return b;
  if (b != b) return a;
  return a < b || (a == b && std::signbit(a)) ? a : b;
}
template <class T>
T most(T a, T b) {
  if (a != a) return b;
  if (b != b) return a;
  return a > b || (a == b && std::signbit(b)) ? a : b;
}
template <class T>
T with_nan(T a, T b, T found) {
  return a != a || b != b ? std::numeric_limits<T>::quiet_NaN() : found;
}

template <class T>
void add_float(Operations& table, const std::string& type) {
  const auto put = [&](const char* name, Operation operation) { table[name + type] = operation; };
  put("add.", lanes_of([](T a, T b) { return a + b; }));
  put("sub.", lanes_of([](T a, T b) { return a - b; }));
  put("mul.", lanes_of([](T a, T b) { return a * b; }));
  put("div.", lanes_of([](T a, T b) { return a / b; }));
  put("fma.", lanes_of([](T a, T b, T c) { return std::fma(a, b, c); }));
  put("neg.", lanes_of([](T a) { return -a; }));
  put("abs.", lanes_of([](T a) { return std::fabs(a); }));
  put("sqrt.", lanes_of([](T a) { return std::sqrt(a); }));
  put("rsqrt.", lanes_of([](T a) { return T(1) / std::sqrt(a); }));
  put("rcp.", lanes_of([](T a) { return T(1) / a; }));
  put("ex2.", lanes_of([](T a) { return std::exp2(a); }));
  put("lg2.", lanes_of([](T a) { return std::log2(a); }));
  put("tanh.", lanes_of([](T a) { return std::tanh(a); }));
  put("min.", lanes_of([](T a, T b) { return least(a, b); }));
  put("max.", lanes_of([](T a, T b) { return most(a, b); }));
  put("min.NaN.", lanes_of([](T a, T b) { return with_nan(a, b, least(a, b)); }));
  put("max.NaN.", lanes_of([](T a, T b) { return with_nan(a, b, most(a, b)); }));
  put("setp.", set_predicate<T>);
}

void add_flushing_float(Operations& table) {
  table["add.ftz.f32"] = lanes_of([](float a, float b) { return flushed(flushed(a) + flushed(b)); });
  table["sub.ftz.f32"] = lanes_of([](float a, float b) { return flushed(flushed(a) - flushed(b)); });
  table["mul.ftz.f32"] = lanes_of([](float a, float b) { return flushed(flushed(a) * flushed(b)); });
  table["div.ftz.f32"] = lanes_of([](float a, float b) { return flushed(flushed(a) / flushed(b)); });
  table["fma.ftz.f32"] =
      lanes_of([](float a, float b, float c) { return flushed(std::fma(flushed(a), flushed(b), flushed(c))); });
  table["neg.ftz.f32"] = lanes_of([](float a) { return flushed(-a); });
  table["abs.ftz.f32"] = lanes_of([](float a) { return flushed(std::fabs(a)); });
  table["sqrt.ftz.f32"] = lanes_of([](float a) { return flushed(std::sqrt(flushed(a))); });
  table["rsqrt.ftz.f32"] = lanes_of([](float a) { return flushed(1 / std::sqrt(flushed(a))); });
  table["rcp.ftz.f32"] = lanes_of([](float a) { return flushed(1 / flushed(a)); });
  table["ex2.ftz.f32"] = lanes_of([](float a) { return flushed(std::exp2(flushed(a))); });
  table["lg2.ftz.f32"] = lanes_of([](float a) { return std::log2(flushed(a)); });
  table["min.ftz.f32"] = lanes_of([](float a, float b) { return least(flushed(a), flushed(b)); });
  table["max.ftz.f32"] = lanes_of([](float a, float b) { return most(flushed(a), flushed(b)); });
}

// Where `error` was lost in `found`, its neighbour whose last bit is set: rounded again, that gives what one rounding
// would.
template <class F>
F to_odd(F found, double error) {
  const bool kept = error == 0 || !std::isfinite(found) || bits<u64>(found) & 1;
  return kept ? found : std::nextafter(found, F(error > 0 ? INFINITY : -INFINITY));
}
template <class T>
T fused(T a, T b, T c) {
  const double product = double(float(a)) * double(float(b)), added = float(c), near = product + added;
  const double part = near - product, sum = to_odd(near, (product - (near - part)) + (added - part));
  const float single = static_cast<float>(sum);
  return T(to_odd(single, sum - single));
}
template <class T, class F>
Pair<T> both(Pair<T> a, Pair<T> b, F f) {
  return {f(a.low, b.low), f(a.high, b.high)};
}

template <class T>
void add_half(Operations& table, const std::string& type) {
  using P = Pair<T>;
  const auto put = [&](const char* name, Operation one, Operation two) {
    table[name + type] = one;
    table[name + type + "x2"] = two;
  };
  static constexpr auto add = [](T a, T b) { return T(float(a) + float(b)); };
  static constexpr auto sub = [](T a, T b) { return T(float(a) - float(b)); };
  static constexpr auto mul = [](T a, T b) { return T(float(a) * float(b)); };
  static constexpr auto min = [](T a, T b) { return T(least(float(a), float(b))); };
  static constexpr auto max = [](T a, T b) { return T(most(float(a), float(b))); };
  put("add.", lanes_of([](T a, T b) { return add(a, b); }), lanes_of([](P a, P b) { return both(a, b, add); }));
  put("sub.", lanes_of([](T a, T b) { return sub(a, b); }), lanes_of([](P a, P b) { return both(a, b, sub); }));
  put("mul.", lanes_of([](T a, T b) { return mul(a, b); }), lanes_of([](P a, P b) { return both(a, b, mul); }));
  put("min.", lanes_of([](T a, T b) { return min(a, b); }), lanes_of([](P a, P b) { return both(a, b, min); }));
  put("max.", lanes_of([](T a, T b) { return max(a, b); }), lanes_of([](P a, P b) { return both(a, b, max); }));
  put("fma.", lanes_of([](T a, T b, T c) { return fused(a, b, c); }),
      lanes_of([](P a, P b, P c) { return P{fused(a.low, b.low, c.low), fused(a.high, b.high, c.high)}; }));
  put("neg.", lanes_of([](u16 a) { return u16(a ^ 0x8000); }), lanes_of([](u32 a) { return a ^ 0x80008000u; }));
  put("abs.", lanes_of([](u16 a) { return u16(a & 0x7fff); }), lanes_of([](u32 a) { return a & 0x7fff7fffu; }));
  table["setp." + type] = set_predicate<T>;
}

}  // namespace

void add_arithmetic(Operations& table) {
  add_integer<s16>(table, "s16"), add_integer<u16>(table, "u16");
  add_integer<s32>(table, "s32"), add_integer<u32>(table, "u32");
  add_integer<s64>(table, "s64"), add_integer<u64>(table, "u64");
  add_bits<u16>(table, "b16"), add_bits<u32>(table, "b32"), add_bits<u64>(table, "b64");
  add_float<float>(table, "f32"), add_float<double>(table, "f64");
  add_flushing_float(table);
  add_half<Half>(table, "f16"), add_half<Bfloat>(table, "bf16");
  table["and.pred"] = lanes_of([](u64 a, u64 b) { return u64(a && b); });
  table["or.pred"] = lanes_of([](u64 a, u64 b) { return u64(a || b); });
  table["xor.pred"] = lanes_of([](u64 a, u64 b) { return u64(!a != !b); });
  table["not.pred"] = lanes_of([](u64 a) { return u64(!a); });
  table["mov.pred"] = lanes_of([](u64 a) { return u64(a != 0); });
  table["mov"] = move, table["selp"] = select, table["pack"] = pack, table["unpack"] = unpack;
}

}  // namespace emulator
