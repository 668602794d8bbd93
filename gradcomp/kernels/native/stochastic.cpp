// Stochastic quantizers: a block's norm, its codes rounded at random, and what they leave in the residual, in one sweep.

#include <cmath>
#include <limits>

#include "codes.h"
#include "finite.h"
#include "parallel.h"
#include "tensors.h"

namespace gradcomp {
namespace {

enum class Form { centred, ternary, powers };

struct Scale {
    float scale, inverse, levels;
    std::int32_t bias;
};

struct Job {
    Form form;
    const float *grad;
    float *residual;  // may be null
    unsigned bits, levels;
    std::size_t block;  // never 0
    bool l2;            // else the largest magnitude
    double clip;        // root mean squares the norm is at most, or 0
    float limit;        // the largest scale
    std::uint64_t key, step;
    float *scales;
    std::uint8_t *codes;
};

struct Outcome {
    bool finite;
};

double bound_of(const Job &job, double most, double squares, std::size_t count) {
    if (job.l2) return std::sqrt(squares);
    const double limit = std::sqrt(squares / static_cast<double>(count)) * job.clip;
    return limit < most ? limit : most;
}

Scale level_scale(const Job &job, double bound) {
    const double step = bound / static_cast<double>(job.levels), limit = static_cast<double>(job.limit);
    float scale = static_cast<float>(step < limit ? step : limit);
    if (scale < std::numeric_limits<float>::min()) scale = 0.0f;
    const float inverse = scale > 0.0f ? static_cast<float>(1.0 / static_cast<double>(scale)) : 0.0f;
    return {scale, inverse, static_cast<float>(job.levels), (1 << (job.bits - 1)) - 1};
}

Scale power_scale(std::uint32_t most) {
    std::uint32_t top = (most + 0x7fffff) >> 23;
    top = top < 127 ? 127 : top > 254 ? 254 : top;
    return {float_of(top << 23), top == 254 ? 0x1p-127f : float_of((254 - top) << 23), 0.0f, 0};
}

#define GRADCOMP_BODY "stochastic_body.h"
#include "foreach_level.h"

void require_block(std::size_t block) {
    if (block == 0 || block % 8) throw std::invalid_argument("block must be a multiple of 8");
}

std::size_t blocks_of(std::size_t numel, std::size_t block) { return numel / block + (numel % block != 0); }

nb::object encode(Job job, const Floats &grad, const std::optional<MutableFloats> &residual, bool update, int threads,
                  const std::string &level_name) {
    const std::size_t numel = grad.shape(0);
    if (residual) require_same_size("residual", *residual, grad);
    require_block(job.block);
    const Level level = level_named(level_name);
    const std::size_t scales_nbytes = blocks_of(numel, job.block) * sizeof(float);
    const std::size_t nbytes = scales_nbytes + packed_nbytes(numel, job.bits);
    Array<std::uint8_t> payload = new_array<std::uint8_t>(nbytes);
    job.grad = grad.data();
    job.residual = residual ? residual->data() : nullptr;
    job.scales = reinterpret_cast<float *>(payload.get());
    job.codes = payload.get() + scales_nbytes;
    bool finite = true;
    float nonfinite = 0.0f;
    {
        nb::gil_scoped_release released;
        const auto starts = split(numel, job.block, threads);
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
    return nb::cast(as_tensor(std::move(payload), nbytes));
}

nb::object encode_stochastic(const Floats &grad, const std::optional<MutableFloats> &residual, unsigned levels,
                             std::size_t block, bool l2, double clip, double limit, std::uint64_t key,
                             std::uint64_t step, bool update, int threads, const std::string &level) {
    if (levels < 1 || levels > 127) throw std::invalid_argument("levels must be in 1..127");
    if (!(clip >= 0.0)) throw std::invalid_argument("clip must be at least 0");
    unsigned bits = 2;
    while ((1u << (bits - 1)) - 1 < levels) ++bits;
    Job job{};
    job.form = bits == 2 ? Form::ternary : Form::centred;
    job.bits = bits;
    job.levels = levels;
    job.block = block;
    job.l2 = l2;
    job.clip = clip;
    job.limit = static_cast<float>(limit);
    job.key = key;
    job.step = step;
    return encode(job, grad, residual, update, threads, level);
}

nb::object encode_powers(const Floats &grad, const std::optional<MutableFloats> &residual, std::size_t block,
                         std::uint64_t key, std::uint64_t step, bool update, int threads, const std::string &level) {
    Job job{};
    job.form = Form::powers;
    job.bits = 8;
    job.block = block;
    job.key = key;
    job.step = step;
    return encode(job, grad, residual, update, threads, level);
}

void add_powers(const MutableFloats &out, const Floats &scales, const Bytes &codes, std::size_t block, float scale,
                const std::optional<Floats> &addend, int threads, const std::string &level_name) {
    const std::size_t numel = out.shape(0);
    require_block(block);
    if (addend) require_same_size("addend", *addend, out);
    if (scales.shape(0) != blocks_of(numel, block) || codes.shape(0) != numel) {
        throw std::invalid_argument("scales and codes must be those of out's size");
    }
    const Level level = level_named(level_name);
    nb::gil_scoped_release released;
    parallel(split(numel, block, threads), [&](std::size_t, std::size_t start, std::size_t stop) {
        GRADCOMP_AT(level, add_powers_any)
        (out.data(), addend ? addend->data() : nullptr, scales.data(), codes.data(), block, scale, start, stop);
    });
}

nb::object random_halves(std::uint64_t key, std::uint64_t step, std::size_t start, std::size_t count,
                         const std::string &level_name) {
    const Level level = level_named(level_name);
    auto found = new_array<std::int32_t>(count);
    {
        nb::gil_scoped_release released;
        GRADCOMP_AT(level, halves)(key, step, start, count, found.get());
    }
    return nb::cast(as_tensor(std::move(found), count));
}

}  // namespace

void bind_stochastic(nb::module_ &module) {
    const nb::object level = module.attr("LEVEL");
    module.def("encode_stochastic", &encode_stochastic, "grad"_a.noconvert(), "residual"_a.noconvert().none(), "levels"_a,
               "block"_a, "l2"_a, "clip"_a, "limit"_a, "key"_a, "step"_a, "update"_a, "threads"_a, "level"_a = level);
    module.def("encode_powers", &encode_powers, "grad"_a.noconvert(), "residual"_a.noconvert().none(), "block"_a, "key"_a,
               "step"_a, "update"_a, "threads"_a, "level"_a = level);
    module.def("add_powers", &add_powers, "out"_a.noconvert(), "scales"_a.noconvert(), "codes"_a.noconvert(), "block"_a,
               "scale"_a, "addend"_a.noconvert().none(), "threads"_a, "level"_a = level);
    module.def("random_halves", &random_halves, "key"_a, "step"_a, "start"_a, "count"_a, "level"_a = level);
}

}  // namespace gradcomp
