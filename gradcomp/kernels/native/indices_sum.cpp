// Several packets decoded at once, tile by tile: what is written to a tile is in the cache when the next packet comes to
// it. One packet after the other would miss the caches at each of its elements.

#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "finite.h"
#include "indices_read.h"
#include "parallel.h"

namespace gradcomp {
namespace {

// One packet: its set, and the values of the elements or, if there are none, the magnitude of all of them.
struct Addend {
    Set set;
    const float *values;
    float scale;      // of the values
    float magnitude;  // scaled
    std::vector<std::uint64_t> before{};  // MAP: elements before each thread's part
};

constexpr std::size_t kTile = 4096;  // elements; a multiple of 64. Half of a small first cache.
// A sum at least so long is written past the caches: most of it would have left a core's own ones when it is asked for.
[[maybe_unused]] constexpr std::size_t kLong = std::size_t{1} << 18;

#define GRADCOMP_BODY "indices_sum_body.h"
#include "foreach_level.h"

// A packet's payload, how many elements it names, the coding, and the magnitude of SIGNS; none for VALUES, whose values
// the payload begins with.
using Packed = std::tuple<Bytes, std::uint64_t, int, std::optional<double>>;

// Why the packet is none, or nullptr.
const char *read_packed(const Packed &packed, std::uint64_t numel, float scale, std::vector<Addend> &addends) {
    const auto &[payload, count, coding, magnitude] = packed;
    if (coding < 1 || coding > 4) throw std::invalid_argument("coding must be 1 to 4");
    Set set{payload.data(), payload.shape(0), count, numel, static_cast<Coding>(coding), magnitude.has_value()};
    if (magnitude) {
        addends.push_back(Addend{set, nullptr, scale, static_cast<float>(*magnitude) * scale});
        return nullptr;
    }
    if (count > set.nbytes / 4) return "it is too short for its values";
    if (reinterpret_cast<std::uintptr_t>(set.bytes) % 4) throw std::invalid_argument("payload must begin at a multiple of 4");
    const auto *values = reinterpret_cast<const float *>(set.bytes);
    set.bytes += 4 * count;
    set.nbytes -= 4 * count;
    addends.push_back(Addend{set, values, scale, 0.0f});
    return nullptr;
}

nb::object sum_sets(const MutableFloats &out, const std::vector<Packed> &packets, float scale,
                    const std::string &level_name, int threads) {
    const Level level = level_named(level_name);
    const std::size_t numel = out.shape(0);
    std::vector<Addend> addends;
    addends.reserve(packets.size());
    const char *fault = nullptr;
    for (const Packed &packed : packets) {
        if (fault == nullptr) fault = read_packed(packed, numel, scale, addends);
    }
    if (fault == nullptr) {
        nb::gil_scoped_release released;
        const auto starts = split(numel, 64, threads);
        for (Addend &addend : addends) {
            if (fault == nullptr) fault = find_fault(addend.set, level, starts, addend.before);
        }
        const bool past_caches = numel >= kLong && reinterpret_cast<std::uintptr_t>(out.data()) % 32 == 0;
        if (fault == nullptr) {
            parallel(starts, [&](std::size_t part, std::size_t start, std::size_t stop) {
                GRADCOMP_AT(level, sum_tiles)(addends, part, out.data(), start, stop, past_caches);
            });
        }
    }
    return fault == nullptr ? nb::none() : nb::cast(fault);
}

}  // namespace

void bind_indices_sum(nb::module_ &module) {
    module.def("sum_sets", &sum_sets, "out"_a.noconvert(), "packets"_a.noconvert(), "scale"_a,
               "level"_a = module.attr("LEVEL"), "threads"_a = 1);
}

}  // namespace gradcomp
