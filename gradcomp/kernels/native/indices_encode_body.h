GRADCOMP_ENTRY std::uint64_t count_ones(const std::uint64_t *words, std::uint64_t count) {
    std::uint64_t ones = 0;
    for (std::uint64_t k = 0; k < count; ++k) ones += static_cast<std::uint64_t>(__builtin_popcountll(words[k]));
    return ones;
}

// Bits one after the other, lowest first, into whole words.
struct BitWriter {
    std::uint8_t *out;
    std::uint64_t pending = 0;
    unsigned fill = 0;  // bits in pending, below 64
};

// `value` must be below 2^width; width at most 64.
GRADCOMP_INLINE void put_bits(BitWriter &writer, std::uint64_t value, unsigned width) {
    writer.pending |= value << writer.fill;
    writer.fill += width;
    if (writer.fill < 64) return;
    std::memcpy(writer.out, &writer.pending, 8);
    writer.out += 8;
    writer.fill -= 64;
    writer.pending = writer.fill ? value >> (width - writer.fill) : 0;
}

// `zeros` bits 0, then a 1.
GRADCOMP_INLINE void put_unary(BitWriter &writer, std::uint64_t zeros) {
    std::uint64_t fill = writer.fill + zeros;
    for (; fill >= 64; fill -= 64) {
        std::memcpy(writer.out, &writer.pending, 8);
        writer.out += 8;
        writer.pending = 0;
    }
    writer.fill = static_cast<unsigned>(fill);
    put_bits(writer, 1, 1);
}

GRADCOMP_INLINE std::uint8_t *finish_bits(BitWriter &writer) {
    std::memcpy(writer.out, &writer.pending, bytes_for(writer.fill));
    return writer.out + bytes_for(writer.fill);
}

// What takes the elements of a set one by one, a struct for each coding: put(sink, position, sign), then finish(sink).
struct WordsSink {
    std::uint8_t *out;
};

GRADCOMP_INLINE void put(WordsSink &sink, std::uint64_t position, std::uint64_t sign) {
    const std::uint32_t word = static_cast<std::uint32_t>(position | sign << 31);
    std::memcpy(sink.out, &word, sizeof word);
    sink.out += sizeof word;
}

GRADCOMP_INLINE std::uint8_t *finish(WordsSink &sink) { return sink.out; }

struct GapsSink {
    std::uint8_t *out;
    std::uint64_t next = 0;  // the lowest position that may come now
};

GRADCOMP_INLINE void put(GapsSink &sink, std::uint64_t position, std::uint64_t sign) {
    const std::uint16_t unit = static_cast<std::uint16_t>((position - sink.next) << 1 | sign);
    sink.next = position + 1;
    std::memcpy(sink.out, &unit, sizeof unit);
    sink.out += sizeof unit;
}

GRADCOMP_INLINE std::uint8_t *finish(GapsSink &sink) { return sink.out; }

struct RiceSink {
    BitWriter fields;
    BitWriter unary;
    std::uint64_t next;
    unsigned low_bits;
    unsigned sign_bits;  // 0 or 1
};

GRADCOMP_INLINE void put(RiceSink &sink, std::uint64_t position, std::uint64_t sign) {
    const std::uint64_t gap = position - sink.next;
    sink.next = position + 1;
    const std::uint64_t high = gap >> sink.low_bits;
    const std::uint64_t low = gap - (high << sink.low_bits);
    put_bits(sink.fields, low << sink.sign_bits | sign, sink.low_bits + sink.sign_bits);
    put_unary(sink.unary, high);
}

GRADCOMP_INLINE std::uint8_t *finish(RiceSink &sink) {
    finish_bits(sink.fields);
    return finish_bits(sink.unary);
}

GRADCOMP_INLINE RiceSink new_rice_sink(std::uint8_t *out, std::uint64_t count, std::uint64_t numel, bool is_signed) {
    const unsigned low_bits = rice_bits(count, numel);
    return RiceSink{BitWriter{out}, BitWriter{out + bytes_for(count * (low_bits + is_signed))}, 0, low_bits, is_signed};
}

// The bits of `value` where `mask` has ones, side by side.
GRADCOMP_INLINE std::uint64_t gather_bits(std::uint64_t value, std::uint64_t mask) {
#if GRADCOMP_LEVEL >= 2 && defined(__x86_64__)
    return _pext_u64(value, mask);
#else
    std::uint64_t result = 0;
    for (unsigned k = 0; mask != 0; mask &= mask - 1, ++k) {
        result |= (value >> __builtin_ctzll(mask) & 1) << k;
    }
    return result;
#endif
}

// Where the ones of `ones` are, times 2, plus the sign, to marks; returns how many. May write up to 2 more.
GRADCOMP_INLINE std::size_t list_ones(std::uint64_t ones, std::uint64_t signs, std::uint64_t start, std::uint64_t *marks) {
    std::size_t found = 0;
#if GRADCOMP_LEVEL >= 2 && defined(__x86_64__)
    // Whether there is none, one or two is not to be predicted: rather write some for nothing.
    const std::size_t count = static_cast<std::size_t>(_mm_popcnt_u64(ones));
    for (; found < 2; ++found, ones &= ones - 1) {
        const std::uint64_t bit = _tzcnt_u64(ones);
        marks[found] = (start + bit) << 1 | (signs >> (bit & 63) & 1);
    }
    if (count <= 2) return count;
#endif
    for (; ones != 0; ones &= ones - 1) {
        const std::uint64_t bit = static_cast<std::uint64_t>(__builtin_ctzll(ones));
        marks[found++] = (start + bit) << 1 | (signs >> bit & 1);
    }
    return found;
}

template <typename Sink> GRADCOMP_INLINE void put_marks(Sink &sink, const std::uint64_t *marks, std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) put(sink, marks[i] >> 1, marks[i] & 1);
}

template <typename Sink>
GRADCOMP_INLINE std::uint8_t *put_planes(Sink sink, const std::uint64_t *mask, const std::uint64_t *negative,
                                         std::uint64_t numel) {
    constexpr std::size_t kWords = 256, kEnough = 512;
    std::uint64_t occupied[kWords];
    std::uint64_t marks[kEnough + 64 + 2];
    std::size_t found = 0;
    const std::uint64_t words = numel / 64 + (numel % 64 != 0);
    for (std::uint64_t first = 0; first < words; first += kWords) {
        const std::uint64_t stop = words - first < kWords ? words : first + kWords;
        std::size_t some = 0;
        for (std::uint64_t k = first; k < stop; ++k) {  // no branch: which word holds something is not to be predicted
            occupied[some] = k;
            some += mask[k] != 0;
        }
        for (std::size_t i = 0; i < some; ++i) {
            const std::uint64_t k = occupied[i];
            found += list_ones(mask[k], negative ? negative[k] : 0, k * 64, marks + found);
            if (found < kEnough) continue;
            put_marks(sink, marks, found);
            found = 0;
        }
    }
    put_marks(sink, marks, found);
    return finish(sink);
}

GRADCOMP_ENTRY std::size_t encode_set_of_planes(std::uint8_t *out, const std::uint64_t *mask,
                                                const std::uint64_t *negative, std::uint64_t numel,
                                                std::uint64_t count, Coding coding) {
    if (coding == Coding::words) return put_planes(WordsSink{out}, mask, negative, numel) - out;
    if (coding == Coding::gaps) return put_planes(GapsSink{out}, mask, negative, numel) - out;
    if (coding == Coding::rice) {
        return put_planes(new_rice_sink(out, count, numel, negative != nullptr), mask, negative, numel) - out;
    }
    std::memcpy(out, mask, bytes_for(numel));
    if (negative != nullptr) {
        BitWriter signs{out + bytes_for(numel)};
        for (std::uint64_t k = 0; k < numel / 64 + (numel % 64 != 0); ++k) {
            put_bits(signs, gather_bits(negative[k], mask[k]), static_cast<unsigned>(__builtin_popcountll(mask[k])));
        }
        finish_bits(signs);
    }
    return max_coded_nbytes(count, numel, Coding::map, negative != nullptr);
}

template <typename Sink>
GRADCOMP_INLINE std::uint8_t *put_list(Sink sink, const std::int64_t *index, const bool *negative, std::uint64_t count) {
    for (std::uint64_t i = 0; i < count; ++i) {
        put(sink, static_cast<std::uint64_t>(index[i]), negative ? negative[i] : 0);
    }
    return finish(sink);
}

GRADCOMP_ENTRY std::size_t encode_set_of_list(std::uint8_t *out, const std::int64_t *index, const bool *negative,
                                              std::uint64_t numel, std::uint64_t count, Coding coding) {
    if (coding == Coding::words) return put_list(WordsSink{out}, index, negative, count) - out;
    if (coding == Coding::gaps) return put_list(GapsSink{out}, index, negative, count) - out;
    if (coding == Coding::rice) {
        return put_list(new_rice_sink(out, count, numel, negative != nullptr), index, negative, count) - out;
    }
    const std::uint64_t nbytes = max_coded_nbytes(count, numel, Coding::map, negative != nullptr);
    std::memset(out, 0, nbytes);
    std::uint8_t *const signs = out + bytes_for(numel);
    for (std::uint64_t i = 0; i < count; ++i) {
        out[index[i] / 8] |= static_cast<std::uint8_t>(1u << index[i] % 8);
        if (negative) signs[i / 8] |= static_cast<std::uint8_t>(unsigned{negative[i]} << i % 8);
    }
    return nbytes;
}
