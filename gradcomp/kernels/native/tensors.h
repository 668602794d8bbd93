// What the bindings share: tensors in and out, levels by name.

#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>

#include "levels.h"

namespace gradcomp {

namespace nb = nanobind;
using namespace nb::literals;

// Flat, contiguous, on the CPU; bind with .noconvert(), or a wrong dtype is silently copied.
template <typename T> using Vector = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats = Vector<const float>;
using MutableFloats = Vector<float>;
using Bytes = Vector<const std::uint8_t>;

struct Free {
    void operator()(void *memory) const { std::free(memory); }
};
// Memory that is not cleared and can become a tensor's. Begins at a multiple of 64 bytes.
template <typename T> using Array = std::unique_ptr<T[], Free>;

// A long one asks for huge pages: fresh memory by pages of 4 KiB costs as much as four passes over it.
template <typename T> Array<T> new_array(std::size_t count) {
    constexpr std::size_t kHugePage = std::size_t{1} << 21;
    const std::size_t align = count * sizeof(T) < kHugePage / 2 ? 64 : kHugePage;
    const std::size_t nbytes = (count * sizeof(T) / align + 1) * align;
    void *memory = std::aligned_alloc(align, nbytes);
    if (memory == nullptr) throw std::bad_alloc();
#ifdef __linux__
    if (align == kHugePage) (void)madvise(memory, nbytes, MADV_HUGEPAGE);  // a wish: it may fail
#endif
    return Array<T>(static_cast<T *>(memory));
}

// Hands the memory over to a new torch tensor of `count` elements. Needs the GIL.
template <typename T> nb::ndarray<nb::pytorch, T, nb::ndim<1>> as_tensor(Array<T> array, std::size_t count) {
    nb::capsule owner(array.get(), [](void *memory) noexcept { std::free(memory); });
    T *data = array.release();
    return nb::ndarray<nb::pytorch, T, nb::ndim<1>>(data, {count}, owner);
}

template <typename T, typename U> void require_same_size(const char *name, const T &a, const U &b) {
    if (a.shape(0) != b.shape(0)) throw std::invalid_argument(std::string(name) + " must have grad's size");
}

// Throws std::invalid_argument for a level that is not known, or that this processor does not have.
Level level_named(const std::string &name);
const char *name_of(Level level);

}  // namespace gradcomp
