// One bit an element: sign bits with two scales a block, fused with the residual's update, and bare signs.

#include <cmath>
#include <cstring>
#include <limits>

#include "finite.h"
#include "parallel.h"
#include "tensors.h"

namespace gradcomp {
namespace {

struct BlockSums {
    double below = 0.0, above = 0.0;  // of the negative elements, and of the others
};

struct BitsJob {
    const float *grad;
    float *residual;  // may be null; written to only when updating
    std::size_t block;
    bool symmetric;
    float *scales;       // two a block
    std::uint8_t *bits;  // one bit an element
};

struct SignCount {
    std::size_t zeros = 0;
    std::uint32_t largest = 0;
};

struct Outcome {
    bool finite;
};

// Rounded, the mean of the largest float32s may be larger than they are.
inline float as_float32(double mean) {
    constexpr double most = std::numeric_limits<float>::max();
    return static_cast<float>(mean > most ? most : mean < -most ? -most : mean);
}

// Bit k of a byte becomes bit 2k.
inline std::uint32_t spread(std::uint32_t byte) {
    byte = (byte | byte << 4) & 0x0f0f;
    byte = (byte | byte << 2) & 0x3333;
    return (byte | byte << 1) & 0x5555;
}

#define GRADCOMP_BODY "bits_body.h"
#include "foreach_level.h"

void require_block(std::size_t block) {
    if (block == 0 || block % 8) throw std::invalid_argument("block must be a multiple of 8");
}

nb::object encode_bits(const Floats &grad, const std::optional<MutableFloats> &residual, std::size_t block,
                       bool symmetric, bool update, int threads, const std::string &level_name) {
    const std::size_t numel = grad.shape(0);
    if (residual) require_same_size("residual", *residual, grad);
    require_block(block);
    const Level level = level_named(level_name);
    const std::size_t blocks = numel / block + (numel % block != 0), bytes = numel / 8 + (numel % 8 != 0);
    const std::size_t scales_nbytes = blocks * 2 * sizeof(float);
    auto payload = new_array<std::uint8_t>(scales_nbytes + bytes);
    const BitsJob job{grad.data(), residual ? residual->data() : nullptr, block, symmetric,
                      reinterpret_cast<float *>(payload.get()), payload.get() + scales_nbytes};
    bool finite = true;
    float nonfinite = 0.0f;
    {
        nb::gil_scoped_release released;
        const auto starts = split(numel, block, threads);
        const auto sweep = [&](bool updating) {
            std::vector<char> fine(starts.size() - 1);
            parallel(starts, [&](std::size_t part, std::size_t start, std::size_t stop) {
                fine[part] = GRADCOMP_AT(level, encode_any)(job, updating, start, stop);
            });
            return Outcome{std::find(fine.begin(), fine.end(), 0) == fine.end()};
        };
        finite = sweep_safely(job.grad, numel, update && residual, level, threads, sweep).finite;
        if (!finite) nonfinite = sum_nonfinite(job.grad, job.residual, numel);
    }
    if (!finite) return nb::float_(nonfinite);
    return nb::cast(as_tensor(std::move(payload), scales_nbytes + bytes));
}

void add_bits(const MutableFloats &out, const Floats &scales, const Bytes &bits, std::size_t block,
              const std::optional<Floats> &addend, int threads, const std::string &level_name) {
    const std::size_t numel = out.shape(0);
    require_block(block);
    if (addend) require_same_size("addend", *addend, out);
    if (scales.shape(0) != 2 * (numel / block + (numel % block != 0)) || bits.shape(0) != numel / 8 + (numel % 8 != 0)) {
        throw std::invalid_argument("scales and bits must be those of out's size");
    }
    const Level level = level_named(level_name);
    nb::gil_scoped_release released;
    parallel(split(numel, block, threads), [&](std::size_t, std::size_t start, std::size_t stop) {
        GRADCOMP_AT(level, add_any)
        (out.data(), addend ? addend->data() : nullptr, scales.data(), bits.data(), block, start, stop);
    });
}

nb::object pack_signs(const Floats &grad, int threads, const std::string &level_name) {
    const std::size_t numel = grad.shape(0), bytes = numel / 8 + (numel % 8 != 0);
    const Level level = level_named(level_name);
    auto bits = new_array<std::uint8_t>(bytes);
    SignCount total;
    float nonfinite = 0.0f;
    {
        nb::gil_scoped_release released;
        const auto starts = split(numel, 8, threads);
        std::vector<SignCount> counts(starts.size() - 1);
        parallel(starts, [&](std::size_t part, std::size_t start, std::size_t stop) {
            counts[part] = GRADCOMP_AT(level, signs)(grad.data(), bits.get(), start, stop);
        });
        for (const SignCount &count : counts) {
            total.zeros += count.zeros;
            total.largest = std::max(total.largest, count.largest);
        }
        if (total.largest >= kInfinity) nonfinite = sum_nonfinite(grad.data(), nullptr, numel);
    }
    if (total.largest >= kInfinity) return nb::float_(nonfinite);
    return nb::make_tuple(as_tensor(std::move(bits), bytes), total.zeros);
}

nb::object pack_votes(const Floats &grad, int threads, const std::string &level_name) {
    const std::size_t numel = grad.shape(0), bytes = numel / 4 + (numel % 4 != 0);
    const Level level = level_named(level_name);
    auto codes = new_array<std::uint8_t>(bytes);
    {
        nb::gil_scoped_release released;
        parallel(split(numel, 8, threads), [&](std::size_t, std::size_t start, std::size_t stop) {
            GRADCOMP_AT(level, sign_map)(grad.data(), codes.get(), start, stop);
        });
    }
    return nb::cast(as_tensor(std::move(codes), bytes));
}

}  // namespace

void bind_bits(nb::module_ &module) {
    module.def("encode_bits", &encode_bits, "grad"_a.noconvert(), "residual"_a.noconvert().none(), "block"_a,
               "symmetric"_a, "update"_a, "threads"_a, "level"_a = module.attr("LEVEL"));
    module.def("add_bits", &add_bits, "out"_a.noconvert(), "scales"_a.noconvert(), "bits"_a.noconvert(), "block"_a,
               "addend"_a.noconvert().none(), "threads"_a, "level"_a = module.attr("LEVEL"));
    module.def("pack_signs", &pack_signs, "grad"_a.noconvert(), "threads"_a, "level"_a = module.attr("LEVEL"));
    module.def("pack_votes", &pack_votes, "grad"_a.noconvert(), "threads"_a,
               "level"_a = module.attr("LEVEL"));
}

}  // namespace gradcomp
