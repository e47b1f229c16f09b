// What a kernel's source needs of CUDA, on a CPU: stands before the source when it is compiled by a C++
// compiler. Blocks run one after the other; the threads of a block are fibers, which take turns at its
// barriers and nowhere else. Where the first block has none, the other blocks' threads are plain calls.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <setjmp.h>
#include <tuple>
#include <ucontext.h>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)
#define DDPM_HALF_CONVERSIONS

struct dim3 {
    unsigned x, y, z;
};
static dim3 threadIdx, blockIdx, blockDim, gridDim;

static inline float __uint_as_float(unsigned bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
static inline unsigned __float_as_uint(float value) {
    unsigned bits;
    memcpy(&bits, &value, 4);
    return bits;
}
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float half_to_float(unsigned short bits) {
    _Float16 value;
    memcpy(&value, &bits, 2);
    return (float)value;
}
static inline unsigned short float_to_half(float value) {
    _Float16 half = (_Float16)value;
    unsigned short bits;
    memcpy(&bits, &half, 2);
    return bits;
}

namespace stand_in {

struct Fiber {
    // To begin it; to go on. `swapcontext` would ask the system for signal masks each time.
    ucontext_t begin;
    jmp_buf on;
    std::vector<char> stack;
    dim3 thread;
    bool begun = false, done = true, at_barrier = false;
    // What it waits with: the value that it shows the others of its warp.
    float shown = 0;
};

static std::vector<std::unique_ptr<Fiber>> fibers;
static jmp_buf scheduler;
static Fiber *current;
static const std::function<void()> *body;
static bool waited;

static void enter() {
    (*body)();
    current->done = true;
    _longjmp(scheduler, 1);
}

static void wait() {
    Fiber *own = current;
    if (!own) abort(); // No barrier in the first block, but in this one.
    waited = own->at_barrier = true;
    if (!_setjmp(own->on)) _longjmp(scheduler, 1);
}

static void run_block_without_barriers(const std::function<void()> &kernel) {
    current = nullptr;
    for (threadIdx.z = 0; threadIdx.z < blockDim.z; ++threadIdx.z)
        for (threadIdx.y = 0; threadIdx.y < blockDim.y; ++threadIdx.y)
            for (threadIdx.x = 0; threadIdx.x < blockDim.x; ++threadIdx.x) kernel();
}

static void run_block(const std::function<void()> &kernel) {
    size_t count = (size_t)blockDim.x * blockDim.y * blockDim.z;
    body = &kernel;
    while (fibers.size() < count) {
        fibers.emplace_back(new Fiber);
        fibers.back()->stack.resize(64 << 10);
    }
    for (size_t i = 0; i < count; ++i) {
        Fiber &fiber = *fibers[i];
        if (!fiber.begun) {
            getcontext(&fiber.begin);
            fiber.begin.uc_stack.ss_sp = fiber.stack.data();
            fiber.begin.uc_stack.ss_size = fiber.stack.size();
            fiber.begin.uc_link = nullptr;
            makecontext(&fiber.begin, enter, 0);
            fiber.begun = true;
        }
        fiber.thread = {(unsigned)(i % blockDim.x), (unsigned)(i / blockDim.x % blockDim.y),
                        (unsigned)(i / blockDim.x / blockDim.y)};
        fiber.done = false;
        fiber.at_barrier = false;
    }
    // In turn, so that all come to a barrier before one leaves it.
    for (bool left = true; left;) {
        left = false;
        for (size_t i = 0; i < count; ++i) {
            if (fibers[i]->done) continue;
            current = fibers[i].get();
            threadIdx = current->thread;
            if (!_setjmp(scheduler)) {
                if (current->at_barrier) _longjmp(current->on, 1);
                setcontext(&current->begin);
            }
            left = left || !fibers[i]->done;
        }
    }
}

template <class... A, size_t... I>
std::function<void()> with_arguments(void (*kernel)(A...), void **arguments, std::index_sequence<I...>) {
    auto values = std::make_tuple(*(std::decay_t<A> *)arguments[I]...);
    return [=] { std::apply(kernel, values); };
}

template <class... A> std::function<void()> *keep(void (*kernel)(A...), void **arguments) {
    return new std::function<void()>(with_arguments(kernel, arguments, std::index_sequence_for<A...>()));
}

} // namespace stand_in

static inline void __syncthreads() { stand_in::wait(); }

// All threads of the block must come here, as those of a warp must on a GPU.
static inline float __shfl_xor_sync(unsigned, float value, int other) {
    stand_in::current->shown = value;
    stand_in::wait();
    unsigned own = threadIdx.x + blockDim.x * threadIdx.y;
    float found = stand_in::fibers[own ^ other]->shown;
    stand_in::wait();
    return found;
}

// Copies a launch's arguments; runs it.
#define STAND_IN_KERNEL(name)                                                                              \
    extern "C" void *name##__bind(void **arguments) { return stand_in::keep(name, arguments); }
extern "C" void stand_in_run(void *bound, const unsigned *grid, const unsigned *block) {
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {block[0], block[1], block[2]};
    for (unsigned z = 0; z < grid[2]; ++z)
        for (unsigned y = 0; y < grid[1]; ++y)
            for (unsigned x = 0; x < grid[0]; ++x) {
                blockIdx = {x, y, z};
                bool first = !x && !y && !z;
                if (first) stand_in::waited = false;
                auto run = first || stand_in::waited ? stand_in::run_block : stand_in::run_block_without_barriers;
                run(*(std::function<void()> *)bound);
            }
}
