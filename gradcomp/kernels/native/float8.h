// float8_e4m3fn: a sign, four bits of exponent (bias 7), three of mantissa; no infinity, 0x7f and 0xff are NaN.

#pragma once

#include <cstdint>

#include "finite.h"

namespace gradcomp {

constexpr float kFloat8Max = 448.0f;

// Exact. NaN codes give 480: whoever reads foreign codes refuses them before.
inline __attribute__((always_inline)) float float8_value(std::uint8_t code) {
    const std::uint32_t magnitude = code & 0x7fu;
    const std::uint32_t sign = static_cast<std::uint32_t>(code & 0x80u) << 24;
    const float normal = float_of((magnitude << 20) + (120u << 23));
    const float small = static_cast<float>(static_cast<std::int32_t>(magnitude)) * 0x1p-9f;
    return float_of(bits_of(magnitude < 8 ? small : normal) | sign);
}

// Rounded to nearest, ties to even. value must be in -464..464: what is above 448 becomes 448.
inline __attribute__((always_inline)) std::uint8_t float8_code(float value) {
    const std::uint32_t magnitude = bits_of(value) & kMagnitude;
    const std::uint32_t sign = bits_of(value) >> 24 & 0x80u;
    // Below 2^-6 the spacing is 2^-9: that of floats at 2^14, where the addition rounds.
    const std::uint32_t small = bits_of(float_of(magnitude) + 0x1p14f) - bits_of(0x1p14f);
    const std::uint32_t normal = (magnitude - (120u << 23) + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20;
    return static_cast<std::uint8_t>((magnitude < (121u << 23) ? small : normal) | sign);
}

}  // namespace gradcomp
