// Reading coded index sets: what the bodies that decode them share.

#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "indices.h"

namespace gradcomp {

struct Set {
    const std::uint8_t *bytes;
    std::uint64_t nbytes;
    std::uint64_t count;
    std::uint64_t numel;
    Coding coding;
    bool is_signed;
};

// RICE's two parts.
struct Rice {
    const std::uint8_t *fields;
    std::uint64_t set_nbytes;
    const std::uint8_t *unary;
    std::uint64_t unary_nbytes;
    std::uint64_t field_mask;
    unsigned low_bits;
    unsigned width;  // of a field: low bits and sign
};

inline Rice rice_of(const Set &set) {
    const unsigned low_bits = rice_bits(set.count, set.numel);
    const unsigned width = low_bits + set.is_signed;
    const std::uint64_t fields_nbytes = bytes_for(set.count * width);
    return Rice{set.bytes, set.nbytes, set.bytes + fields_nbytes, set.nbytes - fields_nbytes,
                (std::uint64_t{1} << width) - 1, low_bits, width};
}

// Elements decoded at a time: the cache lines of two chunks fit the first cache. A multiple of 8, at least 64.
constexpr std::size_t kChunk = 128;

// Why the set is none, or nullptr. For a MAP also how many elements it names before each part of `starts`.
const char *find_fault(const Set &set, Level level, const std::vector<std::size_t> &starts,
                       std::vector<std::uint64_t> &before);

}  // namespace gradcomp
