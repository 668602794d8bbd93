// Selection: what passes +-tau, and the k largest. One sweep marks what is selected in bit planes, whatever its share; the
// planes become the packet's index set.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "finite.h"
#include "indices.h"
#include "parallel.h"
#include "tensors.h"

namespace gradcomp {
namespace {

struct Found {
    std::uint64_t count;
    std::uint32_t most;  // the largest magnitude, as bits
};

#define GRADCOMP_BODY "select_body.h"
#include "foreach_level.h"

// A gradient, its residual (null: zeros), and how to go about it.
struct Source {
    const float *grad;
    float *residual;
    std::size_t numel;
    Level level;
    int threads;
};

struct Selection {
    Array<std::uint64_t> mask;
    Array<std::uint64_t> negative;
    std::uint64_t count = 0;
    bool finite = true;
};

enum class What { signs, values };

Selection select(const Source &from, What what, float tau, bool update) {
    const std::size_t words = from.numel / 64 + (from.numel % 64 != 0);
    Selection found{new_array<std::uint64_t>(words), new_array<std::uint64_t>(words)};
    const auto starts = split(from.numel, 64, from.threads);
    std::vector<Found> parts(starts.size() - 1);
    parallel(starts, [&](std::size_t part, std::size_t start, std::size_t stop) {
        const auto scan = what == What::signs ? GRADCOMP_AT(from.level, scan_signs) : GRADCOMP_AT(from.level, scan_values);
        parts[part] = scan(from.grad + start, from.residual ? from.residual + start : nullptr, stop - start, tau, update,
                           found.mask.get() + start / 64, found.negative.get() + start / 64);
    });
    for (const Found &part : parts) {
        found.count += part.count;
        found.finite = found.finite && part.most < kInfinity;
    }
    return found;
}

float value_at(const Source &from, std::size_t i) {
    return from.residual ? from.grad[i] + from.residual[i] : from.grad[i];
}

// The `count` largest magnitudes, as bits, falling, of every stride-th element of weight * grad + residual.
std::vector<std::uint32_t> sample_largest(const Source &from, std::size_t stride, std::size_t count, float weight) {
    std::vector<std::uint32_t> sample;
    sample.reserve(from.numel / stride + 1);
    for (std::size_t i = 0; i < from.numel; i += stride) {
        const float scaled = from.grad[i] * weight;
        sample.push_back(bits_of(from.residual ? scaled + from.residual[i] : scaled) & kMagnitude);
    }
    count = std::min(count, sample.size());
    std::nth_element(sample.begin(), sample.begin() + count, sample.end(), std::greater<>());
    sample.resize(count);
    std::sort(sample.begin(), sample.end(), std::greater<>());
    return sample;
}

// A threshold that somewhat more than k elements pass, most likely. Exactness does not depend on it.
float guess_threshold(const Source &from, std::size_t k) {
    constexpr std::size_t kSample = std::size_t{1} << 16;
    if (k >= from.numel / 4) return 0.0f;
    const std::size_t stride = from.numel / kSample | 1;  // odd: rows and channels are of even length
    const double expected = static_cast<double>(k) / static_cast<double>(stride);
    const auto rank = static_cast<std::size_t>(expected + 4.0 * std::sqrt(expected) + 4.0);
    const auto largest = sample_largest(from, stride, rank, 1.0f);
    return largest.back() < kInfinity ? float_of(largest.back()) : 0.0f;
}

// Clears from the mask what is not among the k elements of largest magnitude, of equal ones those with the highest index,
// and returns the values of the others. acc is what was selected from.
std::vector<float> keep_largest(Selection &found, const Source &acc, std::size_t k) {
    std::vector<float> values(found.count);
    std::vector<std::uint32_t> magnitudes(found.count);
    const std::size_t words = acc.numel / 64 + (acc.numel % 64 != 0);
    std::size_t at = 0;
    for (std::size_t word = 0; word < words; ++word) {
        for (std::uint64_t rest = found.mask[word]; rest != 0; rest &= rest - 1) {
            values[at++] = value_at(acc, 64 * word + trailing_zeros(rest));
        }
    }
    if (found.count <= k) return values;
    for (std::size_t i = 0; i < values.size(); ++i) magnitudes[i] = bits_of(values[i]) & kMagnitude;
    std::nth_element(magnitudes.begin(), magnitudes.begin() + (k - 1), magnitudes.end(), std::greater<>());
    const std::uint32_t least = magnitudes[k - 1];
    std::size_t above = 0;
    for (std::size_t i = 0; i < k; ++i) above += magnitudes[i] > least;
    std::size_t ties = k - above;
    std::size_t kept = 0;
    at = 0;
    for (std::size_t word = 0; word < words; ++word) {
        for (std::uint64_t rest = found.mask[word]; rest != 0; rest &= rest - 1) {
            const std::uint32_t magnitude = bits_of(values[at]) & kMagnitude;
            const bool keep = magnitude > least || (magnitude == least && ties != 0);
            if (keep) {
                ties -= magnitude == least;
                values[kept++] = values[at];
            } else {
                found.mask[word] &= ~(rest & (~rest + 1));
            }
            ++at;
        }
    }
    values.resize(k);
    found.count = k;
    return values;
}

struct Packed {
    Coded coded;
    std::uint64_t count = 0;
    bool finite = true;
};

Packed encode_signs(const Source &from, float tau, bool update) {
    const Selection found = sweep_safely(from.grad, from.numel, update, from.level, from.threads,
                                         [&](bool now) { return select(from, What::signs, tau, now); });
    if (!found.finite) return Packed{Coded{}, 0, false};
    const Coding coding = choose_coding(found.count, from.numel, true);
    return Packed{encode_planes(found.mask.get(), found.negative.get(), from.numel, found.count, coding,
                                from.level),
                  found.count};
}

// Zero what is sent: there the residual holds acc, and that is what is sent.
void clear_sent(const Selection &found, float *residual, std::size_t numel) {
    const std::size_t words = numel / 64 + (numel % 64 != 0);
    for (std::size_t word = 0; word < words; ++word) {
        for (std::uint64_t rest = found.mask[word]; rest != 0; rest &= rest - 1) {
            residual[64 * word + trailing_zeros(rest)] = 0.0f;
        }
    }
}

// What passes +-tau, with its values: if more than `most` do, the k largest. If fewer than k do and `exact`, tau is lowered
// until enough do.
Packed encode_values(const Source &from, float tau, std::size_t most, std::size_t k, bool exact, bool update) {
    Selection found = sweep_safely(from.grad, from.numel, update, from.level, from.threads,
                                   [&](bool now) { return select(from, What::values, tau, now); });
    if (!found.finite) return Packed{Coded{}, 0, false};
    // With update the residual holds acc by now, and the gradient is in it.
    const Source acc = update ? Source{from.residual, nullptr, from.numel, from.level, from.threads} : from;
    while (exact && found.count < k && tau > 0.0f) {
        tau = found.count > k / 4 ? tau / 2 : 0.0f;
        found = select(acc, What::values, tau, false);
    }
    const std::vector<float> values = keep_largest(found, acc, found.count > most ? k : found.count);
    if (update) clear_sent(found, from.residual, from.numel);
    const Coding coding = choose_coding(found.count, from.numel, false);
    const std::size_t values_nbytes = 4 * values.size();
    Packed packed{Coded{new_array<std::uint8_t>(values_nbytes +
                                                max_coded_nbytes(found.count, from.numel, coding, false))},
                  found.count};
    std::uint8_t *out = packed.coded.bytes.get();
    if (!values.empty()) std::memcpy(out, values.data(), values_nbytes);
    packed.coded.nbytes = values_nbytes + encode_planes_to(out + values_nbytes, found.mask.get(), nullptr, from.numel,
                                                           found.count, coding, from.level);
    return packed;
}

// -- what Python sees ---------------------------------------------------------------------------------------------------

using Residual = std::optional<MutableFloats>;

Source source(const Floats &grad, const Residual &residual, const std::string &level, int threads) {
    if (residual) require_same_size("residual", *residual, grad);
    return Source{grad.data(), residual ? residual->data() : nullptr, grad.shape(0), level_named(level), threads};
}

template <typename Encode> nb::object encoded(const Source &from, const Encode &encode) {
    Packed packed;
    float broken = 0.0f;
    {
        nb::gil_scoped_release released;
        packed = encode();
        if (!packed.finite) broken = sum_nonfinite(from.grad, from.residual, from.numel);
    }
    if (!packed.finite) return nb::float_(broken);
    return nb::make_tuple(as_tensor(std::move(packed.coded.bytes), packed.coded.nbytes), packed.count);
}

nb::object bound_encode_signs(const Floats &grad, const Residual &residual, float tau, bool update, int threads,
                              const std::string &level) {
    if (!(tau >= 0.0f) || !std::isfinite(tau)) throw std::invalid_argument("tau must be finite and at least 0");
    const Source from = source(grad, residual, level, threads);
    return encoded(from, [&] { return encode_signs(from, tau, update && residual); });
}

nb::object bound_encode_largest(const Floats &grad, const Residual &residual, std::size_t k, bool update, int threads,
                                const std::string &level) {
    if (k == 0) throw std::invalid_argument("k must be at least 1");
    const Source from = source(grad, residual, level, threads);
    return encoded(from, [&] { return encode_values(from, guess_threshold(from, k), k, k, true, update && residual); });
}

nb::object bound_encode_above(const Floats &grad, const Residual &residual, float tau, std::size_t most, std::size_t k,
                              bool update, int threads, const std::string &level) {
    if (!(tau >= 0.0f) || !std::isfinite(tau)) throw std::invalid_argument("tau must be finite and at least 0");
    if (k == 0 || most < k) throw std::invalid_argument("k must be at least 1 and at most `most`");
    const Source from = source(grad, residual, level, threads);
    return encoded(from, [&] { return encode_values(from, tau, most, k, false, update && residual); });
}

nb::object bound_sample_largest(const Floats &grad, const Residual &residual, std::size_t stride, std::size_t count,
                                float weight) {
    if (stride == 0) throw std::invalid_argument("stride must be at least 1");
    const Source from = source(grad, residual, "generic", 1);
    Array<float> values;
    std::size_t found = 0;
    {
        nb::gil_scoped_release released;
        const std::vector<std::uint32_t> largest = sample_largest(from, stride, count, weight);
        found = largest.size();
        values = new_array<float>(found);
        if (found) std::memcpy(values.get(), largest.data(), 4 * found);
    }
    return nb::cast(as_tensor(std::move(values), found));
}

}  // namespace

void bind_select(nb::module_ &module) {
    const nb::object best = module.attr("LEVEL");
    module.def("encode_signs", &bound_encode_signs, "grad"_a.noconvert(), "residual"_a.noconvert().none(), "tau"_a,
               "update"_a, "threads"_a, "level"_a = best);
    module.def("encode_largest", &bound_encode_largest, "grad"_a.noconvert(), "residual"_a.noconvert().none(), "k"_a,
               "update"_a, "threads"_a, "level"_a = best);
    module.def("encode_above", &bound_encode_above, "grad"_a.noconvert(), "residual"_a.noconvert().none(), "tau"_a, "most"_a,
               "k"_a, "update"_a, "threads"_a, "level"_a = best);
    module.def("sample_largest", &bound_sample_largest, "grad"_a.noconvert(), "residual"_a.noconvert().none(),
               "stride"_a, "count"_a, "weight"_a);
}

}  // namespace gradcomp
