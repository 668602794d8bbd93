// Selection: what passes +-tau, and the k largest. One sweep marks what is selected in bit planes, whatever its share; the
// planes become the packet's index set.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "finite.h"
#include "indices.h"
#include "parallel.h"
#include "sample.h"
#include "tensors.h"

namespace gradcomp {
namespace {

struct Found {
    std::uint64_t count;
    std::uint32_t most;  // the largest magnitude, as bits
};

// A list of values that grows.
struct Values {
    Array<float> data;
    std::size_t size = 0;
    std::size_t capacity = 0;
};

// Room for 64 more, at least.
void grow(Values *values) {
    const std::size_t capacity = std::max<std::size_t>(2 * values->capacity, 4096);
    Array<float> larger = new_array<float>(capacity);
    if (values->size) std::memcpy(larger.get(), values->data.get(), 4 * values->size);
    values->data = std::move(larger);
    values->capacity = capacity;
}

#define GRADCOMP_BODY "select_body.h"
#include "foreach_level.h"

// A gradient, its residual (null: zeros), where to write what is left of their sum (null: nowhere), and how to go about it.
struct Source {
    const float *grad;
    const float *residual;
    float *left;
    std::size_t numel;
    Level level;
    int threads;
    std::optional<Sampling> sampling{};  // of signs, where something is left
};

struct Selection {
    std::uint64_t *mask;  // both planes are the thread's own, until it selects again
    std::uint64_t *negative;
    std::vector<float> values;  // of what is in the mask, in order, if they were asked for
    std::uint64_t count = 0;
    bool finite = true;
    std::vector<std::uint32_t> sample{};  // the largest of it, falling, as bits
};

enum class What { signs, values };

std::size_t words_of(std::size_t numel) { return numel / 64 + (numel % 64 != 0); }

// Two planes of so many words. Each thread keeps its own, a sixteenth of its longest gradient: fresh memory costs more to
// touch for the first time than the planes do to write.
std::uint64_t *planes(std::size_t words) {
    static thread_local Array<std::uint64_t> memory;
    static thread_local std::size_t capacity = 0;
    if (2 * words > capacity) {
        capacity = 0;
        memory = new_array<std::uint64_t>(2 * words);
        capacity = 2 * words;
    }
    return memory.get();
}

// scan_signs(), and the sample of each chunk while that is in the first cache.
Found scan_sampled(Level level, Sampler &sampler, const float *grad, const float *residual, float *left, std::size_t length,
                   float tau, std::uint64_t *mask, std::uint64_t *negative) {
    constexpr std::size_t kAhead = 512;  // elements to fetch before they are needed
    Found found{0, 0};
    for (std::size_t start = 0; start < length; start += Sampler::kChunk) {
        const std::size_t some = std::min(Sampler::kChunk, length - start);
        for (std::size_t i = start + kAhead; i < std::min(start + kAhead + some, length); i += 16) {
            prefetch(grad + i);
            prefetch(residual + i);
        }
        sampler.before(grad + start, some);
        const Found here = GRADCOMP_AT(level, scan_signs)(grad + start, residual + start, left + start, some, tau,
                                                          mask + start / 64, negative + start / 64);
        sampler.after(left + start, some);
        found = Found{found.count + here.count, std::max(found.most, here.most)};
    }
    return found;
}

Selection select(const Source &from, What what, float tau, bool leave) {
    const std::size_t words = words_of(from.numel);
    std::uint64_t *const memory = planes(words);
    Selection found{memory, memory + words, {}};
    const auto starts = split(from.numel, 64, from.threads);
    std::vector<Found> parts(starts.size() - 1);
    std::vector<Values> values(starts.size() - 1);
    std::vector<std::vector<std::uint32_t>> samples(starts.size() - 1);
    parallel(starts, [&](std::size_t part, std::size_t start, std::size_t stop) {
        const float *grad = from.grad + start;
        const float *residual = from.residual ? from.residual + start : nullptr;
        float *left = leave && from.left ? from.left + start : nullptr;
        std::uint64_t *mask = found.mask + start / 64;
        std::uint64_t *negative = found.negative + start / 64;
        if (from.sampling && left != nullptr) {
            Sampler sampler(*from.sampling, start);
            parts[part] = scan_sampled(from.level, sampler, grad, residual, left, stop - start, tau, mask, negative);
            samples[part] = std::move(sampler.largest);
            return;
        }
        parts[part] = what == What::signs
                          ? GRADCOMP_AT(from.level, scan_signs)(grad, residual, left, stop - start, tau, mask, negative)
                          : GRADCOMP_AT(from.level, scan_values)(grad, residual, left, stop - start, tau, mask, negative,
                                                                 &values[part]);
    });
    for (std::size_t part = 0; part < parts.size(); ++part) {
        found.count += parts[part].count;
        found.finite = found.finite && parts[part].most < kInfinity;
        const float *first = values[part].data.get();
        if (values[part].size) found.values.insert(found.values.end(), first, first + values[part].size);
        found.sample.insert(found.sample.end(), samples[part].begin(), samples[part].end());
    }
    if (from.sampling) sort_largest(found.sample, from.sampling->count);
    return found;
}

// The residual must stay as it is if anything is not finite; what else is written to is the caller's to lose.
Selection select_safely(const Source &from, What what, float tau) {
    if (from.left == nullptr || from.left != from.residual) return select(from, what, tau, true);
    return sweep_safely(from.grad, from.numel, true, from.level, from.threads,
                        [&](bool leave) { return select(from, what, tau, leave); });
}

// The `count` largest magnitudes, as bits, falling, of every stride-th element of weight * grad + residual.
std::vector<std::uint32_t> sample_largest(const Source &from, std::size_t stride, std::size_t count, float weight) {
    std::vector<std::uint32_t> sample;
    sample.reserve(from.numel / stride + 1);
    const std::size_t ahead = 24 * stride;  // every one is a cache miss: ask for many at a time
    for (std::size_t i = 0; i < from.numel; i += stride) {
        if (i + ahead < from.numel) {
            prefetch(from.grad + i + ahead);
            if (from.residual) prefetch(from.residual + i + ahead);
        }
        const float scaled = from.grad[i] * weight;
        sample.push_back(bits_of(from.residual ? scaled + from.residual[i] : scaled) & kMagnitude);
    }
    sort_largest(sample, count);
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

// Keeps the k elements of largest magnitude, of equal ones those with the lowest index. What is dropped goes back to where
// its value was taken from, if `restore` is not null.
void keep_largest(Selection &found, std::size_t numel, std::size_t k, float *restore) {
    if (found.count <= k) return;
    std::vector<std::uint32_t> magnitudes(found.values.size());
    for (std::size_t i = 0; i < magnitudes.size(); ++i) magnitudes[i] = bits_of(found.values[i]) & kMagnitude;
    std::nth_element(magnitudes.begin(), magnitudes.begin() + (k - 1), magnitudes.end(), std::greater<>());
    const std::uint32_t least = magnitudes[k - 1];
    std::size_t ties = k;
    for (std::size_t i = 0; i < k; ++i) ties -= magnitudes[i] > least;
    std::size_t kept = 0;
    std::size_t at = 0;
    for (std::size_t word = 0; word < words_of(numel); ++word) {
        for (std::uint64_t rest = found.mask[word]; rest != 0; rest &= rest - 1) {
            const float value = found.values[at++];
            const std::uint32_t magnitude = bits_of(value) & kMagnitude;
            if (magnitude > least || (magnitude == least && ties != 0)) {
                ties -= magnitude == least;
                found.values[kept++] = value;
            } else {
                found.mask[word] &= ~(rest & (~rest + 1));
                if (restore) restore[64 * word + trailing_zeros(rest)] = value;
            }
        }
    }
    found.values.resize(k);
    found.count = k;
}

void put_back(const Selection &found, float *left, std::size_t numel) {
    std::size_t at = 0;
    for (std::size_t word = 0; word < words_of(numel); ++word) {
        for (std::uint64_t rest = found.mask[word]; rest != 0; rest &= rest - 1) {
            left[64 * word + trailing_zeros(rest)] = found.values[at++];
        }
    }
}

void clear(const Selection &found, float *left, std::size_t numel) {
    for (std::size_t word = 0; word < words_of(numel); ++word) {
        for (std::uint64_t rest = found.mask[word]; rest != 0; rest &= rest - 1) {
            left[64 * word + trailing_zeros(rest)] = 0.0f;
        }
    }
}

struct Packed {
    Coded coded;
    std::uint64_t count = 0;
    bool finite = true;
    std::vector<std::uint32_t> sample{};
};

Packed encode_signs(const Source &from, float tau) {
    Selection found = select_safely(from, What::signs, tau);
    if (!found.finite) return Packed{Coded{}, 0, false};
    const Coding coding = choose_coding(found.count, from.numel, true);
    return Packed{encode_planes(found.mask, found.negative, from.numel, found.count, coding, from.level), found.count,
                  true, std::move(found.sample)};
}

// What passes +-tau, with its values: if more than `most` do, the k largest. If fewer than k do and `exact`, tau is lowered
// until enough do.
Packed encode_values(const Source &from, float tau, std::size_t most, std::size_t k, bool exact) {
    Selection found = select_safely(from, What::values, tau);
    if (!found.finite) {
        if (from.left == from.grad) put_back(found, from.left, from.numel);  // what was found is asked for
        return Packed{Coded{}, 0, false};
    }
    while (exact && found.count < k && tau > 0.0f) {
        tau = found.count > k / 4 ? tau / 2 : 0.0f;
        if (from.left) {
            // It holds acc, but for what was selected: with that put back, select from it alone.
            put_back(found, from.left, from.numel);
            found = select(Source{from.left, nullptr, nullptr, from.numel, from.level, from.threads}, What::values, tau, false);
            clear(found, from.left, from.numel);
        } else {
            found = select(from, What::values, tau, false);
        }
    }
    if (found.count > most) keep_largest(found, from.numel, k, from.left);
    const Coding coding = choose_coding(found.count, from.numel, false);
    const std::size_t values_nbytes = 4 * found.values.size();
    Packed packed{Coded{new_array<std::uint8_t>(values_nbytes +
                                                max_coded_nbytes(found.count, from.numel, coding, false))},
                  found.count};
    std::uint8_t *out = packed.coded.bytes.get();
    if (values_nbytes) std::memcpy(out, found.values.data(), values_nbytes);
    packed.coded.nbytes = values_nbytes + encode_planes_to(out + values_nbytes, found.mask, nullptr, from.numel,
                                                           found.count, coding, from.level);
    return packed;
}

// -- what Python sees ---------------------------------------------------------------------------------------------------

using Residual = std::optional<Floats>;
using Left = std::optional<MutableFloats>;

Source source(const Floats &grad, const Residual &residual, const Left &left, const std::string &level, int threads) {
    if (residual) require_same_size("residual", *residual, grad);
    if (left) require_same_size("left", *left, grad);
    if (left && !residual) throw std::invalid_argument("left needs a residual");
    return Source{grad.data(),   residual ? residual->data() : nullptr, left ? left->data() : nullptr,
                  grad.shape(0), level_named(level),                    threads};
}

template <typename Encode> nb::object encoded(const Source &from, const Encode &encode) {
    Packed packed;
    float broken = 0.0f;
    {
        nb::gil_scoped_release released;
        packed = encode();
        // Where what is left was written over the gradient, that is the sum by now.
        if (!packed.finite) broken = sum_nonfinite(from.grad, from.left == from.grad ? nullptr : from.residual, from.numel);
    }
    if (!packed.finite) return nb::float_(broken);
    auto payload = as_tensor(std::move(packed.coded.bytes), packed.coded.nbytes);
    if (from.sampling) return nb::make_tuple(std::move(payload), packed.count, best_threshold(packed.sample));
    return nb::make_tuple(std::move(payload), packed.count);
}

nb::object bound_encode_signs(const Floats &grad, const Residual &residual, float tau, const Left &left, int threads,
                              const std::string &level) {
    if (!(tau >= 0.0f) || !std::isfinite(tau)) throw std::invalid_argument("tau must be finite and at least 0");
    const Source from = source(grad, residual, left, level, threads);
    return encoded(from, [&] { return encode_signs(from, tau); });
}

nb::object bound_encode_signs_sampled(const Floats &grad, const Floats &residual, float tau, std::size_t stride,
                                      std::size_t count, float weight, const MutableFloats &left, int threads,
                                      const std::string &level) {
    if (!(tau >= 0.0f) || !std::isfinite(tau)) throw std::invalid_argument("tau must be finite and at least 0");
    if (stride == 0 || count == 0) throw std::invalid_argument("stride and count must be at least 1");
    Source from = source(grad, residual, left, level, threads);
    from.sampling = Sampling{stride, count, weight};
    return encoded(from, [&] { return encode_signs(from, tau); });
}

nb::object bound_encode_largest(const Floats &grad, const Residual &residual, std::size_t k, const Left &left, int threads,
                                const std::string &level) {
    if (k == 0) throw std::invalid_argument("k must be at least 1");
    const Source from = source(grad, residual, left, level, threads);
    return encoded(from, [&] { return encode_values(from, guess_threshold(from, k), k, k, true); });
}

nb::object bound_encode_above(const Floats &grad, const Residual &residual, float tau, std::size_t most, std::size_t k,
                              const Left &left, int threads, const std::string &level) {
    if (!(tau >= 0.0f) || !std::isfinite(tau)) throw std::invalid_argument("tau must be finite and at least 0");
    if (k == 0 || most < k) throw std::invalid_argument("k must be at least 1 and at most `most`");
    const Source from = source(grad, residual, left, level, threads);
    return encoded(from, [&] { return encode_values(from, tau, most, k, false); });
}

template <typename Use>
auto bound_sample(const Floats &grad, const Residual &residual, std::size_t stride, std::size_t count, float weight,
                  const Use &use) {
    if (stride == 0) throw std::invalid_argument("stride must be at least 1");
    const Source from = source(grad, residual, std::nullopt, "generic", 1);
    std::vector<std::uint32_t> largest;
    {
        nb::gil_scoped_release released;
        largest = sample_largest(from, stride, count, weight);
    }
    return use(largest);
}

nb::object bound_sample_largest(const Floats &grad, const Residual &residual, std::size_t stride, std::size_t count,
                                float weight) {
    return bound_sample(grad, residual, stride, count, weight, [](const std::vector<std::uint32_t> &largest) {
        Array<float> values = new_array<float>(largest.size());
        if (!largest.empty()) std::memcpy(values.get(), largest.data(), 4 * largest.size());
        return nb::cast(as_tensor(std::move(values), largest.size()));
    });
}

float bound_sample_threshold(const Floats &grad, const Residual &residual, std::size_t stride, std::size_t count,
                             float weight) {
    return bound_sample(grad, residual, stride, count, weight, best_threshold);
}

}  // namespace

void bind_select(nb::module_ &module) {
    const nb::object best = module.attr("LEVEL");
    module.def("encode_signs", &bound_encode_signs, "grad"_a.noconvert(), "residual"_a.noconvert().none(), "tau"_a,
               "left"_a.noconvert().none(), "threads"_a, "level"_a = best);
    module.def("encode_signs_sampled", &bound_encode_signs_sampled, "grad"_a.noconvert(), "residual"_a.noconvert(), "tau"_a,
               "stride"_a, "count"_a, "weight"_a, "left"_a.noconvert(), "threads"_a, "level"_a = best);
    module.def("encode_largest", &bound_encode_largest, "grad"_a.noconvert(), "residual"_a.noconvert().none(), "k"_a,
               "left"_a.noconvert().none(), "threads"_a, "level"_a = best);
    module.def("encode_above", &bound_encode_above, "grad"_a.noconvert(), "residual"_a.noconvert().none(), "tau"_a, "most"_a,
               "k"_a, "left"_a.noconvert().none(), "threads"_a, "level"_a = best);
    module.def("sample_largest", &bound_sample_largest, "grad"_a.noconvert(), "residual"_a.noconvert().none(),
               "stride"_a, "count"_a, "weight"_a);
    module.def("sample_threshold", &bound_sample_threshold, "grad"_a.noconvert(), "residual"_a.noconvert().none(),
               "stride"_a, "count"_a, "weight"_a);
}

}  // namespace gradcomp
