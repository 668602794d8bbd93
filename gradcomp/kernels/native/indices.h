// Index sets as bytes: which elements a sparse packet speaks of, and with what sign. docs/FORMAT.md is the specification,
// gradcomp/kernels/reference_indices.py the definition of what is done here.

#pragma once

#include <cstddef>
#include <cstdint>

#include "tensors.h"

namespace gradcomp {

enum class Coding : std::uint8_t { none = 0, words = 1, gaps = 2, map = 3, rice = 4 };

// The most elements a tensor may have for a coding. The last: more than any memory holds, so that no sum overflows.
constexpr std::uint64_t kMaxWordsNumel = std::uint64_t{1} << 31, kMaxGapsNumel = std::uint64_t{1} << 15,
                        kMaxNumel = std::uint64_t{1} << 59;

inline std::uint64_t max_numel(Coding coding) {
    return coding == Coding::words ? kMaxWordsNumel : coding == Coding::gaps ? kMaxGapsNumel : kMaxNumel;
}

// The rule both ends follow; the same as gradcomp.indices.choose.
Coding choose_coding(std::uint64_t count, std::uint64_t numel, bool is_signed);
// The most bytes a set can take; exact for all but RICE.
std::uint64_t max_coded_nbytes(std::uint64_t count, std::uint64_t numel, Coding coding, bool is_signed);

inline std::uint64_t bytes_for(std::uint64_t bits) { return bits / 8 + (bits % 8 != 0); }

// RICE: how many low bits of a gap are written as they are.
inline unsigned rice_bits(std::uint64_t count, std::uint64_t numel) {
    unsigned bits = 0;
    for (std::uint64_t mean = count ? (numel - count) / count : 0; mean > 1; mean >>= 1) ++bits;
    return bits;
}

struct Coded {
    Array<std::uint8_t> bytes;
    std::size_t nbytes = 0;
};

// Writes the set of the `count` elements whose bit in `mask` is set, in little-endian words of 64 bits: bit i mod 64 of word
// i / 64 is element i, bits beyond numel are 0. `negative` has the signs, in the same places, and 0 elsewhere; null for an
// unsigned set.
Coded encode_planes(const std::uint64_t *mask, const std::uint64_t *negative, std::uint64_t numel, std::uint64_t count,
                    Coding coding, Level level = best_level());

// The same into memory of the caller's, max_coded_nbytes() long; returns how many bytes were written.
std::size_t encode_planes_to(std::uint8_t *out, const std::uint64_t *mask, const std::uint64_t *negative,
                             std::uint64_t numel, std::uint64_t count, Coding coding, Level level = best_level());

}  // namespace gradcomp
