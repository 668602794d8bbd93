// Ranges of a long vector on several threads.

#pragma once

#include <algorithm>
#include <cstddef>
#include <exception>
#include <thread>
#include <vector>

namespace gradcomp {

// Fewer elements than this are not worth a thread.
constexpr std::size_t kMinimumPerThread = std::size_t{1} << 17;

// Where the parts of 0..numel begin, and numel at the end: at most `threads` of about the same length, each beginning at a
// multiple of align. Always one part at least.
inline std::vector<std::size_t> split(std::size_t numel, std::size_t align, int threads) {
    const std::size_t most = std::max<std::size_t>(1, numel / std::max(align, kMinimumPerThread));
    const std::size_t parts = std::min<std::size_t>(std::max(threads, 1), most);
    const std::size_t units = numel / align + (numel % align != 0);
    std::vector<std::size_t> starts;
    for (std::size_t part = 0; part < parts; ++part) {
        starts.push_back((units / parts * part + std::min(part, units % parts)) * align);
    }
    starts.push_back(numel);
    return starts;
}

// Calls body(part, start, stop) for every part of split(), each on a thread of its own; rethrows what one threw.
template <typename Body> void parallel(const std::vector<std::size_t> &starts, const Body &body) {
    const std::size_t parts = starts.size() - 1;
    std::vector<std::exception_ptr> errors(parts);
    const auto guarded = [&](std::size_t part) {
        try {
            body(part, starts[part], starts[part + 1]);
        } catch (...) {
            errors[part] = std::current_exception();
        }
    };
    std::vector<std::thread> others;
    for (std::size_t part = 1; part < parts; ++part) {
        try {
            others.emplace_back(guarded, part);
        } catch (...) {
            guarded(part);  // no more threads to be had: do it here
        }
    }
    guarded(0);
    for (std::thread &other : others) other.join();
    for (const std::exception_ptr &error : errors) {
        if (error) std::rethrow_exception(error);
    }
}

}  // namespace gradcomp
