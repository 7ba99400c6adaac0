// Half-precision numbers as they lie in memory, and conversions that a compiler can vectorise: no branches, no tables.
// Rounding is to nearest even; every NaN becomes the quiet one, as in PyTorch. A GPU uses its own instructions.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "tubes.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace mirasol {

struct Half {
  uint16_t bits;
};
struct Bfloat {
  uint16_t bits;
};

MIRASOL_HD uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}

MIRASOL_HD float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

MIRASOL_HD float float_of(Bfloat x) { return float_of(uint32_t{x.bits} << 16); }

MIRASOL_HD float float_of(Half x) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(x.bits));
#else
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13, sign = (x.bits & 0x8000u) << 16;
  const uint32_t normal = magnitude + (112u << 23);
  const uint32_t tiny = bits_of(float_of(magnitude + (113u << 23)) - float_of(113u << 23));
  const uint32_t huge = magnitude + (224u << 23);  // infinities and NaN
  const uint32_t picked = magnitude >= (0x7c00u << 13) ? huge : magnitude < (0x0400u << 13) ? tiny : normal;
  return float_of(picked | sign);
#endif
}

MIRASOL_HD Bfloat bfloat_of(float x) {
#ifdef __CUDA_ARCH__
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#else
  const uint32_t u = bits_of(x), rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded)};
#endif
}

MIRASOL_HD Half half_of(float x) {
#ifdef __CUDA_ARCH__
  return {__half_as_ushort(__float2half_rn(x))};
#else
  const uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  const uint32_t huge = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t tiny = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t picked = magnitude >= 0x47800000u ? huge : magnitude < 0x38800000u ? tiny : normal;
  return {static_cast<uint16_t>(picked | sign)};
#endif
}

// Rounds what cannot be NaN, which costs less.
MIRASOL_HD Bfloat bfloat_of_number(float x) {
  const uint32_t u = bits_of(x);
  return {static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}

template <class To, class From>
MIRASOL_HD To convert(From x) {
  if constexpr (std::is_same_v<From, Half> || std::is_same_v<From, Bfloat>) {
    return static_cast<To>(float_of(x));
  } else if constexpr (std::is_same_v<To, Bfloat>) {
    return bfloat_of(static_cast<float>(x));
  } else if constexpr (std::is_same_v<To, Half>) {
    return half_of(static_cast<float>(x));
  } else {
    return static_cast<To>(x);
  }
}

}  // namespace mirasol
