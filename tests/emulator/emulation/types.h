// Vector types and the 16-bit floating-point types with their conversions (round to nearest even, as the hardware
// rounds).
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

namespace emulator {
// One access of a whole vector, as the hardware makes it. Its type claims no alignment: a misaligned address is the
// hook's to report, and must not crash first.
template <size_t bytes>
inline __attribute__((always_inline)) void move_vector(void* target, const void* source) {
  typedef char Vector __attribute__((vector_size(bytes), may_alias, aligned(1)));
  *static_cast<Vector*>(target) = *static_cast<const Vector*>(source);
}
}  // namespace emulator

#define CSAT_EMULATED_VECTOR2(name, scalar)                                              \
  struct alignas(2 * sizeof(scalar)) name {                                              \
    scalar x, y;                                                                         \
    name() = default;                                                                    \
    name(scalar x, scalar y) : x(x), y(y) {}                                             \
    name(const name& other) { emulator::move_vector<2 * sizeof(scalar)>(this, &other); } \
    name& operator=(const name& other) {                                                 \
      emulator::move_vector<2 * sizeof(scalar)>(this, &other);                           \
      return *this;                                                                      \
    }                                                                                    \
  };                                                                                     \
  inline name make_##name(scalar x, scalar y) { return {x, y}; }
#define CSAT_EMULATED_VECTOR4(name, scalar)                                              \
  struct alignas(4 * sizeof(scalar)) name {                                              \
    scalar x, y, z, w;                                                                   \
    name() = default;                                                                    \
    name(scalar x, scalar y, scalar z, scalar w) : x(x), y(y), z(z), w(w) {}             \
    name(const name& other) { emulator::move_vector<4 * sizeof(scalar)>(this, &other); } \
    name& operator=(const name& other) {                                                 \
      emulator::move_vector<4 * sizeof(scalar)>(this, &other);                           \
      return *this;                                                                      \
    }                                                                                    \
  };                                                                                     \
  inline name make_##name(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }
CSAT_EMULATED_VECTOR2(float2, float)
CSAT_EMULATED_VECTOR2(int2, int)
CSAT_EMULATED_VECTOR2(uint2, unsigned)
CSAT_EMULATED_VECTOR2(double2, double)
CSAT_EMULATED_VECTOR4(float4, float)
CSAT_EMULATED_VECTOR4(int4, int)
CSAT_EMULATED_VECTOR4(uint4, unsigned)
#undef CSAT_EMULATED_VECTOR2
#undef CSAT_EMULATED_VECTOR4

namespace emulator {

constexpr uint16_t bf16_bits(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;  // the canonical NaN of cvt.rn.bf16
  return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
constexpr float bf16_value(uint16_t bits) { return std::bit_cast<float>(uint32_t(bits) << 16); }
inline uint16_t f16_bits(float value) { return std::bit_cast<uint16_t>(static_cast<_Float16>(value)); }
inline float f16_value(uint16_t bits) { return static_cast<float>(std::bit_cast<_Float16>(bits)); }

}  // namespace emulator

struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float value) : bits(emulator::bf16_bits(value)) {}
  operator float() const { return emulator::bf16_value(bits); }
};
struct __half {
  uint16_t bits;
  __half() = default;
  explicit __half(float value) : bits(emulator::f16_bits(value)) {}
  operator float() const { return emulator::f16_value(bits); }
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
struct alignas(4) __half2 {
  __half x, y;
};

inline __nv_bfloat16 __float2bfloat16(float v) { return __nv_bfloat16(v); }
inline __nv_bfloat16 __float2bfloat16_rn(float v) { return __nv_bfloat16(v); }
inline float __bfloat162float(__nv_bfloat16 v) { return v; }
inline __half __float2half(float v) { return __half(v); }
inline __half __float2half_rn(float v) { return __half(v); }
inline float __half2float(__half v) { return v; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__nv_bfloat16(x), __nv_bfloat16(y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {v.x, v.y}; }
inline float2 __half22float2(__half2 v) { return {v.x, v.y}; }

inline float __uint_as_float(unsigned v) { return std::bit_cast<float>(v); }
inline unsigned __float_as_uint(float v) { return std::bit_cast<unsigned>(v); }
inline float __int_as_float(int v) { return std::bit_cast<float>(v); }
inline int __float_as_int(float v) { return std::bit_cast<int>(v); }
