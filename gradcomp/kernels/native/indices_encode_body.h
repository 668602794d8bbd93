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

GRADCOMP_INLINE void finish_bits(BitWriter &writer) { std::memcpy(writer.out, &writer.pending, bytes_for(writer.fill)); }

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

GRADCOMP_INLINE void put_unit(GapsSink &sink, std::uint64_t value) {
    const std::uint16_t unit = static_cast<std::uint16_t>(value);
    std::memcpy(sink.out, &unit, sizeof unit);
    sink.out += sizeof unit;
}

GRADCOMP_INLINE void put(GapsSink &sink, std::uint64_t position, std::uint64_t sign) {
    std::uint64_t gap = position - sink.next;
    sink.next = position + 1;
    for (; gap >= kSkip; gap -= kSkip) put_unit(sink, 0xffff);
    put_unit(sink, gap << 1 | sign);
}

GRADCOMP_INLINE std::uint8_t *finish(GapsSink &sink) { return sink.out; }

struct RiceSink {
    BitWriter fields;
    std::uint8_t *unary;       // all 0 beforehand
    std::uint64_t unary_bits;  // of it so far
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
    sink.unary_bits += high;
    sink.unary[sink.unary_bits / 8] |= static_cast<std::uint8_t>(1u << sink.unary_bits % 8);
    ++sink.unary_bits;
}

GRADCOMP_INLINE std::uint8_t *finish(RiceSink &sink) {
    finish_bits(sink.fields);
    return sink.unary + bytes_for(sink.unary_bits);
}

GRADCOMP_INLINE RiceSink new_rice_sink(std::uint8_t *out, std::uint64_t count, std::uint64_t numel, bool is_signed) {
    const unsigned low_bits = rice_bits(count, numel);
    const std::uint64_t fields_nbytes = bytes_for(count * (low_bits + is_signed));
    const std::uint64_t most = max_coded_nbytes(count, numel, Coding::rice, is_signed);
    std::memset(out + fields_nbytes, 0, most - fields_nbytes);
    return RiceSink{BitWriter{out}, out + fields_nbytes, 0, 0, low_bits, is_signed};
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

template <typename Sink>
GRADCOMP_INLINE std::uint8_t *put_planes(Sink sink, const std::uint64_t *mask, const std::uint64_t *negative,
                                         std::uint64_t numel) {
    const std::uint64_t words = numel / 64 + (numel % 64 != 0);
    for (std::uint64_t k = 0; k < words; ++k) {
        std::uint64_t left = mask[k];
        if (left == 0) continue;
        const std::uint64_t signs = negative ? negative[k] : 0;
        for (; left != 0; left &= left - 1) {
            const unsigned bit = static_cast<unsigned>(__builtin_ctzll(left));
            put(sink, k * 64 + bit, signs >> bit & 1);
        }
    }
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
