#include "indices_read_body.h"
#include "indices_map_body.h"

struct NoSink {};

GRADCOMP_INLINE void expect(const NoSink &, std::uint64_t) {}

// How far a set has been read. Of the readers only that of its coding is used; none for a MAP.
struct Stream {
    const Addend &from;
    WordsReader words;
    GapsReader gaps;
    RiceReader rice;
    std::uint64_t taken;  // elements that lie before the next tile
    std::size_t next = 0;  // of the marks
    std::size_t ready = 0;
    std::uint64_t marks[kChunk];
};

GRADCOMP_INLINE bool refill(Stream &stream) {
    const Coding coding = stream.from.set.coding;
    stream.next = 0;
    stream.ready = coding == Coding::words  ? read(stream.words, NoSink{}, stream.marks)
                   : coding == Coding::gaps ? read(stream.gaps, NoSink{}, stream.marks)
                                            : read(stream.rice, NoSink{}, stream.marks);
    return stream.ready != 0;
}

// Leaves out what lies before `start`.
GRADCOMP_INLINE void skip(Stream &stream, std::uint64_t start) {
    do {
        for (; stream.next < stream.ready; ++stream.next, ++stream.taken) {
            if (stream.marks[stream.next] >> 1 >= start) return;
        }
    } while (refill(stream));
}

// Adds what lies in start..start+length-1 to the elements at `tile`.
GRADCOMP_INLINE void add_list(Stream &stream, float *tile, std::uint64_t start, std::uint64_t length) {
    const Addend &from = stream.from;
    do {
        for (; stream.next < stream.ready; ++stream.next) {
            const std::uint64_t mark = stream.marks[stream.next];
            if ((mark >> 1) - start >= length) return;
            tile[(mark >> 1) - start] +=
                from.values ? from.values[stream.taken++] * from.scale
                            : float_of(bits_of(from.magnitude) ^ static_cast<std::uint32_t>(mark) << 31);
        }
    } while (refill(stream));
}

GRADCOMP_INLINE void add_tile(Stream &stream, float *tile, std::uint64_t start, std::uint64_t length) {
    const Addend &from = stream.from;
    if (from.set.coding != Coding::map) {
        add_list(stream, tile, start, length);
    } else if (from.values) {
        stream.taken = add_value_map_of(from.set, tile, from.values, from.scale, start, start + length, stream.taken);
    } else {
        stream.taken = add_sign_map_of(from.set, tile, from.magnitude, start, start + length, stream.taken);
    }
}

// Elements start..stop-1 of `out`: 0 and then one addend after the other. start is a multiple of 64.
GRADCOMP_ENTRY void sum_tiles(const std::vector<Addend> &addends, std::size_t part, float *out, std::size_t start,
                              std::size_t stop, [[maybe_unused]] bool past_caches) {
    std::vector<Stream> streams;
    streams.reserve(addends.size());
    for (const Addend &from : addends) {
        const bool is_map = from.set.coding == Coding::map;
        streams.push_back(Stream{from, {from.set}, {from.set}, {from.set}, is_map ? from.before[part] : 0, 0, 0, {}});
        if (!is_map) skip(streams.back(), start);
    }
#if GRADCOMP_LEVEL >= 2
    // A tile is made where it stays in the first cache, and then written without reading what it overwrites.
    alignas(64) float made[kTile];
    for (; past_caches && start < stop; start += kTile) {
        const std::size_t length = stop - start < kTile ? stop - start : kTile;
        std::memset(made, 0, sizeof made);
        for (Stream &stream : streams) add_tile(stream, made, start, length);
        std::size_t i = 0;
        for (; i + 8 <= length; i += 8) _mm256_stream_ps(out + start + i, _mm256_load_ps(made + i));
        for (; i < length; ++i) out[start + i] = made[i];
    }
    if (past_caches) _mm_sfence();
#endif
    for (; start < stop; start += kTile) {
        const std::size_t length = stop - start < kTile ? stop - start : kTile;
        std::memset(out + start, 0, length * sizeof(float));
        for (Stream &stream : streams) add_tile(stream, out + start, start, length);
    }
}
