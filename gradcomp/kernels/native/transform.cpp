// Products of thin matrices and inverse cosine transforms of tiles, added where they belong in one pass.

#include <algorithm>
#include <vector>

#include "parallel.h"
#include "tensors.h"

namespace gradcomp {
namespace {

struct Factors {
    const float *left, *right;  // [rank][rows], [rank][columns]
    std::size_t rank, rows, columns;
};

struct Spectrum {
    const float *values;         // [tiles][kept]
    const std::uint16_t *index;  // [tiles][kept], below height * width
    const float *down, *across;  // bases: [height][height], [width][width]
    std::size_t kept, rows, columns, across_count, height, width;
};

#define GRADCOMP_BODY "transform_body.h"
#include "foreach_level.h"

const float *data_or_null(const std::optional<Floats> &addend, const MutableFloats &out) {
    if (!addend) return nullptr;
    require_same_size("addend", *addend, out);
    return addend->data();
}

void require(bool condition, const char *what) {
    if (!condition) throw std::invalid_argument(what);
}

void add_factors(const MutableFloats &out, const Floats &left, const Floats &right, std::size_t columns, float scale,
                 const std::optional<Floats> &addend, int threads, const std::string &level_name) {
    const std::size_t numel = out.shape(0);
    require(columns > 0 && numel % columns == 0 && right.shape(0) % columns == 0, "columns must divide out and right");
    const Factors factors{left.data(), right.data(), right.shape(0) / columns, numel / columns, columns};
    require(factors.rank > 0 && left.shape(0) == factors.rank * factors.rows, "left must have rank times rows elements");
    const float *added = data_or_null(addend, out);
    const Level level = level_named(level_name);
    nb::gil_scoped_release released;
    parallel(split(numel, columns, threads), [&](std::size_t, std::size_t start, std::size_t stop) {
        GRADCOMP_AT(level, add_factors_rows)(out.data(), added, factors, scale, start / columns, stop / columns);
    });
}

void add_spectrum(const MutableFloats &out, const Floats &values, const Vector<const std::int16_t> &index,
                  const Floats &down, const Floats &across, std::size_t rows, std::size_t columns, std::size_t height,
                  std::size_t width, float scale, const std::optional<Floats> &addend, int threads,
                  const std::string &level_name) {
    require(rows > 0 && columns > 0 && out.shape(0) == rows * columns, "out must have rows times columns elements");
    require(height > 0 && width > 0 && height * width <= 65536, "a tile must have 1 to 65536 elements");
    require(down.shape(0) == height * height && across.shape(0) == width * width, "bases must be those of the tiles");
    const std::size_t down_count = (rows + height - 1) / height, across_count = (columns + width - 1) / width;
    const std::size_t tiles = down_count * across_count, count = values.shape(0);
    require(count > 0 && count % tiles == 0 && index.shape(0) == count, "each tile must have as many coefficients");
    const auto *unsigned_index = reinterpret_cast<const std::uint16_t *>(index.data());
    const Spectrum spectrum{values.data(), unsigned_index, down.data(), across.data(), count / tiles,
                            rows,          columns,        across_count, height,       width};
    const float *added = data_or_null(addend, out);
    const Level level = level_named(level_name);
    nb::gil_scoped_release released;
    require(*std::max_element(unsigned_index, unsigned_index + count) < height * width, "an index is not in its tile");
    const std::size_t tile = height * width;
    parallel(split(tiles * tile, tile, threads), [&](std::size_t, std::size_t start, std::size_t stop) {
        GRADCOMP_AT(level, add_spectrum_tiles)(out.data(), added, spectrum, scale, start / tile, stop / tile);
    });
}

}  // namespace

void bind_transform(nb::module_ &module) {
    module.def("add_factors", &add_factors, "out"_a.noconvert(), "left"_a.noconvert(), "right"_a.noconvert(),
               "columns"_a, "scale"_a, "addend"_a.noconvert().none() = nb::none(), "threads"_a = 1,
               "level"_a = module.attr("LEVEL"));
    module.def("add_spectrum", &add_spectrum, "out"_a.noconvert(), "values"_a.noconvert(), "index"_a.noconvert(),
               "down"_a.noconvert(), "across"_a.noconvert(), "rows"_a, "columns"_a, "height"_a, "width"_a, "scale"_a,
               "addend"_a.noconvert().none() = nb::none(), "threads"_a = 1, "level"_a = module.attr("LEVEL"));
}

}  // namespace gradcomp
