// Quantizers: the parameters of a block, its codes, and what they leave in the residual, in one sweep.

#include <algorithm>
#include <cmath>
#include <limits>

#include "codes.h"
#include "finite.h"
#include "float8.h"
#include "parallel.h"
#include "tensors.h"

namespace gradcomp {
namespace {

enum class Form { levels, centred, ternary, float8 };

struct Scale {
    float low, step;
    float divisor;  // step, or 1 where that is 0: what is divided is then so small that it rounds to 0
};

struct Job {
    Form form;
    const float *grad;
    float *residual;  // may be null
    unsigned bits;
    std::size_t block;  // never 0
    float tau;          // of the ternary form
    float *parameters;
    std::uint8_t *codes;
};

struct Outcome {
    bool finite;
};

constexpr float kRounder = 0x1.8p23f;  // a number below 2^22 added to this becomes whole, ties to even
constexpr float kMostSigned8 = 127.0f;
constexpr float kLess = 1.0f - 0x1p-22f;

// Rounding may put the last level beyond the largest float, by a little.
float finite_step(float low, float step, float last) { return std::isfinite(low + step * last) ? step : step * kLess; }

Scale scale_for(float most, float last) {
    const float step = finite_step(0.0f, most / last, last);
    return {0.0f, step, step > 0.0f ? step : 1.0f};
}

float float_in_order(std::int32_t order) {
    return float_of(static_cast<std::uint32_t>(order ^ ((order >> 31) & 0x7fffffff))) + 0.0f;  // -0 becomes 0
}

Scale levels_between(std::int32_t lowest, std::int32_t highest, unsigned bits) {
    const float low = float_in_order(lowest), high = float_in_order(highest);
    const float last = static_cast<float>((1u << bits) - 1);
    const float span = std::min(high - low, std::numeric_limits<float>::max());
    const float step = finite_step(low, span / last, last);
    return {low, step, step > 0.0f ? step : 1.0f};
}

#define GRADCOMP_BODY "quantize_body.h"
#include "foreach_level.h"

nb::object encode(const Floats &grad, const std::optional<MutableFloats> &residual, Form form, unsigned bits,
                  std::size_t block, float tau, bool update, int threads, const std::string &level_name) {
    const std::size_t numel = grad.shape(0);
    if (residual) require_same_size("residual", *residual, grad);
    if (update && !residual) throw std::invalid_argument("there is no residual to update");
    if (bits < 1 || bits > 8) throw std::invalid_argument("bits must be in 1..8");
    if (block == 0 || block % 8) throw std::invalid_argument("block must be a multiple of 8");
    const Level level = level_named(level_name);
    const std::size_t rows = form == Form::ternary ? 0 : numel / block + (numel % block != 0);
    const std::size_t parameters_nbytes = rows * (form == Form::levels ? 2 : 1) * sizeof(float);
    const std::size_t nbytes = parameters_nbytes + packed_nbytes(numel, bits);
    Array<std::uint8_t> payload = new_array<std::uint8_t>(nbytes);
    const Job job{form, grad.data(), residual ? residual->data() : nullptr, bits, block, tau,
                  reinterpret_cast<float *>(payload.get()), payload.get() + parameters_nbytes};
    Outcome outcome{};
    float nonfinite = 0.0f;
    {
        nb::gil_scoped_release released;
        const auto starts = split(numel, block, threads);
        outcome = sweep_safely(job.grad, numel, update, level, threads, [&](bool updating) {
            std::vector<char> finite(starts.size() - 1);
            parallel(starts, [&](std::size_t part, std::size_t start, std::size_t stop) {
                finite[part] = GRADCOMP_AT(level, encode_any)(job, updating, start, stop);
            });
            return Outcome{std::find(finite.begin(), finite.end(), 0) == finite.end()};
        });
        if (!outcome.finite) nonfinite = sum_nonfinite(job.grad, job.residual, numel);
    }
    if (!outcome.finite) return nb::float_(nonfinite);
    return nb::cast(as_tensor(std::move(payload), nbytes));
}

nb::object encode_levels(const Floats &grad, const std::optional<MutableFloats> &residual, unsigned bits,
                         std::size_t block, bool update, int threads, const std::string &level) {
    return encode(grad, residual, Form::levels, bits, block, 0.0f, update, threads, level);
}

nb::object encode_int8(const Floats &grad, const std::optional<MutableFloats> &residual, std::size_t block, bool update,
                       int threads, const std::string &level) {
    return encode(grad, residual, Form::centred, 8, block, 0.0f, update, threads, level);
}

nb::object encode_float8(const Floats &grad, const std::optional<MutableFloats> &residual, std::size_t block,
                         bool update, int threads, const std::string &level) {
    return encode(grad, residual, Form::float8, 8, block, 0.0f, update, threads, level);
}

nb::object encode_ternary(const Floats &grad, const std::optional<MutableFloats> &residual, float tau, bool update,
                          int threads, const std::string &level) {
    if (!(tau > 0.0f)) throw std::invalid_argument("tau must be above 0");
    return encode(grad, residual, Form::ternary, 2, kCodesAtOnce, tau, update, threads, level);
}

}  // namespace

void bind_quantize(nb::module_ &module) {
    const nb::object level = module.attr("LEVEL");
    module.def("encode_levels", &encode_levels, "grad"_a.noconvert(), "residual"_a.noconvert().none(), "bits"_a, "block"_a,
               "update"_a = false, "threads"_a = 1, "level"_a = level);
    module.def("encode_int8", &encode_int8, "grad"_a.noconvert(), "residual"_a.noconvert().none(), "block"_a,
               "update"_a = false, "threads"_a = 1, "level"_a = level);
    module.def("encode_float8", &encode_float8, "grad"_a.noconvert(), "residual"_a.noconvert().none(), "block"_a,
               "update"_a = false, "threads"_a = 1, "level"_a = level);
    module.def("encode_ternary", &encode_ternary, "grad"_a.noconvert(), "residual"_a.noconvert().none(), "tau"_a,
               "update"_a = false, "threads"_a = 1, "level"_a = level);
}

}  // namespace gradcomp
